"""Make a policy of a vision-language model, load it, modify its structure, merge its adapters."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from rvlm.data.actions import ActionSpec, NormStats
from rvlm.policy import hub
from rvlm.policy.config import FINETUNING_MODES, TOKENIZED_BY, VLAConfig, check_settings
from rvlm.policy.embodiments import slots_of
from rvlm.policy.model import VLA
from rvlm.policy.pretrained import load_kwargs, non_backbone_weights
from rvlm.vlm.backbones import freeze_unused, load_backbone, set_attention
from rvlm.vlm.processors import ACT, load_processor


def make_policy(
    vlm: str | Path,
    spec: ActionSpec,
    stats: dict[str, NormStats],
    *,
    is_pretrained: bool = True,
    revision: str | None = None,
    finetuning: str = "full",
    lora_rank: int = 16,
    precision: str = "auto",
    attn_implementation: str | None = None,
    specs: Sequence[ActionSpec] = (),
    **settings: Any,
) -> tuple[VLA, ProcessorMixin]:
    """Attach an action head to a vision-language model; gives the policy's model and its processor.

    Args:
        vlm: Folder or Hub name.
        spec: Of the demonstrations that it will be trained on.
        stats: Of their training episodes: "action" and "observation.state".
        is_pretrained: False for random weights, without vision-language pre-training.
        revision: Commit, branch or tag of a name on the Hub (default: the last commit); the commit is recorded.
        finetuning: Which weights of the backbone are trained, as of `set_trainable`.
        lora_rank: Of adapters.
        precision: Of frozen weights.
        attn_implementation: How attention is computed, one of `rvlm.vlm.backbones.ATTENTION`; by default the library's choice.
        specs: Of all robots that it will be trained on, if it is more than one: it gets the dimensions of all of them.
        settings: Fields of `VLAConfig`: structure, head, history, window; `cameras` are all of the card's by default.

    Raises:
        TypeError: An unknown setting.
        ValueError: An unsupported combination, a family that has no position for `<act>`, or no such model or attention.

    Example:
        >>> data, settings = rvlm.EpisodeDataset("demonstrations"), {"structure": "interleaved", "n_obs_steps": 8, "head": "flow"}
        >>> model, processor = rvlm.make_policy("vlm", data.spec, data.stats(), **settings)
        >>> model.save_pretrained("made", processor)
    """
    check_settings(settings)
    folder = hub.fetch(vlm, revision)
    processor = load_processor(folder, settings.get("image_tiling", False))
    backbone = load_backbone(folder, processor, is_pretrained=is_pretrained, **load_kwargs(folder, finetuning, precision))
    set_attention(backbone, attn_implementation)
    origin = {"name": Path(vlm).resolve().name, "revision": None}
    if not Path(vlm).is_dir():
        origin = {"name": str(vlm), "revision": hub.commit_of(folder)}
    derived = {"vlm": origin, "act_id": processor.tokenizer.convert_tokens_to_ids(ACT), "backbone": _architecture(backbone)}
    conventions = {"spec": spec.to_dict(), "stats": {name: s.to_dict() for name, s in stats.items()}}
    derived["action_slots"], derived["state_slots"] = slots_of([spec, *specs])
    model = VLA(VLAConfig(**derived, **conventions, **{"cameras": spec.cameras, **settings}), backbone)
    model.processor = processor
    _smoke_forward(model, processor)
    base = hub.origin(vlm, folder) if is_pretrained and finetuning != "full" else None
    return set_trainable(model, finetuning, lora_rank, base, precision), processor


def _architecture(backbone: PreTrainedModel) -> dict[str, Any]:
    left_out = ("quantization_config", "_name_or_path")
    return {name: value for name, value in backbone.config.to_dict().items() if name not in left_out}


@torch.inference_mode()
def _smoke_forward(model: VLA, processor: ProcessorMixin) -> None:
    """One forward pass of a blank prompt, so that a family without a position for `<act>` is refused before training."""
    prompt_builder = model.prompt_builder(processor)
    blank = np.zeros((1, prompt_builder.n_images, prompt_builder.image_size, prompt_builder.image_size, 3), np.uint8)
    state = torch.zeros(1, len(model.config.state_slots) + (model.embodiment_embedding is not None), device=model.device)
    prompt = {name: value.to(model.device) for name, value in prompt_builder(blank, ["lift it"]).items()}
    model.observation_features(state=state, **prompt)


def set_trainable(model: VLA, finetuning: str, lora_rank: int, base: dict[str, Any] | None, precision: str = "auto") -> VLA:
    """Set which weights of the backbone are trained; all others of the policy always are.

    Args:
        model: Without adapters.
        finetuning: "full" (all of it), "head" (nothing), "lora", "dora" (adapters on the language model, and `<act>`), or "qlora"
            (adapters on a language model that is held in 4 bits).
        lora_rank: Of adapters.
        base: Origin of the backbone (`rvlm.policy.hub.origin`), since frozen weights are not stored; None if it cannot be loaded.
        precision: Of frozen weights: "fp32", "bf16", "fp16", or "auto", the machine's fastest.

    Raises:
        ValueError: An unknown mode, or adapters on a backbone that was not loaded for them or has no origin.
    """
    if finetuning not in FINETUNING_MODES:
        raise ValueError(f"no finetuning {finetuning!r}; there are {', '.join(FINETUNING_MODES)}")
    if finetuning == "full":
        freeze_unused(model.backbone)
        return model
    model.backbone.requires_grad_(False)
    if base is None and finetuning != "head":
        raise ValueError(
            f"expected weights under adapters that can be loaded again, got random ones with finetuning={finetuning!r}"
        )
    if finetuning != "head":
        from rvlm.vlm import adapters  # and with it peft, which takes seconds

        model.register_adapters(adapters.add_lora(model.backbone, finetuning, lora_rank, model.config.act_id))
    if base is not None:
        model.config.base_model = {**base, "finetuning": finetuning, "precision": precision}
    return model


def modify_policy(
    folder: str | Path,
    *,
    revision: str | None = None,
    finetuning: str = "full",
    lora_rank: int = 16,
    precision: str = "auto",
    attn_implementation: str | None = None,
    specs: Sequence[ActionSpec] = (),
    **settings: Any,
) -> tuple[VLA, ProcessorMixin]:
    """A trained policy with other settings, such as a history: parts of equal shape keep their weights, new ones are random.

    Args:
        folder: Of a saved policy, or its Hub name; adapters are merged.
        revision: Commit, branch or tag of a name on the Hub.
        finetuning: What of the backbone is trained (`set_trainable`).
        lora_rank: Of adapters.
        precision: As `make_policy` takes it.
        attn_implementation: As `make_policy` takes it.
        specs: Of robots that it will be trained on; with dimensions that it lacks, its output layers begin anew.
        settings: Fields of `VLAConfig` to change; with another `head` its options are the default ones unless given.

    Returns:
        The policy's model, with the old one's spec and statistics, and its processor.

    Raises:
        TypeError: An unknown setting.
        ValueError: An unsupported combination.
    """
    check_settings(settings)
    where = hub.fetch(folder, revision)
    if finetuning == "qlora" and VLAConfig.from_pretrained(where).base_model is not None:
        raise ValueError(
            f"{folder}: its adapters would be lost in 4 bits; merge them first: model, processor = merge_policy(folder), then "
            "model.save_pretrained(another_folder, processor)"
        )
    model: Any = VLA.from_pretrained(where, is_quantized=True) if finetuning == "qlora" else VLA.merged(where)
    if settings.get("image_tiling", model.config.image_tiling) != model.config.image_tiling:
        raise ValueError(
            f"{folder}: expected image_tiling={model.config.image_tiling}, as it was trained; got {settings['image_tiling']}; "
            "leave it out, or make a policy of the vision-language model"
        )
    _refuse_other_representation(folder, model.config, settings)
    if settings.get("head", model.config.head) != model.config.head:
        settings = {"head_options": None, **settings}  # the old ones are of the old head
    config = model.config.with_stored_backbone(**settings, **_grown_slots(model.config, specs))
    if any(getattr(config, name) != getattr(model.config, name) for name in TOKENIZED_BY):
        config.action_vocabulary = None
    changed = VLA(config, model.backbone)
    changed.processor = model.processor
    set_attention(changed.backbone, attn_implementation)
    shapes = {name: value.shape for name, value in non_backbone_weights(changed.state_dict()).items()}
    fitting = {name: value for name, value in model.state_dict().items() if shapes.get(name) == value.shape}
    changed.load_state_dict(fitting, strict=False)
    base = hub.origin(folder, where) if finetuning != "full" else None
    return set_trainable(changed, finetuning, lora_rank, base, precision), model.processor


def _refuse_other_representation(folder: str | Path, config: VLAConfig, settings: dict[str, Any]) -> None:
    """Statistics are of recorded actions, or of relative ones in chunks of one size."""
    wanted = config.with_stored_backbone(**settings)
    if wanted.relative_chunk != config.relative_chunk:
        raise ValueError(
            f"{folder}: expected action_representation={config.action_representation!r}"
            + (f" and chunk_size={config.chunk_size}" if config.relative_chunk else "")
            + f", of which its statistics are, got {wanted.action_representation!r} and {wanted.chunk_size}; leave them out, or "
            "begin with the vision-language model"
        )


def _grown_slots(config: VLAConfig, specs: Sequence[ActionSpec]) -> dict[str, Any]:
    """Slots of a policy's own robots and of others; warns where weights begin anew for them."""
    actions, states = slots_of(specs)
    own: Any = (config.action_slots, config.state_slots)
    new = [[thing for thing in others if thing not in ours] for ours, others in zip(own, (actions, states), strict=True)]
    if any(new):
        warnings.warn(
            f"new dimensions, actions {new[0]} and state {new[1]}: layers that read or write them start from random weights",
            stacklevel=3,
        )
    return {"action_slots": [*own[0], *new[0]], "state_slots": [*own[1], *new[1]]}


def load_vla(name: str | Path, **options: Any) -> tuple[VLA, ProcessorMixin]:
    """Load a policy strictly: the model in evaluation mode, and its processor.

    Args:
        name: Folder of a saved policy, or its Hub name.
        options: Of `VLA.from_pretrained`: `revision`, `base_model`, `is_quantized`, `device`, ...

    Raises:
        ValueError: As `VLA.from_pretrained`.
    """
    model = VLA.from_pretrained(name, **options)
    return model, model.processor


def merge_policy(name: str | Path, **options: Any) -> tuple[VLA, ProcessorMixin]:
    """A policy with adapters merged into its backbone; it is then saved with the backbone.

    QLoRA adapters are merged into the full-precision weights, without the 4-bit rounding they were trained with.

    Args:
        name: Folder of a saved policy, or its Hub name.
        options: Of `VLA.from_pretrained`.
    """
    model = VLA.merged(name, **options)
    return model, model.processor
