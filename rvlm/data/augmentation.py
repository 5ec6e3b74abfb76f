"""Random shift, crop and light of images, as they are trained on."""

import numpy as np
import torch
from torch.nn import functional


def augment(images: np.ndarray, rng: np.random.Generator, shift: int = 0, crop: float = 0, color: float = 0) -> np.ndarray:
    """Random shift and crop per camera (edges repeat), and brightness and contrast; hue is kept, as instructions name colours.

    Args:
        images: (t, cameras, h, w, 3) uint8; all observation steps of one camera move together.
        rng: Draws shift and cut of each camera, and one change of brightness and contrast for all.
        shift: Largest shift along each axis [px].
        crop: Largest part of each side that is cut away, before what is left is enlarged to the whole.
        color: Largest relative change of contrast, and of brightness in parts of half its range.
    """
    if not (shift or crop or color):
        return images
    h, w = images.shape[2:4]
    gain, bias = rng.uniform(1 - color, 1 + color), 128 * rng.uniform(-color, color)
    out = np.empty_like(images)
    for camera in range(images.shape[1]):
        part = rng.uniform(1 - crop, 1)
        x, y = rng.uniform(part - 1, 1 - part, 2) + 2 * rng.integers(-shift, shift + 1, 2) / (w, h)
        view = torch.tensor(images[:, camera]).permute(0, 3, 1, 2).float()
        theta = torch.tensor([[part, 0, x], [0, part, y]], dtype=torch.float32).expand(len(view), -1, -1)
        grid = functional.affine_grid(theta, list(view.shape), align_corners=False)
        moved = functional.grid_sample(view, grid, padding_mode="border", align_corners=False)
        out[:, camera] = ((moved - 128) * gain + 128 + bias).clamp(0, 255).round().permute(0, 2, 3, 1).numpy()
    return out
