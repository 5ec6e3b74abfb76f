"""Names of a column's dimensions as info.json spells them, and whether they stand in the order of the card.

Other people write ``["dx", ...]``, ``{"motors": [...]}``, ``{"dx": 0, ...}``, ``["action.dx", ...]``, ``["DX", ...]``: words are
compared without case, blanks, prefix and suffix, and groups are joined in their order.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rvlm.data.video import EpisodeError

PREFIXES = ("observation.state.", "observation.", "action.", "state.")
SUFFIX = ".pos"


def check_order(root: Path, key: str, stored: Any, names: Sequence[str], card: str) -> None:
    """Names that both sides know must stand in the same places; where they share no word nothing can be compared.

    Raises:
        EpisodeError: A name stands elsewhere, or there are more or fewer names than dimensions.
    """
    words, own = [_folded(name) for name in _flat(stored)], [_folded(name) for name in names]
    if len(set(own)) != len(own):
        words, own = _flat(stored), list(names)
    if not set(words) & set(own):
        return
    if len(words) != len(own):
        raise EpisodeError(
            f"{root}: {key} is {stored} in info.json, {len(words)} names for {len(names)} dimensions, which are {list(names)} in "
            f"card {card!r}; name each dimension once"
        )
    for i, word in enumerate(words):
        if word in own and own.index(word) != i:
            raise EpisodeError(
                f"{root}: {key} is {stored} in info.json and {list(names)} in card {card!r}: {names[own.index(word)]!r} is "
                f"dimension {i} there and {own.index(word)} here; bring the column into the card's order when converting, or "
                "mend the names"
            )


def _flat(stored: Any) -> list[str]:
    """All names in the order of dimensions: name to place by place, place to name by key, groups one after another."""
    if stored is None:
        return []
    if isinstance(stored, str):
        return stored.split(",")
    if isinstance(stored, dict):
        if stored and all(type(place) in (int, float) for place in stored.values()):
            return [str(name) for name in sorted(stored, key=lambda name: stored[name])]
        if all(str(place).strip().isdecimal() for place in stored):
            return _flat([stored[place] for place in sorted(stored, key=int)])
        return _flat(list(stored.values()))
    if isinstance(stored, list):
        return [name for part in stored for name in ([part] if isinstance(part, str) and len(stored) > 1 else _flat(part))]
    return [str(stored)]


def _folded(name: str) -> str:
    word = unicodedata.normalize("NFKC", name).strip().casefold().removesuffix(SUFFIX)
    for prefix in PREFIXES:
        word = word.removeprefix(prefix)
    return word.strip()
