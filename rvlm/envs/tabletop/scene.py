"""The tabletop as MJCF text: table, objects, drawer, button with light, slider and zone; and the domain shifts.

XML strings, as MuJoCo's model-editing API changes between versions and MJCF does not.
Frames: world = table; x away from the robot, y to the robot's left, z up, the table's top at z = 0 [m].
"""

from dataclasses import dataclass

import numpy as np

from rvlm.envs.tabletop.arms import TABLE, Arm, _text, actuator_xml, arm_xml, asset_xml

COLORS = {
    "red": (0.86, 0.10, 0.10),
    "green": (0.08, 0.62, 0.18),
    "blue": (0.10, 0.25, 0.88),
    "yellow": (0.95, 0.82, 0.08),
    "purple": (0.55, 0.12, 0.68),
    "orange": (1.00, 0.48, 0.02),
}
UNSEEN_COLORS = {"pink": (1.0, 0.50, 0.72), "brown": (0.42, 0.22, 0.08)}
SHAPES = ("cube", "cylinder", "ball")
HALF = TABLE.half  # half the size of an object, where the arm's workspace says no other [m]
N_OBJECTS, N_DISTRACTORS = 3, 2
DRAWER_RANGE, SLIDER_RANGE, BUTTON_RANGE = 0.115, 0.09, 0.014  # joint ranges [m]; the slider's is to either side
ZONE_HALF = 0.05  # half the zone's side [m]
TEXTURES = ("wood", "slate", "checker", "stripe")  # the first two are seen in training


@dataclass(frozen=True)
class Setting:
    """Domain shifts of an evaluation setting.

    Attributes:
        distractors: Add two objects of shapes and colours never seen in training.
        background: Table textures never seen in training.
        target: Target objects in colours never seen in training.
        lighting: Strong change of the lights.
        camera_shift: Largest shift of the static camera along each axis [m].
        paraphrase: Held-out instruction templates.
        start_spread: Largest distance of the start pose outside its training range [m].
    """

    distractors: bool = False
    background: bool = False
    target: bool = False
    lighting: bool = False
    camera_shift: float = 0.0
    paraphrase: bool = False
    start_spread: float = 0.0


SETTINGS = {
    "simple": Setting(),
    "unseen_distractor": Setting(distractors=True),
    "unseen_background": Setting(background=True),
    "unseen_target": Setting(target=True),
    "novel_description": Setting(paraphrase=True),
    "lighting": Setting(lighting=True),
    "camera_shift": Setting(camera_shift=0.04),
    "new_start": Setting(start_spread=0.05),
}

HEAD = """<option timestep=".005" integrator="implicitfast" cone="elliptic" impratio="10" iterations="20"/>
<compiler angle="radian" autolimits="true"/>
<visual><quality shadowsize="0" offsamples="0" numslices="12" numstacks="8"/>
  <headlight ambient=".38 .38 .38" diffuse=".42 .42 .42" specular="0 0 0"/><global offwidth="512" offheight="512"/></visual>
<default><geom friction="1 .02 .001" solref=".01 1"/>
  <default class="arm"><geom contype="2" conaffinity="1" mass="1.2"/></default>
  <default class="finger">
    <geom contype="2" conaffinity="1" mass=".05" friction="2 .05 .001" condim="4" solimp=".95 .99 .001"/></default>
  <default class="ghost"><geom contype="0" conaffinity="0"/></default></default>
<asset>
  <texture name="sky" type="skybox" builtin="flat" rgb1=".80 .82 .85" rgb2=".80 .82 .85" width="8" height="8"/>
  <texture name="wood" type="2d" builtin="flat" rgb1=".76 .64 .48" rgb2=".76 .64 .48" width="8" height="8"/>
  <texture name="slate" type="2d" builtin="flat" rgb1=".58 .61 .64" rgb2=".58 .61 .64" width="8" height="8"/>
  <texture name="checker" type="2d" builtin="checker" rgb1=".70 .74 .70" rgb2=".52 .58 .54" width="64" height="64"/>
  <texture name="stripe" type="2d" builtin="gradient" rgb1=".80 .70 .72" rgb2=".48 .42 .50" width="64" height="64"/>
  <material name="wood" texture="wood"/><material name="slate" texture="slate"/>
  <material name="checker" texture="checker" texrepeat="8 8"/><material name="stripe" texture="stripe" texrepeat="3 3"/>
</asset>"""

