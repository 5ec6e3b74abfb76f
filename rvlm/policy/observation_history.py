"""Observation histories while acting, one class a structure: `add` an observation of each robot, then `predict`.

Robots act in a batch: each `add` takes one observation of every robot; `keep` drops those that are done.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from rvlm.policy.model import VLA, Decode
from rvlm.vlm.backbones import vision_features
from rvlm.vlm.prompts import PromptBuilder

SEQUENCE_KEYS = {"attention_mask", "token_type_ids"}  # given of all tokens, also of those in a KV cache
CROSS_ATTENTION_MASK = "image_attention_mask"  # of Idefics, whose cache holds no images: a new token sees new ones and the last

# Largest error of appending to the key-value cache, relative to the change of the features from one observation to the next.
EXACT, EXACT_IN_16_BITS = 1e-3, 0.1


class SingleObservation:
    """One-step structure: the newest observation only.

    Args:
        model: A policy's.
        prompt_builder: Its own.
        is_present: As `VLA.predict` takes it.
    """

    def __init__(self, model: VLA, prompt_builder: PromptBuilder, is_present: Bool[np.ndarray, " a"] | None = None) -> None:
        self.model, self.prompt_builder = model, prompt_builder
        self._present = {} if is_present is None else {"is_present": torch.from_numpy(is_present).to(model.device)}
        self._inputs: dict[str, torch.Tensor] = {}

    def add(self, images: UInt8[np.ndarray, "n m h w 3"], state: Float[Tensor, "n _"], instructions: Sequence[str]) -> None:
        """Add one observation of n robots: images (n, cameras, h, w, 3) uint8, state (n, s) as `VLA.conditioning` gives it."""
        prompts = _prompts(self.model, self.prompt_builder, images, instructions)
        self._inputs = {**prompts, **self._present, "state": state[:, None]}

    def predict(self, decode: Decode | None = None) -> Float[Tensor, "n k a"]:
        """Normalised chunks (n, k, a).

        Args:
            decode: The head's features -> chunks, in place of its `predict`.
        """
        return self.model.predict(**self._inputs, decode=decode)

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

    def predict(self, decode: Decode | None = None) -> Float[Tensor, "n k a"]:
        """As `SingleObservation.predict`."""
        missing = self.model.config.n_obs_steps - len(self._features)
        stacked = torch.stack([self._features[0]] * missing + list(self._features), dim=1)
        return (decode or self.model.head.predict)(self.model.history(stacked)[:, -1])

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

    def features(self) -> Float[Tensor, "n ... d"]:
        """What the head reads of the newest observation: hidden states (n, d) at `<act>`, or the prompt's."""
        n, length = len(self._instructions), len(self._steps)
        images, state = self._newest(length)
        prompts = _prompts(self.model, self.prompt_builder, images, self._instructions, [length] * n)
        return self.model.history_features(state.unflatten(0, (n, length)), **prompts)[:, -1]

    def predict(self, decode: Decode | None = None) -> Float[Tensor, "n k a"]:
        """As `SingleObservation.predict`."""
        return (decode or self.model.head.predict)(self.features())

    def _newest(self, length: int) -> tuple[Any, torch.Tensor]:
        """Images or features, and state, of the newest observations of each robot, robot by robot."""
        vision, state = zip(*self._steps[-length:], strict=True)
        stacked = torch.stack(state, dim=1).flatten(0, 1)
        if isinstance(vision[0], torch.Tensor):
            return torch.stack(vision, dim=1).flatten(0, 1), stacked
        return np.stack(vision, axis=1).reshape(len(stacked), *vision[0].shape[1:]), stacked

    def keep(self, rows: Sequence[int]) -> None:
        """As `SingleObservation.keep`."""
        rows = list(rows)
        self._steps = [(vision[rows], state[rows]) for vision, state in self._steps]
        self._instructions = [self._instructions[row] for row in rows]


