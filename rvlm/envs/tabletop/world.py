"""The simulated world: one MuJoCo model of scene and arm, and its true state.

Tasks, experts and question generators read the true state here; policies never do.
"""

import mujoco
import numpy as np

from rvlm.envs.tabletop.arm_control import ArmController, simulate
from rvlm.envs.tabletop.robosuite_arms import ROBOTS
from rvlm.envs.tabletop.scene import (
    COLORS,
    N_DISTRACTORS,
    N_OBJECTS,
    SHAPES,
    TEXTURES,
    UNSEEN_COLORS,
    Setting,
    scene_xml,
)

_GEOM = {"cube": mujoco.mjtGeom.mjGEOM_BOX, "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER, "ball": mujoco.mjtGeom.mjGEOM_SPHERE}


class World:
    """Scene and arm.

    Args:
        robot: One of `ROBOTS`.
        setting: Domain shifts; they take effect at the next `randomize`.

    Attributes:
        objects: Colour and shape of each object, as words.
        half: Half the size of every object [m].
        is_light_on: Whether the button has switched the light on.
        is_cue_shown: Whether the cue of a memory task is still shown; the robot is then held still.
        first_side: Side to which the slider was moved first in this task: -1 for left, 1 for right, 0 for none yet.
    """

    def __init__(self, robot: str, setting: Setting) -> None:
        if robot not in ROBOTS:
            raise KeyError(f"no robot {robot!r} on the tabletop; there are {', '.join(ROBOTS)}")
        self.arm, self.setting = ROBOTS[robot], setting
        self.half = self.arm.workspace.half
        self.model = mujoco.MjModel.from_xml_string(scene_xml(self.arm))
        for name, pos in self.arm.workspace.fixtures.items():
            self.model.body(name).pos[:2] = pos
        self.data = mujoco.MjData(self.model)
        self.objects: list[tuple[str, str]] = []
        self.is_light_on = self._is_button_armed = False
        self.begin_task(has_cue=False)
        self._index()

    def _index(self) -> None:
        model = self.model
        self.controller = ArmController(
            model, self.data, self.arm, np.array(self.arm.workspace.low), np.array(self.arm.workspace.high)
        )
        self._object_q = np.array([model.joint(f"object{i}").qposadr[0] for i in range(N_OBJECTS)])
        self._object_v = np.array([model.joint(f"object{i}").dofadr[0] for i in range(N_OBJECTS)])
        self._object_geoms = [model.geom(f"object{i}").id for i in range(N_OBJECTS)]
        self._fixture_q = {n: model.joint(n).qposadr[0] for n in ("drawer", "button", "slider")}
        self._handle = model.site("handle").id
        self._bodies = {n: model.body(n).id for n in ("cabinet", "switch", "button", "rail", "slider", "zone")}
        self._camera = model.camera("static").id
        self._defaults = {n: getattr(model, n).copy() for n in ("light_diffuse", "light_pos", "cam_pos")}
        self._body_pos = model.body_pos.copy()

    # -- reading the true state -------------------------------------------------------------------------------------------
    @property
    def pos_tcp_world(self) -> np.ndarray:
        """Tool centre point between the fingertips (3,) [m]."""
        return self.controller.pos_tcp_world

    @property
    def tilt(self) -> np.ndarray:
        """Axis-angle (3,) [rad] of the hand relative to pointing straight down, world frame."""
        return self.controller.tilt

    @property
    def opening(self) -> float:
        """Distance between the fingers [m]."""
        return self.controller.opening

    def state(self) -> np.ndarray:
        """Proprioception (7,) of the arm, see `ArmController.state`."""
        return self.controller.state()

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
        spots = self._spots(rng, N_OBJECTS + 1, self.arm.workspace.gap)
        for i, (color, shape) in enumerate(self.objects):
            self.set_appearance(i, color, shape)
            yaw = rng.uniform(-self.arm.workspace.yaw, self.arm.workspace.yaw)
            self.place_object(i, np.array([*spots[i], self.half]), yaw)
        self.model.body_pos[self._bodies["zone"], :2] = spots[-1]
        for i in range(N_DISTRACTORS):
            body = self.model.body(f"distractor{i}").id
            self.model.body_pos[body] = (
                (rng.uniform(-0.1, 0.14), (-0.15, 0.19)[i], 0.02) if self.setting.distractors else (0, 0, -1)
            )

    def _spots(self, rng: np.random.Generator, n: int, gap: float) -> list[np.ndarray]:
        """`n` positions (2,) [m] at least `gap` apart, by rejection sampling with restarts."""
        while True:
            spots: list[np.ndarray] = []
            for _ in range(60):
                spot = rng.uniform(self.arm.workspace.objects_low, self.arm.workspace.objects_high)
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
        out, workspace = self.setting.start_spread, self.arm.workspace
        self.controller.start(rng, np.array(workspace.start_low) - out, np.array(workspace.start_high) + out, is_open=None)
        mujoco.mj_forward(self.model, self.data)

    def move(self, delta_pos: np.ndarray, delta_rotvec: np.ndarray, is_open: bool, duration_s: float) -> None:
        """Move by `delta_pos` [m] and `delta_rotvec` [rad], world frame; simulate `duration_s`."""
        self.controller.set_target(delta_pos, delta_rotvec, is_open)
        simulate([self.controller], duration_s)
        self._update_button()

    def move_joints(self, positions: np.ndarray, finger_fraction: float, duration_s: float) -> None:
        """Move to joint angles (j,) [rad] and the fingers to a share of their range; simulate `duration_s`."""
        self.controller.set_joint_target(positions, finger_fraction)
        simulate([self.controller], duration_s)
        self._update_button()

    def hold(self, duration_s: float) -> None:
        """Hold the pose and the fingers' last command; simulate `duration_s`."""
        self.move(np.zeros(3), np.zeros(3), self.controller.is_commanded_open, duration_s)

    def _update_button(self) -> None:
        """Toggle the light once per press of the button."""
        pressed = self.joint_position("button")
        if self._is_button_armed and pressed > 0.008:
            self.set_light(not self.is_light_on)
        self._is_button_armed = pressed < (0.004 if not self._is_button_armed else 0.008)

    def _show_light(self) -> None:
        self.model.geom("light").rgba[:] = (1.0, 0.95, 0.25, 1) if self.is_light_on else (0.18, 0.18, 0.16, 1)
