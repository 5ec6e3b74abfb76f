"""An action expert: flow matching by a small transformer that attends to the hidden states of the backbone's layers.

Source: pi0 (Black et al. 2024, arXiv 2410.24164), section IV: the layers of the expert attend to those of the vision-language
model; SmolVLA (Shukor et al. 2025, arXiv 2506.01844), section 3: by cross-attention, between self-attention over the actions.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rvlm.policy.action_losses import split_dims
from rvlm.policy.flow_matching import FlowMatchingHead, time_waves

EXPERT_LAYERS = 4


class ActionExpert(FlowMatchingHead):
    """Conditional flow matching of the continuous dimensions' chunk, and classification of binary ones, by cross-attention.

    Each action of a chunk is a token. Every layer is self-attention over these tokens, cross-attention to all tokens of the
    prompt at one hidden layer of the backbone (images, instruction, and the state, which enters at `<act>`), and an MLP. Binary
    dimensions are read from tokens of their own, which hold no noise.

    Its features are hidden states (..., v, l, d) of v layers at l tokens, zero where a token is not to be attended to.

    Args:
        width, chunk_size, is_binary, n_euler_steps, n_noise_samples, gripper_weight: As of `rvlm.policy.heads.FlowHead`.
        hidden: Width of the expert; about three quarters of the backbone's by default, as SmolVLA's.
        n_layers: Of the expert; of the v layers of the backbone each attends to one, in their order.
        n_heads: Of its attention.

    Raises:
        ValueError: As of `FlowMatchingHead`, or the heads cannot share the width evenly.
    """

    def __init__(
        self,
        width: int,
        chunk_size: int,
        is_binary: Sequence[bool],
        hidden: int | None = None,
        n_layers: int = EXPERT_LAYERS,
        n_heads: int = 4,
        n_euler_steps: int = 5,
        n_noise_samples: int = 8,
        gripper_weight: float = 0.1,
    ) -> None:
        super().__init__(chunk_size, is_binary, n_euler_steps, n_noise_samples, gripper_weight)
        if n_layers < 1 or n_heads < 1 or (hidden is not None and (hidden < 1 or hidden % n_heads)):
            raise ValueError(
                f"expected an action expert of at least one layer, and a width that its heads share evenly; got "
                f"n_layers={n_layers}, hidden={hidden}, n_heads={n_heads}"
            )
        if hidden is None:
            hidden = n_heads * max(3 * width // (4 * n_heads), 1)
        self.n_layers = n_layers
        self.embed = nn.Sequential(nn.Linear(self.shape[1] + 2, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.positions = nn.Parameter(torch.randn(chunk_size, hidden) * hidden**-0.5)
        self.binary_tokens = nn.Parameter(torch.randn(chunk_size, hidden) * hidden**-0.5) if self.n_binary else None
        self.context = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden)) for _ in range(n_layers))
        block: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(hidden, n_heads, 4 * hidden, **block) for _ in range(n_layers))
        self.out = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, len(is_binary)))

    def attend(
        self, tokens: Float[Tensor, "n q h"], features: Float[Tensor, "n v l d"]
    ) -> tuple[Float[Tensor, "n q c"], Float[Tensor, "n q g"]]:
        """Continuous and binary dimensions at the tokens of several chunks of n observations; a chunk does not see another."""
        is_padding = ~features.any(-1).any(1)
        is_padding &= ~is_padding.all(-1, keepdim=True)  # an observation that does not exist: softmax over nothing is NaN
        chunk = torch.arange(tokens.shape[1], device=tokens.device) // self.shape[0]
        for i, (project, layer) in enumerate(zip(self.context, self.layers, strict=True)):
            context = project(features[:, i * features.shape[1] // self.n_layers])
            tokens = layer(tokens, context, tgt_mask=chunk[:, None] != chunk, memory_key_padding_mask=is_padding)
        return split_dims(self.out(tokens), self.is_binary)

    def predict_clean_action(
        self, features: Float[Tensor, "*n v l d"], chunk: Float[Tensor, "*s k c"], time: Float[Tensor, "*s 1"]
    ) -> Float[Tensor, "*s k c"]:
        """Clean actions (..., k, c) of noised chunks at flow times (..., 1), which may have more leading axes than features."""
        waves = time_waves(time)[..., None, :].expand(*chunk.shape[:-1], -1)
        tokens = self.embed(torch.cat([chunk, waves], dim=-1)) + self.positions
        flat = features.flatten(0, -4)
        tokens = tokens.reshape(-1, len(flat), *tokens.shape[-2:])  # chunks of each observation
        clean, _ = self.attend(tokens.movedim(0, 1).flatten(1, 2), flat)
        return clean.unflatten(1, (-1, self.shape[0])).movedim(1, 0).reshape(chunk.shape)

    def binary_logits(self, features: Float[Tensor, "*n v l d"]) -> Float[Tensor, "*n k g"]:
        """Logits (..., k, g) of the g binary dimensions."""
        leading = features.shape[:-3]
        if self.binary_tokens is None:
            return features.new_zeros(*leading, self.shape[0], 0)
        tokens = self.binary_tokens.expand(math.prod(leading), -1, -1)
        return self.attend(tokens, features.flatten(0, -4))[1].unflatten(0, leading)
