"""Dataset statistics in LeRobot's format: of numeric columns, and of images from histograms of their values."""

from __future__ import annotations

from typing import Any

import numpy as np

from rvlm.data.normalization import QUANTILES, StatsAccumulator


class ImageHistogram:
    """Histogram of 8-bit values per channel: exact, mergeable statistics of images."""

    def __init__(self, counts: np.ndarray | None = None, n_frames: int = 0) -> None:
        self.counts = np.zeros((3, 256), np.int64) if counts is None else np.asarray(counts, np.int64).reshape(3, 256)
        self.n_frames = n_frames

    def update(self, images: np.ndarray) -> ImageHistogram:
        """Add images ``(n, h, w, 3)`` uint8."""
        self.counts += np.stack([np.bincount(images[..., c].reshape(-1), minlength=256) for c in range(3)])
        self.n_frames += len(images)
        return self

    def stats(self) -> dict[str, Any]:
        """LeRobot's image statistics: per channel ``(3, 1, 1)``, values in [0, 1]."""
        values, total = np.arange(256) / 255, self.counts.sum(1)
        mean = self.counts @ values / total
        moments = {"mean": mean, "std": np.sqrt(np.maximum(self.counts @ values**2 / total - mean**2, 0))}
        ends = {"min": self._quantile(0.0), "max": self._quantile(1.0)}
        quantiles = {name: self._quantile(q) for name, q in QUANTILES.items()}
        arrays = {k: v.reshape(3, 1, 1).tolist() for k, v in (ends | moments | quantiles).items()}
        return arrays | {"count": [self.n_frames]}

    def _quantile(self, q: float) -> np.ndarray:
        """Quantile of all pixels per channel, as numpy.quantile (linear)."""
        cumulative = self.counts.cumsum(1)
        position = q * (cumulative[:, -1] - 1)
        low, high = (self._sorted_value(cumulative, rank(position)) for rank in (np.floor, np.ceil))
        return (low + (high - low) * (position - np.floor(position))) / 255

    @staticmethod
    def _sorted_value(cumulative: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """The value at a rank of the sorted pixels, per channel."""
        return np.array([np.searchsorted(c, r, "right") for c, r in zip(cumulative, rank, strict=True)])


def feature_stats(values: np.ndarray) -> dict[str, Any]:
    """LeRobot's statistics of a numeric column ``(n, ...)``, as lists."""
    stats = StatsAccumulator().update(values.reshape(len(values), -1).astype(np.float64)).finish("identity").to_dict()
    return {k: stats[k] for k in ("min", "max", "mean", "std", *QUANTILES)} | {"count": [stats["count"]]}
