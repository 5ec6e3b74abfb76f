"""A real robot as an environment: nothing is sent that should not be, and what is sent is what the action means."""

import dataclasses
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation
from toy_data import TEXTS
from toy_policies import ONE_STEP, build
from toy_robots import SO101, SO101_JOINTS, Operator, Robot, Time

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.data.groups import Group
from rvlm.data.rotations import from_rotation, to_rotation
from rvlm.envs import FIRST_HELD_OUT_SEED
from rvlm.envs.group_commands import GroupLimits
from rvlm.envs.hardware import HardwareEnv
from rvlm.envs.tabletop.env import Tabletop
from rvlm.evaluation.replay import record_rollout
from rvlm.evaluation.rollouts import rollout
from rvlm.policy.policy import Policy
from rvlm.policy.real_time_policy import RealTimePolicy

SPEC = ActionSpec.from_card("tabletop_franka7")
POSE = ("x", "y", "z", "roll", "pitch", "yaw")
KEYS = {"gripper_opening": "gripper"}
CAMERAS = {"static": (48, 48, 3), "wrist": (48, 48, 3)}
LOW, HIGH = np.array([-0.2, -0.3, 0.0]), np.array([0.2, 0.3, 0.4])
BOX = (GroupLimits(LOW, HIGH), GroupLimits())
STEP = np.array([0.04, 0.04, 0.04])  # one unit of the card [m]
STILL = SPEC.set_grippers(np.zeros(7), True)
JOINTS = tuple(name.removesuffix(".pos") for name in SO101_JOINTS)
DEG = ("deg",) * 5
ARM = ActionSpec(
    "desk", "so101", 30, ("up", "side"),
    (
        Group("joint", JOINTS, DEG, low=(-100.0,) * 5, high=(100.0,) * 5),
        Group("gripper", ("gripper",), ("%",), low=(0.0,), high=(100.0,), open=100.0, close=0.0),
    ),
    (Group("joint", JOINTS, DEG), Group("gripper", ("gripper",), ("%",))),
)  # fmt: skip
SLOW = (GroupLimits(max_change=5.0), GroupLimits())


def pose_arm(pose=(0, 0, 0.2, 0, 0, 0)):
    return Robot(
        (*POSE, "gripper"), CAMERAS, {**dict(zip(POSE, map(float, pose), strict=True)), "gripper": 0.08, "motor.temp": 31.0}
    )


def joint_arm():
    return Robot(SO101, {"up": (480, 640, 3), "side": (240, 320, 3)})


def an_env(robot=None, spec=SPEC, limits=BOX, operator=None, **changes):
    operator, fake = operator or Operator(), Time()
    named = {
        "instructions": {"lift": TEXTS[0]}, "max_steps": 50, "is_dry_run": False, "sleep": fake.sleep, "clock": fake.clock,
        "confirm": operator.confirm, "is_stopped": operator.is_stopped,
        "keys": KEYS if "gripper_opening" in spec.state_names else {},
    }  # fmt: skip
    return HardwareEnv(robot or pose_arm(), spec, limits=limits, **(named | changes))


def started(*args, **changes):
    env = an_env(*args, **changes)
    env.reset(seed=0)
    return env


def where(robot):
    return np.array([robot.values[name] for name in POSE])


def of(sent, names=POSE):
    return np.array([sent[name] for name in names])


# --- what is sent -----------------------------------------------------------------------------------------------------------


def test_a_dry_run_is_the_default_and_moves_nothing():
    arm, operator, fake = pose_arm(), Operator(), Time()
    args = arm, SPEC, {"lift": TEXTS[0]}, BOX, 3, operator.confirm, operator.is_stopped
    env = HardwareEnv(*args, keys=KEYS, sleep=fake.sleep, clock=fake.clock)
    env.reset()
    before = where(arm)
    for _ in range(3):
        *_, info = env.step(SPEC.set_grippers(np.full(7, 0.5), False))
        np.testing.assert_allclose(of(info["sent"]), before + np.repeat([0.02, 0.1], 3))
        assert info["sent"]["gripper"] == -1
    env.close()
    assert not arm.sent and np.array_equal(where(arm), before)


def test_an_so101_is_driven_by_its_own_names_and_units():
    arm = joint_arm()
    env = started(arm, ARM, SLOW)
    assert env.observation_space["images"]["side"].shape == (240, 320, 3)
    *_, info = env.step(np.array([4, -3, 2, 1, 0, 60]))
    assert arm.sent == [dict(zip(SO101, (4, -3, 2, 1, 0, 60), strict=True))] == [info["sent"]] and not info["was_limited"]
    observation, *_ = env.step(np.array([4, -3, 2, 1, 0, 60]))
    np.testing.assert_array_equal(observation["state"], np.float32([4, -3, 2, 1, 0, 60]), strict=True)


def test_an_absolute_target_is_approached_by_no_more_than_the_slew_limit():
    arm = joint_arm()
    env = started(arm, ARM, (GroupLimits(max_change=(5.0, 5.0, 5.0, 5.0, 2.5)), GroupLimits(max_change=10.0)))
    pans = []
    for _ in range(3):
        *_, info = env.step(np.array([12, -80, 0, 0, 80, 100]))
        pans.append([arm.values[name] for name in SO101])
    np.testing.assert_allclose(pans, [[5, -5, 0, 0, 2.5, 10], [10, -10, 0, 0, 5, 20], [12, -15, 0, 0, 7.5, 30]])
    assert info["was_limited"]


def test_two_arms_are_held_and_driven_apart():
    """Named as LeRobot's pairs of arms: left_ and right_ before every name."""
    sides = [
        [dataclasses.replace(g, names=tuple(f"{side}_{n}" for n in g.names)) for g in groups]
        for groups in (ARM.action, ARM.state) for side in ("left", "right")
    ]  # fmt: skip
    spec = dataclasses.replace(ARM, cameras=("left_up",), action=tuple(sides[0] + sides[1]), state=tuple(sides[2] + sides[3]))
    arms = Robot([f"{side}_{name}" for side in ("left", "right") for name in SO101], {"left_up": (8, 8, 3)})
    env = started(arms, spec, SLOW * 2)
    env.step(np.arange(12) / 4)
    np.testing.assert_allclose(list(arms.sent[0].values()), np.arange(12) / 4)
    assert list(arms.sent[0])[6] == "right_shoulder_pan.pos"


