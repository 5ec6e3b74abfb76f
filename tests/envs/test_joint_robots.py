"""Joint targets on the tabletop: the SO-101's kinematics, inverse kinematics, and experts that succeed through them."""

import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy.spatial.transform import Rotation

from rvlm.envs.suites import load_suite
from rvlm.envs.tabletop.arm_control import axis_angle, rotation_matrix
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.joint_control import expert_joints
from rvlm.envs.tabletop.scene import SETTINGS
from rvlm.envs.tabletop.so101 import JAW_LIMITS, SO101
from rvlm.envs.tabletop.task_sampling import sample_task
from rvlm.envs.tabletop.tasks import TASK_FAMILIES
from rvlm.envs.tabletop.world import World

# The joints of the public description, from the base: origin xyz [m], rpy [rad], limits [rad]; each turns about its own z.
# Source: TheRobotStudio/SO-ARM100, Simulation/SO101/so101_new_calib.urdf, commit fda892c.
URDF = (
    ((0.0388353, 0, 0.0624), (3.14159, 0, -3.14159), (-1.91986, 1.91986)),
    ((-0.0303992, -0.0182778, -0.0542), (-1.5708, -1.5708, 0), (-1.74533, 1.74533)),
    ((-0.11257, -0.028, 0), (0, 0, 1.5708), (-1.69, 1.69)),
    ((-0.1349, 0.0052, 0), (0, 0, -1.5708), (-1.65806, 1.65806)),
    ((0, -0.0611, 0.0181), (1.5708, 0.0486795, 3.14159), (-2.74385, 2.84121)),
)
FRAME = (-0.0079, -0.000218121, -0.0981274)  # "gripper_frame_link" in the last link [m]
JAW = ((0.0202, 0.0188, -0.0234), (1.5708, 0, 0), (-0.174533, 1.74533))
POSES = ((0, 0, 0, 0, 0), (0.7, -0.4, 1.0, 0.9, 0.8), (-1.2, 1.1, -0.9, 1.5, -2.5), (0.1, -1.6, 1.6, -0.7, 2.7))


@pytest.fixture(scope="module")
def worlds():
    return {robot: World(robot, SETTINGS["simple"]) for robot in ("franka7_joint", "so101")}


def forward(angles, point):
    """A point of the last link in the base's frame, from the URDF's own numbers."""
    pos, rotation = np.zeros(3), Rotation.identity()
    for (xyz, rpy, _), angle in zip(URDF, angles, strict=True):
        pos, rotation = pos + rotation.apply(xyz), rotation * Rotation.from_euler("xyz", rpy) * Rotation.from_euler("z", angle)
    return pos + rotation.apply(point), rotation


def set_joints(world, angles):
    for i, angle in enumerate(angles):
        world.data.joint(f"joint{i}").qpos = angle
    mujoco.mj_kinematics(world.model, world.data)


@pytest.mark.parametrize("angles", POSES)
def test_the_so101_has_the_kinematics_of_its_public_description(worlds, angles):
    world = worlds["so101"]
    set_joints(world, angles)
    link = world.data.body("link4")
    pos, rotation = forward(angles, FRAME)
    ours = link.xpos + link.xmat.reshape(3, 3) @ FRAME - SO101.base
    np.testing.assert_allclose(ours, pos, atol=2e-5)
    np.testing.assert_allclose(link.xmat.reshape(3, 3), rotation.as_matrix(), atol=1e-4)


@pytest.mark.parametrize("angle", [-0.17, 0.0, 0.6, 1.7])
def test_the_jaw_turns_about_the_public_joint(worlds, angle):
    world = worlds["so101"]
    set_joints(world, POSES[1])
    world.data.joint("jaw").qpos = angle
    mujoco.mj_kinematics(world.model, world.data)
    jaw, tip = world.data.body("jaw"), (0, -0.08, 0)  # in the public frame of the jaw
    inside = Rotation.from_euler("xyz", JAW[1]) * Rotation.from_euler("z", angle)
    expected, _ = forward(POSES[1], np.add(JAW[0], inside.apply(tip)))
    np.testing.assert_allclose(jaw.xpos + jaw.xmat.reshape(3, 3) @ (0, 0, 0.08) - SO101.base, expected, atol=2e-5)


