"""Representations for training: half spheres of quaternions, chunks relative to the state."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from rvlm.data.actions import ActionSpec, Group
from rvlm.data.errors import SpecMismatch
from rvlm.data.normalization import NormStats, mean_quaternions, on_half_sphere
from rvlm.data.representations import absolute_actions, relative_actions
from rvlm.data.rotations import LAYOUTS, average_rotations, from_rotation, in_turn, nearest_encoding, to_rotation
from rvlm.data.windows import EpisodeDataset, EpisodeWriter, Windows
from rvlm.policy.embodiments import Embodiment, EmbodimentConditioning, slots_of

ROTATIONS = [name for name, n in LAYOUTS.items() if n]


def posed(layout, name="r"):
    n = LAYOUTS[layout]
    names, units = ("x", "y", "z", *(f"{name}{i}" for i in range(n))), ("m",) * 3 + ("1",) * n
    return names, units


def robot(layout="rot6d"):
    """An arm with targets of pose and joints, and a gripper; its state holds both."""
    names, units = posed(layout)
    bound = (10.0,) * len(names)
    pose = Group("pose", names, units, low=tuple(-b for b in bound), high=bound, frame="base", rotation=layout)
    joints = Group("joint", ("a", "b"), ("rad", "rad"), low=(-9.0, -9.0), high=(9.0, 9.0))
    hand = Group("gripper", ("hand",), ("1",), open=1.0, close=0.0, is_binary=True)
    state = (Group("joint", ("a", "b"), ("rad", "rad")), Group("pose", names, units, frame="base", rotation=layout))
    return ActionSpec("arm", "arm", 10.0, ("top",), (pose, joints, hand), state)


def values(spec, layout, n, seed):
    rng = np.random.default_rng(seed)
    rotation = [from_rotation(Rotation.random(n, rng=rng), layout) for _ in range(2)]
    action = np.concatenate([rng.normal(size=(n, 3)), rotation[0], rng.normal(size=(n, 2)), rng.integers(0, 2, (n, 1))], 1)
    state = np.concatenate([rng.normal(size=(n, 2)), rng.normal(size=(n, 3)), rotation[1]], 1)
    return action, state


@pytest.mark.parametrize("layout", ROTATIONS)
def test_relative_and_absolute_are_inverse(layout):
    spec = robot(layout)
    action, state = values(spec, layout, 50, 0)
    n = LAYOUTS[layout]
    action[:, 3 : 3 + n] = nearest_encoding(action[:, 3 : 3 + n], state[:, 5:], spec.action[0])
    relative = relative_actions(spec, action, state)
    assert np.allclose(relative[:, :3], action[:, :3] - state[:, 2:5]), "by name, not by place"
    assert np.allclose(relative[:, 3 + n : 5 + n], action[:, 3 + n : 5 + n] - state[:, :2])
    assert (relative[:, -1] == action[:, -1]).all(), "grippers stay as they are"
    turned = to_rotation(relative[:, 3 : 3 + n], layout) * to_rotation(state[:, 5:], layout)
    assert (turned * to_rotation(action[:, 3 : 3 + n], layout).inv()).magnitude().max() < 1e-6
    assert np.allclose(absolute_actions(spec, relative, state), action, atol=1e-6)


def test_displacements_and_states_that_lack_a_target_are_refused():
    with pytest.raises(SpecMismatch, match=r"targets of a pose or joints.*\['pose_delta', 'gripper'\]"):
        relative_actions(ActionSpec.from_card("tabletop_franka7"), np.zeros(7), np.zeros(7))
    spec = robot().replace_group("state", 0, names=("a", "c"))
    with pytest.raises(SpecMismatch, match=r"the state to hold \['a', 'b'\]"):
        relative_actions(spec, np.zeros(12), np.zeros(11))
    with pytest.raises(SpecMismatch, match="in the action's frame"):
        relative_actions(robot().replace_group("state", 1, frame="world"), np.zeros(12), np.zeros(11))


JOINTS = ("a", "b")


@pytest.mark.parametrize(
    "action, state",
    [
        ({"scale": (np.pi / 180,) * 2}, {}),  # raw degrees beside radians
        ({"units": ("deg", "deg")}, {}),
        ({}, {"kind": "other", "units": ("V", "A")}),
        ({}, {"kind": "joint_delta"}),
    ],
)
def test_a_state_in_other_units_or_of_another_kind_is_not_subtracted(action, state):
    made = {"kind": "joint", "names": JOINTS, "units": ("rad", "rad")}
    groups = Group(**{**made, **action}, low=(-9.0,) * 2, high=(9.0,) * 2), Group(**{**made, **state})
    spec = ActionSpec("arm", "arm", 10.0, ("top",), groups[:1], groups[1:])
    with pytest.raises(SpecMismatch, match="in the action's frame, rotation layout and raw units"):
        relative_actions(spec, np.ones(2), np.ones(2))


def test_degrees_and_absent_joints():
    names, units = ("x", "y", "z", "roll", "pitch", "yaw"), ("m",) * 3 + ("deg",) * 3
    bounds = {"low": (-180.0,) * 6, "high": (180.0,) * 6}
    held = Group("pose", names, units, frame="base", rotation="euler_xyz")
    pose = Group("pose", names, units, **bounds, frame="base", rotation="euler_xyz")
    spec = ActionSpec("arm", "arm", 10.0, ("top",), (pose,), (held,))
    action, state = np.array([0, 0, 0, 90.0, 10, 45]), np.array([0, 0, 0, 90.0, 10, 40])
    relative = relative_actions(spec, action, state)
    assert np.allclose(relative[3:], [0, 0, 5], atol=1e-9), "about fixed axes, in degrees"
    assert np.allclose(absolute_actions(spec, relative, state), action)
    lacking = Group("joint", JOINTS, ("rad", "rad"), low=(-9.0,) * 2, high=(9.0,) * 2, absent=("b",))
    spec = ActionSpec("arm", "arm", 10.0, ("top",), (lacking,), (Group("joint", JOINTS, ("rad", "rad")),))
    there = absolute_actions(spec, relative_actions(spec, np.array([1.5, 0]), np.array([1, 0.7])), np.array([1, 0.7]))
    assert there.tolist() == [1.5, 0]


@pytest.mark.parametrize(("unit", "full"), [("deg", 360.0), ("rad", 2 * np.pi)])
def test_absolute_angles_lie_in_the_range_of_the_card(unit, full):
    """From 0 to a full turn, as some robots tell them, and never elsewhere than where they were recorded."""
    names, units = ("x", "roll", "pitch", "yaw"), ("m",) + (unit,) * 3
    held = Group("pose", names, units, frame="base", rotation="euler_xyz")
    pose = replace(held, low=(-1.0, 0, -full, 0), high=(1.0, full, full, full))
    spec = ActionSpec("arm", "arm", 10.0, ("top",), (pose,), (held,))
    action = np.array([[0.1, 0.03, 0.05, 0.57], [0.1, 0.9, -0.05, 0.99]]) * [1, *(full,) * 3]
    state = np.array([[0.0, 0.02, 0.05, 0.55], [0.1, 0.99, -0.05, 0.01]]) * [1, *(full,) * 3]
    back = absolute_actions(spec, relative_actions(spec, action, state), state)
    assert np.allclose(back, action)
    spec.check(back)
    assert (in_turn(action[:, 1:], spec.action[0]) == action[:, 1:]).all(), "what is within stays, bit by bit"


@pytest.mark.parametrize(("unit", "half"), [("deg", 180.0), ("rad", np.pi)])
def test_rotation_vectors_of_a_tool_that_points_down_do_not_jump(unit, half):
    """Recorded beyond half a turn, within 115 to 240 degrees: so is a mean, an absolute target, and the nearest within range."""
    held = Group("pose", ("x", "rx", "ry", "rz"), ("m",) + (unit,) * 3, frame="base", rotation="axis_angle")
    pose = replace(held, low=(-1.0, 0.64 * half, -half, -half), high=(1.0, 1.33 * half, half, half))
    spec = ActionSpec("arm", "arm", 10.0, ("top",), (pose,), (held,))
    action = np.array([[0.1, 1.006, 0.01, 0], [0.2, 0.99, 0, 0.02], [0.0, 1.3, 0, 0]]) * [1, half, half, half]
    state = np.array([[0.0, 1.012, 0, 0], [0.1, 1.01, -0.01, 0.03], [0.0, 1.1, 0, 0]]) * [1, half, half, half]
    assert np.allclose(absolute_actions(spec, relative_actions(spec, action, state), state), action)
    candidates = np.stack([state, action], 1)
    mean = average_rotations(spec.placed_action, candidates.mean(1), candidates, np.ones(2))
    assert np.allclose(mean, candidates.mean(1), atol=0.01 * half)
    canonical = from_rotation(to_rotation(action[:, 1:] * pose.radians, "axis_angle"), "axis_angle") / pose.radians
    assert canonical[0, 0] < 0 and np.allclose(in_turn(canonical, pose), action[:, 1:])
    assert (nearest_encoding(np.zeros(3), np.ones(3), held) == 0).all(), "no turn has no axis"


@pytest.mark.parametrize("layout", ["quat_xyzw", "quat_wxyz"])
def test_both_signs_of_a_quaternion_are_trained_alike(layout, tmp_path):
    spec = robot(layout)
    action, state = values(spec, layout, 40, 1)
    flipped, turned = action.copy(), state.copy()
    flipped[::3, 3:7] *= -1
    turned[::2, 5:] *= -1
    for signs, others, placed in ((flipped, action, spec.placed_action), (turned, state, spec.placed_state)):
        reference = mean_quaternions(signs, placed)
        aligned = on_half_sphere(others, placed, reference)
        assert np.allclose(mean_quaternions(others, placed), reference) and np.allclose(np.abs(aligned), np.abs(others))
        for form in (signs, torch.from_numpy(signs)):
            assert np.allclose(on_half_sphere(form, placed, reference), aligned)
    seen = []
    for name, a, s in (("one", action, state), ("other", flipped, turned)):
        writer = EpisodeWriter(tmp_path / name, spec)
        images = {"observation.images.top": np.zeros((40, 16, 16, 3), np.uint8)}
        writer.add_episode({**images, "action": a.astype(np.float32), "observation.state": s.astype(np.float32)}, "lift it")
        seen.append(Windows(EpisodeDataset(writer.finalize()), chunk_size=2).batch(range(40)))
    for key in ("action", "state"):
        assert np.allclose(seen[0][key], seen[1][key], atol=1e-5), key


def pointing_down(layout, folder):
    """A tool that points down, tilted by at most 6 degrees: quaternions of w about 0, recorded without a jump."""
    spec = robot(layout)
    action, state = values(spec, layout, 60, 3)
    tilts = np.radians(2 * np.random.default_rng(4).normal(size=(2, 60, 3))).clip(-0.1, 0.1)
    for column, at, tilt in ((action, slice(3, 7), tilts[0]), (state, slice(5, 9), tilts[1])):
        q = from_rotation(Rotation.from_euler("x", np.pi) * Rotation.from_rotvec(tilt), layout)
        column[:, at] = q * np.sign(q[:, [int(layout == "quat_wxyz")]])
    writer = EpisodeWriter(folder, spec)
    images = {"observation.images.top": np.zeros((60, 16, 16, 3), np.uint8)}
    columns = {"action": action.astype(np.float32), "observation.state": state.astype(np.float32)}
    writer.add_episode({**images, **columns}, "lift it")
    return EpisodeDataset(writer.finalize()), action, state


@pytest.mark.parametrize("layout", ["quat_xyzw", "quat_wxyz"])
def test_quaternions_of_a_tool_that_points_down_do_not_jump(layout, tmp_path):
    data, action, state = pointing_down(layout, tmp_path / "d")
    windows = Windows(data, chunk_size=3)
    batch, stats = windows.batch(range(60)), windows.stats
    for key, column, at in (("action", batch["action"][:, 0, 0], slice(3, 7)), ("state", batch["state"][:, 0], slice(5, 9))):
        own = stats["action" if key == "action" else "observation.state"]
        q = own.unnormalize(column.astype(np.float64))[:, at]
        assert (q @ q.T).min() > 0.9, f"one half sphere of the {key}"
        assert np.allclose(q, (action if key == "action" else state)[:, at], atol=1e-5), "as recorded"
        assert (NormStats.from_dict(own.to_dict()).reference == own.reference).all(), "it is stored"


@pytest.mark.parametrize("is_relative", [False, True])
@pytest.mark.parametrize("layout", ["quat_xyzw", "quat_wxyz"])
def test_a_policys_quaternions_lie_within_the_range_of_the_card(layout, is_relative, tmp_path):
    """Recorded with w from 0 to 1, where the data's mean rotation is a tool that points down: trained are those of both signs."""
    data, action, state = pointing_down(layout, tmp_path / "d")
    w = 3 + (layout == "quat_xyzw") * 3
    action[:, 3:7] *= np.where(action[:, w] < 0, -1, 1)[:, None]
    low = np.where(np.arange(7) == w, 0, -10.0)
    spec = data.require_spec().replace_group("action", 0, low=tuple(low.tolist()))
    spec.check(action)
    stats = data.stats(relative_chunk=1 if is_relative else None)
    robot = Embodiment(spec, stats)
    slots = tuple((kind, name, is_binary) for kind, name, is_binary in slots_of([spec])[0])
    conditioning = EmbodimentConditioning(None, spec.state_names, ("arm",), slots, is_relative)
    chunks = conditioning.normalized_actions(robot, action[:, None], state)
    acted = conditioning.raw_actions(robot, chunks, state)[:, 0]
    spec.check(acted)
    assert np.allclose(acted[:, 3:7], action[:, 3:7], atol=1e-6)


