"""A policy for each kind of robot: recorded, trained, and judged beside its controls."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from rvlm.envs.suites import load_suite
from rvlm.experiments.robots import (
    CONTROLS,
    ROBOT_RECIPES,
    RobotRecipe,
    evaluate_on_robot,
    gains_over_controls,
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
    episodes = evaluate_on_robot(recipe, models, n_episodes=2, n_workers=1, first_seed=910_000)
    table = robots_table(episodes)
    assert table["control"].tolist() == list(CONTROLS) and table["n"].tolist() == [2] * len(CONTROLS)
    assert set(table["robot"]) == {f"tabletop/{robot}"}
    of_tasks = robots_table(episodes, ("robot", "task", "control"))
    assert set(of_tasks["task"]) <= set(tasks) and of_tasks.groupby("control")["n"].sum().eq(2).all()
    ablations = dict(zip(episodes["control"], episodes["ablation"], strict=True))
    assert ablations == {name: changes.get("ablation", "none") for name, changes in CONTROLS.items()}
    assert set(gains_over_controls(episodes)[f"tabletop/{robot}"]) == set(CONTROLS) - {"trained", "expert"}
    assert {tuple(group["seed"]) for _, group in episodes.groupby("control")} == {(910_000, 910_001)}, "the same scenes"


def test_gains_over_controls_are_paired_by_scene_and_by_training():
    rng, rows = np.random.default_rng(0), []
    for training in "012":
        skill = {"0": 0.5, "1": 0.7, "2": 0.9}[training]  # trainings differ much, with and without the input alike
        for seed in range(40):
            chances = {"trained": skill, "black images": skill - 0.4, "random actions": 0.0, "expert": 1.0}
            for control, chance in list(chances.items())[: 4 if training == "0" else 2]:
                rows.append(("arm", control, training, seed, rng.random() < chance))
    gains = gains_over_controls(pd.DataFrame(rows, columns=["robot", "control", "training", "seed", "is_success"]))
    assert list(gains) == ["arm"] and list(gains["arm"]) == ["black images", "random actions"]
    for gain, expected in zip(gains["arm"].values(), (0.4, 0.7), strict=True):
        assert gain.low < expected < gain.high and gain.n_trainings == 3 and gain.p_value is not None
    assert gains["arm"]["black images"].low > 0, "the same trainings: what differs between them does not count"


def test_unknown_robots_are_named_beside_those_that_exist():
    with pytest.raises(KeyError, match=rf"no recipe of robot 'spot'; there are {', '.join(ROBOT_RECIPES)}"):
        train_on_robot("spot")
