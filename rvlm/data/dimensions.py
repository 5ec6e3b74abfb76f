"""Names of a column's dimensions in info.json, and whether they are in the order of the card.

Datasets write ``["dx", ...]``, ``{"motors": [...]}``, ``{"dx": 0, ...}``, ``["action.dx", ...]``, ``["DX", ...]``: names are
compared without case, spaces, prefix and suffix, and groups are concatenated. A displacement has the place of its position, and a
rotation about x is ``roll``, ``rx``, ``qx`` or ``droll``: they share a place, which says nothing of their layout.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rvlm.data.errors import EpisodeError

PREFIXES = ("observation.state.", "observation.", "action.", "state.", "main_")
SUFFIX = ".pos"
SAME_PLACE = {
    **{f"d{axis}": axis for axis in "xyz"},
    **{f"{d}{angle}": f"r{axis}" for d in ("", "d") for angle, axis in zip(("roll", "pitch", "yaw"), "xyz", strict=True)},
    **{f"q{axis}": f"r{axis}" for axis in "xyzw"},
}


def check_order(root: Path, key: str, stored: Any, names: Sequence[str], card: str) -> None:
    """Check that names shared by info.json and card have the same index; passes if they share no name.

    Raises:
        EpisodeError: A name has another index, or the numbers of names and dimensions differ.
    """
    found, own = [place_of(name) for name in _flat(stored)], [place_of(name) for name in names]
    if len(set(own)) != len(own):
        found, own = _flat(stored), list(names)
    if not set(found) & set(own):
        return
    if len(found) != len(own):
        raise EpisodeError(
            f"{root}: {key} is {stored} in info.json, {len(found)} names for {len(names)} dimensions, which are {list(names)} in "
            f"card {card!r}; name each dimension once"
        )
    for i, name in enumerate(found):
        if name in own and own.index(name) != i:
            raise EpisodeError(
                f"{root}: {key} is {stored} in info.json and {list(names)} in card {card!r}: {names[own.index(name)]!r} is "
                f"dimension {i} there and {own.index(name)} here; bring the column into the card's order when converting, or "
                "fix the names"
            )


def _flat(stored: Any) -> list[str]:
    """All names in the order of dimensions, from a list, groups, name -> index, or index -> name."""
    if stored is None:
        return []
    if isinstance(stored, str):
        return stored.split(",")
    if isinstance(stored, dict):
        if stored and all(type(index) in (int, float) for index in stored.values()):
            return [str(name) for name in sorted(stored, key=lambda name: stored[name])]
        if all(str(index).strip().isdecimal() for index in stored):
            return _flat([stored[index] for index in sorted(stored, key=int)])
        return _flat(list(stored.values()))
    if isinstance(stored, list):
        return [name for part in stored for name in ([part] if isinstance(part, str) and len(stored) > 1 else _flat(part))]
    return [str(stored)]


def place_of(name: str) -> str:
    """A dimension's place, which several names share: "dx", "delta_x" and "x"; "roll" and "qx"; "main_gripper" and "gripper"."""
    name = unicodedata.normalize("NFKC", name).strip().casefold().removesuffix(SUFFIX)
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    arm, _, last = name.strip().rpartition("_")
    arm = "_".join(part for part in arm.split("_") if part not in ("d", "delta"))
    return f"{arm}_{SAME_PLACE.get(last, last)}".removeprefix("_")
