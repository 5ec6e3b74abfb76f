"""The masked loss of continuous actions, by dimension: regression where continuous, cross entropy where binary."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F


def require_gripper_weight(weight: float) -> None:
    """Refuse a weight that a loss cannot have.

    Raises:
        ValueError: Below 0, or not finite.
    """
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"expected gripper_weight as a finite number from 0 on, got {weight}")


def masked_mean(values: Float[Tensor, "*n"], mask: Bool[Tensor, "*n"]) -> Float[Tensor, ""]:
    """Mean of `values` where `mask` is true; zero where it is nowhere true."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def split_dims(
    values: Shaped[Tensor, "*n a"], is_binary: Sequence[bool]
) -> tuple[Shaped[Tensor, "*n c"], Shaped[Tensor, "*n g"]]:
    """Continuous (..., c) and binary (..., g) dimensions of values (..., a)."""
    dims = range(len(is_binary))
    return values[..., [i for i in dims if not is_binary[i]]], values[..., [i for i in dims if is_binary[i]]]


def join_dims(
    continuous: Shaped[Tensor, "*n c"], binary: Shaped[Tensor, "*n g"], is_binary: Sequence[bool]
) -> Shaped[Tensor, "*n a"]:
    """Inverse of `split_dims`."""
    split = sorted(range(len(is_binary)), key=lambda i: is_binary[i])
    return torch.cat([continuous, binary], dim=-1)[..., [split.index(i) for i in range(len(is_binary))]]


def continuous_action_loss(
    error: Float[Tensor, "*n k c"],
    logits: Float[Tensor, "*n k g"],
    action: Float[Tensor, "*n k a"],
    mask: Bool[Tensor, "*n k a"],
    is_binary: Sequence[bool],
    gripper_weight: float,
) -> dict[str, Float[Tensor, ""]]:
    """Masked loss of actions: regression of continuous dimensions plus binary cross entropy of binary ones.

    Args:
        error: Of each continuous dimension (..., k, c).
        logits: Of each binary dimension being 1, the gripper open (..., k, g).
        action: The truth (..., k, a), binary dimensions in {0, 1}.
        mask: (..., k, a).
        is_binary: Which of the a dimensions are.
        gripper_weight: Weight of the cross entropy (the paper's lambda).

    Returns:
        `loss`, and its parts: `arm_loss` of continuous dimensions, `gripper_loss` of binary ones; 0 where there is none.
    """
    arm_mask, gripper_mask = split_dims(mask, is_binary)
    bce = F.binary_cross_entropy_with_logits(logits, split_dims(action, is_binary)[1], reduction="none")
    arm_loss, gripper_loss = masked_mean(error, arm_mask), masked_mean(bce, gripper_mask)
    return {"loss": arm_loss + gripper_weight * gripper_loss, "arm_loss": arm_loss, "gripper_loss": gripper_loss}