def test_absolute_quaternions_lie_on_the_half_sphere_of_the_state(tmp_path):
    data, action, state = pointing_down("quat_xyzw", tmp_path / "d")
    spec = data.require_spec()
    relative = relative_actions(spec, action, state)
    for sign in (1, -1):
        held = state * np.where(np.arange(9) > 4, sign, 1)
        assert np.allclose(absolute_actions(spec, relative, held)[:, 3:7], sign * action[:, 3:7], atol=1e-6)


def test_statistics_of_quaternions_without_a_reference_are_refused(tmp_path):
    data, action, _ = pointing_down("quat_xyzw", tmp_path / "d")
    spec, stats = data.require_spec(), data.stats()
    older = {key: value for key, value in stats["action"].to_dict().items() if key != "reference"}
    message = r"the reference of the quaternions \('r0', 'r1', 'r2', 'r3'\), got some of before.*again by EpisodeDataset.stats"
    for use in (lambda s: spec.normalize(action, s), lambda s: Embodiment(spec, {**stats, "action": s})):
        with pytest.raises(SpecMismatch, match=message):
            use(NormStats.from_dict(older))


def test_windows_are_relative_to_the_state_at_their_own_observation(tmp_path):
    spec = robot()
    action, state = values(spec, "rot6d", 30, 2)
    writer = EpisodeWriter(tmp_path / "d", spec)
    images = {"observation.images.top": np.zeros((15, 16, 16, 3), np.uint8)}
    for part in (slice(0, 15), slice(15, 30)):
        columns = {"action": action[part].astype(np.float32), "observation.state": state[part].astype(np.float32)}
        writer.add_episode({**images, **columns}, "lift it")
    data = EpisodeDataset(writer.finalize())
    stats = data.stats(relative_chunk=3)
    assert stats["action"].count == 2 * (15 + 14 + 13), "actions past an episode's end do not count"
    batch = Windows(data, 2, 3, stats=stats, is_relative=True).batch(range(30))
    row = 20
    for t, at in ((0, row - 1), (1, row)):
        expected = relative_actions(spec, action[at : at + 3], state[at])
        found = spec.unnormalize(batch["action"][row, t].astype(np.float64), stats["action"])
        assert np.allclose(found, expected, atol=1e-4)
