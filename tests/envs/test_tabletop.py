"""The tabletop: deterministic, solvable by its experts, honest in its instructions, cameras and conventions."""

import dataclasses
import os
import subprocess
import sys

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import rvlm.envs
from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.envs.tabletop.arm_control import axis_angle, rotation_matrix
from rvlm.envs.tabletop.arms import ARMS
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.scene import COLORS, SETTINGS, UNSEEN_COLORS
from rvlm.envs.tabletop.success_conditions import Task
from rvlm.envs.tabletop.tasks import ALL_FAMILIES, CUE_STEPS, DEFAULT_TASKS, MEMORY_FAMILIES, TASK_FAMILIES

ROBOTS = tuple(ARMS)
ALL = pytest.mark.parametrize("robot", ROBOTS)


class Unseen(Tabletop):
    """Without images, for tests of states alone."""

    def _observe(self):
        return {"state": self.world.state(), "instruction": self.task.instruction}


@pytest.fixture(scope="module")
def unseen():
    return {robot: Unseen(robot, max_steps=120) for robot in ROBOTS}


@pytest.fixture(scope="module")
def env():
    env = Tabletop(image_size=64)
    yield env
    env.close()


def solve(env, max_steps=100):
    """Let the expert act; number of steps, or None if it failed."""
    for step in range(max_steps):
        if env.step(env.expert_action())[2]:
            return step + 1
    return None


def test_images_have_the_size_that_is_asked():
    env = Tabletop(image_size=896)
    observation, _ = env.reset(seed=0)
    assert observation["images"]["static"].shape == observation["images"]["wrist"].shape == (
        896,
        896,
        3,
    ) and env.render().shape == (256, 256, 3)
    large, small = env.image("static", 1024), env.image("static", 64)
    blocks = large.reshape(64, 16, 64, 16, 3).mean((1, 3))
    assert np.abs(blocks - small).mean() < 6, "the same picture, and all of it"
    env.close()


# -- a gymnasium environment -------------------------------------------------------------------------------------------
def test_gymnasiums_own_checker_passes(env):
    check_env(env, skip_render_check=True)
    assert env.render().shape == (256, 256, 3)


def test_the_registered_name_makes_a_vector_of_environments():
    envs = gymnasium.make_vec("rvlm/Tabletop-v0", num_envs=2, vectorization_mode="sync", image_size=32)
    observation, _ = envs.reset(seed=[5, 6])
    assert observation["images"]["static"].shape == (2, 32, 32, 3) and len(observation["instruction"]) == 2
    assert not np.array_equal(observation["images"]["static"][0], observation["images"]["static"][1])
    observation, reward, *_ = envs.step(envs.action_space.sample())
    assert observation["state"].shape == (2, 7) and reward.shape == (2,)
    envs.close()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"robot": "franka8"}, "no robot 'franka8'; there are franka7, ur6, small5"),
        ({"families": ("lift", "fly")}, "no task family 'fly'; there are lift, push_left"),
        ({"setting": "foggy"}, "no setting 'foggy'; there are simple, unseen_distractor"),
    ],
)
def test_what_does_not_exist_is_named_beside_what_does(asked, message):
    with pytest.raises(KeyError, match=message):
        Tabletop(**asked)


def test_unknown_options_families_and_cameras_are_errors(env):
    with pytest.raises(KeyError, match=r"unknown reset options \['fmily'\]; there are task, keep_state"):
        env.reset(seed=0, options={"fmily": "lift"})
    with pytest.raises(KeyError, match="no task family 'fly'"):
        env.reset(seed=0, options={"task": "fly"})
    env.reset(seed=0)
    with pytest.raises(KeyError, match="no camera 'side'; there are static, wrist"):
        env.image("side")


# -- determinism -------------------------------------------------------------------------------------------------------
def film(env, seed, n=6):
    observation, _ = env.reset(seed=seed)
    seen = [observation]
    for _ in range(n):
        seen.append(env.step(env.expert_action())[0])
    return seen


@ALL
def test_the_same_seed_gives_the_same_bits(robot):
    """In one environment twice, after another episode, and in a new environment."""
    env, other = Tabletop(robot, image_size=48), Tabletop(robot, image_size=48)
    first = film(env, 11)
    film(env, 12)
    for again in (film(env, 11), film(other, 11)):
        for a, b in zip(first, again, strict=True):
            assert a["instruction"] == b["instruction"] and a["state"].tobytes() == b["state"].tobytes()
            assert np.array_equal(a["images"]["static"], b["images"]["static"]) and np.array_equal(
                a["images"]["wrist"], b["images"]["wrist"]
            )
    env.close()
    other.close()


