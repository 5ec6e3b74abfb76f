"""`VLA = VLM + action head + history`: any image-text-to-text model of transformers as a robot policy.

The backbone is not changed: its tokenizer gets one more token, `<act>`, and the policy reads the base model's hidden state at
that position, or an action expert those of the whole prompt (the language-model head is not computed). Proprioception,
teacher-forced action tokens and the embodiment embedding enter as learned offsets of that token's input embedding.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import ModelOutput

from rvlm.data.actions import ActionSpec, SpecMismatch
from rvlm.policy.action_expert import ActionExpert
from rvlm.policy.config import MAX_EMBODIMENTS, VLAConfig, check_structure
from rvlm.policy.embodiments import (
    Embodiment,
    EmbodimentConditioning,
    embodiments_of,
    refuse_opposite_grippers,
    slot_directions,
    slots_of,
    with_signs_of,
)
from rvlm.policy.heads import HEADS, TokensHead
from rvlm.policy.history_modules import HISTORIES
from rvlm.policy.layer_mix import LayerMix
from rvlm.policy.pretrained import SavedPolicy
from rvlm.policy.token_decoding import generate_tokens
from rvlm.vlm.causality import ensure_causal_attention
from rvlm.vlm.hidden_states import action_query_states, prompt_states
from rvlm.vlm.prompts import PromptBuilder

Decode = Callable[[Any], Tensor]  # what a head reads at the newest observation -> normalised actions (n, k, a)


class VLA(SavedPolicy):
    """A vision-language-action model: backbone, history, head, and the action spec.

    Saved and loaded like any transformers model, as safetensors; spec and statistics are in the configuration, the processor in
    the same folder.
    """

    config_class = VLAConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: VLAConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        check_structure(config)
        own, self.embodiments = embodiments_of(config)
        self.spec, self.stats = own.spec, own.stats
        if backbone is None and config.base_model is not None:
            raise ValueError(
                f"expected the backbone of this policy, {config.base_model['name']}, got none; load it by "
                "VLA.from_pretrained(folder)"
            )
        if backbone is None:
            settings: dict[str, Any] = dict(cast(dict, config.backbone))
            backbone = AutoModelForImageTextToText.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
        self.backbone: Any = backbone
        self.register_adapters(None)
        width = self.backbone.config.get_text_config().hidden_size
        if config.action_slots is None or config.state_slots is None:
            config.action_slots, config.state_slots = slots_of([self.spec, *(robot.spec for robot in self.embodiments.values())])
        if config.directions is None:
            refuse_opposite_grippers(*self._specs_and_slots)
        config.directions = list(slot_directions(*self._specs_and_slots))
        is_binary = [bool(slot[2]) for slot in config.action_slots]
        self.head: Any = HEADS[config.head](width, config.chunk_size, is_binary, **config.head_arguments)
        self.layer_mix = None if config.vlm_layers is None or self.is_expert else LayerMix(cast(Any, config.vlm_layers))
        self.history = HISTORIES[config.history](width) if config.history else nn.Identity()
        s = len(config.state_slots) if config.has_state else 0
        self.state_projector = nn.Sequential(nn.Linear(s, width), nn.GELU(), nn.Linear(width, width)) if s else None
        self.embodiment_embedding = (
            nn.Parameter(torch.zeros(MAX_EMBODIMENTS, width)) if config.embodiment_conditioning == "token" else None
        )
        self.to(self.backbone.device)  # a backbone in 4 bits stands on the GPU already
        self.post_init()

    def register_embodiments(self, robots: Sequence[Embodiment]) -> None:
        """Add embodiments to the policy; the first becomes its target robot.

        Statistics of known robots are kept: the policy was trained with them. Quaternions of new ones are trained on the half
        sphere of robots before them. Statistics that the head cannot use are refused.
        """
        known = {self.spec.dataset: Embodiment(self.spec, self.stats), **self.embodiments}
        ids = list(dict.fromkeys([*self.conditioning.ids, *(robot.spec.dataset for robot in robots)]))
        for robot in robots:
            known.setdefault(robot.spec.dataset, with_signs_of(robot, [known[name] for name in ids if name in known]))
        if self.embodiment_embedding is not None and len(ids) > MAX_EMBODIMENTS:
            raise ValueError(
                f"expected at most {MAX_EMBODIMENTS} embodiments, got {len(ids)}; take embodiment_conditioning='name'"
            )
        actions, states = slots_of([robot.spec for robot in robots])
        missing = [slot for slot in actions if slot not in self.config.action_slots]
        missing += [name for name in states if name not in self.config.state_slots]
        if missing:
            raise ValueError(
                f"expected robots of the dimensions that this policy has, {self.config.action_slots} and "
                f"{self.config.state_slots}, got {missing} too; add them by modify_policy(folder, specs=...)"
            )
        first = known.pop(robots[0].spec.dataset)
        self.spec, self.stats, self.embodiments, self.config.embodiment_ids = first.spec, first.stats, known, ids
        self.config.spec, self.config.stats = first.to_dict()["spec"], first.to_dict()["stats"]
        self.config.embodiments = {name: robot.to_dict() for name, robot in known.items()} or None
        self.config.directions = list(slot_directions(*self._specs_and_slots))
        check_structure(cast(VLAConfig, self.config))

    @property
    def _specs_and_slots(self) -> tuple[list[ActionSpec], tuple[tuple[str, str, bool], ...]]:
        """Of all its robots, in the order in which it was given them, and its action slots."""
        slots = tuple((str(kind), str(name), bool(is_binary)) for kind, name, is_binary in self.config.action_slots)
        specs = {self.spec.dataset: self.spec, **{name: robot.spec for name, robot in self.embodiments.items()}}
        return [specs[name] for name in self.config.embodiment_ids or specs if name in specs], slots

    @property
    def conditioning(self) -> EmbodimentConditioning:
        """Conditions samples on their robot; holds nothing of the network, so a dataset can keep it."""
        ids = self.config.embodiment_ids or [self.spec.dataset, *self.embodiments]
        return EmbodimentConditioning(
            self.config.embodiment_conditioning,
            tuple(self.config.state_slots),
            tuple(ids),
            self._specs_and_slots[1],
            self.config.relative_chunk is not None,
            tuple(self.config.directions),
        )

    def embodiment(self, spec: ActionSpec) -> Embodiment:
        """The robot of this spec, with the statistics of training: that of its dataset, else the only one of its conventions.

        Raises:
            SpecMismatch: The policy was not trained on this robot, or with other conventions, or on several of these.
        """
        known = {self.spec.dataset: Embodiment(self.spec, self.stats), **self.embodiments}
        alike = [name for name, robot in known.items() if robot.spec.has_same_conventions(spec)]
        if spec.dataset not in known and len(alike) > 1:
            raise SpecMismatch(
                f"expected the dataset of one of this policy's robots of these conventions, {alike}, as each has its own "
                f"statistics, got {spec.dataset!r}; name the one that acts: dataclasses.replace(spec, dataset=...)"
            )
        name = spec.dataset if spec.dataset in known else [*alike, self.spec.dataset][0]
        known[name].spec.require_same(spec)
        return known[name]

    def _init_weights(self, module: nn.Module) -> None:
        """New parts keep PyTorch's own initialisation; the backbone draws or loads its own."""

    def prompt_builder(self, processor: ProcessorMixin) -> PromptBuilder:
        """The builder of this policy's prompts, in training and in evaluation.

        Where the KV cache is extended (interleaved observations, autoregressive tokens), prompts are padded on the left.
        """
        is_interleaved = self.config.structure == "interleaved"
        side = "left" if is_interleaved or self.is_autoregressive else "right"
        prompt_builder = PromptBuilder(processor, len(self.config.cameras), self.head.n_queries, side, is_interleaved)
        if side == "left" and not ensure_causal_attention(self.backbone, prompt_builder, self.config.act_id):
            raise ValueError(
                f"expected a causal model, but {self.backbone.config.model_type!r} attends bidirectionally within its prompt; "
                "interleaved history and autoregressive tokens are not possible: take structure='policy_head', or "
                "'one_step' with head 'mlp', 'flow' or decoding='parallel'"
            )
        return prompt_builder

    @property
    def is_expert(self) -> bool:
        """Whether the head attends to all tokens of the prompt."""
        return isinstance(self.head, ActionExpert)

    @property
    def is_autoregressive(self) -> bool:
        """Whether actions are decoded autoregressively."""
        return isinstance(self.head, TokensHead) and self.head.is_autoregressive

    def backbone_forward(
        self, input_ids: Int[Tensor, "b l"], offsets: Float[Tensor, "n d"] | None = None, **inputs: Any
    ) -> tuple[Float[Tensor, "n d"], Any]:
        """One pass of the backbone, as `rvlm.vlm.hidden_states.action_query_states`, in the head's precision; layers mixed."""
        layers = None if self.layer_mix is None else self.config.vlm_layers
        hidden, cache = action_query_states(self.backbone, self.config.act_id, input_ids, offsets, layers=layers, **inputs)
        hidden = hidden.to(next(self.head.parameters()).dtype)
        return hidden if self.layer_mix is None else self.layer_mix(hidden), cache

    def action_query_embeddings(
        self, n: int, state: Float[Tensor, "n _"] | None, tokens: Int[Tensor, "n N"] | None = None
    ) -> Float[Tensor, "queries d"] | None:
        """Offsets of the input embeddings of the `<act>` of n observations (n * N, d), or None.

        Args:
            n: Observations.
            state: (n, s) as `conditioning` gives it; added at the first `<act>` of each.
            tokens: (n, N), teacher-forced.

        Raises:
            ValueError: The policy takes a state or an embodiment index, and none or one of another width was given.
        """
        proprio = self._state_embedding(state)
        if not isinstance(self.head, TokensHead):
            return proprio
        queries = self.head.query_embeddings(n, tokens)
        if proprio is not None:
            queries = torch.cat([queries[:, :1] + proprio[:, None], queries[:, 1:]], dim=1)
        return queries.flatten(0, 1)

    def _state_embedding(self, state: torch.Tensor | None) -> torch.Tensor | None:
        if self.state_projector is None and self.embodiment_embedding is None:
            return None
        width = len(self.config.state_slots) + (self.embodiment_embedding is not None)
        if state is None or state.shape[-1] != width:
            got = "none" if state is None else f"one of {state.shape[-1]}"
            raise ValueError(f"expected a state (n, {width}), got {got}; see `VLA.conditioning.align_state`")
        if self.embodiment_embedding is None:
            return cast(nn.Module, self.state_projector)(state)
        embodiment = self.embodiment_embedding[state[:, -1].long()]
        return embodiment if self.state_projector is None else embodiment + self.state_projector(state[:, :-1])

    def observation_features(
        self,
        input_ids: Int[Tensor, "b l"],
        state: Float[Tensor, "n _"] | None = None,
        tokens: Int[Tensor, "n N"] | None = None,
        **inputs: Any,
    ) -> Float[Tensor, "n ... d"]:
        """What the head reads of n observations: hidden states at `<act>` (n, d) or N of them (n, N, d), or `prompt_states`.

        Args:
            input_ids: (b, l), with n observations in all.
            state: (n, s), as `conditioning` gives it.
            tokens: (n, N), teacher-forced action tokens.
            inputs: As `backbone_forward` takes them.
        """
        n_queries = self.head.n_queries
        n = int((input_ids == self.config.act_id).sum()) // n_queries
        offsets = self.action_query_embeddings(n, state, tokens)
        if self.is_expert:
            layers = self.config.vlm_layers or self.head.n_layers
            states = prompt_states(self.backbone, self.config.act_id, input_ids, offsets, layers=layers, **inputs)
            return states.to(next(self.head.parameters()).dtype)
        hidden, _ = self.backbone_forward(input_ids, offsets, **inputs)
        return hidden.unflatten(0, (n, n_queries)) if n_queries > 1 else hidden

    def history_features(
        self,
        state: Float[Tensor, "b t _"],
        obs_mask: Bool[Tensor, "b t"] | None = None,
        tokens: Int[Tensor, "n N"] | None = None,
        features: Float[Tensor, "b t d"] | None = None,
        **inputs: Any,
    ) -> Float[Tensor, "b t ... d"]:
        """Features (b, t, ..., d) of t observation steps, each with its past; as of `observation_features`.

        Args:
            state: (b, t, s), as `conditioning` gives it.
            obs_mask: (b, t), false before the episode's start; "interleaved" leaves those observations out.
            tokens: (b * t, N), teacher-forced action tokens.
            features: (b, t, d) of the single observations, computed before: the backbone is not run.
            inputs: Prompts of the b * t observations, in that order; interleaved, of b sequences.
        """
        if features is not None:
            return self.history(features)
        if self.config.structure != "interleaved":
            features = self.observation_features(state=state.flatten(0, 1), tokens=tokens, **inputs).unflatten(0, state.shape[:2])
            return self.history(features)
        valid = torch.ones(state.shape[:2], dtype=torch.bool, device=state.device) if obs_mask is None else obs_mask
        features = self.observation_features(state=state[valid], **inputs)
        return features.new_zeros(*state.shape[:2], *features.shape[1:]).index_put((valid,), features)

    def forward(
        self,
        state: Float[Tensor, "b t _"] | None = None,
        action: Float[Tensor, "b t k a"] | None = None,
        action_mask: Bool[Tensor, "b t k a"] | None = None,
        obs_mask: Bool[Tensor, "b t"] | None = None,
        dataset_index: Int[Tensor, " b"] | None = None,
        labels: Int[Tensor, "b l"] | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """Loss on a batch of actions or, with `labels`, on a batch of answers (VQA).

        Args:
            state: (b, t, s), as `conditioning` gives it.
            action: (b, t, k, a), normalised, binary dimensions in {0, 1}.
            action_mask: (b, t, k, a), false past the episode's end, before its start, and in dimensions that the robot lacks.
            obs_mask: (b, t), false before the episode's start.
            dataset_index: (b,), of the dataset whose card and statistics the actions follow.
            labels: (b, l), token ids of the answers; -100 elsewhere.
            inputs: As `history_features` takes them.

        Returns:
            `loss`, and its parts: `arm_loss` of continuous dimensions and `gripper_loss` of binary ones, `token_loss`, or
            `answer_loss`.
        """
        if labels is not None:
            loss = self.backbone(labels=labels, **inputs).loss
            return ModelOutput(loss=loss, answer_loss=loss)
        state, action, action_mask = (cast(torch.Tensor, given) for given in (state, action, action_mask))
        tokens = self.head.encode(action, action_mask).flatten(0, 1) if self.is_autoregressive else None
        return ModelOutput(**self.head.loss(self.history_features(state, obs_mask, tokens, **inputs), action, action_mask))

    @torch.inference_mode()
    def predict(
        self,
        state: Float[Tensor, "b t _"],
        obs_mask: Bool[Tensor, "b t"] | None = None,
        decode: Decode | None = None,
        is_present: Bool[Tensor, " a"] | None = None,
        **inputs: Any,
    ) -> Float[Tensor, "b k a"]:
        """Normalised actions (b, k, a) from the last of t observation steps.

        Args:
            state: As `history_features` takes it.
            obs_mask: Likewise.
            decode: The head's features -> actions, in place of its `predict`; not for autoregressive heads.
            is_present: Which action slots (a,) the robots have (`conditioning`); those of the target robot by default.
            inputs: As `history_features` takes them.
        """
        if self.is_autoregressive:
            if is_present is None:
                is_present = torch.from_numpy(self.conditioning.present_slots(self.embodiment(self.spec))).to(self.device)
            return self.head.decode(generate_tokens(self, state[:, -1], is_present=is_present, **inputs))
        return (decode or self.head.predict)(self.history_features(state, obs_mask, **inputs)[:, -1])


AutoModel.register(VLAConfig, VLA)  # AutoModel loads policies once this module is imported
