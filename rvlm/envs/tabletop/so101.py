"""An arm with the kinematics of the SO-101, LeRobot's low-cost arm: five joints, and a gripper with one moving jaw.

Positions, axes and limits of all six joints are those of the public description, in which each joint is zero in the middle of its
range, as in LeRobot's calibration. Shapes are primitives of about the printed parts' size.

Five joints reach every position and yaw of a hand that points straight down, but no sideways tilt. The arm stands on a block:
with its base on the table it could not point straight down more than 8 cm above it. Objects are half as large as for other arms
and lie within 30 cm of the base; the slider is nearer than elsewhere, and the drawer out of reach.

Source: TheRobotStudio/SO-ARM100, `Simulation/SO101/so101_new_calib.xml` (commit fda892c).
"""

from dataclasses import dataclass

import numpy as np

from rvlm.envs.tabletop.arms import Arm, Link, Workspace, _text, finger_servos_xml, hand_xml

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll")
JAW_POS, JAW_LIMITS = (0.0202, 0.0188, -0.0234), (-0.174533, 1.745329)  # the gripper's joint in the last link's frame [m], [rad]
TIP = 0.1044  # from the last link's origin to the jaws' tips [m]
FIXED_FACE, FIXED_TILT = -0.0079, 0.1  # inner face of the fixed jaw: its tip along the last link's x [m], and its slope [rad]
JAW_INSET = 0.0105  # of the moving jaw's inner face from its joint, towards the fixed jaw [m]
GRIP = 0.024  # what is held is up to so far above the jaws' tips [m]
PALM = 0.045  # from the last link's origin to the bottom of the jaws [m]


@dataclass(frozen=True, kw_only=True)
class JawArm(Arm):
    """An arm whose gripper has a fixed and a moving jaw, which opens along the hand's x.

    Attributes:
        open_share: Share of the jaw's range at which it counts as open.
    """

    open_share: float

    @property
    def finger_joints(self) -> tuple[str, ...]:
        """The gripper's joint."""
        return ("jaw",)

    @property
    def open_fraction(self) -> float:
        """Share of the jaw's range at which it counts as open."""
        return self.open_share

    def finger_positions(self, fraction: float) -> np.ndarray:
        """The jaw's angle (1,) [rad] at a share of its range."""
        return np.array([JAW_LIMITS[0] + fraction * (JAW_LIMITS[1] - JAW_LIMITS[0])])

    def finger_fraction(self, positions: np.ndarray) -> float:
        """Share of the jaw's range; inverse of `finger_positions`."""
        return float(positions[0] - JAW_LIMITS[0]) / (JAW_LIMITS[1] - JAW_LIMITS[0])

    def gap(self, positions: np.ndarray) -> float:
        """Distance between the jaws [m], `GRIP` above the fixed one's tip."""
        sine, cosine = np.sin(positions[0]), np.cos(positions[0])
        along = (TIP - GRIP + JAW_POS[2] - JAW_INSET * sine) / cosine
        return float(JAW_POS[0] + along * sine - JAW_INSET * cosine - (FIXED_FACE - FIXED_TILT * GRIP))

    def pos_tcp(self, positions: np.ndarray) -> np.ndarray:
        """Tool centre point (3,) [m] in the hand's frame, midway between the jaws: it moves as they open."""
        return np.array([FIXED_FACE - FIXED_TILT * GRIP + self.gap(positions) / 2, 0, TIP - GRIP / 2])


SO101 = JawArm(
    base=(-0.13, 0, 0.10),
    links=(
        Link((0.0388353, 0, 0.0624), (0, 0, 1, 0), (0, 0, 1), (-1.919862, 1.919862)),
        Link((-0.0303992, -0.0182778, -0.0542), (0.5, -0.5, -0.5, -0.5), (0, 0, 1), (-1.745329, 1.745329)),
        Link((-0.11257, -0.028, 0), (1, 0, 0, 1), (0, 0, 1), (-1.69, 1.69)),
        Link((-0.1349, 0.0052, 0), (1, 0, 0, -1), (0, 0, 1), (-1.658063, 1.658063)),
        Link((0, -0.0611, 0.0181), (0.0172091, -0.0172091, 0.706897, 0.706897), (0, 0, 1), (-2.743847, 2.841206)),
    ),
    tool_pos=(0, 0, 0),
    tool_quat=(0, 1, 0, 0),
    home=(0, -0.3, 0.5, 1.4, 0.05),
    rgba=(1, 0.82, 0.12, 1),
    hand_rgba=(0.15, 0.15, 0.16, 1),
    radius=0.016,
    hand_size=(0.0325, 0.024, PALM / 2),
    finger_size=(0.004, 0.008, (TIP - PALM) / 2),
    opening=0.028,
    open_share=0.4,
    expert_shift=0.03,
    camera_pos=(0.52, 0.04, 0.58),
    camera_fovy=33,
    camera_target=(0.02, 0.03, 0.02),
    workspace=Workspace(
        low=(-0.06, -0.20, 0.012),
        high=(0.19, 0.22, 0.17),
        start_low=(0.02, -0.12, 0.09),
        start_high=(0.12, 0.12, 0.15),
        objects_low=(-0.005, -0.14),
        objects_high=(0.045, 0.12),
        gap=0.075,
        half=0.0125,
        yaw=0.15,
        fixtures={"switch": (0.0, 0.195), "cabinet": (-0.06, -0.35), "rail": (0.115, -0.03)},
        families=("lift", "push_left", "push_right", "place_in_zone", "stack", "turn_on_light", "turn_off_light",
                  "move_slider_left", "move_slider_right"),
    ),
)  # fmt: skip


@hand_xml.register(JawArm)
def _(arm: JawArm) -> str:
    """Palm, two jaws, tool centre point and wrist camera; the hand's z points out of the jaws, against the link's z."""
    finger = f'<geom class="finger" type="box" size="{_text(arm.finger_size)}" rgba="{_text(arm.hand_rgba)}"'
    middle = (TIP + PALM) / 2
    return f"""<body name="hand" pos="{_text(arm.tool_pos)}" quat="{_text(arm.tool_quat)}" gravcomp="1">
      <geom class="arm" type="box" size="{_text(arm.hand_size)}" pos="-.0025 0 {PALM / 2}" rgba="{_text(arm.rgba)}" mass=".08"/>
      {finger} pos="{FIXED_FACE - arm.finger_size[0] - 0.003:.6g} 0 {middle:.6g}" euler="0 {FIXED_TILT} 0"/>
      <site name="tcp" pos="{_text(arm.pos_tcp(np.array(JAW_LIMITS[:1])))}" size=".004" rgba="0 0 0 0"/>
      <camera name="wrist" pos=".012 -.085 -.005" xyaxes="1 0 0 0 -.83 .56" fovy="60"/>
      <body name="jaw" pos="{_text((JAW_POS[0], -JAW_POS[1], -JAW_POS[2]))}" gravcomp="1">
        <joint name="jaw" axis="0 1 0" range="{_text(JAW_LIMITS)}" damping=".05" armature=".002"/>
        {finger} pos="{arm.finger_size[0] - JAW_INSET:.6g} {JAW_POS[1]} {middle + JAW_POS[2]:.6g}"/></body></body>"""


@finger_servos_xml.register(JawArm)
def _(arm: JawArm) -> str:
    """The jaw's servo, limited to a third of the real motor's torque."""
    return '<position joint="jaw" kp="8" kv=".25" forcerange="-1.2 1.2"/>'
