"""A policy for each kind of robot: recorded, trained, and judged beside its controls."""

import dataclasses

import pandas as pd
import pytest

from rvlm.envs.suites import load_suite
from rvlm.experiments.robots import (
    CONTROLS,
    ROBOT_RECIPES,
    RobotRecipe,
    beats_controls,
    evaluate_on_robot,
    robots_table,
    train_on_robot,
)


@pytest.mark.parametrize(
    ("robot", "tasks"),
    [
        ("so101", ("turn_on_light", "push_left")),
        ("two_arms", ("lift_left", "lift_both")),
        ("planar", ("push_to_red", "push_to_blue")),
    ],
)
def test_a_robot_is_recorded_trained_and_judged_beside_its_controls(tmp_path, monkeypatch, robot, tasks):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))
    suite = load_suite(f"tabletop/{robot}")
    short = dataclasses.replace(suite, max_steps=4, demonstration_steps=suite.demonstration_steps or suite.limit(tasks[0]))
    recipe = RobotRecipe(short, tasks, n_demonstrations=4, n_samples=8)
    models = train_on_robot(recipe, (0,), batch_size=4)
    episodes = evaluate_on_robot(recipe, models, n_episodes=2, n_workers=1)
    table = robots_table(episodes)
    assert table["control"].tolist() == list(CONTROLS) and table["n"].tolist() == [2] * len(CONTROLS)
    assert set(table["robot"]) == {f"tabletop/{robot}"}
    ablations = dict(zip(episodes["control"], episodes["ablation"], strict=True))
    assert ablations == {name: changes.get("ablation", "none") for name, changes in CONTROLS.items()}
    assert {tuple(group["seed"]) for _, group in episodes.groupby("control")} == {(900_000, 900_001)}, "the same scenes"


def test_a_policy_beats_its_controls_if_its_interval_lies_above_all_of_theirs():
    rows = [
        ("a", "trained", 0.6, 0.8),
        ("a", "random actions", 0.0, 0.1),
        ("a", "black images", 0.1, 0.59),
        ("a", "expert", 0.9, 1.0),
    ]
    rows += [("b", "trained", 0.5, 0.8), ("b", "random actions", 0.0, 0.1), ("b", "black images", 0.1, 0.51)]
    assert beats_controls(pd.DataFrame(rows, columns=["robot", "control", "low", "high"])) == {"a": True, "b": False}


def test_unknown_robots_are_named_beside_those_that_exist():
    with pytest.raises(KeyError, match=rf"no recipe of robot 'spot'; there are {', '.join(ROBOT_RECIPES)}"):
        train_on_robot("spot")
