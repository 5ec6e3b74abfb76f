"""Uniform binning of normalised actions into tokens, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.data.normalization import NormStats


@dataclass(frozen=True)
class ActionTokenizer:
    """Normalised actions -> integers 0 to ``bins - 1`` per dimension, and back to bin centres.

    Bins are uniform over [-1, 1], or [0, 1] in binary dimensions. Values outside are clipped to the end bins; the quantisation
    error inside is at most half a bin.

    Source: RT-1 and RT-2 (256 uniform bins per dimension).  Taught in: 02_episodes_and_actions.

    Attributes:
        is_binary: which of the ``a`` dimensions are, as of the spec.
        bins: per dimension.
    """

    is_binary: Sequence[bool] | np.ndarray
    bins: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_binary", tuple(map(bool, self.is_binary)))
        if type(self.bins) is not int or self.bins < 1:
            raise SpecMismatch(f"expected bins as a whole number from 1 on, got {self.bins!r}")

    @property
    def _low_and_width(self) -> tuple[np.ndarray, np.ndarray]:
        low = np.where(self.is_binary, 0.0, -1.0)
        return low, (1.0 - low) / self.bins

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Normalised ``(..., a)`` -> token ids ``(..., a)`` int64."""
        if not np.isfinite(actions).all():
            raise SpecMismatch("expected finite actions to tokenize, got NaN or infinity; drop or repair the frame")
        low, width = self._low_and_width
        return np.clip(np.floor((np.asarray(actions, np.float64) - low) / width), 0, self.bins - 1).astype(np.int64)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Token ids ``(..., a)`` -> normalised bin centres ``(..., a)`` float64."""
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu" or ((ids < 0) | (ids >= self.bins)).any():
            raise SpecMismatch(f"expected token ids from 0 to {self.bins - 1}, got {ids.dtype} {ids.ravel()[:8].tolist()} ...")
        low, width = self._low_and_width
        return low + (ids + 0.5) * width

    def round_trip(self, actions: np.ndarray, spec: ActionSpec, stats: NormStats) -> np.ndarray:
        """Raw actions ``(..., a)`` after encoding and decoding."""
        return spec.unnormalize(self.decode(self.encode(spec.normalize(actions, stats))), stats)

    def round_trip_error(
        self, actions: np.ndarray, spec: ActionSpec, stats: NormStats, reduce: Callable[..., Any] = np.mean
    ) -> np.ndarray:
        """Quantisation error of raw actions ``(n, a)``: ``(a,)``, absolute, in the spec's SI units, reduced over the rows."""
        return reduce(np.abs(spec.to_si(self.round_trip(actions, spec, stats) - actions)), axis=0)
