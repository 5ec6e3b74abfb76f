"""Vision inputs of prompts with images of one size, without the family's processor: looked-up pixels, and what never changes."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8

from rvlm.vlm.pixel_lookup import PixelLookup, find_pixel_lookup
from rvlm.vlm.prompt_batches import inputs_per_token


@dataclasses.dataclass(frozen=True)
class ProcessorShortcut:
    """A processor's inputs per image or prompt, such as pixels, masks and grids, for images of one size.

    Attributes:
        lookup: Of pixel values.
        example: The processor's output for a prompt of one observation.
    """

    lookup: PixelLookup
    example: dict[str, torch.Tensor]

    def __call__(self, images: UInt8[np.ndarray, "m n h w 3"]) -> dict[str, torch.Tensor]:
        """Vision inputs of m observations."""
        tokens = inputs_per_token(self.example)
        inputs = {k: _repeated(v, len(images)) for k, v in self.example.items() if k not in tokens}
        pixels = self.lookup(images.reshape(-1, *images.shape[2:]))
        return {**inputs, "pixel_values": pixels.reshape(-1, *self.example["pixel_values"].shape[1:])}


def _repeated(value: torch.Tensor, n: int) -> torch.Tensor:
    """A tensor n times along its first axis; a constant that takes no memory takes none then."""
    if any(value.stride()):
        return value.repeat(n, *[1] * (value.ndim - 1))
    return value[(0,) * value.ndim].expand(n * len(value), *value.shape[1:])


def _compact(value: torch.Tensor) -> torch.Tensor:
    """The tensor, without taking memory if it is constant: a mask has a value for each pixel."""
    first = value[(0,) * value.ndim]
    return first.expand(value.shape) if bool((value == first).all()) else value


def find_shortcut(
    process: Callable[[UInt8[np.ndarray, "m n h w 3"]], dict[str, torch.Tensor]],
    example: dict[str, torch.Tensor],
    n_images: int,
    height: int,
    width: int,
) -> ProcessorShortcut | None:
    """The shortcut for images of this size [px], if the processor's pixels can be looked up; the caller compares the rest.

    Args:
        process: The processor, for prompts of one observation with these images.
        example: Its output for one of them.
        n_images: Images per observation.
        height: Of the images.
        width: Of the images.
    """

    def pixels_of(images: UInt8[np.ndarray, "m h w 3"]) -> Float[torch.Tensor, "m values"]:
        n_prompts = -(-len(images) // n_images)
        filled = np.resize(images, (n_prompts, n_images, *images.shape[1:]))
        return process(filled)["pixel_values"].reshape(n_prompts * n_images, -1)[: len(images)]

    lookup = find_pixel_lookup(pixels_of, height, width)
    return lookup and ProcessorShortcut(lookup, {name: _compact(value) for name, value in example.items()})


def is_same_batch(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether two batches have equal values bit for bit, whatever the axes over which images are counted."""
    if ours.keys() != theirs.keys():
        return False
    return all(
        value.numel() == theirs[name].numel() and torch.equal(value.reshape(theirs[name].shape), theirs[name])
        for name, value in ours.items()
    )
