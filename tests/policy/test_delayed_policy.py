"""Acting while computing: which chunk is executed when, against schedules written out by hand, in control steps."""

import dataclasses
import itertools
import threading
import warnings

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from toy_policies import ONE_STEP, SETTINGS, SPEC, build, observe

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.data.groups import Group
from rvlm.data.holding import hold_action
from rvlm.policy.delayed_policy import EXECUTIONS, DelayedPolicy
from rvlm.policy.observation_checks import ObservationError
from rvlm.policy.policy import Policy
from rvlm.policy.real_time_policy import RealTimePolicy

ABSOLUTE = SPEC.replace_group("action", 0, kind="pose", scale=(0.5,) * 6, low=(-99.0,) * 6, high=(99.0,) * 6)


class Config:
    head, n_obs_steps = "flow", 1


class Head:
    predict_clean_action = None


class Counting:
    """A policy whose chunk from an observation at step t is [100 t + 1, 100 t + 2, ...], in every dimension."""

    def __init__(self, chunk_size=6, n_action_steps=2, spec=SPEC, n_obs_steps=1):
        self.chunk_size, self.n_action_steps, self.temporal_ensemble_coeff = chunk_size, n_action_steps, None
        config = {"n_obs_steps": n_obs_steps, "chunk_size": chunk_size}
        self.model = type("Model", (), {"config": type("C", (Config,), config)(), "head": Head()})()
        self.robot = type("Robot", (), {"spec": spec})()
        self.asked, self.seen = [], []

    def reset(self, n_robots=1):
        self.n_robots = n_robots

    def keep(self, rows):
        self.n_robots = len(rows)

    def check(self, observations):
        pass

    def observe(self, observations):
        self.seen.append(observations[0]["step"])

    def predict_action_chunk(self, observations, previous=None, n_frozen=0):
        self.observe(observations)
        step = observations[0]["step"]
        self.asked.append((step, None if previous is None else previous[0, :, 0].tolist(), n_frozen))
        chunk = 100 * step + np.arange(1, self.chunk_size + 1)
        return np.broadcast_to(chunk[None, :, None], (self.n_robots, self.chunk_size, 7)).astype(np.float32)


def acted(policy, n_steps, n_robots=1, state=0.0):
    """First dimension of each step's action."""
    observations = [[{"step": t, "state": np.full(7, state, np.float32)}] * n_robots for t in range(n_steps)]
    return [int(policy.select_action(o)[0, 0]) for o in observations]


def test_a_robot_that_waits_is_held_and_then_executes_the_chunk_from_its_start():
    policy = DelayedPolicy(Counting(), "synchronous", 2)
    assert acted(policy, 9) == [0, 0, 1, 2, 0, 0, 401, 402, 0] and policy.n_held == 5


def test_the_old_chunk_goes_on_and_the_new_one_is_entered_behind_what_was_executed_meanwhile():
    counting = Counting()
    policy = DelayedPolicy(counting, "asynchronous", 2)
    #                             waits  | first    | from step 4 on   | from step 6
    assert acted(policy, 11) == [0, 0, 1, 2, 3, 4, 403, 404, 603, 604, 803]
    assert [step for step, *_ in counting.asked] == [0, 4, 6, 8, 10] and policy.n_held == 2


def test_a_delay_longer_than_what_is_executed_puts_predictions_off():
    """One prediction at a time: the next begins when the chunk of the last one arrives."""
    counting = Counting(chunk_size=8)
    assert acted(DelayedPolicy(counting, "asynchronous", 3), 12) == [0, 0, 0, 1, 2, 3, 4, 5, 504, 505, 506, 804]
    assert [step for step, *_ in counting.asked] == [0, 5, 8, 11]


def test_a_chunk_that_ends_before_the_next_one_comes_leaves_the_robot_held():
    """And the next one is entered where the robot stands, not where the clock does."""
    policy = DelayedPolicy(Counting(chunk_size=3), "asynchronous", 3)
    assert acted(policy, 10) == [0, 0, 0, 1, 2, 3, 0, 0, 502, 503] and policy.n_held == 5


