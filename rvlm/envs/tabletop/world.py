"""The simulated world: one MuJoCo model of scene and arm, and its true state.

Tasks, experts and question generators read the true state here; policies never do.
"""

import mujoco
import numpy as np

from rvlm.envs.tabletop.robosuite_arms import ROBOTS
from rvlm.envs.tabletop.scene import (
    COLORS,
    HALF,
    N_DISTRACTORS,
    N_OBJECTS,
    SHAPES,
    TEXTURES,
    UNSEEN_COLORS,
    Setting,
    scene_xml,
)

TOOL_DOWN = np.diag([1.0, -1.0, -1.0])  # rotation of the hand that points straight down, world frame
WORKSPACE_LOW = np.array([-0.26, -0.37, 0.012])  # of the tool centre point [m]
WORKSPACE_HIGH = np.array([0.22, 0.36, 0.40])
OBJECTS_LOW, OBJECTS_HIGH = np.array([-0.10, -0.115]), np.array([0.15, 0.165])  # where objects start [m]
_GEOM = {"cube": mujoco.mjtGeom.mjGEOM_BOX, "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER, "ball": mujoco.mjtGeom.mjGEOM_SPHERE}


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


class World:
    """Scene, arm and inverse kinematics.

    Args:
        robot: One of `ROBOTS`.
        setting: Domain shifts; they take effect at the next `randomize`.

    Attributes:
        objects: Colour and shape of each object, as words.
        is_light_on: Whether the button has switched the light on.
        is_cue_shown: Whether the cue of a memory task is still shown; the robot is then held still.
        first_side: Side to which the slider was moved first in this task: -1 for left, 1 for right, 0 for none yet.
    """

    def __init__(self, robot: str, setting: Setting) -> None:
        if robot not in ROBOTS:
            raise KeyError(f"no robot {robot!r} on the tabletop; there are {', '.join(ROBOTS)}")
        self.arm, self.setting = ROBOTS[robot], setting
        self.model = mujoco.MjModel.from_xml_string(scene_xml(self.arm))
        self.data = mujoco.MjData(self.model)
        self.objects: list[tuple[str, str]] = []
        self.is_light_on = self._is_button_armed = False
        self.begin_task(has_cue=False)
        self._index()

    def _index(self) -> None:
        model = self.model
        joints = [model.joint(f"joint{i}") for i in range(model.nu - 2)]  # two servos are the fingers'
        self._q = np.array([j.qposadr[0] for j in joints])
        self._dofs = np.array([j.dofadr[0] for j in joints])
        self._limits = np.array([j.range for j in joints]).T
        self._fingers = np.array([model.joint(f"finger_{s}").qposadr[0] for s in ("left", "right")])
        self._object_q = np.array([model.joint(f"object{i}").qposadr[0] for i in range(N_OBJECTS)])
        self._object_v = np.array([model.joint(f"object{i}").dofadr[0] for i in range(N_OBJECTS)])
        self._object_geoms = [model.geom(f"object{i}").id for i in range(N_OBJECTS)]
        self._fixture_q = {n: model.joint(n).qposadr[0] for n in ("drawer", "button", "slider")}
        self._tcp, self._handle = model.site("tcp").id, model.site("handle").id
        self._bodies = {n: model.body(n).id for n in ("cabinet", "switch", "button", "rail", "slider", "zone")}
        self._jacobian = np.zeros((6, model.nv))
        self._camera = model.camera("static").id
        self._defaults = {n: getattr(model, n).copy() for n in ("light_diffuse", "light_pos", "cam_pos")}
        self._body_pos = model.body_pos.copy()

    # -- reading the true state -------------------------------------------------------------------------------------------
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
        return float(self.data.qpos[self._fingers].sum())

    def state(self) -> np.ndarray:
        """Proprioception (7,): tool centre point [m], tilt [rad], finger distance [m]; world frame."""
        return np.concatenate([self.pos_tcp_world, self.tilt, [self.opening]]).astype(np.float32)

    def pos_object(self, i: int) -> np.ndarray:
        """Position (3,) of object `i` [m], world frame."""
        return self.data.qpos[self._object_q[i] : self._object_q[i] + 3]

    def yaw_object(self, i: int) -> float:
        """Rotation of object `i` about the vertical [rad]."""
        w, x, y, z = self.data.qpos[self._object_q[i] + 3 : self._object_q[i] + 7]
        return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))

    @property
    def pos_handle(self) -> np.ndarray:
        """Position (3,) of the drawer's handle [m], world frame."""
        return self.data.site_xpos[self._handle]

    def pos_fixture(self, name: str) -> np.ndarray:
        """Position (3,) of "cabinet", "button", "slider", "rail" or "zone" [m], world frame."""
        return self.data.xpos[self._bodies[name]]

    def joint_position(self, name: str) -> float:
        """Joint position of "drawer" (0 shut), "button" (0 released) or "slider" (0 middle, positive along y) [m]."""
        return float(self.data.qpos[self._fixture_q[name]])

    def project(self, pos_world: np.ndarray, camera: str = "static") -> np.ndarray:
        """Projection of a point (3,) [m] into a camera's image: (column, row) in [0, 1], origin top left."""
        cam = self.model.camera(camera).id
        x, y, z = self.data.cam_xmat[cam].reshape(3, 3).T @ (pos_world - self.data.cam_xpos[cam])
        focal = 0.5 / np.tan(np.deg2rad(self.model.cam_fovy[cam]) / 2)
        depth = max(-z, 1e-6)
        return np.array([0.5 + focal * x / depth, 0.5 - focal * y / depth])

    def begin_task(self, has_cue: bool) -> None:
        """Reset what depends on the task: its cue is shown if it has one, and the slider has not been moved yet."""
        self.is_cue_shown, self.first_side = has_cue, 0

    # -- randomizing the scene ------------------------------------------------------------------------------------------
    def randomize(self, rng: np.random.Generator) -> None:
        """Sample a new scene: fixtures, objects, appearance and the arm's start pose, all from `rng`."""
        mujoco.mj_resetData(self.model, self.data)
        self.model.body_pos[:] = self._body_pos
        self.is_light_on, self._is_button_armed = bool(rng.random() < 0.5), True
        self._randomize_fixtures(rng)
        self._randomize_objects(rng)
        self._randomize_appearance(rng)
        self._show_light()
        mujoco.mj_forward(self.model, self.data)
        self.start_arm(rng)
        mujoco.mj_step(self.model, self.data, nstep=4)

    def _randomize_fixtures(self, rng: np.random.Generator) -> None:
        spread = {"cabinet": (0.025, 0.02), "switch": (0.07, 0.02), "rail": (0.01, 0.03)}
        for name, (dx, dy) in spread.items():
            self.model.body_pos[self._bodies[name], :2] += rng.uniform((-dx, -dy), (dx, dy))
        self.set_joint_position("drawer", rng.choice((0.0, 0.105)))
        self.set_joint_position("slider", rng.uniform(-0.08, 0.08))

    def _randomize_objects(self, rng: np.random.Generator) -> None:
        colors = UNSEEN_COLORS if self.setting.target else COLORS
        words = [str(c) for c in rng.permutation(list(colors))[:N_OBJECTS]]
        words += [str(c) for c in rng.permutation(list(COLORS))[: N_OBJECTS - len(words)]]
        self.objects = [(c, str(rng.choice(SHAPES))) for c in words]
        spots = self._spots(rng, N_OBJECTS + 1)
        for i, (color, shape) in enumerate(self.objects):
            self.set_appearance(i, color, shape)
            yaw = rng.uniform(-0.4, 0.4)
            self.place_object(i, np.array([*spots[i], HALF]), yaw)
        self.model.body_pos[self._bodies["zone"], :2] = spots[-1]
        for i in range(N_DISTRACTORS):
            body = self.model.body(f"distractor{i}").id
            self.model.body_pos[body] = (
                (rng.uniform(-0.1, 0.14), (-0.15, 0.19)[i], 0.02) if self.setting.distractors else (0, 0, -1)
            )

    def _spots(self, rng: np.random.Generator, n: int, gap: float = 0.1) -> list[np.ndarray]:
        """`n` positions (2,) [m] at least `gap` apart, by rejection sampling with restarts."""
        while True:
            spots: list[np.ndarray] = []
            for _ in range(60):
                spot = rng.uniform(OBJECTS_LOW, OBJECTS_HIGH)
                if all(np.linalg.norm(spot - other) > gap for other in spots):
                    spots.append(spot)
                if len(spots) == n:
                    return spots

    def set_appearance(self, i: int, color: str, shape: str) -> None:
        """Give object i a colour and a shape."""
        geom = self._object_geoms[i]
        self.model.geom_type[geom] = _GEOM[shape]
        self.model.geom_condim[geom] = 6 if shape == "ball" else 4  # rolling friction stops a ball
        self.model.geom_rgba[geom, :3] = {**COLORS, **UNSEEN_COLORS}[color]

    def _randomize_appearance(self, rng: np.random.Generator) -> None:
        model, setting = self.model, self.setting
        for name, value in self._defaults.items():
            getattr(model, name)[:] = value
        texture = TEXTURES[int(rng.integers(2)) + (2 if setting.background else 0)]
        model.geom("table").matid[0] = model.material(texture).id
        model.light_diffuse[0] *= rng.uniform(0.3, 2.0) if setting.lighting else rng.uniform(0.85, 1.15)
        if setting.lighting:
            model.light_pos[0, :2] = rng.uniform(-0.8, 0.8, 2)
        model.cam_pos[self._camera] += rng.uniform(-1, 1, 3) * setting.camera_shift

    def place_object(self, i: int, pos_world: np.ndarray, yaw: float = 0.0) -> None:
        """Put object `i` at `pos_world` (3,) [m], at rest, rotated by `yaw` [rad]."""
        adr, vel = self._object_q[i], self._object_v[i]
        self.data.qpos[adr : adr + 7] = [*pos_world, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        self.data.qvel[vel : vel + 6] = 0

    def set_joint_position(self, name: str, value: float) -> None:
        """Set the joint position [m] of "drawer", "button" or "slider"."""
        self.data.qpos[self._fixture_q[name]] = value

    def set_light(self, is_on: bool) -> None:
        """Switch the light on or off."""
        self.is_light_on = is_on
        self._show_light()

    # -- the arm -------------------------------------------------------------------------------------------------
    def start_arm(self, rng: np.random.Generator) -> None:
        """Put the arm above the table, hand down within a few degrees, fingers open or closed."""
        self.data.qpos[self._q] = self.arm.home
        out = self.setting.start_spread
        self.target_pos = rng.uniform(np.array((-0.12, -0.18, 0.10)) - out, np.array((0.16, 0.18, 0.24)) + out)
        self.target_rotation = rotation_matrix(rng.normal(0, (0.02, 0.02, 0.1))) @ TOOL_DOWN
        for _ in range(60):
            mujoco.mj_kinematics(self.model, self.data)
            mujoco.mj_comPos(self.model, self.data)
            before, self.data.qpos[self._q] = self.data.qpos[self._q], self._solve()
            if np.abs(self.data.qpos[self._q] - before).max() < 1e-3:
                break
        is_open = bool(rng.random() < 0.7)
        self.data.qpos[self._fingers] = self.arm.opening if is_open else 0.0
        self.data.ctrl[: len(self._q)] = self.data.qpos[self._q]
        self.data.ctrl[len(self._q) :] = self.arm.opening if is_open else 0.0
        mujoco.mj_forward(self.model, self.data)

    def _solve(self) -> np.ndarray:
        """One damped-least-squares step towards the target pose; new joint angles [rad] within their limits."""
        mujoco.mj_jacSite(self.model, self.data, self._jacobian[:3], self._jacobian[3:], self._tcp)
        jacobian = self._jacobian[:, self._dofs]
        error = np.concatenate(
            [self.target_pos - self.pos_tcp_world, axis_angle(self.target_rotation @ self.rotation_tcp_world.T)]
        )
        step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 4e-4 * np.eye(6), error)
        return np.clip(self.data.qpos[self._q] + np.clip(step, -0.4, 0.4), *self._limits)

    def move(self, delta_pos: np.ndarray, delta_rotvec: np.ndarray, is_open: bool, duration_s: float) -> None:
        """Move by `delta_pos` [m] and `delta_rotvec` [rad], world frame; simulate `duration_s`.

        The position target starts from the measured position, so that it does not wind up when the arm is blocked; the rotation
        target from the last target, so that contacts do not rotate the hand permanently.
        """
        self.target_pos = np.clip(self.pos_tcp_world + delta_pos, WORKSPACE_LOW, WORKSPACE_HIGH)
        self.target_rotation = rotation_matrix(delta_rotvec) @ self.target_rotation
        self.data.ctrl[len(self._q) :] = self.arm.opening if is_open else 0.0
        n_steps = max(2, round(duration_s / self.model.opt.timestep))
        for part in (n_steps // 2, n_steps - n_steps // 2):
            self.data.ctrl[: len(self._q)] = self._solve()
            mujoco.mj_step(self.model, self.data, nstep=part)
        self._update_button()

    def hold(self, duration_s: float) -> None:
        """Hold the pose and the fingers' last command; simulate `duration_s`."""
        self.move(np.zeros(3), np.zeros(3), bool(self.data.ctrl[-1] > 0), duration_s)

    def _update_button(self) -> None:
        """Toggle the light once per press of the button."""
        pressed = self.joint_position("button")
        if self._is_button_armed and pressed > 0.008:
            self.set_light(not self.is_light_on)
        self._is_button_armed = pressed < (0.004 if not self._is_button_armed else 0.008)

    def _show_light(self) -> None:
        self.model.geom("light").rgba[:] = (1.0, 0.95, 0.25, 1) if self.is_light_on else (0.18, 0.18, 0.16, 1)
