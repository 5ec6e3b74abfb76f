"""Intervals and tests of rates, means and paired differences, over episodes and over trainings.

What an interval covers depends on what was sampled. For one training it covers the true value of that policy over all possible
episodes, and says nothing about other trainings. For several trainings it covers the recipe's: the mean over all possible
trainings and episodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike

from rvlm.statistics.proportions import EffectiveRate, newcombe_paired

LEVEL = 0.95


@dataclass(frozen=True)
class Rate:
    """A proportion with its interval.

    Attributes:
        successes, n: episodes that succeeded, of how many.
        low, high: ends of the interval, in [0, 1].
    """

    successes: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Successes per episode, in [0, 1]."""
        return self.successes / self.n

    def __str__(self) -> str:
        return f"{self.rate:.0%} [{self.low:.0%}, {self.high:.0%}], {self.successes} of {self.n}"


@dataclass(frozen=True)
class Difference:
    """An estimated difference ``a - b`` with its interval, in the units of what was compared (rates: [-1, 1]).

    Attributes:
        low, high: ends of the interval; NaN where the values have no spread to make it from.
        n_trainings: of each side.
        level: of the interval.
        p_value: two-sided, adjusted for several contrasts; None before `rvlm.statistics.holm`.
        sides: the values a and b, each ``(m, n)`` of m trainings on n episodes.
        lower_is_better: the values are errors, and the difference is ``b - a``.
        same_trainings: both sides are the same trained policies, evaluated in two ways.
    """

    estimate: float
    low: float
    high: float
    n_trainings: int = 1
    level: float = LEVEL
    p_value: float | None = None
    sides: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False, compare=False)
    lower_is_better: bool = field(default=False, repr=False)
    same_trainings: bool = field(default=False, repr=False)

    def at(self, level: float) -> Difference:
        """The same difference with its interval at another level.

        Raises:
            ValueError: the values are not known.
        """
        if self.sides is None:
            raise ValueError("another level needs the outcomes: give a difference from paired_difference or success_differences")
        return paired_difference(*self.sides, level, self.lower_is_better, self.same_trainings)

    def __str__(self) -> str:
        return f"{self.estimate:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


@dataclass(frozen=True)
class Mean:
    """A mean over episodes with its interval, in the units of what was averaged.

    Attributes:
        n: number of episodes.
        low, high: ends of the interval; NaN where the values have no spread to make it from.
    """

    mean: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """Exact McNemar test: how often only one of two policies solved the same episode.

    Attributes:
        only_a, only_b: episodes that only that policy solved.
        p_value: two-sided; probability of a split at least this uneven if both were equally good.
    """

    n: int
    only_a: int
    only_b: int
    p_value: float


def wilson(successes: SupportsIndex, n: SupportsIndex, level: float = LEVEL) -> Rate:
    """Wilson score interval of a success rate.

    Raises:
        ValueError: no episodes, or more successes than episodes.

    Source: Wilson (1927), Journal of the American Statistical Association 22.
    """
    from statsmodels.stats.proportion import proportion_confint

    successes, n = index(successes), index(n)  # numpy's integers too
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"expected 0 <= successes <= n and n > 0; got {successes} successes of {n}; were any episodes run?")
    ends: Any = proportion_confint(successes, n, alpha=1 - level, method="wilson")
    rate = successes / n  # rounding must not put the rate outside its interval
    return Rate(successes, n, min(float(ends[0]), rate), max(float(ends[1]), rate))


def newcombe(a: Rate, b: Rate, level: float = LEVEL) -> Difference:
    """Interval of ``a.rate - b.rate`` for two independent sets of episodes.

    Source: Newcombe (1998), Statistics in Medicine 17, method 10.
    """
    from statsmodels.stats.proportion import confint_proportions_2indep

    low, high = confint_proportions_2indep(
        a.successes, a.n, b.successes, b.n, method="newcomb", compare="diff", alpha=1 - level, correction=False
    )
    return Difference(a.rate - b.rate, float(low), float(high))


