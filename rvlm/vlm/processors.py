"""Processors of any image-text-to-text family, also without the video processor, which needs torchvision.

A family's own processor makes model inputs of images and text. Where torchvision is missing, it is built from its image
processor and tokenizer alone.
"""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import UInt8
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from rvlm.vlm.templates import image_token, select_chat_template
from rvlm.vlm.tiling import use_one_tile

ACT = "<act>"
DEFAULT_IMAGE_SIZE = 224  # for families that take images of any size [px]
INPUT_FORMATS = ("placeholder", "interleaved", "image_first")
NO_REMOTE_CODE: dict[str, Any] = {"trust_remote_code": False}  # by default the library asks, and "y" runs a repository's code


class NullVideoProcessor:
    """Placeholder for a processor's video processor."""

    merge_size = temporal_patch_size = 2
    num_frames = fps = 1


class VideoFreeProcessorMixin:
    """Mixin that lets a family's processor class work without a video processor."""

    _settings: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its family, as its class has no name in a module."""
        return _empty_video_free, (type(self).__bases__[1],), self.__dict__

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """Accept a component of any class."""
        return type(argument)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Save image processor, tokenizer and settings, as `load_processor` reads them."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / "processor_config.json").write_text(json.dumps(self._settings, indent=1))


def load_processor(name_or_path: str | Path, is_tiled: bool = False) -> ProcessorMixin:
    """The processor of a vision-language model, with `<act>` in its tokenizer and at most one chat template.

    Args:
        name_or_path: Folder or Hub name.
        is_tiled: Whether images are split into tiles as its files say; else each is one tile (`use_one_tile`), also
            of the files that such a processor saves.

    Raises:
        ImportError: The family's processor needs a package that is not installed.
        ValueError: It needs remote code, or has several chat templates and no default.
    """
    try:
        processor = _auto_processor(name_or_path)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name_or_path}: expected a model of a class in transformers, got one that brings code of its own, which is never "
            "run here; take a model of a family that the library knows"
        ) from error
    if not is_tiled:
        use_one_tile(processor.image_processor)
    processor.chat_template = processor.tokenizer.chat_template = select_chat_template(processor)
    if ACT not in processor.tokenizer.get_vocab():
        processor.tokenizer.add_special_tokens({"extra_special_tokens": [ACT]}, replace_extra_special_tokens=False)
    return processor


def _auto_processor(name_or_path: str | Path) -> Any:
    try:
        return AutoProcessor.from_pretrained(name_or_path, **NO_REMOTE_CODE)
    except (ImportError, ValueError):
        if is_torchvision_available():
            raise
        return _without_video_processor(str(name_or_path))


def _without_video_processor(name_or_path: str) -> Any:
    """The family's processor from its image processor and tokenizer."""
    config, _ = ProcessorMixin.get_processor_dict(name_or_path)
    template = config.pop("chat_template", None)
    named = getattr(transformers, config.get("processor_class") or "", None)
    family: Any = named or PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(name_or_path, **NO_REMOTE_CODE))]
    settings = {k: v for k, v in config.items() if not isinstance(v, dict) and k not in ("processor_class", "auto_map")}
    auto = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    components = {name: cls.from_pretrained(name_or_path, **NO_REMOTE_CODE) for name, cls in auto.items()}
    processor = _video_free(family)(**components, video_processor=NullVideoProcessor(), chat_template=template, **settings)
    processor._settings = {**settings, "processor_class": family.__name__}
    return processor


@functools.cache
def _video_free(family: type) -> Any:
    """The family's processor class with `VideoFreeProcessorMixin`."""
    return type(family.__name__, (VideoFreeProcessorMixin, family), {})


def _empty_video_free(family: type) -> Any:
    """A processor without components, for `pickle` to fill."""
    made = _video_free(family)
    return made.__new__(made)


