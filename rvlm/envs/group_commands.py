"""The target of one group of an action: what a robot is sent for a pose, for joints, for a gripper, within limits.

A robot takes and tells values in the units of its card. Displacements become targets: of the pose or the joints that they move.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from rvlm.data.errors import SpecMismatch
from rvlm.data.groups import LAYOUTS, Group
from rvlm.data.pairing import same_places, unit_ratios
from rvlm.data.rotations import from_rotation, nearest_encoding, to_rotation

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
        keys: The robot's names of the target's dimensions; "" of an absent one that it lacks.
        limits: Of the target; those that were left out are infinite.
        is_driven: (s,) Whether a dimension of the target is sent: not where the card calls it absent.
        shares: (n, m) Of a displacement: the target's positions that a unit of each of the action's moves.
    """

    group: Group
    at: slice
    target: Group
    keys: tuple[str, ...]
    limits: GroupLimits
    low: np.ndarray = field(init=False)
    high: np.ndarray = field(init=False)
    is_driven: np.ndarray = field(init=False)
    shares: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        n, is_displacement = self.target.n_position, self.group.kind in TARGET_KINDS
        object.__setattr__(self, "shares", displacement_shares(self.group, self.target) if is_displacement else np.eye(n))
        object.__setattr__(self, "is_driven", self._driven())
        own = (np.full(n, -np.inf), np.full(n, np.inf))
        if not is_displacement and not self.group.is_binary:
            scale = np.asarray(self.group.scale[:n])
            own = (np.asarray(self.group.low[:n]) * scale, np.asarray(self.group.high[:n]) * scale)
        given = (self.limits.low, self.limits.high)
        for name, value, default in zip(("low", "high"), given, own, strict=True):
            object.__setattr__(self, name, default if value is None else np.asarray(value, np.float64))
        if not (self.low < self.high)[self.is_driven[:n]].all():
            raise ValueError(
                f"expected limits of {list(self.target.names[:n])} with low below high, got {self.limits.low} to "
                f"{self.limits.high}"
            )

    def _driven(self) -> np.ndarray:
        n, layout = self.group.n_position, self.group.rotation
        is_present = np.array([name not in self.group.absent for name in self.group.names])
        rotation = is_present[n:]
        if layout not in ("none", self.target.rotation):
            rotation = np.full(LAYOUTS[self.target.rotation], rotation.any())
        elif layout == "none":
            rotation = np.ones(LAYOUTS[self.target.rotation], bool)
        return np.concatenate([(self.shares * is_present[:n]).any(1), rotation])

    @property
    def is_position(self) -> bool:
        """Whether it is a target of where the robot is, unlike a gripper or a velocity."""
        return self.target.kind in ("pose", "joint", "other")

    def values(
        self, action: Float[np.ndarray, " d"], present: Float[np.ndarray, " s"], last: Float[np.ndarray, " s"]
    ) -> Float[np.ndarray, " s"]:
        """The target of raw actions (d,), where the robot is at `present` (s,) now and `last` (s,) was the target before.

        Quaternions have length 1 and lie on the half sphere of the last.
        """
        raw, group, n = np.asarray(action, np.float64), self.group, self.target.n_position
        if group.is_binary:
            closed, opened = group.gripper_ends
            raw = np.array([opened if abs(raw[0] - opened) < abs(raw[0] - closed) else closed])
        si = raw * group.scale
        if group.kind == "joint_delta":
            return present + self.shares @ si
        moved = self._moved(si, present) if group.kind == "pose_delta" else si
        if self.target.rotation not in ("quat_xyzw", "quat_wxyz"):
            return moved
        return np.concatenate([moved[:n], self._encoded(self._rotation(moved), last[n:])])

    def _rotation(self, numbers: np.ndarray) -> Rotation:
        """The rotation of a pose in the target's layout and units."""
        return to_rotation(numbers[self.target.n_position :] * self.target.radians, self.target.rotation)

    def _encoded(self, rotation: Rotation, last: np.ndarray) -> np.ndarray:
        """The rotation in the target's layout; of equal numbers those nearest to the last, angles within the card's range."""
        scale = np.asarray(self.target.scale or (1.0,) * len(self.target.names))[self.target.n_position :]
        numbers = from_rotation(rotation, self.target.rotation).reshape(-1) / self.target.radians
        return nearest_encoding(numbers / scale, last / scale, self.target) * scale

    def _moved(self, si: np.ndarray, present: np.ndarray) -> np.ndarray:
        """The pose `present` moved by a displacement in the state's axes or, with frame "ee", in its own."""
        n, m = self.target.n_position, self.group.n_position
        shift = self.shares @ si[:m]
        if self.target.rotation == "none":
            return present + shift
        before, is_own = self._rotation(present), self.group.frame == "ee"
        turn = Rotation.identity()
        if self.group.rotation != "none":
            turn = to_rotation(si[m:] * self.group.radians, self.group.rotation)
        shift, after = (before.apply(shift).reshape(-1), before * turn) if is_own else (shift, turn * before)
        return np.concatenate([present[:n] + shift, self._encoded(after, present[n:])])

    def is_within_reach(self, present: Float[np.ndarray, " s"]) -> bool:
        """Whether the robot is within the limits, or at most a step outside."""
        reach = 0.0 if self.limits.max_change is None else np.asarray(self.limits.max_change)
        if self.group.kind in TARGET_KINDS:
            step = np.abs([self.group.low, self.group.high]).max(0) * self.group.scale
            reach = self.shares @ step[: self.group.n_position]
        at = present[: self.target.n_position]
        is_near = (at >= self.low - reach) & (at <= self.high + reach)
        return bool(is_near[self.is_driven[: len(at)]].all())

    def limited(self, target: Float[np.ndarray, " s"], last: Float[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
        """The target within the limits, where `last` (s,) was the one before."""
        n, near = self.target.n_position, target[: self.target.n_position]
        if self.limits.max_change is not None:
            change = np.asarray(self.limits.max_change, np.float64)
            near = last[:n] + np.clip(near - last[:n], -change, change)
        return np.concatenate([np.clip(near, self.low, self.high), self._turned(target, last)])

    def _turned(self, target: np.ndarray, last: np.ndarray) -> np.ndarray:
        """The rotation of `target`, or the one at most `max_turn_rad` from that of `last` on the way there."""
        n = self.target.n_position
        if self.target.rotation == "none" or self.limits.max_turn_rad is None:
            return target[n:]
        before = self._rotation(last)
        way = (self._rotation(target) * before.inv()).as_rotvec().reshape(-1)
        angle = float(np.linalg.norm(way))
        if angle <= self.limits.max_turn_rad:
            return target[n:]
        return self._encoded(Rotation.from_rotvec(way * self.limits.max_turn_rad / angle) * before, last[n:])


def require_limits(group: Group, target: Group, limits: GroupLimits) -> None:
    """Refuse a group whose targets nothing would keep near and inside.

    Raises:
        SpecMismatch: The limits that are missing, or are not finite, above 0 where they are steps, and as many as dimensions.
    """
    is_box = limits.low is not None and limits.high is not None and np.isfinite([*limits.low, *limits.high]).all()
    wrong = {
        "low and high": (target.kind == "pose" or group.kind == "joint_delta") and not is_box,
        "max_change": group.kind in ("pose", "joint") and limits.max_change is None,
        "max_turn_rad": group.kind == "pose" and group.rotation != "none" and limits.max_turn_rad is None,
    }
    shapes = {"low": [(target.n_position,)], "high": [(target.n_position,)], "max_change": [(), (target.n_position,)]}
    for name in ("low", "high", "max_change", "max_turn_rad"):
        value = getattr(limits, name)
        if value is not None and not wrong.get("low and high" if name in ("low", "high") else name):
            wrong[name] = not _is_limit(value, shapes.get(name, [()]), is_step=name not in ("low", "high"))
    if any(wrong.values()):
        raise SpecMismatch(
            f"expected {', '.join(name for name in wrong if wrong[name])}, finite, in the limits of "
            f"{group.kind} {list(group.names)}, one for each in the limits of {list(target.names[: target.n_position])}, steps "
            f"above 0; got {limits}; choose what is safe on your robot"
        )


def _is_limit(value: float | Sequence[float], shapes: Sequence[tuple[int, ...]], is_step: bool) -> bool:
    numbers = np.asarray(value)
    is_number = numbers.shape in shapes and numbers.dtype.kind in "iuf" and bool(np.isfinite(numbers).all())
    return is_number and (not is_step or bool((numbers > 0).all()))


def displacement_shares(group: Group, target: Group) -> Float[np.ndarray, "n m"]:
    """How far each position or joint of the state (n) is moved by a unit of each of a displacement (m), paired by name.

    Raises:
        SpecMismatch: A displacement that cannot be added to the state's group.
    """
    pairs, n, m = same_places(group, target), target.n_position, group.n_position
    moving = [i for i in range(m) if group.names[i] not in group.absent]
    is_paired = {i for i, _ in pairs} >= set(moving) and {j for _, j in pairs} == set(range(n))
    if not is_paired or (group.rotation != "none" and target.rotation == "none"):
        raise SpecMismatch(
            f"expected a displacement like the {target.kind} {list(target.names)} ({target.rotation}) of the state, named after "
            f"it, such as dx for x, got {list(group.names)} ({group.rotation}); write both into the card alike"
        )
    if group.frame not in ("ee", target.frame) or (group.frame == "ee" and (n != 3 or target.rotation == "none")):
        raise SpecMismatch(
            f"expected a displacement in the frame of the state's pose, or in frame ee of a pose with three positions and a "
            f"rotation, got {list(group.names)} in frame {group.frame!r} for {list(target.names)} in {target.frame!r}; convert "
            "one of them, or write the same frame into the card where they are the same"
        )
    units = zip(*((group.units[i], target.units[j], group.names[i]) for i, j in pairs), strict=True)
    shares = np.zeros((n, m))
    ratios = unit_ratios(*units)
    for (i, j), ratio in zip(pairs, ratios, strict=True):
        shares[j, i] = ratio
    return shares
