"""Processors of any image-text-to-text family, also where a part that is never used here cannot be made.

A family's own processor turns images and text into what its model reads. Several families' processors hold a part for videos
that needs torchvision; where it is missing the rest is put together without it.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from rvlm.vlm.templates import choose, mark_of

ACT = "<act>"
DEFAULT_IMAGE_SIZE = 224  # side of images for families that take any [px]
INPUT_FORMATS = ("marked", "listed", "first")
NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # else the library asks, and runs a repository's own code at a "y"


class NullVideoProcessor:
    """Stands where a processor keeps its part for videos."""

    merge_size = temporal_patch_size = 2
    num_frames = fps = 1


class VideoFreeProcessorMixin:
    """What a processor's class is mixed with so that it does without its part for videos."""

    _kept: dict[str, Any]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """Any part will do."""
        return type(argument)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Save the parts for images and text, and the settings, as `load_processor` reads them."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / "processor_config.json").write_text(json.dumps(self._kept, indent=1))


def load_processor(name_or_path: str | Path) -> ProcessorMixin:
    """The processor of a vision-language model, with `<act>` in its tokenizer and one chat template, if it has any.

    Raises:
        ImportError: The family's processor needs a package that is not here, and cannot do without it.
        ValueError: It needs code of its own, or has several chat templates and no default.
    """
    try:
        processor = _loaded(name_or_path)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name_or_path}: expected a model of a class in transformers, got one that brings code of its own, which is never "
            "run here; take a model of a family that the library knows"
        ) from error
    processor.chat_template = processor.tokenizer.chat_template = choose(processor)
    if ACT not in processor.tokenizer.get_vocab():
        processor.tokenizer.add_special_tokens({"extra_special_tokens": [ACT]}, replace_extra_special_tokens=False)
    return processor


def _loaded(name_or_path: str | Path) -> Any:
    try:
        return AutoProcessor.from_pretrained(name_or_path, **NO_CODE)
    except (ImportError, ValueError):
        if is_torchvision_available():
            raise
        return _assembled(str(name_or_path))


def _assembled(name_or_path: str) -> Any:
    """The family's processor from its parts for images and text."""
    kept, _ = ProcessorMixin.get_processor_dict(name_or_path)
    template = kept.pop("chat_template", None)
    named = getattr(transformers, kept.get("processor_class") or "", None)
    family: Any = named or PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(name_or_path, **NO_CODE))]
    settings = {k: v for k, v in kept.items() if not isinstance(v, dict) and k not in ("processor_class", "auto_map")}
    parts = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    loaded = {name: part.from_pretrained(name_or_path, **NO_CODE) for name, part in parts.items()}
    made = type(family.__name__, (VideoFreeProcessorMixin, family), {"_kept": {**settings, "processor_class": family.__name__}})
    return made(**loaded, video_processor=NullVideoProcessor(), chat_template=template, **settings)


def pictures(images: np.ndarray) -> list[Image.Image]:
    """Images (n, h, w, 3) uint8 in the form that every family's processor takes."""
    return [Image.fromarray(image) for image in images]


def blank(side: int) -> Image.Image:
    """A black image."""
    return Image.new("RGB", (side, side))


def side_of_images(processor: Any) -> int:
    """Side of the images that a family looks at [px], read off what comes back of one of `DEFAULT_IMAGE_SIZE`.

    A family that takes any size gets that one; one that resizes all images, or cuts them into tiles, the side of these.
    """
    part = processor.image_processor
    given = part(images=[blank(DEFAULT_IMAGE_SIZE)], return_tensors="pt")
    seen = {"pixel_values": given} if isinstance(given, torch.Tensor) else dict(given)
    pixels, grid = seen["pixel_values"], seen.get("image_grid_thw", seen.get("spatial_shapes"))
    if grid is not None:
        return int(grid[0][-1]) * int(part.patch_size)
    tile = pixels if isinstance(pixels, torch.Tensor) else torch.as_tensor(pixels[0])
    is_image = tile.ndim > 2 and tile.shape[-3] == 3
    return int(tile.shape[-1]) if is_image else DEFAULT_IMAGE_SIZE


class KnownImages:
    """Stands where a processor keeps its part for images, and gives back what came of as many of these sizes before."""

    def __init__(self, part: Any) -> None:
        self._part, self._kept = part, {}

    def __getattr__(self, name: str) -> Any:
        """Anything else is the part's own."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._part, name)

    def __call__(self, images: Any, *_: Any, **options: Any) -> Any:
        """As the part itself, but for the pixels, which are those of no image."""
        key = repr((_sizes(images), sorted(options.items())))
        if key not in self._kept:
            seen = self._part(images, **options)
            self._kept[key] = _empty(seen) if isinstance(seen, torch.Tensor) else {k: _empty(v) for k, v in seen.items()}
        kept = self._kept[key]
        return BatchFeature(dict(kept)) if isinstance(kept, dict) else kept


def _empty(value: Any) -> Any:
    """Zeros in the shape of pixels, which take no memory; anything else as it is."""
    is_pixels = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.new_zeros(()).expand(value.shape) if is_pixels else value


def _sizes(images: Any) -> Any:
    return [_sizes(part) for part in images] if isinstance(images, (list, tuple)) else getattr(images, "size", None)


def knowing_images(processor: Any) -> Any:
    """A copy of a processor that looks at images of one size once: the tokenizer alone then makes all other texts' ids."""
    known = copy.copy(processor)
    known.image_processor = KnownImages(processor.image_processor)
    return known


def detect_input_format(processor: Any, image_size: int) -> str:
    """How a family's processor takes images and text, found by trying with one black image.

    "marked": each image by a token in the text; "listed": images and texts as one list, in their order; "first": one image for
    each text, which the processor sets before it.

    Raises:
        ValueError: It takes them in none of these ways; with what it said.
    """
    image, said = blank(image_size), []
    ways: dict[str, Any] = {"listed": (None, [[image, ACT]]), "first": ([image], [ACT])}
    if isinstance(getattr(processor, "image_token", None), str):
        ways = {"marked": ([[image]], [mark_of(processor) + ACT]), **ways}
    for name, (images, text) in ways.items():
        try:
            if "pixel_values" in processor(images=images, text=text, return_tensors="pt"):
                return name
        except (TypeError, ValueError, AttributeError) as error:
            said.append(f"{name}: {error}")
    raise ValueError(
        f"expected a processor that takes images with text, {', '.join(INPUT_FORMATS)}; got {type(processor).__name__}, which "
        f"says {'; '.join(said)}; take a family that reads images as tokens of its text, such as SmolVLM or Qwen-VL"
    )
