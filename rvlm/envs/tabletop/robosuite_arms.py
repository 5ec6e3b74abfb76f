"""Real robots on the tabletop: Panda, Sawyer, UR5e, IIWA and Kinova3, read from the robosuite wheel (extra `arms`).

robosuite is used as a folder of files and never imported. Of each robot the chain of bodies with joints, inertias and collision
shapes is kept, which render in a few milliseconds instead of tens for the visual meshes; motors, sensors and cameras are dropped,
and the hand is the tabletop's. The conventions of the actions are in `data_cards/tabletop_*.md`.
"""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from rvlm.envs.tabletop.arms import ARMS, Arm, Link, _text, arm_xml, asset_xml, hand_xml
from rvlm.envs.tabletop.so101 import SO101

INSTALL = "python -m pip install --no-deps robosuite==1.5.2"
_SHAPE = ("type", "mesh", "size", "pos", "quat")  # kept attributes of a collision geom
_KEY = (1, 10**6, 10**12)  # maps three numbers below a million to one


@dataclass(frozen=True, kw_only=True)
class RealArm(Arm):
    """An arm whose chain is read from a robot's MJCF file instead of `links` and `radius`.

    The hand is attached to the file's body `right_hand`, so `tool_pos` and `tool_quat` are in that body's frame.

    Attributes:
        folder: The robot's folder in the asset pack.
        grain: Grid size at which vertices are merged, for faster rendering [m]; 0 keeps the meshes.
    """

    folder: str
    grain: float = 0.0
    links: tuple[Link, ...] = ()
    radius: float = 0.0


PANDA = RealArm(
    folder="panda",
    base=(-0.52, 0, 0),
    tool_pos=(0, 0, 0),
    tool_quat=(1, 0, 0, 0),
    home=(0, 0.15, 0, -2.25, 0, 2.4, 0.785),
    rgba=(0.92, 0.92, 0.94, 1),
    hand_rgba=(0.25, 0.25, 0.28, 1),
    hand_size=(0.022, 0.09, 0.03),
    finger_size=(0.010, 0.006, 0.034),
    opening=0.050,
    camera_pos=(0.54, 0.06, 0.72),
    camera_fovy=47,
)
SAWYER = RealArm(
    folder="sawyer",
    base=(-0.64, -0.14, 0),
    tool_pos=(0, 0, 0),
    tool_quat=(1, 0, 0, -1),
    home=(-0.08, -0.96, 0.08, 1.52, -0.05, 1.01, 0.187),
    rgba=(0.65, 0.12, 0.12, 1),
    hand_rgba=(0.15, 0.15, 0.16, 1),
    hand_size=(0.026, 0.065, 0.03),
    finger_size=(0.009, 0.007, 0.036),
    opening=0.049,
    camera_pos=(0.52, 0.10, 0.74),
    camera_fovy=48,
)
UR5E = RealArm(
    folder="ur5e",
    base=(-0.52, 0.08, 0),
    tool_pos=(0, 0, 0),
    tool_quat=(1, 0, 0, 0),
    home=(-0.40, -1.37, 1.87, -2.07, -1.571, -1.966),
    rgba=(0.40, 0.60, 0.80, 1),
    hand_rgba=(0.12, 0.12, 0.12, 1),
    hand_size=(0.030, 0.060, 0.03),
    finger_size=(0.013, 0.008, 0.038),
    opening=0.052,
    camera_pos=(0.50, -0.12, 0.73),
    camera_fovy=48,
)
IIWA = RealArm(
    folder="iiwa",
    grain=0.01,
    base=(-0.55, 0, 0.2),
    tool_pos=(0, 0, 0),
    tool_quat=(1, 0, 0, 0),
    home=(0, 1.03, 0, -1.51, 0, 0.6, 0),
    rgba=(0.95, 0.55, 0.15, 1),
    hand_rgba=(0.20, 0.20, 0.22, 1),
    hand_size=(0.028, 0.070, 0.03),
    finger_size=(0.011, 0.007, 0.036),
    opening=0.051,
    camera_pos=(0.55, -0.05, 0.70),
    camera_fovy=47,
)
KINOVA3 = RealArm(
    folder="kinova3",
    grain=0.01,
    base=(-0.44, 0, 0.1),
    tool_pos=(0, 0, 0),
    tool_quat=(1, 0, 0, 0),
    home=(-0.06, 0.7, 0, 1.8, 0, 0.64, -1.6),
    rgba=(0.62, 0.64, 0.66, 1),
    hand_rgba=(0.10, 0.10, 0.11, 1),
    hand_size=(0.024, 0.062, 0.03),
    finger_size=(0.010, 0.007, 0.035),
    opening=0.050,
    camera_pos=(0.53, 0.02, 0.76),
    camera_fovy=46,
)

REAL_ARMS = {"panda": PANDA, "sawyer": SAWYER, "ur5e": UR5E, "iiwa": IIWA, "kinova3": KINOVA3}
ROBOTS: dict[str, Arm] = {**ARMS, **REAL_ARMS, "franka7_joint": ARMS["franka7"], "so101": SO101}


