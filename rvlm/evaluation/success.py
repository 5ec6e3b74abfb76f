"""Success rates of evaluated episodes, and differences of success rates, with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pandas as pd

from rvlm.statistics import Difference, paired_difference, success_rate, wilson

EPISODE_KEYS = (
    "name",
    "training",
    "policy",
    "suite",
    "setting",
    "ablation",
    "seed",
    "subtask",
)  # columns that identify an episode


def success_table(episodes: pd.DataFrame, by: Sequence[str] = ("name",)) -> pd.DataFrame:
    """Success rates with 95 % intervals: Wilson's, or, for several trainings, `success_rate`'s, which covers them too.

    Args:
        episodes: As `evaluate` gives them, with a column `training` where a policy was trained several times.
        by: Columns to group by.

    Returns:
        One row per group: the columns in `by`, then successes, n, rate, low, high, and, for several trainings, trainings.

    Raises:
        ValueError: The same episode twice, or, for several trainings, not the same episodes for each.
    """
    rows, columns = [], [by] if isinstance(by, str) else list(by)
    if "seed" in episodes:
        _refuse_duplicates(episodes, [*columns, *(key for key in EPISODE_KEYS if key in episodes and key not in columns)])
    for key, group in episodes.groupby(columns, sort=False):
        n_trainings = len(set(group["training"])) if "training" in group else 1
        if n_trainings > 1:
            rate = success_rate(outcome_table(group, ["training"]))
        else:
            rate = wilson(int(group["is_success"].to_numpy().sum()), len(group))
        counts = {"successes": rate.successes, "n": rate.n, "rate": rate.rate, "low": rate.low, "high": rate.high}
        counts |= {"trainings": n_trainings} if n_trainings > 1 else {}
        rows.append({**dict(zip(columns, cast(tuple, key), strict=True)), **counts})
    return pd.DataFrame(rows)


def success_differences(episodes: pd.DataFrame, contrasts: Mapping[str, tuple[str, str]]) -> dict[str, Difference]:
    """Differences in success rate between policies on the same episodes, by `rvlm.statistics.paired_difference`.

    Adjust several contrasts of one notebook together, by `rvlm.statistics.holm`. Of policies that were evaluated in two ways, as
    column `policy` tells, the spread that both ways have in common over trainings does not count.

    Args:
        episodes: As `evaluate` gives them, with a column `training` where a policy was trained several times.
        contrasts: Name of the contrast -> (name of the candidate, name of the baseline).

    Returns:
        Name of the contrast -> success rate of the candidate minus that of the baseline.

    Raises:
        ValueError: A policy that is not in the table, not the same episodes or number of trainings for each, the same episode
            twice, or one policy as two trainings.
    """
    names = list(dict.fromkeys(name for pair in contrasts.values() for name in pair))
    existing = list(episodes["name"].unique())
    if missing := [name for name in names if name not in existing]:
        raise ValueError(f"expected contrasts of policies in column 'name', got {missing}; there are {existing}")
    compared = episodes.loc[episodes["name"].isin(names)]
    if {"training", "policy"} <= set(compared):
        _check_trainings(compared)
    outcomes = outcome_table(compared if "training" in compared else compared.assign(training=0), ["name", "training"])
    sides = {name: outcomes.loc[name].to_numpy() for name in names}
    weights = {name: _policies(compared, name) for name in names}
    return {
        contrast: paired_difference(sides[a], sides[b], same_trainings=weights[a] is not None and weights[a] == weights[b])
        for contrast, (a, b) in contrasts.items()
    }


def _policies(episodes: pd.DataFrame, name: str) -> dict[Any, Any] | None:
    """Training -> policy, of one name; None where the table does not tell."""
    if not {"training", "policy"} <= set(episodes):
        return None
    rows = episodes.loc[episodes["name"] == name].drop_duplicates(["training", "policy"])
    return dict(zip(rows["training"], rows["policy"], strict=True))


def _check_trainings(episodes: pd.DataFrame) -> None:
    """Refuse trainings of one name that share their weights."""
    for name, group in episodes.groupby("name", sort=False):
        n_trainings, n_weights = len(set(group["training"])), len(set(group["policy"]))
        if n_weights < n_trainings:
            raise ValueError(
                f"{name!r} has {n_trainings} trainings, but {n_weights} different weights; one policy evaluated twice is one "
                "training: train again with another seed"
            )


def _refuse_duplicates(episodes: pd.DataFrame, keys: Sequence[str]) -> None:
    if (twice := episodes[list(keys)][episodes.duplicated(keys)]).size:
        raise ValueError(
            f"expected each episode once, got {len(twice)} twice, as {twice.iloc[0].to_dict()}; give each training of a policy a "
            "number in a column 'training', and tables that hold the same episodes once"
        )


def outcome_table(episodes: pd.DataFrame, trained: Sequence[str]) -> pd.DataFrame:
    """Success in {0, 1} of each training (a row, by the columns `trained`) in each episode (a column).

    Raises:
        ValueError: The same episode twice, or not the same episodes for each.
    """
    _refuse_duplicates(episodes, [*trained, "seed"])
    episode = ["seed", "task"] if "task" in episodes else ["seed"]
    outcomes = episodes.astype({"is_success": float}).pivot(index=list(trained), columns=episode, values="is_success")
    if outcomes.isna().any(axis=None):
        short = outcomes.index[outcomes.isna().any(axis=1)].tolist()
        raise ValueError(
            f"expected the same episodes for all policies; {short} lack some of {outcomes.shape[1]} ({', '.join(episode)})"
        )
    return outcomes
