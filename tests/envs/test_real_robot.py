"""A real robot as an environment: nothing is sent that should not be, and what is sent is what the action means."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from toy_data import TEXTS
from toy_policies import ONE_STEP, build

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.envs import FIRST_HELD_OUT_SEED
from rvlm.envs.real_robot import RealRobotEnv
from rvlm.envs.tabletop.arm_control import TOOL_DOWN, axis_angle, rotation_matrix
from rvlm.envs.tabletop.arms import TABLE
from rvlm.envs.tabletop.env import Tabletop
from rvlm.evaluation.rollouts import rollout
from rvlm.policy.policy import Policy

SPEC = ActionSpec.from_card("tabletop_franka7")
EULER = SPEC.replace_group("action", 0, rotation="euler_xyz").replace_group("state", 0, rotation="euler_xyz")
POSE = ("ee.x", "ee.y", "ee.z", "ee.wx", "ee.wy", "ee.wz")
KEYS = (*POSE, "gripper.pos")
LOW, HIGH = np.array([-0.2, -0.3, 0.0]), np.array([0.2, 0.3, 0.4])
STEP = np.array([0.04, 0.04, 0.04])  # one unit of the card [m]
STILL = SPEC.set_grippers(np.zeros(7), True)


class Arm:
    """LeRobot's `Robot`, of an arm that reaches every target at once."""

    def __init__(self, pose=(0, 0, 0.2, 0, 0, 0)):
        self.values = dict(zip(KEYS, (*pose, 0.08), strict=True))
        self.is_connected, self.sent, self.fault = False, [], None
        self.action_features = dict.fromkeys(KEYS, float)
        self.observation_features = {**self.action_features, "front": (48, 48, 3), "hand": (48, 48, 3), "motor.temp": float}

    def connect(self):
        self.is_connected = True

    def disconnect(self):
        self.is_connected = False

    def images(self):
        return {"front": np.full((48, 48, 3), 10, np.uint8), "hand": np.full((48, 48, 3), 20, np.uint8)}

    def get_observation(self):
        assert self.is_connected
        return {**self.values, **self.images(), "motor.temp": 31.0}

    def send_action(self, action):
        assert self.is_connected
        if self.fault:
            raise self.fault
        self.sent.append(action)
        self.values.update({key: action[key] for key in POSE})
        return action

    @property
    def pose(self):
        return np.array([self.values[key] for key in POSE])


class Tabletopped(Arm):
    """The same interface, with the simulated arm behind it."""

    def __init__(self, sim):
        super().__init__()
        self.sim = sim

    def get_observation(self):
        self.values = dict(zip(KEYS, self.sim.world.state().tolist(), strict=True))
        return {**self.values, "front": self.sim.image("static"), "hand": self.sim.image("wrist")}

    def send_action(self, action):
        self.sent.append(action)
        world, target = self.sim.world, np.array([action[key] for key in POSE])
        turn = axis_angle(rotation_matrix(target[3:]) @ TOOL_DOWN @ world.controller.target_rotation.T)
        world.move(target[:3] - world.pos_tcp_world, turn, action["gripper.pos"] > 0, 1 / SPEC.rate_hz)
        return action


class Operator:
    """An operator with one answer to every question, who stops at a step."""

    def __init__(self, answer=True, stops_at=None):
        self.answer, self.stops_at, self.questions, self.n_polls = answer, stops_at, [], 0

    def confirm(self, question):
        self.questions.append(question)
        return self.answer

    def is_stopped(self):
        self.n_polls += 1
        return self.n_polls == self.stops_at


def a_env(robot=None, spec=SPEC, operator=None, **changes):
    operator = operator or Operator()
    named = {
        "pose_keys": POSE, "gripper_key": "gripper.pos", "cameras": ("front", "hand"), "instructions": {"lift": TEXTS[0]},
        "workspace_low": LOW, "workspace_high": HIGH, "max_steps": 50, "is_dry_run": False, "sleep": lambda seconds: None,
        "confirm": operator.confirm, "is_stopped": operator.is_stopped,
    }  # fmt: skip
    return RealRobotEnv(robot or Arm(), spec, **(named | changes))