_FIXTURES = f"""
<body name="cabinet" pos="-.06 -.295 0">
  <geom type="box" size=".068 .078 .004" pos="0 0 .084" rgba=".48 .34 .22 1"/>
  <geom type="box" size=".068 .005 .042" pos="0 .073 .042" rgba=".48 .34 .22 1"/>
  <geom type="box" size=".068 .005 .042" pos="0 -.073 .042" rgba=".48 .34 .22 1"/>
  <geom type="box" size=".004 .078 .042" pos="-.064 0 .042" rgba=".48 .34 .22 1"/>
  <body name="drawer" pos="0 0 0">
    <joint name="drawer" type="slide" axis="1 0 0" range="0 {DRAWER_RANGE}" damping="4" frictionloss=".6"/>
    <geom type="box" size=".058 .062 .003" pos="0 0 .008" rgba=".66 .52 .34 1" mass=".1"/>
    <geom type="box" size=".058 .004 .022" pos="0 .060 .028" rgba=".66 .52 .34 1" mass=".03"/>
    <geom type="box" size=".058 .004 .022" pos="0 -.060 .028" rgba=".66 .52 .34 1" mass=".03"/>
    <geom type="box" size=".004 .066 .034" pos=".064 0 .042" rgba=".66 .52 .34 1" mass=".05"/>
    <geom type="box" size=".020 .007 .018" pos=".086 0 .056" rgba=".12 .12 .12 1" mass=".03" friction="2 .05 .001"/>
    <site name="handle" pos=".088 0 .060" size=".003" rgba="0 0 0 0"/>
  </body></body>
<body name="switch" pos="0 .275 0">
  <geom type="cylinder" size=".036 .004" pos="0 0 .004" rgba=".30 .30 .32 1"/>
  <body name="button" pos="0 0 .036">
    <joint name="button" type="slide" axis="0 0 -1" range="0 {BUTTON_RANGE}" stiffness="60" damping="3"/>
    <geom type="cylinder" size=".025 .014" rgba=".95 .95 .95 1" mass=".02"/></body>
  <geom class="ghost" type="cylinder" size=".008 .05" pos="-.075 0 .05" rgba=".3 .3 .32 1"/>
  <geom class="ghost" name="light" type="sphere" size=".026" pos="-.075 0 .115" rgba=".18 .18 .16 1"/></body>
<body name="rail" pos="-.20 0 0">
  <geom type="box" size=".012 .14 .006" pos="0 0 .006" rgba=".35 .35 .38 1"/>
  <body name="slider" pos="0 0 .042">
    <joint name="slider" type="slide" axis="0 1 0" range="-{SLIDER_RANGE} {SLIDER_RANGE}" damping="4" frictionloss=".3"/>
    <geom type="box" size=".014 .014 .026" rgba=".05 .60 .62 1" mass=".06"/></body></body>
<body name="zone">
  <geom class="ghost" name="zone" type="box" size="{ZONE_HALF} {ZONE_HALF} .0008" pos="0 0 .0002" rgba=".95 .95 .97 1"/></body>
"""


def _object_xml(i: int, half: float) -> str:
    return f"""<body name="object{i}" pos="0 {0.1 * i} {half}"><freejoint name="object{i}"/>
    <geom name="object{i}" type="box" size="{half} {half} {half}" mass=".05" friction="1.5 .02 .004" condim="4"/></body>"""


def _distractor_xml(i: int) -> str:
    kind = ('type="ellipsoid" size=".03 .018 .018"', 'type="capsule" size=".014 .022"')[i % 2]
    return f'<body name="distractor{i}" pos="0 0 -1"><geom name="distractor{i}" {kind} rgba=".05 .05 .05 1"/></body>'


def look_at(pos: tuple[float, ...], target: tuple[float, ...]) -> str:
    """Axes (`xyaxes`) of a camera at `pos` that looks at `target`, with the world's z up."""
    back = np.subtract(pos, target)
    right = np.cross((0, 0, 1), back)
    up = np.cross(back, right)
    return _text([*(right / np.linalg.norm(right)), *(up / np.linalg.norm(up))])


def scene_xml(arm: Arm) -> str:
    """The scene with this arm, as MJCF text."""
    objects = "".join(_object_xml(i, arm.workspace.half) for i in range(N_OBJECTS))
    objects += "".join(_distractor_xml(i) for i in range(N_DISTRACTORS))
    axes = look_at(arm.camera_pos, arm.camera_target)
    camera = f'<camera name="static" pos="{_text(arm.camera_pos)}" xyaxes="{axes}" fovy="{arm.camera_fovy}"/>'
    return f"""<mujoco model="tabletop">{HEAD}{asset_xml(arm)}<worldbody>
    <light name="sun" pos=".2 -.5 1.6" dir="-.1 .3 -1" diffuse=".45 .45 .45" castshadow="false"/>{camera}
    <geom name="table" type="box" size=".55 .48 .02" pos="-.1 0 -.02" material="wood"/>
    {_FIXTURES}{objects}{arm_xml(arm)}</worldbody><actuator>{actuator_xml(arm)}</actuator></mujoco>"""