@pytest.mark.parametrize(("chunk_size", "delay", "n_held"), [(12, 4, 0), (12, 6, 0), (12, 8, 4), (16, 8, 0), (8, 8, 8)])
def test_a_chunk_lasts_where_the_delay_fits_twice_or_behind_the_executed_actions(chunk_size, delay, n_held):
    """Held steps of every 16, as the docstring and notebook 12 tell."""
    policy = DelayedPolicy(Counting(chunk_size, n_action_steps=4), "asynchronous", delay)
    acted(policy, 64)
    before = policy.n_held
    acted(policy, 16)
    assert policy.n_held - before == n_held and (n_held == 0) == (max(delay, 4) + delay <= chunk_size)


def test_a_delay_of_all_executed_actions_executes_the_tails_of_chunks_alone():
    executed = acted(DelayedPolicy(Counting(12, n_action_steps=4), "asynchronous", 4), 40)
    assert {action % 100 for action in executed[8:]} == {5, 6, 7, 8}


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_without_delay_chunks_are_executed_as_far_as_was_asked(execution):
    assert acted(DelayedPolicy(Counting(), execution), 5) == [1, 2, 201, 202, 401]


def test_real_time_chunking_gets_what_is_left_of_the_chunk_and_how_much_of_it_is_frozen():
    counting = Counting()
    acted(DelayedPolicy(counting, "real_time_chunking", 1), 6)
    assert counting.asked == [(0, None, 1), (3, [3, 4, 5, 6], 1), (5, [303, 304, 305, 306], 1)]
    counting = Counting()
    acted(DelayedPolicy(counting, "asynchronous", 1), 6)
    assert all(previous is None for _, previous, _ in counting.asked)


def test_real_time_chunking_that_would_continue_nothing_is_refused():
    with pytest.raises(ValueError, match=r"d <= s <= H - d, got a delay d of 1, s = n_action_steps = 2 and H = chunk_size = 2"):
        DelayedPolicy(Counting(chunk_size=2), "real_time_chunking", 1)
    assert acted(DelayedPolicy(Counting(chunk_size=2), "asynchronous", 1), 4) == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("chunk_size", "delay", "is_held"), [(6, 2, False), (4, 2, False), (8, 4, False), (5, 3, True), (3, 2, True)]
)
def test_real_time_chunking_warns_where_chunks_end_before_the_next_one(chunk_size, delay, is_held):
    """As the robot does: it is held then, and only then."""
    with warnings.catch_warnings(record=True) as warned:
        policy = DelayedPolicy(Counting(chunk_size), "real_time_chunking", delay)
    assert [f"a delay d of {delay}, s = n_action_steps = 2 and H" in str(warning.message) for warning in warned] == [
        True
    ] * is_held
    acted(policy, 20)
    assert (policy.n_held > delay) == is_held


def test_a_history_gets_every_observation_once_and_in_order():
    counting = Counting(n_obs_steps=3)
    acted(DelayedPolicy(counting, "asynchronous", 2), 7)
    assert counting.seen == list(range(7))
    counting = Counting()
    acted(DelayedPolicy(counting, "asynchronous", 2), 7)
    assert counting.seen == [0, 4, 6]


def test_an_absolute_robot_is_held_at_its_last_target_and_at_first_where_it_is():
    at_pose = ABSOLUTE.replace_group("state", 0, names=ABSOLUTE.names[:6])
    policy = DelayedPolicy(Counting(spec=at_pose), "synchronous", 2)
    assert acted(policy, 7, state=7) == [14, 14, 1, 2, 2, 2, 401]  # one raw unit is half a metre
    with pytest.raises(SpecMismatch, match=r"expected the present value of \['dx'.*got a state of \['x'"):
        acted(DelayedPolicy(Counting(spec=ABSOLUTE), "synchronous", 2), 1)


def test_a_held_gripper_stays_as_it_was_sent():
    closed = SPEC.set_grippers(np.full((2, 7), 0.5, np.float32), np.array([[False], [True]]))
    held = hold_action(SPEC, closed, [np.zeros(7)] * 2)
    assert (held[:, :6] == 0).all() and SPEC.is_open(held).tolist() == [[False], [True]]
    assert SPEC.is_open(hold_action(SPEC, None, [np.zeros(7)])).all()


