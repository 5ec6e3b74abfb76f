"""Two arms side by side, each with a block of its own, and a bar between them that only both can lift.

Frame: world = table; x away from the robot, y to its left [m]. Left and right are the robot's, and those of the static camera,
which looks over its shoulders.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import mujoco
import numpy as np

from rvlm.envs.tabletop.arm_control import ArmController, simulate
from rvlm.envs.tabletop.arms import SMALL5, _text, actuator_xml, arm_xml
from rvlm.envs.tabletop.experts import Command, delta_to, raise_object
from rvlm.envs.tabletop.scene import COLORS, HALF, HEAD, TEXTURES, look_at
from rvlm.envs.tabletop.scene_env import SceneEnv, Wordings
from rvlm.envs.tabletop.success_conditions import is_held

SIDES = {"left": 1.0, "right": -1.0}  # sign of y
ARMS_OF_SIDES = {
    "left": dataclasses.replace(SMALL5, base=(-0.42, 0.24, 0)),
    "right": dataclasses.replace(SMALL5, base=(-0.42, -0.24, 0), rgba=(0.25, 0.55, 0.75, 1)),
}
BLOCK, KNOB = 0, 1  # objects of each arm: its block, and its end of the bar
KNOB_Y = 0.15  # distance of the bar's knobs from its middle [m]
LIFTED, HELD_HEIGHT = 0.05, 0.08  # heights of an object that counts as lifted, and at which the expert holds it [m]
DISTURBED = 0.025  # motion of an object that should stay [m]
WORKSPACE = ((-0.26, -0.02, 0.012), (0.22, 0.36, 0.40))  # corners of the left arm's workspace [m]; the right one's is mirrored
STARTS = ((-0.04, 0.11, 0.10), (0.10, 0.21, 0.17))  # of the left hand [m]
BLOCKS = ((-0.02, 0.11), (0.10, 0.21))  # x and y where the left block starts [m]
BARS = ((-0.175, -0.02, -0.06), (-0.145, 0.02, 0.06))  # x, y [m] and yaw [rad] where the bar starts
CAMERA_POS, CAMERA_TARGET = (-0.66, 0, 0.80), (-0.05, 0, 0.03)

WORDINGS = {
    "lift_left": Wordings(("lift the left block", "pick up the block on the left"), ("raise the block at the left",)),
    "lift_right": Wordings(("lift the right block", "pick up the block on the right"), ("raise the block at the right",)),
    "lift_both": Wordings(("lift both blocks", "pick up the two blocks"), ("raise the blocks with both arms",)),
    "lift_bar": Wordings(("lift the bar", "pick up the white bar"), ("raise the bar with both arms",)),
}


def _block_xml(side: str) -> str:
    return f"""<body name="{side}_block" pos="0 {0.15 * SIDES[side]} {HALF}"><freejoint name="{side}_block"/>
    <geom name="{side}_block" type="box" size="{HALF} {HALF} {HALF}" mass=".05" friction="1.5 .02 .004" condim="4"/></body>"""


def _bar_xml() -> str:
    knobs = "".join(
        f"""<geom type="box" size=".018 .018 .020" pos="0 {KNOB_Y * sign} .028" rgba=".1 .1 .1 1" mass=".02" friction="2 .05 .001"
        condim="4"/><site name="{side}_knob" pos="0 {KNOB_Y * sign} .028" size=".003" rgba="0 0 0 0"/>"""
        for side, sign in SIDES.items()
    )
    bar = f'<geom type="box" size=".018 {KNOB_Y + 0.03} .008" rgba=".93 .93 .95 1" mass=".08"/>'
    return f'<body name="bar" pos="0 0 .008"><freejoint name="bar"/>{bar}{knobs}</body>'


def _named(xml: str, side: str) -> str:
    """MJCF text of one arm with the side before all of its names."""
    return re.sub(r'\b(name|joint)="', rf'\1="{side}_', xml)


def _xml() -> str:
    camera = f'pos="{_text(CAMERA_POS)}" xyaxes="{look_at(CAMERA_POS, CAMERA_TARGET)}" fovy="38"'
    arms, servos = ("".join(_named(part(arm), side) for side, arm in ARMS_OF_SIDES.items()) for part in (arm_xml, actuator_xml))
    return f"""<mujoco model="two_arms">{HEAD}<worldbody>
    <light name="sun" pos=".2 -.5 1.6" dir="-.1 .3 -1" diffuse=".45 .45 .45" castshadow="false"/><camera name="static" {camera}/>
    <geom name="table" type="box" size=".55 .48 .02" pos="-.1 0 -.02" material="wood"/>
    {"".join(map(_block_xml, SIDES))}{_bar_xml()}{arms}</worldbody><actuator>{servos}</actuator></mujoco>"""


class Side:
    """One arm and its objects, `BLOCK` and `KNOB`, its end of the bar: a `HandAndObjects`."""

    half = HALF

    def __init__(self, name: str, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self.sign, self.data = SIDES[name], data
        self.arm = ArmController(model, data, ARMS_OF_SIDES[name], *self.box(*WORKSPACE), prefix=f"{name}_")
        self._block, self._knob = model.joint(f"{name}_block").qposadr[0], model.site(f"{name}_knob").id
        self._geom = model.geom(f"{name}_block").id

    def box(self, low: Sequence[float], high: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """The two corners (3,) [m] of a box that is given for the left arm, mirrored for the right one."""
        mirrored = np.sort(np.array([low, high]) * (1, self.sign, 1), axis=0)
        return mirrored[0], mirrored[1]

    @property
    def pos_tcp_world(self) -> np.ndarray:
        """Tool centre point between the fingertips (3,) [m]."""
        return self.arm.pos_tcp_world

    @property
    def opening(self) -> float:
        """Distance between the fingers [m]."""
        return self.arm.opening

    def pos_object(self, i: int) -> np.ndarray:
        """Position (3,) of the block or the knob [m], world frame."""
        return self.data.qpos[self._block : self._block + 3] if i == BLOCK else self.data.site_xpos[self._knob]

    def randomize(self, rng: np.random.Generator, color: str) -> None:
        """Sample the block's pose and the hand's start."""
        low, high = self.box((*BLOCKS[0], HALF), (*BLOCKS[1], HALF))
        yaw = rng.uniform(-0.3, 0.3)
        self.data.qpos[self._block : self._block + 7] = [*rng.uniform(low, high), np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        self.arm.model.geom_rgba[self._geom, :3] = COLORS[color]
        self.arm.start(rng, *self.box(*STARTS), is_open=True)


class TwoArms(SceneEnv):
    """Two arms with a block each and a bar; see `SceneEnv`. Tasks: "lift_left", "lift_right", "lift_both", "lift_bar".

    A task has failed as soon as an object that it does not name has been moved.

    Example:
        >>> env = rvlm.load_suite("tabletop/two_arms").make()
        >>> observation, info = env.reset(seed=900_000, options={"task": "lift_both"})
        >>> list(observation["images"]), observation["state"].shape
        (['static', 'left_wrist', 'right_wrist'], (14,))
    """

    card: ClassVar[str] = "tabletop_two_arms"
    wordings: ClassVar[Mapping[str, Wordings]] = WORDINGS
    noise_scale: ClassVar[tuple[float, ...]] = (0.7, 0.7, 0.7, 0.2, 0.2, 0.2, 0.0) * 2
    time_limit: ClassVar[int] = 60

    def __init__(self, image_size: int | Sequence[int] | None = None, paraphrase: bool = False) -> None:
        super().__init__(_xml(), image_size, paraphrase)
        self.sides = {name: Side(name, self.model, self.data) for name in SIDES}
        self._bar = self.model.joint("bar").qposadr[0]
        self._light = self.model.light_diffuse[0].copy()

    def randomize(self, rng: np.random.Generator) -> None:
        """Sample bar, blocks, appearance and the arms' starts."""
        x, y, yaw = rng.uniform(BARS[0], BARS[1])
        self.data.qpos[self._bar : self._bar + 7] = [x, y, 0.008, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        for side, color in zip(self.sides.values(), rng.choice(list(COLORS), 2, replace=False), strict=True):
            side.randomize(rng, color)
        self.model.geom("table").matid[0] = self.model.material(str(rng.choice(TEXTURES[:2]))).id
        self.model.light_diffuse[0] = self._light * rng.uniform(0.85, 1.15)
        mujoco.mj_forward(self.model, self.data)
        mujoco.mj_step(self.model, self.data, nstep=4)
        self._start = self._positions()
        self._moved: set[tuple[str, int]] = set()  # objects that the task does not name, once they have moved

    @property
    def targets(self) -> dict[str, int]:
        """Side -> the object that its arm lifts; sides that the task leaves alone are left out."""
        which = self.task.removeprefix("lift_")
        return {name: KNOB if which == "bar" else BLOCK for name in SIDES if which in (name, "both", "bar")}

    def _positions(self) -> dict[tuple[str, int], np.ndarray]:
        return {(name, i): side.pos_object(i).copy() for name, side in self.sides.items() for i in (BLOCK, KNOB)}

    def control(self, action: np.ndarray) -> None:
        """Move both hands for one control period."""
        values = self.action_spec.to_si(action).reshape(len(SIDES), 7)
        for side, value, is_open in zip(self.sides.values(), values, self.action_spec.is_open(action), strict=True):
            side.arm.set_target(value[:3], value[3:6], bool(is_open))
        simulate([side.arm for side in self.sides.values()], 1 / self.action_spec.rate_hz)
        moved = {k for k, pos in self._positions().items() if np.linalg.norm(pos - self._start[k]) > DISTURBED}
        self._moved |= moved - set(self.targets.items())

    def state(self) -> np.ndarray:
        """Proprioception (14,) of the left and the right arm, see `ArmController.state`."""
        return np.concatenate([side.arm.state() for side in self.sides.values()])

    def is_done(self) -> bool:
        """Whether the named objects are held in the air at once, and nothing else has moved."""
        return not self._moved and all(
            is_held(self.sides[name], i) and self.sides[name].pos_object(i)[2] - self._start[name, i][2] > LIFTED
            for name, i in self.targets.items()
        )

    def failure(self) -> str:
        """The kind of failure: "wrong object" if another one has moved, else "timed out"."""
        return "wrong object" if self._moved else "timed out"

    def expert_action(self) -> np.ndarray:
        """Both arms' commands (14,): lift the named objects, the bar once both hold it; an arm without a task holds still."""
        deltas, is_open = [], []
        for name, side in self.sides.items():
            command = self._command(name)
            shift, turn, opens = delta_to(command, side.pos_tcp_world, side.arm.tilt)
            deltas.append(np.concatenate([shift, turn, [0.0]]))
            is_open.append(opens)
        raw = np.concatenate(deltas) / np.asarray(self.action_spec.scale)
        raw = np.clip(raw, self.action_space.low, self.action_space.high)
        return self.action_spec.set_grippers(raw, np.array(is_open)).astype(np.float32)

    def _command(self, name: str) -> Command:
        side, targets = self.sides[name], self.targets
        if name not in targets:
            return Command(side.pos_tcp_world, True)
        if targets[name] == KNOB and is_held(side, KNOB) and not all(is_held(other, KNOB) for other in self.sides.values()):
            return Command(side.pos_tcp_world, False)
        is_high = side.pos_object(targets[name])[2] > self._start[name, targets[name]][2] + HELD_HEIGHT
        return Command(side.pos_tcp_world, False) if is_high else raise_object(side, targets[name])