def test_different_seeds_differ(unseen):
    states, instructions = [], set()
    for seed in range(20):
        observation, _ = unseen["franka7"].reset(seed=seed)
        states.append(observation["state"])
        instructions.add(observation["instruction"])
    assert len(np.unique(states, axis=0)) == 20 and len(instructions) > 10


# -- tasks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ALL_FAMILIES)
@ALL
def test_the_expert_solves(unseen, robot, family):
    env, failed = unseen[robot], []
    for seed in range(3):
        env.reset(seed=seed, options={"task": family})
        assert not ALL_FAMILIES[family].is_done(env.world, env.task), "asked for what is done already"
        if solve(env) is None:
            failed.append(seed)
    assert len(failed) <= 1, f"{robot} fails at {family} with seeds {failed}"


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("setting", ["simple", "unseen_target", "novel_description"])
def test_an_instruction_names_exactly_one_object(family, setting):
    env = Unseen(setting=setting)
    for seed in range(5):
        env.reset(seed=seed, options={"task": family})
        names = [" ".join(o) for o in env.world.objects]
        assert len(set(names)) == len(names)
        named = [name for name in names if name in env.task.instruction]
        meant = [names[i] for i in (env.task.target, env.task.other) if i is not None]
        assert sorted(named) == sorted(meant) and len(meant) == ALL_FAMILIES[family].n_objects


def test_held_out_instructions_are_never_templates():
    templates = {t for family in ALL_FAMILIES.values() for t in family.templates}
    held_out = {t for family in ALL_FAMILIES.values() for t in family.held_out}
    assert all(family.held_out for family in ALL_FAMILIES.values())
    assert not templates & held_out
    assert len(templates) == sum(len(f.templates) for f in ALL_FAMILIES.values()), "two families share a template"


def test_at_least_twelve_families_and_a_mix_of_six():
    assert len(TASK_FAMILIES) >= 12 and len(DEFAULT_TASKS) >= 6 and set(DEFAULT_TASKS) <= set(TASK_FAMILIES)


@pytest.mark.parametrize("family", MEMORY_FAMILIES)
def test_where_memory_is_needed_one_observation_has_two_correct_actions(family):
    """After the cue, two scenes that differ in it alone have equal observations, and different expert actions."""
    envs = [Tabletop(image_size=32), Tabletop(image_size=32)]
    for env, is_on in zip(envs, (False, True), strict=True):
        env.reset(seed=3, options={"task": family})
        env.world.set_light(is_on)
        env.task = dataclasses.replace(env.task, was_light_on=is_on)
    observations = [env.step(np.zeros(7))[0] for env in envs]
    assert not np.array_equal(observations[0]["images"]["static"], observations[1]["images"]["static"]), "the cue is visible"
    for step in range(20):
        acts = [env.expert_action() for env in envs]
        if step >= CUE_STEPS and np.abs(acts[0] - acts[1]).max() > 0.1:
            break
        observations = [env.step(acts[0])[0] for env in envs]  # the same is done in both
    else:
        pytest.fail("the expert does the same in both scenes")
    for camera in ("static", "wrist"):
        assert np.array_equal(*(o["images"][camera] for o in observations)), camera
    assert np.array_equal(*(o["state"] for o in observations))
    assert observations[0]["instruction"] == observations[1]["instruction"]


def cued(env, seed, family, is_on):
    """A scene with the given cue."""
    observation, _ = env.reset(seed=seed, options={"task": family})
    env.world.set_light(is_on)
    env.task = dataclasses.replace(env.task, was_light_on=is_on)
    return observation


