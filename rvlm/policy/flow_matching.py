"""Conditional flow matching of action chunks: the training loss, the Euler steps from noise to action, and a head of both.

A network predicts the clean action (x1) of a noised chunk, which gives the velocity. Flow time 0 is noise, 1 is action.
Source: Lipman et al. 2023 (arXiv 2210.02747), section 4; for actions, Black et al. 2024 (arXiv 2410.24164), section IV.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rvlm.policy.action_losses import continuous_action_loss, join_dims, require_gripper_weight, split_dims

Denoiser = Callable[[Tensor, Tensor], Tensor]  # noised chunks (..., k, c) and flow times (..., 1) to clean chunks (..., k, c)


def require_continuous(is_binary: Sequence[bool]) -> None:
    """Refuse a robot without a continuous dimension, for heads that denoise actions.

    Raises:
        ValueError: Every dimension is binary.
    """
    if all(is_binary):
        raise ValueError("expected a continuous action dimension to denoise, got binary ones only; take head 'mlp' or 'tokens'")


def time_waves(time: Float[Tensor, "*n 1"]) -> Float[Tensor, "*n 2"]:
    """Flow time as features (..., 2): its position on a half circle."""
    return torch.cat([torch.cos(torch.pi * time), torch.sin(torch.pi * time)], dim=-1)


def flow_matching_error(denoise: Denoiser, clean: Float[Tensor, "*n k c"], n_samples: int) -> Float[Tensor, "*n k c"]:
    """Squared error (..., k, c) of the clean chunks that `denoise` predicts, mean over noise and time samples.

    Args:
        denoise: Takes a leading axis of samples.
        clean: Chunks (..., k, c).
        n_samples: Of noise and time for each chunk.
    """
    clean = clean.expand(n_samples, *clean.shape)
    noise, time = torch.randn_like(clean), torch.rand_like(clean[..., 0, :1])
    noised = (1 - time[..., None]) * noise + time[..., None] * clean
    return ((denoise(noised, time) - clean) ** 2).mean(0)


def integrate(denoise: Denoiser, noise: Float[Tensor, "*n k c"], n_steps: int) -> Float[Tensor, "*n k c"]:
    """Clean chunks (..., k, c) from noise, by Euler steps of equal length."""
    chunk = noise
    for step in range(n_steps):
        time = torch.full_like(chunk[..., 0, :1], step / n_steps)
        chunk = chunk + (denoise(chunk, time) - chunk) / (n_steps - step)
    return chunk


def draw_noise(shape: Sequence[int], seeds: Iterable[int | tuple[int, ...]]) -> Float[Tensor, "n *shape"]:
    """Noise (n, k, c) that chunks begin with: one sample of this shape (k, c) for each seed, such as (episode, chunk).

    Each chunk takes a seed of its own: what one sample does to the actions would add up over an episode and between episodes.
    """
    return torch.from_numpy(np.stack([np.random.default_rng(seed).standard_normal(tuple(shape), np.float32) for seed in seeds]))


def decoding_from(head: Any, seeds: Iterable[int | tuple[int, ...]]) -> Callable[[Any], Tensor] | None:
    """A flow head's `predict` of n observations from the noise of n seeds; none for heads that begin with no noise."""
    return partial(head.predict, noise=draw_noise(head.shape, seeds)) if isinstance(head, FlowMatchingHead) else None


class FlowMatchingHead(nn.Module):
    """Conditional flow matching of the continuous dimensions' chunk, and classification of binary ones.

    A subclass gives the network: `predict_clean_action` and `binary_logits`. Inference takes a few Euler steps from noise.

    Args:
        chunk_size: Actions predicted (k).
        is_binary: Which of the action's dimensions (a) are.
        n_euler_steps: From noise to action.
        n_noise_samples: Noise and time samples for each feature and update; the backbone runs once for all of them.
        gripper_weight: Weight of the cross entropy.

    Raises:
        ValueError: Every dimension is binary, fewer than one step or sample, or a negative weight.
    """

    n_queries = 1

    def __init__(
        self, chunk_size: int, is_binary: Sequence[bool], n_euler_steps: int, n_noise_samples: int, gripper_weight: float
    ) -> None:
        super().__init__()
        require_continuous(is_binary)
        require_gripper_weight(gripper_weight)
        for name, n in (("n_euler_steps", n_euler_steps), ("n_noise_samples", n_noise_samples)):
            if type(n) is not int or n < 1:
                raise ValueError(f"expected {name} as a whole number from 1 on, got {n!r}")
        self.is_binary, self.n_binary, self.gripper_weight = tuple(is_binary), sum(is_binary), gripper_weight
        self.shape = (chunk_size, len(is_binary) - self.n_binary)
        self.n_euler_steps, self.n_noise_samples = n_euler_steps, n_noise_samples

    def predict_clean_action(self, features: Tensor, chunk: Tensor, time: Tensor) -> Tensor:
        """Clean actions (..., k, c) of noised chunks at flow times (..., 1), which may have more leading axes than features."""
        raise NotImplementedError

    def binary_logits(self, features: Tensor) -> Tensor:
        """Logits (..., k, g) of the g binary dimensions."""
        raise NotImplementedError

    def loss(
        self, features: Tensor, action: Float[Tensor, "*n k a"], mask: Bool[Tensor, "*n k a"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Losses against normalised actions (..., k, a), where `mask` (..., k, a) is true; binary dimensions are in {0, 1}."""
        clean, _ = split_dims(action * mask, self.is_binary)  # masked action dims are zeroed
        error = flow_matching_error(partial(self.predict_clean_action, features), clean, self.n_noise_samples)
        return continuous_action_loss(error, self.binary_logits(features), action, mask, self.is_binary, self.gripper_weight)

    def predict(self, features: Tensor, noise: Float[Tensor, "*n k c"] | None = None) -> Float[Tensor, "*n k a"]:
        """Normalised actions (..., k, a); binary dimensions are probabilities, of a gripper that it is open.

        Args:
            features: Of the observations.
            noise: (..., k, c) that the chunks begin with; if left out all of them with the same, always.
        """
        logits = self.binary_logits(features)
        if noise is None:
            noise = draw_noise(self.shape, [0])[0].expand(*logits.shape[:-2], *self.shape)
        chunk = integrate(partial(self.predict_clean_action, features), noise.to(logits), self.n_euler_steps)
        return join_dims(chunk, logits.sigmoid(), self.is_binary)
