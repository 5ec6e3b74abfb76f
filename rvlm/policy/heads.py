"""Action heads: hidden states at `<act>` to actions, all with the same `loss` and `predict`.

Action dimensions go by a mask, `is_binary`: binary ones, as most grippers, are classified, all others are regressed. A head says
how many positions of the sequence it reads for one observation (`n_queries`): one for continuous actions, one per token for
discrete ones. An action expert reads every position (`rvlm.policy.action_expert`).
Source: RoboVLMs (arXiv 2412.14058), section on VLA formulations and appendix on action heads.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from rvlm.policy.action_expert import ActionExpert
from rvlm.policy.action_losses import continuous_action_loss, join_dims, masked_mean, split_dims
from rvlm.policy.action_tokenizer import ActionTokenizer
from rvlm.policy.flow_matching import flow_matching_error, integrate, require_continuous, time_waves

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


class FlowHead(nn.Module):
    """Conditional flow matching (`rvlm.policy.flow_matching`) of the continuous dimensions' chunk; binary ones are classified.

    A small denoiser is conditioned on the feature and the flow time. Inference takes a few Euler steps from one noise sample that
    is stored with the weights, so the policy is deterministic.

    Args:
        width, chunk_size, is_binary, hidden, gripper_weight: As of `MLPHead`.
        n_euler_steps: From noise to action.
        n_noise_samples: Noise and time samples for each feature and update; the backbone runs once for all of them.

    Raises:
        ValueError: Every dimension is binary.
    """

    n_queries = 1
    initial_noise: Tensor

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
        super().__init__()
        require_continuous(is_binary)
        n_binary, self.is_binary, self.gripper_weight = sum(is_binary), tuple(is_binary), gripper_weight
        self.shape = (chunk_size, len(is_binary) - n_binary)
        self.n_euler_steps, self.n_noise_samples = n_euler_steps, n_noise_samples
        n_values = math.prod(self.shape)
        self.norm = nn.LayerNorm(width)
        self.expert = mlp(width + n_values + 2, hidden, n_values)
        self.gripper = mlp(width, hidden, chunk_size * n_binary) if n_binary else None
        self.register_buffer("initial_noise", torch.randn(self.shape))

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

    def loss(
        self, features: Float[Tensor, "*n d"], action: Float[Tensor, "*n k a"], mask: Bool[Tensor, "*n k a"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Losses against normalised actions (..., k, a), where `mask` (..., k, a) is true; binary dimensions are in {0, 1}."""
        clean, _ = split_dims(action * mask, self.is_binary)  # masked action dims are zeroed
        error = flow_matching_error(partial(self.predict_clean_action, features), clean, self.n_noise_samples)
        return continuous_action_loss(error, self.binary_logits(features), action, mask, self.is_binary, self.gripper_weight)

    def predict(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k a"]:
        """Normalised actions (..., k, a); binary dimensions are probabilities, of a gripper that it is open."""
        noise = self.initial_noise.expand(*features.shape[:-1], *self.shape)
        chunk = integrate(partial(self.predict_clean_action, features), noise, self.n_euler_steps)
        return join_dims(chunk, self.binary_logits(features).sigmoid(), self.is_binary)


class TokensHead(nn.Module):
    """Discrete actions: each dimension of each action is one of `n_bins` tokens in the backbone's own sequence.

    Action tokens are added to the vocabulary, but their embeddings live here and not in the backbone's table: a small vocabulary
    has no spare ids, words keep their meaning, and a frozen or quantised table is unchanged. In the sequence each position is an
    `<act>`, whose embedding gets a position embedding and, if autoregressive, the embedding of the previous token; the token is
    predicted from the hidden state there.

    Source: RT-2 (arXiv 2307.15818), section 3.2; parallel decoding as in OpenVLA-OFT (arXiv 2502.19645), section IV.

    Args:
        width, chunk_size, is_binary: As of `MLPHead`.
        n_bins: Per dimension.
        decoding: "autoregressive", each token conditioned on those before it, or "parallel", all in one pass.
    """

    def __init__(
        self, width: int, chunk_size: int, is_binary: Sequence[bool], n_bins: int = 256, decoding: str = "autoregressive"
    ) -> None:
        super().__init__()
        if decoding not in ("autoregressive", "parallel"):
            raise ValueError(f"no decoding {decoding!r}; there are autoregressive, parallel")
        self.shape, self.n_queries = (chunk_size, len(is_binary)), chunk_size * len(is_binary)
        self.is_autoregressive, self.tokenizer = decoding == "autoregressive", ActionTokenizer(tuple(is_binary), n_bins)
        self.token_position_embeddings = nn.Parameter(torch.randn(self.n_queries, width) * width**-0.5)
        self.tokens = nn.Embedding(n_bins, width) if self.is_autoregressive else None
        if self.tokens is not None:
            nn.init.normal_(self.tokens.weight, std=width**-0.5)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_bins))

    def encode(self, action: Float[Tensor, "*n k a"]) -> Int[Tensor, "*n N"]:
        """Normalised actions (..., k, a) to tokens (..., N), in decoding order."""
        ids = torch.from_numpy(self.tokenizer.encode(action.detach().cpu().numpy()))
        return ids.to(action.device).flatten(-2)

    def decode(self, ids: Int[Tensor, "*n N"]) -> Float[Tensor, "*n k a"]:
        """Tokens (..., N) to normalised actions (..., k, a)."""
        action = self.tokenizer.decode(ids.unflatten(-1, self.shape).cpu().numpy())
        return torch.from_numpy(action).to(ids.device, torch.float32)

    def query_embeddings(self, n: int, ids: Int[Tensor, "n N"] | None = None) -> Float[Tensor, "n N d"]:
        """Added to the embeddings of the N `<act>` of n observations: (n, N, d), given teacher-forced tokens `ids` (n, N)."""
        positions = self.token_position_embeddings.expand(n, -1, -1)
        if self.tokens is None or ids is None:
            return positions
        return torch.cat([positions[:, :1], positions[:, 1:] + self.tokens(ids[:, :-1])], dim=1)

    def loss(
        self, features: Float[Tensor, "*n N d"], action: Float[Tensor, "*n k a"], mask: Bool[Tensor, "*n k a"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Cross entropy at features (..., N, d) of normalised actions (..., k, a) where `mask` (..., k, a) is true."""
        logits = self.out(features)
        errors = F.cross_entropy(logits.flatten(0, -2), self.encode(action).flatten(), reduction="none")
        loss = masked_mean(errors, mask.flatten())
        return {"loss": loss, "token_loss": loss}

    def greedy_tokens(self, features: Float[Tensor, "*n d"]) -> Int[Tensor, "*n"]:
        """Most likely token (...) at each feature (..., d)."""
        return self.out(features).argmax(-1)

    def predict(self, features: Float[Tensor, "*n N d"]) -> Float[Tensor, "*n k a"]:
        """Normalised actions (..., k, a) from the features (..., N, d); bins of binary dimensions lie in [0, 1]."""
        return self.decode(self.greedy_tokens(features))


HEADS: dict[str, type[nn.Module]] = {"mlp": MLPHead, "flow": FlowHead, "tokens": TokensHead, "expert": ActionExpert}