@pytest.mark.parametrize("family", MEMORY_FAMILIES)
@ALL
def test_when_the_cue_ends_nothing_reveals_it(unseen, robot, family):
    """Hand, fingers and scene are the same for both cues, whatever was done while they were shown, and then the arm moves."""
    env, rng = unseen[robot], np.random.default_rng(0)
    low, high = env.action_space.low, env.action_space.high
    for seed in range(20):
        ends = []
        for is_on, acts in (
            (False, None),
            (True, None),
            (True, rng.uniform(low, high, (CUE_STEPS, 7))),
            (False, [high] * CUE_STEPS),
        ):
            cued(env, seed, family, is_on)
            for step in range(CUE_STEPS):
                env.step(env.expert_action() if acts is None else acts[step])
            data = env.world.data
            ends.append(np.concatenate([data.qpos, data.qvel, data.ctrl, env.world.state(), [env.world.is_light_on]]))
        assert all(np.array_equal(ends[0], end) for end in ends), f"seed {seed}"
    env.step(high)
    assert np.linalg.norm(env.world.state()[:3] - ends[0][-8:-5]) > 1e-3, "the cue is over"


def test_only_a_cue_holds_the_arm(unseen):
    env = unseen["franka7"]
    env.reset(seed=0, options={"task": "lift"})
    before = env.world.state()
    env.step(env.action_space.high)
    assert np.linalg.norm(env.world.state()[:3] - before[:3]) > 1e-3


def without_memory(env):
    """The expert with the present observation alone: left first, and right where the slider is on the left already."""
    has_tried_left = (
        env.world.joint_position("slider") < -0.052 or env.world.pos_tcp_world[1] < env.world.pos_fixture("slider")[1] - 0.02
    )
    env.task = dataclasses.replace(env.task, was_light_on=not has_tried_left)
    return env.expert_action()


def marks_its_wrist(env):
    """The expert that turns its wrist while the light is on, and later reads its own yaw."""
    if env.world.is_light_on:
        return np.array([0, 0, 0, 0, 0, 1, -1])
    env.task = dataclasses.replace(env.task, was_light_on=bool(abs(env.world.tilt[2]) > 0.12))
    action = env.expert_action()
    action[3:6] = 0  # the mark stays
    return action


@pytest.mark.parametrize("family", MEMORY_FAMILIES)
def test_a_pose_does_not_keep_the_cue(unseen, family):
    env, solved = unseen["franka7"], []
    for seed, is_on in [(seed, is_on) for seed in range(10) for is_on in (False, True)]:
        cued(env, seed, family, is_on)
        task, is_done = env.task, False
        for _ in range(60):
            action = marks_its_wrist(env)
            env.task = task
            is_done = env.step(action)[2]
            if is_done:
                break
        solved.append(is_done)
    assert 0.25 < np.mean(solved) <= 0.5  # of two episodes that are the same in all but the cue, never both


@pytest.mark.parametrize("family", MEMORY_FAMILIES)
def test_without_memory_half_of_the_episodes_is_all_there_is(unseen, family):
    """With the cue the expert solves all; the same expert without it solves one of the two cues of each scene."""
    env, solved = unseen["franka7"], {"with memory": [], "present alone": []}
    for seed, is_on in [(seed, is_on) for seed in range(10) for is_on in (False, True)]:
        cued(env, seed, family, is_on)
        solved["with memory"].append(solve(env, 60) is not None)
        cued(env, seed, family, is_on)
        task, is_done = env.task, False
        for _ in range(60):
            action = env.expert_action() if env.world.is_cue_shown else without_memory(env)
            env.task = task
            is_done = env.step(action)[2]
            if is_done:
                break
        solved["present alone"].append(is_done)
    assert {name: np.mean(done) for name, done in solved.items()} == {"with memory": 1.0, "present alone": 0.5}


def test_families_that_need_memory_are_not_chained_and_not_in_the_mix(unseen):
    env = unseen["franka7"]
    env.reset(seed=0)
    assert not set(MEMORY_FAMILIES) & (set(env.feasible()) | set(DEFAULT_TASKS))


def test_a_task_about_a_fixture_has_no_object():
    with pytest.raises(ValueError, match="'open_drawer' has no target object; its instruction is 'open the drawer'"):
        _ = Task("open_drawer", None, None, "open the drawer").target_object


def test_five_tasks_chain_in_one_scene(unseen):
    env = unseen["franka7"]
    env.reset(seed=4, options={"task": "open_drawer"})
    assert solve(env)
    for family in (
        "turn_off_light" if env.world.is_light_on else "turn_on_light",
        "place_in_drawer",
        "close_drawer",
        "push_left",
    ):
        before, objects = env.world.data.qpos.copy(), list(env.world.objects)
        env.reset(options={"task": family, "keep_state": True})
        assert np.array_equal(env.world.data.qpos, before) and env.world.objects == objects
        assert env.task.family == family and solve(env), family


