"""Synthetic images and texts for the smallest vision-language model and demonstrations."""

import numpy as np

TEXTS = ["lift the red cube", "push the blue ball left", "open the drawer", "is the light on ? yes no nothing"]
TOY = {"image_size": 48, "patch_size": 12, "width": 32, "vision_width": 32, "vision_layers": 1, "text_layers": 1}


def toy_frames(spec, n, seed, size=48):
    """Frames of one synthetic episode, with LeRobot's keys."""
    rng = np.random.default_rng(seed)
    action = spec.set_grippers(rng.uniform(-1, 1, (n, 7)).astype(np.float32), rng.random((n, 1)) > 0.5)
    images = {f"observation.images.{c}": rng.integers(0, 255, (n, size, size, 3), dtype=np.uint8) for c in spec.cameras}
    return {**images, "observation.state": rng.normal(size=(n, 7)).astype(np.float32), "action": action}