def test_a_base_without_gripper_is_driven_and_held_at_rest():
    spec = ActionSpec(
        "base", "kiwi", 30, ("front",),
        (Group("base_velocity", ("x.vel", "y.vel", "theta.vel"), ("m/s", "m/s", "deg/s"), low=(-1.0,) * 3, high=(1.0,) * 3),),
        (Group("base_velocity", ("x.vel", "y.vel", "theta.vel"), ("m/s", "m/s", "deg/s")),),
    )  # fmt: skip
    base = Robot(("x.vel", "y.vel", "theta.vel"), {"front": (8, 8, 3)})
    env = started(base, spec, (GroupLimits(),), Operator(stops_at=2))
    env.step(np.array([0.5, 0, -0.5]))
    env.step(np.array([0.5, 0, -0.5]))
    assert [list(sent.values()) for sent in base.sent] == [[0.5, 0, -0.5], [0, 0, 0]]


def test_joint_displacements_are_added_to_the_joints_that_were_observed():
    moves = Group("joint_delta", tuple(f"d_{n}" for n in JOINTS), DEG, (2.0,) * 5, (-1.0,) * 5, (1.0,) * 5)
    spec = dataclasses.replace(ARM, action=(moves, ARM.action[1]))
    arm = joint_arm()
    env = started(arm, spec, (GroupLimits((-7.0,) * 5, (7.0,) * 5), GroupLimits()))
    arm.values["elbow_flex.pos"] = 6.5
    env.reset()
    env.step(np.array([1, -0.5, 1, 0, 0, 50]))
    *_, info = env.step(np.array([1, -0.5, 0, 0, 0, 50]))
    np.testing.assert_allclose(of(arm.sent[1], SO101), [4, -2, 7, 0, 0, 50])
    assert not info["was_limited"] and arm.sent[0]["elbow_flex.pos"] == 7


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float64, (4, 7), elements=st.floats(-3, 3)),
    arrays(np.float64, 3, elements=st.floats(-0.2, 1.2)),
    st.sampled_from(["axis_angle", "euler_xyz"]),
)
def test_no_displacement_leaves_the_workspace_or_is_more_than_a_step(actions, start, rotation):
    """Also if the arm starts slightly outside."""
    arm = pose_arm((*np.clip(LOW + start * (HIGH - LOW), LOW - STEP, HIGH + STEP), 0.1, 0.2, 0.3))
    env = started(arm, SPEC.replace_group("action", 0, rotation=rotation))
    for action in actions:
        before, within = where(arm), np.clip(action, -1, 1)
        *_, info = env.step(action)
        after = of(arm.sent[-1])
        assert (after[:3] >= LOW).all() and (after[:3] <= HIGH).all()
        assert (np.abs(after[:3] - before[:3]) <= STEP + 1e-9).all()
        turned = Rotation.from_rotvec(after[3:]) * Rotation.from_rotvec(before[3:]).inv()
        assert (np.abs(from_rotation(turned, rotation)) <= 0.2 + 1e-6).all()
        outside = np.abs(within - action).max()
        assert info["was_clipped"] == (outside > 0) or outside < 1e-3
        assert info["was_limited"] == (np.abs(before[:3] + within[:3] * STEP - after[:3]).max() > 1e-12)


@pytest.mark.parametrize("layout", ["axis_angle", "euler_xyz", "quat_xyzw", "quat_wxyz", "rot6d"])
@pytest.mark.parametrize("frame", ["world", "ee"])
def test_the_difference_of_two_poses_leads_from_one_to_the_other(layout, frame):
    """About the axes of the world or of the hand, whatever the layout of the pose."""
    rng = np.random.default_rng(0)
    here, there = LOW + rng.uniform(0.2, 0.8, (2, 3)) * (HIGH - LOW)
    before, after = Rotation.from_rotvec(rng.normal(size=(2, 3)))
    shift, turn = there - here, after * before.inv()
    if frame == "ee":
        shift, turn = before.inv().apply(shift), before.inv() * after
    names = ("x", "y", "z", *(f"r{i}" for i in range(len(from_rotation(before, layout).reshape(-1)))))
    pose = Group("pose", names, ("m",) * 3 + ("1",) * (len(names) - 3), frame="world", rotation=layout)
    move = dataclasses.replace(SPEC.action[0], low=(-99.0,) * 6, high=(99.0,) * 6, frame=frame)
    spec = dataclasses.replace(SPEC, action=(move, SPEC.action[1]), state=(pose,))
    start = np.concatenate([here, from_rotation(before, layout).reshape(-1)])
    arm = Robot((*names, "gripper"), CAMERAS, dict(zip(names, map(float, start), strict=True)))
    started(arm, spec).step(np.concatenate([shift / 0.04, turn.as_rotvec() / 0.2, [1.0]]))
    np.testing.assert_allclose(of(arm.sent[0], names[:3]), there, atol=1e-9)
    reached = to_rotation(of(arm.sent[0], names[3:]), layout)[0]
    assert float(np.linalg.norm((after.inv() * reached).as_rotvec())) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_angles_are_sent_within_the_range_of_the_card_and_not_clipped_to_another_direction(scale):
    """A card of 0 to 360 degrees: -155 is 205, and what the limit of a turn makes of it stays there."""
    units = ("m",) * 3 + ("deg",) * 3
    bounds = {"low": (-1.0,) * 3 + (0.0,) * 3, "high": (1.0,) * 3 + (360 / scale,) * 3, "scale": (1.0,) * 3 + (scale,) * 3}
    group = Group("pose", POSE, units, **bounds, frame="world", rotation="euler_xyz")
    held = Group("pose", POSE, units, frame="world", rotation="euler_xyz")
    spec = dataclasses.replace(SPEC, action=(group, SPEC.action[1]), state=(held, SPEC.state[-1]))
    limits = (GroupLimits(LOW, HIGH, max_change=0.5, max_turn_rad=np.radians(10)), GroupLimits())
    env = started(pose_arm((0, 0, 0.2, 10, 20, 200)), spec, limits)
    for action, sent in ((-155, 205), (-100, 215), (205, 205)):
        *_, info = env.step(np.array([0, 0, 0.2, 10 / scale, 20 / scale, action / scale, -1.0]))
        np.testing.assert_allclose(of(info["sent"], POSE[3:]), [10, 20, sent], atol=1e-6)
        assert not info["was_clipped"]


