"""Tiny policies of every kind and their inputs, for tests of the network and of the closed loop."""

import numpy as np
import torch
from toy_data import TEXTS

from rvlm.data.actions import ActionSpec
from rvlm.policy.collation import RobotCollator
from rvlm.policy.factory import make_policy

SPEC = ActionSpec.from_card("tabletop_franka7")
ONE_STEP = {"structure": "one_step", "head": "mlp", "chunk_size": 3, "head_options": {"hidden": 32}}
POLICY_HEAD = {**ONE_STEP, "structure": "policy_head", "history": "lstm", "n_obs_steps": 3}
INTERLEAVED = {**ONE_STEP, "structure": "interleaved", "n_obs_steps": 3}
TOKENS = {"structure": "one_step", "head": "tokens", "chunk_size": 3, "head_options": {"n_bins": 32}}
FAST = {**TOKENS, "head": "fast", "head_options": {"scale": 4.0}}
FLOW = {"head": "flow"}
EXPERT = {"head": "expert", "head_options": {"hidden": 32, "n_layers": 2, "n_heads": 2}}
SETTINGS = {
    "one_step-mlp": ONE_STEP,
    "one_step-flow": {**ONE_STEP, **FLOW},
    "one_step-mlp-layers": {**ONE_STEP, "vlm_layers": [0, -1]},
    "one_step-expert": {**ONE_STEP, **EXPERT},
    "one_step-tokens": TOKENS,
    "one_step-fast": {**FAST, "head_options": {"scale": 20.0}},  # rounds finely enough for a chunk of noise
    "one_step-tokens-parallel": {**TOKENS, "head_options": {"n_bins": 32, "decoding": "parallel"}},
    "interleaved-mlp": INTERLEAVED,
    "interleaved-flow": {**INTERLEAVED, **FLOW},
    "interleaved-flow-layers": {**INTERLEAVED, **FLOW, "vlm_layers": 2},
    "interleaved-expert": {**INTERLEAVED, **EXPERT},
    "policy_head-lstm-mlp": POLICY_HEAD,
    "policy_head-lstm-flow": {**POLICY_HEAD, **FLOW},
    "policy_head-gpt-mlp": {**POLICY_HEAD, "history": "gpt"},
    "policy_head-gpt-flow": {**POLICY_HEAD, "history": "gpt", **FLOW},
}


def build(vlm, stats, settings):
    torch.manual_seed(0)
    model, processor = make_policy(vlm, SPEC, stats, **settings)
    return model.eval(), processor


def windows_like(config, b=3, seed=0, texts=TEXTS, n_cameras=2):
    """b synthetic samples in the format of `Windows`."""
    rng, t, k = np.random.default_rng(seed), config.n_obs_steps, config.chunk_size
    samples = []
    for i in range(b):
        action = rng.uniform(-1, 1, (t, k, 7)).astype(np.float32)
        action[..., 6] = rng.random((t, k)) > 0.5
        samples.append({
            "images": rng.integers(0, 256, (t, n_cameras, 48, 48, 3), np.uint8),
            "state": rng.normal(size=(t, 7)).astype(np.float32), "action": action,
            "action_mask": np.ones((t, k, 7), bool), "obs_mask": np.ones(t, bool), "dataset_index": 0,
            "instruction": texts[i % len(texts)],
        })  # fmt: skip
    return samples


def collate(model, processor, samples):
    return RobotCollator(model.prompt_builder(processor))(samples)


def a_batch(model, processor, b=3, **options):
    return collate(model, processor, windows_like(model.config, b, **options))


def inputs(batch):
    return {k: v for k, v in batch.items() if k not in ("action", "action_mask", "dataset_index")}


def observe(rng, instruction=TEXTS[0]):
    image = rng.integers(0, 256, (2, 48, 48, 3), np.uint8)
    state = rng.normal(size=7).astype(np.float32)
    return {"images": {"static": image[0], "wrist": image[1]}, "state": state, "instruction": instruction}


def perturbed_policy(vlm, stats, finetuning="full", **options):
    """A policy whose trainable weights have been perturbed."""
    torch.manual_seed(0)
    model, processor = make_policy(vlm, SPEC, stats, finetuning=finetuning, lora_rank=2, **ONE_STEP, **options)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.02 * torch.randn_like(weight)
    return model.eval(), processor


def predicted(model, processor):
    return model.predict(**inputs(a_batch(model, processor)))


def fused(model, batch):
    """The features that the head gets, with teacher-forced action tokens if it has some."""
    tokens = model.head.encode(batch["action"]).flatten(0, 1) if model.is_autoregressive else None
    with torch.inference_mode():
        return model.history_features(tokens=tokens, **inputs(batch))
