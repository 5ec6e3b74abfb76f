"""A planar robot: a V-shaped pusher that takes a puck across the table to one of three coloured regions, seen from above.

Its actions are absolute target positions, as in the task PushT (Chi et al. 2023, "Diffusion Policy", arXiv 2303.04137).
Frame: world = table; in the image x points right and y up [m].
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import mujoco
import numpy as np

from rvlm.envs.tabletop.scene import COLORS, HEAD, TEXTURES
from rvlm.envs.tabletop.scene_env import SceneEnv, Wordings

PUSHER_REACH = 0.24  # largest |x| and |y| of the pusher [m]
SPEED = 0.04  # largest move of the pusher in one control step [m]
PUCK_RADIUS, REGION_RADIUS = 0.028, 0.055  # [m]
IN_REGION = 0.04  # largest distance of the puck's centre from that of its region [m]
WALL_LENGTH, WALL_HALF, WALL_ANGLE = 0.10, 0.006, math.radians(32)  # of the V's two walls [m]; angle from its axis [rad]
SEAT = np.array([0, (PUCK_RADIUS + WALL_HALF) / math.sin(WALL_ANGLE)])  # puck's centre in the V, from its tip [m]
PUSHERS, PUCKS = ((-0.16, -0.23), (0.16, -0.20)), ((-0.08, -0.08), (0.08, -0.02))  # corners of where they start [m]
REGIONS = ("red", "green", "blue")
REGION_X, REGION_Y = (-0.15, 0.0, 0.15), (0.11, 0.16)  # x and y of the regions' centres [m]


def _slides(name: str, damping: float, friction: float) -> str:
    return "".join(
        f'<joint name="{name}_{axis}" type="slide" axis="{along}" damping="{damping}" frictionloss="{friction}"/>'
        for axis, along in (("x", "1 0 0"), ("y", "0 1 0"))
    )


def _wall(sign: int) -> str:
    x, y = sign * math.sin(WALL_ANGLE) * WALL_LENGTH / 2, math.cos(WALL_ANGLE) * WALL_LENGTH / 2
    return f"""<geom type="box" size="{WALL_HALF} {WALL_LENGTH / 2} .015" pos="{x:.6g} {y:.6g} 0"
      euler="0 0 {-sign * WALL_ANGLE:.6g}" rgba=".12 .12 .14 1" mass=".15" friction=".3 .01 .001"/>"""


def _xml() -> str:
    regions = "".join(
        f"""<body name="{color}"><geom class="ghost" type="cylinder" size="{REGION_RADIUS} .001"
        rgba="{" ".join(map(str, COLORS[color]))} 1"/></body>"""
        for color in REGIONS
    )
    servos = "".join(f'<position joint="pusher_{axis}" kp="250" kv="25"/>' for axis in "xy")
    return f"""<mujoco model="planar">{HEAD}<worldbody>
    <light name="sun" pos=".2 -.5 1.6" dir="-.1 .3 -1" diffuse=".45 .45 .45" castshadow="false"/>
    <camera name="top" pos="0 0 .68" xyaxes="1 0 0 0 1 0" fovy="45"/>
    <geom name="table" type="box" size=".4 .4 .02" pos="0 0 -.02" material="wood"/>{regions}
    <body name="puck" pos="0 0 .017">{_slides("puck", 2, 0.4)}
      <geom type="cylinder" size="{PUCK_RADIUS} .015" rgba="{" ".join(map(str, COLORS["yellow"]))} 1" mass=".1"/></body>
    <body name="pusher" pos="0 0 .017">{_slides("pusher", 1, 0)}{_wall(1)}{_wall(-1)}</body>
    </worldbody><actuator>{servos}</actuator></mujoco>"""


def _wordings(color: str) -> Wordings:
    training = (f"push the puck to the {color} region", f"move the puck onto the {color} disc")
    return Wordings(training, (f"slide the puck until it lies on {color}",))


class Planar(SceneEnv):
    """The planar pusher; see `SceneEnv`. Tasks: "push_to_red", "push_to_green", "push_to_blue".

    Example:
        >>> env = rvlm.load_suite("tabletop/planar").make()
        >>> observation, info = env.reset(seed=900_000)
        >>> observation["images"]["top"].shape, observation["state"].shape
        ((96, 96, 3), (2,))
    """

    card: ClassVar[str] = "tabletop_planar"
    wordings: ClassVar[Mapping[str, Wordings]] = {f"push_to_{color}": _wordings(color) for color in REGIONS}
    noise_scale: ClassVar[tuple[float, ...]] = (0.04, 0.04)
    time_limit: ClassVar[int] = 50

    def __init__(self, image_size: int | Sequence[int] | None = None, paraphrase: bool = False) -> None:
        super().__init__(_xml(), image_size, paraphrase)
        self._regions = [self.model.body(color).id for color in REGIONS]
        self._q = {name: self.model.joint(f"{name}_x").qposadr[0] for name in ("puck", "pusher")}
        self._light = self.model.light_diffuse[0].copy()

    def pos(self, name: str) -> np.ndarray:
        """Position (2,) [m] of the "puck" (its centre) or the "pusher" (its tip)."""
        return self.data.qpos[self._q[name] : self._q[name] + 2]

    def pos_region(self, color: str) -> np.ndarray:
        """Centre (2,) of a region [m]."""
        return self.model.body_pos[self._regions[REGIONS.index(color)], :2]

    def randomize(self, rng: np.random.Generator) -> None:
        """Sample the regions' order and places, the puck's place, the pusher's start, and the appearance."""
        self.model.body_pos[self._regions, 0] = rng.permutation(REGION_X) + rng.uniform(-0.015, 0.015, 3)
        self.model.body_pos[self._regions, 1] = rng.uniform(*REGION_Y, 3)
        self.pos("puck")[:] = rng.uniform(*PUCKS)
        self.pos("pusher")[:] = self.data.ctrl[:] = rng.uniform(*PUSHERS)
        self.model.geom("table").matid[0] = self.model.material(str(rng.choice(TEXTURES[:2]))).id
        self.model.light_diffuse[0] = self._light * rng.uniform(0.85, 1.15)
        mujoco.mj_forward(self.model, self.data)

    def control(self, action: np.ndarray) -> None:
        """Move the pusher towards the target (2,) [m], at most `SPEED` in one control step."""
        step = self.action_spec.to_si(action) - self.pos("pusher")
        self.data.ctrl[:] = self.pos("pusher") + step * min(1.0, SPEED / max(1e-9, float(np.linalg.norm(step))))
        mujoco.mj_step(self.model, self.data, nstep=round(1 / self.action_spec.rate_hz / self.model.opt.timestep))

    def state(self) -> np.ndarray:
        """Position (2,) of the pusher's tip [m], float32."""
        return self.pos("pusher").astype(np.float32)

    def _is_in(self, color: str) -> bool:
        return bool(np.linalg.norm(self.pos("puck") - self.pos_region(color)) < IN_REGION)

    def is_done(self) -> bool:
        """Whether the puck's centre lies in the task's region."""
        return self._is_in(self.task.removeprefix("push_to_"))

    def failure(self) -> str:
        """The kind of failure: "wrong region" if the puck lies in another one, else "timed out"."""
        return "wrong region" if any(map(self._is_in, REGIONS)) else "timed out"

    def expert_action(self) -> np.ndarray:
        """Target (2,): below the puck, up until it lies in the V, then with it towards the region."""
        target = _next_target(self.pos("pusher"), self.pos("puck"), self.pos_region(self.task.removeprefix("push_to_")))
        return np.clip(target, self.action_space.low, self.action_space.high).astype(np.float32)


def _next_target(tip: np.ndarray, puck: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Where the expert moves the V's tip next (2,) [m]."""
    x, y = puck - tip - SEAT  # of the puck, from its seat
    if abs(x) < 0.012 and y < 0.008:
        way = goal - puck
        return tip + way * min(1.0, SPEED / max(1e-9, float(np.linalg.norm(way))))
    is_below = y > 0.03
    if abs(x) < 0.02 and (is_below or y > -0.01):
        return puck - SEAT  # up, around the puck
    if not is_below and abs(x) < 0.07:
        return tip - np.array([0, SPEED])
    return np.array([puck[0], puck[1] - SEAT[1] - 0.05])
