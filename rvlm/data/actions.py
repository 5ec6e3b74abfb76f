"""Action spaces: the conventions of one robot's actions and state, read from its data card.

An action is a vector of groups (`rvlm.data.groups`): a displacement of the hand and a gripper, joints, two arms. Units, frames,
ranges and gripper signs are defined in a data card and nowhere else. `ActionSpec` reads the card and is stored in every
checkpoint; `NormStats` (`rvlm.data.normalization`) maps raw actions to normalised ones and back, per dimension and per dataset.

In training batches continuous dimensions are normalised; **a binary gripper is in {0, 1}: 1 is open** (`ActionSpec.normalize`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from rvlm.data.cards import CARDS, check_cameras, check_fields, parse_field, read_card
from rvlm.data.errors import CardError, SpecMismatch
from rvlm.data.groups import Group, checked_groups
from rvlm.data.normalization import QUANTILES, NormStats, StatsAccumulator, array_like, on_half_sphere
from rvlm.data.spec_dimensions import Dimensions

__all__ = [
    "CARDS",
    "QUANTILES",
    "ActionSpec",
    "CardError",
    "Group",
    "NormStats",
    "SpecMismatch",
    "StatsAccumulator",
    "read_card",
]


@dataclass(frozen=True)
class ActionSpec(Dimensions):
    """Conventions of one robot's actions and state, as in its data card.

    Attributes:
        dataset, robot: Names of the dataset and of the robot.
        rate_hz: Control rate; one action lasts ``1 / rate_hz`` seconds.
        cameras: Names, in the order of the model's input images; the same in dataset, observation and environment.
        action: Groups of the action's dimensions, in order.
        state: Groups of the proprioceptive vector's dimensions, in order.
        image_rotation_deg: Rotation of stored images against what simulator or camera show (LIBERO's public sets: 180).
            Observations have images as they are stored: `rvlm.envs.stored_images.StoredImages` turns an environment's.

    Example:
        >>> spec = rvlm.ActionSpec.from_card("libero")
        >>> spec.names
        ('dx', 'dy', 'dz', 'droll', 'dpitch', 'dyaw', 'gripper')
        >>> spec.rate_hz, spec.action[0].rotation, spec.action[1].open
        (20.0, 'axis_angle', -1.0)
    """

    dataset: str
    robot: str
    rate_hz: float
    cameras: tuple[str, ...]
    action: tuple[Group, ...]
    state: tuple[Group, ...]
    image_rotation_deg: float = 0.0

    def __post_init__(self) -> None:
        where = str(self.dataset)
        check_fields({f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("action", "state")}, where)
        check_cameras(self.cameras, where)
        for side in ("action", "state"):
            object.__setattr__(self, side, checked_groups(getattr(self, side), side, where))
        if not self.action or self.rate_hz <= 0:
            raise CardError(
                f"{where}: expected an action group and a positive rate_hz, got {len(self.action)} and {self.rate_hz}"
            )

    @classmethod
    def from_card(cls, path_or_name: str | Path) -> ActionSpec:
        """Read a data card; a bare name means ``data_cards/NAME.md``."""
        block = read_card(path_or_name)["rvlm"]
        try:
            return cls.from_dict({k: v for k, v in block.items() if k not in ("counts", "splits", "feature_keys")})
        except CardError as error:
            raise CardError(f"{path_or_name}: {error}") from error

    @classmethod
    def from_dict(cls, values: Any) -> ActionSpec:
        """Inverse of `to_dict`; an unknown or missing field is an error."""
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict):
            raise CardError(f"action spec: expected an object of fields, got {values!r}; fields that exist: {sorted(known)}")
        unknown, missing = sorted(set(values) - known), sorted(known - set(values) - {"image_rotation_deg"})
        if unknown or missing:
            raise CardError(
                f"action spec: unknown fields {unknown}, missing fields {missing}; fields that exist: {sorted(known)}"
            )
        read = {name: parse_field(name, value) for name, value in values.items() if name not in ("action", "state")}
        for side in ("action", "state"):
            if not isinstance(values[side], (list, tuple)):
                raise CardError(f"{read['dataset']}: expected {side!r} as a list of groups, got {values[side]!r}")
            where = f"{read['dataset']}: {side} group"
            read[side] = tuple(Group.from_dict(group, f"{where} {i}") for i, group in enumerate(values[side]))
        return cls(**read)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for checkpoints and for a dataset's info.json."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        groups = {side: [group.to_dict() for group in plain[side]] for side in ("action", "state")}
        return {**plain, "cameras": list(self.cameras), **groups}

    def replace_group(self, side: str, index: int, **changes: Any) -> ActionSpec:
        """The same with other fields of one group of the "action" or the "state"."""
        groups = list(getattr(self, side))
        groups[index] = dataclasses.replace(groups[index], **changes)
        return dataclasses.replace(self, **{side: tuple(groups)})

    def is_open(self, actions: Any) -> Any:
        """Raw actions ``(..., a)`` -> bool ``(..., g)``: whether each gripper is nearer to its open than to its closed value."""
        opened, closed = self._gripper_values
        ratio = (actions[..., list(self.gripper_indices)] - array_like(closed, actions)) / array_like(opened - closed, actions)
        return ratio > 0.5

    def set_grippers(self, actions: Any, is_open: Any) -> Any:
        """Copy of raw actions ``(..., a)`` with the grippers' raw values for ``is_open`` ``(..., g)``, or one for all."""
        actions = actions.clone() if hasattr(actions, "clone") else np.array(actions)
        opened, closed = self._gripper_values
        is_open = is_open * 1.0  # bool or {0, 1}, numpy or torch
        actions[..., list(self.gripper_indices)] = array_like(closed, actions) + is_open * array_like(opened - closed, actions)
        return actions

    @property
    def _gripper_values(self) -> tuple[np.ndarray, np.ndarray]:
        """Raw values of the grippers (g,), open and closed."""
        grippers = [group for _, group in self.action_groups("gripper")]
        opened, closed = ([getattr(group, end) for group in grippers] for end in ("open", "close"))
        return np.array(opened, np.float64), np.array(closed, np.float64)

    def to_si(self, actions: Any, *names: str) -> Any:
        """Raw actions ``(..., a)`` -> values in `units` ``(..., len(names))``; all dimensions if no name is given."""
        wrong = [n for n in names if n not in self.names]
        if wrong:
            raise SpecMismatch(f"{self.dataset} has no action dimension {wrong}; it has {list(self.names)}")
        index = [self.names.index(n) for n in names or self.names]
        return actions[..., index] * array_like(np.asarray(self.scale)[index], actions)

    def normalize(self, actions: Any, stats: NormStats) -> Any:
        """Raw ``(..., a)`` -> training units: by ``stats``, a binary gripper 1 (open) or 0 (closed), q and -q alike."""
        out = stats.normalize(on_half_sphere(actions, self.placed_action, stats.reference))
        out[..., self._binary] = array_like(1.0, out) * self.is_open(actions)[..., self._is_binary_gripper]
        return out

    def normalize_state(self, state: Any, stats: NormStats) -> Any:
        """Raw states ``(..., s)`` -> training units: by ``stats``, q and -q alike."""
        return stats.normalize(on_half_sphere(state, self.placed_state, stats.reference))

    def unnormalize(self, normalized: Any, stats: NormStats) -> Any:
        """Training units ``(..., a)`` -> raw: by ``stats``, 0 in absent dimensions, a binary gripper open where above 0.5."""
        raw = stats.unnormalize(normalized) * array_like(self.present, normalized)
        switched = self.set_grippers(raw, normalized[..., list(self.gripper_indices)] > 0.5)
        raw[..., self._binary] = switched[..., self._binary]
        return raw

    @property
    def _binary(self) -> list[int]:
        """Indices of binary grippers among the dimensions."""
        return np.flatnonzero(self.is_binary).tolist()

    @property
    def _is_binary_gripper(self) -> list[int]:
        """Indices of binary grippers among the grippers."""
        return [i for i, (_, group) in enumerate(self.action_groups("gripper")) if group.is_binary]

    def check(self, actions: np.ndarray) -> None:
        """Raise `SpecMismatch` unless raw actions ``(..., a)`` have ``a`` dimensions, are finite and within range."""
        actions = np.asarray(actions)
        if actions.ndim < 1 or actions.shape[-1] != self.n_dims:
            raise SpecMismatch(
                f"expected {self.n_dims} action dimensions {list(self.names)} ({self.dataset}), got shape {actions.shape}; "
                "use the card of this robot, or convert the data to the card's layout"
            )
        rows = actions.reshape(-1, self.n_dims)
        self._raise_if(~np.isfinite(rows), rows, "finite numbers", "drop or repair the frame where it is recorded")
        margin = 1e-4 * np.maximum(1, np.abs([self.low, self.high]).max(0))
        outside = (rows < np.subtract(self.low, margin)) | (rows > np.add(self.high, margin))
        span = f"low {list(self.low)} to high {list(self.high)}"
        self._raise_if(
            outside, rows, span, "are these raw action units? to_si gives metres and radians; else widen the card's range"
        )

    def _raise_if(self, bad: np.ndarray, rows: np.ndarray, expected: str, fix: str) -> None:
        if bad.any():
            row, dim = np.argwhere(bad)[0]
            raise SpecMismatch(
                f"expected {expected}, got {rows[row, dim]} for {self.names[dim]!r} in row {row} "
                f"({bad.any(axis=1).sum()} of {len(rows)} rows; {self.dataset}); {fix}"
            )

    def has_same_conventions(self, other: ActionSpec) -> bool:
        """Whether nothing differs but the dataset's name."""
        return _conventions(self) == _conventions(other)

    def require_same(self, other: ActionSpec, what: str = "policy vs environment") -> None:
        """Raise `SpecMismatch` with every convention that differs; the dataset's name may differ."""
        own, others = _conventions(self), _conventions(other)
        differing = [name for name in dict.fromkeys([*own, *others]) if own.get(name) != others.get(name)]
        if differing:
            lines = "; ".join(f"{name}: {own.get(name)} against {others.get(name)}" for name in differing)
            raise SpecMismatch(
                f"{what}: {len(differing)} convention(s) differ: {lines}. Use the environment of card {self.dataset!r}, "
                f"a policy trained on card {other.dataset!r}, or convert one to the other's convention"
            )


def _conventions(spec: ActionSpec) -> dict[str, Any]:
    """Each convention by name, those of groups by side, place and kind."""
    plain = {k: v for k, v in spec.to_dict().items() if k not in ("dataset", "action", "state")}
    for side in ("action", "state"):
        for i, group in enumerate(getattr(spec, side)):
            for f in fields(group):
                value = getattr(group, f.name)
                plain[f"{side} group {i} {f.name}"] = list(value) if isinstance(value, tuple) else value
    return plain
