"""How sure are we? Intervals and tests for success rates.

A success rate from 200 episodes is an estimate: every rate in this project travels with its interval, two policies are
compared by the interval of their difference, and "replicated" is a word with a stated rule. statsmodels and scipy do the
arithmetic; this module fixes which method is used where.

Taught in: 06_evaluate (rates), 03_attach_an_action_head (the probe).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike

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
    """An estimated difference ``a - b`` with its interval, in the units of what was compared (rates: [-1, 1])."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


@dataclass(frozen=True)
class Mean:
    """A mean over episodes with its interval, in the units of what was averaged.

    Attributes:
        n: episodes.
        low, high: ends of the interval.
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
        p_value: two-sided; chance of a split at least this uneven if both were equally good.
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
    rate = successes / n  # rounding must not leave the rate outside its own interval
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

    a, b = _paired(a, b)
    a, b = a.astype(bool), b.astype(bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return PairedTest(len(a), 0, 0, 1.0)
    table = [[int((a & b).sum()), only_a], [only_b, int((~a & ~b).sum())]]
    result: Any = exact_test(table, exact=True)
    return PairedTest(len(a), only_a, only_b, float(result.pvalue))


def paired_bootstrap(a: ArrayLike, b: ArrayLike, seed: int, level: float = LEVEL, n_resamples: int = 10_000) -> Difference:
    """Percentile bootstrap of ``mean(a - b)`` over paired episodes (success, return, chain length).

    Args:
        a: one number per episode, ``(n,)``; of m trainings on the same episodes ``(m, n)``, as `bootstrap_mean` takes them.
        b: the same for the other policy, episodes in the same order.
        seed: of the resampling; the same seed gives the same interval.
        level: confidence level of the interval.
        n_resamples: how often the episodes are drawn anew.
    """
    a, b = _paired(a, b, n_axes=(1, 2))
    gain = bootstrap_mean(a.astype(float) - b.astype(float), seed, level, n_resamples)
    return Difference(gain.mean, gain.low, gain.high)


def bootstrap_mean(values: ArrayLike, seed: int, level: float = LEVEL, n_resamples: int = 10_000) -> Mean:
    """Percentile bootstrap of a mean over episodes, and over trainings where there are several.

    Another training is another draw, as another episode is: where trainings differ by 10 points, an interval over 200 episodes
    of five of them that takes the trainings as given covers the truth 6 times of 10, one that draws both anew 9 times of 10
    (``tests/test_statistics.py``). What one training gives says nothing of another one, whatever its interval.

    Args:
        values: one number per episode, ``(n,)``; give one per episode, not one per frame, for frames of an episode are alike.
            Of m trainings on the same episodes ``(m, n)``.
        seed: of the resampling; the same seed gives the same interval.
        level: confidence level of the interval.
        n_resamples: how often the episodes, and the trainings, are drawn anew.

    Source: Owen (2007), "The pigeonhole bootstrap", Annals of Applied Statistics 1.
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(f"bootstrap_mean: expected one number per episode, (n,) or (m, n) with n > 0; got shape {values.shape}")
    mean, (m, n) = float(values.mean()), np.atleast_2d(values).shape
    if values.size < 2 or np.ptp(values) == 0:  # nothing to resample
        return Mean(mean, n, mean, mean)
    if m > 1:
        rng = np.random.default_rng(seed)
        trainings, episodes = (rng.multinomial(k, np.full(k, 1 / k), n_resamples) for k in (m, n))  # how often each is drawn
        means = ((trainings @ values) * episodes).sum(axis=1) / values.size
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        return Mean(mean, n, float(low), float(high))
    interval = bootstrap(
        (values.ravel(),), np.mean, n_resamples=n_resamples, batch=1000, confidence_level=level, method="percentile", rng=seed
    ).confidence_interval
    return Mean(mean, n, float(interval.low), float(interval.high))


