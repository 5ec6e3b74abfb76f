"""Buttons move the robot as their words say, in the card's units and sign."""

import numpy as np
import pytest

from rvlm import widgets
from rvlm.actions import ActionSpec
from rvlm.envs.tabletop.env import Tabletop


@pytest.mark.parametrize("robot", ["franka7", "ur6"])
def test_a_word_is_an_action_in_the_cards_convention(robot):
    spec = ActionSpec.from_card(f"tabletop_{robot}")
    action = widgets.move(spec, "left", is_open=True, amount=0.5)
    assert action[spec.names.index("dy")] == 0.5 * spec.low[1] and action[-1] == spec.gripper_open
    assert np.count_nonzero(action[:-1]) == 1
    assert widgets.move(spec, "stay", is_open=False).tolist() == [0.0] * 6 + [spec.gripper_close]
    with pytest.raises(KeyError, match="no move 'sideways'; there are stay, left, right"):
        widgets.move(spec, "sideways", True)


def test_driving_by_hand_and_by_script():
    env = Tabletop(image_size=32)
    told = widgets.scripted_drive(env, ["down", "left", "left"], seed=3)
    assert told["image"].shape == (4, 32, 32, 3) and told["action"].shape == (3, 7)
    moved = told["state"][-1] - told["state"][0]
    assert moved[1] < -0.02 and moved[2] < -0.01  # [m]

    box = widgets.drive(env, seed=3, size=32)
    label, screens, felt, keys, _ = box.children
    before, picture = felt.value, screens.children[0].value
    next(b for b in keys.children if b.description == "left").click()
    assert felt.value != before and screens.children[0].value != picture and "m" in felt.value
    assert label.value.startswith("“")
    env.close()
