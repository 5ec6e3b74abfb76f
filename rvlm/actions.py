"""What an action means: its spec, its statistics, its tokens.

An action is a vector ``dx dy dz droll dpitch dyaw gripper``. What one unit of it is in metres, which sign opens the gripper
and in which frame it moves the hand stand in a data card and nowhere else. Three things are made from it:

* `ActionSpec` reads the card and travels in every checkpoint;
* `NormStats` maps raw actions to the model's units and back (per dimension, per dataset);
* `ActionTokenizer` turns normalised actions into integers and back.

In training batches the arm is normalised and **the gripper is in {0, 1}: 1 is open** (`ActionSpec.normalize`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

CARDS = Path(__file__).resolve().parents[1] / "data_cards"
ARM_DIMS = 6
KINDS = ("q01_q99", "mean_std", "min_max", "identity")
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
ROTATIONS = ("axis_angle", "euler_xyz", "quat_xyzw", "quat_wxyz", "joint", "none")
FRAMES = ("world", "base", "ee")


class SpecMismatch(ValueError):
    """Two conventions disagree, or actions do not follow the one they claim."""


class CardError(ValueError):
    """A data card can't be read, or does not describe the layout that the library speaks."""


def read_card(path_or_name: str | Path) -> dict[str, Any]:
    """Front matter of a data card as a dict; a bare name means ``data_cards/NAME.md``."""
    path = Path(path_or_name)
    path = path if path.suffix == ".md" else CARDS / f"{path_or_name}.md"
    if not path.is_file():
        have = ", ".join(sorted(p.stem for p in CARDS.glob("*.md"))) or "none"
        raise CardError(f"no data card at {path}; cards that exist: {have}; give one of these names or the path of a .md file")
    parts = path.read_text(encoding="utf-8").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        raise CardError(f"{path}: expected YAML front matter between two '---' lines at the top of the card; found none")
    try:
        matter = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise CardError(f"{path}: the front matter is not YAML ({error}); mend the lines between the two '---'") from error
    if not isinstance(matter, dict) or not isinstance(matter.get("rvlm"), dict):
        raise CardError(f"{path}: expected an 'rvlm:' block in the front matter; copy one from data_cards/tabletop_franka7.md")
    return matter


@dataclass(frozen=True)
class ActionSpec:
    """Conventions of one robot's actions and state, as its data card tells them.

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
        cameras: names in the order in which the model sees them.
        state_names, state_units, state_rotation: the proprioceptive vector.
        robot, dataset: who moves, and where the demonstrations come from.
        absent: names of arm dimensions that this robot cannot move in; they are always 0, and nothing is learned from them.
        image_rotation_deg: rotation of stored images against what the environment renders (LIBERO's public sets: 180).
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
        return cls.from_dict({k: v for k, v in block.items() if k not in ("counts", "splits", "feature_keys")})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ActionSpec:
        """Inverse of `to_dict`; an unknown or missing field is an error."""
        known = {f.name for f in fields(cls)}
        unknown, missing = sorted(set(values) - known), sorted(known - set(values) - {"image_rotation_deg", "absent"})
        if unknown or missing:
            raise CardError(
                f"action spec: unknown fields {unknown}, missing fields {missing}; fields that exist: {sorted(known)}"
            )
        return cls(**{k: _field(v) for k, v in values.items()})

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
    def arm_slice(self) -> slice:
        """The arm's dimensions on the last axis."""
        return slice(0, self.n_dims - 1)

    @property
    def present(self) -> np.ndarray:
        """(a,) bool: the dimensions that this robot has."""
        return np.array([name not in self.absent for name in self.names])

    def is_open(self, actions: Any) -> Any:
        """Raw actions ``(..., a)`` -> bool ``(...)``: nearer to the open than to the closed value."""
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
        return actions[..., index] * _like(np.asarray(self.scale)[index], actions)

    def normalize(self, actions: Any, stats: NormStats) -> Any:
        """Raw ``(..., a)`` -> training units: the arm by ``stats``, the gripper 1 (open) or 0 (closed)."""
        is_gripper = _like(np.arange(self.n_dims) == self.gripper_index, actions)
        return stats.normalize(actions) * (1 - is_gripper) + self.is_open(actions)[..., None] * is_gripper

    def unnormalize(self, normalized: Any, stats: NormStats) -> Any:
        """Training units ``(..., a)`` -> raw: the arm by ``stats``, 0 in absent dimensions, the gripper open where above 0.5."""
        raw = stats.unnormalize(normalized) * _like(self.present, normalized)
        return self.set_gripper(raw, normalized[..., self.gripper_index] > 0.5)

    def check(self, actions: np.ndarray) -> None:
        """Raise `SpecMismatch` unless raw actions ``(..., a)`` have the right width, are finite and within range."""
        actions = np.asarray(actions)
        if actions.ndim < 1 or actions.shape[-1] != self.n_dims:
            raise SpecMismatch(
                f"expected {self.n_dims} action dimensions {list(self.names)} ({self.dataset}), got shape {actions.shape}; "
                "use the card of this robot, or convert the data to the card's layout"
            )
        rows = actions.reshape(-1, self.n_dims)
        self._refuse(~np.isfinite(rows), rows, "finite numbers", "drop or repair the frame where it is recorded")
        room = 1e-4 * np.maximum(1, np.abs([self.low, self.high]).max(0))
        outside = (rows < np.subtract(self.low, room)) | (rows > np.add(self.high, room))
        span = f"low {list(self.low)} to high {list(self.high)}"
        self._refuse(
            outside, rows, span, "are these raw action units? to_si gives metres and radians; else widen the card's range"
        )

    def _refuse(self, bad: np.ndarray, rows: np.ndarray, expected: str, mend: str) -> None:
        if bad.any():
            row, dim = np.argwhere(bad)[0]
            raise SpecMismatch(
                f"expected {expected}, got {rows[row, dim]} for {self.names[dim]!r} in row {row} "
                f"({bad.any(axis=1).sum()} of {len(rows)} rows; {self.dataset}); {mend}"
            )

    def require_same(self, other: ActionSpec, what: str = "policy vs environment") -> None:
        """Raise `SpecMismatch` naming every convention that differs (the dataset's name may)."""
        mine, theirs = self.to_dict(), other.to_dict()
        differing = [k for k in mine if k != "dataset" and mine[k] != theirs[k]]
        if differing:
            lines = "; ".join(f"{k}: {mine[k]} against {theirs[k]}" for k in differing)
            raise SpecMismatch(
                f"{what}: {len(differing)} convention(s) differ: {lines}. Use the environment of card {self.dataset!r}, "
                f"a policy trained on card {other.dataset!r}, or convert one to the other's convention"
            )


