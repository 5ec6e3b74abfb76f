"""Validation of episodes before they are recorded: all that could not be written or read back is refused."""

from __future__ import annotations

from typing import Any

import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.data.cards import CAMERA
from rvlm.data.errors import EpisodeError, SpecMismatch
from rvlm.data.lerobot_format import DEFAULT_FEATURES, IMAGES, RESERVED_COLUMNS, EpisodeFrames

OWN = {*DEFAULT_FEATURES, "instruction"}  # columns that the format or the reader adds


def check_arrays(frames: Any) -> None:
    """Raise `EpisodeError` unless the frames are numpy arrays under valid column names."""
    if not isinstance(frames, dict):
        raise EpisodeError(f"expected an episode as a dict of numpy arrays, got {type(frames).__name__}")
    for key, values in frames.items():
        if not isinstance(key, str) or not CAMERA.fullmatch(key) or ".." in key or key in OWN:
            raise EpisodeError(
                f"expected columns named by letters, digits, '_', '-' and '.', other than {sorted(OWN)}, which the format adds "
                f"itself; got {key!r}; leave it out or rename it"
            )
        if not isinstance(values, np.ndarray) or values.ndim < 1:
            got = f"an array of shape {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
            raise EpisodeError(f"{key}: expected a numpy array (n, ...) of n frames, got {got}; convert it: np.asarray(values)")
        if 0 in values.shape[1:] or not values.dtype.isnative or values.dtype.itemsize > 8:
            raise EpisodeError(
                f"{key}: expected at least one value a frame, in this machine's order of bytes and of 64 bits at most, got "
                f"{values.dtype} {values.shape}; leave it out or convert it"
            )


def check_frames(spec: ActionSpec, features: dict[str, dict[str, Any]], frames: EpisodeFrames) -> int:
    """Raise `EpisodeError` unless the frames of one episode match the card and the features; returns their number."""
    _check_cameras(spec, frames)
    needed = {"action"} | ({"observation.state"} if spec.state_names else set())
    if needed - set(frames) or set(frames) != set(features):
        expected = sorted({*features, *needed})
        raise EpisodeError(f"expected the features {expected}, got {sorted(frames)}; record the same ones in every episode")
    lengths = {key: len(values) for key, values in frames.items()}
    if len(set(lengths.values())) != 1 or not lengths["action"]:
        raise EpisodeError(f"expected every feature to have the same number of frames (at least 1), got {lengths}")
    for key, values in frames.items():
        _check_values(key, values, features[key])
    try:
        spec.check(frames["action"])
    except SpecMismatch as error:
        raise EpisodeError(f"action: {error}") from error
    width = frames["observation.state"].shape[-1] if "observation.state" in frames else 0
    if width != len(spec.state_names):
        raise EpisodeError(
            f"observation.state: card {spec.dataset!r} expects {len(spec.state_names)} dimensions {list(spec.state_names)}, "
            f"got {width}; fix the card or the data"
        )
    return lengths["action"]


def _check_cameras(spec: ActionSpec, frames: EpisodeFrames) -> None:
    cameras = {key.removeprefix(IMAGES) for key in frames if key.startswith(IMAGES)}
    if cameras != set(spec.cameras):
        raise EpisodeError(
            f"cameras: card {spec.dataset!r} expects {sorted(spec.cameras)}, got {sorted(cameras)}; name them '{IMAGES}NAME' "
            "and list them in the card"
        )


def _check_values(key: str, values: np.ndarray, feature: dict[str, Any]) -> None:
    is_video = feature["dtype"] == "video"
    dtype = "uint8" if is_video else feature["dtype"]
    shape = list(values.shape[1:]) or [1]
    if values.dtype.kind not in "biuf" or len(shape) != (3 if is_video else 1):
        raise EpisodeError(f"{key}: expected images (n, h, w, 3) or numbers (n,) or (n, d), got {values.dtype} {values.shape}")
    if str(values.dtype) != dtype or shape != list(feature["shape"]):
        expected = ", ".join(map(str, feature["shape"]))
        raise EpisodeError(f"{key}: expected {dtype} of shape (n, {expected}), got {values.dtype} {values.shape}; convert it")
    if values.dtype.kind == "f" and key != "action" and not np.isfinite(values).all():
        at = tuple(np.argwhere(~np.isfinite(values))[0])
        raise EpisodeError(f"{key}: expected finite numbers, got {values[at]} in frame {at[0]}; drop or repair the frame")


def check_extra(extra: dict[Any, Any] | None, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """An episode's extra columns as JSON scalars, of the same types as in earlier episodes."""
    plain = {}
    for name, value in (extra or {}).items():
        plain[name] = value.item() if isinstance(value, np.generic) else value
        if not _is_column(name) or not _is_scalar(plain[name]):
            raise EpisodeError(
                f"extra: expected scalars under names other than {sorted(RESERVED_COLUMNS)}, got {name!r}: {value!r}; "
                "whole numbers have 64 bits at most; put what changes from frame to frame into the frames"
            )
        if name in (before or {}) and (got := type_name(plain[name])) != (expected := type_name((before or {})[name])):
            raise EpisodeError(
                f"extra: expected {name!r} as {expected}, as in the episodes before, got {got}: {value!r}; use one type"
            )
    return plain


def _is_column(name: Any) -> bool:
    return (
        isinstance(name, str) and name.isprintable() and bool(name.strip()) and "/" not in name and name not in RESERVED_COLUMNS
    )


def _is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)
    return type(value) in (bool, float) or (type(value) is int and -(2**63) <= value < 2**63)


def type_name(value: Any) -> str:
    """Type of a scalar, for messages: text, true or false, or a number."""
    return "text" if isinstance(value, str) else "true or false" if isinstance(value, bool) else "a number"
