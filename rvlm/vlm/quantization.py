"""Where and in which number format a backbone computes: its device, a floating-point precision, or 4 bits by bitsandbytes.

Source: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), section 3: 4-bit NormalFloat, double quantisation.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from rvlm.vlm.backbones import vision_modules


def compute_device(name: str | torch.device | None = None) -> torch.device:
    """The device that this process computes on: the current GPU, by `LOCAL_RANK` among several processes, or the CPU.

    Args:
        name: One that is asked for instead.

    Raises:
        ValueError: This machine has no such device.
    """
    if name is not None:
        return _existing_device(name)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda")


def _existing_device(name: str | torch.device) -> torch.device:
    n_gpus = torch.cuda.device_count()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.type == "cuda" and (device.index or 0) >= n_gpus):
        existing = ", ".join(["cpu", *(f"cuda:{i}" for i in range(n_gpus))])
        raise ValueError(f"expected a device of this machine, {existing}; got {name!r}")
    return device


def precision() -> torch.dtype:
    """This machine's compute dtype: bfloat16, float16 on GPUs that only emulate it, float32 on the CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def dtype_of(precision_name: str) -> torch.dtype:
    """The dtype named "fp32", "bf16" or "fp16"; for "auto", `precision()`.

    Raises:
        ValueError: An unknown name; with the known ones.
    """
    known = {"auto": precision(), "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision_name not in known:
        raise ValueError(f"no precision {precision_name!r}; there are {', '.join(known)}")
    return known[precision_name]


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A vision-language model on the meta device: modules without memory for weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def nf4_config(name_or_path: str | Path, prefix: str = "", dtype: torch.dtype | None = None) -> BitsAndBytesConfig:
    """4-bit NormalFloat for the language model's linear layers; vision tower, connector and heads are not quantised.

    Args:
        name_or_path: Vision-language model, or policy around one.
        prefix: Of the backbone's modules, if it is part of a policy.
        dtype: Compute dtype; default `precision()`.

    Raises:
        ImportError: bitsandbytes cannot be imported.
    """
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"expected bitsandbytes for weights in 4 bits, got {error}; install it, or take finetuning='lora'"
        ) from error
    config: Any = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    if prefix:
        config = AutoConfig.for_model(**config.backbone)
    model = meta_model(config)
    skipped = {id(part) for part in vision_modules(model)} | {id(model.get_output_embeddings())}
    names = [prefix + name for name, module in model.named_modules() if id(module) in skipped]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or precision(),
        llm_int8_skip_modules=[*names, "head", "history", "state_projector"],
    )


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the model has 4-bit layers."""
    return any(type(module).__name__ == "Linear4bit" for module in model.modules())
