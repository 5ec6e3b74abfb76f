"""Intervals, tests, verdicts and power for success rates and errors.

Every rate in this project comes with its interval, two recipes are compared by the interval of their difference over trainings
and episodes, and verdicts follow a stated rule. statsmodels and scipy do the arithmetic; this package fixes which method is
used where.

Taught in: 06_evaluate (rates), 03_attach_an_action_head (the probe).

Modules:
    proportions: intervals of proportions over several trainings.
    intervals: rates, means and paired differences, over episodes and trainings.
    power: minimum detectable difference, and variance between trainings.
    verdicts: the verdict on a contrast, and Holm's adjustment.
    probes: linear probes of features, and their R².
"""

from rvlm.statistics.intervals import (
    LEVEL,
    Difference,
    Mean,
    PairedTest,
    Rate,
    mcnemar,
    mean_interval,
    newcombe,
    paired_difference,
    success_rate,
    wilson,
)
from rvlm.statistics.power import ASSUMED_SPREAD, SeedVariance, minimum_detectable_difference, seed_variance
from rvlm.statistics.probes import r_squared, ridge_probe
from rvlm.statistics.verdicts import MIN_TRAININGS, check_verdict, holm, p_value, verdict

__all__ = [
    "ASSUMED_SPREAD",
    "LEVEL",
    "MIN_TRAININGS",
    "Difference",
    "Mean",
    "PairedTest",
    "Rate",
    "SeedVariance",
    "check_verdict",
    "holm",
    "mcnemar",
    "mean_interval",
    "minimum_detectable_difference",
    "newcombe",
    "p_value",
    "paired_difference",
    "r_squared",
    "ridge_probe",
    "seed_variance",
    "success_rate",
    "verdict",
    "wilson",
]
