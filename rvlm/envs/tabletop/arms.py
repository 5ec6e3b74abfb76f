"""The tabletop's robots: primitive-geometry arms with true kinematics, one dataclass each.

They differ in kinematics, gripper geometry, appearance, and the pose of the static camera. The conventions of their actions
(scale, rate, gripper sign) are in the data card of the same name, `data_cards/tabletop_*.md`.
"""

from dataclasses import dataclass, field
from functools import singledispatch

import numpy as np

Vec = tuple[float, ...]


@dataclass(frozen=True)
class Link:
    """One revolute joint, placed in the frame of the joint before it.

    Attributes:
        pos: Origin in the previous joint's frame [m].
        quat: Orientation in the previous joint's frame, `quat_wxyz`, normalised when written.
        axis: Joint axis in the joint's own frame.
        limits: Joint range [rad].
    """

    pos: Vec
    quat: Vec
    axis: Vec
    limits: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The part of the table that an arm works on, in the world frame [m].

    Attributes:
        low, high: Limits of the tool centre point's target.
        start_low, start_high: Where it starts.
        objects_low, objects_high: Where objects start (x, y), `gap` apart at least.
        half: Half the size of every object.
        yaw: Largest rotation of an object about the vertical [rad].
        fixtures: Fixtures (x, y) that stand elsewhere than on the common table.
        families: Task families within reach; none named: all.
    """

    low: Vec = (-0.26, -0.37, 0.012)
    high: Vec = (0.22, 0.36, 0.40)
    start_low: Vec = (-0.12, -0.18, 0.10)
    start_high: Vec = (0.16, 0.18, 0.24)
    objects_low: Vec = (-0.10, -0.115)
    objects_high: Vec = (0.15, 0.165)
    gap: float = 0.1
    half: float = 0.024
    yaw: float = 0.4
    fixtures: dict[str, Vec] = field(default_factory=dict)
    families: tuple[str, ...] = ()


TABLE = Workspace()


@dataclass(frozen=True)
class Arm:
    """An embodiment: a serial chain, a parallel gripper and a static camera.

    Attributes:
        base: Position of the base in the world [m]; the table's top is z = 0, x points away from the robot.
        links: The chain, base first.
        tool_pos, tool_quat: Hand frame in the last joint's frame [m, quat_wxyz]; the hand's z points out of the fingers.
        home: Joint angles from which inverse kinematics starts [rad].
        rgba, hand_rgba: Colours of links and of hand.
        radius: Radius of the links [m].
        hand_size, finger_size: Half sizes [m]; fingers move along the hand's y.
        opening: Largest distance of one finger from the middle [m].
        camera_pos, camera_fovy: Static camera in the world [m] and its vertical field of view [deg].
        camera_target: Point that the static camera looks at [m].
        workspace: Where it works.
        expert_shift: How far the scripted expert moves the hand in one control step by joint targets, along each axis [m].
    """

    base: Vec
    links: tuple[Link, ...]
    tool_pos: Vec
    tool_quat: Vec
    home: Vec
    rgba: Vec
    hand_rgba: Vec
    radius: float
    hand_size: Vec
    finger_size: Vec
    opening: float
    camera_pos: Vec
    camera_fovy: float
    camera_target: Vec = (-0.05, -0.025, 0.02)
    workspace: Workspace = TABLE
    expert_shift: float = 0.04

    @property
    def finger_joints(self) -> tuple[str, ...]:
        """Names of the gripper's joints."""
        return ("finger_left", "finger_right")

    @property
    def open_fraction(self) -> float:
        """Share of the gripper's range at which it counts as open."""
        return 1.0

    def finger_positions(self, fraction: float) -> np.ndarray:
        """Positions of `finger_joints` at a share of their range: 0 closed, 1 fully open."""
        return np.full(2, fraction * self.opening)

    def finger_fraction(self, positions: np.ndarray) -> float:
        """Share of the gripper's range; inverse of `finger_positions`."""
        return float(np.mean(positions)) / self.opening

    def gap(self, positions: np.ndarray) -> float:
        """Distance between the fingertips [m] at positions of `finger_joints`."""
        return float(np.sum(positions))

    def pos_tcp(self, positions: np.ndarray) -> np.ndarray:
        """Tool centre point (3,) [m] in the hand's frame at positions of `finger_joints`."""
        return np.array([0, 0, 0.06 + 2 * self.finger_size[2] - 0.012])