def test_the_so101_has_the_limits_of_its_public_description(worlds):
    model = worlds["so101"].model
    for i, (_, _, limits) in enumerate(URDF):
        np.testing.assert_allclose(model.joint(f"joint{i}").range, limits, atol=1e-5)
    np.testing.assert_allclose(model.joint("jaw").range, JAW[2], atol=1e-5)


def test_the_jaw_opens_wider_at_every_larger_share():
    angles = [SO101.finger_positions(share) for share in np.linspace(0, 0.7, 8)]
    assert (np.diff([SO101.gap(a) for a in angles]) > 0).all() and SO101.gap(angles[0]) < 0.01
    assert np.allclose([SO101.finger_fraction(a) for a in angles], np.linspace(0, 0.7, 8))
    assert SO101.finger_positions(1.0) == pytest.approx(JAW_LIMITS[1])


@pytest.mark.parametrize("robot", ["franka7_joint", "so101"])
def test_inverse_kinematics_inverts_forward_kinematics(worlds, robot):
    """From a start pose to targets anywhere in the workspace, hand down at any yaw that the experts use."""
    world, rng = worlds[robot], np.random.default_rng(0)
    world.randomize(rng)
    arm, workspace = world.controller, world.arm.workspace
    before = arm.joint_positions.copy()
    for _ in range(20):
        pos = rng.uniform(workspace.start_low, workspace.start_high)
        rotation = rotation_matrix(np.array([0, 0, rng.uniform(-0.5, 0.5)])) @ np.diag([1.0, -1, -1])
        angles = arm.inverse_kinematics(pos, rotation)
        np.testing.assert_array_equal(arm.joint_positions, before, "the arm itself has not moved")
        set_joints(world, angles)
        assert np.linalg.norm(arm.pos_tcp_world - pos) < 2e-3
        assert np.degrees(np.linalg.norm(axis_angle(rotation @ arm.rotation_tcp_world.T))) < 1
        set_joints(world, before)


@pytest.mark.parametrize("robot", ["franka7_joint", "so101"])
def test_joint_targets_are_reached_within_the_limits(worlds, robot):
    world = worlds[robot]
    world.randomize(np.random.default_rng(1))
    arm = world.controller
    target = arm.joint_positions + 0.1 * np.array([1, -1] * 4)[: len(arm.joint_positions)]
    for _ in range(8):
        world.move_joints(target, world.arm.open_fraction, 0.1)
    np.testing.assert_allclose(arm.joint_positions, target, atol=0.01)
    assert arm.finger_fraction == pytest.approx(world.arm.open_fraction, abs=0.03)
    world.move_joints(np.full(len(target), 9.0), 2.0, 0.1)
    limits = np.array([world.model.joint(f"joint{i}").range for i in range(len(target))])
    assert (world.data.ctrl[: len(target)] <= limits[:, 1] + 1e-9).all() and world.data.ctrl[-1] <= world.arm.finger_positions(
        1.0
    )[-1]


def solve(world, family, seed):
    """Whether the expert solves a task of a family through joint targets within 80 control steps."""
    rng, kind = np.random.default_rng(seed), TASK_FAMILIES[family]
    world.randomize(rng)
    kind.prepare(world)
    mujoco.mj_forward(world.model, world.data)
    world.begin_task(has_cue=False)
    task = sample_task(world, family, rng)
    for _ in range(80):
        positions, is_open = expert_joints(world, task)
        world.move_joints(positions, world.arm.open_fraction * is_open, 0.1)
        if kind.is_done(world, task):
            return True
    return False


@pytest.mark.parametrize("robot", ["franka7_joint", "so101"])
def test_the_expert_solves_through_joint_targets(worlds, robot):
    world = worlds[robot]
    families = world.arm.workspace.families or tuple(TASK_FAMILIES)
    failed = [(family, seed) for family in families for seed in range(2) if not solve(world, family, seed)]
    assert len(failed) <= 1, failed


