"""Intervals of proportions over several trainings: effective sample sizes, Newcombe's paired interval."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


class EffectiveRate:
    """Rate ``p`` of ``(m, n)`` outcomes of m trainings on n episodes, and their effective number of episodes, ``n``.

    ``of_episodes`` is the share of the half-width that is due to the sample of episodes, which both sides have in common.
    """

    def __init__(self, outcomes: np.ndarray, level: float) -> None:
        from scipy.special import ndtri, stdtrit

        m, n = outcomes.shape
        self.p, self.z = float(outcomes.mean()), float(ndtri(0.5 + level / 2))
        by_episode = self.z**2 * float(outcomes.mean(0).var()) / n  # squared half-width over episodes
        variance, most, squared = self.p * (1 - self.p), float(n), by_episode
        if m > 1:
            student = float(stdtrit(m - 1, 0.5 + level / 2))
            squared += student**2 * float(outcomes.mean(1).var(ddof=1)) / m
            most = m * n * (self.z / student) ** 2
        self.n = min(self.z**2 * variance / squared, most) if squared > 0 else most
        self.of_episodes = math.sqrt(by_episode * self.n / variance) / self.z if variance > 0 else 0.0

    def ends(self) -> tuple[float, float]:
        """Ends of Wilson's interval; the effective number of episodes need not be whole."""
        low, high = wilson_ends(self.p, self.n, self.z)
        return float(low), float(high)


def wilson_ends(p: ArrayLike, n: ArrayLike, z: float) -> tuple[Any, Any]:
    """Ends of Wilson's interval of rates ``p`` over ``n`` episodes, which need not be whole, at the normal quantile ``z``."""
    p, n = np.asarray(p, float), np.asarray(n, float)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return np.maximum(0.0, np.minimum(middle - half, p)), np.minimum(1.0, np.maximum(middle + half, p))


def newcombe_paired(a: np.ndarray, b: np.ndarray, level: float) -> tuple[float, float]:
    """Ends of the interval of ``mean(a) - mean(b)`` for ``(m, n)`` outcomes of 0 and 1."""
    one, other = EffectiveRate(a, level), EffectiveRate(b, level)
    (low_a, high_a), (low_b, high_b) = one.ends(), other.ends()
    common = _correlation(a.mean(0), b.mean(0)) * one.of_episodes * other.of_episodes
    down, up = (one.p - low_a, high_b - other.p), (high_a - one.p, other.p - low_b)
    below, above = (math.sqrt(max(x * x + y * y - 2 * common * x * y, 0.0)) for x, y in (down, up))
    return max(one.p - other.p - below, -1.0), min(one.p - other.p + above, 1.0)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two sides' rates per episode ``(n,)``, with Newcombe's continuity correction where positive."""
    n, spread = len(a), float(a.std() * b.std())
    covariance = float((a * b).mean() - a.mean() * b.mean())
    if covariance > 0:
        covariance = max(covariance - 1 / (2 * n), 0.0)
    return covariance / spread if spread > 0 else 0.0
