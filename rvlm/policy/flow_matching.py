"""Conditional flow matching of action chunks: the training loss, and the Euler steps from noise to action.

A network predicts the clean action (x1) of a noised chunk, which gives the velocity. Flow time 0 is noise, 1 is action.
Source: Lipman et al. 2023 (arXiv 2210.02747), section 4; for actions, Black et al. 2024 (arXiv 2410.24164), section IV.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

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
