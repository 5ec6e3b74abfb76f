"""Observation histories while acting, one class a structure: `add` an observation of each robot, then `predict`.

Robots act in a batch: each `add` takes one observation of every robot; `keep` drops those that are done.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rvlm.policy.model import VLA
from rvlm.vlm.backbones import vision_features
from rvlm.vlm.prompts import PromptBuilder


class SingleObservation:
    """One-step structure: the newest observation only."""

    def __init__(self, model: VLA, prompt_builder: PromptBuilder) -> None:
        self.model, self.prompt_builder = model, prompt_builder
        self._inputs: dict[str, torch.Tensor] = {}

    def add(self, images: UInt8[np.ndarray, "n m h w 3"], state: Float[Tensor, "n _"], instructions: Sequence[str]) -> None:
        """Add one observation of n robots: images (n, cameras, h, w, 3) uint8, state (n, s) as `VLA.conditioning` gives it."""
        self._inputs = {**_prompts(self.model, self.prompt_builder, images, instructions), "state": state[:, None]}

    def predict(self) -> Float[Tensor, "n k a"]:
        """Normalised chunks (n, k, a)."""
        return self.model.predict(**self._inputs)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the robots at these indices, from the next `add` on."""
        self._inputs = {}


class FeatureHistory:
    """Policy-head structure: features at `<act>` of the last t observations, each computed once.

    A window that is not full is padded with its oldest observation, as in training.
    """

    def __init__(self, model: VLA, prompt_builder: PromptBuilder) -> None:
        self.model, self.prompt_builder = model, prompt_builder
        self._features: deque[torch.Tensor] = deque(maxlen=model.config.n_obs_steps)

    def add(self, images: UInt8[np.ndarray, "n m h w 3"], state: Float[Tensor, "n _"], instructions: Sequence[str]) -> None:
        """As `SingleObservation.add`."""
        self._features.append(
            self.model.observation_features(state=state, **_prompts(self.model, self.prompt_builder, images, instructions))
        )

    def predict(self) -> Float[Tensor, "n k a"]:
        """Normalised chunks (n, k, a)."""
        missing = self.model.config.n_obs_steps - len(self._features)
        stacked = torch.stack([self._features[0]] * missing + list(self._features), dim=1)
        return self.model.head.predict(self.model.history(stacked)[:, -1])

    def keep(self, rows: Sequence[int]) -> None:
        """As `SingleObservation.keep`."""
        self._features = deque((features[list(rows)] for features in self._features), self._features.maxlen)