def started(robot=None, spec=SPEC, operator=None, **changes):
    env = a_env(robot, spec, operator, **changes)
    env.reset(seed=0)
    return env


def matrix(spec, turn):
    """Reference: roll, pitch and yaw are about fixed axes, x first."""
    if spec.rotation == "axis_angle":
        return rotation_matrix(turn)
    x, y, z = np.diag(turn)
    return rotation_matrix(z) @ rotation_matrix(y) @ rotation_matrix(x)


def numbers(spec, m):
    """Inverse of `matrix`."""
    if spec.rotation == "axis_angle":
        return axis_angle(m)
    return np.array([np.arctan2(m[2, 1], m[2, 2]), -np.arcsin(np.clip(m[2, 0], -1, 1)), np.arctan2(m[1, 0], m[0, 0])])


def of(sent):
    return np.array([sent[key] for key in POSE])


# --- what is sent -----------------------------------------------------------------------------------------------------------


def test_a_dry_run_is_the_default_and_moves_nothing():
    arm, operator = Arm(), Operator()
    args = arm, SPEC, POSE, "gripper.pos", ("front", "hand"), {"lift": TEXTS[0]}, LOW, HIGH, 3
    env = RealRobotEnv(*args, operator.confirm, operator.is_stopped, sleep=lambda seconds: None)
    env.reset()
    before = arm.pose
    for _ in range(3):
        *_, info = env.step(SPEC.set_grippers(np.full(7, 0.5), False))
        np.testing.assert_allclose(of(info["sent"]), before + np.repeat([0.02, 0.1], 3))
        assert info["sent"]["gripper.pos"] == -1
    assert not arm.sent and np.array_equal(arm.pose, before)


@settings(max_examples=100, deadline=None)
@given(
    arrays(np.float64, (5, 7), elements=st.floats(-3, 3)),
    arrays(np.float64, 3, elements=st.floats(-0.2, 1.2)),
    st.sampled_from([SPEC, EULER]),
)
def test_no_target_leaves_the_workspace_or_is_more_than_a_step_away(actions, start, spec):
    """Also if the arm starts slightly outside."""
    arm = Arm((*np.clip(LOW + start * (HIGH - LOW), LOW - STEP, HIGH + STEP), 0.1, 0.2, 0.3))
    env = started(arm, spec)
    for action in actions:
        before, within = arm.pose, np.clip(action, -1, 1)
        *_, info = env.step(action)
        after = of(arm.sent[-1])
        assert (after[:3] >= LOW).all() and (after[:3] <= HIGH).all()
        assert (np.abs(after[:3] - before[:3]) <= STEP + 1e-9).all()
        turned = numbers(spec, matrix(spec, after[3:]) @ matrix(spec, before[3:]).T)
        assert (np.abs(turned) <= 0.2 + 1e-6).all()
        outside = np.abs(within - action).max()
        assert info["was_clipped"] == (outside > 0) or outside < 1e-3
        assert info["was_limited"] == (np.abs(before[:3] + within[:3] * STEP - after[:3]).max() > 0)


@pytest.mark.parametrize(
    "spec", [SPEC, EULER, EULER.replace_group("action", 0, rotation="axis_angle")], ids=["axis", "euler", "mixed"]
)
@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, (2, 3), elements=st.floats(-1.2, 1.2)), arrays(np.float64, (2, 3), elements=st.floats(0.2, 0.8)))
def test_the_difference_of_two_poses_leads_from_one_to_the_other(spec, turns, places):
    """The rotation is about the axes of the world, whatever the pose's rotation layout."""
    wide = spec.replace_group("action", 0, low=(-99.0,) * 6, high=(99.0,) * 6)
    pose_spec = spec.replace_group("action", 0, rotation=spec.state[0].rotation)  # the layout of poses
    here, there = LOW + places * (HIGH - LOW)
    turn = numbers(spec, matrix(pose_spec, turns[1]) @ matrix(pose_spec, turns[0]).T)
    arm = Arm((*here, *turns[0]))
    started(arm, wide).step(np.concatenate([(there - here) / 0.04, turn / 0.2, [1.0]]))
    np.testing.assert_allclose(arm.pose[:3], there, atol=1e-9)
    np.testing.assert_allclose(matrix(pose_spec, arm.pose[3:]), matrix(pose_spec, turns[1]), atol=1e-6)


