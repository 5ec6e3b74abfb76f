"""Windows of demonstrations as the batch that `VLA.forward` takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rvlm.vlm.prompts import PromptBuilder


class RobotCollator:
    """Windows of demonstrations to the batch that `VLA.forward` takes.

    Args:
        prompt_builder: Of `VLA.prompt_builder`. Interleaved, the observations of a sample share one prompt, without those before
            the episode's start; else each of the b * t observations has its own, in that order.
    """

    def __init__(self, prompt_builder: PromptBuilder) -> None:
        self.prompt_builder = prompt_builder

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Samples of `Windows` to one batch; those with features have no prompt."""
        keys = ("state", "action", "action_mask", "obs_mask", "dataset_index")
        stacked = {k: np.stack([s[k] for s in samples]) for k in (*keys, *({"features"} & samples[0].keys()))}
        if "features" in stacked:
            return _tensors(stacked)
        if self.prompt_builder.is_interleaved:
            n_steps, texts = stacked["obs_mask"].sum(1).tolist(), [s["instruction"] for s in samples]
            seen = [images for s in samples for images in s["images"][s["obs_mask"]]]
        else:
            seen = [images for s in samples for images in s["images"]]
            n_steps, texts = [1] * len(seen), [s["instruction"] for s in samples for _ in s["images"]]
        flat = np.stack(seen) if len({images.shape for images in seen}) == 1 else seen  # datasets differ in image size
        if seen[0].dtype == np.uint8:
            prompts = self.prompt_builder(flat, texts, n_steps)
        else:
            prompts = {**self.prompt_builder.tokens(texts, n_steps), **self.prompt_builder.vision_inputs(np.stack(seen))}
        return {**prompts, **_tensors(stacked)}


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
