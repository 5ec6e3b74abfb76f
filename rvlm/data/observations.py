"""Observations: `images` by camera, `state` and `instruction`, in data, environments, policies and robots alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def stack_images(steps: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Images ``(h, w, 3)`` of each camera at n steps -> camera -> ``(n, h, w, 3)``."""
    return {camera: np.stack([images[camera] for images in steps]) for camera in steps[0]}