def test_a_quaternion_of_the_other_sign_than_the_cards_is_no_other_rotation():
    """Recorded with w from 0 to 1: -q is sent as q, and no number of it is clipped."""
    names = ("x", "y", "z", "qx", "qy", "qz", "qw")
    held = Group("pose", names, ("m",) * 3 + ("1",) * 4, frame="base", rotation="quat_xyzw")
    group = dataclasses.replace(held, low=(-1.0,) * 6 + (0.0,), high=(1.0,) * 7)
    spec = dataclasses.replace(SPEC, action=(group,), state=(held,))
    for sign in (1, -1):
        q = np.array([-0.9, 0, 0, np.sqrt(0.19)])
        arm = Robot(names, CAMERAS, dict(zip(names, [0, 0, 0.2, *q.tolist()], strict=True)))
        *_, info = started(arm, spec, (GroupLimits(LOW, HIGH, max_change=0.5, max_turn_rad=1.0),)).step([0, 0, 0.2, *sign * q])
        np.testing.assert_allclose(of(info["sent"], names[3:]), q, atol=1e-6)
        assert not info["was_clipped"]


def test_an_absolute_pose_is_sent_as_it_is_and_turned_by_no_more_than_the_limit():
    arm = pose_arm()
    group = Group("pose", POSE, ("m",) * 3 + ("rad",) * 3, low=(-4.0,) * 6, high=(4.0,) * 6, frame="world", rotation="axis_angle")
    spec = dataclasses.replace(SPEC, action=(group, SPEC.action[1]))
    limits = (GroupLimits(LOW, HIGH, max_change=0.5, max_turn_rad=0.3), GroupLimits())
    env = started(arm, spec, limits)
    env.step(np.array([0.1, -0.2, 0.3, 0, 0.2, 0, -1.0]))
    np.testing.assert_allclose(list(arm.sent[0].values()), [0.1, -0.2, 0.3, 0, 0.2, 0, -1.0], atol=1e-12)
    *_, info = env.step(np.array([0.9, 0, 0.3, 0, 2.0, 0, -1]))
    np.testing.assert_allclose(where(arm)[[0, 4]], [HIGH[0], 0.5])
    assert info["was_limited"]


def test_a_planar_robot_needs_no_rotation():
    pose = Group("pose", ("x", "y"), ("m", "m"), low=(-1.0, -1.0), high=(1.0, 1.0), frame="world")
    spec = ActionSpec("table", "pusher", 10, ("top",), (pose,), (dataclasses.replace(pose, low=(), high=()),))
    robot = Robot(("x", "y"), {"top": (8, 8, 3)})
    env = started(robot, spec, (GroupLimits((-0.5, -0.5), (0.5, 0.5), max_change=0.4),))
    env.step(np.array([0.9, -0.1]))
    env.step(np.array([0.9, -0.1]))
    assert [list(sent.values()) for sent in robot.sent] == [[0.4, -0.1], [0.5, -0.1]]


def test_a_binary_gripper_is_sent_one_of_two_values_in_the_cards_sign():
    arm, ur = pose_arm(), ActionSpec.from_card("tabletop_ur6")
    for spec, half_open in ((SPEC, 0.3), (ur, -0.3)):
        started(arm, spec).step(np.append(np.zeros(6), half_open))
        assert arm.sent[-1]["gripper"] == spec.action[1].open


def sent_to(action, state, limits, present, raw, **robot):
    """What a robot that is at `present` is sent for one action."""
    spec = ActionSpec("d", "r", 10, ("front",), action, state)
    arm = Robot(robot.get("takes", tuple(present)), {"front": (8, 8, 3)}, present)
    started(arm, spec, limits).step(np.array(raw, float))
    return arm.sent[0]


def moves(names, units, **changes):
    values = {"kind": "joint_delta", "low": (-1.0,) * len(names), "high": (1.0,) * len(names), **changes}
    return Group(names=names, units=units, **values)


def test_displacements_move_what_is_called_like_them_in_its_units():
    wide = (GroupLimits((-999.0,) * 2, (999.0,) * 2),)
    for names in (("b", "a"), ("delta_b", "delta_a")):
        joints = Group("joint", ("a", "b"), ("deg", "rad"))
        sent = sent_to((moves(names, ("rad", "deg")),), (joints,), wide, {"a": 10.0, "b": 0.0}, [0.9, 0.1])
        assert sent == pytest.approx({"a": 10.1, "b": 0.9})
    joints = Group("joint", ("a", "b"), ("deg", "deg"))
    sent = sent_to((moves(("a", "b"), ("rad", "rad")),), (joints,), wide, {"a": 10.0, "b": 0.0}, [0.1, 0])
    assert sent == pytest.approx({"a": 10 + np.degrees(0.1), "b": 0})


def test_each_arm_gets_its_own_displacement_whatever_the_order_of_the_state():
    def arms(kind, sides, letters, unit, **changes):
        return tuple(Group(kind, tuple(f"{side}_{k}" for k in letters), (unit,) * 3, frame="base", **changes) for side in sides)

    box = (GroupLimits((-500.0,) * 3, (500.0,) * 3),) * 2
    action = arms("pose_delta", ("left", "right"), ("dx", "dy", "dz"), "m", low=(-1.0,) * 3, high=(1.0,) * 3)
    state = arms("pose", ("right", "left"), "xyz", "mm")
    present = {f"{side}_{k}": 0.0 for side in ("left", "right") for k in "xyz"}
    sent = sent_to(action, state, box, present, [0.1, 0, 0, 0, 0.2, 0])
    assert sent == pytest.approx({**present, "left_x": 100.0, "right_y": 200.0})


