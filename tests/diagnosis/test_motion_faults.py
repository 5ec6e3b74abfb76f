"""Motion against commands: of every public card's robot, what is wrong is named, and nothing where nothing is."""

import dataclasses

import numpy as np
import pytest
from public_datasets import PUBLIC, stand_in

from rvlm.data.actions import ActionSpec
from rvlm.data.groups import LAYOUTS
from rvlm.data.rotations import from_rotation, to_rotation
from rvlm.diagnosis.motion import invalid_rotations, motion_of, paired_groups, raw_to_units
from rvlm.diagnosis.motion_faults import OTHER_LAYOUT, explain_motion, explain_predictions
from rvlm.diagnosis.results import FIXES


def roll_out(env, seeds, noise=0.0):
    """Actions (n, a) of the expert and states (n + 1, s) around them, measured with noise."""
    episodes, rng = [], np.random.default_rng(0)
    for seed in seeds:
        states, actions, is_over = [env.reset(seed=seed)[0]["state"]], [], False
        while not is_over:
            actions.append(env.expert_action())
            observation, _, is_terminated, is_truncated, _ = env.step(actions[-1])
            states.append(observation["state"])
            is_over = is_terminated or is_truncated
        spread = np.std(states, axis=0)
        episodes.append((np.array(actions), np.array(states) + noise * spread * rng.normal(size=np.shape(states))))
    return episodes


@pytest.fixture(scope="module", params=PUBLIC)
def robot(request):
    """Spec and eight episodes of a public card's robot."""
    env = stand_in(request.param, image_size=2)
    return env.action_spec, roll_out(env, range(8))


def change(episodes, action=lambda a: a, state=lambda s: s):
    return [(action(np.array(a, float)), state(np.array(s, float))) for a, s in episodes]


def named(spec, episodes):
    found = explain_motion(spec, episodes)
    assert found.fault is None or found.fault in FIXES
    return found.fault


def swap(values, i, j):
    values[:, [i, j]] = values[:, [j, i]]
    return values


def negate(values, i):
    values[:, i] *= -1
    return values


def test_a_robot_that_obeys_its_card_has_no_fault(robot):
    assert named(*robot) is None
    assert len(motion_of(*robot).names) >= min(6, robot[0].n_dims)


def test_swapped_dimensions_are_named(robot):
    spec, episodes = robot
    pairs = [(0, 1), (0, spec.n_dims - 1), (spec.n_dims - 2, spec.n_dims - 1)]
    for i, j in pairs:
        assert named(spec, change(episodes, lambda a, i=i, j=j: swap(a, i, j))) == "dimensions swapped", spec.names[i]
    assert named(spec, change(episodes, state=lambda s: swap(s, 0, 1))) == "dimensions swapped"


def test_a_wrong_sign_is_named(robot):
    spec, episodes = robot
    for i in {0, min(4, spec.n_dims - 1)} - set(spec.gripper_indices):
        assert named(spec, change(episodes, lambda a, i=i: negate(a, i))) == "sign of a dimension", spec.names[i]
    assert named(spec, change(episodes, state=lambda s: negate(s, 1))) == "sign of a dimension"
    for at, group in spec.action_groups("gripper"):
        turned = change(episodes, lambda a, at=at, group=group: a * (np.arange(spec.n_dims) != at.start) + (
            group.open + group.close - a) * (np.arange(spec.n_dims) == at.start))  # fmt: skip
        assert named(spec, turned) == "gripper sign"


def test_rotations_in_another_layout_are_named(robot):
    spec, episodes = robot
    for side, placed in (("action", spec.placed_action), ("state", spec.placed_state)):
        for at, group in placed:
            if (other := OTHER_LAYOUT.get(group.rotation)) is None:
                continue
            rotations = slice(at.start + group.n_position, at.stop)
            scale = raw_to_units(group)[group.n_position :]

            def relayout(values, rotations=rotations, scale=scale, group=group, other=other):
                values[:, rotations] = from_rotation(to_rotation(values[:, rotations] * scale, group.rotation), other) / scale
                return values

            fault = "quaternion order" if "quat" in other else "rotation layout"
            assert named(spec, change(episodes, **{side: relayout})) == fault, (side, group.rotation)


def test_other_units_and_steps_are_named(robot):
    spec, episodes = robot
    if spec.is_binary.any() or not spec.gripper_indices:  # a continuous gripper would be scaled too
        at = spec.action_groups("pose_delta", "joint_delta", "pose", "joint")[0][0]
        assert named(spec, change(episodes, lambda a: np.concatenate([a[:, at] / 57.3, a[:, at.stop :]], 1))) == "units"
    late = change(episodes, lambda a: np.concatenate([a[:1], a[:-1]]))
    assert named(spec, late) == "actions shifted by a step"