def _field(value: Any) -> Any:
    """A value from YAML or JSON as a field: lists become tuples, whole numbers become floats."""
    if isinstance(value, list):
        return tuple(_field(v) for v in value)
    return float(value) if type(value) is int else value


def _like(constant: Any, x: Any) -> Any:
    """The constant as an array of x's kind: numpy or torch, floating dtype, same device."""
    if hasattr(x, "detach"):
        return x.new_tensor(np.asarray(constant, dtype=np.float64).tolist(), dtype=x.dtype if x.is_floating_point() else None)
    dtype = x.dtype if np.issubdtype(np.asarray(x).dtype, np.floating) else np.float64
    return np.asarray(constant, dtype=dtype)


@dataclass(frozen=True)
class NormStats:
    """Statistics of one column of one dataset, and the one normalisation that they were made for.

    Arrays have shape ``(d,)``, in the column's raw units. ``kind`` travels along: "q01_q99" and "min_max" map that span to
    [-1, 1], "mean_std" to zero mean and unit deviation, "identity" leaves values alone. Nothing is clipped. Dimensions
    without spread (at most 1e-6) are only shifted. Dimensions in ``passthrough`` are left as they are.
    """

    min: np.ndarray
    max: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q10: np.ndarray
    q50: np.ndarray
    q90: np.ndarray
    q99: np.ndarray
    count: int
    kind: str
    passthrough: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SpecMismatch(f"unknown kind of normalisation {self.kind!r}; expected one of {', '.join(KINDS)}")

    def require_kind(self, kind: str | None) -> None:
        """Raise `SpecMismatch` if another kind is asked for than these statistics were stored with."""
        if kind is not None and kind != self.kind:
            raise SpecMismatch(
                f"these statistics were stored for {self.kind!r} but {kind!r} was asked for; a policy must un-normalise as "
                f"it was trained: leave the kind out, or recompute the statistics and train again with {kind!r}"
            )

    def offset_and_scale(self) -> tuple[np.ndarray, np.ndarray]:
        """``normalized = (x - offset) / scale``, both ``(d,)``."""
        if self.kind == "identity":
            return np.zeros_like(self.mean), np.ones_like(self.mean)
        if self.kind == "mean_std":
            offset, scale = self.mean, self.std
        else:
            low, high = (self.q01, self.q99) if self.kind == "q01_q99" else (self.min, self.max)
            offset, scale = (low + high) / 2, (high - low) / 2
        scale = np.where(scale > 1e-6, scale, 1.0)
        kept = np.isin(np.arange(len(scale)), self.passthrough)
        return np.where(kept, 0.0, offset), np.where(kept, 1.0, scale)

    def normalize(self, x: Any, kind: str | None = None) -> Any:
        """Raw ``(..., d)`` -> normalised ``(..., d)``; numpy or torch."""
        self.require_kind(kind)
        offset, scale = self.offset_and_scale()
        return (x - _like(offset, x)) / _like(scale, x)

    def unnormalize(self, y: Any, kind: str | None = None) -> Any:
        """Inverse of `normalize`."""
        self.require_kind(kind)
        offset, scale = self.offset_and_scale()
        return y * _like(scale, y) + _like(offset, y)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()} | {
            "passthrough": list(self.passthrough)
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NormStats:
        """Inverse of `to_dict`; an unknown or missing field is an error."""
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise SpecMismatch(f"statistics: expected fields {sorted(known)}, got {sorted(values)}")
        arrays = {k: np.asarray(v, dtype=np.float64) for k, v in values.items() if k not in ("count", "kind", "passthrough")}
        return cls(**arrays, count=values["count"], kind=values["kind"], passthrough=tuple(values["passthrough"]))

    @classmethod
    def from_parquet(
        cls,
        root: str | Path,
        column: str,
        episodes: Iterable[int] | np.ndarray | None = None,
        kind: str = "q01_q99",
        passthrough: tuple[int, ...] = (),
    ) -> NormStats:
        """Statistics of a LeRobot dataset's column over the given (training) episodes; no video is decoded."""
        accumulator = StatsAccumulator()
        wanted = None if episodes is None else np.asarray(sorted(set(episodes)))
        for path in sorted(Path(root).glob("data/*/*.parquet")):
            table = pq.read_table(path, columns=[column, "episode_index"])
            values = stack_column(table[column])
            if wanted is not None:
                values = values[np.isin(table["episode_index"].to_numpy(), wanted)]
            accumulator.update(values)
        return accumulator.finish(kind, passthrough)


def stack_column(column: Any) -> np.ndarray:
    """A parquet column of lists (or scalars) -> array ``(n, d)`` of its own dtype."""
    column = column.combine_chunks()
    if not hasattr(column, "flatten") or not hasattr(column.type, "value_type"):
        return column.to_numpy(zero_copy_only=False).reshape(-1, 1)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


class StatsAccumulator:
    """Exact statistics of ``(n, d)`` arrays that arrive in pieces, in any order, from any number of workers.

    Quantiles of a union can't be had from the quantiles of its parts, so the values themselves are kept (28 bytes a frame
    for seven float32 dimensions); merging joins them and nothing is approximated.
    """

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def update(self, values: np.ndarray) -> StatsAccumulator:
        """Take in ``(n, d)`` values; NaN and infinity are refused."""
        values = np.array(values)
        if values.ndim != 2 or (self._parts and values.shape[1] != self._parts[0].shape[1]):
            width = self._parts[0].shape[1] if self._parts else "d"
            raise SpecMismatch(f"statistics: expected an array (n, {width}), got shape {values.shape}")
        if not np.isfinite(values).all():
            row, dim = np.argwhere(~np.isfinite(values))[0]
            raise SpecMismatch(f"statistics: expected finite numbers, got {values[row, dim]} in row {row}, dimension {dim}")
        self._parts.append(values)
        return self

    def merge(self, other: StatsAccumulator) -> StatsAccumulator:
        """Take in everything that another accumulator has seen."""
        for part in other._parts:
            self.update(part)
        return self

    def finish(self, kind: str = "q01_q99", passthrough: tuple[int, ...] = ()) -> NormStats:
        """The statistics of all that came; quantiles are numpy's (linear interpolation)."""
        count = sum(len(p) for p in self._parts)
        if not count:
            raise SpecMismatch("statistics: no rows came; expected at least one (do the episodes asked for exist?)")
        x = np.concatenate(self._parts).astype(np.float64)
        quantiles = dict(zip(QUANTILES, np.quantile(x, list(QUANTILES.values()), axis=0), strict=True))
        moments = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
        return NormStats(**moments, **quantiles, count=count, kind=kind, passthrough=tuple(passthrough))


@dataclass(frozen=True)
class ActionTokenizer:
    """Normalised actions -> integers 0 to ``bins - 1`` per dimension, and back to bin centres.

    Bins are uniform over [-1, 1] for the arm and [0, 1] for the gripper, the last dimension. Values outside fall into the
    end bins: that, besides half a bin, is what tokens lose.

    Source: RT-1 and RT-2 (256 uniform bins per dimension).  Taught in: 02_episodes_and_actions.
    """

    bins: int = 256

    def _low_and_width(self, n_dims: int) -> tuple[np.ndarray, np.ndarray]:
        low = np.r_[np.full(n_dims - 1, -1.0), 0.0]
        return low, (1.0 - low) / self.bins

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Normalised ``(..., a)`` -> token ids ``(..., a)`` int64."""
        low, width = self._low_and_width(np.shape(actions)[-1])
        return np.clip(np.floor((np.asarray(actions, np.float64) - low) / width), 0, self.bins - 1).astype(np.int64)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Token ids ``(..., a)`` -> normalised bin centres ``(..., a)`` float64."""
        low, width = self._low_and_width(np.shape(ids)[-1])
        return low + (np.asarray(ids) + 0.5) * width

    def round_trip(self, actions: np.ndarray, spec: ActionSpec, stats: NormStats) -> np.ndarray:
        """Raw actions ``(..., a)`` as they come back from tokens."""
        return spec.unnormalize(self.decode(self.encode(spec.normalize(actions, stats))), stats)

    def round_trip_error(
        self, actions: np.ndarray, spec: ActionSpec, stats: NormStats, reduce: Callable[..., Any] = np.mean
    ) -> np.ndarray:
        """What raw actions ``(n, a)`` lose on the way to tokens and back: ``(a,)``, absolute, in the spec's SI units."""
        return reduce(np.abs(spec.to_si(self.round_trip(actions, spec, stats) - actions)), axis=0)
