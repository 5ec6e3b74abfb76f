"""Action heads: from the features read at `<act>` to actions, all with the same `loss` and `predict`.

A history module (`lstm`) fuses the features of several observation steps before the output layer.
Source: RoboVLMs (arXiv 2412.14058), section on VLA formulations and appendix on action heads.
"""

import torch
from torch import nn
from torch.nn import functional as F

ARM_LOSSES = {"mse": F.mse_loss, "huber": F.smooth_l1_loss, "l1": F.l1_loss}


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `mask` is true, both of one shape; zero where it never is."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


class MLPHead(nn.Module):
    """Regression of the arm and classification of the gripper, whole chunk at once.

    Args:
        width: Size of a feature (d).
        chunk_size: Actions predicted (k).
        n_dims: Action dimensions (a); the gripper is the last.
        hidden: Size of the hidden layer.
        arm_loss: "mse" (as in the paper), "huber" (as in its released code) or "l1".
        gripper_weight: Weight of the gripper's binary cross entropy (the paper's lambda).
    """

    def __init__(
        self, width: int, chunk_size: int, n_dims: int, hidden: int = 512, arm_loss: str = "mse", gripper_weight: float = 0.1
    ) -> None:
        super().__init__()
        if arm_loss not in ARM_LOSSES:
            raise ValueError(f"no arm loss {arm_loss!r}; there are {', '.join(ARM_LOSSES)}")
        self.shape, self.arm_loss, self.gripper_weight = (chunk_size, n_dims), ARM_LOSSES[arm_loss], gripper_weight
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, chunk_size * n_dims),
        )  # fmt: skip

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., d) to (..., k, a): arm in normalised units, gripper as a logit of being open."""
        return self.layers(features).unflatten(-1, self.shape)

    def loss(self, features: torch.Tensor, action: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses against normalised actions (..., k, a), where `mask` (..., k, a) is true; the gripper is in {0, 1}."""
        predicted, mask = self(features), mask.to(action.dtype)
        arm = masked_mean(self.arm_loss(predicted[..., :-1], action[..., :-1], reduction="none"), mask[..., :-1])
        bce = F.binary_cross_entropy_with_logits(predicted[..., -1], action[..., -1], reduction="none")
        gripper = masked_mean(bce, mask[..., -1])
        return {"loss": arm + self.gripper_weight * gripper, "arm_loss": arm, "gripper_loss": gripper}

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """Normalised actions (..., k, a); the gripper is the probability of being open."""
        predicted = self(features)
        return torch.cat([predicted[..., :-1], predicted[..., -1:].sigmoid()], dim=-1)


class LSTMHistory(nn.Module):
    """Fuses the features of t observation steps, oldest first, each seeing only its past.

    A forward pass always starts from the zero state and keeps none behind.
    """

    def __init__(self, width: int, n_layers: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.lstm = nn.LSTM(width, width, n_layers, batch_first=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(b, t, d) to (b, t, d)."""
        return features + self.lstm(self.norm(features))[0]


HEADS = {"mlp": MLPHead}
HISTORIES = {"lstm": LSTMHistory}