def test_an_absolute_target_is_sent_as_it_is():
    arm, target = Arm(), np.array([0.1, -0.2, 0.3, 0.3, -0.2, 0.1, -1.0])
    spec = SPEC.replace_group("action", 0, kind="pose", scale=(1.0,) * 6)
    env = started(arm, spec)
    env.step(target)
    np.testing.assert_allclose(list(arm.sent[0].values()), target)
    *_, info = env.step(np.array([0.9, 0, 0.3, 0, 0, 0, -1]))
    assert info["was_limited"] and arm.pose[0] == HIGH[0]


def test_the_gripper_is_sent_one_of_two_values_in_the_cards_sign():
    arm, ur = Arm(), ActionSpec.from_card("tabletop_ur6")
    for spec, half_open in ((SPEC, 0.3), (ur, -0.3)):
        started(arm, spec).step(np.append(np.zeros(6), half_open))
        assert arm.sent[-1]["gripper.pos"] == spec.gripper_open


# --- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action", [np.full(7, np.nan), np.append(np.zeros(6), np.inf), np.zeros(6), np.zeros((1, 7)), np.zeros(8)], ids=str
)
def test_an_invalid_action_is_refused_and_nothing_is_sent(action):
    arm = Arm()
    env = started(arm)
    with pytest.raises(SpecMismatch, match=r"expected 7 finite numbers \['dx'.*got \[.*nothing was sent"):
        env.step(action)
    assert not arm.sent
    env.step(STILL)
    assert len(arm.sent) == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cameras": ("front", "side")}, KeyError, r"no camera called \['side'\]; it has \['front', 'hand'\]"),
        ({"cameras": ("front", "ee.x")}, KeyError, r"no camera called \['ee.x'\]"),
        ({"cameras": ("front",)}, KeyError, r"a camera for each of \['static', 'wrist'\].*got.*\['front'\]"),
        ({"pose_keys": (*POSE[:5], "ee.yaw")}, KeyError, r"read and sent called \['ee.yaw'\]; it has \['ee.x'.*'gripper.pos'\]"),
        ({"gripper_key": "motor.temp"}, KeyError, r"read and sent called \['motor.temp'\]; it has \['ee.x'"),
        ({"pose_keys": POSE[:5]}, KeyError, "expected 6 pose keys"),
        ({"pose_keys": (*POSE[:5], "ee.wy")}, KeyError, "none twice"),
        ({"cameras": ("front", "front")}, KeyError, "none twice"),
        ({"workspace_low": HIGH}, ValueError, "low below high"),
        ({"workspace_high": [0.2, 0.3, np.inf]}, ValueError, "expected a finite workspace"),
        ({"workspace_high": [0.2, 0.3]}, ValueError, r"workspace \(3,\)"),
        ({"max_steps": 0}, ValueError, "max_steps of at least 1"),
        ({"instructions": {}}, ValueError, "0 instructions"),
    ],
    ids=str,
)
def test_missing_features_of_the_robot_are_named_before_it_is_connected(changes, error, message):
    arm = Arm()
    with pytest.raises(error, match=message):
        a_env(arm, **changes)
    assert not arm.is_connected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SPEC.replace_group("action", 0, frame="ee"), r"frame 'ee' \(works: \('world', 'base'\)\)"),
        (
            SPEC.replace_group(
                "action",
                0,
                rotation="quat_xyzw",
                names=(*SPEC.names[:6], "w"),
                units=(*SPEC.units[:6], "1"),
                scale=(1.0,) * 7,
                low=(-1.0,) * 7,
                high=(1.0,) * 7,
            ),
            r"rotation 'quat_xyzw' \(works: \('axis_angle', 'euler_xyz'\)\)",
        ),
        (dataclasses.replace(SPEC, image_rotation_deg=180.0), "image_rotation_deg 180.0"),
        (SPEC.replace_group("action", 0, units=("mm", "mm", "mm", "rad", "rad", "rad")), r"units \('mm'"),
        (
            SPEC.replace_group("state", 1, names=("gripper_opening", "finger"), units=("m", "m")),
            r"state_units .*'m', 'm'. .works",
        ),
    ],
    ids=str,
)
def test_a_card_that_would_be_executed_wrongly_is_refused(spec, message):
    with pytest.raises(SpecMismatch, match=message):
        a_env(spec=spec)


