"""Buttons move the robot as labelled, in the card's units and sign."""

from concurrent.futures import ThreadPoolExecutor

import gymnasium
import numpy as np
import pytest
from toy_suites import stub_suite

from rvlm.data.actions import ActionSpec
from rvlm.envs.tabletop.env import Tabletop
from rvlm.report import widgets


@pytest.mark.parametrize("robot", ["franka7", "ur6"])
def test_a_command_is_an_action_in_the_cards_convention(robot):
    spec = ActionSpec.from_card(f"tabletop_{robot}")
    action = widgets.move(spec, "left", is_open=True, amount=0.5)
    assert action[spec.names.index("dy")] == 0.5 * spec.low[1] and spec.is_open(action).all()
    assert np.count_nonzero(action[:-1]) == 1
    closed = widgets.move(spec, "stay", is_open=False)
    assert not closed[:6].any() and not spec.is_open(closed).any()
    with pytest.raises(KeyError, match="no move 'sideways'; there are stay, away, closer, left, right"):
        widgets.move(spec, "sideways", True)


def test_teleoperation_by_buttons_and_by_script():
    env = Tabletop(image_size=32)
    driven = widgets.scripted_teleop(env, ["down", "left", "left"], seed=3)
    assert driven["images"]["static"].shape == (4, 32, 32, 3) and driven["action"].shape == (3, 7)
    moved = driven["state"][-1] - driven["state"][0]
    assert moved[1] < -0.02 and moved[2] < -0.01  # [m]

    box = widgets.teleoperate(env, seed=3, size=32)
    label, screens, state_label, moves, *_ = box.children
    before, image = state_label.value, screens.children[0].value
    button(moves, "left").click()
    assert state_label.value != before and screens.children[0].value != image and "m" in state_label.value
    assert label.value.startswith("“") and "step 1 of 60" in label.value
    env.close()


@pytest.mark.parametrize("card", ["tabletop_franka7_joint", "tabletop_so101", "tabletop_two_arms", "tabletop_planar", "bridge"])
def test_any_robot_has_buttons_for_its_dimensions_and_grippers(card):
    """Of the others absolute targets go a small step from where they are, and stay there."""
    spec = ActionSpec.from_card(card)
    suite = stub_suite(spec, {spec.cameras[0]: (40, 60)})
    box = widgets.teleoperate(suite.make(), size=32)
    label, screens, _, buttons, last, error = box.children
    n_driven = int(spec.present.sum()) - len(spec.gripper_indices)
    assert len(buttons.children) == 2 * n_driven and len(screens.children) == len(spec.cameras)
    assert len(last.children) == len(spec.gripper_indices) + 3 and "step 0 of 6" in label.value
    command, (index, sign) = list(widgets.moves(spec).items())[-1]
    held = (np.asarray(spec.low) + spec.high) / 2
    action = widgets.move(spec, command, True, 0.5, held)
    others = np.arange(spec.n_dims) != index
    others[list(spec.gripper_indices)] = False
    assert sign * (action[index] - (held[index] if command.startswith(spec.names[index]) else 0)) > 0
    np.testing.assert_allclose(action[others], held[others], rtol=1e-6)
    buttons.children[0].click()
    assert ("step 1 of 6" in label.value) == (error.value == "")


def button(box, word):
    return next(b for b in box.children if getattr(b, "description", "") == word)


@pytest.fixture(scope="module")
def driven():
    env = Tabletop(image_size=32, max_steps=50)
    env.reset(seed=7, options={"task": "lift"})
    return env, widgets.teleoperate(env, seed=3, size=32, task="open_drawer")


def test_toggles_and_buttons_may_come_from_any_thread(driven):
    """JupyterLab delivers them in two; an OpenGL context belongs to the one that made it."""
    _, box = driven
    label, screens, _, moves, last, error = box.children
    seen = set()
    with ThreadPoolExecutor(1) as other:
        for step in range(4):
            fingers = last.children[0]
            other.submit(setattr, fingers, "value", not fingers.value).result()
            seen.add(screens.children[0].value)
            button(moves, "closer").click()
            seen.add(screens.children[0].value)
            assert error.value == "" and f"step {2 * step + 2} of 50" in label.value
        other.submit(button(last, "new scene").click).result()
    assert len(seen) == 8 and "step 0 of 50" in label.value and error.value == ""


def test_the_widget_leaves_the_environment_that_it_was_given_alone(driven):
    env, box = driven
    before, task = env.world.state().copy(), env.task
    button(box.children[3], "up").click()
    assert np.array_equal(env.world.state(), before) and env.task is task and env.n_steps == 0
    assert env.image("static", 32).shape == (32, 32, 3), "it still draws in its own thread"
    assert "drawer" in box.children[0].value, "the task that was asked for"


def test_what_goes_wrong_is_written_into_the_widget(driven, monkeypatch):
    _, box = driven
    *_, moves, _, error = box.children
    monkeypatch.setattr(Tabletop, "step", lambda *_: 1 / 0)
    button(moves, "left").click()
    assert "ZeroDivisionError: division by zero" in error.value
    monkeypatch.undo()
    button(moves, "left").click()
    assert error.value == "", "and it goes on"


def test_an_environment_that_cannot_be_made_again_is_refused():
    class Bare(gymnasium.Env):
        def __init__(self, port):
            pass

    with pytest.raises(TypeError, match=r"keeps what it was made with; Bare lacks \['port'\]"):
        widgets.env_factory(Bare(1))
