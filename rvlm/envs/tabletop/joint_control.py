"""Joint-space robots of the tabletop: what their raw actions and state mean, and the scripted expert's, by inverse kinematics."""

from typing import Any

import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.envs.tabletop.arm_control import ArmController, rotation_matrix
from rvlm.envs.tabletop.experts import expert_delta
from rvlm.envs.tabletop.success_conditions import Task
from rvlm.envs.tabletop.world import World

MAX_TURN = 0.2  # of the hand in one control step, about each axis [rad]
JOINT_NOISE = 0.05  # of demonstrations, at a noise of 1 [rad]
RADIANS = {"rad": 1.0, "deg": np.pi / 180}  # of one unit


def is_joint_space(spec: ActionSpec) -> bool:
    """Whether a robot's actions are joint targets."""
    return bool(spec.action_groups("joint"))


def _radians(units: Any) -> np.ndarray:
    """Radians of one unit of each joint (j,)."""
    return np.array([RADIANS[unit] for unit in units])


def joint_noise(spec: ActionSpec) -> tuple[float, ...]:
    """Scale of the noise of demonstrations (a,) [raw action units]; none on the gripper."""
    scale = np.zeros(spec.n_dims)
    for where, group in spec.action_groups("joint"):
        scale[where] = JOINT_NOISE / _radians(group.units) / group.scale
    return tuple(scale.tolist())


def move_joints(world: World, spec: ActionSpec, action: np.ndarray) -> None:
    """Execute a raw action (a,): joint targets, and the gripper open or closed, or at a share of its range."""
    ((_, joints),), ((_, gripper),) = spec.action_groups("joint"), spec.action_groups("gripper")
    share = float(spec.to_si(action, *gripper.names)[0]) / 100
    if gripper.is_binary:
        share = world.arm.open_fraction * bool(spec.is_open(action)[0])
    world.move_joints(spec.to_si(action, *joints.names) * _radians(joints.units), share, 1 / spec.rate_hz)


def joint_state(arm: ArmController, spec: ActionSpec) -> np.ndarray:
    """Proprioception (s,) float32 in the card's units: joint angles, and the gripper's opening [m] or share of its range [%]."""
    (_, joints), (_, gripper) = spec.placed_state
    opening = arm.opening if gripper.units[0] == "m" else 100 * float(np.clip(arm.finger_fraction, 0, 1))
    return np.array([*(arm.joint_positions / _radians(joints.units)), opening], np.float32)


def expert_joints(world: World, task: Task) -> tuple[np.ndarray, bool]:
    """The expert's joint angles (j,) [rad] for the next control step, and whether the fingers should be open."""
    shift, turn, is_open = expert_delta(world, task)
    arm = world.controller
    rotation = rotation_matrix(np.clip(turn, -MAX_TURN, MAX_TURN)) @ arm.rotation_tcp_world
    reach = arm.arm.expert_shift
    return arm.inverse_kinematics(arm.pos_tcp_world + np.clip(shift, -reach, reach), rotation), is_open


def expert_joint_action(world: World, task: Task, spec: ActionSpec) -> np.ndarray:
    """The expert's raw action (a,) float32, within the card's range."""
    positions, is_open = expert_joints(world, task)
    ((where, joints),) = spec.action_groups("joint")
    action = np.zeros(spec.n_dims)
    action[where] = positions / _radians(joints.units) / joints.scale
    return spec.set_grippers(np.clip(action, spec.low, spec.high), is_open).astype(np.float32)
