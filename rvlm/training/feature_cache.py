"""Cached features of frozen networks, here of a vision tower: computed once per frame, written in batches, memory-mapped."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
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
from rvlm.vlm.quantization import compute_device

FEATURES_CODE = Code(("rvlm.training.feature_cache",))
FRAMES_PER_BATCH = 64  # of a forward pass of the tower


def cached_features(
    model: PreTrainedModel, processor: ProcessorMixin, images: Mapping[str, UInt8[np.ndarray, "n *steps h w 3"]]
) -> dict[str, Float[np.ndarray, "n *steps p d"]]:
    """Features of images, cached on disk by the content of the images, the tower and its processor.

    The tower is moved to this process's device.

    Args:
        model: The vision-language model.
        processor: Its processor.
        images: By camera.

    Returns:
        By camera, memory-mapped: float16, or float32 where float16 overflows.

    Raises:
        FloatingPointError: Features are NaN or infinite.
    """
    tower = {"tower": _hash_of_tower(model, processor), "code": FEATURES_CODE.hash}
    for part in vision_modules(model):
        part.to(compute_device())
    prompt_builder, dtype = PromptBuilder(processor, 1), next(vision_modules(model)[0].parameters()).dtype

    def batches(name: str) -> Iterable[np.ndarray]:
        flat = images[name].reshape(-1, 1, *images[name].shape[-3:])
        for i in range(0, len(flat), FRAMES_PER_BATCH):
            pixels = prompt_builder.pixels(flat[i : i + FRAMES_PER_BATCH]).to(compute_device(), dtype)
            yield vision_features(model, pixels).float().cpu().numpy()

    def write(name: str, path: Path) -> None:
        shape = images[name].shape[:-3]
        if not write_batches(path, shape, batches(name), np.float16):
            write_batches(path, shape, batches(name), np.float32)

    return cached_arrays({name: {"frames": array_hash(images[name]), **tower} for name in images}, FEATURES_CODE, write)


def cached_arrays(
    settings: Mapping[str, dict[str, Any]], code: Code, write: Callable[[str, Path], Any]
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Arrays on disk, each named by its settings; those that are missing are written. Data-parallel processes share the work.

    Args:
        settings: By name of an array: JSON values that determine its content, the hash of `code` among them.
        code: Code that computes them.
        write: Is given a name and the path of a file to write.

    Returns:
        By name, memory-mapped.
    """
    names, folders = list(settings), {}
    start = int(os.environ.get("RANK", 0)) * len(names) // int(os.environ.get("WORLD_SIZE", 1))
    for name in names[start:] + names[:start]:
        folder = artifacts_dir() / "features" / config_hash(settings[name])
        if not folder.is_dir():
            code.require_unchanged()
            prune_features()
            make_folder(folder, lambda part, name=name: write(name, part / "features.npy"))
        folders[name] = register(folder, code, settings[name])
    return {name: np.load(folders[name] / "features.npy", mmap_mode="r") for name in names}


def write_batches(path: Path, shape: tuple[int, ...], batches: Iterable[np.ndarray], dtype: type[np.floating]) -> bool:
    """Write features (*shape, ...) with at most a batch of them in memory; False at the first batch that overflows `dtype`.

    Raises:
        FloatingPointError: Features are NaN or infinite.
    """
    rows, i = None, 0
    for part in batches:
        if not np.isfinite(part).all():
            raise FloatingPointError(
                f"expected finite features of images from {i} on, got NaN or infinity; use another precision, or a model whose "
                "weights are finite"
            )
        if np.abs(part).max() > np.finfo(dtype).max:
            return False
        if rows is None:
            out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(*shape, *part.shape[1:]))
            reserve(path, out.offset + out.nbytes)
            rows = out.reshape(-1, *part.shape[1:])
        rows[i : i + len(part)] = part
        i += len(part)
    return True


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
    """Hash of all that the tower's features depend on except the images."""
    has_separate_tower = language_model(model) is not model.base_model  # else the connector is in the language model
    return hash_of_network(model, processor, vision_modules(model) if has_separate_tower else [model])


def hash_of_network(model: PreTrainedModel, processor: ProcessorMixin, parts: Iterable[torch.nn.Module]) -> str:
    """Hash of the weights of some parts of a model, of its configuration, and of how it computes and prepares images."""
    total = hashlib.sha256()
    for i, part in enumerate(parts):
        for name, value in part.state_dict().items():
            total.update(f"{i} {name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    config = {key: value for key, value in model.config.to_diff_dict().items() if key != "_name_or_path"}
    attention = sorted({str(getattr(getattr(m, "config", None), "_attn_implementation", None)) for m in model.modules()})
    settings = {
        "config": json.dumps(config, sort_keys=True, default=str),
        "processor": json.loads(processor.image_processor.to_json_string()),
        "attention": attention,  # it rounds otherwise, as another type of device does
        "device": compute_device().type,
    }
    return config_hash({"weights": total.hexdigest(), **settings})