def to_pil(images: UInt8[np.ndarray, "n h w 3"]) -> list[Image.Image]:
    """Images (n, h, w, 3) uint8 as PIL images, which every family's processor takes."""
    return [Image.fromarray(image) for image in images]


def black_image(side: int) -> Image.Image:
    """A black square image; side in px."""
    return Image.new("RGB", (side, side))


def detect_image_size(processor: Any) -> int:
    """Side of a model's input images [px], found by processing one of `DEFAULT_IMAGE_SIZE`.

    `DEFAULT_IMAGE_SIZE` if the family takes any size; the side of resized images or tiles otherwise.
    """
    image_processor = processor.image_processor
    output = image_processor(images=[black_image(DEFAULT_IMAGE_SIZE)], return_tensors="pt")
    vision = {"pixel_values": output} if isinstance(output, torch.Tensor) else dict(output)
    pixels, grid = vision["pixel_values"], vision.get("image_grid_thw", vision.get("spatial_shapes"))
    if grid is not None:
        return int(grid[0][-1]) * int(image_processor.patch_size)
    tile = pixels if isinstance(pixels, torch.Tensor) else torch.as_tensor(pixels[0])
    is_image = tile.ndim > 2 and tile.shape[-3] == 3
    return int(tile.shape[-1]) if is_image else DEFAULT_IMAGE_SIZE


class CachedImageProcessor:
    """Wraps an image processor: the output depends only on number and size of the images, is cached, and has zero pixels."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor, self._cache = image_processor, {}

    def __getattr__(self, name: str) -> Any:
        """Public attributes are the wrapped processor's."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._image_processor, name)

    def __call__(self, images: Any, *_: Any, **options: Any) -> Any:
        """The wrapped processor's output for images of these sizes, with zero pixels."""
        key = repr((_sizes(images), sorted(options.items())))
        if key not in self._cache:
            output = self._image_processor(images, **options)
            is_tensor = isinstance(output, torch.Tensor)
            self._cache[key] = _zero_pixels(output) if is_tensor else {k: _zero_pixels(v) for k, v in output.items()}
        cached = self._cache[key]
        return BatchFeature(dict(cached)) if isinstance(cached, dict) else cached


def _zero_pixels(value: Any) -> Any:
    """Floating-point tensors (pixels) as expanded zeros, which take no memory; anything else unchanged."""
    is_pixels = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.new_zeros(()).expand(value.shape) if is_pixels else value


def _sizes(images: Any) -> Any:
    return [_sizes(image) for image in images] if isinstance(images, (list, tuple)) else getattr(images, "size", None)


def with_cached_images(processor: Any) -> Any:
    """A copy of a processor that processes images of one size once, so that further texts cost only the tokenizer."""
    cached = copy.copy(processor)
    cached.image_processor = CachedImageProcessor(processor.image_processor)
    return cached


def detect_input_format(processor: Any, image_size: int) -> str:
    """The format in which a family's processor takes images and text, found by trying with one black image.

    "placeholder": an image token in the text for each image; "interleaved": one list of images and texts, in order;
    "image_first": one image per text, which the processor puts first.

    Raises:
        ValueError: It takes none of these formats; with its errors.
    """
    image, errors = black_image(image_size), []
    formats: dict[str, Any] = {"interleaved": (None, [[image, ACT]]), "image_first": ([image], [ACT])}
    if isinstance(getattr(processor, "image_token", None), str):
        formats = {"placeholder": ([[image]], [image_token(processor) + ACT]), **formats}
    for name, (images, text) in formats.items():
        try:
            if "pixel_values" in processor(images=images, text=text, return_tensors="pt"):
                return name
        except (TypeError, ValueError, AttributeError) as error:
            errors.append(f"{name}: {error}")
    raise ValueError(
        f"expected a processor that takes images with text ({', '.join(INPUT_FORMATS)}); got {type(processor).__name__}, which "
        f"raises {'; '.join(errors)}; take a family with image tokens in its text, such as SmolVLM or Qwen-VL"
    )
