"""Power of a design before it is run, and the variance between training seeds after it was."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rvlm.statistics.intervals import LEVEL, Rate
from rvlm.statistics.proportions import wilson_ends
from rvlm.statistics.verdicts import MIN_TRAININGS

# Standard deviation of true success rates between trainings of one recipe, assumed before there are any: it was 0.01 to 0.18
# in this project's own runs on the tabletop. `seed_variance` estimates it from trainings.
ASSUMED_SPREAD = 0.07


@dataclass(frozen=True)
class SeedVariance:
    """Spread of success rates between trainings of one recipe, and its share due to evaluation noise.

    Attributes:
        mean: success rate over trainings, in [0, 1].
        n: number of trainings.
        observed: standard deviation of their rates.
        evaluation: standard deviation that the finite number of episodes alone would cause.
        training: standard deviation between seeds with infinitely many episodes; 0 where evaluation noise explains all.
    """

    mean: float
    n: int
    observed: float
    evaluation: float
    training: float


def seed_variance(rates: Sequence[Rate]) -> SeedVariance:
    """Separate the variance of training seeds from evaluation noise.

    Raises:
        ValueError: fewer than two trainings.

    Source: method of moments for a random effect, as in DerSimonian and Laird (1986), Controlled Clinical Trials 7.
    """
    if len(rates) < 2:
        raise ValueError(f"seed_variance: expected at least two trainings, got {len(rates)}; train with more seeds")
    values = np.array([r.rate for r in rates])
    observed = float(values.var(ddof=1))
    noise = float(np.mean([r.rate * (1 - r.rate) / max(r.n - 1, 1) for r in rates]))
    left = max(observed - noise, 0.0)
    return SeedVariance(float(values.mean()), len(rates), math.sqrt(observed), math.sqrt(noise), math.sqrt(left))


def minimum_detectable_difference(
    p: float | int,
    n_episodes: int,
    n_trainings: int,
    between: float | int = ASSUMED_SPREAD,
    correlation: float | int = 0.0,
    n_contrasts: int = 1,
    power: float = 0.8,
    level: float = LEVEL,
) -> float:
    """Smallest true difference in success rate that a design finds "supported" with the given power, in [0, 1].

    The design is that of `rvlm.statistics.paired_difference`: both recipes trained equally often, all trainings on the same
    episodes. Of ``n_contrasts`` the first that Holm's procedure tests is taken, the one with the smallest power.

    Args:
        p: success rate of the baseline, in [0, 1].
        n_episodes: per training.
        n_trainings: per recipe.
        between: standard deviation of true success rates between trainings of one recipe, in [0, 1]; the default is an
            assumption, to be stated with the result (`seed_variance` estimates it from trainings).
        correlation: of the two recipes' outcomes in the same episode, in [0, 1).
        n_contrasts: adjusted together by Holm's procedure.
        power: probability of the verdict if the difference is real.
        level: confidence level of the contrasts together.

    Returns:
        The difference, to a thousandth; ``inf`` where the design can show none: fewer than `MIN_TRAININGS` trainings, or a
        difference that would leave [0, 1] in both directions.

    Raises:
        ValueError: rates, correlation or counts out of their range.
    """
    _check_design(p, n_episodes, n_trainings, between, correlation, n_contrasts, power, level)
    if n_trainings < MIN_TRAININGS:
        return math.inf
    baseline = min(p, 1 - p)  # failures have the mirrored interval of successes
    design = _Design(baseline, n_episodes, n_trainings, between, correlation, 1 - (1 - level) / n_contrasts)
    differences = (d / 1000 for d in range(1, round(1000 * (1 - baseline))))
    return next((d for d in differences if design.power(d) >= power), math.inf)


def _check_design(
    p: float, n_episodes: int, n_trainings: int, between: float, correlation: float, n_contrasts: int, power: float, level: float
) -> None:
    if not (0 <= p <= 1 and 0 <= correlation < 1 and between >= 0 and min(n_episodes, n_trainings, n_contrasts) >= 1):
        raise ValueError(
            "expected p in [0, 1], correlation in [0, 1), between of at least 0, and at least one episode, training and "
            f"contrast; got p={p}, correlation={correlation}, between={between}, n_episodes={n_episodes}, "
            f"n_trainings={n_trainings}, n_contrasts={n_contrasts}"
        )
    if not (0 < power < 1 and 0 < level < 1):
        raise ValueError(f"expected power and level between 0 and 1; got power={power}, level={level}")


@dataclass(frozen=True)
class _Design:
    """Two recipes with ``n_trainings`` each on the same ``n_episodes``; parameters as of `minimum_detectable_difference`."""

    p: float
    n_episodes: int
    n_trainings: int
    between: float
    correlation: float
    level: float

    @functools.cached_property
    def _quantiles(self) -> tuple[float, float, np.ndarray]:
        """Student's t and normal quantile of the level, and quantiles of the sample's share of the variance between trainings."""
        from scipy import stats

        tail, df = 0.5 + self.level / 2, 2 * (self.n_trainings - 1)
        shown = stats.chi2.ppf((np.arange(500) + 0.5) / 500, df) / df
        return float(stats.t.ppf(tail, self.n_trainings - 1)), float(stats.norm.ppf(tail)), shown

    def power(self, difference: float) -> float:
        """Probability that the interval of a true difference lies above zero, averaged over the spreads trainings may show.

        Source: Newcombe (1998), Statistics in Medicine 17, method 10, with half-widths of t over trainings, few degrees of
        freedom, joined with those over episodes.
        """
        from scipy.special import ndtr

        m, n, (t, z, shown) = self.n_trainings, self.n_episodes, self._quantiles
        rates = np.clip([self.p + difference, self.p], 0.5 / n, 1 - 0.5 / n)  # samples of rates at 0 or 1 have some variance
        variance = rates * (1 - rates)
        over_episodes = variance * (1 - self.correlation) / n / m
        over_trainings = self.between**2 / m + over_episodes
        squared = t**2 * np.outer(shown, over_trainings) + z**2 * over_episodes  # half-widths
        ends = wilson_ends(rates, z**2 * variance / np.maximum(squared, t**2 * over_episodes), z)
        below = np.hypot(rates[0] - ends[0][:, 0], ends[1][:, 1] - rates[1])
        return float(ndtr((difference - below) / math.sqrt(over_trainings.sum())).mean())
