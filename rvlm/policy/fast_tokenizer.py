"""FAST: action chunks as tokens, by a discrete cosine transform and byte-pair encoding, and back.

Neighbouring actions of a chunk are alike, so most of its high frequencies are zero after rounding; byte pairs learned from
training chunks write such runs in one token. Without learned pairs each coefficient is a token.
Source: FAST (Pertsch et al. 2025, arXiv 2501.09747), section V.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer, models, trainers

from rvlm.data.errors import SpecMismatch

FIRST_CHARACTER = 0x20000  # of the alphabet; from here on Unicode has 42 thousand letters that no normalisation changes
MAX_LEARNING_CHUNKS = 20_000


def cosine_matrix(k: int) -> Float[np.ndarray, "k k"]:
    """The orthonormal discrete cosine transform (DCT-II) of k values; its inverse is its transpose."""
    step = np.arange(k)
    matrix = np.cos(np.pi / k * (step + 0.5) * step[:, None]) * np.sqrt(2 / k)
    matrix[0] /= np.sqrt(2)
    return matrix


@dataclasses.dataclass(frozen=True)
class FASTTokenizer:
    """Normalised chunks -> up to `n_tokens` token ids, and back.

    Each dimension is transformed along the chunk, scaled and rounded; coefficients are written low frequencies first, then merged
    in byte pairs. Values are clipped to [-1, 1], so that every coefficient is in the alphabet. Binary dimensions, in {0, 1}, are
    transformed as -1 and 1. The root mean square error over a chunk of a dimension is at most 1 / (2 `scale`).

    Attributes:
        chunk_size: Actions of a chunk (k).
        is_binary: Which of the a dimensions are.
        scale: Coefficients are multiplied by it before they are rounded.
        merges: Byte pairs in the order of learning, each the ids of two tokens, as "3 17"; as `learn` finds them.
        max_tokens: Of a chunk; what is beyond, the highest frequencies, is left out. All are kept by default.

    Raises:
        ValueError: A scale that is not above 0, or not finite.
    """

    chunk_size: int
    is_binary: Sequence[bool]
    scale: float = 10.0
    merges: Sequence[str] = ()
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"expected scale as a finite number above 0, got {self.scale}")

    @property
    def n_coefficients(self) -> int:
        """Of a chunk: k * a."""
        return self.chunk_size * len(self.is_binary)

    @property
    def n_tokens(self) -> int:
        """The most tokens of a chunk."""
        return self.n_coefficients if self.max_tokens is None else self.max_tokens

    @property
    def largest(self) -> int:
        """The largest rounded coefficient of values in [-1, 1]."""
        return int(np.ceil(self.scale * np.sqrt(self.chunk_size)))

    @property
    def n_vocab(self) -> int:
        """Tokens: one for each value of a coefficient, and one for each merge."""
        return 2 * self.largest + 1 + len(self.merges)

    @property
    def padding(self) -> int:
        """The id after a chunk's last token, which stands for nothing."""
        return self.n_vocab

    @functools.cached_property
    def coefficients(self) -> list[list[int]]:
        """Rounded coefficients that each token stands for."""
        tokens = [[value] for value in range(-self.largest, self.largest + 1)]
        for pair in self.merges:
            first, second = map(int, pair.split())
            tokens.append(tokens[first] + tokens[second])
        return tokens

    @functools.cached_property
    def _bpe(self) -> Tokenizer:
        words = [self._word(np.array(values)) for values in self.coefficients]
        pairs = [(words[int(first)], words[int(second)]) for first, second in (pair.split() for pair in self.merges)]
        return Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=pairs))

    def _word(self, coefficients: Int[np.ndarray, " n"]) -> str:
        return "".join(map(chr, (coefficients + (self.largest + FIRST_CHARACTER)).tolist()))

    def _words(self, actions: Float[np.ndarray, "*n k a"]) -> list[str]:
        if not np.isfinite(actions).all():
            raise SpecMismatch("expected finite actions to tokenize, got NaN or infinity; drop or repair the frame")
        values = np.clip(np.where(self.is_binary, 2 * actions - 1, actions).astype(np.float64), -1, 1)
        rounded = np.rint(self.scale * (cosine_matrix(self.chunk_size) @ values)).astype(np.int64)
        return [self._word(row) for row in rounded.reshape(-1, self.n_coefficients)]

    def encode(self, actions: Float[np.ndarray, "*n k a"]) -> Int[np.ndarray, "*n N"]:
        """Normalised chunks -> token ids, with `padding` after the last one of each.

        Raises:
            SpecMismatch: NaN or infinite actions.
        """
        ids = np.full((int(np.prod(actions.shape[:-2])), self.n_tokens), self.padding)
        for row, encoding in zip(ids, self._bpe.encode_batch(self._words(actions)), strict=True):
            kept = encoding.ids[: self.n_tokens]
            row[: len(kept)] = kept
        return ids.reshape(*actions.shape[:-2], self.n_tokens)

    def decode(self, ids: Int[np.ndarray, "*n N"]) -> Float[np.ndarray, "*n k a"]:
        """Token ids -> normalised chunks in [-1, 1], binary dimensions in [0, 1]; any ids give a chunk.

        Coefficients that the tokens lack are 0, those beyond the chunk's are left out, as are ids that are no tokens.
        """
        coefficients = np.zeros((int(np.prod(ids.shape[:-1])), self.n_coefficients))
        for row, tokens in zip(coefficients, ids.reshape(len(coefficients), -1).tolist(), strict=True):
            values = [value for token in tokens if 0 <= token < self.n_vocab for value in self.coefficients[token]]
            row[: len(values)] = values[: self.n_coefficients]
        shaped = coefficients.reshape(*ids.shape[:-1], self.chunk_size, len(self.is_binary)) / self.scale
        values = np.clip(cosine_matrix(self.chunk_size).T @ shaped, -1, 1)
        return np.where(self.is_binary, (values + 1) / 2, values)

    def _ends(self, ids: Int[np.ndarray, "*n N"]) -> Int[np.ndarray, "*n N"]:
        """Coefficients up to and with each token."""
        lengths = np.array([*map(len, self.coefficients), 0])
        return lengths[np.where((ids >= 0) & (ids < self.n_vocab), ids, self.n_vocab)].cumsum(-1)

    def is_full(self, ids: Int[np.ndarray, "*n N"]) -> Bool[np.ndarray, "*n"]:
        """Whether the tokens of a chunk hold all of its coefficients, or more."""
        return self._ends(ids)[..., -1] >= self.n_coefficients

    def is_whole(self, ids: Int[np.ndarray, "*n N"]) -> Bool[np.ndarray, "*n"]:
        """Whether some token of a chunk ends with its last coefficient; later tokens do not count."""
        return (self._ends(ids) == self.n_coefficients).any(-1)

    def learn(self, actions: Float[np.ndarray, "n k a"], n_vocab: int) -> "FASTTokenizer":
        """The tokenizer with byte pairs, and the most tokens of a chunk, of these normalised chunks.

        Args:
            actions: Of the training episodes; of more than `MAX_LEARNING_CHUNKS` evenly spaced ones are taken.
            n_vocab: The most tokens of the vocabulary; pairs that occur only once are not merged.

        Raises:
            ValueError: A vocabulary that does not hold each value of a coefficient, or no chunk.
        """
        alphabet = [self._word(np.array([value])) for value in range(-self.largest, self.largest + 1)]
        if n_vocab < len(alphabet) or len(actions) == 0:
            raise ValueError(
                f"expected n_vocab of at least {len(alphabet)}, each value of a coefficient at scale {self.scale} in chunks of "
                f"{self.chunk_size}, and chunks to learn from; got {n_vocab} and {len(actions)} chunks; raise it"
            )
        chosen = actions[:: -(-len(actions) // MAX_LEARNING_CHUNKS)]
        bpe, settings = Tokenizer(models.BPE()), {"initial_alphabet": alphabet, "min_frequency": 2, "show_progress": False}
        trainer: Any = trainers.BpeTrainer(vocab_size=n_vocab, special_tokens=[], **settings)
        bpe.train_from_iterator(self._words(chosen), trainer)
        ids, merges = {word: i for i, word in enumerate(alphabet)}, []
        for first, second in json.loads(bpe.to_str())["model"]["merges"]:
            ids[first + second] = len(alphabet) + len(merges)
            merges.append(f"{ids[first]} {ids[second]}")
        whole = dataclasses.replace(self, merges=merges, max_tokens=None)
        longest = int((whole.encode(chosen) != whole.padding).sum(-1).max())
        return dataclasses.replace(whole, max_tokens=longest)