def test_cameras_of_different_sizes_are_refused():
    arm = Arm()
    arm.observation_features["hand"] = (24, 24, 3)
    with pytest.raises(ValueError, match=r"cameras of one size.*'hand': \(24, 24, 3\)"):
        a_env(arm)


def test_nothing_is_sent_outside_an_episode():
    arm = Arm()
    arm.connect()
    env = a_env(arm, max_steps=1)
    with pytest.raises(RuntimeError, match=r"got a step in none: reset\(\) was not called"):
        env.step(STILL)
    env.reset()
    for options in ({"task": "fly"}, {"task": "lift", "scene": 3}):
        with pytest.raises(KeyError, match=r"options task, one of lift, and keep_state; got '(fly' and \[\]|lift' and \['scene)"):
            env.reset(options=options)
    with pytest.raises(RuntimeError, match=r"reset\(\) did not finish"):
        env.step(STILL)
    env.reset()
    env.step(STILL)
    with pytest.raises(RuntimeError, match=r"the episode is over; arrange the scene, then call reset\(\)"):
        env.step(STILL)
    env.close()
    assert len(arm.sent) == 1 and not arm.is_connected
    with pytest.raises(RuntimeError, match="it was closed"):
        env.step(STILL)
    env.reset()
    assert arm.is_connected


def blind(arm):
    arm.images = lambda: {"front": np.zeros((48, 48, 3)), "hand": np.zeros((48, 48, 3), np.uint8)}


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda arm: setattr(arm, "fault", OSError("bus timeout")), OSError, "bus timeout"),
        (lambda arm: setattr(arm, "fault", KeyboardInterrupt("ctrl c")), KeyboardInterrupt, "ctrl c"),
        (Arm.disconnect, ConnectionError, "expected a connected robot"),
        (lambda arm: arm.values.pop("gripper.pos"), KeyError, "gripper.pos"),
        (lambda arm: arm.values.update({"gripper.pos": np.nan}), ValueError, "expected finite numbers.*nan"),
        (blind, ValueError, r"images \(48, 48, 3\) uint8.*float64"),
    ],
    ids=["bus", "interrupt", "connection", "key", "nan", "image"],
)
def test_a_fault_leaves_it_stopped_and_says_what_to_do(break_it, error, message):
    arm, operator = Arm(), Operator()
    env = started(arm, operator=operator)
    env.step(STILL)
    broken = dict(arm.values)
    break_it(arm)
    with pytest.raises(error, match=message):
        env.step(STILL)
    n_sent = len(arm.sent)
    arm.fault, arm.is_connected, arm.values = None, True, broken
    vars(arm).pop("images", None)
    with pytest.raises(RuntimeError, match=r"stopped it; check the robot and fix the cause, then call reset\(\)"):
        env.step(STILL)
    assert len(arm.sent) == n_sent and not operator.questions
    env.reset()
    env.step(STILL)
    assert len(arm.sent) == n_sent + 1


