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
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from rvlm.actions import ActionSpec, NormStats
from rvlm.backbones import ACT, load_backbone, load_processor
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


def check_structure(config: VLAConfig) -> None:
    """Refuse combinations that mean nothing.

    Raises:
        ValueError: Unknown or contradicting structure, head, history or window, with what is possible.
    """
    for name, table in (("structure", STRUCTURES), ("head", HEADS)):
        if getattr(config, name) not in table:
            raise ValueError(f"no {name} {getattr(config, name)!r}; there are {', '.join(table)}")
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
        if backbone is None:
            settings = dict(config.backbone)
            backbone = AutoModelForImageTextToText.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
        self.backbone = backbone
        width = backbone.config.get_text_config().hidden_size
        self.spec = ActionSpec.from_dict(config.spec)
        self.stats = {name: NormStats.from_dict(values) for name, values in config.stats.items()}
        self.head = HEADS[config.head](width, config.chunk_size, len(self.spec.names), **(config.head_options or {}))
        self.history = HISTORIES[config.history](width) if config.history else nn.Identity()
        self.state_in = nn.Sequential(nn.Linear(len(self.spec.state_names), width), nn.GELU(), nn.Linear(width, width)) if config.has_state else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """New parts keep PyTorch's own initialisation; the backbone draws or loads its own."""

    def vision_modules(self) -> list[nn.Module]:
        """The backbone's vision tower and connector: all of its base model but the language model."""
        language = self.backbone.model.get_decoder()
        return [part for part in self.backbone.model.children() if part is not language]

    def freeze_vision(self) -> None:
        """Leave vision tower and connector as they are; their features can then be computed once."""
        for part in self.vision_modules():
            part.requires_grad_(False)

    @torch.inference_mode()
    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Image features (n, images * tokens, d) as the language model receives them."""
        features = self.backbone.model.get_image_features(pixel_values, return_dict=True).pooler_output
        return torch.cat(list(features)).unflatten(0, (len(pixel_values), -1))

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
            image_features: (n, images * tokens, d) from `vision_features`, instead of `pixel_values`.
            inputs: What else the backbone takes: `attention_mask` (n, l), `pixel_values`, ...
        """
        if image_features is not None:
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=list(image_features))}
        is_act = input_ids == self.config.act_id
        handle = self._feed_state(is_act, state) if self.state_in is not None else None
        try:
            hidden = self.backbone.model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        finally:
            if handle is not None:
                handle.remove()
        return hidden[is_act]

    def _feed_state(self, is_act: torch.Tensor, state: torch.Tensor) -> Any:
        def add(module: nn.Module, args: tuple, embedded: torch.Tensor) -> torch.Tensor:
            return embedded + is_act[..., None] * self.state_in(state)[:, None]

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
        """Loss on a batch (DESIGN of the batch: README).

        Args:
            state: (b, t, s). action, action_mask: (b, t, k, a). obs_mask: (b, t).
            inputs: Prompts of the b * t observations.
        """
        losses = self.head.loss(self.fused(state, **inputs), action, action_mask)
        return ModelOutput(**losses)

    @torch.inference_mode()
    def predict(self, state: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Normalised actions (b, k, a) from the last of t observation steps."""
        return self.head.predict(self.fused(state, **inputs)[:, -1])

    def save_pretrained(self, folder: str | Path, processor: ProcessorMixin | None = None, **options: Any) -> None:
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
        spec, stats: Of the demonstrations that it will be trained on.
        is_pretrained: False for random weights: no vision-language pre-training.
        settings: Fields of `VLAConfig`.

    Returns:
        The policy's model and its processor.
    """
    processor = load_processor(vlm)
    backbone = load_backbone(vlm, processor, is_pretrained=is_pretrained)
    known = set(VLAConfig.__annotations__) | set()
    unknown = set(settings) - known
    if unknown:
        raise TypeError(f"unknown settings {sorted(unknown)}; there are {', '.join(sorted(known))}")
    config = VLAConfig(
        backbone=backbone.config.to_dict(),
        act_id=processor.tokenizer.convert_tokens_to_ids(ACT),
        spec=spec.to_dict(),
        stats={name: s.to_dict() for name, s in stats.items()},
        **settings,
    )
    return VLA(config, backbone), processor


def load_vla(folder: str | Path) -> tuple[VLA, ProcessorMixin]:
    """Load a policy strictly: a missing, extra or misshapen weight is an error that names it."""
    model, report = VLA.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"{folder}: expected exactly the weights of its configuration; got {wrong}; retrain or restore it")
    return model.eval(), load_processor(folder)
