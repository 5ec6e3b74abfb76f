"""A policy for each kind of robot: demonstrations, training, and evaluation beside its controls, in one function each."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rvlm.envs import FIRST_HELD_OUT_SEED
from rvlm.envs.demonstrations import Collection, collect_demonstrations
from rvlm.envs.suites import Suite, load_suite
from rvlm.evaluation.closed_loop import Evaluation, evaluate
from rvlm.evaluation.success import outcome_table, success_table
from rvlm.experiments.recipes import ONE_STEP
from rvlm.statistics import Difference, holm, paired_difference
from rvlm.training.launch import train_parallel
from rvlm.training.stages import ROBOT, Stage
from rvlm.vlm.backbones import SMALL_VLM

CONTROLS: dict[str, dict[str, str]] = {  # policy in a table -> what differs from the trained one, as fields of `Evaluation`
    "trained": {},
    "shuffled language": {"ablation": "shuffled_language"},
    "black images": {"ablation": "blank_image"},
    "random actions": {"policy": "random"},
    "expert": {"policy": "expert"},
}


@dataclasses.dataclass(frozen=True)
class RobotRecipe:
    """How a robot's policy is trained and judged.

    Attributes:
        suite: Environment with an expert, as `load_suite` takes it.
        tasks: That are demonstrated and evaluated; the suite's `default_tasks` if left out.
        n_demonstrations: Of all tasks together.
        n_samples: Training budget.
        policy: Fields of `VLAConfig`.
        n_action_steps: Of a predicted chunk, executed before the next one; by default as `Policy` does.
        changes: Fields of `Stage`.
    """

    suite: str | Suite
    tasks: tuple[str, ...] = ()
    n_demonstrations: int = 300
    n_samples: int = 12_000
    policy: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(ONE_STEP))
    n_action_steps: int | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def stage(self, seed: int = 0, **changes: Any) -> Stage:
        """Its training from the small vision-language model; `changes` are fields of `Stage`. Records what is missing."""
        data = collect_demonstrations(Collection(self.suite, self.n_demonstrations, self.tasks))
        fields = {"freeze_vision": True, "batch_size": 16, "n_processes": 1, "policy": dict(self.policy), **self.changes}
        return Stage("robot", ROBOT, (str(data),), str(SMALL_VLM), self.n_samples, **{**fields, "seed": seed, **changes})


RELATIVE = {**ONE_STEP, "action_representation": "relative"}  # joint targets are predicted as changes of the joints
_SLIDER_AND_LIGHT = ("move_slider_left", "move_slider_right", "turn_on_light")
ROBOT_RECIPES: dict[str, RobotRecipe] = {
    "franka7_joint": RobotRecipe(
        "tabletop/franka7_joint", (*_SLIDER_AND_LIGHT, "open_drawer", "close_drawer"), 200, 9000, RELATIVE
    ),
    "so101": RobotRecipe("tabletop/so101", _SLIDER_AND_LIGHT, 240, 18_000, RELATIVE),
    "two_arms": RobotRecipe("tabletop/two_arms", ("lift_left", "lift_right", "lift_both"), n_samples=20_000),
    "planar": RobotRecipe("tabletop/planar", n_samples=20_000),
}


def robot_recipe(robot: str) -> RobotRecipe:
    """A recipe by its name in `ROBOT_RECIPES`.

    Raises:
        KeyError: No such recipe, with those that exist.
    """
    if robot not in ROBOT_RECIPES:
        raise KeyError(f"no recipe of robot {robot!r}; there are {', '.join(ROBOT_RECIPES)}")
    return ROBOT_RECIPES[robot]


def train_on_robot(robot: str | RobotRecipe, seeds: Sequence[int] = (0,), **changes: Any) -> dict[int, Path]:
    """Record a robot's demonstrations and train its policy, once for each seed, in parallel.

    Args:
        robot: Name in `ROBOT_RECIPES`, or a recipe.
        seeds: Of the trainings.
        changes: Fields of `Stage`, as `n_samples=500`.

    Returns:
        Seed -> the policy's folder.
    """
    recipe = robot if isinstance(robot, RobotRecipe) else robot_recipe(robot)
    models = train_parallel({str(seed): recipe.stage(seed, **changes) for seed in seeds})
    return {int(seed): folder for seed, folder in models.items()}


def evaluate_on_robot(
    robot: str | RobotRecipe,
    models: Mapping[int, str | Path],
    n_episodes: int = 60,
    n_workers: int = 2,
    first_seed: int = FIRST_HELD_OUT_SEED,
) -> pd.DataFrame:
    """Evaluate a robot's trained policies and their controls in the same new scenes.

    Args:
        robot: As of `train_on_robot`.
        models: Seed -> the policy's folder.
        n_episodes: Of each policy.
        n_workers: Processes.
        first_seed: Of the scenes.

    Returns:
        Episodes as `evaluate` gives them, with columns `robot`, `control` (a key of `CONTROLS`) and `training` (the seed).
    """
    recipe = robot if isinstance(robot, RobotRecipe) else robot_recipe(robot)
    evaluations, common = {}, {"n_episodes": n_episodes, "first_seed": first_seed}
    for control, changes in CONTROLS.items():
        for seed, model in list(models.items())[: 1 if "policy" in changes else None]:
            fields = {"policy": str(model), "suite": recipe.suite, "tasks": recipe.tasks, "n_action_steps": recipe.n_action_steps}
            evaluations[f"{control}|{seed}"] = Evaluation(**{**common, **fields, **changes})
    episodes = evaluate(evaluations, n_workers)
    episodes[["control", "training"]] = episodes["name"].str.split("|", expand=True).to_numpy()
    return episodes.assign(robot=load_suite(recipe.suite).name)


def robots_table(episodes: pd.DataFrame, by: Sequence[str] = ("robot", "control")) -> pd.DataFrame:
    """Success of each robot's policy and of its controls, with 95 % intervals over trainings and episodes."""
    tables = [success_table(group, by) for _, group in episodes.groupby(list(by), sort=False)]
    return pd.concat([table.assign(trainings=table.get("trainings", 1)) for table in tables], ignore_index=True)


def gains_over_controls(episodes: pd.DataFrame) -> dict[str, dict[str, Difference]]:
    """Robot -> control -> success of its trained policies minus the control's in the same scenes, adjusted together (Holm).

    A control that removes an input is the same trainings acting in another way; random actions are compared with each of them.
    """
    gains = {}
    for robot, rows in episodes.groupby("robot", sort=False):
        outcomes = {
            str(control): outcome_table(group, ["training"]).to_numpy() for control, group in rows.groupby("control", sort=False)
        }
        trained, _ = outcomes.pop("trained"), outcomes.pop("expert", None)
        controls = {control: np.broadcast_to(outcome, trained.shape) for control, outcome in outcomes.items()}
        gains[str(robot)] = holm({c: paired_difference(trained, outcome, same_trainings=True) for c, outcome in controls.items()})
    return gains