POSE = ("x", "y", "z", "roll", "pitch", "yaw")


def only(action, *state):
    return ActionSpec("d", "r", 10, ("c",), (action,), state)


def test_the_first_hold_is_where_the_state_says_in_the_actions_units_and_layout():
    joint = Group("joint", ("a", "b"), ("rad",) * 2, low=(-2.0,) * 2, high=(2.0,) * 2)
    degrees = only(joint, Group("joint", ("a", "b"), ("deg",) * 2))
    np.testing.assert_allclose(hold_action(degrees, None, [np.array([90.0, 180.0])]), [[np.pi / 2, 2.0]])  # within the range
    lacking = only(dataclasses.replace(joint, absent=("b",)), Group("joint", ("a",), ("rad",)))
    np.testing.assert_allclose(hold_action(lacking, None, [np.array([0.5])]), [[0.5, 0]])
    units, turn = ("m",) * 3 + ("rad",) * 3, np.array([0.3, 0.2, -0.4])
    pose = Group("pose", POSE, units, low=(-4.0,) * 6, high=(4.0,) * 6, frame="base", rotation="axis_angle")
    shown = Group("pose", POSE, ("mm",) * 3 + ("deg",) * 3, frame="base", rotation="euler_xyz")
    full = dataclasses.replace(pose, low=(0.0,) * 6, high=(7.0,) * 6, rotation="euler_xyz")
    held = hold_action(only(full, dataclasses.replace(full, low=(), high=())), None, [np.array([0, 0, 0, 0.1, -0.2, -2.7])])
    np.testing.assert_allclose(held, [[0, 0, 0, 0.1, 2 * np.pi - 0.2, 2 * np.pi - 2.7]], atol=1e-6)  # no other direction
    euler = Rotation.from_rotvec(turn).as_euler("xyz", degrees=True)
    held = hold_action(only(pose, shown), None, [np.concatenate([[100.0, 200.0, 300.0], euler])])
    np.testing.assert_allclose(held, [[0.1, 0.2, 0.3, *turn]], atol=1e-6)
    down = Rotation.from_quat([0.9, 0, 0, -0.436])  # recorded with qx from 0 to 1
    quaternion = Group(
        "pose", ("x", "y", "z", "qx", "qy", "qz", "qw"), ("m",) * 3 + ("1",) * 4, low=(-1.0,) * 3 + (0.0,) + (-1.0,) * 3,
        high=(1.0,) * 7, frame="base", rotation="quat_xyzw",
    )  # fmt: skip
    held = hold_action(only(quaternion, shown), None, [np.concatenate([np.zeros(3), down.as_euler("xyz", degrees=True)])])
    np.testing.assert_allclose(held[0, 3:], down.as_quat(), atol=1e-6)
    for other in (dataclasses.replace(shown, frame="world"), dataclasses.replace(shown, kind="pose_delta")):
        with pytest.raises(SpecMismatch, match=r"base axis_angle in the state to hold before the first action, got a state of"):
            hold_action(only(pose, other), None, [np.zeros(6)])


@pytest.mark.parametrize("is_binary", [True, False])
def test_the_first_hold_leaves_a_gripper_as_the_state_tells_it(is_binary):
    gripper = Group("gripper", ("gripper",), ("1",), low=(0.0,), high=(1.0,), open=1.0, close=0.0, is_binary=is_binary)
    for opened, closed in ((0.0, 1.0), (10.0, 0.0), (1.0, 0.0)):
        spec = only(gripper, Group("gripper", ("gripper",), ("1",), open=opened, close=closed))
        held = hold_action(spec, None, [np.array([opened]), np.array([closed])])
        assert held.tolist() == [[1.0], [0.0]]
    untold = only(gripper, Group("gripper", ("gripper_width",), ("m",)))
    assert hold_action(untold, None, [np.array([0.0])]).tolist() == [[1.0]]


