"""Verdicts on contrasts, and Holm's adjustment for several contrasts.

A verdict is about recipes, so it needs several trainings of each.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rvlm.statistics.intervals import LEVEL, Difference, mean_interval, success_rate

MIN_TRAININGS = 3  # of each side, for a verdict
VERDICT_PATTERN = re.compile(
    r"supported|replicated|reversed|undecided|not compared|no difference larger than \S+ shown"
    r"|one training: no verdict|\d+ trainings: no verdict"
)


def verdict(
    difference: Difference, margin: float | int | None = None, floor: float | int | None = None, is_published: bool = False
) -> str:
    """Verdict on the contrast "a is better than b".

    The rule, in this order: *not compared* if the baseline b has not learned; *one training: no verdict* (or *2 trainings*)
    below three trainings of each side; *supported* if the interval lies wholly above zero; *reversed* if wholly below; *no
    difference larger than m shown* if it lies within a stated margin (two one-sided tests); else *undecided*.

    Args:
        difference: from `paired_difference`, `rvlm.evaluation.success.success_differences` or, of several contrasts, `holm`.
        margin: largest difference that counts as none, above 0, in the units of the difference.
        floor: value of a baseline that has not learned (chance, the error of the mean action), in the units of the values; b has
            learned if its interval lies wholly on the better side of it.
        is_published: this claim was published and is tested here under comparable conditions; if supported, it is
            *replicated*.

    Raises:
        ValueError: a margin that is not above 0, or a floor for a difference without `sides`.

    Source: Schuirmann (1987), Journal of Pharmacokinetics and Biopharmaceutics 15 (equivalence by margin).
    """
    if margin is not None and not 0 < margin < math.inf:
        raise ValueError(f"margin is the largest difference that counts as none: expected above 0, got {margin}")
    if floor is not None and not _has_learned(difference, floor):
        return "not compared"
    n = difference.n_trainings
    if n < MIN_TRAININGS:
        return "one training: no verdict" if n == 1 else f"{n} trainings: no verdict"
    if difference.low > 0:
        return "replicated" if is_published else "supported"
    if difference.high < 0:
        return "reversed"
    if margin is not None and -margin <= difference.low and difference.high <= margin:
        return f"no difference larger than {margin:g} shown"
    return "undecided"


def _has_learned(difference: Difference, floor: float | int) -> bool:
    if difference.sides is None:
        raise ValueError(
            "a floor needs the outcomes of the baseline: give a difference from paired_difference or success_differences"
        )
    baseline = difference.sides[1]
    own: Any = (success_rate if np.isin(baseline, (0, 1)).all() else mean_interval)(baseline)
    return bool(own.high < floor if difference.lower_is_better else own.low > floor)


def check_verdict(word: str) -> str:
    """Check that a word is a verdict, and return it.

    Raises:
        ValueError: another word.
    """
    if not VERDICT_PATTERN.fullmatch(word):
        raise ValueError(
            f"no verdict {word!r}; there are supported, reversed, undecided, no difference larger than m shown, not compared, "
            "one training: no verdict, and, for published claims, replicated; take what rvlm.statistics.verdict gives"
        )
    return word


def p_value(difference: Difference) -> float:
    """Two-sided p-value: one minus the largest level whose interval excludes zero; 1 where none does, at least 1e-12."""

    def excludes_zero(p: float) -> bool:
        at = difference.at(1 - 10**p)
        return at.low > 0 or at.high < 0

    low, high = -12.0, -1e-4  # of log10(p)
    if not excludes_zero(high):
        return 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if excludes_zero(middle) else (middle, high)
    return 10**high


def holm(contrasts: Mapping[str, Difference], level: float = LEVEL) -> dict[str, Difference]:
    """Contrasts with p-values and intervals adjusted by Holm's procedure (familywise error rate).

    Each interval is at the level at which the procedure tests it: of k contrasts the one with the smallest p-value at
    ``1 - (1 - level) / k``, the next at ``1 - (1 - level) / (k - 1)``, and all from the first that is not rejected on at that
    one's level. So an interval excludes zero exactly if the adjusted p-value is below ``1 - level``.

    Args:
        contrasts: name -> difference, as `success_differences` gives them, all of a notebook.
        level: one minus the familywise error rate.

    Source: Holm (1979), Scandinavian Journal of Statistics 6.
    """
    alone = {claim: p_value(difference) for claim, difference in contrasts.items()}
    adjusted, worst, left = {}, 0.0, len(alone)  # left: contrasts not yet rejected
    for rank, claim in enumerate(sorted(alone, key=lambda claim: alone[claim])):
        worst = max(worst, min(1.0, (len(alone) - rank) * alone[claim]))
        adjusted[claim] = replace(contrasts[claim].at(1 - (1 - level) / left), p_value=worst)
        left -= worst < 1 - level
    return {claim: adjusted[claim] for claim in contrasts}
