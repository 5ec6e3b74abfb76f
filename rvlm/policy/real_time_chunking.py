"""Real-time chunking: a flow head's next chunk that continues the one which is being executed.

While a policy computes its next chunk, the robot executes d more actions of the previous one. Those are *frozen*, and the head
*inpaints* the rest: at each Euler step its prediction of the clean chunk is guided towards what is left of the previous chunk,
fully in the frozen prefix and softly in the rest of the overlap, so that the new chunk goes on alike where it takes over.
Only the head is differentiated, and nothing is trained.

Source: Black et al. 2025 (arXiv 2506.07339), equations 2 to 5 and algorithm 1.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rvlm.policy.action_losses import join_dims, split_dims

MAX_GUIDANCE = 5.0  # the paper's beta, for few Euler steps


def soft_mask(chunk_size: int, n_frozen: int, n_overlap: int) -> Float[Tensor, " k"]:
    """Weights (k,) of the previous chunk: 1 in the frozen prefix, then falling exponentially to 0 at the end of the overlap.

    Args:
        chunk_size: Actions of a chunk (k).
        n_frozen: Actions that are executed while the chunk is computed (d).
        n_overlap: Actions of the previous chunk that were left when the computation began.
    """
    left = (n_overlap - torch.arange(chunk_size)) / (n_overlap - min(n_frozen, n_overlap) + 1)
    left = left.clamp(0, 1)
    return torch.where(torch.arange(chunk_size) < min(n_frozen, n_overlap), 1.0, left * torch.expm1(left) / (math.e - 1))


def guidance_weight(time: float, maximum: float = MAX_GUIDANCE) -> float:
    """Weight of the guidance at flow time 0 (noise) to 1: (1 - t) / (t r^2) with r^2 = (1 - t)^2 / (t^2 + (1 - t)^2), clipped."""
    return maximum if time == 0 else min(maximum, (time**2 + (1 - time) ** 2) / (time * (1 - time)))


@torch.inference_mode(False)
@torch.enable_grad()
def continue_chunk(
    head: Any,
    features: Any,
    previous: Float[Tensor, "n m a"],
    n_frozen: int,
    noise: Float[Tensor, "n k c"],
    maximum: float = MAX_GUIDANCE,
) -> Float[Tensor, "n k a"]:
    """Normalised actions (n, k, a) that continue the previous chunk; binary dimensions are its own in the frozen prefix.

    Args:
        head: With `predict_clean_action`, as `FlowHead`.
        features: Of n observations, as the head takes them.
        previous: What is left of the previous chunk (n, m, a), from the observation's step on, normalised.
        n_frozen: How many of these are executed while the chunk is computed (d).
        noise: (n, k, c) that each chunk begins with.
        maximum: Of the guidance's weight.
    """
    features = features.clone()  # a copy can be differentiated, unlike inference's
    k, n_overlap = head.shape[0], previous.shape[1]
    padded = torch.cat([previous.clone(), previous.new_zeros(len(previous), k - n_overlap, previous.shape[2])], dim=1)
    target, binary = split_dims(padded, head.is_binary)
    weights = soft_mask(k, n_frozen, n_overlap).to(target)[:, None]
    chunk = noise.to(target, copy=True)  # the caller's is not differentiated
    for step in range(head.n_euler_steps):
        time = step / head.n_euler_steps
        chunk.requires_grad_()
        clean = head.predict_clean_action(features, chunk, torch.full_like(chunk[..., 0, :1], time))
        (pull,) = torch.autograd.grad(clean, chunk, weights * (target - clean).detach())  # vector-Jacobian product
        velocity = (clean - chunk) / (1 - time) + guidance_weight(time, maximum) * pull
        chunk = (chunk + velocity / head.n_euler_steps).detach()
    n_kept = min(n_frozen, n_overlap)
    predicted = head.binary_logits(features).sigmoid()
    return join_dims(chunk, torch.cat([binary[:, :n_kept], predicted[:, n_kept:]], dim=1), head.is_binary).detach()
