"""The planar pusher: an absolute target in two dimensions, one camera, and a language instruction that decides."""

import itertools

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from unrendered import UnrenderedPlanar

from rvlm.data.actions import ActionSpec
from rvlm.envs.suites import load_suite
from rvlm.envs.tabletop.planar import PUSHER_REACH, REGIONS, SPEED, Planar

SPEC = ActionSpec.from_card("tabletop_planar")
TASKS = tuple(Planar.wordings)


@pytest.fixture(scope="module")
def unseen():
    return UnrenderedPlanar()


def test_the_suite_is_as_its_card_says():
    suite = load_suite("tabletop/planar")
    env = suite.make()
    observation, _ = env.reset(seed=900_000)
    assert suite.spec == SPEC and suite.tasks == TASKS and SPEC.names == SPEC.state_names == ("x", "y")
    assert SPEC.gripper_indices == () and not SPEC.is_binary.any() and SPEC.action[0].kind == "pose"
    assert list(observation["images"]) == ["top"]
    env.close()


def test_gymnasiums_own_checker_passes():
    env = Planar(image_size=32)
    check_env(env, skip_render_check=True)
    assert env.render().shape == (256, 256, 3)
    env.close()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_expert_solves(unseen, task, noise):
    rng, n_steps = np.random.default_rng(0), []
    for seed in range(8):
        unseen.reset(seed=seed, options={"task": task})
        is_done = False
        while not is_done and unseen.n_steps < 50:
            *_, is_done, _, _ = unseen.step(unseen.expert_action() + rng.normal(0, noise, 2))
        n_steps.append(unseen.n_steps)
    assert max(n_steps) < 50


def test_an_action_is_the_place_where_the_pusher_goes(unseen):
    unseen.reset(seed=0)
    target = np.array([0.2, -0.22], np.float32)
    for _ in range(12):
        unseen.step(target)
    assert np.abs(unseen.state() - target).max() < 0.005
    assert np.abs(unseen.step(target)[0]["state"] - target).max() < 0.005, "it stays there: a target, not a displacement"


def test_the_pusher_is_slow_and_stays_on_the_table(unseen):
    before = unseen.reset(seed=0)[0]["state"]
    after = unseen.step(np.array([5.0, -5.0]))[0]["state"]
    assert 0 < np.linalg.norm(after - before) < 1.1 * SPEED
    for _ in range(20):
        unseen.step(np.array([5.0, -5.0]))
    assert np.abs(unseen.state() - np.array([PUSHER_REACH, -PUSHER_REACH])).max() < 0.005


def test_the_instruction_alone_decides_where():
    env, images, ends = Planar(image_size=32), [], {}
    for color, task in zip(REGIONS, TASKS, strict=True):
        observation, _ = env.reset(seed=7, options={"task": task})
        assert color in observation["instruction"] and observation["instruction"] in Planar.wordings[task].training
        images.append(observation["images"]["top"])
        while not env.is_done():
            env.step(env.expert_action())
        ends[color] = env.pos("puck").copy()
    assert all(np.array_equal(image, images[0]) for image in images)
    assert min(np.linalg.norm(ends[a] - ends[b]) for a, b in itertools.pairwise(REGIONS)) > 0.05
    env.close()


def test_the_wrong_region_is_called_so(unseen):
    unseen.reset(seed=7, options={"task": "push_to_red"})
    assert unseen.failure() == "timed out"
    unseen.pos("puck")[:] = unseen.pos_region("blue")
    *_, info = unseen.step(unseen.state())
    assert not info["is_success"] and info["failure"] == "wrong region"


def test_x_and_y_exchanged_solve_nothing(unseen):
    solved = 0
    for seed in range(6):
        unseen.reset(seed=seed)
        while unseen.n_steps < 40 and not unseen.is_done():
            unseen.step(unseen.expert_action()[::-1])
        solved += unseen.is_done()
    assert solved == 0


def test_image_and_world_agree():
    """x points right in the image, y up."""
    env = Planar(image_size=96)
    env.reset(seed=0)
    rows, columns = [], []
    for place in ((0.15, 0.0), (-0.15, 0.0), (0.0, 0.18)):
        env.model.body_pos[[env.model.body(name).id for name in REGIONS], :2] = 0.9  # out of sight
        env.pos("puck")[:], env.pos("pusher")[:] = place, (0, -0.23)
        image = env.step(np.array([0, -0.23]))[0]["images"]["top"].astype(int)
        row, column = np.argwhere((image[..., 0] > 180) & (image[..., 2] < 80)).mean(0)
        rows.append(row)
        columns.append(column)
    assert columns[0] > 60 > 35 > columns[1] and rows[2] < 30 < rows[0]
    env.close()
