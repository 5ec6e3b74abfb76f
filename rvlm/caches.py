"""Cached artifacts: their provenance, whether the present code would make the same, which of them a result uses, and pruning.

An artifact is a folder whose name is a hash of settings, inputs and code (`rvlm.files`). Its `made.json` records the provenance
for people, for `rvlm cache`, and for findings, which report artifacts made by other code.
"""

import contextlib
import fcntl
import functools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rvlm.code_hash import hash_of_code, require_unchanged_code
from rvlm.files import artifacts_dir, atomic_write, temporary
from rvlm.provenance import provenance

ARTIFACT_KINDS = ("datasets", "scenes", "frames", "features", "stages", "evaluations", "studies")  # folders in artifacts/
DERIVED = ("frames", "features")  # large, and recomputed in minutes
FEATURES_GB = 50.0  # limit of all features; RVLM_FEATURES_GB overrides it; `rvlm.data.frame_cache` limits the frames
FRESH_S = 3600  # an unfinished artifact that was written to more recently counts as being written [s]


@dataclass(frozen=True)
class Code:
    """The code that makes an artifact, as `rvlm.code_hash.hash_of_code` takes it.

    Attributes:
        roots: Modules, with all that they import, or functions and classes.
        without: Modules and packages that are imported but not used.
    """

    roots: tuple[str, ...]
    without: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Hash of the code as it is on disk now, 12 characters."""
        return hash_of_code(*self.roots, without=self.without)

    def require_unchanged(self) -> None:
        """Raise `ValueError` if the code on disk has changed since this process loaded it."""
        require_unchanged_code(*self.roots, without=self.without)


# --- provenance ---------------------------------------------------------------------------------------------------------


def write_provenance(folder: Path, code: Code, settings: dict[str, Any], inputs: Iterable[str | Path] = ()) -> None:
    """Write the provenance of an artifact to its `made.json`.

    Args:
        folder: Existing folder.
        code: Code that computes its content.
        settings: JSON values.
        inputs: Folders that it is made from.
    """
    made = {"code": code.hash, "roots": code.roots, "without": code.without, "inputs": [str(path) for path in inputs]}
    atomic_write(folder / "made.json", json.dumps({**made, "settings": settings, **provenance()}, indent=1, default=str))


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance of an artifact; empty if there is none."""
    for name in ("made.json", "about.json"):  # about.json: decoded frames
        with contextlib.suppress(OSError, json.JSONDecodeError):
            made = json.loads((folder / name).read_text())
            return {"without": [], **made.get("made_from", {}), **made}
    return {}


def is_current(made: dict[str, Any]) -> bool | None:
    """Whether the present code made it; None if that is not recorded."""
    if "roots" not in made:
        return None
    try:
        return Code(tuple(made["roots"]), tuple(made["without"])).hash == made["code"]
    except ValueError:  # a module or function no longer exists
        return False


# --- artifacts in use ---------------------------------------------------------------------------------------------------

_used: dict[Path, dict[str, Any]] = {}
_held: dict[Path, int] = {}


def use(folder: str | Path) -> Path:
    """Mark an artifact as used by this process, for its findings and against `prune`; returns the folder."""
    folder = Path(folder)
    if folder not in _held and folder.is_dir():
        with contextlib.suppress(OSError):  # too many open files, or a file system without locks
            _held[folder] = os.open(folder, os.O_RDONLY)
            fcntl.flock(_held[folder], fcntl.LOCK_SH | fcntl.LOCK_NB)
    with contextlib.suppress(OSError):
        os.utime(folder / "made.json")  # the time of last use, for `prune`
    _record_use(folder)
    return folder


def use_inputs(inputs: Iterable[str | Path]) -> None:
    """`use` the artifacts that another is made from."""
    for path in map(Path, inputs):
        use(_artifact_of(path))


def _artifact_of(path: Path) -> Path:
    """The artifact that an input belongs to: a stage's folder for its model."""
    return path.parent if not (path / "made.json").exists() and (path.parent / "made.json").exists() else path


def register(folder: Path, code: Code, settings: dict[str, Any], inputs: Iterable[str | Path] = ()) -> Path:
    """`use` an artifact and its inputs, and write its provenance if there is none; returns the folder."""
    use_inputs(inputs)
    if folder.is_dir() and not (folder / "made.json").exists():
        write_provenance(folder, code, settings, inputs)
    return use(folder)


def _record_use(folder: Path) -> None:
    """Record the use of an artifact and of its inputs, for the findings of this process."""
    made = read_provenance(folder)
    if folder in _used or "code" not in made:
        return
    _used[folder] = {"kind": folder.parent.name, **made}
    for path in map(Path, made["inputs"]):
        _record_use(_artifact_of(path))


def used_artifacts() -> list[dict[str, Any]]:
    """Artifacts that this process has used so far: by kind their number and commits, and whether the present code made them."""
    is_recipe_current = functools.cache(lambda recipe: is_current(json.loads(recipe)))
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for made in list(_used.values()):
        recipe = json.dumps({key: made[key] for key in ("roots", "without", "code")})
        groups.setdefault((made["kind"], bool(is_recipe_current(recipe))), []).append(made)
    return [
        {"kind": kind, "n": len(group), "commits": sorted({str(made["commit"]) for made in group}), "is_current": is_now}
        for (kind, is_now), group in sorted(groups.items())
    ]


