"""Commanded and observed motion of any robot, dimension by dimension, from recorded actions and states.

A group of actions is compared with the group of the state that shows its effect: poses with poses, joints with joints, grippers
with fingers. Rotations of any layout become rotation vectors about the axes of their frame.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.spatial.transform import Rotation

from rvlm.data.actions import ActionSpec
from rvlm.data.groups import LAYOUTS, Group
from rvlm.data.pairing import SI, same_places
from rvlm.data.rotations import from_rotation, to_rotation

SHOWN_BY = {"pose": "pose", "pose_delta": "pose", "joint": "joint", "joint_delta": "joint", "gripper": "gripper"}  # of the state
ALL = (-np.inf, np.inf)
SERIES = ("commanded", "moved", "before", "after")
Placed = tuple[slice, Group]


@dataclasses.dataclass(frozen=True)
class Motion:
    """Motion of `d` dimensions in `n` steps of several episodes, in SI units where the card names one that is known.

    Attributes:
        names: Of the action's dimensions; of a rotation, its three axes.
        units: Likewise; of grippers "opening", from 0 (closed) to 1 (open).
        spans: (d,) Range of a target by the card; infinite where it has none.
        is_delta: (d,) A command is a displacement (true) or a target (false).
        is_rotation: (d,) One of three numbers of a rotation vector.
        commanded: (n, d) Displacements; targets relative to the episode's mean position.
        moved: (n, d) Observed displacement during the step.
        before: (n, d) Position before the step, relative to the episode's mean.
        after: (n, d) Position after the step, likewise.
        is_first: (n,) First step of an episode.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    spans: Float[np.ndarray, " d"]
    is_delta: Bool[np.ndarray, " d"]
    is_rotation: Bool[np.ndarray, " d"]
    commanded: Float[np.ndarray, "n d"]
    moved: Float[np.ndarray, "n d"]
    before: Float[np.ndarray, "n d"]
    after: Float[np.ndarray, "n d"]
    is_first: Bool[np.ndarray, " n"]

    @property
    def episode(self) -> Int[np.ndarray, " n"]:
        """Which episode a step is of."""
        return np.cumsum(self.is_first) - 1

    @property
    def is_gripper(self) -> Bool[np.ndarray, " d"]:
        """A gripper's opening."""
        return np.array([unit == "opening" for unit in self.units], bool)

    @property
    def effect(self) -> Float[np.ndarray, "n d"]:
        """What each command should equal but for the controller's lag: the displacement, or the position after the step."""
        return np.where(self.is_delta, self.moved, self.after)

    def of(self, chosen: Any) -> "Motion":
        """Some of the dimensions."""
        at = np.flatnonzero(chosen)
        names, units = (tuple(values[i] for i in at) for values in (self.names, self.units))
        arrays = {name: getattr(self, name)[..., at] for name in ("spans", "is_delta", "is_rotation", *SERIES)}
        return Motion(names, units, is_first=self.is_first, **arrays)


def motion_of(spec: ActionSpec, episodes: Iterable[tuple[np.ndarray, np.ndarray]]) -> Motion | None:
    """Motion in episodes of raw actions (n, a) and states (n + 1, s); None without steps, or where no group's effect is shown."""
    pairs, episodes = paired_groups(spec), [episode for episode in episodes if len(episode[0])]
    if not pairs or not episodes:
        return None
    parts = [[_group_motion(action, state, *pair) for pair in pairs] for action, state in episodes]
    arrays = [np.concatenate([np.concatenate([group[k] for group in part], axis=1) for part in parts]) for k in range(4)]
    is_first = np.concatenate([np.arange(len(part[0][0])) == 0 for part in parts])
    return Motion(*_described(pairs), *arrays, is_first=is_first)


def paired_groups(spec: ActionSpec) -> list[tuple[Placed, Placed, list[tuple[int, int]]]]:
    """Groups of actions with the group of the state that shows their effect, and which position or joint is which.

    Groups in frames whose relation is not known, such as world and base, are left out.
    """
    pairs, counts = [], dict.fromkeys(SHOWN_BY.values(), 0)
    for placed in spec.placed_action:
        kind = SHOWN_BY.get(placed[1].kind)
        shown = [other for other in spec.placed_state if other[1].kind == kind]
        if kind is None or not shown:
            continue
        named = max(shown, key=lambda other: len(same_places(placed[1], other[1])))
        same = same_places(placed[1], named[1])
        other = named if same else shown[min(counts[kind], len(shown) - 1)]
        counts[kind] += 1
        n = placed[1].n_position
        same = same or [(i, i) for i in range(n if n == other[1].n_position else 0)]
        if kind == "gripper":
            pairs.append((placed, other, [(0, 0)]))
        elif same and (kind == "joint" or placed[1].frame in ("ee", other[1].frame)):
            pairs.append((placed, other, same))
    return pairs


def held_targets(spec: ActionSpec, states: Float[np.ndarray, "n s"]) -> Float[np.ndarray, "n a"]:
    """Raw actions (n, a) whose targets are where the states are; NaN in dimensions that have none, or that no state shows."""
    held = np.full((len(states), spec.n_dims), np.nan)
    for (at, group), (shown, other), same in paired_groups(spec):
        if group.kind not in ("pose", "joint") or group.frame == "ee":
            continue
        own, others = (np.array(columns) for columns in zip(*same, strict=True))
        held[:, at.start + own] = states[:, shown.start + others] * (_to_si(other)[others] / _to_si(group)[own])
        if _has_rotation(group, other):
            turned = to_rotation(states[:, shown.start + other.n_position : shown.stop] * other.radians, other.rotation)
            rotation = slice(at.start + group.n_position, at.stop)
            held[:, rotation] = from_rotation(turned, group.rotation) / _to_si(group)[group.n_position :]
    return held


