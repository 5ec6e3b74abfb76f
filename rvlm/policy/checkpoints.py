"""Policies from and to folders: made of a vision-language model, remade with other settings, loaded, merged."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from rvlm.data.actions import ActionSpec, NormStats
from rvlm.policy import hub
from rvlm.policy.config import FINETUNING_MODES, VLAConfig, check_settings
from rvlm.policy.model import VLA
from rvlm.policy.pretrained import held, non_backbone_weights
from rvlm.vlm.backbones import freeze_unused, load_backbone
from rvlm.vlm.processors import ACT, load_processor


def make_policy(
    vlm: str | Path,
    spec: ActionSpec,
    stats: dict[str, NormStats],
    *,
    is_pretrained: bool = True,
    revision: str | None = None,
    finetuning: str = "full",
    rank: int = 16,
    precision: str = "auto",
    **settings: Any,
) -> tuple[VLA, ProcessorMixin]:
    """Attach an action head to a vision-language model.

    Args:
        vlm: Folder or Hub name.
        spec: Of the demonstrations that it will be trained on.
        stats: Of their training episodes: "action" and "observation.state".
        is_pretrained: False for random weights: no vision-language pre-training.
        revision: Commit, branch or tag of a name on the Hub; the last commit if left out. The policy remembers the commit.
        finetuning: What of the backbone learns (`set_trainable`).
        rank: Of adapters.
        precision: What a backbone that stands still is held in: "fp32", "bf16", "fp16", or "auto", the machine's fastest.
        settings: Fields of `VLAConfig`: structure, head, history, window.

    Returns:
        The policy's model and its processor.

    Raises:
        TypeError: An unknown setting, with those that exist.
        ValueError: A combination that means nothing, a family that has no place for `<act>`, or no such model.
    """
    check_settings(settings)
    folder = hub.fetch(vlm, revision)
    processor = load_processor(folder)
    backbone = load_backbone(folder, processor, is_pretrained=is_pretrained, **held(folder, finetuning, precision))
    left_out = ("quantization_config", "_name_or_path")
    is_folder = Path(vlm).is_dir()
    config = VLAConfig(
        backbone={name: value for name, value in backbone.config.to_dict().items() if name not in left_out},
        vlm={
            "name": Path(vlm).resolve().name if is_folder else str(vlm),
            "revision": None if is_folder else hub.commit_of(folder),
        },
        act_id=processor.tokenizer.convert_tokens_to_ids(ACT),
        spec=spec.to_dict(),
        stats={name: s.to_dict() for name, s in stats.items()},
        **settings,
    )
    model = VLA(config, backbone)
    model.processor = processor
    _smoke_forward(model, processor)
    base = hub.origin(vlm, folder) if is_pretrained and finetuning != "full" else None
    return set_trainable(model, finetuning, rank, base, precision), processor


@torch.inference_mode()
def _smoke_forward(model: VLA, processor: ProcessorMixin) -> None:
    """Read a blank prompt, so that a family in which `<act>` has no place is refused before anything is trained."""
    prompter = model.prompt_builder(processor)
    blank = np.zeros((1, prompter.n_images, prompter.image_size, prompter.image_size, 3), np.uint8)
    model.backbone_forward(**{name: value.to(model.device) for name, value in prompter(blank, ["lift it"]).items()})


def set_trainable(model: VLA, finetuning: str, rank: int, base: dict[str, Any] | None, precision: str = "auto") -> VLA:
    """Say what of the backbone learns; history, head, state and robots' tokens always do.

    Args:
        model: Without adapters.
        finetuning: "full" (all of it), "head" (nothing), "lora", "dora" (adapters on the language model, and `<act>`), or "qlora"
            (adapters on a language model that is held in 4 bits).
        rank: Of adapters.
        base: Where the backbone came from (`rvlm.policy.hub.origin`); what stands still is not saved again. None if from nowhere.
        precision: What it is held in where it stands still.

    Raises:
        ValueError: An unknown finetuning, or adapters on a backbone that was not loaded for them or can't be loaded again.
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

        model.register_adapters(adapters.add_lora(model.backbone, finetuning, rank, model.config.act_id))
    if base is not None:
        model.config.base_model = {**base, "finetuning": finetuning, "precision": precision}
    return model


def modify_policy(
    folder: str | Path,
    *,
    revision: str | None = None,
    finetuning: str = "full",
    rank: int = 16,
    precision: str = "auto",
    **settings: Any,
) -> tuple[VLA, ProcessorMixin]:
    """A trained policy with other settings, say with a memory: what still fits keeps its weights, what is new is random.

    Args:
        folder: Where `VLA.save_pretrained` has put model and processor, or a name on the Hub; adapters are merged.
        revision: Commit, branch or tag of a name on the Hub.
        finetuning: What of the backbone learns (`set_trainable`).
        rank: Of adapters.
        precision: As `make_policy` takes it.
        settings: Fields of `VLAConfig`, as `make_policy` takes them; what is left out stays as it is.

    Returns:
        The policy's model, with the old one's spec and statistics, and its processor.

    Raises:
        TypeError: An unknown setting, with those that exist.
        ValueError: A combination that means nothing.
    """
    check_settings(settings)
    where = hub.fetch(folder, revision)
    if finetuning == "qlora" and VLAConfig.from_pretrained(where).base_model is not None:
        raise ValueError(
            f"{folder}: its adapters would be lost in 4 bits; merge them first: model, processor = merge_policy(folder), then "
            "model.save_pretrained(another_folder, processor)"
        )
    model: Any = VLA.from_pretrained(where, is_quantized=True) if finetuning == "qlora" else VLA.merged(where)
    own = {name: getattr(model.config, name) for name in VLAConfig.__annotations__ if name != "model_type"}
    changed = VLA(VLAConfig(**{**own, **settings, "base_model": None}), model.backbone)
    changed.processor = model.processor
    shapes = {name: value.shape for name, value in non_backbone_weights(changed.state_dict()).items()}
    fitting = {name: value for name, value in model.state_dict().items() if shapes.get(name) == value.shape}
    changed.load_state_dict(fitting, strict=False)
    base = hub.origin(folder, where) if finetuning != "full" else None
    return set_trainable(changed, finetuning, rank, base, precision), model.processor


def load_vla(name: str | Path, **options: Any) -> tuple[VLA, ProcessorMixin]:
    """Load a policy strictly: the model, set to evaluate, and its processor.

    Args:
        name: Where `VLA.save_pretrained` has put model and processor, or a name on the Hub.
        options: Of `VLA.from_pretrained`: `revision`, `base_model`, `is_quantized`, `device`, ...

    Raises:
        ValueError: What is missing, cut short, of another version or unlike what it was trained on, by folder and file.
    """
    model = VLA.from_pretrained(name, **options)
    return model, model.processor


def merge_policy(name: str | Path, **options: Any) -> tuple[VLA, ProcessorMixin]:
    """A policy with its backbone, and adapters added to the weights that they stand on; it can then be saved whole.

    What was trained over 4 bits is merged into the full weights, whose rounding it then no longer answers for.

    Args:
        name: Where `VLA.save_pretrained` has put model and processor, or a name on the Hub.
        options: Of `VLA.from_pretrained`.
    """
    model = VLA.merged(name, **options)
    return model, model.processor