def test_the_callers_arrays_are_neither_kept_nor_handed_out():
    counting = Counting(n_obs_steps=3)
    policy = DelayedPolicy(counting, "asynchronous", 2)
    observation = {"step": np.array(0), "state": np.zeros(7, np.float32)}
    for t in range(5):
        observation["step"][...] = t
        action = policy.select_action([observation])
        expected = policy._last.copy()
        action *= 0
        np.testing.assert_array_equal(policy._last, expected)
    assert [int(step) for step in counting.seen] == list(range(5)) and policy._chunk[0, 0, 0] == 1
    action[...] = 7
    assert (policy._chunk != 7).all()


def test_robots_that_are_done_leave_the_others_chunk_and_prediction():
    class Own(Counting):
        def predict_action_chunk(self, observations, *args):
            return super().predict_action_chunk(observations, *args) + np.array([o["robot"] for o in observations])[:, None, None]

    policy = DelayedPolicy(Own(), "asynchronous", 2)
    policy.reset(3)
    seen = []
    for step in range(8):
        robots = [0, 1000, 2000] if step < 5 else [0, 2000]
        if step == 5:
            policy.keep([0, 2])
        seen.append(policy.select_action([{"step": step, "state": np.zeros(7), "robot": r} for r in robots])[:, 0].tolist())
    assert seen[4] == [3, 1003, 2003] and seen[5] == [4, 2004] and seen[6] == [403, 2403]


@pytest.mark.parametrize("name", ["one_step-mlp", "one_step-flow", "policy_head-lstm-mlp", "interleaved-mlp"])
def test_without_delay_a_trained_policy_acts_as_alone(toy_vlm, toy_stats, name):
    model, processor = build(toy_vlm, toy_stats, SETTINGS[name])
    alone, rng = Policy(model, processor, n_action_steps=2), np.random.default_rng(0)
    delayed = DelayedPolicy(Policy(model, processor, n_action_steps=2), "asynchronous")
    for _ in range(5):
        observations = [observe(rng)]
        np.testing.assert_allclose(delayed.select_action(observations), alone.select_action(observations), atol=1e-4)


def test_what_cannot_be_delayed_is_refused(toy_vlm, toy_stats):
    model, processor = build(toy_vlm, toy_stats, ONE_STEP)
    policy = Policy(model, processor)
    with pytest.raises(ValueError, match="no execution 'late'; there are synchronous, asynchronous, real_time_chunking"):
        DelayedPolicy(policy, "late")
    for delay in (-1, 0.5):
        with pytest.raises(ValueError, match=f"a number of control steps from 0 on, got {delay}"):
            DelayedPolicy(policy, "synchronous", delay)
    with pytest.raises(ValueError, match="guides a flow: expected a head such as 'flow', got 'mlp'"):
        DelayedPolicy(policy, "real_time_chunking", 1)
    with pytest.raises(ValueError, match="got a temporal ensemble"):
        DelayedPolicy(Policy(model, processor, temporal_ensemble_coeff=0.1), "asynchronous", 1)


@pytest.mark.parametrize("execution", ["synchronous", "asynchronous"])
def test_observations_are_checked_at_each_step(toy_vlm, toy_stats, execution):
    """In mid-chunk, and while the robot is held; a refused one changes nothing."""
    model, processor = build(toy_vlm, toy_stats, SETTINGS["policy_head-lstm-mlp"])
    policies = [DelayedPolicy(Policy(model, processor, n_action_steps=2), execution, 1) for _ in range(2)]
    rng = np.random.default_rng(0)
    for policy in policies:
        policy.reset(2)
    for _ in range(5):
        observations = [observe(rng), observe(rng)]
        with pytest.raises(ObservationError, match="expected an observation of each of 2 robots, got 1"):
            policies[0].select_action(observations[:1])
        with pytest.raises(ObservationError, match=r"robot 1: .*add \['state'\]"):
            policies[0].select_action([observations[0], {k: v for k, v in observations[1].items() if k != "state"}])
        first, second = (policy.select_action(observations) for policy in policies)
        np.testing.assert_array_equal(first, second)


# --- in a thread ----------------------------------------------------------------------------------------------------------


