"""Failures are classified from the true state: every class occurs once here."""

import numpy as np
import pytest

from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.failures import FAILURES


@pytest.fixture(scope="module")
def env():
    env = Tabletop(image_size=16, max_steps=40)
    yield env
    env.close()


def still(env):
    """An action that moves nothing."""
    return env.action_spec.set_grippers(np.zeros(7, np.float32), env.world.opening > 0.03)


def test_success_has_no_failure(env):
    env.reset(seed=1, options={"task": "lift"})
    for _ in range(40):
        _, _, is_success, _, info = env.step(env.expert_action())
        assert (info["failure"] == "") == is_success and info["failure"] in ("", *FAILURES)
        if is_success:
            return
    pytest.fail("the expert did not lift")


def test_nothing_done_is_timed_out(env):
    for family in ("lift", "open_drawer", "turn_on_light", "push_left", "move_slider_left"):
        env.reset(seed=1, options={"task": family})
        assert env.step(still(env))[4]["failure"] == "timed out", family


@pytest.mark.parametrize("family", ["lift", "push_left", "open_drawer"])
def test_something_else_moved_is_the_wrong_object(env, family):
    env.reset(seed=1, options={"task": family})
    other = next(i for i in range(3) if i != env.task.target)
    env.world.place_object(other, np.add(env.world.pos_object(other), (0.05, 0.0, 0.0)))
    assert env.step(still(env))[4]["failure"] == "wrong object"


def test_a_fixture_that_was_not_meant_is_the_wrong_object(env):
    env.reset(seed=1, options={"task": "open_drawer"})
    env.world.set_light(not env.world.is_light_on)
    assert env.step(still(env))[4]["failure"] == "wrong object"


def test_pushed_elsewhere_is_the_wrong_way(env):
    env.reset(seed=1, options={"task": "push_left"})
    target = env.task.target_object
    env.world.place_object(target, np.add(env.world.pos_object(target), (0.0, 0.06, 0.0)))
    assert env.step(still(env))[4]["failure"] == "wrong way"


def test_held_and_let_go_is_dropped(env):
    env.reset(seed=1, options={"task": "place_in_zone"})
    for _ in range(40):
        info = env.step(env.expert_action())[4]
        if env._failure_classifier.was_held and env.world.pos_object(env.task.target_object)[2] > 0.08:
            break
    assert info["failure"] == "timed out", "still in the hand"
    for _ in range(4):
        info = env.step(env.action_spec.set_grippers(np.zeros(7, np.float32), True))[4]
    assert info["failure"] == "dropped"


def test_fingers_closed_above_the_target_missed_it(env):
    env.reset(seed=1, options={"task": "lift"})
    over = np.add(env.world.pos_object(env.task.target_object), (0, 0, 0.036))
    for is_open in [True] * 12 + [False] * 3:
        shift = np.clip((over - env.world.pos_tcp_world) / env.action_spec.scale[0], -1, 1)
        action = np.concatenate([shift, np.zeros(4)]).astype(np.float32)
        info = env.step(env.action_spec.set_grippers(action, is_open))[4]
    assert not env._failure_classifier.was_held and info["failure"] == "missed grasp"
