"""Groups of dimensions of an action or a state: a pose, joints, a gripper, a base; and their conventions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from rvlm.data.cards import check_fields, parse_field
from rvlm.data.errors import CardError

KINDS = ("pose_delta", "pose", "joint_delta", "joint", "gripper", "base_velocity", "other")
LAYOUTS = {"axis_angle": 3, "euler_xyz": 3, "quat_xyzw": 4, "quat_wxyz": 4, "rot6d": 6, "none": 0}  # rotation -> numbers
POSES = ("pose_delta", "pose")
FRAMES = ("world", "base", "ee")


@dataclass(frozen=True)
class Group:
    """Consecutive dimensions of one kind.

    Attributes:
        kind: One of `KINDS`. "delta" is a displacement from the present state, else the number is the target itself.
        names: One per dimension. Of a pose: one to three of position, then those of `rotation`.
        units: Of each dimension; of an action after multiplication by `scale`. SI where that is possible.
        scale: SI units per raw unit, of an action; ones if left out.
        low, high: Range of raw values, of an action.
        frame: Of a pose: "world", "base" or "ee".
        rotation: Of a pose: layout of its rotation, a name in `LAYOUTS`.
        open, close: Raw values of a gripper; of the state's only where they say which way its numbers count.
        is_binary: Whether an action's gripper is either open or closed; else any value between.
        absent: Names of an action's dimensions that this robot lacks: always 0, and masked in the loss.
    """

    kind: str
    names: tuple[str, ...]
    units: tuple[str, ...]
    scale: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    frame: str = ""
    rotation: str = "none"
    open: float | None = None
    close: float | None = None
    is_binary: bool = False
    absent: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Group:
        """As in a card; an unknown or missing field is an error."""
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict):
            raise CardError(f"{where}: expected a group of fields, got {values!r}; fields that exist: {sorted(known)}")
        unknown = sorted(set(map(str, values)) - known)
        missing = sorted(f.name for f in fields(cls) if f.default is MISSING and f.name not in values)
        if unknown or missing:
            raise CardError(f"{where}: unknown fields {unknown}, missing fields {missing}; fields that exist: {sorted(known)}")
        read = {name: parse_field(name, value) for name, value in values.items()}
        check_fields(read, where)
        return cls(**read)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without those that are the default."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def gripper_ends(self) -> tuple[float, float]:
        """Raw values of a gripper, closed and open; 0 and 1 where it does not say."""
        return (0.0, 1.0) if self.open is None or self.close is None else (self.close, self.open)

    @property
    def radians(self) -> float:
        """Radians of one unit of its rotation's numbers; 1 of layouts without angles."""
        is_degrees = LAYOUTS[self.rotation] == 3 and self.units[-1] == "deg"
        return math.pi / 180 if is_degrees else 1.0

    @property
    def n_position(self) -> int:
        """Number of a pose's position dimensions, which come first."""
        return len(self.names) - LAYOUTS[self.rotation]


def checked_groups(groups: Sequence[Group], side: str, where: str) -> tuple[Group, ...]:
    """The groups of an "action" or a "state", completed by defaults.

    Raises:
        CardError: The first group that contradicts itself, or a name that stands twice.
    """
    out = []
    for i, group in enumerate(groups):
        at = f"{where}: {side} group {i} ({group.kind})"
        check_fields({f.name: getattr(group, f.name) for f in fields(group) if getattr(group, f.name) != f.default}, at)
        _check_kind(group, at)
        out.append(_checked_action(group, at) if side == "action" else _checked_state(group, at))
    names = [name for group in out for name in group.names]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise CardError(f"{where}: expected {side} names without repetition, got {twice} twice; give each a name of its own")
    return tuple(out)


