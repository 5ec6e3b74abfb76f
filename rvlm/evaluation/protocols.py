"""Evaluation protocols beyond plain success: settings and the generalisation gap, shortcut probes, train-test leaks.

Source: RoboVLMs (arXiv 2412.14058), section on real-robot evaluation (settings); Newcombe intervals for gaps.
"""

import dataclasses
import re
from typing import Any

import pandas as pd

from rvlm.envs.suite_checks import SuiteError
from rvlm.envs.suites import Suite, load_suite
from rvlm.evaluation.closed_loop import Evaluation
from rvlm.statistics import Rate, newcombe, wilson

PROTOCOL_SETTINGS = ("simple", "unseen_distractor", "unseen_background", "unseen_target", "novel_description")
SHORTCUT_PROBES = {  # name -> fields of `Evaluation`; a policy that succeeds as often with a probe does not use what it removes
    "no language": {"ablation": "no_language"},
    "shuffled language": {"ablation": "shuffled_language"},
    "black images": {"ablation": "blank_image"},
    "farther start poses": {"setting": "new_start"},
    "random actions": {"policy": "random"},
}


def in_setting(suite: str | Suite, setting: str) -> Suite:
    """The suite in another of its settings; of a `Suite` that is given itself, with its time limits.

    Raises:
        SuiteError: It has no such setting.
    """
    own = load_suite(suite)
    if setting not in own.settings:
        raise SuiteError(f"{own.name} has no setting {setting!r}; there are {', '.join(own.settings) or 'none'}")
    if setting == own.setting:
        return own
    changed = load_suite(own.settings[setting])
    if suite is not own:  # by name
        return changed
    limits = {task: (own if task in own.tasks else changed).limit(task) for task in changed.tasks}
    return dataclasses.replace(changed, max_steps=limits)


def evaluations_by_setting(
    policy: str,
    n_episodes: int,
    suite: str | Suite = "tabletop/franka7",
    tasks: tuple[str, ...] = (),
    settings: tuple[str, ...] = PROTOCOL_SETTINGS,
    **options: Any,
) -> dict[str, Evaluation]:
    """A policy in each setting of the real-robot protocol, on the same seeds.

    Args:
        policy: Folder of a trained model, or "random" or "expert".
        n_episodes: Of each setting.
        suite: Of the setting of training.
        tasks: Tasks, which alternate; each setting leaves out those that it lacks, as unseen targets need a target.
        settings: Names in `Suite.settings`.
        options: Other fields of `Evaluation`.
    """
    tasks, evaluations = load_suite(suite).known(tasks) or load_suite(suite).default_tasks, {}
    for setting in settings:
        changed = in_setting(suite, setting)
        kept = tuple(task for task in tasks if task in changed.tasks)
        evaluations[setting] = Evaluation(policy, n_episodes, changed, kept, **options)
    return evaluations


def shortcut_probes(
    policy: str, n_episodes: int, suite: str | Suite = "tabletop/franka7", **options: Any
) -> dict[str, Evaluation]:
    """A policy with each of its inputs removed, farther start poses, and chance: which inputs does its success depend on?

    A suite without the setting "new_start" is not probed with farther start poses.
    """
    fields, probes = {"policy": policy, "n_episodes": n_episodes, **options}, {}
    for name, probe in SHORTCUT_PROBES.items():
        setting = probe.get("setting")
        if setting is None or setting in load_suite(suite).settings:
            probed = in_setting(suite, setting) if setting else suite
            changes = {key: value for key, value in probe.items() if key != "setting"}
            probes[name] = Evaluation(**{**fields, "suite": probed, **changes})
    return probes


def generalisation_gap(episodes: pd.DataFrame, seen: str = "simple") -> pd.DataFrame:
    """Loss of success rate from the seen setting to each other one, with 95 % Newcombe intervals.

    Args:
        episodes: Rows of `evaluate` in several settings.
        seen: The setting of training; only its episodes of tasks that occur in the other setting count.

    Returns:
        One row per unseen setting: setting, seen, unseen (rates), n_seen, n_unseen, gap, low, high (seen minus unseen).
    """
    rows, seen_episodes = [], episodes.loc[episodes["setting"] == seen]
    for setting, group in episodes.loc[episodes["setting"] != seen].groupby("setting", sort=False):
        a, b = _rate(seen_episodes.loc[seen_episodes["task"].isin(list(group["task"]))]), _rate(group)
        gap = newcombe(a, b)
        rates = {"seen": a.rate, "unseen": b.rate, "n_seen": a.n, "n_unseen": b.n}
        rows.append({"setting": setting, **rates, "gap": gap.estimate, "low": gap.low, "high": gap.high})
    return pd.DataFrame(rows)


def _rate(episodes: Any) -> Rate:
    return wilson(int(episodes["is_success"].to_numpy().sum()), len(episodes))


def train_test_leaks(dataset: Any, episodes: pd.DataFrame) -> list[str]:
    """What the training data has in common with an evaluation and must not have; empty where nothing leaks.

    Args:
        dataset: `EpisodeDataset` that the policy was trained on.
        episodes: Rows of `evaluate`: seed, instruction, setting.
    """
    held_out, found = dataset.held_out, []
    if "seed" in dataset.episodes:
        both = sorted(set(dataset.episodes["seed"]) & set(episodes["seed"]))
        found += [f"{len(both)} seeds were trained on, the first is {both[0]}"] if both else []
    patterns = [re.sub(r"\\\{[ab]\\\}", ".+", re.escape(wording)) for wording in held_out.get("wordings", ())]
    worded = [task for task in dataset.tasks if any(re.fullmatch(pattern, task) for pattern in patterns)]
    found += [f"{len(worded)} instructions have held-out wordings, the first is {worded[0]!r}"] if worded else []
    named = [task for task in dataset.tasks if set(task.split()) & set(held_out.get("words", ()))]
    found += [f"{len(named)} instructions name held-out objects, the first is {named[0]!r}"] if named else []
    novel = set(episodes.loc[episodes["setting"] == "novel_description", "instruction"]) & set(dataset.tasks)
    found += [f"{len(novel)} instructions of the setting novel_description were trained on"] if novel else []
    return found