def _turn(limit: float) -> tuple[float, float]:
    return (-limit, limit)


Z, Y = (0, 0, 1), (0, 1, 0)

# Seven joints of the Franka Emika Panda's modified Denavit-Hartenberg table (Franka control interface documentation).
FRANKA7 = Arm(
    base=(-0.56, 0, 0),
    links=(
        Link((0, 0, 0.333), (1, 0, 0, 0), Z, _turn(2.9)),
        Link((0, 0, 0), (1, -1, 0, 0), Z, _turn(1.76)),
        Link((0, -0.316, 0), (1, 1, 0, 0), Z, _turn(2.9)),
        Link((0.0825, 0, 0), (1, 1, 0, 0), Z, (-3.07, -0.07)),
        Link((-0.0825, 0.384, 0), (1, -1, 0, 0), Z, _turn(2.9)),
        Link((0, 0, 0), (1, 1, 0, 0), Z, (-0.02, 3.75)),
        Link((0.088, 0, 0), (1, 1, 0, 0), Z, _turn(2.9)),
    ),
    tool_pos=(0, 0, 0.107),
    tool_quat=(0.9238795, 0, 0, -0.3826834),
    home=(0, -0.35, 0, -2.45, 0, 2.1, 0.785),
    rgba=(0.92, 0.92, 0.94, 1),
    hand_rgba=(0.25, 0.25, 0.28, 1),
    radius=0.048,
    hand_size=(0.022, 0.075, 0.03),
    finger_size=(0.010, 0.006, 0.034),
    opening=0.050,
    camera_pos=(0.52, 0, 0.72),
    camera_fovy=47,
)

# Six joints with the link lengths of the Universal Robots UR5e (manufacturer's Denavit-Hartenberg table).
UR6 = Arm(
    base=(-0.52, 0.08, 0),
    links=(
        Link((0, 0, 0.163), (1, 0, 0, 0), Z, _turn(6.2)),
        Link((0, 0.138, 0), (1, 0, 1, 0), Y, _turn(6.2)),
        Link((0, -0.131, 0.425), (1, 0, 0, 0), Y, _turn(3.1)),
        Link((0, 0, 0.392), (1, 0, 1, 0), Y, _turn(6.2)),
        Link((0, 0.127, 0), (1, 0, 0, 0), Z, _turn(6.2)),
        Link((0, 0, 0.1), (1, 0, 0, 0), Y, _turn(6.2)),
    ),
    tool_pos=(0, 0.1, 0),
    tool_quat=(-1, 1, 0, 0),
    home=(-0.2, -1.3, 1.9, -2.17, -1.5708, 1.37),
    rgba=(0.35, 0.55, 0.75, 1),
    hand_rgba=(0.12, 0.12, 0.12, 1),
    radius=0.042,
    hand_size=(0.030, 0.060, 0.025),
    finger_size=(0.013, 0.008, 0.038),
    opening=0.052,
    camera_pos=(0.50, -0.16, 0.74),
    camera_fovy=48,
)

# A small hobby-class arm with five joints, which cannot tilt its hand sideways.
SMALL5 = Arm(
    base=(-0.42, 0, 0),
    links=(
        Link((0, 0, 0.12), (1, 0, 0, 0), Z, _turn(2.9)),
        Link((0, 0, 0.03), (1, 0, 0, 0), Y, (-1.7, 2.2)),
        Link((0, 0, 0.38), (1, 0, 0, 0), Y, (-0.3, 2.9)),
        Link((0, 0, 0.38), (1, 0, 0, 0), Y, (-2.4, 2.4)),
        Link((0, 0, 0.05), (1, 0, 0, 0), Z, _turn(3.0)),
    ),
    tool_pos=(0, 0, 0.03),
    tool_quat=(0, 0, 0, 1),
    home=(0, -0.35, 1.9, 1.59, 0),
    rgba=(0.95, 0.62, 0.15, 1),
    hand_rgba=(0.15, 0.15, 0.16, 1),
    radius=0.030,
    hand_size=(0.016, 0.055, 0.02),
    finger_size=(0.008, 0.005, 0.036),
    opening=0.048,
    camera_pos=(0.55, 0.14, 0.70),
    camera_fovy=47,
)