def _check_kind(group: Group, at: str) -> None:
    if group.kind not in KINDS:
        raise CardError(f"{at}: kind is {group.kind!r}; expected one of {', '.join(KINDS)}")
    if not group.names or len(group.units) != len(group.names):
        raise CardError(f"{at}: 'units' has {len(group.units)} entries for {len(group.names)} names")
    if group.kind not in POSES:
        if group.frame or group.rotation != "none":
            raise CardError(f"{at}: expected a frame and a rotation of {' and '.join(POSES)} alone; leave them out")
        return
    if group.rotation not in LAYOUTS:
        raise CardError(f"{at}: rotation is {group.rotation!r}; expected one of {', '.join(LAYOUTS)}")
    if group.frame not in FRAMES:
        raise CardError(f"{at}: frame is {group.frame!r}; expected one of {', '.join(FRAMES)}")
    if group.n_position not in (1, 2, 3):
        raise CardError(
            f"{at}: expected one to three names of position, then {LAYOUTS[group.rotation]} of the rotation "
            f"({group.rotation}); got {list(group.names)}; reorder (or split) the column when you convert the data, and list "
            "the new order in the card"
        )
    own, layout = [_axis(name) for name in group.names[group.n_position :]], group.rotation.removeprefix("quat_")
    if sorted(own) == sorted("wxyz") and own != list(layout):
        raise CardError(
            f"{at}: expected the names of a quaternion in the order of its rotation, {group.rotation}, got "
            f"{list(group.names[group.n_position :])}; write the rotation that the data is in, quat_xyzw or quat_wxyz, and the "
            "names in its order"
        )


def _axis(name: str) -> str:
    """Which number of a quaternion a name says: "x" of "qx", "QX", "qx.pos", "x_quat"; empty if it does not say."""
    words = re.split("[^a-z]+", name.casefold())
    return next((word[-1] for word in words if 0 < len(word) < 3 and word[-1] in "wxyz"), "")


def _checked_state(group: Group, at: str) -> Group:
    allowed = ("open", "close") if group.kind == "gripper" else ("frame", "rotation")
    given = [f.name for f in fields(group)[3:] if f.name not in allowed and getattr(group, f.name) != f.default]
    if given:
        raise CardError(
            f"{at}: expected kind, names, units, of a pose frame and rotation, of a gripper open and close; got {given} too; "
            "leave them out"
        )
    if (group.open is None) != (group.close is None) or (group.open is not None and group.open == group.close):
        raise CardError(f"{at}: expected two numbers as open and close, or none; got {group.open} and {group.close}")
    return group


def _checked_action(group: Group, at: str) -> Group:
    is_gripper = group.kind == "gripper"
    changes: dict[str, Any] = {}
    if is_gripper != (group.open is not None and group.close is not None) or (is_gripper and len(group.names) != 1):
        raise CardError(
            f"{at}: expected 'open' and 'close' of a gripper, which has one dimension; got open {group.open}, close "
            f"{group.close} for {list(group.names)}; make each gripper a group of its own"
        )
    if group.open is not None and group.close is not None:
        if group.open == group.close:
            raise CardError(f"{at}: open and close are both {group.open}; they must differ")
        if group.is_binary and not (group.low or group.high):
            changes = {"low": (min(group.open, group.close),), "high": (max(group.open, group.close),)}
    if group.is_binary and not is_gripper:
        raise CardError(f"{at}: expected 'is_binary' of a gripper alone; leave it out")
    if not group.scale:
        changes["scale"] = (1.0,) * len(group.names)
    completed = Group(**{f.name: changes.get(f.name, getattr(group, f.name)) for f in fields(group)})
    _check_ranges(completed, at)
    return completed


def _check_ranges(group: Group, at: str) -> None:
    for name in ("scale", "low", "high"):
        if len(getattr(group, name)) != len(group.names):
            raise CardError(f"{at}: '{name}' has {len(getattr(group, name))} entries for {len(group.names)} names")
    if not set(group.absent) <= set(group.names) or (group.absent and group.kind == "gripper"):
        raise CardError(f"{at}: absent is {list(group.absent)}; expected some of {', '.join(group.names)}, and no gripper")
    ranges = zip(group.names, group.low, group.high, strict=True)
    empty = [name for name, low, high in ranges if low >= high and name not in group.absent]
    if empty:
        raise CardError(f"{at}: expected 'low' below 'high' in every dimension, got none such for {empty}; fix the card")
    if min(group.scale) <= 0:
        raise CardError(f"{at}: expected positive scales, got {list(group.scale)}")
    if group.open is not None and group.close is not None:
        ends = sorted((group.open, group.close))
        if ends[0] < group.low[0] or ends[1] > group.high[0] or (group.is_binary and ends != [group.low[0], group.high[0]]):
            raise CardError(
                f"{at}: expected open and close {'at' if group.is_binary else 'within'} low and high, got {group.open} and "
                f"{group.close} for {group.low[0]} to {group.high[0]}"
            )