def invalid_rotations(spec: ActionSpec, actions: np.ndarray, states: np.ndarray) -> str | None:
    """What is no rotation among raw actions (n, a) and states (n, s): quaternions and axes have length 1, axes a right angle."""
    for what, placed, values in (("action", spec.placed_action, actions), ("state", spec.placed_state, states)):
        for at, group in placed:
            layout, numbers = group.rotation, values[:, at] * raw_to_units(group)
            numbers = numbers[:, group.n_position :]
            axes = numbers.reshape(len(numbers), -1, 3) if layout == "rot6d" else numbers[:, None]
            if "delta" in group.kind or (layout != "rot6d" and "quat" not in layout):
                continue
            is_wrong = (np.abs(np.linalg.norm(axes, axis=-1) - 1) > 0.05).any(1)
            if layout == "rot6d":
                is_wrong |= np.abs((axes[:, 0] * axes[:, 1]).sum(1)) > 0.05
            if is_wrong.mean() > 0.01:
                names = ", ".join(group.names[group.n_position :])
                return f"{is_wrong.mean():.0%} of the {what}'s {layout} ({names}) are no rotations"
    return None


def _described(pairs: Sequence[Any]) -> tuple[Any, ...]:
    """`names`, `units`, `spans`, `is_delta` and `is_rotation` of the dimensions."""
    rows: list[tuple[str, str, Any, bool, bool]] = []
    for (_, action), (_, state), same in pairs:
        is_delta, rotation = "delta" in action.kind, action.names[action.n_position :]
        if action.kind == "gripper":
            rows.append((action.names[0], "opening", np.inf, False, False))
            continue
        span = _to_si(action) * np.subtract(action.high, action.low) if action.low else np.full(len(action.names), np.inf)
        rows += [(action.names[i], _si_unit(action.units[i]), span[i], is_delta, False) for i, _ in same]
        if _has_rotation(action, state):
            names = rotation if len(rotation) == 3 else [f"{rotation[0]}: rotation about {axis}" for axis in "xyz"]
            rows += [(name, "rad", 2 * np.pi, is_delta, True) for name in names]
    names, units, *arrays = zip(*rows, strict=True)
    return names, units, *map(np.array, arrays)


def _si_unit(unit: str) -> str:
    return SI.get(unit, (unit, 1.0))[0]


def _has_rotation(action: Group, state: Group) -> bool:
    return min(LAYOUTS[group.rotation] for group in (action, state)) > 0


def _group_motion(actions: np.ndarray, states: np.ndarray, action: Placed, state: Placed, same: Any) -> list[np.ndarray]:
    """`commanded`, `moved`, `before` and `after` of one group in one episode."""
    (ours, group), (theirs, shown) = action, state
    if group.kind == "gripper":
        opening = _opening(states[:, theirs], shown)[:, None]
        closed, opened = group.gripper_ends
        command = np.clip((actions[:, ours] - closed) / (opened - closed), *((0, 1) if group.is_binary else ALL))
        mean = opening.mean(0)
        return [command - mean, np.diff(opening, axis=0), opening[:-1] - mean, opening[1:] - mean]
    commands, positions = actions[:, ours] * _to_si(group), states[:, theirs] * _to_si(shown)
    is_delta, is_hand = "delta" in group.kind, group.frame == "ee"
    turned = to_rotation(positions[:, shown.n_position :], shown.rotation) if _has_rotation(group, shown) else None
    own, other = ([pair[k] for pair in same] for k in (0, 1))
    commanded, position = commands[:, own], positions[:, other]
    moved = np.diff(position, axis=0)
    if is_hand and turned is not None and len(own) == 3:
        moved = turned[:-1].inv().apply(moved)
    mean = 0 if is_delta else position.mean(0)
    parts = [[commanded - mean, moved, position[:-1] - position.mean(0), position[1:] - position.mean(0)]]
    if turned is not None:
        parts.append(_turns(to_rotation(commands[:, group.n_position :], group.rotation), turned, is_delta, is_hand))
    return [np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)]


def _opening(values: Float[np.ndarray, "n f"], group: Group) -> Float[np.ndarray, " n"]:
    """How far open fingers are: by the card's open and closed value, else the larger their numbers, whatever their sign."""
    if group.open is not None:
        closed, opened = group.gripper_ends
        return ((values - closed) / (opened - closed)).mean(1)
    return values[:, 0] if values.shape[1] == 1 else np.abs(values).mean(1)


def raw_to_units(group: Group) -> Float[np.ndarray, " d"]:
    """Units per raw number of each dimension; the state's numbers are in their units."""
    return np.array(group.scale or (1.0,) * len(group.names))


def _to_si(group: Group) -> np.ndarray:
    return raw_to_units(group) * [SI.get(unit, (unit, 1.0))[1] for unit in group.units]


def _turns(commanded: Rotation, turned: Rotation, is_delta: bool, is_hand: bool) -> list[np.ndarray]:
    """The same of rotations, as rotation vectors (n, 3): positions are relative to the episode's first one."""
    first, now, after = turned[0].inv(), turned[:-1], turned[1:]
    moved = (now.inv() * after if is_hand else after * now.inv()).as_rotvec()
    position = (turned * first).as_rotvec()
    mean = position.mean(0)
    target = commanded.as_rotvec() if is_delta else (commanded * first).as_rotvec() - mean
    return [target, moved, position[:-1] - mean, position[1:] - mean]