ARMS = {"franka7": FRANKA7, "ur6": UR6, "small5": SMALL5}


def _text(values: tuple | list | np.ndarray) -> str:
    return " ".join(f"{float(v):.6g}" for v in values)


def _unit(quat: Vec) -> np.ndarray:
    return np.asarray(quat, float) / np.linalg.norm(quat)


def _segment(end: Vec, arm: Arm) -> str:
    """A capsule from the joint's origin to the next joint; empty if the two coincide."""
    if np.linalg.norm(end) < 0.02:
        return ""
    return f'<geom class="arm" type="capsule" fromto="0 0 0 {_text(end)}" size="{arm.radius}" rgba="{_text(arm.rgba)}"/>'


@singledispatch
def hand_xml(arm: Arm) -> str:
    """The hand: palm, two fingers, the tool centre point and the wrist camera."""
    length = arm.finger_size[2]
    tcp = arm.pos_tcp(np.zeros(2))[2]
    fingers = "".join(
        f"""<body name="finger_{side}" pos="0 0 0.06" gravcomp="1">
        <joint name="finger_{side}" type="slide" axis="0 {sign} 0" range="0 {arm.opening}" damping="10" armature=".05"/>
        <geom class="finger" name="finger_{side}" type="box" size="{_text(arm.finger_size)}"
          pos="0 {sign * arm.finger_size[1]:.6g} {length:.6g}" rgba="{_text(arm.hand_rgba)}"/></body>"""
        for side, sign in (("left", 1), ("right", -1))
    )
    return f"""<body name="hand" pos="{_text(arm.tool_pos)}" quat="{_text(_unit(arm.tool_quat))}" gravcomp="1">
      <geom class="arm" type="box" size="{_text(arm.hand_size)}" pos="0 0 .03" rgba="{_text(arm.hand_rgba)}" mass=".4"/>
      <site name="tcp" pos="0 0 {tcp:.6g}" size=".004" rgba="0 0 0 0"/>
      <camera name="wrist" pos=".085 0 {tcp - 0.14:.6g}" xyaxes="0 -1 0 -1 0 -.10" fovy="70"/>{fingers}</body>"""


@singledispatch
def asset_xml(arm: Arm) -> str:
    """MJCF assets of an arm; none for arms of primitives."""
    return ""


@singledispatch
def arm_xml(arm: Arm) -> str:
    """The chain from base to hand as nested MJCF bodies."""
    text, joint_color = hand_xml(arm), _text([*(0.72 * np.asarray(arm.rgba[:3])), 1])
    ends = [link.pos for link in arm.links[1:]] + [arm.tool_pos]
    for i, (link, end) in reversed(list(enumerate(zip(arm.links, ends, strict=True)))):
        text = f"""<body name="link{i}" pos="{_text(link.pos)}" quat="{_text(_unit(link.quat))}" gravcomp="1">
        <joint name="joint{i}" axis="{_text(link.axis)}" range="{_text(link.limits)}" damping="1" armature=".1"/>
        <geom class="arm" type="sphere" size="{arm.radius * 1.15:.6g}" rgba="{joint_color}" mass=".6"/>{_segment(end, arm)}
        {text}</body>"""
    column = _segment(arm.links[0].pos, arm)
    shape = f'size=".045" fromto="0 0 {-arm.base[2]:.6g} 0 0 .045"' if arm.base[2] else 'size=".07 .03" pos="0 0 .03"'
    foot = f'<geom class="arm" type="cylinder" {shape} rgba="{joint_color}"/>'
    return f'<body name="base" pos="{_text(arm.base)}">{foot}{column}{text}</body>'


@singledispatch
def finger_servos_xml(arm: Arm) -> str:
    """Force-limited position servos of the fingers."""
    return "".join(f'<position joint="{joint}" kp="400" kv="25" forcerange="-12 12"/>' for joint in arm.finger_joints)


def actuator_xml(arm: Arm) -> str:
    """Position servos for the joints, stiffer at the base, and the fingers' servos."""
    joints = "".join(
        f'<position joint="joint{i}" kp="{2400 if i < 4 else 1200}" kv="{110 if i < 4 else 55}"/>' for i in range(len(arm.home))
    )
    return joints + finger_servos_xml(arm)
