"""Image processors whose output is looked up: each value depends on one channel of one pixel, as 256 values in a table.

So it is where images have the size that the model takes: the processor rescales and normalises channels, and may cut the image
into patches or repeat it. Which pixel and which value stands where is found by processing a few images that encode positions.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

N_PROBES = 9


@dataclasses.dataclass(frozen=True)
class PixelLookup:
    """An image processor as a table, for images of one size.

    Attributes:
        position: (n,) of each output of an image: its channel of its pixel, in the flattened image.
        entry: (n,) of each output: where the channel's values begin in the table.
        table: Outputs of the 256 values of each channel.
    """

    position: Int[np.ndarray, " n"]
    entry: Int[np.ndarray, " n"]
    table: Float[np.ndarray, " values"]

    def __call__(self, images: UInt8[np.ndarray, "m h w 3"]) -> Float[torch.Tensor, "m n"]:
        """The processor's outputs, one row per image."""
        outputs = np.empty((len(images), len(self.position)), np.float32)
        for image, output in zip(images, outputs, strict=True):  # one at a time stays in the processor's cache
            np.take(self.table, self.entry + np.take(image, self.position), out=output, mode="clip")
        return torch.from_numpy(outputs)


def find_pixel_lookup(
    process: Callable[[UInt8[np.ndarray, "m h w 3"]], Float[torch.Tensor, "..."]], height: int, width: int
) -> PixelLookup | None:
    """The lookup that equals an image processor bit for bit for images of this size [px]; None if there is none.

    Args:
        process: `N_PROBES` images to pixel values, image by image.
        height: Of the images.
        width: Of the images.
    """
    probes = _probes(height, width)
    output = process(probes.reshape(N_PROBES, height, width, 3))
    if output.dtype != torch.float32 or output.numel() % N_PROBES:
        return None
    black, *rest = output.reshape(N_PROBES, -1).numpy()
    spans, digits, ramp, noise = np.stack(rest[:3]) - black, np.stack(rest[3:6]), rest[6], rest[7]
    if not ((spans != 0).sum(0) == 1).all():
        return None
    channel = spans.argmax(0) if (spans >= 0).all() else np.abs(spans).argmax(0)
    code = np.rint((digits - black) / spans.sum(0) * 255).astype(np.int64)
    position = code[0] + 256 * code[1] + 256**2 * code[2]
    if position.min() < 0 or position.max() >= probes.shape[1] or (position % 3 != channel).any():
        return None
    table = np.full((3, 256), np.nan, np.float32)
    table[channel, probes[7, position]] = ramp
    lookup = PixelLookup(position, (256 * channel).astype(np.int16), table.ravel())
    return lookup if np.array_equal(lookup(probes[8:].reshape(1, height, width, 3))[0].numpy(), noise) else None


def _probes(height: int, width: int) -> UInt8[np.ndarray, "9 n"]:
    """Flattened images: black, one channel white (3), the position in base 256 (3), all values in each channel, noise."""
    position = np.arange(height * width * 3)
    channels = [255 * (position % 3 == c) for c in range(3)]
    digits = [position // 256**i % 256 for i in range(3)]
    noise = np.random.default_rng(0).integers(0, 256, len(position))
    return np.stack([0 * position, *channels, *digits, position // 3 % 256, noise]).astype(np.uint8)
