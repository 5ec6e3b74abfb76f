"""Control of a simulated arm: inverse kinematics of its hand's pose, joint targets, finger commands, and proprioception.

A scene may hold several arms; the names of an arm's joints, sites and servos then begin with its prefix.
"""

from collections.abc import Sequence

import mujoco
import numpy as np

from rvlm.envs.tabletop.arms import Arm

TOOL_DOWN = np.diag([1.0, -1.0, -1.0])  # rotation of the hand that points straight down, world frame


def rotation_matrix(rotvec: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3) of an axis-angle vector [rad] (Rodrigues' formula)."""
    angle = float(np.linalg.norm(rotvec))
    if angle < 1e-9:
        return np.eye(3)
    x, y, z = np.asarray(rotvec) / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def axis_angle(matrix: np.ndarray) -> np.ndarray:
    """Axis-angle vector (3,) [rad] of a rotation matrix; inverse of `rotation_matrix` for angles below pi."""
    skew = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    sine, cosine = np.linalg.norm(skew) / 2, (np.trace(matrix) - 1) / 2
    return skew / 2 if sine < 1e-9 else skew / (2 * sine) * np.arctan2(sine, cosine)


class ArmController:
    """One arm in a MuJoCo model.

    Args:
        model, data: The simulation.
        arm: The embodiment.
        workspace_low, workspace_high: Limits (3,) of the tool centre point's target [m], world frame.
        prefix: Of the arm's names in the model.

    Attributes:
        target_pos, target_rotation: Target pose of the hand: (3,) [m] and a rotation matrix (3, 3), world frame.
        is_commanded_open: The fingers' last command.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        arm: Arm,
        workspace_low: np.ndarray,
        workspace_high: np.ndarray,
        prefix: str = "",
    ) -> None:
        self.model, self.data, self.arm = model, data, arm
        self.workspace_low, self.workspace_high = workspace_low, workspace_high
        joints = [model.joint(f"{prefix}joint{i}") for i in range(len(arm.home))]
        fingers = [model.joint(f"{prefix}{name}") for name in arm.finger_joints]
        self._q, self._fingers = (np.array([j.qposadr[0] for j in group]) for group in (joints, fingers))
        self._dofs, self._limits = np.array([j.dofadr[0] for j in joints]), np.array([j.range for j in joints]).T
        servo_of = {int(joint): servo for servo, (joint, _) in enumerate(model.actuator_trnid)}
        self._servos, self._finger_servos = ([servo_of[j.id] for j in group] for group in (joints, fingers))
        self._tcp = model.site(f"{prefix}tcp").id
        self._jacobian, self._imagined = np.zeros((6, model.nv)), mujoco.MjData(model)
        self._joint_target: np.ndarray | None = None
        self.target_pos, self.target_rotation, self.is_commanded_open = np.zeros(3), TOOL_DOWN, True

    @property
    def pos_tcp_world(self) -> np.ndarray:
        """Tool centre point between the fingertips (3,) [m]."""
        return self.data.site_xpos[self._tcp]

    @property
    def rotation_tcp_world(self) -> np.ndarray:
        """Rotation matrix (3, 3) of the hand in the world frame; its z points out of the fingers."""
        return self.data.site_xmat[self._tcp].reshape(3, 3)

    @property
    def tilt(self) -> np.ndarray:
        """Axis-angle (3,) [rad] of the hand relative to pointing straight down, world frame."""
        return axis_angle(self.rotation_tcp_world @ TOOL_DOWN.T)

    @property
    def opening(self) -> float:
        """Distance between the fingers [m]."""
        return self.arm.gap(self.data.qpos[self._fingers])

    @property
    def joint_positions(self) -> np.ndarray:
        """Joint angles (j,) [rad]."""
        return self.data.qpos[self._q]

    @property
    def finger_fraction(self) -> float:
        """Share of the gripper's range: 0 closed, 1 fully open."""
        return self.arm.finger_fraction(self.data.qpos[self._fingers])

    def state(self) -> np.ndarray:
        """Proprioception (7,): tool centre point [m], tilt [rad], finger distance [m]; world frame."""
        return np.concatenate([self.pos_tcp_world, self.tilt, [self.opening]]).astype(np.float32)

    def start(self, rng: np.random.Generator, low: np.ndarray, high: np.ndarray, is_open: bool | None) -> None:
        """Put the hand at a position between `low` and `high` (3,) [m], pointing down within a few degrees.

        Fingers open or closed as `is_open` says; None: seven times of ten open.
        """
        self.data.qpos[self._q] = self.arm.home
        self.target_pos = rng.uniform(low, high)
        self.target_rotation = rotation_matrix(rng.normal(0, (0.02, 0.02, 0.1))) @ TOOL_DOWN
        self.update_tcp()
        self._approach(self.data, 60, 1e-3)
        self._command_fingers(bool(rng.random() < 0.7) if is_open is None else is_open)
        self.data.qpos[self._fingers] = self.data.ctrl[self._finger_servos]
        self.data.ctrl[self._servos] = self.data.qpos[self._q]
        self.update_tcp()

    def _approach(self, data: mujoco.MjData, n_steps: int, tolerance: float) -> None:
        """Set the joints to the target pose, in steps of `_solve` until they change by less than `tolerance` [rad]."""
        for _ in range(n_steps):
            mujoco.mj_kinematics(self.model, data)
            mujoco.mj_comPos(self.model, data)
            before, data.qpos[self._q] = data.qpos[self._q], self._solve(data)
            if np.abs(data.qpos[self._q] - before).max() < tolerance:
                break

    def _solve(self, data: mujoco.MjData) -> np.ndarray:
        """One damped-least-squares step towards the target pose; new joint angles [rad] within their limits."""
        mujoco.mj_jacSite(self.model, data, self._jacobian[:3], self._jacobian[3:], self._tcp)
        jacobian, rotation = self._jacobian[:, self._dofs], data.site_xmat[self._tcp].reshape(3, 3)
        error = np.concatenate([self.target_pos - data.site_xpos[self._tcp], axis_angle(self.target_rotation @ rotation.T)])
        step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 4e-4 * np.eye(6), error)
        return np.clip(data.qpos[self._q] + np.clip(step, -0.4, 0.4), *self._limits)

    def inverse_kinematics(self, pos: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """Joint angles (j,) [rad], near the present ones, of the hand at `pos` (3,) [m] with `rotation` (3, 3), world frame."""
        self.target_pos, self.target_rotation = np.clip(pos, self.workspace_low, self.workspace_high), rotation
        self._imagined.qpos[:] = self.data.qpos
        self._approach(self._imagined, 20, 1e-4)
        return self._imagined.qpos[self._q]

    def update_tcp(self) -> None:
        """Move the tool centre point where the fingers' positions put it, if it moves with them."""
        pos = self.arm.pos_tcp(self.data.qpos[self._fingers])
        if not np.allclose(pos, self.model.site_pos[self._tcp], atol=1e-5):
            self.model.site_pos[self._tcp] = pos
            mujoco.mj_kinematics(self.model, self.data)
            mujoco.mj_comPos(self.model, self.data)

    def set_joint_target(self, positions: np.ndarray, finger_fraction: float) -> None:
        """Command joint angles (j,) [rad] and the fingers at a share of their range, within the limits."""
        self._joint_start, self._joint_target = self.data.ctrl[self._servos], np.clip(positions, *self._limits)
        self.data.ctrl[self._finger_servos] = self.arm.finger_positions(np.clip(finger_fraction, 0, 1))
        self.is_commanded_open = finger_fraction > self.arm.open_fraction / 2

    def set_target(self, delta_pos: np.ndarray, delta_rotvec: np.ndarray, is_open: bool) -> None:
        """Set the target pose by `delta_pos` [m] and `delta_rotvec` [rad], world frame, and command the fingers.

        The position target starts from the measured position, so that it does not wind up when the arm is blocked; the rotation
        target from the last target, so that contacts do not rotate the hand permanently.
        """
        self.target_pos = np.clip(self.pos_tcp_world + delta_pos, self.workspace_low, self.workspace_high)
        self.target_rotation, self._joint_target = rotation_matrix(delta_rotvec) @ self.target_rotation, None
        self._command_fingers(is_open)

    def _command_fingers(self, is_open: bool) -> None:
        self.is_commanded_open = is_open
        self.data.ctrl[self._finger_servos] = self.arm.finger_positions(self.arm.open_fraction if is_open else 0.0)

    @property
    def n_servo_steps(self) -> int:
        """How often the servos are commanded in one control step."""
        return 2 if self._joint_target is None else 5

    def servo(self, share: float) -> None:
        """Command the joints: one step of inverse kinematics towards the target pose, or `share` of the way to their target.

        Joint targets are approached evenly over the control step, as a motor with a speed limit does.
        """
        if self._joint_target is None:
            self.data.ctrl[self._servos] = self._solve(self.data)
        else:
            self.data.ctrl[self._servos] = self._joint_start + share * (self._joint_target - self._joint_start)


def simulate(arms: Sequence[ArmController], duration_s: float) -> None:
    """Move all arms of one model towards their targets for `duration_s`, and command their servos several times."""
    model, data = arms[0].model, arms[0].data
    n_parts = max(arm.n_servo_steps for arm in arms)
    ends = np.linspace(0, max(n_parts, round(duration_s / model.opt.timestep)), n_parts + 1).astype(int)
    for i, n_steps in enumerate(np.diff(ends)):
        for arm in arms:
            arm.servo((i + 1) / n_parts)
        mujoco.mj_step(model, data, nstep=int(n_steps))
        for arm in arms:
            arm.update_tcp()