def robot_file(arm: RealArm) -> Path:
    """The robot's MJCF file in the installed wheel.

    Raises:
        ModuleNotFoundError: The wheel is not installed.
        FileNotFoundError: The wheel has another version, without this file.
    """
    spec = find_spec("robosuite")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the robot {arm.folder!r} is read from the robosuite wheel, which is missing; install it: {INSTALL}"
        )
    file = Path(spec.submodule_search_locations[0]) / "models/assets/robots" / arm.folder / "robot.xml"
    if not file.is_file():
        raise FileNotFoundError(f"expected {file}, as in robosuite 1.5.2; install that version: {INSTALL}")
    return file


def collision_geoms(element: ElementTree.Element) -> list[ElementTree.Element]:
    """Collision geoms below `element`; geoms of group 1 are visual only."""
    return [geom for geom in element.iter("geom") if geom.get("group") != "1"]


def coarsen(triangles: np.ndarray, grain: float) -> tuple[np.ndarray, np.ndarray]:
    """Simplify a mesh: the vertices in each cell of a grid are merged to their mean.

    Args:
        triangles: Corners (n, 3, 3) [m].
        grain: Side of a cell [m].

    Returns:
        Vertices (v, 3) [m] and faces (f, 3) as indices of vertices.
    """
    corners = triangles.reshape(-1, 3)
    grid = np.round((corners - corners.min(axis=0)) / grain).astype(int)
    _, cell, count = np.unique(grid @ _KEY, return_inverse=True, return_counts=True)
    vertices = np.stack([np.bincount(cell, corners[:, i]) / count for i in range(3)], axis=1)
    faces = cell.reshape(-1, 3)
    is_flat = (faces == np.roll(faces, 1, axis=1)).any(axis=1)
    _, first = np.unique(np.sort(faces, axis=1) @ _KEY, return_index=True)
    return vertices, faces[np.setdiff1d(first, np.flatnonzero(is_flat))]


def read_stl(file: Path) -> np.ndarray:
    """Triangles (n, 3, 3) [m] of a binary STL file."""
    record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    return np.frombuffer(file.read_bytes(), record, offset=84)["corners"].astype(float)


def meshes_xml(robot: ElementTree.Element, folder: Path, grain: float = 0.0) -> str:
    """MJCF assets: the meshes of the collision geoms, by absolute path or, with a `grain` [m], simplified inline."""
    used = {geom.get("mesh") for geom in collision_geoms(robot)}
    meshes = [mesh for mesh in robot.iter("mesh") if mesh.get("name") in used]
    for mesh in meshes:
        file = (folder / mesh.attrib.pop("file")).resolve()
        if grain:
            vertices, faces = coarsen(read_stl(file), grain)
            mesh.attrib |= {"vertex": _text(vertices.ravel()), "face": " ".join(map(str, faces.ravel()))}
        else:
            mesh.set("file", str(file))
    return "<asset>" + "".join(ElementTree.tostring(mesh, "unicode") for mesh in meshes) + "</asset>"


def chain_xml(robot: ElementTree.Element, arm: RealArm) -> str:
    """The robot's bodies with the tabletop's joint names (`joint0` ...), collision bits, colour and hand."""
    base = robot.find("worldbody/body")
    hand = robot.find(".//body[@name='right_hand']")
    if base is None or hand is None:
        raise ValueError("expected a robot's MJCF with a body in its worldbody and a body 'right_hand' below it")
    kept = {*base.iter("body"), *base.iter("joint"), *base.iter("inertial"), *collision_geoms(base)}
    for body in base.iter("body"):
        body[:] = [child for child in body if child in kept]
        body.set("gravcomp", "1")
    for i, joint in enumerate(base.iter("joint")):
        _rewrite(joint, ("pos", "axis", "range"), name=f"joint{i}", damping="1", armature=".1")
        joint.attrib.setdefault("range", _text((-2 * math.pi, 2 * math.pi)))
    for geom in base.iter("geom"):
        _rewrite(geom, _SHAPE, **{"class": "arm", "rgba": _text(arm.rgba)})
    base.set("pos", _text(arm.base))
    if arm.base[2] > 0:
        base.append(ElementTree.fromstring(_pedestal(arm.base[2])))
    hand.append(ElementTree.fromstring(hand_xml(arm)))
    return ElementTree.tostring(base, "unicode")


def _rewrite(element: ElementTree.Element, keep: tuple[str, ...], **attributes: str) -> None:
    element.attrib = {k: v for k, v in element.attrib.items() if k in keep} | attributes


def _pedestal(height: float) -> str:
    """A column from the table to a raised base."""
    return f'<geom class="arm" type="cylinder" fromto="0 0 {-height:.6g} 0 0 0" size=".085" rgba=".30 .30 .32 1"/>'


@arm_xml.register(RealArm)
def _(arm: RealArm) -> str:
    return chain_xml(ElementTree.parse(robot_file(arm)).getroot(), arm)


@asset_xml.register(RealArm)
def _(arm: RealArm) -> str:
    file = robot_file(arm)
    return meshes_xml(ElementTree.parse(file).getroot(), file.parent, arm.grain)