# -- as environments ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def envs():
    return {robot: Tabletop(robot, image_size=32) for robot in ("franka7_joint", "so101")}


@pytest.mark.parametrize("robot", ["franka7_joint", "so101"])
def test_gymnasiums_own_checker_passes(envs, robot):
    check_env(envs[robot], skip_render_check=True)


@pytest.mark.parametrize("robot", ["franka7_joint", "so101"])
def test_the_card_has_the_limits_of_the_arm(envs, robot):
    env = envs[robot]
    ((place, joints),) = env.action_spec.action_groups("joint")
    limits = np.array([env.world.model.joint(f"joint{i}").range for i in range(len(joints.names))]).T
    low, high = (np.multiply(ends[place], joints.scale) for ends in (env.action_spec.low, env.action_spec.high))
    if joints.units[0] == "deg":
        low, high = np.radians(low), np.radians(high)
    np.testing.assert_allclose([low, high], limits, atol=1e-3)


def test_the_so101_speaks_as_lerobots_follower_does(envs):
    """Names with `.pos`, degrees with zero in the middle of the range, the gripper from 0 closed to 100 open."""
    env = envs["so101"]
    motors = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
    assert env.action_spec.names == env.action_spec.state_names == tuple(f"{motor}.pos" for motor in motors)
    assert env.action_spec.units == ("deg",) * 5 + ("%",) and not env.action_spec.is_binary.any()
    env.reset(seed=0)
    target = np.array([20, -30, 40, 60, 10, 75.0])
    for _ in range(12):
        observation, *_ = env.step(target)
    np.testing.assert_allclose(observation["state"], target, atol=1.5)
    angles = [env.world.data.joint(f"joint{i}").qpos[0] for i in range(5)]
    np.testing.assert_allclose(np.degrees(angles), observation["state"][:5], atol=1e-4)
    share = (env.world.data.joint("jaw").qpos[0] - JAW[2][0]) / (JAW[2][1] - JAW[2][0])
    assert 100 * share == pytest.approx(observation["state"][5], abs=1e-3)


def test_the_franka_moves_to_angles_in_radians_and_opens_at_1(envs):
    env = envs["franka7_joint"]
    observation, _ = env.reset(seed=0)
    target = observation["state"][:7] + np.array([0.2, -0.1, 0.1, -0.2, 0.1, -0.1, 0.3])
    for is_open, opening in ((1.0, 0.1), (-1.0, 0.0)):
        for _ in range(8):
            observation, *_ = env.step(np.array([*target, is_open]))
        np.testing.assert_allclose(observation["state"], [*target, opening], atol=0.01)


@pytest.mark.parametrize("robot", ["franka7_joint", "so101"])
def test_the_experts_actions_are_in_the_cards_range_and_solve_tasks(envs, robot):
    env = envs[robot]
    for task in env.families[:3]:
        env.reset(seed=5, options={"task": task})
        for _ in range(50):
            action = env.expert_action()
            env.action_spec.check(action)
            is_success = env.step(action)[2]
            if is_success:
                break
        assert is_success, task


def test_tasks_out_of_reach_are_refused(envs):
    with pytest.raises(KeyError, match=r"no task family 'open_drawer'; there are lift, push_left, .*turn_off_light"):
        envs["so101"].reset(seed=0, options={"task": "open_drawer"})
    envs["so101"].reset(seed=0)
    assert set(envs["so101"].feasible()) <= set(SO101.workspace.families)


@pytest.mark.parametrize("robot", ["franka7_joint", "so101"])
def test_demonstrations_are_noisy_in_the_joints_alone(robot):
    suite = load_suite(f"tabletop/{robot}")
    spec = suite.spec
    noise, is_gripper = np.multiply(suite.noise_scale, spec.scale), np.arange(spec.n_dims) == spec.n_dims - 1
    assert (noise[is_gripper] == 0).all()
    np.testing.assert_allclose(noise[~is_gripper], 0.05 if spec.units[0] == "rad" else np.degrees(0.05))