def test_feasible_tasks_can_be_set_and_others_are_refused(unseen):
    env = unseen["franka7"]
    for seed in range(4):
        env.reset(seed=seed, options={"task": "open_drawer"})
        feasible = env.feasible()
        assert "open_drawer" in feasible and not {"close_drawer", "place_in_drawer"} & set(feasible)
        assert ("turn_on_light" in feasible) != ("turn_off_light" in feasible)
        for family in feasible:
            env.reset(options={"task": family, "keep_state": True})
            assert not TASK_FAMILIES[family].is_done(env.world, env.task), family
        with pytest.raises(ValueError, match=r"'close_drawer' is not feasible in this state; feasible are: .*open_drawer"):
            env.reset(options={"task": "close_drawer", "keep_state": True})


def test_objects_out_of_reach_are_not_asked_for(unseen):
    env = unseen["franka7"]
    env.reset(seed=0, options={"task": "stack"})
    world = env.world
    world.place_object(0, np.array([0.0, 0.0, -0.5]))  # fallen
    world.place_object(1, np.add(world.pos_handle, (-0.08, 0, 0.0)))  # in the drawer
    mujoco.mj_forward(world.model, world.data)
    for _ in range(5):
        env.reset(options={"task": "lift", "keep_state": True})
        assert env.task.target == 2
    assert not {"stack", "rotate_left"} & set(env.feasible()) or world.objects[2][1] == "cube"


def test_there_is_nothing_to_keep_in_a_new_environment():
    with pytest.raises(ValueError, match="expected a scene to keep, got a new environment; reset it once without keep_state"):
        Unseen().reset(options={"keep_state": True})


# -- settings ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def simple_view(env):
    return env.reset(seed=21, options={"task": "lift"})[0]["images"]["static"].astype(int)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name not in ("simple", "novel_description")])
def test_a_setting_changes_the_images(simple_view, setting):
    changed = Tabletop(image_size=64, setting=setting)
    image = changed.reset(seed=21, options={"task": "lift"})[0]["images"]["static"].astype(int)
    assert (np.abs(image - simple_view).max(-1) > 12).mean() > 0.01
    changed.close()


def test_the_simple_setting_is_the_default_and_changes_nothing(simple_view):
    same = Tabletop(image_size=64, setting="simple")
    assert np.array_equal(same.reset(seed=21, options={"task": "lift"})[0]["images"]["static"], simple_view)
    same.close()


def test_targets_are_of_unseen_colors_only_where_the_setting_says_so():
    for setting, colors in (("simple", COLORS), ("unseen_target", UNSEEN_COLORS)):
        env = Unseen(setting=setting)
        for seed in range(8):
            env.reset(seed=seed, options={"task": ("lift", "push_left", "stack", "rotate_left")[seed % 4]})
            assert env.world.objects[env.task.target][0] in colors


def test_distractors_and_textures_appear_only_where_the_setting_says_so():
    for setting in ("simple", "unseen_distractor", "unseen_background"):
        env = Unseen(setting=setting)
        for seed in range(4):
            env.reset(seed=seed)
            model = env.world.model
            table = model.material(int(model.geom("table").matid[0])).name
            assert (model.body("distractor0").pos[2] > 0) == (setting == "unseen_distractor")
            assert (table in ("checker", "stripe")) == (setting == "unseen_background")


def test_a_novel_description_is_a_paraphrase_in_the_same_scene(unseen):
    novel, known = Unseen(setting="novel_description"), unseen["franka7"]
    for seed in range(8):
        for env in (novel, known):
            env.reset(seed=seed, options={"task": "lift"})
        assert novel.world.objects == known.world.objects and novel.task.target == known.task.target
        assert novel.task.instruction != known.task.instruction


# -- what an action means ----------------------------------------------------------------------------------------------
def test_the_robots_differ_in_their_conventions_and_a_mixup_is_refused():
    specs = {robot: ActionSpec.from_card(f"tabletop_{robot}") for robot in ROBOTS}
    for name in ("scale", "rate_hz"):
        assert len({getattr(spec, name) for spec in specs.values()}) == 3
    assert len({(spec.action[1].open, spec.action[1].close) for spec in specs.values()}) == 3
    for robot, other in (("franka7", "ur6"), ("ur6", "small5"), ("small5", "franka7")):
        with pytest.raises(SpecMismatch, match="scale"):
            specs[robot].require_same(specs[other])


