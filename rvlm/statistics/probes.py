"""Linear probes of features, and the share of variance that they explain."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rvlm.statistics.intervals import LEVEL, Mean, paired


def ridge_probe(features: np.ndarray, targets: np.ndarray, unseen: np.ndarray, penalty: float | int = 10) -> np.ndarray:
    """Predictions ``(n_unseen, m)`` of a ridge regression on unseen features.

    Args:
        features: ``(n, d)`` to fit.
        targets: ``(n, m)`` to fit.
        unseen: features ``(n_unseen, d)``.
        penalty: of the squared weights, on features scaled to unit deviation.

    Source: Alain and Bengio (2016), "Understanding intermediate layers using linear classifier probes" (arXiv 1610.01644).
    """
    x, y, x_new = (np.asarray(v, dtype=float) for v in (features, targets, unseen))
    shift, scale = x.mean(0), np.maximum(x.std(0), 1e-8)
    x, x_new = (x - shift) / scale, (x_new - shift) / scale
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    return x_new @ weights + y.mean(0)


def r_squared(true: ArrayLike, predicted: ArrayLike, seed: int, level: float = LEVEL, n_resamples: int = 2000) -> Mean:
    """Coefficient of determination of predictions of ``true`` ``(n,)``, with a bootstrap interval over the samples.

    1 is a perfect prediction, 0 no better than the mean of ``true``.
    """
    true, predicted = paired(true, predicted)
    draws = np.random.default_rng(seed).integers(len(true), size=(n_resamples, len(true)))

    def share(rows: np.ndarray) -> Any:
        left = ((true[rows] - predicted[rows]) ** 2).sum(-1)
        return 1 - left / ((true[rows] - true[rows].mean(-1, keepdims=True)) ** 2).sum(-1)

    low, high = np.nanquantile(share(draws), [(1 - level) / 2, (1 + level) / 2])
    return Mean(float(share(np.arange(len(true)))), len(true), float(low), float(high))
