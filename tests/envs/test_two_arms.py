"""The two-armed scene: each arm does what its own dimensions say, and the two are never mistaken for each other."""

import dataclasses

import numpy as np
import pytest
from unrendered import UnrenderedTwoArms

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.envs.suites import load_suite
from rvlm.envs.tabletop.scene import TEXTURES
from rvlm.envs.tabletop.two_arms import BLOCK, WORDINGS, TwoArms

SPEC = ActionSpec.from_card("tabletop_two_arms")
LEFT, RIGHT = slice(0, 7), slice(7, 14)
SWAPPED = np.r_[RIGHT, LEFT]


@pytest.fixture(scope="module")
def unseen():
    return UnrenderedTwoArms()


def episode(env, seed, task, act=lambda action: action):
    """Roll out `act` of the expert's actions; the last `info`, and the number of steps."""
    (_, info), is_done = env.reset(seed=seed, options={"task": task}), False
    while not is_done and env.n_steps < 60:
        _, _, is_done, _, info = env.step(act(env.expert_action()))
    return info, env.n_steps


def test_the_suite_is_as_its_card_says():
    """Spec, spaces, cameras, images and state are checked when a suite makes its environment."""
    suite = load_suite("tabletop/two_arms")
    env = suite.make()
    observation, info = env.reset(seed=900_000, options={"task": "lift_bar"})
    assert suite.spec == SPEC and suite.tasks == tuple(WORDINGS) and info["task"] == "lift_bar"
    assert list(observation["images"]) == ["static", "left_wrist", "right_wrist"]
    assert [name.split("_")[0] for name in SPEC.names] == ["left"] * 7 + ["right"] * 7
    assert suite.make((32, 48)).reset(seed=0)[0]["images"]["left_wrist"].shape == (32, 48, 3)
    env.close()


@pytest.mark.parametrize("task", WORDINGS)
def test_the_expert_solves(unseen, task):
    ends = [episode(unseen, seed, task) for seed in range(4)]
    assert all(info["is_success"] and n_steps <= 30 for info, n_steps in ends)


@pytest.mark.parametrize("task", WORDINGS)
def test_the_expert_recovers_from_noise(unseen, task):
    rng, scale = np.random.default_rng(0), np.array(load_suite("tabletop/two_arms").noise_scale)
    noisy = [episode(unseen, seed, task, lambda action: action + 0.4 * scale * rng.normal(size=14)) for seed in range(4)]
    assert sum(info["is_success"] for info, _ in noisy) >= 3


def test_the_instruction_alone_tells_the_tasks_of_a_scene_apart():
    env, images, actions = TwoArms(image_size=32), [], []
    for task in WORDINGS:
        observation, _ = env.reset(seed=5, options={"task": task})
        assert observation["instruction"] in WORDINGS[task].training
        images.append(np.concatenate([*observation["images"].values()]))
        actions.append(env.expert_action())
    assert all(np.array_equal(image, images[0]) for image in images)
    assert len(np.unique(actions, axis=0)) == len(WORDINGS)
    env.close()


@pytest.mark.parametrize(("side", "other"), [(LEFT, RIGHT), (RIGHT, LEFT)])
@pytest.mark.parametrize("axis", range(3))
def test_each_arm_moves_alone(unseen, side, other, axis):
    before = unseen.reset(seed=3, options={"task": "lift_both"})[0]["state"]
    action = SPEC.set_grippers(np.zeros(14), True)
    action[side][axis] = 1.0
    for _ in range(2):
        unseen.step(action)
    moved = unseen.state() - before
    assert moved[side][axis] > 0.02, "up to 0.025 m in each of two steps"
    assert np.abs(moved[other][:3]).max() < 0.004 and np.abs(np.delete(moved[side][:3], axis)).max() < 0.015


@pytest.mark.parametrize(("gripper", "finger"), [(6, 6), (13, 13)])
def test_each_gripper_closes_alone(unseen, gripper, finger):
    unseen.reset(seed=3, options={"task": "lift_both"})
    action = SPEC.set_grippers(np.zeros(14), True)
    action[gripper] = 0.0
    for _ in range(6):
        unseen.step(action)
    assert unseen.state()[finger] < 0.02 < 0.08 < unseen.state()[19 - finger]


