"""History modules of the policy-head structure: fuse the features of several observations before the head.

Source: RoboVLMs (arXiv 2412.14058), section on VLA formulations.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

MAX_OBS_STEPS = 256  # observations that the GPT history can hold


class LSTMHistory(nn.Module):
    """Causal LSTM over the features of t observation steps, oldest first.

    Stateless: every forward pass starts from the zero state. Forget gates start nearly open (Jozefowicz et al. 2015, section
    2.2); else the past decays by half at every step.
    """

    def __init__(self, width: int, n_layers: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.lstm = nn.LSTM(width, width, n_layers, batch_first=True)
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias_ih"):
                nn.init.constant_(bias[width : 2 * width], 2.0)  # PyTorch's order is input, forget, cell, output

    def forward(self, features: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """(b, t, d) to (b, t, d)."""
        return features + self.lstm(self.norm(features))[0]


class GPTHistory(nn.Module):
    """A small causal transformer (transformers' GPT-2) over the same features."""

    def __init__(self, width: int, n_layers: int = 2) -> None:
        super().__init__()
        n_heads = next(n for n in (8, 4, 2, 1) if width % n == 0)
        size: dict[str, Any] = {"n_embd": width, "n_layer": n_layers, "n_head": n_heads, "n_positions": MAX_OBS_STEPS}
        plain: dict[str, Any] = {"vocab_size": 1, **{f"{name}_pdrop": 0.0 for name in ("resid", "embd", "attn")}}
        self.norm = nn.LayerNorm(width)
        self.gpt = GPT2Model(GPT2Config(**size, **plain, use_cache=False, bos_token_id=None, eos_token_id=None))
        self.gpt.set_input_embeddings(None)  # its inputs are features

    def forward(self, features: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """(b, t, d) to (b, t, d)."""
        return features + self.gpt(inputs_embeds=self.norm(features)).last_hidden_state


HISTORIES: dict[str, type[nn.Module]] = {"lstm": LSTMHistory, "gpt": GPTHistory}
