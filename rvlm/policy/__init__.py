"""`VLA = VLM + action head + history`: configuration, network, checkpoints, and acting.

Modules:
    config: structure, head, history and window, and which combinations are supported.
    action_tokenizer: uniform binning of actions, and back.
    action_losses: the masked loss of continuous actions, by dimension.
    flow_matching: conditional flow matching of action chunks: loss, and Euler steps.
    action_expert: an action expert that attends to the hidden states of the backbone's layers.
    fast_tokenizer: FAST: chunks as tokens, by a cosine transform and byte pairs, and back.
    token_heads: discrete action heads: uniform bins, and FAST.
    heads: action heads: features at `<act>` to actions.
    layer_mix: a learned mix of several hidden layers.
    history_modules: policy-head histories: fuse the features of several observations.
    embodiments: the robots of a policy, and how it is conditioned on them.
    model: the network `VLA`: backbone, hidden states at `<act>`, state (proprioception), history, head.
    token_decoding: greedy decoding of action tokens in the KV cache.
    model_lock: policies of several threads over one model take turns.
    collation: windows as the batch of `VLA.forward`.
    hub: models by folder or Hub name, at a revision; upload of a policy.
    checkpoint_files: validation of a checkpoint's files.
    pretrained: save and load a policy, both directions.
    factory: make, modify, load and merge policies.
    model_card: the model card of a policy.
    observation_history: past observations while acting: features, KV cache, or the whole window.
    observation_checks: validation of observations before a policy acts on them.
    continuation_checks: validation of a chunk that real-time chunking is to continue.
    real_time_chunking: a flow head's next chunk that continues the one which is being executed.
    policy: closed-loop inference: `reset`, `select_action`, `predict_action_chunk`, unnormalised.
    delayed_policy: acting while computing: chunks that arrive some control steps late, in simulation.
    real_time_policy: the same on a robot, with a thread that computes.
    inspection: what a vision-language model supports, by trying it.
"""