def test_displacements_and_targets_are_told_apart(robot):
    spec, episodes = robot
    if spec.action_groups("pose", "joint"):
        moved = change(episodes, lambda a: np.concatenate([np.diff(a, axis=0), np.zeros_like(a[:1])]))
        assert named(spec, moved) in ("delta read as absolute", "dimensions swapped", "gripper sign")
    else:
        n = spec.action[0].n_position
        twice = change(episodes, lambda a: np.concatenate([np.diff(a[:, :n], axis=0, prepend=a[:1, :n] * 0), a[:, n:]], 1))
        assert named(spec, twice) == "delta taken twice"
        sums = change(episodes, lambda a: np.concatenate([np.cumsum(a[:, :n], axis=0), a[:, n:]], 1))
        assert named(spec, sums) == "absolute read as delta"


@pytest.mark.parametrize("name", PUBLIC)
def test_noise_and_lag_are_no_fault(name):
    """Sensors with noise of a tenth of the spread, and a controller that goes a third of the way in a step."""
    env = stand_in(name, lag=0.65, image_size=2)
    noise = 0.0 if env.action_spec.action_groups("pose_delta") else 0.1  # as noise of a position is large beside a step
    for seed in range(2):
        assert named(env.action_spec, roll_out(env, range(8 * seed, 8 * seed + 8), noise)) is None


def test_what_motion_cannot_show():
    """An error in both columns alike, and what the state does not hold."""
    env = stand_in("so101", image_size=2)
    spec, episodes = env.action_spec, roll_out(env, range(8))
    assert named(spec, change(episodes, lambda a: swap(a, 0, 1), lambda s: swap(s, 0, 1))) is None
    assert named(spec, change(episodes, lambda a: negate(a, 1), lambda s: negate(s, 1))) is None
    assert named(spec, change(episodes, lambda a: 0.55 * a, lambda s: 0.55 * s)) is None, "per cent for degrees"
    bare = dataclasses.replace(spec, state=(dataclasses.replace(spec.state[0], kind="other"),))
    assert explain_motion(bare, change(episodes, state=lambda s: s[:, :5])) is None and not paired_groups(bare)


def test_numbers_that_are_no_rotations_are_named():
    env = stand_in("fractal", image_size=2)
    spec, episodes = env.action_spec, roll_out(env, range(2))
    actions, states = (np.concatenate([e[k] for e in episodes]) for k in (0, 1))
    assert invalid_rotations(spec, actions, states) is None
    wrong = np.array(states)
    wrong[:, 3:7] = [0.1, 0.2, 0.3, 0.4]
    assert "100% of the state's quat_xyzw (qx, qy, qz, qw) are no rotations" in invalid_rotations(spec, actions, wrong)


def test_predictions_are_compared_by_dimension(robot):
    spec, episodes = robot
    recorded = np.concatenate([a for a, _ in episodes]).astype(float)
    predicted = recorded + 0.1 * recorded.std(0) * np.random.default_rng(0).normal(size=recorded.shape)
    assert explain_predictions(spec, predicted, recorded) is None
    assert explain_predictions(spec, swap(predicted.copy(), 0, 1), recorded).fault == "dimensions swapped"
    assert explain_predictions(spec, negate(predicted.copy(), 1), recorded).fault == "sign of a dimension"
    assert explain_predictions(spec, predicted / 50, recorded).fault == "units"


def test_every_layout_of_which_another_has_as_many_numbers_is_tried():
    assert all(LAYOUTS[a] == LAYOUTS[b] for a, b in OTHER_LAYOUT.items())
    assert ActionSpec.from_card("bridge").action[0].rotation in OTHER_LAYOUT


def test_a_state_that_does_not_move_is_named(robot):
    """A dead encoder, and a recording of zeros."""
    spec, episodes = robot
    name = motion_of(spec, episodes).names[0]
    i = spec.state_names.index(name.removeprefix("d")) if name.removeprefix("d") in spec.state_names else 0
    dead = explain_motion(spec, change(episodes, state=lambda s: np.where(np.arange(s.shape[1]) == i, s[0, i], s)))
    assert dead.fault == "state does not move" and dead.measured.endswith(f"though their commands change: {name}")
    nothing = explain_motion(spec, change(episodes, lambda a: 0 * a, lambda s: 0 * s + s[0]))
    assert nothing.fault == "state does not move" and "and their commands too" in nothing.measured


def test_a_zero_is_compared_with_the_motion_of_the_robot():
    """Twelve degrees, in a card of hundreds and a recording of eighty; a robot that follows late has its own zero."""
    env = stand_in("so101", image_size=2)
    spec, episodes = env.action_spec, roll_out(env, range(8))
    assert named(spec, change(episodes, lambda a: a + 12 * (np.arange(6) == 2))) == "zero of a dimension"
    assert named(spec, roll_out(stand_in("so101", image_size=2, lag=0.85), range(8))) is None
