"""Action spaces: the conventions of one robot's actions and state, read from its data card.

An action is a vector ``dx dy dz droll dpitch dyaw gripper``. Its units, frame, range and gripper sign are defined in a data card
and nowhere else. `ActionSpec` reads the card and is stored in every checkpoint; `NormStats` (`rvlm.data.normalization`) maps raw
actions to normalised ones and back, per dimension and per dataset.

In training batches the arm is normalised and **the gripper is in {0, 1}: 1 is open** (`ActionSpec.normalize`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from rvlm.data.cards import CARDS, check_fields, parse_field, read_card
from rvlm.data.errors import CardError, SpecMismatch
from rvlm.data.normalization import QUANTILES, NormStats, StatsAccumulator, array_like

__all__ = [
    "CARDS",
    "QUANTILES",
    "ActionSpec",
    "CardError",
    "NormStats",
    "SpecMismatch",
    "StatsAccumulator",
    "read_card",
]
ARM_DIMS = 6
ROTATIONS = ("axis_angle", "euler_xyz", "quat_xyzw", "quat_wxyz", "joint", "none")
FRAMES = ("world", "base", "ee")
MIN_SPEED = {"m": 0.01, "rad": 0.05}  # slower counts as noise [unit/s]
MIN_RANGE_FRACTION = 0.01  # for a dimension in other units, of its range


@dataclass(frozen=True)
class ActionSpec:
    """Conventions of one robot's actions and state, as in its data card.

    Attributes:
        names: one per dimension; the first six are the arm, the last is "gripper".
        units: SI unit of each dimension after `to_si`.
        scale: SI units per raw action unit, per dimension (the gripper's is 1).
        low, high: range of raw actions, per dimension.
        is_delta: arm dimensions are displacements (true) or target poses (false).
        frame: frame in which the arm dimensions are expressed: "world", "base" or "ee".
        rotation: layout of dimensions 3 to 5, e.g. "axis_angle" or "euler_xyz".
        gripper_open, gripper_close: raw values of the last dimension.
        rate_hz: control rate; one action lasts ``1 / rate_hz`` seconds.
        cameras: names, in the order of the model's input images.
        state_names, state_units, state_rotation: the proprioceptive vector.
        robot, dataset: names of the robot and of the dataset.
        absent: names of arm dimensions that this robot lacks; they are always 0 and masked in the loss.
        image_rotation_deg: rotation of stored images against what the environment renders (LIBERO's public sets: 180).

    Example:
        >>> spec = rvlm.ActionSpec.from_card("libero")
        >>> spec.names
        ('dx', 'dy', 'dz', 'droll', 'dpitch', 'dyaw', 'gripper')
        >>> spec.rate_hz, spec.rotation
        (20.0, 'axis_angle')
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    scale: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    is_delta: bool
    frame: str
    rotation: str
    gripper_open: float
    gripper_close: float
    rate_hz: float
    cameras: tuple[str, ...]
    state_names: tuple[str, ...]
    state_units: tuple[str, ...]
    state_rotation: str
    robot: str
    dataset: str
    absent: tuple[str, ...] = ()
    image_rotation_deg: float = 0.0

    def __post_init__(self) -> None:
        check_fields({f.name: getattr(self, f.name) for f in fields(self)})
        self._check_layout()
        self._check_values()

    def _check_layout(self) -> None:
        if len(self.names) != ARM_DIMS + 1 or self.names[-1] != "gripper":
            raise CardError(
                f"{self.dataset}: expected 7 action dimensions, six of the arm and 'gripper' last; got {list(self.names)}; "
                "reorder (or split) the action column when you convert the data, and list the new order in the card"
            )
        for name in ("units", "scale", "low", "high"):
            if len(getattr(self, name)) != len(self.names):
                raise CardError(f"{self.dataset}: '{name}' has {len(getattr(self, name))} entries for {len(self.names)} names")
        if len(self.state_units) != len(self.state_names):
            raise CardError(
                f"{self.dataset}: 'state_units' has {len(self.state_units)} entries for {len(self.state_names)} names"
            )

    def _check_values(self) -> None:
        for name, known in (("rotation", ROTATIONS), ("state_rotation", ROTATIONS), ("frame", FRAMES)):
            if getattr(self, name) not in known:
                raise CardError(f"{self.dataset}: {name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.gripper_open == self.gripper_close:
            raise CardError(f"{self.dataset}: gripper_open and gripper_close are both {self.gripper_open}; they must differ")
        if not set(self.absent) <= set(self.names[:-1]):
            raise CardError(f"{self.dataset}: absent is {list(self.absent)}; expected some of {', '.join(self.names[:-1])}")
        empty = [n for n, low, high in zip(self.names, self.low, self.high, strict=True) if low >= high and n not in self.absent]
        if empty:
            raise CardError(
                f"{self.dataset}: expected 'low' below 'high' in every dimension, got none such for {empty}; fix the card"
            )
        outside = {self.gripper_open, self.gripper_close} - {self.low[-1], self.high[-1]}
        if outside or self.rate_hz <= 0 or min(self.scale) <= 0:
            raise CardError(
                f"{self.dataset}: expected gripper values at low[-1] and high[-1], a positive rate_hz and positive scales; got "
                f"gripper {self.gripper_open}/{self.gripper_close} in [{self.low[-1]}, {self.high[-1]}], {self.rate_hz} Hz, "
                f"scale {list(self.scale)}"
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
        unknown, missing = sorted(set(values) - known), sorted(known - set(values) - {"image_rotation_deg", "absent"})
        if unknown or missing:
            raise CardError(
                f"action spec: unknown fields {unknown}, missing fields {missing}; fields that exist: {sorted(known)}"
            )
        read = {k: parse_field(k, v) for k, v in values.items()}
        check_fields(read)
        return cls(**read)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for checkpoints and for a dataset's info.json."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def n_dims(self) -> int:
        """Number of action dimensions, gripper included."""
        return len(self.names)

    @property
    def gripper_index(self) -> int:
        """Index of the gripper on the last axis."""
        return self.n_dims - 1

    @property
    def is_binary(self) -> np.ndarray:
        """(a,) bool: true for dimensions that are one of two values, in {0, 1} while training; the gripper's."""
        return np.arange(self.n_dims) == self.gripper_index

    @property
    def arm_slice(self) -> slice:
        """The arm's dimensions on the last axis."""
        return slice(0, self.n_dims - 1)

    @property
    def present(self) -> np.ndarray:
        """(a,) bool: false for absent dimensions."""
        return np.array([name not in self.absent for name in self.names])

    @property
    def scale_floor(self) -> np.ndarray:
        """(a,) raw units: the least scale of each dimension in `NormStats`, below which values are noise.

        1 cm/s or 0.05 rad/s during one action; one per cent of the card's range for other units.
        """
        step = np.array([MIN_SPEED.get(unit, np.nan) for unit in self.units]) / self.rate_hz / self.scale
        return np.where(np.isfinite(step), step, MIN_RANGE_FRACTION * np.subtract(self.high, self.low) / 2)

    @property
    def state_scale_floor(self) -> np.ndarray:
        """(s,) The same for the state: 1 cm/s or 0.05 rad/s during one control period, 0 for other units."""
        return np.array([MIN_SPEED.get(unit, 0) / self.rate_hz for unit in self.state_units])

    def is_open(self, actions: Any) -> Any:
        """Raw actions ``(..., a)`` -> bool ``(...)``: whether the gripper is nearer to the open than to the closed value."""
        middle = (self.gripper_open + self.gripper_close) / 2
        gripper = actions[..., self.gripper_index]
        return gripper > middle if self.gripper_open > self.gripper_close else gripper < middle

    def set_gripper(self, actions: Any, is_open: Any) -> Any:
        """Copy of raw actions ``(..., a)`` with the gripper's raw value for ``is_open`` ``(...)``."""
        actions = actions.clone() if hasattr(actions, "clone") else np.array(actions)
        is_open = is_open * 1.0  # bool or {0, 1}, numpy or torch
        actions[..., self.gripper_index] = self.gripper_close + is_open * (self.gripper_open - self.gripper_close)
        return actions

    def to_si(self, actions: Any, *names: str) -> Any:
        """Raw actions ``(..., a)`` -> values in `units` ``(..., len(names))``; all dimensions if no name is given."""
        wrong = [n for n in names if n not in self.names]
        if wrong:
            raise SpecMismatch(f"{self.dataset} has no action dimension {wrong}; it has {list(self.names)}")
        index = [self.names.index(n) for n in names or self.names]
        return actions[..., index] * array_like(np.asarray(self.scale)[index], actions)

    def normalize(self, actions: Any, stats: NormStats) -> Any:
        """Raw ``(..., a)`` -> training units: the arm by ``stats``, the gripper 1 (open) or 0 (closed)."""
        is_gripper = array_like(np.arange(self.n_dims) == self.gripper_index, actions)
        return stats.normalize(actions) * (1 - is_gripper) + self.is_open(actions)[..., None] * is_gripper

    def unnormalize(self, normalized: Any, stats: NormStats) -> Any:
        """Training units ``(..., a)`` -> raw: the arm by ``stats``, 0 in absent dimensions, the gripper open where above 0.5."""
        raw = stats.unnormalize(normalized) * array_like(self.present, normalized)
        return self.set_gripper(raw, normalized[..., self.gripper_index] > 0.5)

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

    def require_same(self, other: ActionSpec, what: str = "policy vs environment") -> None:
        """Raise `SpecMismatch` with every convention that differs; the dataset's name may differ."""
        own, others = self.to_dict(), other.to_dict()
        differing = [k for k in own if k != "dataset" and own[k] != others[k]]
        if differing:
            lines = "; ".join(f"{k}: {own[k]} against {others[k]}" for k in differing)
            raise SpecMismatch(
                f"{what}: {len(differing)} convention(s) differ: {lines}. Use the environment of card {self.dataset!r}, "
                f"a policy trained on card {other.dataset!r}, or convert one to the other's convention"
            )