@pytest.mark.parametrize("task", ["lift_left", "lift_right"])
def test_actions_with_left_and_right_exchanged_lift_nothing_that_was_asked_for(unseen, task):
    infos = [episode(unseen, seed, task, lambda action: action[SWAPPED])[0] for seed in range(3)]
    assert not any(info["is_success"] for info in infos)


def test_a_spec_with_left_and_right_exchanged_is_refused():
    groups = (*SPEC.action[2:], *SPEC.action[:2])
    for changes in (
        {"action": groups},
        {"state": (*SPEC.state[2:], *SPEC.state[:2])},
        {"cameras": ("static", "right_wrist", "left_wrist")},
    ):
        with pytest.raises(SpecMismatch, match=r"convention\(s\) differ"):
            dataclasses.replace(SPEC, **changes).require_same(SPEC)


def test_left_is_the_robots_left_in_state_and_image():
    env = TwoArms(image_size=96)
    observation, _ = env.reset(seed=1, options={"task": "lift_left"})
    assert observation["state"][1] > 0 > observation["state"][8], "y points to the robot's left"
    block = env.sides["left"].pos_object(BLOCK)
    assert block[1] > 0
    before = observation["images"]
    env.data.qpos[env.model.joint("left_block").qposadr[0] + 2] = -1.0  # below the table: out of sight
    after, *_ = env.step(SPEC.set_grippers(np.zeros(14), True))
    changed = {name: np.abs(after["images"][name].astype(int) - image).max(-1) > 60 for name, image in before.items()}
    assert changed["static"][:, :48].sum() > 3 * changed["static"][:, 48:].sum(), "in the image's left half"
    assert changed["left_wrist"].sum() > 20 > changed["right_wrist"].sum()
    env.close()


def test_actions_beyond_the_range_are_clipped(unseen):
    ends = []
    for factor in (1, 50):
        unseen.reset(seed=2, options={"task": "lift_bar"})
        ends.append(unseen.step(factor * np.ones(14))[0]["state"])
    assert np.array_equal(*ends)


def test_hands_stay_in_their_own_half(unseen):
    unseen.reset(seed=2, options={"task": "lift_bar"})
    action = np.zeros(14)
    action[1], action[8] = -1, 1  # towards each other
    for _ in range(15):
        unseen.step(action)
    assert unseen.state()[1] > -0.04 and unseen.state()[8] < 0.04


def test_lifting_what_was_not_named_fails(unseen):
    unseen.reset(seed=0, options={"task": "lift_left"})
    unseen.task = "lift_both"
    actions = []
    for _ in range(25):
        actions.append(unseen.expert_action())
        if unseen.step(actions[-1])[2]:
            break
    unseen.reset(seed=0, options={"task": "lift_left"})
    infos = [unseen.step(action)[-1] for action in actions]
    assert not infos[-1]["is_success"] and infos[-1]["failure"] == "wrong object" and infos[0]["failure"] == "timed out"


def test_held_out_wordings_are_not_those_of_training():
    training = {text for wordings in WORDINGS.values() for text in wordings.training}
    held_out = {text for wordings in WORDINGS.values() for text in wordings.held_out}
    assert not training & held_out and len(training) == sum(len(w.training) for w in WORDINGS.values())
    suite = load_suite("tabletop/two_arms/novel_description")
    assert suite.setting == "novel_description" and suite.make().reset(seed=0)[0]["instruction"] in held_out
    assert set(load_suite("tabletop/two_arms").held_out["wordings"]) == held_out


def test_a_seed_fixes_everything(unseen):
    films = []
    for _ in range(2):
        unseen.reset(seed=11, options={"task": "lift_bar"})
        films.append([unseen.step(unseen.expert_action())[0]["state"] for _ in range(5)])
    assert np.array_equal(*films)
    textures = set()
    for seed in range(8):
        unseen.reset(seed=seed)
        textures.add(int(unseen.model.geom("table").matid[0]))
    assert textures == {unseen.model.material(name).id for name in TEXTURES[:2]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "juggle"}, "no task 'juggle'; there are lift_left, lift_right"),
        ({"family": "lift"}, r"unknown reset options \['family'\]"),
    ],
)
def test_what_does_not_exist_is_named_beside_what_does(unseen, options, message):
    with pytest.raises(KeyError, match=message):
        unseen.reset(seed=0, options=options)