def test_a_turn_in_radians_is_added_to_angles_in_degrees():
    units = ("m",) * 3 + ("rad",) * 3
    move = moves(POSE, units, kind="pose_delta", frame="base", rotation="euler_xyz")
    pose = Group("pose", POSE, ("m",) * 3 + ("deg",) * 3, frame="base", rotation="euler_xyz")
    sent = sent_to((move,), (pose,), BOX[:1], {**dict.fromkeys(POSE, 0.0), "yaw": 80.0}, [0, 0, 0, 0, 0, 0.1])
    assert sent["yaw"] == pytest.approx(80 + np.degrees(0.1))


def test_joints_that_are_told_in_degrees_are_held_in_the_radians_that_they_take():
    joint = Group("joint", ("a",), ("rad",), low=(-3.0,), high=(3.0,))
    spec = ActionSpec("d", "r", 10, ("front",), (joint,), (Group("joint", ("a",), ("deg",)),))
    arm = Robot(("a",), {"front": (8, 8, 3)}, {"a": 90.0})
    env = started(arm, spec, (GroupLimits(max_change=0.1),), Operator(stops_at=2))
    env.step(np.array([2.0]))
    arm.values["a"] = 90.0
    env.step(np.array([2.0]))
    assert [sent["a"] for sent in arm.sent] == pytest.approx([np.pi / 2 + 0.1, np.pi / 2])


@pytest.mark.parametrize("is_binary", [True, False])
def test_a_scaled_gripper_is_sent_in_units_binary_or_not(is_binary):
    gripper = Group("gripper", ("g",), ("1",), (1 / 255,), (0.0,), (255.0,), open=255.0, close=0.0, is_binary=is_binary)
    for raw, expected in ((255, 1.0), (0, 0.0)):
        assert sent_to((gripper,), (), (GroupLimits(),), {"g": 0.0}, [raw]) == {"g": pytest.approx(expected)}


@pytest.mark.parametrize("layout", ["quat_xyzw", "quat_wxyz"])
def test_quaternions_are_sent_with_length_one_and_on_the_half_sphere_of_the_last(layout):
    names = ("x", "y", "z", "q0", "q1", "q2", "q3")
    pose = Group("pose", names, ("m",) * 3 + ("1",) * 4, frame="base", rotation=layout)
    target = dataclasses.replace(pose, low=(-1.0,) * 7, high=(1.0,) * 7)
    last = np.roll([0.0, 0, 0, 1], layout == "quat_wxyz")
    present = dict(zip(names, [0, 0, 0.2, *last.tolist()], strict=True))
    limits = (GroupLimits(LOW, HIGH, max_change=0.5, max_turn_rad=1.0),)
    for sign in (1, -1):
        sent = sent_to((target,), (pose,), limits, present, [0, 0, 0.2, *(sign * (0.5 * last + 0.1 * (last == 0)))])
        q = of(sent, names[3:])
        assert np.linalg.norm(q) == pytest.approx(1) and q @ last > 0.9


def test_absent_joints_are_not_driven_and_a_robot_may_lack_them():
    names, wide = ("a", "b"), (GroupLimits((-3.0,) * 2, (3.0,) * 2, max_change=0.1),)
    for kind in ("joint", "joint_delta"):
        group = moves(names, ("rad",) * 2, kind=kind, absent=("b",))
        both = Group("joint", names, ("rad",) * 2)
        assert sent_to((group,), (both,), wide, {"a": 0.0, "b": 1.0}, [0.05, 0]) == {"a": 0.05}
        one, limits = dataclasses.replace(both, names=("a",), units=("rad",)), wide
        if kind == "joint_delta":  # limits are of the joints that the state has
            limits = (GroupLimits((-3.0,), (3.0,)),)
        assert sent_to((group,), (one,), limits, {"a": 0.0}, [0.05, 0]) == {"a": 0.05}


# --- holding ------------------------------------------------------------------------------------------------------------------


def test_an_operator_who_stops_leaves_the_robot_held_where_it_is():
    arm = joint_arm()
    env = started(arm, ARM, SLOW, Operator(stops_at=2))
    env.step(np.array([5, 0, 0, 0, 0, 30]))
    arm.values["shoulder_pan.pos"], arm.values["gripper.pos"] = 2.0, 35.0  # it did not get there, and grips something
    *_, is_success, is_over, info = env.step(np.array([5, 0, 0, 0, 0, 30]))
    assert arm.sent[-1] == dict(zip(SO101, (2, 0, 0, 0, 0, 30), strict=True)) == info["sent"]
    assert is_over and is_success and info["failure"] == "stopped by the operator"


@pytest.mark.parametrize("error", [OSError("bus timeout"), KeyboardInterrupt("ctrl c")])
def test_an_error_holds_the_robot_and_is_told(error):
    arm = joint_arm()
    env = started(arm, ARM, SLOW)
    send, arm.values["shoulder_pan.pos"] = arm.send_action, 3.0

    def fail_once(action):
        arm.send_action = send
        raise error

    arm.send_action = fail_once
    with pytest.raises(type(error), match=str(error)):
        env.step(np.full(6, 1.0))
    assert [sent["shoulder_pan.pos"] for sent in arm.sent] == [3.0]
    with pytest.raises(RuntimeError, match=r"stopped it; check the robot and fix the cause, then call reset\(\)"):
        env.step(np.full(6, 1.0))


def test_a_robot_that_tells_nonsense_is_held_where_it_was():
    arm = joint_arm()
    env = started(arm, ARM, SLOW)
    env.step(np.array([4, 0, 0, 0, 0, 30]))
    send = arm.send_action
    arm.send_action = lambda action: send(action) and arm.values.update({"shoulder_pan.pos": float("nan")})
    with pytest.raises((ValueError, AttributeError)):
        env.step(np.array([5, 0, 0, 0, 0, 30]))
    assert arm.sent[-1]["shoulder_pan.pos"] == 4.0


