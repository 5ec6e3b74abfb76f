"""Dimensions of a spec's groups as one vector: names, units, ranges, and which are grippers, binary or absent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rvlm.data.groups import Group

MIN_SPEED = {"m": 0.01, "rad": 0.05, "deg": 3.0}  # slower counts as noise [unit/s]
MIN_RANGE_FRACTION = 0.01  # for a dimension in other units, of its range
PlacedGroups = tuple[tuple[slice, Group], ...]


class Dimensions:
    """What `ActionSpec` says of each dimension of its action (a) and state (s)."""

    rate_hz: float
    action: tuple[Group, ...]
    state: tuple[Group, ...]

    @property
    def placed_action(self) -> PlacedGroups:
        """Each group of the action and its place on the last axis."""
        return _placed(self.action)

    @property
    def placed_state(self) -> PlacedGroups:
        """Each group of the state and its place on the last axis."""
        return _placed(self.state)

    def action_groups(self, *kinds: str) -> PlacedGroups:
        """The action's groups of these kinds, and their places."""
        return tuple((place, group) for place, group in self.placed_action if group.kind in kinds)

    def state_groups(self, *kinds: str) -> PlacedGroups:
        """The state's groups of these kinds, and their places."""
        return tuple((place, group) for place, group in self.placed_state if group.kind in kinds)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the action's dimensions."""
        return _joined(self.action, "names")

    @property
    def units(self) -> tuple[str, ...]:
        """Of the action's dimensions after `to_si`."""
        return _joined(self.action, "units")

    @property
    def scale(self) -> tuple[float, ...]:
        """SI units per raw unit of the action's dimensions."""
        return _joined(self.action, "scale")

    @property
    def low(self) -> tuple[float, ...]:
        """Least raw values of the action's dimensions."""
        return _joined(self.action, "low")

    @property
    def high(self) -> tuple[float, ...]:
        """Largest raw values of the action's dimensions."""
        return _joined(self.action, "high")

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of action dimensions that this robot lacks."""
        return _joined(self.action, "absent")

    @property
    def state_names(self) -> tuple[str, ...]:
        """Of the state's dimensions."""
        return _joined(self.state, "names")

    @property
    def state_units(self) -> tuple[str, ...]:
        """Of the state's dimensions."""
        return _joined(self.state, "units")

    @property
    def n_dims(self) -> int:
        """Number of action dimensions, grippers included."""
        return len(self.names)

    @property
    def gripper_indices(self) -> tuple[int, ...]:
        """Indices of the grippers on the last axis (g), in their order."""
        return tuple(place.start for place, _ in self.action_groups("gripper"))

    @property
    def is_binary(self) -> np.ndarray:
        """(a,) bool: true for grippers that are open or closed, which are classified; others are regressed."""
        return np.array([group.is_binary for group in self.action for _ in group.names])

    @property
    def present(self) -> np.ndarray:
        """(a,) bool: false for absent dimensions."""
        return np.array([name not in self.absent for name in self.names])

    @property
    def scale_floor(self) -> np.ndarray:
        """(a,) raw units: the least scale of each dimension in `NormStats`, below which values are noise.

        1 cm/s, 0.05 rad/s or 3 deg/s during one action; one per cent of the card's range for other units.
        """
        step = np.array([MIN_SPEED.get(unit, np.nan) for unit in self.units]) / self.rate_hz / self.scale
        return np.where(np.isfinite(step), step, MIN_RANGE_FRACTION * np.subtract(self.high, self.low) / 2)

    @property
    def state_scale_floor(self) -> np.ndarray:
        """(s,) The same for the state: as much during one control period, 0 for other units."""
        return np.array([MIN_SPEED.get(unit, 0) / self.rate_hz for unit in self.state_units])


def _placed(groups: Sequence[Group]) -> PlacedGroups:
    ends = np.cumsum([len(group.names) for group in groups]).tolist()
    return tuple((slice(end - len(group.names), end), group) for end, group in zip(ends, groups, strict=True))


def _joined(groups: Sequence[Group], name: str) -> tuple[Any, ...]:
    return tuple(value for group in groups for value in getattr(group, name))
