"""Policies from and to folders: made of a vision-language model, remade with other settings, loaded, merged."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from rvlm import adapters
from rvlm.actions import ActionSpec, NormStats
from rvlm.backbones import LOADING, compute_as_trained, freeze_unread, load_backbone, refuse_wrong_weights
from rvlm.files import weights_of
from rvlm.processors import ACT, load_processor
from rvlm.structures import TUNINGS, VLAConfig
from rvlm.vla import VLA, own_weights

MADE = {"model_type", "backbone", "act_id", "image_size", "spec", "stats", "robots", "met", "base"}  # of the data or the backbone
SETTINGS = sorted(set(VLAConfig.__annotations__) - MADE)


def make_vla(
    vlm: str | Path,
    spec: ActionSpec,
    stats: dict[str, NormStats],
    *,
    is_pretrained: bool = True,
    tuning: str = "full",
    rank: int = 16,
    **settings: Any,
) -> tuple[VLA, ProcessorMixin]:
    """Attach an action head to a vision-language model.

    Args:
        vlm: Folder or Hub name.
        spec: Of the demonstrations that it will be trained on.
        stats: Of their training episodes: "action" and "observation.state".
        is_pretrained: False for random weights: no vision-language pre-training.
        tuning: What of the backbone learns (`tune`).
        rank: Of adapters.
        settings: Fields of `VLAConfig`: structure, head, history, window.

    Returns:
        The policy's model and its processor.

    Raises:
        TypeError: An unknown setting, with those that exist.
        ValueError: A combination that means nothing, or a family that has no place for `<act>`.
    """
    _check_settings(settings)
    processor = load_processor(vlm)
    backbone = load_backbone(vlm, processor, is_pretrained=is_pretrained, **_how(vlm, tuning))
    config = VLAConfig(
        backbone={name: value for name, value in backbone.config.to_dict().items() if name != "quantization_config"},
        act_id=processor.tokenizer.convert_tokens_to_ids(ACT),
        spec=spec.to_dict(),
        stats={name: s.to_dict() for name, s in stats.items()},
        **settings,
    )
    model = VLA(config, backbone)
    _read_once(model, processor)
    return tune(model, tuning, rank, vlm if is_pretrained else None), processor


@torch.inference_mode()
def _read_once(model: VLA, processor: ProcessorMixin) -> None:
    """Read a blank prompt, so that a family in which `<act>` has no place is refused before anything is trained."""
    prompter = model.prompter(processor)
    blank = np.zeros((1, prompter.n_images, prompter.image_size, prompter.image_size, 3), np.uint8)
    model.read(**{name: value.to(model.device) for name, value in prompter(blank, ["lift it"]).items()})


def _how(vlm: str | Path, tuning: str) -> dict[str, Any]:
    """How the weights of a backbone are held: those that learn in full, others as the machine computes, or in 4 bits."""
    if tuning == "full":
        return {}
    return {"quantization": adapters.in_four_bits(vlm)} if tuning == "qlora" else {"dtype": adapters.precision()}


def _check_settings(settings: dict[str, Any]) -> None:
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise TypeError(f"unknown settings {unknown}; there are {', '.join(SETTINGS)}")


def tune(model: VLA, tuning: str, rank: int, base: str | Path | None) -> VLA:
    """Say what of the backbone learns; history, head, state and robots' tokens always do.

    Args:
        model: Without adapters.
        tuning: "full" (all of it), "head" (nothing), "lora", "dora" (adapters on the language model, and `<act>`), or "qlora"
            (adapters on a language model that is held in 4 bits).
        rank: Of adapters.
        base: Folder or Hub name that the backbone came from; what stands still is not saved again. None if it came from nowhere.

    Raises:
        ValueError: An unknown tuning, or adapters on a backbone that was not loaded for them or can't be loaded again.
    """
    if tuning not in TUNINGS:
        raise ValueError(f"no tuning {tuning!r}; there are {', '.join(TUNINGS)}")
    if tuning == "full":
        freeze_unread(model.backbone)
        return model
    model.backbone.requires_grad_(False)
    if base is None and tuning != "head":
        raise ValueError(f"expected weights under adapters that can be loaded again, got random ones with tuning={tuning!r}")
    if tuning != "head":
        model.put_adapters(adapters.attach(model.backbone, tuning, rank, model.config.act_id))
    if base is not None:
        model.config.base = {"name": str(base), "weights": weights_key(base), "tuning": tuning}
    return model


def weights_key(base: str | Path) -> str | None:
    """What stands for the weights of a model: their hash in a folder, the commit on the Hub."""
    return weights_of(base) or getattr(AutoConfig.from_pretrained(base), "_commit_hash", None)


def remake_vla(folder: str | Path, *, tuning: str = "full", rank: int = 16, **settings: Any) -> tuple[VLA, ProcessorMixin]:
    """A trained policy with other settings, say with a memory: what still fits keeps its weights, what is new is random.

    Args:
        folder: Where `VLA.save_pretrained` has put model and processor; adapters are merged.
        tuning: What of the backbone learns (`tune`).
        rank: Of adapters.
        settings: Fields of `VLAConfig`, as `make_vla` takes them; what is left out stays as it is.

    Returns:
        The policy's model, with the old one's spec and statistics, and its processor.

    Raises:
        TypeError: An unknown setting, with those that exist.
        ValueError: A combination that means nothing.
    """
    _check_settings(settings)
    if tuning == "qlora" and VLAConfig.from_pretrained(folder).base is not None:
        raise ValueError(
            f"{folder}: its adapters would be lost in 4 bits; merge them first: model, processor = merge_vla(folder), then "
            "model.save_pretrained(another_folder, processor)"
        )
    model, processor = load_vla(folder, is_quantized=True) if tuning == "qlora" else merge_vla(folder)
    own = {name: getattr(model.config, name) for name in VLAConfig.__annotations__ if name != "model_type"}
    changed = VLA(VLAConfig(**{**own, **settings, "base": None}), model.backbone)
    shapes = {name: value.shape for name, value in own_weights(changed.state_dict()).items()}
    fitting = {name: value for name, value in model.state_dict().items() if shapes.get(name) == value.shape}
    changed.load_state_dict(fitting, strict=False)
    return tune(changed, tuning, rank, folder), processor


def load_vla(
    folder: str | Path, *, base: str | Path | None = None, is_quantized: bool | None = None
) -> tuple[VLA, ProcessorMixin]:
    """Load a policy strictly.

    Args:
        folder: Where `VLA.save_pretrained` has put model and processor.
        base: Of a policy that was saved without its backbone: where that is now, if not where it was.
        is_quantized: Whether to hold the backbone in 4 bits; as it was trained, if left out.

    Returns:
        The model, set to evaluate, and its processor.

    Raises:
        ValueError: A weight is missing, unexpected or misshapen, the configuration has an unknown field, or what it
            stands on is no longer what it was trained on.
    """
    config: Any = VLAConfig.from_pretrained(folder)
    unknown = set(config.to_diff_dict()) - set(VLAConfig.__annotations__) - set(PreTrainedConfig().to_dict()) - {"architectures"}
    if unknown:
        raise ValueError(f"{folder}: unknown fields {sorted(unknown)} in its configuration; was it saved by another version?")
    processor = load_processor(folder)
    with LOADING:
        return _load(folder, config, base, is_quantized, processor), processor


def _load(folder: str | Path, config: Any, base: str | Path | None, is_quantized: bool | None, processor: Any) -> VLA:
    if config.base is not None:
        model = VLA(config, _base(folder, base or config.base["name"], config, is_quantized, processor))
        if config.base["tuning"] != "head":
            model.put_adapters(adapters.attach_saved(model.backbone, Path(folder)))
        model.fill(folder)
        return model.eval()
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
    if is_quantized:
        options["quantization_config"] = adapters.in_four_bits(folder, "backbone.")
    loaded: Any = VLA.from_pretrained(folder, config=config, **options)
    model, report = loaded
    refuse_wrong_weights(folder, report)
    compute_as_trained(model)
    return model.eval()


def _base(folder: str | Path, name: str | Path, config: Any, is_quantized: bool | None, processor: Any) -> PreTrainedModel:
    """What a policy's head and adapters stand on: a vision-language model, or the backbone of another policy."""
    expected, found, tuning = config.base["weights"], weights_key(name), config.base["tuning"]
    if found != expected:
        raise ValueError(
            f"{folder}: it was trained on {config.base['name']} with weights {expected}; got {name} with {found}; say where they "
            "are now by base=, or train it anew"
        )
    if is_quantized is not None:
        tuning = "qlora" if is_quantized else "full"
    if AutoConfig.from_pretrained(name).model_type == VLAConfig.model_type:
        return (load_vla(name, is_quantized=True) if tuning == "qlora" else merge_vla(name))[0].backbone
    return load_backbone(name, processor, **_how(name, tuning))


def merge_vla(folder: str | Path, **options: Any) -> tuple[VLA, ProcessorMixin]:
    """A policy with its backbone, and adapters added to the weights that they stand on; it can then be saved whole.

    What was trained over 4 bits is merged into the full weights, whose rounding it then no longer answers for.

    Args:
        folder: Where `VLA.save_pretrained` has put model and processor.
        options: `base` of `load_vla`.
    """
    config: Any = VLAConfig.from_pretrained(folder)
    if config.base is None:
        return load_vla(folder)
    model, processor = load_vla(folder, is_quantized=False, **options)
    own = {name: getattr(model.config, name) for name in VLAConfig.__annotations__ if name not in ("model_type", "base")}
    merged = VLA(VLAConfig(**own), model.adapters.merge_and_unload() if model.adapters is not None else model.backbone)
    merged.load_state_dict(own_weights(model.state_dict()), strict=False)
    return merged.eval(), processor