class Gated(Counting):
    """Whose predictions end when the test says so."""

    def __init__(self, **options):
        super().__init__(**options)
        self.may_end, self.error = threading.Semaphore(0), None

    def predict_action_chunk(self, observations, *args):
        self.may_end.acquire(timeout=5)  # a test that failed lets the thread end
        if self.error:
            raise self.error
        return super().predict_action_chunk(observations, *args)


def step(policy, t):
    return int(policy.select_action([{"step": t, "state": np.zeros(7, np.float32)}])[0, 0])


def finish(gated, policy):
    """Let the prediction under way end, and wait for it."""
    gated.may_end.release()
    policy._inference.result.exception()


def test_a_robot_never_waits_for_the_network():
    gated = Gated()
    policy = RealTimePolicy(gated)
    assert [step(policy, t) for t in range(2)] == [0, 0]
    finish(gated, policy)
    assert [step(policy, t) for t in range(2, 6)] == [1, 2, 3, 4]
    finish(gated, policy)
    assert [step(policy, t) for t in range(6, 8)] == [403, 404]
    assert list(policy.delays) == [2, 2] and policy.n_held == 2
    finish(gated, policy)
    policy.close()


def test_the_longest_of_the_last_delays_is_expected_of_the_next():
    gated = Gated()
    policy, t, last = RealTimePolicy(gated, "real_time_chunking"), itertools.count(), None
    for delay in (3, 1, 1):
        while policy._inference in (None, last):
            step(policy, next(t))
        while policy._inference.n_steps < delay:
            step(policy, next(t))
        finish(gated, policy)
        last = policy._inference
    assert [n_frozen for *_, n_frozen in gated.asked] == [0, 3, 3]
    policy.close()


def test_an_error_of_the_network_reaches_the_robots_loop():
    gated = Gated()
    policy = RealTimePolicy(gated)
    gated.error = ValueError("weights overflow")
    step(policy, 0)
    finish(gated, policy)
    with pytest.raises(ValueError, match="weights overflow"):
        step(policy, 1)
    assert not policy.delays
    policy.close()


def test_after_an_error_of_the_network_the_robot_goes_on():
    """With the chunk in execution and a new prediction; one that has ended meanwhile is not continued."""
    gated = Gated(chunk_size=3)
    policy = RealTimePolicy(gated, "real_time_chunking")
    step(policy, 0)
    finish(gated, policy)
    assert [step(policy, t) for t in (1, 2, 3, 4)] == [1, 2, 3, 0]
    gated.error = ValueError("weights overflow")
    finish(gated, policy)
    with pytest.raises(ValueError, match="weights overflow"):
        step(policy, 5)
    gated.error = None
    assert step(policy, 6) == 0
    finish(gated, policy)
    assert (
        step(policy, 7) == 601
        and list(policy.delays) == [1, 1]
        and [(t, left) for t, left, _ in gated.asked] == [(0, None), (6, None)]
    )
    policy.close()


def test_a_prediction_of_the_last_episode_does_not_reach_the_next():
    gated = Gated()
    policy = RealTimePolicy(gated)
    step(policy, 0)
    gated.may_end.release(2)
    policy.reset()
    assert step(policy, 5) in (0, 501) and gated.asked[0][0] == 0
    policy._inference is None or policy._inference.result.exception()
    assert step(policy, 6) in (501, 502)
    with pytest.raises(ValueError, match="expected one robot, got 2"):
        policy.reset(2)
    policy.close()


def test_the_one_robot_is_kept_during_a_prediction():
    gated = Gated()
    policy = RealTimePolicy(gated)
    step(policy, 0)
    policy.keep([0])
    policy.keep(np.array([0]))
    finish(gated, policy)
    assert step(policy, 1) == 1
    for wrong in ([], [1], [0, 0], [True], [False]):
        with pytest.raises(ValueError, match=r"expected \[0\], the place of the one robot, to keep, got"):
            policy.keep(wrong)
    policy.close()


def test_a_closed_policy_says_so():
    policy = RealTimePolicy(Counting())
    policy.close()
    policy.close()
    for use in (policy.reset, lambda: step(policy, 0)):
        with pytest.raises(RuntimeError, match="got one that was closed; make another RealTimePolicy"):
            use()
