"""Data cards: the YAML front matter of Markdown files, and validation of its fields."""

from __future__ import annotations

import math
import re
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from rvlm.data.errors import CardError
from rvlm.files import CARDS

TEXT = ("kind", "frame", "rotation", "robot", "dataset")
TEXTS = ("names", "units", "cameras", "absent")
NUMBER = ("open", "close", "rate_hz", "image_rotation_deg")
NUMBERS = ("scale", "low", "high")
POWER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # 4e-2, which YAML 1.1 reads as text
CAMERA = re.compile(r"\w[\w .-]*")


def _is_ambiguous(node: yaml.Node) -> bool:
    """Whether YAML 1.1 reads a number differently than people do: 010 as 8, 1:30 as 90."""
    is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    return is_number and re.match(r"[-+]?(0[\d_b]|.*:)", str(node.value)) is not None and "." not in str(node.value).split(":")[0]


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate fields, of which YAML would use the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        duplicates = sorted({str(name) for name in names if names.count(name) > 1})
        if duplicates:
            raise yaml.YAMLError(f"{', '.join(duplicates)} written twice")
        for key, value in node.value:
            ambiguous = [v.value for v in (value.value if isinstance(value, yaml.SequenceNode) else [value]) if _is_ambiguous(v)]
            if ambiguous and key.value in NUMBER + NUMBERS:
                raise yaml.YAMLError(f"{key.value}: {ambiguous[0]} means another number in YAML; write it in plain decimals")
        return super().construct_mapping(node, deep)


def read_card(path_or_name: str | Path) -> dict[str, Any]:
    """Front matter of a data card as a dict; a bare name means ``data_cards/NAME.md``."""
    path = Path(path_or_name)
    path = path if path.suffix == ".md" else CARDS / f"{path_or_name}.md"
    if not path.is_file():
        have = ", ".join(sorted(p.stem for p in CARDS.glob("*.md"))) or "none"
        raise CardError(f"no data card at {path}; cards that exist: {have}; give one of these names or the path of a .md file")
    try:
        parts = path.read_text(encoding="utf-8-sig").split("---\n", 2)
    except UnicodeDecodeError as error:
        raise CardError(f"{path}: expected text in UTF-8, got: {error}; save it as UTF-8") from error
    if len(parts) < 3 or parts[0].strip():
        raise CardError(f"{path}: expected YAML front matter between two '---' lines at the top of the card; found none")
    try:
        matter = yaml.load(parts[1], _Loader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise CardError(f"{path}: the front matter is not YAML ({error}); fix the lines between the two '---'") from error
    if not isinstance(matter, dict) or not isinstance(matter.get("rvlm"), dict):
        raise CardError(f"{path}: expected an 'rvlm:' block in the front matter; copy one from data_cards/tabletop_franka7.md")
    return matter


def parse_field(name: str, value: Any) -> Any:
    """A field of YAML or JSON as `ActionSpec` takes it: lists become tuples, whole numbers and 4e-2 become floats."""
    if isinstance(value, list):
        return tuple(parse_field(name, v) for v in value)
    if name in NUMBER + NUMBERS and (type(value) is int or (isinstance(value, str) and POWER.fullmatch(value))):
        try:
            return float(value)
        except OverflowError:
            return math.inf  # refused by check_fields
    return value


def check_fields(values: dict[str, Any], where: str) -> None:
    """Raise `CardError` for the first field of the wrong type: text, number, list of these, or boolean."""
    for name, value in values.items():
        description, is_valid = _expected_type(name)
        if not is_valid(value):
            raise CardError(f"{where}: expected {name!r} as {description}, got {_shown(value)}; fix it in the card")
        if name in ("names", "cameras") and len(set(value)) != len(value):
            raise CardError(f"{where}: expected {name!r} without repetition, got {_shown(value)}; give each a name of its own")


def check_cameras(cameras: tuple[str, ...], where: str) -> None:
    """Raise `CardError` unless there is a camera, and names can be parts of file names."""
    if not cameras:
        raise CardError(f"{where}: expected at least one name in 'cameras', got none; a policy needs an image")
    wrong = [name for name in cameras if not CAMERA.fullmatch(name) or ".." in name]
    if wrong:
        raise CardError(
            f"{where}: expected 'cameras' named by letters, digits, '_', '-' and '.', as they become part of file names; "
            f"got {wrong}"
        )


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def _expected_type(name: str) -> tuple[str, Any]:
    if name in TEXT:
        return "text (in quotes where YAML reads something else)", _is_text
    if name in TEXTS:
        return "a list of texts (in quotes where YAML reads something else)", lambda v: _is_list(v) and all(map(_is_text, v))
    if name in NUMBER:
        return "a finite number", _is_number
    if name in NUMBERS:
        return "a list of finite numbers", lambda v: _is_list(v) and all(map(_is_number, v))
    return "true or false", lambda v: isinstance(v, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