class KVCachedSequence(UncachedSequence):
    """Interleaved structure with KV cache: a new observation is appended to the backbone's cached sequence.

    Where the family's only vision input is pixels (`PromptBuilder.is_separable`), image features of the window are kept too, for
    the steps at which a new window starts.
    """

    def __init__(self, model: VLA, prompt_builder: PromptBuilder) -> None:
        super().__init__(model, prompt_builder)
        self._cache: Any = None
        self._kept: dict[str, torch.Tensor] = {}  # inputs that the next step's continue: mask, token types
        self._rope_deltas: torch.Tensor | None = None  # of families with positions by row and column
        self._hidden = torch.empty(0)

    @staticmethod
    @torch.inference_mode()
    def matches_uncached(model: VLA, prompt_builder: PromptBuilder) -> bool:
        """Whether appending to this model's cache gives what recomputing gives: tried once, on noise.

        Errors are judged against how much the features change from step to step.

        False for families whose prompt changes as observations join it: LLaVA-OneVision tiles an image that is the only one.
        """
        rng, length = np.random.default_rng(0), min(3, model.config.n_obs_steps)
        size = model.config.image_size or (prompt_builder.image_size, prompt_builder.image_size)
        if not all(prompt_builder.continuation(n, *size) for n in range(2, length + 1)):
            return False
        noise = rng.integers(0, 256, (length, 2, prompt_builder.n_images, *size, 3), np.uint8)
        histories, features = (KVCachedSequence(model, prompt_builder), UncachedSequence(model, prompt_builder)), []
        zero_state = np.zeros((2, len(model.spec.state_names)), np.float32)
        state = torch.as_tensor(model.conditioning.align_state(model.embodiment(model.spec), zero_state), device=model.device)
        for images in noise:
            for history in histories:
                history.add(images, state, ["lift it", "lift the other one"])
            features.append(torch.stack([history.features() for history in histories]))
        cached, recomputed = torch.stack(features, dim=1).float()  # (steps, n, d)
        tolerance = EXACT if next(model.backbone.parameters()).dtype == torch.float32 else EXACT_IN_16_BITS
        change = recomputed.diff(dim=0).square().mean().sqrt()
        return bool((cached - recomputed).square().mean((1, 2)).sqrt().max() <= tolerance * change)

    def add(self, images: UInt8[np.ndarray, "n m h w 3"], state: Float[Tensor, "n _"], instructions: Sequence[str]) -> None:
        """As `SingleObservation.add`."""
        is_same, length, size = list(instructions) == self._instructions, len(self._steps), images.shape[-3:-1]
        vision: Any = images
        if self.prompt_builder.is_separable(*size):
            pixels = self.prompt_builder.pixels(images).to(self.model.device)
            vision = vision_features(self.model.backbone, pixels, len(images))
        self._push(vision, state, instructions)
        if is_same and len(self._steps) == length + 1 > 1 and self.prompt_builder.continuation(length + 1, *size):
            self._decode_step(*size)
        else:
            self._prefill()

    def features(self) -> Float[Tensor, "n d"]:
        """As `UncachedSequence.features`."""
        return self._hidden

    def keep(self, rows: Sequence[int]) -> None:
        """As `SingleObservation.keep`; the cache too."""
        super().keep(rows)
        if self._cache is not None:
            kept = torch.as_tensor(list(rows), device=self._hidden.device)
            self._cache.reorder_cache(kept)
            self._kept = {k: v[kept] for k, v in self._kept.items()}
            self._hidden = self._hidden[kept]
            self._rope_deltas = None if self._rope_deltas is None else self._rope_deltas[kept]

    def _prefill(self) -> None:
        """Pass the whole window through the backbone."""
        n_steps = [len(self._steps)] * len(self._instructions)
        vision, state = self._newest(len(self._steps))
        if isinstance(vision, torch.Tensor):
            tokens = self.prompt_builder.tokens(self._instructions, n_steps)
            inputs = {"image_features": vision, **{k: v.to(self.model.device) for k, v in tokens.items()}}
        else:
            inputs = _prompts(self.model, self.prompt_builder, vision, self._instructions, n_steps)
        self._forward(inputs, state, None)

    def _decode_step(self, height: int, width: int) -> None:
        """Append the newest observation, with images of this size [px], to the cache."""
        n, (vision, state) = len(self._instructions), self._newest(1)
        new = {
            k: v.to(self.model.device).expand(n, *v.shape[1:])
            for k, v in self.prompt_builder.continuation(len(self._steps), height, width).items()
        }
        is_features = isinstance(vision, torch.Tensor)
        prompts = {} if is_features else _prompts(self.model, self.prompt_builder, vision, self._instructions)
        inputs = {**({"image_features": vision} if is_features else prompts), **new}
        inputs |= {k: torch.cat([kept, inputs[k]], dim=1) for k, kept in self._kept.items()}
        if CROSS_ATTENTION_MASK in inputs:
            inputs[CROSS_ATTENTION_MASK] = inputs[CROSS_ATTENTION_MASK][..., -inputs["pixel_values"].shape[1] :]
        self._forward(inputs, state, self._cache)

    def _forward(self, inputs: dict[str, torch.Tensor], state: torch.Tensor, cache: Any) -> None:
        """One pass over these observations, after those in the cache."""
        base: Any = self.model.backbone.base_model
        if cache is not None and self._rope_deltas is not None:
            base.rope_deltas = self._rope_deltas  # the model holds those of its last batch, which may be another
        hidden, self._cache = self.model.backbone_forward(
            offsets=self.model.action_query_embeddings(len(state), state), past_key_values=cache, use_cache=True, **inputs
        )
        self._rope_deltas = getattr(base, "rope_deltas", None)
        self._kept = {k: inputs[k] for k in SEQUENCE_KEYS & inputs.keys()}
        if CROSS_ATTENTION_MASK in inputs:
            self._kept["pixel_values"] = inputs["pixel_values"][:, -1:]
        self._hidden = hidden.unflatten(0, (len(self._instructions), -1))[:, -1]


def _prompts(
    model: VLA,
    prompt_builder: PromptBuilder,
    images: np.ndarray,
    instructions: Sequence[str],
    n_steps: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    return {k: v.to(model.device) for k, v in prompt_builder(images, instructions, n_steps).items()}
