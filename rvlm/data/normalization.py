"""Statistics of actions and states, and normalisation with them.

`StatsAccumulator` collects values in parts; `NormStats` maps raw values to normalised ones and back, per dimension and per
dataset.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from rvlm.data.errors import SpecMismatch
from rvlm.data.spec_dimensions import PlacedGroups

_OPTIONAL = {"floor", "reference"}  # fields of statistics
NORMALIZATIONS = ("q01_q99", "mean_std", "min_max", "identity")
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
_NEGATED = {"min": "max", "max": "min", "q01": "q99", "q10": "q90", "q50": "q50", "q90": "q10", "q99": "q01"}
_NEGATED |= {"mean": "mean", "reference": "reference"}  # what each is, with its sign changed, of values with theirs changed


def array_like(constant: Any, x: Any) -> Any:
    """The constant as an array like x: numpy or torch, floating dtype, same device."""
    if hasattr(x, "detach"):
        return (x if x.is_floating_point() else x.float()).new_tensor(np.asarray(constant, dtype=np.float64).tolist())
    dtype = x.dtype if np.issubdtype(np.asarray(x).dtype, np.floating) else np.float64
    return np.asarray(constant, dtype=dtype)


def _quaternions(placed: PlacedGroups) -> list[slice]:
    """Places of the quaternions among the dimensions of an action or a state."""
    return [slice(at.start + group.n_position, at.stop) for at, group in placed if group.rotation.startswith("quat")]


def mean_quaternions(values: np.ndarray, placed: PlacedGroups) -> np.ndarray | None:
    """The mean rotation of raw values ``(n, d)`` in the place of each quaternion, 0 elsewhere ``(d,)``; None without quaternions.

    Of q and -q the one whose largest number is positive. Source: Markley et al. 2007, Averaging Quaternions.
    """
    if not (places := _quaternions(placed)):
        return None
    reference = np.zeros(values.shape[-1])
    for at in places:
        q = values[:, at].astype(np.float64)
        mean = np.linalg.eigh(q.T @ q)[1][:, -1]
        reference[at] = mean * np.sign(mean[np.abs(mean).argmax()])
    return reference


def require_reference(placed: PlacedGroups, reference: np.ndarray | None) -> None:
    """Raise `SpecMismatch` where statistics of quaternions do not say on which half sphere these are."""
    if reference is None and (names := [group.names[group.n_position :] for _, group in placed if "quat" in group.rotation]):
        raise SpecMismatch(
            f"expected statistics with the reference of the quaternions {', '.join(map(str, names))}, got some of before it was "
            "stored; compute them again by EpisodeDataset.stats(), and train again what was trained with them"
        )


def on_half_sphere(values: Any, placed: PlacedGroups, reference: np.ndarray | None) -> Any:
    """Raw values ``(..., d)`` with, of q and -q, which are one rotation, the one nearer to the reference; numpy or torch."""
    require_reference(placed, reference)
    for at in _quaternions(placed):
        q = values[..., at]
        is_far = (q @ array_like(np.asarray(reference)[at], q) < 0)[..., None]
        values = values.clone() if hasattr(values, "clone") else np.array(values)
        values[..., at] = q * (1 - 2 * array_like(1.0, q) * is_far)
    return values


def as_one_half_sphere(values: np.ndarray, placed: PlacedGroups) -> np.ndarray:
    """Raw values ``(n, d)`` with quaternions on the half sphere of their mean, where their spread is that of the rotations."""
    return on_half_sphere(values, placed, mean_quaternions(values, placed))


@dataclass(frozen=True)
class NormStats:
    """Statistics of one column of one dataset, and its normalisation.

    Arrays have shape ``(d,)``, in the column's raw units. ``kind``: "q01_q99" and "min_max" map that range to [-1, 1],
    "mean_std" to zero mean and unit standard deviation, "identity" changes nothing. Nothing is clipped. Constant dimensions
    (scale at most 1e-6) are only shifted. Dimensions in ``passthrough`` are not normalised.

    ``floor`` ``(d,)`` is the least scale of a dimension that is not constant. If a robot rarely rotates its hand, q01 and q99
    lie within the sensor's noise: without a floor, noise would fill [-1, 1] and a real rotation reach thousands, and so the
    loss. With a floor in physical units (`ActionSpec.scale_floor`) noise stays small and a rotation at most a few dozens.
    None in statistics from before the floor was stored, which normalise without it.

    ``reference`` ``(d,)`` is the data's mean rotation in the place of each quaternion, 0 elsewhere; None without quaternions.
    What is normalised is `on_half_sphere` of it, so that q becomes -q only where a rotation is half a turn from the mean.
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
    floor: np.ndarray | None = None
    reference: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.kind not in NORMALIZATIONS:
            raise SpecMismatch(f"unknown kind of normalisation {self.kind!r}; expected one of {', '.join(NORMALIZATIONS)}")
        self._check_values()

    def _check_values(self) -> None:
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("count", "kind", "passthrough")}
        shape = np.shape(self.mean)
        for name, values in arrays.items():
            if name in _OPTIONAL and values is None:
                continue
            if np.shape(values) != shape or len(shape) != 1 or not np.isfinite(values).all():
                raise SpecMismatch(f"statistics: expected {name!r} as {shape} finite numbers like 'mean', got {values}")
        is_unordered = (self.q01 > self.q99).any() or (self.min > self.max).any()
        if is_unordered or (self.std < 0).any() or (self.floor is not None and (self.floor < 0).any()):
            raise SpecMismatch(f"statistics: expected q01 <= q99, min <= max and spreads from 0 on, got {self.to_dict()}")
        if not all(type(i) is int and 0 <= i < len(self.mean) for i in self.passthrough):
            raise SpecMismatch(f"statistics: expected 'passthrough' from 0 to {len(self.mean) - 1}, got {self.passthrough}")

    def _require_width(self, x: Any) -> Any:
        x = x if hasattr(x, "shape") else np.asarray(x)
        if x.ndim < 1 or x.shape[-1] != len(self.mean):
            raise SpecMismatch(
                f"statistics of {len(self.mean)} dimensions: expected (..., {len(self.mean)}), got {tuple(x.shape)}"
            )
        return x

    def require_kind(self, kind: str | None) -> None:
        """Raise `SpecMismatch` if the requested kind differs from the stored one."""
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
        scale = np.where(scale > 1e-6, scale if self.floor is None else np.maximum(scale, self.floor), 1.0)
        is_passed = np.isin(np.arange(len(scale)), self.passthrough)
        return np.where(is_passed, 0.0, offset), np.where(is_passed, 1.0, scale)

    def normalize(self, x: Any, kind: str | None = None) -> Any:
        """Raw ``(..., d)`` -> normalised ``(..., d)``; numpy or torch."""
        self.require_kind(kind)
        offset, scale, x = *self.offset_and_scale(), self._require_width(x)
        return (x - array_like(offset, x)) / array_like(scale, x)

    def unnormalize(self, y: Any, kind: str | None = None) -> Any:
        """Inverse of `normalize`."""
        self.require_kind(kind)
        offset, scale, y = *self.offset_and_scale(), self._require_width(y)
        return y * array_like(scale, y) + array_like(offset, y)

    def nearer_to(self, reference: np.ndarray, placed: PlacedGroups) -> NormStats:
        """Statistics of the same data with, of q and -q, the mean rotation nearer to another reference ``(d,)``."""
        is_far = np.zeros(len(self.mean), bool)
        for at in _quaternions(placed):
            is_far[at] = self.reference is not None and self.reference[at] @ reference[at] < 0
        if not is_far.any():
            return self
        negated = {name: np.where(is_far, -getattr(self, of), getattr(self, name)) for name, of in _NEGATED.items()}
        return replace(self, **negated)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()}
        plain |= {"passthrough": list(self.passthrough)}
        return {k: v for k, v in plain.items() if k not in _OPTIONAL or v is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NormStats:
        """Inverse of `to_dict`; an unknown or missing field is an error."""
        known = {f.name for f in fields(cls)}
        if set(values) | _OPTIONAL != known:
            raise SpecMismatch(f"statistics: expected fields {sorted(known)}, got {sorted(values)}")
        arrays = {k: np.asarray(v, dtype=np.float64) for k, v in values.items() if k not in ("count", "kind", "passthrough")}
        return cls(**arrays, count=values["count"], kind=values["kind"], passthrough=tuple(values["passthrough"]))


class StatsAccumulator:
    """Exact statistics of ``(n, d)`` arrays that arrive in parts, in any order.

    Quantiles cannot be merged exactly, so the values themselves are stored (28 bytes per frame for seven float32 dimensions).
    """

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def update(self, values: np.ndarray) -> StatsAccumulator:
        """Add ``(n, d)`` values; NaN and infinity are refused."""
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
        """Add all values of another accumulator."""
        for part in other._parts:
            self.update(part)
        return self

    def finish(
        self,
        kind: str = "q01_q99",
        passthrough: tuple[int, ...] = (),
        floor: np.ndarray | None = None,
        placed: PlacedGroups = (),
    ) -> NormStats:
        """Statistics of all values, with quaternions of `placed` groups on the half sphere of their mean rotation.

        Quantiles are numpy's (linear interpolation).
        """
        count = sum(len(p) for p in self._parts)
        if not count:
            raise SpecMismatch("statistics: no rows came; expected at least one (do the episodes asked for exist?)")
        x = np.concatenate(self._parts).astype(np.float64)
        reference = mean_quaternions(x, placed)
        x = on_half_sphere(x, placed, reference)
        quantiles = dict(zip(QUANTILES, np.quantile(x, list(QUANTILES.values()), axis=0), strict=True))
        moments = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
        given = {"kind": kind, "passthrough": tuple(passthrough), "floor": floor, "reference": reference}
        return NormStats(**moments, **quantiles, count=count, **given)
