"""Notebook parameters: defaults of the parameters cell, values of the profiles, and their validation.

Papermill only warns of an unknown name and accepts a value of any type; both are refused here before anything runs.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

PROFILES = "profiles.yaml"
GIT_PROFILE = "cpu"  # its results are in git; it sets every parameter, and other profiles override it
TYPE_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "text", list: "a list"}


class InvalidRun(ValueError):
    """The requested run is invalid; nothing was run."""


def parameters_of(notebook: Path) -> dict[str, Any]:
    """Names and default values of a notebook's cell tagged ``parameters``, in order; empty where there is none.

    Raises:
        InvalidRun: the file is no notebook, or a value is not a literal.
    """
    try:
        cells = json.loads(notebook.read_text())["cells"]
        sources = ["".join(c["source"]) for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
        statements = [node for source in sources for node in ast.parse(source).body]
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise InvalidRun(f"{notebook}: expected a notebook with a cell tagged parameters, got {error!r}") from error
    return dict(_assignment(node, notebook) for node in statements)


def _assignment(node: ast.stmt, notebook: Path) -> tuple[str, Any]:
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        try:
            return node.targets[0].id, ast.literal_eval(node.value)
        except ValueError:
            pass
    raise InvalidRun(f"{notebook}: expected `name = literal` in the parameters cell, got `{ast.unparse(node)}`")


def check_parameters(notebook: Path, given: Mapping[str, Any], source: str, fix: str) -> None:
    """Refuse names that the notebook does not have, and values of another type than its defaults.

    Args:
        notebook: the notebook.
        given: name -> value.
        source: where the values come from, for the message.
        fix: what to do about it, for the message.
    """
    known = parameters_of(notebook)
    for name, value in given.items():
        _check_name(name, known, notebook.stem, source, fix)
        if not _fits(value, known[name]):
            raise InvalidRun(f"{source} sets {name} of {notebook.stem} to {value!r}, expected {_expected(known[name])}; {fix}")


def _check_name(name: str, known: Mapping[str, Any], stem: str, source: str, fix: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        guess = f"; did you mean {near[0]}?" if near else ""
        have = ", ".join(known) or "none"
        raise InvalidRun(f"{source} sets {name} of {stem}, which has no such parameter; it has {have}{guess}; {fix}")


def parse_parameters(notebook: Path, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Values for a notebook from command-line pairs of name and text.

    Text parameters are taken literally; all others are parsed as Python: ``200``, ``1e-3``, ``True``, ``[1, 5]``.

    Raises:
        InvalidRun: an unknown name, a repeated name, or a value of the wrong type.
    """
    known, values = parameters_of(notebook), {}
    for name, text in pairs:
        _check_name(name, known, notebook.stem, "-p", "nothing was run")
        if name in values:
            raise InvalidRun(f"-p sets {name} of {notebook.stem} twice: {values[name]!r} and {text!r}")
        values[name] = text if isinstance(known[name], str) else _read(text)
    check_parameters(notebook, values, "-p", "nothing was run")
    return values


def _read(text: str) -> Any:
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text).strip())
    except (ValueError, SyntaxError):
        return text
    return list(value) if isinstance(value, tuple) else value


def _fits(value: Any, default: Any) -> bool:
    """Whether a value has the default's type: an int is a float too, a bool is not; list items have the type of the default's."""
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and bool(value) and all(_fits(v, d) for d in default[:1] for v in value)
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return default is None or type(value) is type(default)


def _expected(default: Any) -> str:
    kind = TYPE_NAMES.get(list if isinstance(default, tuple) else type(default), type(default).__name__)
    return f"{kind} such as {default!r}"


def read_profiles(notebooks: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """``profiles.yaml``: profile -> notebook's stem -> {parameter: value}."""
    path = notebooks / PROFILES
    if not path.exists():
        raise InvalidRun(
            f"expected {path}: profile -> notebook -> parameter -> value; a profile may be empty ('cpu: {{}}'). An installed "
            "package has no notebooks: they are in a clone of the repository"
        )
    read = yaml.safe_load(path.read_text()) or {}
    return {str(name): {stem: values or {} for stem, values in (table or {}).items()} for name, table in read.items()}


def find_notebook(name: str, notebooks: Sequence[Path]) -> Path:
    """The notebook with a number, name or path.

    Raises:
        InvalidRun: no notebook matches, or several do.
    """
    stem = Path(name).stem if name.endswith(".ipynb") else name
    exact = [path for path in notebooks if (stem and stem.zfill(2) == path.stem[:2]) or stem in (path.stem, path.stem[3:])]
    found = exact or [path for path in notebooks if stem and stem in path.stem]
    if len(found) != 1:
        problem = f"no notebook {name!r}" if not found else f"{name!r} is in the name of several notebooks"
        raise InvalidRun(f"{problem}; those that exist: {', '.join(path.stem for path in found or notebooks) or 'none'}")
    return found[0]


def parameters_in(profiles: Mapping[str, Mapping[str, dict[str, Any]]], profile: str, stem: str) -> dict[str, Any]:
    """A notebook's parameters in a profile: profile cpu's values, overridden by the profile's.

    So edits of the notebook's parameters cell do not change a profile's results.
    """
    return {**profiles.get(GIT_PROFILE, {}).get(stem, {}), **profiles[profile].get(stem, {})}
