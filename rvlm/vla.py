"""`VLA = VLM + action head + history`: any image-text-to-text model of transformers as a robot policy.

The backbone is not changed: its tokenizer has one more token, `<act>`, and the policy reads the base model's hidden
state where it stands (the language-model head is not computed). Proprioception enters as a learned offset of that
token's input embedding.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import ModelOutput

from rvlm.actions import ActionSpec, NormStats
from rvlm.backbones import ACT, as_encoder_outputs, load_backbone, load_processor, refuse_wrong_weights
from rvlm.heads import HEADS, HISTORIES

STRUCTURES = ("one_step", "policy_head")


class VLAConfig(PreTrainedConfig):
    """What a policy is made of.

    Args:
        backbone: Configuration of the vision-language model, as a dict with its `model_type`.
        structure: "one_step" or "policy_head".
        head: Name in `HEADS`; `head_options` are its arguments by name.
        history: Name in `HISTORIES`, for "policy_head" only.
        n_obs_steps: Observations that the policy sees (t).
        chunk_size: Actions that it predicts (k).
        cameras: Names of the card's cameras, in the order of the prompt's images.
        has_state: Whether proprioception enters.
        act_id: Id of `<act>`.
        spec: `ActionSpec` of the robot, as a dict.
        stats: `NormStats` of "action" and "observation.state" over the training episodes, as dicts.
    """

    model_type = "rvlm"
    __no_type_check__ = True  # the library builds it from more than its fields, which a checker of signatures would refuse

    backbone: dict | None = None
    structure: str = "one_step"
    head: str = "mlp"
    head_options: dict | None = None
    history: str | None = None
    n_obs_steps: int = 1
    chunk_size: int = 4
    cameras: list | tuple = ("static", "wrist")
    has_state: bool = True
    act_id: int = 0
    spec: dict | None = None
    stats: dict | None = None


AutoConfig.register(VLAConfig.model_type, VLAConfig)  # so that the library knows what a policy's folder is


def check_structure(config: VLAConfig) -> None:
    """Refuse combinations that mean nothing.

    Raises:
        ValueError: Unknown or contradicting structure, head, history or window, with what is possible.
    """
    for name, table in (("structure", STRUCTURES), ("head", HEADS)):
        if getattr(config, name) not in table:
            raise ValueError(f"no {name} {getattr(config, name)!r}; there are {', '.join(table)}")
    for name in ("n_obs_steps", "chunk_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is expected to be at least 1; got {getattr(config, name)}")
    if config.structure == "one_step" and (config.history or config.n_obs_steps != 1):
        raise ValueError(
            f"one_step sees one observation and has no history; got n_obs_steps={config.n_obs_steps}, "
            f"history={config.history!r}; use structure='policy_head', or n_obs_steps=1 and history=None"
        )
    if config.structure == "policy_head" and config.history not in HISTORIES:
        raise ValueError(f"policy_head fuses steps by one of {', '.join(HISTORIES)}; got history={config.history!r}")


class VLA(PreTrainedModel):
    """A vision-language-action model: backbone, history, head, and what its actions mean.

    Saved and loaded like any transformers model, by safetensors only; spec and statistics travel in the configuration,
    and the processor in the same folder.
    """

    config_class = VLAConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: VLAConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        check_structure(config)
        if config.backbone is None or config.spec is None or config.stats is None:
            raise ValueError("expected a configuration with backbone, spec and stats, got one without; build it by make_vla")
        if backbone is None:
            settings: dict[str, Any] = dict(config.backbone)
            backbone = AutoModelForImageTextToText.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
        self.backbone: Any = backbone
        width = self.backbone.config.get_text_config().hidden_size
        self.spec = ActionSpec.from_dict(config.spec)
        self.stats = {name: NormStats.from_dict(values) for name, values in config.stats.items()}
        self._check_cameras()
        self.head = HEADS[config.head](width, config.chunk_size, len(self.spec.names), **(config.head_options or {}))
        self.history = HISTORIES[config.history](width) if config.history else nn.Identity()
        s = len(self.spec.state_names)
        self.state_in = nn.Sequential(nn.Linear(s, width), nn.GELU(), nn.Linear(width, width)) if config.has_state else None
        self.post_init()

    def _check_cameras(self) -> None:
        unknown = [c for c in self.config.cameras if c not in self.spec.cameras]
        if unknown or not self.config.cameras:
            raise ValueError(
                f"expected cameras of card {self.spec.dataset!r}, {', '.join(self.spec.cameras)}; got {list(self.config.cameras)}"
            )

    def _init_weights(self, module: nn.Module) -> None:
        """New parts keep PyTorch's own initialisation; the backbone draws or loads its own."""

    def features(
        self,
        input_ids: torch.Tensor,
        state: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Hidden states (n, d) at `<act>` for n prompts with one observation each.

        Args:
            input_ids: (n, l), each row with one `<act>`.
            state: (n, s), normalised; added to the embedding of `<act>` after a small network.
            image_features: (n, images * tokens, d) from `rvlm.backbones.vision_features`, instead of `pixel_values`.
            inputs: What else the backbone takes: `attention_mask` (n, l), `pixel_values`, ...
        """
        if image_features is not None:
            inputs["mm_encoder_outputs"] = as_encoder_outputs(image_features)
        is_act = input_ids == self.config.act_id
        handle = self._feed_state(is_act, state)
        try:
            hidden = self.backbone.model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        finally:
            if handle is not None:
                handle.remove()
        return hidden[is_act]

    def _feed_state(self, is_act: torch.Tensor, state: torch.Tensor | None) -> Any:
        """A hook that adds the state's embedding where `<act>` stands; None if the policy has no state."""
        network = self.state_in
        if network is None:
            return None
        if state is None:
            raise ValueError("this policy was built with has_state=True; expected its state (n, s), got none")

        def add(module: nn.Module, args: tuple, embedded: torch.Tensor) -> torch.Tensor:
            return embedded + is_act[..., None] * network(state)[:, None]

        return self.backbone.get_input_embeddings().register_forward_hook(add)

    def fused(self, state: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Features (b, t, d) of t observation steps, each alone through the backbone, fused by the history.

        Args:
            state: (b, t, s) normalised.
            inputs: Prompts of the b * t observations, in that order.
        """
        features = self.features(state=state.flatten(0, 1), **inputs)
        return self.history(features.unflatten(0, state.shape[:2]))

    def forward(
        self,
        state: torch.Tensor,
        action: torch.Tensor,
        action_mask: torch.Tensor,
        obs_mask: torch.Tensor | None = None,
        dataset_index: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> ModelOutput:
        """Loss on a batch.

        Args:
            state: (b, t, s), normalised.
            action: (b, t, k, a), normalised, the gripper in {0, 1}.
            action_mask: (b, t, k, a), false where an action does not count: past the episode's end, before its start.
            obs_mask: (b, t), false before the episode's start; what it says is in `action_mask` too.
            dataset_index: (b,), whose card and statistics the actions follow.
            inputs: Prompts of the b * t observations.

        Returns:
            `loss`, and the parts that the head names (`arm_loss`, `gripper_loss`).
        """
        losses = self.head.loss(self.fused(state, **inputs), action, action_mask)
        return ModelOutput(**losses)

    @torch.inference_mode()
    def predict(self, state: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Normalised actions (b, k, a) from the last of t observation steps; arguments as `fused` takes them."""
        return self.head.predict(self.fused(state, **inputs)[:, -1])

    def save_pretrained(self, folder: str | Path, processor: ProcessorMixin | None = None, **options: Any) -> None:
        """Save weights and configuration, and the processor where one is given, as `load_vla` reads them.

        Args:
            folder: Where to; made if it does not exist.
            processor: As `make_vla` gives it.
            options: Of `PreTrainedModel.save_pretrained`.
        """
        super().save_pretrained(folder, **options)
        if processor is not None:
            processor.save_pretrained(folder)


def make_vla(
    vlm: str | Path,
    spec: ActionSpec,
    stats: dict[str, NormStats],
    *,
    is_pretrained: bool = True,
    **settings: Any,
) -> tuple[VLA, ProcessorMixin]:
    """Attach an action head to a vision-language model.

    Args:
        vlm: Folder or Hub name.
        spec: Of the demonstrations that it will be trained on.
        stats: Of their training episodes: "action" and "observation.state".
        is_pretrained: False for random weights: no vision-language pre-training.
        settings: Fields of `VLAConfig`: structure, head, history, window.

    Returns:
        The policy's model and its processor.

    Raises:
        TypeError: An unknown setting, with those that exist.
        ValueError: A combination that means nothing.
    """
    known = set(VLAConfig.__annotations__) - {"model_type", "backbone", "act_id", "spec", "stats"}
    unknown = set(settings) - known
    if unknown:
        raise TypeError(f"unknown settings {sorted(unknown)}; there are {', '.join(sorted(known))}")
    processor = load_processor(vlm)
    backbone = load_backbone(vlm, processor, is_pretrained=is_pretrained)
    config = VLAConfig(
        backbone=backbone.config.to_dict(),
        act_id=processor.tokenizer.convert_tokens_to_ids(ACT),
        spec=spec.to_dict(),
        stats={name: s.to_dict() for name, s in stats.items()},
        **settings,
    )
    return VLA(config, backbone), processor


def load_vla(folder: str | Path) -> tuple[VLA, ProcessorMixin]:
    """Load a policy strictly.

    Args:
        folder: Where `VLA.save_pretrained` has put model and processor.

    Returns:
        The model, set to evaluate, and its processor.

    Raises:
        ValueError: A weight is missing, unexpected or misshapen, or the configuration has an unknown field.
    """
    config: Any = VLAConfig.from_pretrained(folder)
    unknown = set(config.to_diff_dict()) - set(VLAConfig.__annotations__) - set(PreTrainedConfig().to_dict()) - {"architectures"}
    if unknown:
        raise ValueError(f"{folder}: unknown fields {sorted(unknown)} in its configuration; was it saved by another version?")
    loaded: Any = VLA.from_pretrained(folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True)
    model, report = loaded
    refuse_wrong_weights(folder, report)
    return model.eval(), load_processor(folder)