def test_closing_in_the_middle_of_an_episode_holds_the_robot_first():
    arm = joint_arm()
    env = started(arm, ARM, SLOW)
    env.close()
    assert len(arm.sent) == 1 and not arm.is_connected


WHEELS = ActionSpec(
    "base", "kiwi", 30, ("front",),
    (Group("base_velocity", ("vx", "wz"), ("m/s", "rad/s"), low=(-1.0,) * 2, high=(1.0,) * 2),), (),
)  # fmt: skip


def a_base(**changes):
    base = Robot(("vx", "wz"), {"front": (8, 8, 3)})
    return base, an_env(base, WHEELS, (GroupLimits(),), **changes)


def test_a_base_rests_at_the_time_limit_before_the_operator_is_asked():
    asked = []
    base, env = a_base(max_steps=2, confirm=lambda question: asked.append(dict(base.values)) or True)
    env.reset()
    env.step(np.array([0.5, 0.1]))
    env.step(np.array([0.5, 0.1]))
    assert asked == [{"vx": 0.0, "wz": 0.0}] and len(base.sent) == 3


@pytest.mark.parametrize("end", ["close", "reset", "hold"])
def test_a_base_rests_when_its_episode_is_left(end):
    base, env = a_base()
    env.reset()
    env.step(np.array([0.5, 0.1]))
    getattr(env, end)()
    assert base.values == {"vx": 0.0, "wz": 0.0} and len(base.sent) == 2


def test_a_base_rests_when_the_policy_fails():
    class Failing(Expert):
        def select_action(self, observations):
            self.n_left -= 1
            return np.array([[0.5, 0.1]]) / bool(self.n_left)

    base, env = a_base()
    policy = Failing(None)
    policy.n_left = 3
    with pytest.raises(FloatingPointError), np.errstate(divide="raise"):
        rollout(policy, [env], [(FIRST_HELD_OUT_SEED, "lift")])
    assert len(base.sent) == 3 and base.values == {"vx": 0.0, "wz": 0.0}


def test_a_robot_that_reports_nothing_is_driven():
    base, env = a_base()
    send = base.send_action
    base.send_action = lambda action: send(action) and None
    env.reset()
    assert env.step(np.array([0.5, 0.1]))[4]["sent"] == {"vx": 0.5, "wz": 0.1}


def test_a_stop_at_the_first_step_sends_every_key():
    """A gripper that is not told is held open at first, later as it was sent, and by the state's ends where it tells."""
    joint = Group("joint", ("a",), ("rad",), low=(-3.0,), high=(3.0,))
    gripper = Group("gripper", ("g",), ("1",), open=1.0, close=-1.0, is_binary=True)
    for shown, told, expected in (((), {}, 1.0), ((Group("gripper", ("g",), ("m",), open=0.08, close=0.0),), {"g": 0.0}, -1.0)):
        spec = ActionSpec("d", "r", 10, ("front",), (joint, gripper), (Group("joint", ("a",), ("rad",)), *shown))
        arm = Robot(("a", "g"), {"front": (8, 8, 3)}, told)
        if not told:
            arm.observation_features.pop("g")
        env = started(arm, spec, (GroupLimits(max_change=0.1), GroupLimits()), Operator(stops_at=1))
        env.step(np.array([0.5, 1.0]))
        assert arm.sent == [{"a": 0.0, "g": expected}]


# --- time ---------------------------------------------------------------------------------------------------------------------


def test_a_step_lasts_as_long_as_the_card_says_thinking_included():
    fake, begun = Time(), []
    env = started(sleep=fake.sleep, clock=fake.clock)
    for thinking_s in (0.03, 0.09, 0.0):
        fake.now += thinking_s
        *_, info = env.step(STILL)
        begun.append(fake.now - 100)
    np.testing.assert_allclose(begun, [0.1, 0.2, 0.3])
    assert info["n_missed"] == 0