def ridge_probe(features: np.ndarray, targets: np.ndarray, unseen: np.ndarray, penalty: float | int = 10) -> np.ndarray:
    """What a linear probe reads from features that it was not fitted to: predictions ``(n_unseen, m)``.

    Args:
        features: ``(n, d)`` that the probe is fitted to.
        targets: ``(n, m)``, likewise.
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
    """Share of the variance of ``true`` ``(n,)`` that is predicted, with a bootstrap interval over the samples.

    1 is all of it, 0 no better than the mean of ``true``.
    """
    true, predicted = _paired(true, predicted)
    draws = np.random.default_rng(seed).integers(len(true), size=(n_resamples, len(true)))

    def share(rows: np.ndarray) -> Any:
        left = ((true[rows] - predicted[rows]) ** 2).sum(-1)
        return 1 - left / ((true[rows] - true[rows].mean(-1, keepdims=True)) ** 2).sum(-1)

    low, high = np.nanquantile(share(draws), [(1 - level) / 2, (1 + level) / 2])
    return Mean(float(share(np.arange(len(true)))), len(true), float(low), float(high))


@dataclass(frozen=True)
class Spread:
    """How far success rates of several trainings of one recipe lie apart, and how much of that the judging explains.

    Attributes:
        mean: over trainings, in [0, 1].
        n: trainings.
        observed: standard deviation of their rates.
        evaluation: of it, what a finite number of episodes alone would bring.
        training: what is left: the standard deviation between trainings judged for ever; 0 where judging explains it all.
    """

    mean: float
    n: int
    observed: float
    evaluation: float
    training: float


def spread_of_trainings(rates: Sequence[Rate]) -> Spread:
    """Take apart what training seeds and what evaluation noise contribute to the spread of success rates.

    Raises:
        ValueError: fewer than two trainings.

    Source: method of moments for a random effect, as in DerSimonian and Laird (1986), Controlled Clinical Trials 7.
    """
    if len(rates) < 2:
        raise ValueError(f"spread_of_trainings: expected at least two trainings, got {len(rates)}; train with more seeds")
    values = np.array([r.rate for r in rates])
    observed = float(values.var(ddof=1))
    noise = float(np.mean([r.rate * (1 - r.rate) / max(r.n - 1, 1) for r in rates]))
    left = max(observed - noise, 0.0)
    return Spread(float(values.mean()), len(rates), math.sqrt(observed), math.sqrt(noise), math.sqrt(left))


def episodes_needed(p: float | int, effect: float, power: float = 0.8, level: float = LEVEL) -> int:
    """Episodes per policy to see a difference of ``effect`` from a success rate ``p``.

    Args:
        p: success rate of the first policy, in [0, 1].
        effect: smallest difference worth seeing; ``p + effect`` must lie in [0, 1].
        power: chance of seeing it where it is there.
        level: one minus the chance of seeing it where it is not.

    Source: Cohen (1988), Statistical Power Analysis, section 6 (arcsine effect size, two-sided, independent episodes).
    """
    from statsmodels.stats.power import NormalIndPower
    from statsmodels.stats.proportion import proportion_effectsize

    if effect == 0 or not (0 <= p <= 1 and 0 <= p + effect <= 1):
        raise ValueError(f"expected p and p + effect within [0, 1] and effect != 0; got p = {p}, effect = {effect}")
    size = abs(proportion_effectsize(p + effect, p))
    return math.ceil(NormalIndPower().solve_power(size, alpha=1 - level, power=power, ratio=1))


def smallest_effect(p: float | int, n: int, power: float = 0.8, level: float = LEVEL) -> float:
    """Smallest gain over a success rate ``p`` that ``n`` episodes per policy show; inverse of `episodes_needed`.

    Args:
        p: success rate of the first policy, in [0, 1].
        n: episodes of each policy.
        power: chance of seeing the gain where it is there.
        level: one minus the chance of seeing it where it is not.
    """
    from statsmodels.stats.power import NormalIndPower

    size = NormalIndPower().solve_power(nobs1=n, alpha=1 - level, power=power, ratio=1)
    return math.sin(min(math.pi / 2, math.asin(math.sqrt(p)) + size / 2)) ** 2 - p


def verdict(difference: Difference, worthwhile: float | int = 0.0) -> str:
    """Was the claim "a is better than b" replicated?

    The rule, in this order: *not replicated* if the whole interval of ``a - b`` lies at or below ``worthwhile`` (an effect
    worth having is excluded); *replicated* if it lies wholly above zero; else *undecided* (more episodes are needed).

    Args:
        difference: from `newcombe` or `paired_bootstrap`.
        worthwhile: smallest gain that counts, at least 0, in the same units.
    """
    if worthwhile < 0:
        raise ValueError(f"worthwhile is the smallest gain that counts: expected at least 0, got {worthwhile}")
    if difference.high <= worthwhile:
        return "not replicated"
    return "replicated" if difference.low > 0 else "undecided"


def _paired(a: ArrayLike, b: ArrayLike, n_axes: Sequence[int] = (1,)) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim not in n_axes or a.shape != b.shape or a.size == 0:
        raise ValueError(f"paired comparison: expected two arrays (n,) over the same episodes, got {a.shape} and {b.shape}")
    return a, b