def test_an_arm_far_outside_the_workspace_is_not_moved():
    arm = Arm((HIGH[0] + 1.01 * STEP[0], 0, 0.2, 0, 0, 0))
    env = started(arm)
    with pytest.raises(RuntimeError, match=r"expected the hand in the workspace.*move the arm there by hand"):
        env.step(STILL)
    assert not arm.sent


# --- the episode --------------------------------------------------------------------------------------------------------------


def test_an_observation_is_the_tabletops():
    sim = Tabletop(image_size=48)
    theirs = sim.reset(seed=3)[0]
    env = a_env(Tabletopped(sim))
    ours, info = env.reset(options={"task": "lift", "keep_state": False})
    assert ours.keys() == theirs.keys() and ours in env.observation_space and env.action_space == sim.action_space
    for camera in ("static", "wrist"):
        np.testing.assert_array_equal(ours["images"][camera], theirs["images"][camera], strict=True)
    np.testing.assert_array_equal(ours["state"], theirs["state"], strict=True)
    assert ours["instruction"] == TEXTS[0] and info == {"task": "lift", "is_success": False}
    sim.close()


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("stops_at", [None, 3])
def test_the_operator_is_asked_once_and_decides(answer, stops_at):
    arm, operator = Arm(), Operator(answer, stops_at)
    env = started(arm, operator=operator, max_steps=5)
    is_over, steps = False, []
    while not is_over:
        assert not operator.questions
        _, reward, is_success, is_over, info = env.step(STILL)
        steps.append(info["is_success"])
    assert operator.questions == [f"Did it succeed? {TEXTS[0]}"]
    assert steps == [False] * (len(steps) - 1) + [answer] and is_success == answer and reward == answer
    assert len(arm.sent) == (2 if stops_at else 5) and bool(info["sent"]) == (stops_at is None)


@pytest.mark.parametrize("took_s", [0.03, 0.25])
def test_a_step_lasts_as_long_as_the_card_says(took_s):
    """Unless the robot itself takes longer."""
    now, slept = [5.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    class Slow(Arm):
        def send_action(self, action):
            now[0] += took_s
            return super().send_action(action)

    env = started(Slow(), sleep=sleep, clock=lambda: now[0])
    for _ in range(4):
        env.step(STILL)
    assert now[0] - 5.0 == pytest.approx(4 * max(took_s, 0.1)) and len(slept) == 4 and min(slept) >= 0


def test_a_policy_acts_on_it_unchanged(toy_vlm, toy_stats):
    model, processor = build(toy_vlm, toy_stats, ONE_STEP)
    arms, operator = [Arm(), Arm()], Operator()
    envs = [a_env(arm, operator=operator, max_steps=n) for arm, n in zip(arms, (2, 4), strict=True)]
    policy = Policy(model, processor, n_action_steps=2, spec=envs[0].action_spec)
    rows = rollout(policy, envs, [(FIRST_HELD_OUT_SEED, "lift"), (FIRST_HELD_OUT_SEED + 1, "lift")], keep_frames=True)
    assert [row["n_steps"] for row in rows] == [2, 4] == [len(arm.sent) for arm in arms]
    assert all(row["is_success"] and row["instruction"] == TEXTS[0] for row in rows) and len(operator.questions) == 2
    assert (rows[1]["frames"]["static"] == 10).all() and (rows[1]["frames"]["wrist"] == 20).all()
    moved = np.clip(rows[1]["actions"][:, :3], -1, 1).sum(0) * STEP
    np.testing.assert_allclose(arms[1].pose[:3], np.array([0, 0, 0.2]) + moved, atol=1e-6)


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

    env = a_env(Tabletopped(sim), workspace_low=TABLE.low, workspace_high=TABLE.high, confirm=is_done, is_stopped=is_done)
    row = rollout(Expert(sim), [env], [(seed, "lift")])[0]
    sim.close()
    assert row["is_success"] and row["n_steps"] < 50
