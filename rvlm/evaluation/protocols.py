"""What a policy is judged by, beside plain success: settings and the gap between them, shortcut probes, leaks.

Source: RoboVLMs (arXiv 2412.14058), section on real-robot evaluation (settings); Newcombe intervals for gaps.
"""

import re
from typing import Any

import pandas as pd

from rvlm.envs.tabletop.tasks import ALL_FAMILIES, DEFAULT_TASKS
from rvlm.evaluation.closed_loop import Evaluation
from rvlm.statistics import Rate, newcombe, wilson

SETTINGS = ("simple", "unseen_distractor", "unseen_background", "unseen_target", "novel_description")
PROBES = {  # name -> what of `Evaluation` it changes; a policy that does as well with a probe did not use what it takes
    "no language": {"control": "no_language"},
    "neighbour's language": {"control": "shuffled_language"},
    "black images": {"control": "blank_image"},
    "starts farther out": {"setting": "new_start"},
    "random actions": {"policy": "random"},
}


def settings(policy: str, n_episodes: int, families: tuple[str, ...] = DEFAULT_TASKS, **options: Any) -> dict[str, Evaluation]:
    """A policy in each setting of the real-robot protocol, on the same seeds.

    With unseen targets only families whose instruction names an object are asked, for the others nothing would be unseen.

    Args:
        policy: Folder of a trained model, or "random" or "expert".
        n_episodes: Of each setting.
        families: They take turns.
        options: Other fields of `Evaluation`.
    """
    objects = tuple(family for family in families if ALL_FAMILIES[family].n_objects)
    asked = {setting: objects if setting == "unseen_target" else families for setting in SETTINGS}
    return {s: Evaluation(policy, n_episodes, setting=s, families=asked[s], **options) for s in SETTINGS}


def shortcut_probes(policy: str, n_episodes: int, **options: Any) -> dict[str, Evaluation]:
    """A policy with each thing taken away, and chance: what its success rests on."""
    return {name: Evaluation(**{"policy": policy, "n_episodes": n_episodes, **options, **p}) for name, p in PROBES.items()}


def generalisation_gap(episodes: pd.DataFrame, seen: str = "simple") -> pd.DataFrame:
    """How much success is lost from the seen setting to each other one, with 95 % Newcombe intervals.

    Args:
        episodes: Rows of `evaluate` in several settings.
        seen: The setting of training; of its episodes those count whose families occur in the other setting.

    Returns:
        One row per unseen setting: setting, seen, unseen (rates), n_seen, n_unseen, gap, low, high (seen minus unseen).
    """
    rows, known = [], episodes.loc[episodes["setting"] == seen]
    for setting, group in episodes.loc[episodes["setting"] != seen].groupby("setting", sort=False):
        a, b = _rate(known.loc[known["family"].isin(list(group["family"]))]), _rate(group)
        lost = newcombe(a, b)
        rates = {"seen": a.rate, "unseen": b.rate, "n_seen": a.n, "n_unseen": b.n}
        rows.append({"setting": setting, **rates, "gap": lost.estimate, "low": lost.low, "high": lost.high})
    return pd.DataFrame(rows)


def _rate(episodes: Any) -> Rate:
    return wilson(int(episodes["is_success"].to_numpy().sum()), len(episodes))


def train_test_leaks(dataset: Any, episodes: pd.DataFrame) -> list[str]:
    """What of an evaluation the demonstrations have already shown; empty where nothing leaks.

    Args:
        dataset: `EpisodeDataset` that the policy was trained on.
        episodes: Rows of `evaluate`: seed, instruction, setting.
    """
    promised, found = dataset.held_out, []
    if "seed" in dataset.episodes:
        both = sorted(set(dataset.episodes["seed"]) & set(episodes["seed"]))
        found += [f"{len(both)} seeds were trained on, the first is {both[0]}"] if both else []
    patterns = [re.sub(r"\\\{[ab]\\\}", ".+", re.escape(wording)) for wording in promised.get("wordings", ())]
    worded = [task for task in dataset.tasks if any(re.fullmatch(pattern, task) for pattern in patterns)]
    found += [f"{len(worded)} instructions have held-out wordings, the first is {worded[0]!r}"] if worded else []
    named = [task for task in dataset.tasks if set(task.split()) & set(promised.get("words", ()))]
    found += [f"{len(named)} instructions name held-out objects, the first is {named[0]!r}"] if named else []
    novel = set(episodes.loc[episodes["setting"] == "novel_description", "instruction"]) & set(dataset.tasks)
    found += [f"{len(novel)} instructions of the setting novel_description were trained on"] if novel else []
    return found