def test_a_missed_deadline_is_counted_told_once_and_does_not_shift_the_others():
    fake = Time()
    env = started(sleep=fake.sleep, clock=fake.clock)
    fake.now += 0.15
    with pytest.warns(UserWarning, match=r"within 0.100 s, got one that took 0.050 s more; act with RealTimePolicy"):
        env.step(STILL)
    assert fake.now - 100 == pytest.approx(0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fake.now += 0.15
        *_, info = env.step(STILL)
    assert fake.now - 100 == pytest.approx(0.4) and info["n_missed"] == 2


def test_a_robot_that_is_slow_by_itself_is_not_blamed_on_the_network():
    """With a policy that takes no time, and one that takes a little."""
    for reading_s, thinking_s, mend in ((0.14, 0.0, "robot alone took 0.140 s, 0.140 s of it get_obs"), (0.06, 0.06, "act with")):
        fake, arm = Time(), pose_arm()
        tell = arm.get_observation
        arm.get_observation = lambda tell=tell, fake=fake, s=reading_s: fake.sleep(s) or tell()
        env = started(arm, sleep=fake.sleep, clock=fake.clock)
        env.step(STILL)
        fake.now += thinking_s
        with pytest.warns(UserWarning, match=rf"within 0.100 s, got one that took 0.0[24]0 s more; (the )?{mend}"):
            env.step(STILL)


@pytest.mark.filterwarnings("ignore:expected each control step")
def test_a_policy_that_is_always_late_is_held():
    fake, arm = Time(), joint_arm()
    env = started(arm, ARM, SLOW, sleep=fake.sleep, clock=fake.clock, max_missed=2)
    for n in range(4):
        fake.now += 0.05
        *_, is_over, info = env.step(np.array([n + 1, 0, 0, 0, 0, 0]))
    assert is_over and info["failure"] == "missed 3 deadlines in a row" and arm.sent[-1]["shoulder_pan.pos"] == 3


# --- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(None, None, 3), (3, 48, 48), (48, 48, 4)], ids=str)
def test_a_camera_needs_a_size_height_before_width_before_colours(shape):
    """LeRobot's cameras have none unless their configuration gives one."""
    arm = pose_arm()
    arm.observation_features["wrist"] = shape
    got = re.escape(str({"wrist": shape}))
    with pytest.raises(ValueError, match=rf"expected \(height, width, 3\) .* got {got}; set .* of wrist in the robot's"):
        an_env(arm)


@pytest.mark.parametrize(
    ("key", "value"),
    [("elbow_flex.pos", ...), ("elbow_flex.pos", None), ("gripper.pos", np.zeros(2)), ("wrist_roll.pos", "3"), ("side", None)],
    ids=str,
)
def test_what_a_robot_does_not_tell_is_named_and_it_is_held(key, value):
    """A frame without a number or an image, or with something else there."""
    arm = joint_arm()
    env = started(arm, ARM, SLOW)
    tell = arm.get_observation
    arm.get_observation = lambda: {k: v for k, v in (tell() | {key: value}).items() if v is not ...}
    error, told = (KeyError, None) if value is ... else (ValueError, value)
    with pytest.raises(error, match=rf"a number for each of .*, got {re.escape(str({key: told}))}; the robot's observation has"):
        env.step(np.array([4.0, 0, 0, 0, 0, 0]))
    assert len(arm.sent) == 2, "the action, and a hold"


@pytest.mark.parametrize(
    "action", [np.full(7, np.nan), np.append(np.zeros(6), np.inf), np.zeros(6), np.zeros((1, 7)), np.zeros(8)], ids=str
)
def test_an_invalid_action_is_refused_and_nothing_is_sent(action):
    arm = pose_arm()
    env = started(arm)
    with pytest.raises(SpecMismatch, match=r"expected 7 finite numbers \['dx'.*got \[.*nothing was sent"):
        env.step(action)
    assert not arm.sent
    env.step(STILL)
    assert len(arm.sent) == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"cameras": {"wrist": "side"}},
            KeyError,
            r"got \{'static': 'static', 'wrist': 'side'\}.*the robot has \['static', 'wrist'\]",
        ),
        ({"cameras": {"wrist": "x"}}, KeyError, "a camera of the robot for each"),
        ({"cameras": {"wrist": "static"}}, KeyError, "none twice"),
        ({"cameras": {"hand": "wrist"}}, KeyError, r"and \['hand'\]"),
        ({"keys": {}}, KeyError, r"no number called \['gripper_opening'\]; it has \['x'"),
        ({"keys": {**KEYS, "yaw": "ee.yaw"}}, KeyError, r"no number called \['ee.yaw'\]"),
        ({"keys": {**KEYS, "gripper": "motor.temp"}}, KeyError, r"no number called \['motor.temp'\]; it has \['x'"),
        ({"keys": {**KEYS, "yaw": "x"}}, KeyError, "one dimension for each of the robot's numbers"),
        ({"limits": (GroupLimits(HIGH, LOW), GroupLimits())}, ValueError, "with low below high"),
        ({"limits": (GroupLimits(LOW, [0.2, 0.3, np.inf]), GroupLimits())}, SpecMismatch, "expected low and high, finite"),
        ({"limits": (GroupLimits(LOW[:2], HIGH[:2]), GroupLimits())}, ValueError, r"limits of \['x', 'y', 'z'\]"),
        ({"limits": (GroupLimits(), GroupLimits())}, SpecMismatch, r"expected low and high, finite, in the limits of pose_delta"),
        ({"limits": BOX[:1]}, SpecMismatch, r"limits of each action group, pose_delta \['dx'.*; gripper \['gripper'\]; got 1"),
        ({"limits": (0.1, {"max_change": 1})}, SpecMismatch, r"got 2, \['float', 'dict'\]; give a GroupLimits for each"),
        ({"keys": {**KEYS, "typo": "x"}}, KeyError, r"keys names \['typo'\], which the card does not have; it has \['dx'"),
        ({"max_steps": 2.5}, ValueError, "a whole number, and an instruction, got 2.5"),
        ({"limits": (GroupLimits(LOW, HIGH), GroupLimits(max_change=(1.0, 2.0)))}, SpecMismatch, "expected max_change, finite"),
        ({"limits": (GroupLimits(LOW, HIGH), GroupLimits(low=(np.nan,)))}, SpecMismatch, "expected low, finite"),
        *(
            ({"limits": (GroupLimits(LOW, HIGH, max_change=wrong), GroupLimits())}, SpecMismatch, "max_change, finite.*above 0")
            for wrong in (-0.1, 0, np.nan, np.inf, (0.1, np.nan, 0.1), (0.1,), True)
        ),
        *(
            ({"limits": (GroupLimits(LOW, HIGH, max_turn_rad=wrong), GroupLimits())}, SpecMismatch, "max_turn_rad, finite")
            for wrong in (-0.1, 0, np.nan, np.inf, (0.1,) * 3)
        ),
        ({"max_steps": 0}, ValueError, "max_steps of at least 1"),
        ({"instructions": {}}, ValueError, "an instruction"),
    ],
    ids=str,
)
def test_what_is_missing_is_named_before_the_robot_is_connected(changes, error, message):
    arm = pose_arm()
    with pytest.raises(error, match=message):
        an_env(arm, **changes)
    assert not arm.is_connected


