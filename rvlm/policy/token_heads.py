"""Discrete action heads: the backbone reads and predicts action tokens in its own sequence, uniform bins or FAST.

A head predicts a token at each of its `<act>`, token after token where autoregressive (`rvlm.policy.token_decoding`).
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from rvlm.policy.action_losses import masked_mean
from rvlm.policy.action_tokenizer import ActionTokenizer
from rvlm.policy.fast_tokenizer import FASTTokenizer


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
        self._add_layers(width, n_bins, n_bins)

    def _add_layers(self, width: int, n_embeddings: int, n_vocab: int) -> None:
        self.token_position_embeddings = nn.Parameter(torch.randn(self.n_queries, width) * width**-0.5)
        self.tokens = nn.Embedding(n_embeddings, width) if self.is_autoregressive else None
        if self.tokens is not None:
            nn.init.normal_(self.tokens.weight, std=width**-0.5)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_vocab))

    def encode(self, action: Float[Tensor, "*n k a"], mask: Bool[Tensor, "*n k a"] | None = None) -> Int[Tensor, "*n N"]:
        """Normalised actions (..., k, a) to tokens (..., N), in decoding order; each is masked by itself, in the loss."""
        ids = torch.from_numpy(self.tokenizer.encode(action.detach().cpu().numpy()))
        return ids.to(action.device).flatten(-2)

    def decode(self, ids: Int[Tensor, "*n N"]) -> Float[Tensor, "*n k a"]:
        """Tokens (..., N) to normalised actions (..., k, a)."""
        action = self.tokenizer.decode(ids.unflatten(-1, self.shape).cpu().numpy())
        return torch.from_numpy(action).to(ids.device, torch.float32)

    def absent_tokens(self, is_present: Bool[Tensor, " a"]) -> Int[Tensor, " N"]:
        """Tokens (N,) of a chunk in slots that a robot lacks, whose actions are 0 in training; -1 where it has the slot (a,)."""
        zeros = self.encode(torch.zeros(self.shape, device=is_present.device))
        return torch.where(is_present.expand(self.shape).flatten(), -1, zeros)

    def is_complete(self, ids: Int[Tensor, "*n N"]) -> bool:
        """Whether the first tokens (..., N) of some chunks are all that these have."""
        return ids.shape[-1] == self.n_queries

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


def hold_masked(action: Float[Tensor, "*n k a"], mask: Bool[Tensor, "*n k a"]) -> Float[Tensor, "*n k a"]:
    """Actions (..., k, a) whose masked steps repeat the last step before them that is not masked, or are 0 if there is none."""
    step = torch.arange(action.shape[-2], device=action.device)[:, None]
    last = torch.where(mask, step, -1).cummax(-2).values
    return torch.where(last >= 0, action.gather(-2, last.clamp(min=0)), 0.0)


class FASTHead(TokensHead):
    """Discrete actions by `FASTTokenizer`: a chunk is a varying number of tokens, decoded autoregressively.

    A chunk ends with its last coefficient, so there is no token for the end; the `<act>` after it are padding, without a loss.
    Masked steps hold the last action before them, and absent dimensions 0, as all dimensions share tokens.

    Args:
        width, chunk_size, is_binary: As of `MLPHead`.
        scale: As of `FASTTokenizer`.
        n_vocab: Most tokens of the vocabulary that is learned (`learn_vocabulary`).
        vocabulary: What was learned: `merges` and `max_tokens` of `FASTTokenizer`; without it each coefficient is a token.
    """

    def __init__(
        self,
        width: int,
        chunk_size: int,
        is_binary: Sequence[bool],
        scale: float = 10.0,
        n_vocab: int = 1024,
        vocabulary: Mapping[str, Any] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.fast, self.max_vocab = FASTTokenizer(chunk_size, tuple(is_binary), scale, **(vocabulary or {})), n_vocab
        self.is_autoregressive, self.n_queries = True, self.fast.n_tokens
        self._add_layers(width, self.fast.n_vocab + 1, self.fast.n_vocab)

    def encode(self, action: Float[Tensor, "*n k a"], mask: Bool[Tensor, "*n k a"] | None = None) -> Int[Tensor, "*n N"]:
        """Normalised actions (..., k, a), where `mask` (..., k, a) is true, to tokens (..., N), padded at the end."""
        held = action if mask is None else hold_masked(action, mask)
        return torch.from_numpy(self.fast.encode(held.detach().float().cpu().numpy())).to(action.device)

    def decode(self, ids: Int[Tensor, "*n N"]) -> Float[Tensor, "*n k a"]:
        """Tokens (..., N) to normalised actions (..., k, a); warns if the tokens of a chunk do not end with it."""
        tokens = ids.cpu().numpy()
        if not self.fast.is_whole(tokens).all():
            warnings.warn(
                f"expected tokens of {self.fast.n_coefficients} coefficients for each chunk, got fewer or more for some: missing "
                "ones are 0, others left out; a policy that is trained long enough predicts whole chunks",
                stacklevel=2,
            )
        return torch.from_numpy(self.fast.decode(tokens)).to(ids.device, torch.float32)

    def absent_tokens(self, is_present: Bool[Tensor, " a"]) -> Int[Tensor, " N"]:
        """-1 for all tokens (N,): each is trained, as dimensions share them."""
        return torch.full((self.n_queries,), -1, device=is_present.device)

    def is_complete(self, ids: Int[Tensor, "*n N"]) -> bool:
        """Whether the first tokens (..., N) of some chunks have all coefficients of these."""
        return ids.shape[-1] == self.n_queries or bool(self.fast.is_full(ids.cpu().numpy()).all())

    def loss(
        self, features: Float[Tensor, "*n N d"], action: Float[Tensor, "*n k a"], mask: Bool[Tensor, "*n k a"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Cross entropy at features (..., N, d) of chunks (..., k, a) that have an action where `mask` (..., k, a) is true."""
        padding = self.fast.padding
        ids = torch.where(mask.flatten(-2).any(-1, keepdim=True), self.encode(action, mask), padding).flatten()
        errors = F.cross_entropy(self.out(features).flatten(0, -2), ids, ignore_index=padding, reduction="none")
        loss = masked_mean(errors, ids != padding)
        return {"loss": loss, "token_loss": loss}


def learn_vocabulary(model: Any, action: Float[Tensor, "n k a"], mask: Bool[Tensor, "n k a"]) -> None:
    """Give a policy of head "fast" the byte pairs of these normalised training chunks, and a new head for them.

    Args:
        model: A `VLA`, whose configuration keeps the vocabulary.
        action: Chunks (n, k, a).
        mask: (n, k, a), false past the episode's end and in dimensions that the robot lacks.

    Raises:
        ValueError: As of `FASTTokenizer.learn`.
    """
    old, config = model.head, model.config
    learned = old.fast.learn(hold_masked(action, mask).numpy(), old.max_vocab)
    config.action_vocabulary = {"merges": list(learned.merges), "max_tokens": learned.max_tokens}
    width = old.token_position_embeddings.shape[-1]
    model.head = FASTHead(width, config.chunk_size, old.fast.is_binary, **config.head_arguments).to(model.device)
