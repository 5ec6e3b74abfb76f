"""Action heads: hidden states at `<act>` to actions, all with the same `loss` and `predict`.

Action dimensions go by a mask, `is_binary`: binary ones, as most grippers, are classified, all others are regressed. A head says
how many positions of the sequence it reads for one observation (`n_queries`): one for continuous actions, one per token for
discrete ones (`rvlm.policy.token_heads`). An action expert reads every position (`rvlm.policy.action_expert`).
Source: RoboVLMs (arXiv 2412.14058), section on VLA formulations and appendix on action heads.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from rvlm.policy.action_expert import ActionExpert
from rvlm.policy.action_losses import continuous_action_loss, join_dims, require_gripper_weight, split_dims
from rvlm.policy.flow_matching import FlowMatchingHead, time_waves
from rvlm.policy.token_heads import FASTHead, TokensHead

ARM_LOSSES = {"mse": F.mse_loss, "huber": F.smooth_l1_loss, "l1": F.l1_loss}


def mlp(in_dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, out_dim)
    )  # fmt: skip


class MLPHead(nn.Module):
    """Regression of continuous dimensions and classification of binary ones, whole chunk at once.

    Args:
        width: Size of a feature (d).
        chunk_size: Actions predicted (k).
        is_binary: Which of the a action dimensions are.
        hidden: Size of the hidden layers.
        arm_loss: "mse" (as in the paper), "huber" (as in its released code) or "l1".
        gripper_weight: Weight of the binary cross entropy (the paper's lambda).

    Raises:
        ValueError: An unknown loss, or a negative weight.
    """

    n_queries = 1

    def __init__(
        self,
        width: int,
        chunk_size: int,
        is_binary: Sequence[bool],
        hidden: int = 512,
        arm_loss: str = "mse",
        gripper_weight: float = 0.1,
    ) -> None:
        super().__init__()
        if arm_loss not in ARM_LOSSES:
            raise ValueError(f"no arm loss {arm_loss!r}; there are {', '.join(ARM_LOSSES)}")
        require_gripper_weight(gripper_weight)
        self.shape, self.is_binary = (chunk_size, len(is_binary)), tuple(is_binary)
        self.arm_loss, self.gripper_weight = ARM_LOSSES[arm_loss], gripper_weight
        self.layers = nn.Sequential(nn.LayerNorm(width), *mlp(width, hidden, chunk_size * len(is_binary)))

    def forward(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k a"]:
        """(..., d) to (..., k, a): continuous dimensions in normalised units, binary ones as logits."""
        return self.layers(features).unflatten(-1, self.shape)

    def loss(
        self, features: Float[Tensor, "*n d"], action: Float[Tensor, "*n k a"], mask: Bool[Tensor, "*n k a"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Losses against normalised actions (..., k, a), where `mask` (..., k, a) is true; binary dimensions are in {0, 1}."""
        predicted, logits = split_dims(self(features), self.is_binary)
        error = self.arm_loss(predicted, split_dims(action, self.is_binary)[0], reduction="none")
        return continuous_action_loss(error, logits, action, mask, self.is_binary, self.gripper_weight)

    def predict(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k a"]:
        """Normalised actions (..., k, a); binary dimensions are probabilities, of a gripper that it is open."""
        predicted, logits = split_dims(self(features), self.is_binary)
        return join_dims(predicted, logits.sigmoid(), self.is_binary)


class FlowHead(FlowMatchingHead):
    """Conditional flow matching (`rvlm.policy.flow_matching`) of the continuous dimensions' chunk; binary ones are classified.

    A small denoiser is conditioned on the feature and the flow time.

    Args:
        width, chunk_size, is_binary, hidden, gripper_weight: As of `MLPHead`.
        n_euler_steps: From noise to action.
        n_noise_samples: Noise and time samples for each feature and update; the backbone runs once for all of them.

    Raises:
        ValueError: As of `FlowMatchingHead`.
    """

    def __init__(
        self,
        width: int,
        chunk_size: int,
        is_binary: Sequence[bool],
        hidden: int = 512,
        n_euler_steps: int = 5,
        n_noise_samples: int = 8,
        gripper_weight: float = 0.1,
    ) -> None:
        super().__init__(chunk_size, is_binary, n_euler_steps, n_noise_samples, gripper_weight)
        n_values = math.prod(self.shape)
        self.norm = nn.LayerNorm(width)
        self.expert = mlp(width + n_values + 2, hidden, n_values)
        self.gripper = mlp(width, hidden, chunk_size * self.n_binary) if self.n_binary else None

    def predict_clean_action(
        self, features: Float[Tensor, "*n d"], chunk: Float[Tensor, "*s k c"], time: Float[Tensor, "*s 1"]
    ) -> Float[Tensor, "*s k c"]:
        """Clean actions (..., k, c) of noised chunks at flow times (..., 1), which may have more leading axes than features."""
        condition = self.norm(features).expand(*time.shape[:-1], -1)
        return self.expert(torch.cat([condition, chunk.flatten(-2), time_waves(time)], dim=-1)).unflatten(-1, self.shape)

    def binary_logits(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k g"]:
        """Logits (..., k, g) of the g binary dimensions."""
        if self.gripper is None:
            return features.new_zeros(*features.shape[:-1], self.shape[0], 0)
        return self.gripper(self.norm(features)).unflatten(-1, (self.shape[0], -1))


HEADS: dict[str, type[nn.Module]] = {
    "mlp": MLPHead,
    "flow": FlowHead,
    "tokens": TokensHead,
    "fast": FASTHead,
    "expert": ActionExpert,
}