def test_a_card_that_would_be_executed_wrongly_is_refused():
    flat = Group("pose", ("x", "y", "z"), ("m",) * 3, frame="world")
    joints = Group("joint", ("j1", "j2"), ("rad",) * 2)
    five, units = ("x", "y", "rx", "ry", "rz"), ("m",) * 2 + ("rad",) * 3
    hand = moves(("dx", "dy", *five[2:]), units, kind="pose_delta", frame="ee", rotation="axis_angle")
    planar = dataclasses.replace(
        SPEC, action=(hand, SPEC.action[1]), state=(Group("pose", five, units, frame="base", rotation="axis_angle"),)
    )
    for spec, message in [
        (dataclasses.replace(SPEC, state=(joints,)), r"expected a pose group in the state for \['dx'.*got \['joint'\]"),
        (dataclasses.replace(SPEC, state=(flat,)), r"like the pose \['x', 'y', 'z'\] \(none\) of the state"),
        (SPEC.replace_group("action", 0, frame="base"), r"in the frame of the state's pose.*'base' for \['x'.*in 'world'"),
        (SPEC.replace_group("state", 0, units=("px",) * 3 + ("rad",) * 3), r"expected units that can be converted.*\['px', 'px'"),
        (SPEC.replace_group("state", 0, names=("u", "v", "w", *POSE[3:])), r"of the state, named after it, such as dx for x"),
        (planar, r"frame ee of a pose with three positions and a rotation, got \['dx', 'dy', 'rx'"),
        (dataclasses.replace(SPEC, image_rotation_deg=90.0), "upright or turned by 180 degrees, got 90"),
    ]:
        with pytest.raises(SpecMismatch, match=message):
            an_env(Robot((*POSE, *"uvw", "gripper", "j1", "j2"), CAMERAS), spec)
    with pytest.raises(SpecMismatch, match=r"expected max_change, finite, in the limits of joint \['shoulder_pan'"):
        an_env(joint_arm(), ARM, (GroupLimits(), GroupLimits()))


def test_nothing_is_sent_outside_an_episode():
    arm = pose_arm()
    arm.connect()
    env = an_env(arm, max_steps=1)
    with pytest.raises(RuntimeError, match=r"got a step in none: reset\(\) was not called"):
        env.step(STILL)
    env.reset()
    for options in ({"task": "fly"}, {"task": "lift", "scene": 3}):
        with pytest.raises(KeyError, match=r"expected the option task, one of lift; got '(fly' and \[\]|lift' and \['scene)"):
            env.reset(options=options)
    with pytest.raises(RuntimeError, match=r"reset\(\) did not finish"):
        env.step(STILL)
    env.reset()
    env.step(STILL)
    with pytest.raises(RuntimeError, match=r"the episode is over; arrange the scene, then call reset\(\)"):
        env.step(STILL)
    env.close()
    assert len(arm.sent) == 2 and not arm.is_connected  # the action, and its hold
    with pytest.raises(RuntimeError, match="it was closed"):
        env.step(STILL)
    env.reset()
    assert arm.is_connected


def blind(arm):
    arm.images = lambda: {"static": np.zeros((48, 48, 3)), "wrist": np.zeros((48, 48, 3), np.uint8)}


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda arm: setattr(arm, "fault", OSError("bus timeout")), OSError, "bus timeout"),
        (lambda arm: arm.disconnect(), ConnectionError, "expected a connected robot"),
        (lambda arm: arm.values.pop("yaw"), KeyError, "yaw"),
        (lambda arm: arm.values.update({"yaw": np.nan}), ValueError, "expected finite numbers.*nan"),
        (blind, ValueError, r"images .*\(48, 48, 3\), 'uint8'.*float64"),
    ],
    ids=["bus", "connection", "key", "nan", "image"],
)
def test_a_fault_leaves_it_stopped_and_says_what_to_do(break_it, error, message):
    arm, operator = pose_arm(), Operator()
    env = started(arm, operator=operator)
    env.step(STILL)
    broken = dict(arm.values)
    send, arm.send_action = arm.send_action, lambda action: send(action) and (break_it(arm) or action)
    if error is ConnectionError or error is OSError:
        break_it(arm)
    with pytest.raises(error, match=message):
        env.step(STILL)
    arm.send_action = send
    arm.fault, arm.is_connected, arm.values = None, True, broken
    vars(arm).pop("images", None)
    n_sent = len(arm.sent)
    with pytest.raises(RuntimeError, match=r"stopped it; check the robot and fix the cause, then call reset\(\)"):
        env.step(STILL)
    assert len(arm.sent) == n_sent and not operator.questions
    env.reset()
    env.step(STILL)
    assert len(arm.sent) == n_sent + 1 + (error in (OSError, ConnectionError))  # whose hold is made up for


def test_an_arm_far_outside_the_workspace_is_not_moved():
    arm = pose_arm((HIGH[0] + 1.01 * STEP[0], 0, 0.2, 0, 0, 0))
    env = started(arm)
    with pytest.raises(RuntimeError, match=r"expected \['x', 'y', 'z'\] from \[-0.2.*move the robot there by hand"):
        env.step(STILL)
    assert all(np.array_equal(of(sent), where(arm)) for sent in arm.sent)


# --- the episode --------------------------------------------------------------------------------------------------------------


class Tabletopped(Robot):
    """The same interface, with the simulated arm behind it."""

    def __init__(self, sim):
        super().__init__((*POSE, "gripper"), CAMERAS)
        self.sim = sim

    def get_observation(self):
        self.values = dict(zip((*POSE, "gripper"), self.sim.world.state().tolist(), strict=True))
        return {**self.values, **{camera: self.sim.image(camera) for camera in CAMERAS}}

    def send_action(self, action):
        world, target = self.sim.world, of(action)
        tool = Rotation.from_rotvec(target[3:]) * Rotation.from_euler("x", np.pi)  # the state is relative to pointing down
        turn = (tool * Rotation.from_matrix(world.controller.target_rotation).inv()).as_rotvec()
        world.move(target[:3] - world.pos_tcp_world, turn, action["gripper"] > 0, 1 / SPEC.rate_hz)
        return action


def test_an_observation_is_the_tabletops():
    sim = Tabletop(image_size=48)
    theirs = sim.reset(seed=3)[0]
    env = an_env(Tabletopped(sim))
    ours, info = env.reset(options={"task": "lift"})
    assert ours.keys() == theirs.keys() and ours in env.observation_space and env.action_space == sim.action_space
    np.testing.assert_array_equal(ours["state"], theirs["state"], strict=True)
    for camera in SPEC.cameras:
        np.testing.assert_array_equal(ours["images"][camera], theirs["images"][camera], strict=True)
    assert ours["instruction"] == TEXTS[0] and info == {"task": "lift", "is_success": False}
    sim.close()


