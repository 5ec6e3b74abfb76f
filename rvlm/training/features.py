"""Features of a frozen vision tower: computed once for each frame, written to disk batch by batch, read back as a map."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from rvlm.caches import Code, prune_features, register
from rvlm.files import artifacts_dir, config_hash, file_hash, make_folder, reserve
from rvlm.vlm.backbones import language_model, vision_features, vision_modules
from rvlm.vlm.prompts import PromptBuilder

FEATURES_CODE = Code(("rvlm.training.features",))
FRAMES_PER_BATCH = 64  # frames that pass through the tower at once


def cached_features(model: PreTrainedModel, processor: ProcessorMixin, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A frozen tower's features of stored images, kept by content: of the images, the tower and its processor.

    Processes that train together share the work.

    Args:
        model: The vision-language model.
        processor: Its processor.
        images: Name -> (n, ..., h, w, 3) uint8.

    Returns:
        Name -> (n, ..., tokens, d), a map of a file: float16, or float32 where that is too narrow.

    Raises:
        FloatingPointError: The tower gives numbers that are none.
    """
    prompt_builder, names = PromptBuilder(processor, 1), list(images)
    tower = {"tower": _hash_of_tower(model, processor), "code": FEATURES_CODE.hash}
    start = int(os.environ.get("RANK", 0)) * len(names) // int(os.environ.get("WORLD_SIZE", 1))
    paths = {}
    for name in names[start:] + names[:start]:
        settings = {"frames": content_of(images[name]), **tower}
        folder = artifacts_dir() / "features" / config_hash(settings)
        if not folder.is_dir():
            FEATURES_CODE.require_unchanged()
            prune_features()
            make_folder(folder, lambda part, name=name: _write(part / "features.npy", model, prompt_builder, images[name]))
        paths[name] = register(folder, FEATURES_CODE, settings) / "features.npy"
    return {name: np.load(paths[name], mmap_mode="r") for name in names}


def content_of(array: np.ndarray) -> str:
    """Twelve characters that stand for an array: of a map of a whole file, for the file."""
    if isinstance(array, np.memmap) and array.filename is not None and _is_whole_file(array):
        return file_hash(array.filename)
    total = hashlib.sha256(repr((array.shape, array.dtype.str)).encode())
    for row in array:
        total.update(np.ascontiguousarray(row).tobytes())
    return total.hexdigest()[:12]


def _is_whole_file(array: np.memmap) -> bool:
    """Whether an array holds what its file holds, in the same order: no part, no turned view, nothing that was written over."""
    try:
        stored: Any = np.load(str(array.filename), mmap_mode="r")
    except (OSError, ValueError):
        return False
    layout = [(a.shape, a.dtype, a.strides, a.offset, getattr(a, "mode", None)) for a in (array, stored)]
    return layout[0] == layout[1]


def _hash_of_tower(model: PreTrainedModel, processor: ProcessorMixin) -> str:
    """What stands for all that features depend on beside the images."""
    total = hashlib.sha256()
    is_apart = language_model(model) is not model.base_model  # else the connector is among the language model's parts
    for i, part in enumerate(vision_modules(model) if is_apart else [model]):
        for name, value in part.state_dict().items():
            total.update(f"{i} {name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    config = {key: value for key, value in model.config.to_diff_dict().items() if key != "_name_or_path"}
    told = json.loads(processor.image_processor.to_json_string())
    return config_hash(
        {"weights": total.hexdigest(), "config": json.dumps(config, sort_keys=True, default=str), "processor": told}
    )


def _write(path: Path, model: PreTrainedModel, prompt_builder: PromptBuilder, images: np.ndarray) -> None:
    """All features of images (n, ..., h, w, 3), never more than a batch of them in memory."""
    if not _has_written(path, np.dtype(np.float16), model, prompt_builder, images):
        _has_written(path, np.dtype(np.float32), model, prompt_builder, images)


def _has_written(path: Path, dtype: np.dtype, model: PreTrainedModel, prompt_builder: PromptBuilder, images: np.ndarray) -> bool:
    """Write them in this type, or stop at the first batch that it cannot hold."""
    flat, rows = images.reshape(-1, 1, *images.shape[-3:]), None
    for i in range(0, len(flat), FRAMES_PER_BATCH):
        part = vision_features(model, prompt_builder.pixels(flat[i : i + FRAMES_PER_BATCH])).float().cpu().numpy()
        if not np.isfinite(part).all():
            raise FloatingPointError(
                f"expected finite features of images from {i} on by the tower of {model.config.model_type!r}, got "
                "some that are no numbers; take another precision, or a model whose weights are whole"
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
