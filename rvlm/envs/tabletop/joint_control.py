"""Joint targets of the scripted experts, through inverse kinematics."""

import numpy as np

from rvlm.envs.tabletop.arm_control import rotation_matrix
from rvlm.envs.tabletop.experts import expert_delta
from rvlm.envs.tabletop.success_conditions import Task
from rvlm.envs.tabletop.world import World

MAX_TURN = 0.2  # of the hand in one control step, about each axis [rad]


def expert_joints(world: World, task: Task) -> tuple[np.ndarray, float]:
    """The expert's joint angles (j,) [rad] for the next control step, and the fingers' share of their range."""
    shift, turn, is_open = expert_delta(world, task)
    arm = world.controller
    rotation = rotation_matrix(np.clip(turn, -MAX_TURN, MAX_TURN)) @ arm.rotation_tcp_world
    positions = arm.inverse_kinematics(arm.pos_tcp_world + np.clip(shift, -arm.arm.expert_shift, arm.arm.expert_shift), rotation)
    return positions, arm.arm.open_fraction if is_open else 0.0
