"""Layouts of rotations in actions and states, and conversion between them.

q and -q are one rotation, as are rotation vectors a turn apart: `from_rotation` gives that with w not negative, or of half a turn
at most; `nearest_encoding` that beside another, `in_turn` that within a card's range.
Source: 6-D rotations, the first two columns of the matrix: Zhou et al. 2019 (arXiv 1812.07035), section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from rvlm.data.errors import SpecMismatch
from rvlm.data.groups import LAYOUTS, Group
from rvlm.data.spec_dimensions import PlacedGroups

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation


def to_rotation(values: np.ndarray, layout: str) -> Rotation:
    """Numbers ``(..., d)`` of a layout (angles in radians; Euler angles about fixed axes, x first) -> rotations.

    Quaternions need not have length one, nor the columns of "rot6d" be orthonormal: of a prediction they never are.

    Raises:
        SpecMismatch: An unknown layout, another number of values, or a quaternion or column without direction.
    """
    values = np.array(values, np.float64)  # a copy, as scipy refuses what is read-only
    if LAYOUTS.get(layout, 0) == 0 or values.shape[-1] != LAYOUTS[layout]:
        raise SpecMismatch(
            f"expected a rotation as one of {LAYOUTS} (layout: numbers), got {layout!r} and {values.shape[-1]} numbers"
        )
    try:
        return _decoded(values.reshape(-1, LAYOUTS[layout]), layout)
    except ValueError as error:
        raise SpecMismatch(f"expected rotations as {layout}, got numbers that are none ({error}); check the column") from error


def from_rotation(rotation: Rotation, layout: str) -> np.ndarray:
    """Inverse of `to_rotation`: ``(n, d)``; one rotation gives ``(d,)``."""
    return _ENCODERS[layout](rotation)


def nearest_encoding(numbers: np.ndarray, near: np.ndarray, group: Group) -> np.ndarray:
    """Raw numbers ``(..., d)`` of a group's rotation, or equal ones: those nearest to `near`, but angles also by `in_turn`."""
    equal = _equal_numbers(numbers, group)
    nearest = _of_least(equal, np.square(equal - near).sum(-1))
    return nearest if group.rotation.startswith("quat") else in_turn(nearest, group)


def in_turn(numbers: np.ndarray, group: Group) -> np.ndarray:
    """Raw numbers ``(..., d)`` of a rotation, or equal ones that lie within low and high, or nearer to them.

    Of q and -q either, and angles of a target with whole turns added; what is within stays as it is.
    """
    if not group.low or (group.kind != "pose" and not group.rotation.startswith("quat")):
        return numbers
    low, high, scale = (np.asarray(values[group.n_position :]) for values in (group.low, group.high, group.scale))
    if group.rotation == "euler_xyz":
        turn = 2 * np.pi / (group.radians * scale)
        nearest = numbers - turn * np.round((numbers - (low + high) / 2) / turn)
        return np.where((numbers < low) | (numbers > high), nearest, numbers)
    equal = _equal_numbers(numbers, group)
    return _of_least(equal, np.abs(equal - equal.clip(low, high)).sum(-1))


def _equal_numbers(numbers: np.ndarray, group: Group) -> np.ndarray:
    """Numbers ``(m, ..., d)`` of the same rotation: as given, then -q, or the rotation vector a turn shorter and longer."""
    if group.rotation.startswith("quat"):
        return np.stack([numbers, -numbers])
    if group.rotation != "axis_angle":
        return numbers[None]
    scale = np.asarray(group.scale[group.n_position :] or 1.0)
    angle = np.linalg.norm(numbers * scale * group.radians, axis=-1, keepdims=True)
    turn = numbers * (2 * np.pi / np.where(angle > 0, angle, np.inf))
    return np.stack([numbers, numbers - turn, numbers + turn])


def _of_least(equal: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Of numbers ``(m, ..., d)`` those ``(..., d)`` of least cost ``(m, ...)``, the first where it is the same."""
    return np.take_along_axis(equal, cost.argmin(0)[None, ..., None], 0)[0]


def average_rotations(placed: PlacedGroups, mean: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean ``(n, d)`` of raw values ``(n, c, d)``, with targets of rotations averaged as rotations, by weights ``(c,)``."""
    out = np.array(mean)
    for place, group in placed:
        at = slice(place.start + group.n_position, place.stop)
        is_absent = set(group.names[group.n_position :]) <= set(group.absent)  # also of a layout without numbers
        if group.kind == "pose" and not is_absent and values.shape[1] > 1:
            unit = np.asarray(group.scale)[group.n_position :] * group.radians
            each = [to_rotation(rows * unit, group.rotation).mean(weights) for rows in values[..., at]]
            numbers = np.stack([from_rotation(rotation, group.rotation) for rotation in each]) / unit
            out[:, at] = in_turn(nearest_encoding(numbers, values[:, -1, at], group), group)
    return out


def _decoded(values: np.ndarray, layout: str) -> Rotation:
    from scipy.spatial.transform import Rotation  # which acting without poses does not need

    if layout == "rot6d":
        return Rotation.from_matrix(_matrices(values))
    if layout == "axis_angle":
        return Rotation.from_rotvec(values)
    if layout == "euler_xyz":
        return Rotation.from_euler("xyz", values)
    return Rotation.from_quat(values, scalar_first=layout == "quat_wxyz")


def _matrices(values: np.ndarray) -> np.ndarray:
    first, second = values[:, :3], values[:, 3:]
    normal = np.cross(first, second)
    lengths = [np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (first, normal)]
    if min(length.min() for length in lengths) < 1e-9:
        raise ValueError("a column of length zero, or two that are parallel")
    x, z = first / lengths[0], normal / lengths[1]
    return np.stack([x, np.cross(z, x), z], axis=2)


def _as_rot6d(rotation: Rotation) -> np.ndarray:
    matrix = rotation.as_matrix()
    return np.concatenate([matrix[..., 0], matrix[..., 1]], axis=-1)


_ENCODERS: dict[str, Callable[[Rotation], np.ndarray]] = {
    "axis_angle": lambda rotation: rotation.as_rotvec(),
    "euler_xyz": lambda rotation: rotation.as_euler("xyz"),
    "quat_xyzw": lambda rotation: rotation.as_quat(canonical=True),
    "quat_wxyz": lambda rotation: rotation.as_quat(canonical=True, scalar_first=True),
    "rot6d": _as_rot6d,
}