# --- pruning ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk.

    Attributes:
        path: A folder, or a study's file.
        kind: Of `ARTIFACT_KINDS`.
        n_bytes: Its size.
        age_s: Time since it was last used or written [s].
        made: Its provenance.
        state: "current", "stale" (made by other code), "unknown" (without provenance), or "unfinished".
    """

    path: Path
    kind: str
    n_bytes: int
    age_s: float
    made: dict[str, Any]
    state: str


def list_artifacts(kinds: Iterable[str] = ARTIFACT_KINDS) -> list[Artifact]:
    """All artifacts of some kinds."""
    found = []
    for kind in kinds:
        folder = artifacts_dir() / kind
        found += [_artifact(path, kind) for path in sorted(folder.iterdir()) if path.suffix != ".lock"] if folder.is_dir() else []
    return found


def _artifact(path: Path, kind: str) -> Artifact:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    stats = [stat for p in files if (stat := _stat(p))]
    made, is_complete = read_provenance(path), path.suffix not in (".partial", ".part")
    state = {True: "current", False: "stale", None: "unknown"}[is_current(made)]
    last = max((stat.st_mtime for stat in stats), default=0.0)
    size, age_s = sum(stat.st_size for stat in stats), max(0.0, time.time() - last)
    return Artifact(path, kind, size, age_s, made, state if is_complete else "unfinished")


def _stat(path: Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):  # deleted meanwhile
        return path.stat()


def prune(
    kinds: Iterable[str] = ARTIFACT_KINDS,
    is_stale: bool = False,
    older_than_s: float | None = None,
    max_bytes: float | None = None,
    with_unknown: bool = False,
) -> Iterator[tuple[Artifact, bool]]:
    """Delete artifacts that can be made again; never those in use or being written, nor links.

    Args:
        kinds: Kinds to delete, and to count for `max_bytes`.
        is_stale: Delete artifacts made by other code.
        older_than_s: Delete artifacts not used for this long [s].
        max_bytes: Then delete down to this size: stale ones first, then frames and features, then the least recently used.
        with_unknown: Also delete artifacts without provenance, except datasets, which may be recordings.

    Yields:
        A selected artifact, and whether it was deleted.
    """
    candidates = [a for a in list_artifacts(kinds) if not a.path.is_symlink() and _can_be_made_again(a, with_unknown)]
    chosen = [a for a in candidates if is_stale and a.state in ("stale", "unknown") and a.kind != "studies"]
    chosen += [a for a in candidates if older_than_s is not None and a.age_s > older_than_s and a not in chosen]
    left = [a for a in candidates if a not in chosen]
    total = sum(a.n_bytes for a in left)
    for artifact in chosen:
        is_deleted = _delete(artifact)
        total += 0 if is_deleted else artifact.n_bytes
        yield artifact, is_deleted
    for artifact in sorted(left, key=lambda a: (a.state == "current", a.kind not in DERIVED, -a.age_s)):
        if max_bytes is None or total <= max_bytes:
            return
        is_deleted = _delete(artifact)
        total -= artifact.n_bytes if is_deleted else 0
        yield artifact, is_deleted


def _can_be_made_again(artifact: Artifact, with_unknown: bool) -> bool:
    """Whether an artifact has provenance, or is no dataset, which a person may have recorded."""
    return "roots" in artifact.made or (artifact.kind != "datasets" and (with_unknown or artifact.state == "unfinished"))


def prune_features() -> None:
    """Delete the least recently used features until all features fit their limit."""
    limit = float(os.environ.get("RVLM_FEATURES_GB") or FEATURES_GB)
    for _ in prune(("features",), max_bytes=limit * 1e9):
        pass


def _delete(artifact: Artifact) -> bool:
    """Delete an artifact unless it is in use; it is renamed first, so that no process finds a partial one."""
    path, is_being_written = artifact.path, artifact.state == "unfinished" and artifact.age_s < FRESH_S
    locks = {path.name.removesuffix(".partial"), path.name}  # of processes that wait for it, and that write it
    with contextlib.ExitStack() as stack:
        try:
            for name in sorted(locks):
                stack.enter_context(FileLock(path.with_name(f"{name}.lock"), timeout=0))
        except (Timeout, OSError):
            return False
        if is_being_written or not _is_free(path):
            return False
        renamed = temporary(path)
        path.rename(renamed)
        for name in locks:  # waiting processes notice that the lock file is gone
            path.with_name(f"{name}.lock").unlink(missing_ok=True)
    shutil.rmtree(renamed, ignore_errors=True)
    renamed.unlink(missing_ok=True) if renamed.is_file() else None
    return not renamed.exists()


def _is_free(path: Path) -> bool:
    """Whether no process, this one included, uses an artifact; frames are locked by their `about.json`."""
    with contextlib.ExitStack() as stack:
        try:
            for held in (path, path / "about.json"):
                if held.exists():
                    handle = os.open(held, os.O_RDONLY)
                    stack.callback(os.close, handle)
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
