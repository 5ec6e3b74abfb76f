"""What a design can show before it is run, and what made trainings of one recipe differ after it was."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rvlm.statistics.intervals import LEVEL, Rate
from rvlm.statistics.proportions import wilson_ends
from rvlm.statistics.verdicts import MIN_TRAININGS

# Standard deviation of true success rates between trainings of one recipe that a design assumes before there are trainings:
# in this project's own runs on the tabletop it was 0.01 to 0.18. Where trainings are kept, `seed_variance` measures it.
ASSUMED_SPREAD = 0.07


@dataclass(frozen=True)
class SeedVariance:
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


def seed_variance(rates: Sequence[Rate]) -> SeedVariance:
    """Take apart what training seeds and what evaluation noise contribute to the spread of success rates.

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
    """Smallest true difference of two recipes' success rates that a design finds "supported", in [0, 1].

    The design is the one that `rvlm.statistics.paired_difference` judges: both recipes trained equally often, all trainings
    on the same episodes. Its interval is Newcombe's, of half-widths of t over trainings (few trainings, few degrees of
    freedom) joined with those over episodes, and varies with the spread that the few trainings happen to show. Of
    ``n_contrasts`` the difference is taken as the first that Holm's procedure tests, at ``(1 - level) / n_contrasts``; one
    that others precede is shown at least as often.

    Args:
        p: success rate of the first recipe, in [0, 1].
        n_episodes: that every training is judged on.
        n_trainings: of each recipe.
        between: standard deviation of true success rates between trainings of one recipe, in [0, 1]. The default is an
            assumption, which is to be said with the result; `seed_variance` gives what kept trainings showed.
        correlation: of the two recipes' outcomes in the same episode, in [0, 1): what pairing is worth.
        n_contrasts: judged together with Holm's adjustment.
        power: chance of the verdict where the difference is there.
        level: one minus the chance of any verdict where nothing differs.

    Returns:
        The difference, to a thousandth; ``inf`` where the design can show none: fewer than three trainings of each recipe, or
        a difference that would have to leave [0, 1] in both directions.

    Raises:
        ValueError: rates, correlation or counts out of their range.

    Source: the chance that the lower end of Newcombe's interval (1998, Statistics in Medicine 17, method 10) is above zero,
        averaged over the spreads that trainings may show.
    """
    from scipy import stats

    if not (0 <= p <= 1 and 0 <= correlation < 1 and between >= 0 and min(n_episodes, n_trainings, n_contrasts) >= 1):
        raise ValueError(
            "expected p in [0, 1], correlation in [0, 1), between of at least 0, and at least one episode, training and "
            f"contrast; got p={p}, correlation={correlation}, between={between}, n_episodes={n_episodes}, "
            f"n_trainings={n_trainings}, n_contrasts={n_contrasts}"
        )
    if not (0 < power < 1 and 0 < level < 1):
        raise ValueError(f"expected power and level between 0 and 1; got power={power}, level={level}")
    if n_trainings < MIN_TRAININGS:
        return math.inf
    tail, low = 1 - (1 - level) / n_contrasts / 2, min(p, 1 - p)  # an interval of failures is that of successes, mirrored
    t, z = float(stats.t.ppf(tail, n_trainings - 1)), float(stats.norm.ppf(tail))
    df, ranks = 2 * (n_trainings - 1), (np.arange(500) + 0.5) / 500
    shown = stats.chi2.ppf(ranks, df) / df  # how much of the variance between trainings so few of them may show

    def lacks(difference: float) -> float:
        """How far the chance of the verdict falls short of the power."""
        rates = np.clip([low + difference, low], 0.5 / n_episodes, 1 - 0.5 / n_episodes)  # no variance is not to be counted on
        variance = rates * (1 - rates)
        over_episodes = variance * (1 - correlation) / n_episodes / n_trainings
        over_trainings = between**2 / n_trainings + over_episodes
        squared = t**2 * np.outer(shown, over_trainings) + z**2 * over_episodes  # half-widths
        ends = wilson_ends(rates, z**2 * variance / np.maximum(squared, t**2 * over_episodes), z)
        below = np.hypot(rates[0] - ends[0][:, 0], ends[1][:, 1] - rates[1])
        return power - float(stats.norm.cdf((difference - below) / math.sqrt(over_trainings.sum())).mean())

    return next((d / 1000 for d in range(1, round(1000 * (1 - low))) if lacks(d / 1000) <= 0), math.inf)
