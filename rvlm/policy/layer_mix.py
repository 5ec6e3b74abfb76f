"""A learned mix of several hidden layers."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class LayerMix(nn.Module):
    """Weighted mean of several hidden layers, each normalised; the weights are a softmax, equal at first.

    Source: ELMo (Peters et al. 2018, arXiv 1802.05365), section 3.2; its scale is the next layer's here.

    Args:
        layers: Number of the layers, or their indices.
    """

    def __init__(self, layers: int | Sequence[int]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(layers if isinstance(layers, int) else len(layers)))

    def forward(self, states: Float[Tensor, "m v d"]) -> Float[Tensor, "m d"]:
        """(m, v, d) to (m, d)."""
        return self.logits.softmax(0) @ F.layer_norm(states, states.shape[-1:])
