"""The target of one group of an action: what a robot is sent for a pose, for joints, for a gripper, within limits.

A robot takes and tells values in the units of its card. Displacements become targets: of the pose or the joints that they move.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from rvlm.data.errors import SpecMismatch
from rvlm.data.groups import Group
from rvlm.data.rotations import from_rotation, to_rotation

TARGET_KINDS = {"pose_delta": "pose", "joint_delta": "joint"}  # kind of a displacement -> kind of the target


@dataclass(frozen=True)
class GroupLimits:
    """Limits of the targets of one action group, in the card's units.

    Attributes:
        low, high: Of each position dimension of a pose (a box), or of each dimension of another group.
        max_change: From one target to the next, of each of these, or one number for all.
        max_turn_rad: From one target to the next, the angle between the rotations of a pose [rad].
    """

    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    max_change: float | Sequence[float] | None = None
    max_turn_rad: float | None = None


@dataclass(frozen=True)
class GroupCommand:
    """How the actions of one group become a target under the robot's names.

    Attributes:
        group: Of the action.
        at: Its dimensions of the action.
        target: Group of the target: that of the state which a displacement moves, else the action's own.
        keys: The robot's names of the target's dimensions.
        limits: Of the target; those that were left out are infinite.
    """

    group: Group
    at: slice
    target: Group
    keys: tuple[str, ...]
    limits: GroupLimits
    low: np.ndarray = field(init=False)
    high: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        n = self.target.n_position
        own = (np.full(n, -np.inf), np.full(n, np.inf))
        if self.group.kind not in TARGET_KINDS and not self.group.is_binary:
            scale = np.asarray(self.group.scale[:n])
            own = (np.asarray(self.group.low[:n]) * scale, np.asarray(self.group.high[:n]) * scale)
        given = (self.limits.low, self.limits.high)
        for name, value, default in zip(("low", "high"), given, own, strict=True):
            object.__setattr__(self, name, default if value is None else np.asarray(value, np.float64))
        if self.low.shape != (n,) or self.high.shape != (n,) or not (self.low < self.high).all():
            raise ValueError(
                f"expected limits of {list(self.target.names[:n])} with low below high, got {self.limits.low} to "
                f"{self.limits.high}"
            )

    @property
    def is_position(self) -> bool:
        """Whether it is a target of where the robot is, unlike a gripper or a velocity."""
        return self.target.kind in ("pose", "joint", "other")

    def values(self, action: Float[np.ndarray, " d"], present: Float[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
        """The target of raw actions (d,), where the robot is at `present` (s,) now."""
        si, group = np.asarray(action, np.float64) * self.group.scale, self.group
        if group.is_binary:
            return np.array([group.open if abs(si[0] - group.open) < abs(si[0] - group.close) else group.close], np.float64)
        if group.kind == "joint_delta":
            return present + si
        return self._moved(si, present) if group.kind == "pose_delta" else si

    def _moved(self, si: np.ndarray, present: np.ndarray) -> np.ndarray:
        """The pose `present` moved by a displacement in the world's axes or, with frame "ee", in its own."""
        n, layout = self.target.n_position, self.target.rotation
        if layout == "none":
            return present + si
        before, is_own = to_rotation(present[n:], layout), self.group.frame == "ee"
        turn = Rotation.identity() if self.group.rotation == "none" else to_rotation(si[n:], self.group.rotation)
        shift, after = (before.apply(si[:n]).reshape(-1), before * turn) if is_own else (si[:n], turn * before)
        return np.concatenate([present[:n] + shift, from_rotation(after, layout).reshape(-1)])

    def is_within_reach(self, present: Float[np.ndarray, " s"]) -> bool:
        """Whether the robot is within the limits, or at most a step outside."""
        reach = 0.0 if self.limits.max_change is None else np.asarray(self.limits.max_change)
        if self.group.kind in TARGET_KINDS:
            reach = (np.abs([self.group.low, self.group.high]).max(0) * self.group.scale)[: self.target.n_position]
        at = present[: self.target.n_position]
        return bool(((at >= self.low - reach) & (at <= self.high + reach)).all())

    def limited(self, target: Float[np.ndarray, " s"], last: Float[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
        """The target within the limits, where `last` (s,) was the one before."""
        n, near = self.target.n_position, target[: self.target.n_position]
        if self.limits.max_change is not None:
            change = np.asarray(self.limits.max_change, np.float64)
            near = last[:n] + np.clip(near - last[:n], -change, change)
        return np.concatenate([np.clip(near, self.low, self.high), self._turned(target[n:], last[n:])])

    def _turned(self, target: np.ndarray, last: np.ndarray) -> np.ndarray:
        """The rotation `target`, or the one at most `max_turn_rad` from `last` on the way there."""
        if not len(target) or self.limits.max_turn_rad is None:
            return target
        before = to_rotation(last, self.target.rotation)
        way = (to_rotation(target, self.target.rotation) * before.inv()).as_rotvec()
        angle = float(np.linalg.norm(way))
        if angle <= self.limits.max_turn_rad:
            return target
        nearer = Rotation.from_rotvec(way * self.limits.max_turn_rad / angle) * before
        return from_rotation(nearer, self.target.rotation).reshape(-1)


def require_limits(group: Group, target: Group, limits: GroupLimits) -> None:
    """Refuse a group whose targets nothing would keep near and inside.

    Raises:
        SpecMismatch: The limits that are missing.
    """
    is_box = limits.low is not None and limits.high is not None and np.isfinite([*limits.low, *limits.high]).all()
    missing = {
        "low and high": (target.kind == "pose" or group.kind == "joint_delta") and not is_box,
        "max_change": group.kind in ("pose", "joint") and limits.max_change is None,
        "max_turn_rad": group.kind == "pose" and group.rotation != "none" and limits.max_turn_rad is None,
    }
    if any(missing.values()):
        raise SpecMismatch(
            f"expected {', '.join(name for name in missing if missing[name])}, finite, in the limits of {group.kind} "
            f"{list(group.names)}; got {limits}; choose what is safe on your robot"
        )


def require_layout(group: Group, target: Group) -> None:
    """Refuse a displacement that cannot be added to the state's group.

    Raises:
        SpecMismatch: Other numbers of dimensions, or a rotation of what has none.
    """
    if group.n_position != target.n_position or (group.rotation != "none" and target.rotation == "none"):
        raise SpecMismatch(
            f"expected a displacement like the {target.kind} {list(target.names)} ({target.rotation}) of the state, got "
            f"{list(group.names)} ({group.rotation}); write both into the card alike"
        )
