"""The stand-in of any card's robot: its success is the policy's, its numbers have the card's units."""

import dataclasses

import numpy as np
import pytest

from rvlm.data.actions import ActionSpec
from rvlm.data.groups import Group
from rvlm.data.rotations import LAYOUTS
from rvlm.data.windows import EpisodeDataset
from rvlm.diagnosis.checklist import diagnose, first_fault
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.envs.stand_in import TASKS, StandIn, record_stand_in, stand_in_suite
from rvlm.envs.stand_in_expert import StandInExpert
from rvlm.envs.suite_checks import check_suite
from rvlm.evaluation.closed_loop import Evaluation, evaluate
from rvlm.evaluation.rollouts import RandomPolicy, rollout
from rvlm.files import CARDS

SHIPPED = sorted(path.stem for path in CARDS.glob("*.md"))


def successes(policy, spec, n=6):
    env, tasks = StandIn(spec), list(TASKS)
    rows = [rollout(policy, [env], [(900_000 + i, tasks[i % 2])])[0] for i in range(n)]
    assert {row["n_steps"] for row in rows} == {27}
    assert all(row["failure"] == ("" if row["is_success"] else "missed a point") for row in rows)
    return sum(row["is_success"] for row in rows)


@pytest.mark.parametrize("card", SHIPPED)
def test_who_goes_to_the_points_succeeds_and_who_acts_at_random_fails(card):
    spec = ActionSpec.from_card(card)
    assert successes(StandInExpert(spec), spec) == 6 and successes(RandomPolicy(spec), spec) == 0


def test_success_is_never_reported_where_the_state_does_not_show_what_moves():
    spec = ActionSpec.from_card("so101")
    bare = dataclasses.replace(spec, state=(dataclasses.replace(spec.state[0], kind="other"), *spec.state[1:]))
    assert successes(StandInExpert(bare), bare, 2) == 0


def test_the_suite_of_two_tasks_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))
    suite = stand_in_suite(ActionSpec.from_card("pusht"))
    rates = evaluate({name: Evaluation(name, 4, suite) for name in ("expert", "random")}, 1, False)
    assert rates.groupby("name")["is_success"].mean().to_dict() == {"expert": 1.0, "random": 0.0}


@pytest.mark.parametrize("layout", ["axis_angle", "euler_xyz", "quat_xyzw", "quat_wxyz", "rot6d"])
@pytest.mark.parametrize("is_told", [True, False])
def test_a_suite_of_targets_in_any_layout_is_tried_with_a_rotation(layout, is_told):
    names = ("x", "y", "z", *(f"r{i}" for i in range(LAYOUTS[layout])))
    units = ("m",) * 3 + ("rad" if LAYOUTS[layout] == 3 else "1",) * LAYOUTS[layout]
    shown = Group("pose", names, units, frame="base", rotation=layout)
    hand = dataclasses.replace(shown, low=(-3.2,) * len(names), high=(3.2,) * len(names))
    state = shown if is_told else dataclasses.replace(shown, names=tuple(f"other_{name}" for name in names))
    suite = stand_in_suite(ActionSpec("target", "arm", 10.0, ("front",), (hand,), (state,)))
    check_suite(suite, suite.make())


def euler_spec(kind, unit):
    """A hand whose rotations are Euler angles in this unit."""
    units, largest = ("m",) * 3 + (unit,) * 3, {"rad": np.pi, "deg": 180.0}[unit] * (1 if kind == "pose" else 0.1)
    limits = {"low": (-1.0,) * 3 + (-largest,) * 3, "high": (1.0,) * 3 + (largest,) * 3}
    names = ("x", "y", "z", "roll", "pitch", "yaw")
    hand = Group(kind, tuple(f"{name}_goal" for name in names), units, frame="base", rotation="euler_xyz", **limits)
    state = Group("pose", names, units, frame="base", rotation="euler_xyz")
    return ActionSpec("euler", "arm", 10.0, ("front",), (hand,), (state,))


@pytest.mark.parametrize("kind", ["pose", "pose_delta"])
def test_euler_angles_in_degrees_are_read_and_shown_in_degrees(kind, tmp_path):
    envs = [StandIn(euler_spec(kind, unit)) for unit in ("rad", "deg")]
    to_degrees = np.array([1, 1, 1, *(3 * [180 / np.pi])])
    radians, degrees = (env.reset(seed=0)[0]["state"] for env in envs)
    for _ in range(10):
        np.testing.assert_allclose(radians * to_degrees, degrees, atol=1e-3)
        action = envs[0].expert_action()
        np.testing.assert_allclose(action * to_degrees, envs[1].expert_action(), atol=1e-3)
        radians, degrees = (env.step(a)[0]["state"] for env, a in zip(envs, (action, action * to_degrees), strict=True))
    data = EpisodeDataset(record_stand_in(envs[1], tmp_path / "degrees", range(4)))
    results = diagnose(DiagnosisInputs(StandInExpert(data.spec), data, envs[1], n_episodes=2, n_frames=10))
    assert first_fault(results) is None, results[-1]