@ALL
def test_the_cards_gripper_sign_opens_and_closes(unseen, robot):
    env = unseen[robot]
    env.reset(seed=3)
    for is_open in (True, False, True):
        action = env.action_spec.set_grippers(np.zeros(7, np.float32), is_open)
        for _ in range(8):
            env.step(action)
        assert env.world.opening > 0.085 if is_open else env.world.opening < 0.02


@pytest.mark.parametrize("dim", [0, 1, 2])
@ALL
def test_one_unit_moves_the_hand_by_the_cards_scale(unseen, robot, dim):
    env = unseen[robot]
    moved = []
    for seed in range(4):
        env.reset(seed=seed)
        before = env.world.pos_tcp_world.copy()
        action = env.action_spec.set_grippers(np.zeros(7, np.float32), True)
        centre = np.array([0.0, 0.0, 0.17])
        action[dim] = np.sign(centre - before)[dim] * 1.0
        env.step(action)
        moved.append((env.world.pos_tcp_world - before) * action[dim])
    mean = np.mean(moved, axis=0)
    assert mean[dim] == pytest.approx(env.action_spec.scale[dim], rel=0.35)
    assert np.abs(np.delete(mean, dim)).max() < 0.3 * mean[dim]


def test_actions_beyond_the_range_are_clipped():
    one, other = Unseen(), Unseen()
    for env, size in ((one, 1.0), (other, 50.0)):
        env.reset(seed=2)
        env.step(np.array([size, -size, size, 0, 0, size, size]))
    assert one.world.state().tobytes() == other.world.state().tobytes()


def test_an_expert_action_is_within_the_cards_range(unseen):
    for robot, env in unseen.items():
        env.reset(seed=1)
        for _ in range(10):
            action = env.expert_action()
            assert action.dtype == np.float32 and env.action_space.contains(action), robot
            env.action_spec.check(action)
            env.step(action)


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.floats(0, 3.1))
@settings(max_examples=60, deadline=None)
def test_rotation_vectors_and_matrices_are_inverse(direction, angle):
    norm = np.linalg.norm(direction)
    rotvec = np.zeros(3) if norm < 1e-3 else np.array(direction) / norm * angle
    matrix = rotation_matrix(rotvec)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(matrix) == pytest.approx(1)
    np.testing.assert_allclose(axis_angle(matrix), rotvec, atol=1e-6)


# -- cameras -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("camera", ["static", "wrist"])
@ALL
def test_a_point_projects_to_where_it_is_drawn(robot, camera):
    """One object in a unique colour; the others are moved below the table."""
    env, errors = Tabletop(robot, image_size=128), []
    for seed in range(4):
        env.reset(seed=seed)
        world = env.world
        for i in (1, 2):
            world.place_object(i, np.array([0, 0.2 * i, -0.6]))
        forward, aside = ((0.01, 0.03), (0.01, -0.03), (0.12, 0.03), (0.12, -0.03))[seed]  # well away from the middle
        under = world.pos_tcp_world + world.controller.rotation_tcp_world[:, :2] @ (forward, aside)
        world.place_object(0, np.array([*(under[:2] if camera == "wrist" else (0.12, 0.05)), 0.024]))
        world.model.geom_rgba[world.model.geom("object0").id] = (1, 0, 1, 1)
        mujoco.mj_forward(world.model, world.data)
        image = env.image(camera).astype(int)
        is_magenta = (image[..., 0] > 120) & (image[..., 2] > 120) & (image[..., 1] < 60)
        if is_magenta.sum() < 20:
            continue  # behind the arm
        row, column = np.argwhere(is_magenta).mean(0) / 128
        errors.append(np.abs(world.project(world.pos_object(0), camera) - (column, row)).max())
    env.close()
    assert len(errors) >= 2 and np.median(errors) < 0.04


def test_headless_settings_are_made_before_mujoco_is_imported():
    code = (
        "import rvlm.envs.tabletop, os, sys; "
        "print(os.environ['LP_NUM_THREADS'], os.environ.get('MUJOCO_GL'), 'mujoco' in sys.modules)"
    )
    env = {k: v for k, v in os.environ.items() if k != "LP_NUM_THREADS"} | {"MUJOCO_GL": "osmesa"}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert printed.split() == ["0", "osmesa", "False"]
    assert rvlm.envs.FIRST_HELD_OUT_SEED == 900_000
