"""One size for the images of all cameras, the same way in training and while acting."""

from __future__ import annotations

import numpy as np
from PIL import Image


def resize(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """An image ``(h, w, 3)`` uint8 in another height and width [px], bilinear with antialiasing; as it is if None or equal."""
    if size is None or image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