def test_images_are_turned_as_those_of_the_dataset():
    arm = pose_arm()
    arm.images = lambda: {name: np.arange(48 * 48 * 3).reshape(shape).astype(np.uint8) for name, shape in CAMERAS.items()}
    turned = an_env(arm, dataclasses.replace(SPEC, image_rotation_deg=180.0)).reset()[0]["images"]["wrist"]
    np.testing.assert_array_equal(turned, arm.images()["wrist"][::-1, ::-1])


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("stops_at", [None, 3])
def test_the_operator_is_asked_once_and_decides(answer, stops_at):
    arm, operator = pose_arm(), Operator(answer, stops_at)
    env = started(arm, operator=operator, max_steps=5)
    is_over, steps = False, []
    while not is_over:
        assert not operator.questions
        _, reward, is_success, is_over, info = env.step(STILL)
        steps.append(info["is_success"])
    assert operator.questions == [f"Did it succeed? {TEXTS[0]}"]
    assert steps == [False] * (len(steps) - 1) + [answer] and is_success == answer and reward == answer
    assert len(arm.sent) == (3 if stops_at else 6)  # the last one holds


def test_a_policy_acts_on_it_unchanged(toy_vlm, toy_stats):
    model, processor = build(toy_vlm, toy_stats, ONE_STEP)
    arms, operator = [pose_arm(), pose_arm()], Operator()
    envs = [an_env(arm, operator=operator, max_steps=n) for arm, n in zip(arms, (2, 4), strict=True)]
    policy = Policy(model, processor, n_action_steps=2, spec=envs[0].action_spec)
    rows = rollout(policy, envs, [(FIRST_HELD_OUT_SEED, "lift"), (FIRST_HELD_OUT_SEED + 1, "lift")], keep_frames=True)
    assert [row["n_steps"] for row in rows] == [2, 4] == [len(arm.sent) - 1 for arm in arms]
    assert all(row["is_success"] and row["instruction"] == TEXTS[0] for row in rows) and len(operator.questions) == 2
    assert (rows[1]["frames"]["static"] == 10).all() and (rows[1]["frames"]["wrist"] == 20).all()
    moved = np.clip(rows[1]["actions"][:, :3], -1, 1).sum(0) * STEP
    np.testing.assert_allclose(where(arms[1])[:3], np.array([0, 0, 0.2]) + moved, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: dataclasses.replace(spec, rate_hz=30.0), "rate_hz: 10.0 against 30.0"),
        (lambda spec: spec.replace_group("action", 1, open=-1.0, close=1.0), "action group 1 open: 1.0 against -1.0"),
        (lambda spec: spec.replace_group("action", 0, names=("dy", "dx", "dz", "droll", "dpitch", "dyaw")), "group 0 names"),
        (lambda spec: spec.replace_group("action", 0, units=("mm", *spec.action[0].units[1:])), "action group 0 units"),
    ],
    ids=["rate", "gripper", "order", "units"],
)
def test_a_robot_of_other_conventions_than_its_policys_is_sent_nothing(toy_vlm, toy_stats, change, message):
    """Bare or behind a delay, alone or as one of a batch."""
    policy = Policy(*build(toy_vlm, toy_stats, ONE_STEP))
    in_real_time = RealTimePolicy(policy)
    arms, episode = [pose_arm(), pose_arm()], (FIRST_HELD_OUT_SEED, "lift")
    alike, other = an_env(arms[0]), an_env(arms[1], change(SPEC))
    for acting, envs in ((policy, [other]), (policy, [alike, other]), (in_real_time, [other])):
        with pytest.raises(SpecMismatch, match=f"policy vs environment: .*{message}"):
            rollout(acting, envs, [episode] * len(envs))
    with pytest.raises(SpecMismatch, match=message):
        record_rollout(policy, other, *episode)
    in_real_time.close()
    assert not any(arm.sent or arm.is_connected for arm in arms)


def test_a_policy_in_real_time_acts_on_it(toy_vlm, toy_stats):
    """Its network takes less than a control step here, so that each chunk is one step late."""
    model = build(toy_vlm, toy_stats, {**ONE_STEP, "head": "flow"})
    policy, fake, arm = RealTimePolicy(Policy(*model, n_action_steps=2), "real_time_chunking"), Time(), pose_arm()

    def sleep(seconds):
        policy._inference is None or policy._inference.result.exception()
        fake.sleep(seconds)

    env = an_env(arm, max_steps=8, sleep=sleep, clock=fake.clock)
    row = rollout(policy, [env], [(FIRST_HELD_OUT_SEED, "lift")])[0]
    policy.close()
    assert row["n_steps"] == 8 == len(arm.sent) - 1 and env.deadlines.n_missed == 0
    assert set(policy.delays) == {1} and policy.n_held == 1
    assert np.array_equal(of(arm.sent[0]), [0, 0, 0.2, 0, 0, 0]) and not np.array_equal(of(arm.sent[1]), of(arm.sent[0]))


class Expert:
    """The simulator's scripted expert, with the true state."""

    def __init__(self, sim):
        self.sim = sim

    def reset(self, n_robots=1):
        pass

    def select_action(self, observations):
        return self.sim.expert_action()[None]


@pytest.mark.parametrize("seed", [FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 1])
def test_the_expert_lifts_through_a_robots_interface(seed):
    """Deltas made absolute and back move a simulated arm correctly."""
    from rvlm.envs.tabletop.tasks import ALL_FAMILIES

    sim = Tabletop(image_size=48)
    sim.reset(seed=seed, options={"task": "lift"})

    def is_done(question=""):
        return bool(ALL_FAMILIES["lift"].is_done(sim.world, sim.task))

    limits = (GroupLimits((-0.4, -0.5, 0.0), (0.4, 0.5, 0.6)), GroupLimits())
    env = an_env(Tabletopped(sim), limits=limits, confirm=is_done, is_stopped=is_done)
    row = rollout(Expert(sim), [env], [(seed, "lift")])[0]
    sim.close()
    assert row["is_success"] and row["n_steps"] < 50