def mcnemar(a: ArrayLike, b: ArrayLike) -> PairedTest:
    """Exact McNemar test of two policies on the same episodes.

    Args:
        a: success of one policy per episode, bool ``(n,)``.
        b: success of the other, in the same order of episodes.
    """
    from statsmodels.stats.contingency_tables import mcnemar as exact_test

    a, b = paired(a, b)
    a, b = a.astype(bool), b.astype(bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return PairedTest(len(a), 0, 0, 1.0)
    table = [[int((a & b).sum()), only_a], [only_b, int((~a & ~b).sum())]]
    result: Any = exact_test(table, exact=True)
    return PairedTest(len(a), only_a, only_b, float(result.pvalue))


def success_rate(outcomes: ArrayLike, level: float = LEVEL) -> Rate:
    """Success rate of one policy, or of a recipe's trainings on the same episodes, with its interval.

    One training: Wilson's, which covers this policy's true rate. Several: Wilson's with an effective number of episodes, from
    the variance between trainings (with Student's t, for they are few) and between episodes, and at most the number of all
    outcomes; it covers the recipe's true rate, unless the rates of its trainings are very skewed (most at zero, few high).

    Args:
        outcomes: success per episode, ``(n,)``, or of m trainings ``(m, n)``; each 0 or 1.
        level: confidence level of the interval.

    Raises:
        ValueError: no outcomes, or other numbers than 0 and 1.

    Source: Korn and Graubard (1998), Survey Methodology 24 (effective sample size, few degrees of freedom).
    """
    outcomes = _matrix(outcomes)
    if not _is_binary(outcomes):
        raise ValueError("success_rate: expected outcomes of 0 and 1; use mean_interval for other numbers")
    low, high = EffectiveRate(outcomes, level).ends()
    return Rate(int(outcomes.sum()), outcomes.size, low, high)


def mean_interval(values: ArrayLike, level: float = LEVEL, bounds: tuple[float, float] | None = None) -> Mean:
    """Mean over episodes, and over trainings where there are several, with Student's t interval.

    One training: t over its episodes; it covers this policy's true mean. Several: half-widths of t over trainings' means and
    of t over episodes' means, added in squares; it covers the recipe's true mean. Equal values have no spread, so the ends are
    NaN; within bounds they are where a share of unobserved other values, of at most Wilson's bound, would move the mean.

    Args:
        values: one number per episode, ``(n,)``, not one per frame, since frames of an episode are correlated; ``(m, n)`` for m
            trainings on the same episodes.
        level: confidence level of the interval.
        bounds: least and largest possible value, if there are such.

    Raises:
        ValueError: no numbers, or numbers that are not finite.

    Source: Graybill and Wang (1980), Journal of the American Statistical Association 75 (sums of mean squares).
    """
    values = _matrix(values)
    mean, half = float(values.mean()), _half_width(values, level)
    if bounds is None:
        return Mean(mean, values.shape[1], mean - half, mean + half)
    least, largest = map(float, bounds)
    if math.isnan(half):
        unseen = success_rate(np.zeros_like(values), level).high
        return Mean(mean, values.shape[1], mean - unseen * (mean - least), mean + unseen * (largest - mean))
    return Mean(mean, values.shape[1], max(mean - half, least), min(mean + half, largest))


def paired_difference(
    a: ArrayLike, b: ArrayLike, level: float = LEVEL, lower_is_better: bool = False, same_trainings: bool = False
) -> Difference:
    """Mean improvement of a over b on the same episodes, with its interval.

    Outcomes of 0 and 1: Newcombe's paired interval, from each side's `success_rate` interval and their correlation over
    episodes; it has a width at rates of 0 and 1 too. Other numbers, and outcomes over trainings that both sides have in common:
    `mean_interval` of the differences, training by training and episode by episode.

    Args:
        a: one number per episode, ``(n,)``, or ``(m, n)`` for m trainings on the same episodes.
        b: the same for the other policy or recipe, trainings and episodes in the same order.
        level: confidence level of the interval.
        lower_is_better: the numbers are errors; the difference is ``b - a``.
        same_trainings: row i of a and of b is one trained policy, evaluated in two ways.

    Returns:
        The difference; its interval covers that of these two policies for one training each, that of the recipes for several.

    Raises:
        ValueError: different numbers of episodes or trainings.

    Source: Newcombe (1998), Statistics in Medicine 17:2635, method 10 (paired proportions).
    """
    a, b = (_matrix(side) for side in paired(a, b, n_axes=(1, 2)))
    gain = b - a if lower_is_better else a - b
    estimate = float(gain.mean())
    is_binary = _is_binary(a) and _is_binary(b)
    if is_binary and not (same_trainings and len(a) > 1):
        low, high = newcombe_paired(*((b, a) if lower_is_better else (a, b)), level)
    else:
        mean = mean_interval(gain, level, (-1, 1) if is_binary else None)
        low, high = mean.low, mean.high
    return Difference(estimate, low, high, len(a), level, None, (a, b), lower_is_better, same_trainings)


def paired(a: ArrayLike, b: ArrayLike, n_axes: Sequence[int] = (1,)) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays over the same episodes; ValueError for other shapes."""
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim not in n_axes or a.shape != b.shape or a.size == 0:
        raise ValueError(f"paired comparison: expected two arrays (n,) over the same episodes, got {a.shape} and {b.shape}")
    return a, b


def _matrix(values: ArrayLike) -> np.ndarray:
    """Values of m trainings on n episodes, ``(m, n)``."""
    values = np.asarray(values, dtype=float)
    if values.ndim not in (1, 2) or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"expected finite numbers, one per episode, (n,) or (m, n) with n > 0; got shape {values.shape}")
    return np.atleast_2d(values)


def _is_binary(values: np.ndarray) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _half_width(values: np.ndarray, level: float) -> float:
    """Half-width of the interval of the mean of ``(m, n)`` numbers; NaN where they have no spread."""
    from scipy.special import stdtrit

    over = [values.mean(axis=axis) for axis in (0, 1) if values.shape[1 - axis] > 1]  # by episode; by training
    if values.shape[1] < 2 or np.allclose(values, values[0, 0], rtol=1e-9, atol=0):
        return math.nan
    return math.hypot(*(stdtrit(len(x) - 1, 0.5 + level / 2) * x.std(ddof=1) / math.sqrt(len(x)) for x in over))