class UncachedSequence:
    """Interleaved structure without KV cache: the whole sequence is recomputed at every step.

    When the window is full, the next observation starts a new one that keeps the newest half: every length up to a full window
    was trained, and the KV cache of `KVCachedSequence` need not be rebuilt at every step.
    """

    def __init__(self, model: VLA, prompt_builder: PromptBuilder) -> None:
        self.model, self.prompt_builder = model, prompt_builder
        self._steps: list[tuple[Any, torch.Tensor]] = []  # per observation: images or features, and state (n, ...)
        self._instructions: list[str] = []

    def add(self, images: UInt8[np.ndarray, "n m h w 3"], state: Float[Tensor, "n _"], instructions: Sequence[str]) -> None:
        """As `SingleObservation.add`."""
        self._push(images, state, instructions)

    def _push(self, vision: Any, state: torch.Tensor, instructions: Sequence[str]) -> None:
        n_obs_steps = self.model.config.n_obs_steps
        if len(self._steps) == n_obs_steps:
            del self._steps[: n_obs_steps - n_obs_steps // 2]
        self._steps.append((vision, state))
        self._instructions = list(instructions)

    def predict(self) -> Float[Tensor, "n k a"]:
        """Normalised chunks (n, k, a)."""
        images, state = zip(*self._steps, strict=True)
        n, length = len(self._instructions), len(self._steps)
        flat = np.stack(images, axis=1).reshape(n * length, *images[0].shape[1:])
        prompts = _prompts(self.model, self.prompt_builder, flat, self._instructions, [length] * n)
        return self.model.predict(torch.stack(state, dim=1), **prompts)

    def keep(self, rows: Sequence[int]) -> None:
        """As `SingleObservation.keep`."""
        rows = list(rows)
        self._steps = [(vision[rows], state[rows]) for vision, state in self._steps]
        self._instructions = [self._instructions[row] for row in rows]


class KVCachedSequence(UncachedSequence):
    """Interleaved structure with KV cache: a new observation is appended to the backbone's cached sequence.

    Image features of the window are kept too, for the steps at which a new window starts. Images on which the prompt's text
    depends (`PromptBuilder.is_separable`) are recomputed.
    """

    def __init__(self, model: VLA, prompt_builder: PromptBuilder) -> None:
        super().__init__(model, prompt_builder)
        self._cache: Any = None
        self._mask = self._hidden = torch.empty(0)

    @staticmethod
    @torch.inference_mode()
    def matches_uncached(model: VLA, prompt_builder: PromptBuilder) -> bool:
        """Whether appending to this model's cache gives what recomputing gives: tried once, on noise.

        False for families whose processor gives more than pixels, or whose positions depend on the whole sequence.
        """
        rng, side, length = np.random.default_rng(0), prompt_builder.image_size, min(3, model.config.n_obs_steps)
        noise = rng.integers(0, 256, (length, 2, prompt_builder.n_images, side, side, 3), np.uint8)
        if not prompt_builder.uses_pixel_values_only:
            return False
        cached, uncached = KVCachedSequence(model, prompt_builder), UncachedSequence(model, prompt_builder)
        for images in noise:
            zero_state = np.zeros((2, len(model.spec.state_names)), np.float32)
            state = torch.as_tensor(model.conditioning.align_state(model.embodiment(model.spec), zero_state), device=model.device)
            for history in (cached, uncached):
                history.add(images, state, ["lift it", "lift the other one"])
        tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
        return torch.allclose(cached.predict(), uncached.predict(), rtol=0, atol=tolerance)

    def add(self, images: UInt8[np.ndarray, "n m h w 3"], state: Float[Tensor, "n _"], instructions: Sequence[str]) -> None:
        """As `SingleObservation.add`."""
        if not self.prompt_builder.is_separable(*images.shape[-3:-1]):
            return super().add(images, state, instructions)
        is_same, length = list(instructions) == self._instructions, len(self._steps)
        pixels = self.prompt_builder.pixels(images).to(self.model.device)
        self._push(vision_features(self.model.backbone, pixels, len(images)), state, instructions)
        if is_same and len(self._steps) == length + 1 and self._cache is not None:
            self._decode_step()
        else:
            self._prefill()

    def predict(self) -> Float[Tensor, "n k a"]:
        """Normalised chunks (n, k, a)."""
        return super().predict() if self._cache is None else self.model.head.predict(self._hidden)

    def keep(self, rows: Sequence[int]) -> None:
        """As `SingleObservation.keep`; the cache too."""
        super().keep(rows)
        if self._cache is not None:
            kept = torch.as_tensor(list(rows), device=self._mask.device)
            self._cache.batch_select_indices(kept)
            self._mask, self._hidden = self._mask[kept], self._hidden[kept]

    def _prefill(self) -> None:
        """Pass the whole window through the backbone."""
        n, length = len(self._instructions), len(self._steps)
        tokens = self.prompt_builder.tokens(self._instructions, [length] * n)
        self._forward(tokens["input_ids"].to(self.model.device), tokens["attention_mask"].to(self.model.device), length, None)

    def _decode_step(self) -> None:
        """Append the newest observation to the cache."""
        text, n, length = self._instructions[0], len(self._instructions), len(self._steps)
        before, now = (self.prompt_builder.token_ids(text, steps) for steps in (length - 1, length))
        new = torch.tensor(now[len(before) :], device=self.model.device)
        mask = torch.cat([self._mask, self._mask.new_ones(n, len(new))], dim=1)
        self._forward(new.expand(n, -1), mask, 1, self._cache)

    def _forward(self, input_ids: torch.Tensor, mask: torch.Tensor, length: int, cache: Any) -> None:
        """One pass over the last `length` observations of each robot."""
        features, state = (torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*self._steps[-length:], strict=True))
        hidden, self._cache = self.model.backbone_forward(
            input_ids, self.model.action_query_embeddings(len(state), state), image_features=features,
            attention_mask=mask, past_key_values=cache, use_cache=True,
        )  # fmt: skip
        self._mask, self._hidden = mask, hidden.unflatten(0, (-1, length))[:, -1]


def _prompts(
    model: VLA,
    prompt_builder: PromptBuilder,
    images: np.ndarray,
    instructions: Sequence[str],
    n_steps: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    return {k: v.to(model.device) for k, v in prompt_builder(images, instructions, n_steps).items()}
