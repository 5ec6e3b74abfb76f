"""Cached features of a frozen vision tower: computed once per frame, written in batches, memory-mapped."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from transformers import PreTrainedModel, ProcessorMixin

from rvlm.caches import Code, prune_features, register
from rvlm.files import artifacts_dir, config_hash, file_hash, make_folder, reserve
from rvlm.vlm.backbones import language_model, vision_features, vision_modules
from rvlm.vlm.prompts import PromptBuilder

FEATURES_CODE = Code(("rvlm.training.feature_cache",))
FRAMES_PER_BATCH = 64  # of a forward pass of the tower


def cached_features(
    model: PreTrainedModel, processor: ProcessorMixin, images: Mapping[str, UInt8[np.ndarray, "n *steps h w 3"]]
) -> dict[str, Float[np.ndarray, "n *steps p d"]]:
    """Features of images, cached on disk by the content of the images, the tower and its processor.

    Data-parallel processes share the work.

    Args:
        model: The vision-language model.
        processor: Its processor.
        images: By camera.

    Returns:
        By camera, memory-mapped: float16, or float32 where float16 overflows.

    Raises:
        FloatingPointError: Features are NaN or infinite.
    """
    prompt_builder, names = PromptBuilder(processor, 1), list(images)
    tower = {"tower": _hash_of_tower(model, processor), "code": FEATURES_CODE.hash}
    start = int(os.environ.get("RANK", 0)) * len(names) // int(os.environ.get("WORLD_SIZE", 1))
    paths = {}
    for name in names[start:] + names[:start]:
        settings = {"frames": array_hash(images[name]), **tower}
        folder = artifacts_dir() / "features" / config_hash(settings)
        if not folder.is_dir():
            FEATURES_CODE.require_unchanged()
            prune_features()
            make_folder(folder, lambda part, name=name: _write(part / "features.npy", model, prompt_builder, images[name]))
        paths[name] = register(folder, FEATURES_CODE, settings) / "features.npy"
    return {name: np.load(paths[name], mmap_mode="r") for name in names}


def array_hash(array: Shaped[np.ndarray, "..."]) -> str:
    """Hash of an array, 12 hexadecimal digits; of a memory map of a whole file, the file's hash."""
    if isinstance(array, np.memmap) and array.filename is not None and _is_whole_file(array):
        return file_hash(array.filename)
    total = hashlib.sha256(repr((array.shape, array.dtype.str)).encode())
    for row in array:
        total.update(np.ascontiguousarray(row).tobytes())
    return total.hexdigest()[:12]


def _is_whole_file(array: np.memmap) -> bool:
    """Whether a memory map equals its file: no part of it, no other strides, no copy-on-write."""
    try:
        stored: Any = np.load(str(array.filename), mmap_mode="r")
    except (OSError, ValueError):
        return False
    layouts = [(a.shape, a.dtype, a.strides, a.offset, getattr(a, "mode", None)) for a in (array, stored)]
    return layouts[0] == layouts[1]


def _hash_of_tower(model: PreTrainedModel, processor: ProcessorMixin) -> str:
    """Hash of all that features depend on except the images."""
    total = hashlib.sha256()
    has_separate_tower = language_model(model) is not model.base_model  # else the connector is in the language model
    for i, part in enumerate(vision_modules(model) if has_separate_tower else [model]):
        for name, value in part.state_dict().items():
            total.update(f"{i} {name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    config = {key: value for key, value in model.config.to_diff_dict().items() if key != "_name_or_path"}
    settings = json.loads(processor.image_processor.to_json_string())
    return config_hash(
        {"weights": total.hexdigest(), "config": json.dumps(config, sort_keys=True, default=str), "processor": settings}
    )


def _write(path: Path, model: PreTrainedModel, prompt_builder: PromptBuilder, images: np.ndarray) -> None:
    """Write the features of images (n, ..., h, w, 3), with at most a batch of them in memory."""
    if not _write_as(path, np.dtype(np.float16), model, prompt_builder, images):
        _write_as(path, np.dtype(np.float32), model, prompt_builder, images)


def _write_as(path: Path, dtype: np.dtype, model: PreTrainedModel, prompt_builder: PromptBuilder, images: np.ndarray) -> bool:
    """Write features as `dtype`; False at the first batch that overflows it."""
    flat, rows = images.reshape(-1, 1, *images.shape[-3:]), None
    for i in range(0, len(flat), FRAMES_PER_BATCH):
        part = vision_features(model, prompt_builder.pixels(flat[i : i + FRAMES_PER_BATCH])).float().cpu().numpy()
        if not np.isfinite(part).all():
            raise FloatingPointError(
                f"expected finite features of images from {i} on by the tower of {model.config.model_type!r}, got "
                "NaN or infinity; use another precision, or a model whose weights are finite"
            )
        if np.abs(part).max() > np.finfo(dtype).max:
            return False
        if rows is None:
            shape = (*images.shape[:-3], *part.shape[1:])
            out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            reserve(path, out.offset + out.nbytes)
            rows = out.reshape(len(flat), *part.shape[1:])
        rows[i : i + len(part)] = part
    return True
