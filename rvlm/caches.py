"""What is kept on disk between runs: what made it, whether today's code would still use it, what a result rests on, what may go.

Each cached folder holds a `made.json`. Its name already stands for settings, inputs and code (`rvlm.files`), so `made.json` is
for people, for `rvlm cache`, and for findings, which say where they rest on what other code has made.
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

from rvlm.code_hash import hash_of_code, refuse_changed_code
from rvlm.files import artifacts_dir, atomic_write, temporary
from rvlm.provenance import provenance

KINDS = ("datasets", "scenes", "frames", "features", "stages", "evaluations", "studies")  # folders of the artifacts
DERIVED = ("frames", "features")  # computed anew in minutes, and large
FEATURES_GB = 50.0  # of features together, unless RVLM_FEATURES_GB says otherwise; frames have a limit of their own
FRESH_S = 3600  # what is unfinished and was written to less than so long ago is taken to be under way [s]


@dataclass(frozen=True)
class Code:
    """The code that makes something, as `rvlm.code_hash.hash_of_code` takes it.

    Attributes:
        roots: Modules, with all that they import, or functions and classes.
        without: Modules and packages that are imported on the way but not used.
    """

    roots: tuple[str, ...]
    without: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Twelve characters that stand for it as it is on disk now."""
        return hash_of_code(*self.roots, without=self.without)

    def refuse_changed(self) -> None:
        """Refuse to compute where this process has loaded other code than is on disk now."""
        refuse_changed_code(*self.roots, without=self.without)


# --- what made it -------------------------------------------------------------------------------------------------------


def write_made(folder: Path, code: Code, settings: dict[str, Any], inputs: Iterable[str | Path] = ()) -> None:
    """Say in a folder what makes it.

    Args:
        folder: Is there.
        code: What computes its content.
        settings: As JSON holds them.
        inputs: Folders that it is made from.
    """
    told = {"code": code.hash, "roots": code.roots, "without": code.without, "inputs": [str(path) for path in inputs]}
    atomic_write(folder / "made.json", json.dumps({**told, "settings": settings, **provenance()}, indent=1, default=str))


def made_of(folder: Path) -> dict[str, Any]:
    """What a folder says about how it was made; empty where it says nothing."""
    for name in ("made.json", "about.json"):  # decoded frames say it in a file of their own
        with contextlib.suppress(OSError, json.JSONDecodeError):
            told = json.loads((folder / name).read_text())
            return {"without": [], **told.get("made_from", {}), **told}
    return {}


def is_current(made: dict[str, Any]) -> bool | None:
    """Whether today's code is the one that made it; None where that is not known."""
    if "roots" not in made:
        return None
    try:
        return Code(tuple(made["roots"]), tuple(made["without"])).hash == made["code"]
    except ValueError:  # a module or function that is no more
        return False


# --- what is in use -----------------------------------------------------------------------------------------------------

_used: dict[Path, dict[str, Any]] = {}
_held: dict[Path, int] = {}


def use(folder: str | Path) -> Path:
    """Note that this process uses a cached folder: findings rest on it, `prune` leaves it alone; gives the folder back."""
    folder = Path(folder)
    if folder not in _held and folder.is_dir():
        with contextlib.suppress(OSError):  # too many open files, or a file system that can't lock
            _held[folder] = os.open(folder, os.O_RDONLY)
            fcntl.flock(_held[folder], fcntl.LOCK_SH | fcntl.LOCK_NB)
    with contextlib.suppress(OSError):
        os.utime(folder / "made.json")  # by which `prune` knows what was used last
    _note(folder)
    return folder


def use_inputs(inputs: Iterable[str | Path]) -> None:
    """`use` what something is being made from."""
    for path in map(Path, inputs):
        use(_kept_as(path))


def _kept_as(path: Path) -> Path:
    """The cached folder that an input belongs to: a model lies in its stage's."""
    return path.parent if not (path / "made.json").exists() and (path.parent / "made.json").exists() else path


def keep(folder: Path, code: Code, settings: dict[str, Any], inputs: Iterable[str | Path] = ()) -> Path:
    """`use` a folder that this code makes, and what it is made from; say in it what makes it if it does not say so yet."""
    use_inputs(inputs)
    if folder.is_dir() and not (folder / "made.json").exists():
        write_made(folder, code, settings, inputs)
    return use(folder)


def _note(folder: Path) -> None:
    """Note a folder, and what it was made from, for the findings of this process."""
    made = made_of(folder)
    if folder in _used or "code" not in made:
        return
    _used[folder] = {"kind": folder.parent.name, **made}
    for told in map(Path, made["inputs"]):
        _note(_kept_as(told))


def used() -> list[dict[str, Any]]:
    """What this process has used so far: by kind, how many, of which commits, and whether today's code would make them."""
    asked = functools.cache(lambda told: is_current(json.loads(told)))
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for made in list(_used.values()):
        recipe = json.dumps({key: made[key] for key in ("roots", "without", "code")})
        groups.setdefault((made["kind"], bool(asked(recipe))), []).append(made)
    return [
        {"kind": kind, "n": len(group), "commits": sorted({str(made["commit"]) for made in group}), "is_current": is_now}
        for (kind, is_now), group in sorted(groups.items())
    ]


# --- what may go --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Something that is kept.

    Attributes:
        path: A folder, or a study's file.
        kind: Of `KINDS`.
        n_bytes: Its size.
        age_s: Seconds since it was last used or written.
        made: What it says about how it was made.
        state: "current", "stale" (other code made it), "unknown" (it does not say), or "unfinished".
    """

    path: Path
    kind: str
    n_bytes: int
    age_s: float
    made: dict[str, Any]
    state: str


def entries(kinds: Iterable[str] = KINDS) -> list[Entry]:
    """Everything that is kept, of some kinds."""
    found = []
    for kind in kinds:
        folder = artifacts_dir() / kind
        found += [_entry(path, kind) for path in sorted(folder.iterdir()) if path.suffix != ".lock"] if folder.is_dir() else []
    return found


def _entry(path: Path, kind: str) -> Entry:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    told = [stat for p in files if (stat := _stat(p))]
    made, is_whole = made_of(path), path.suffix not in (".partial", ".part")
    is_now = {True: "current", False: "stale", None: "unknown"}[is_current(made)]
    last = max((stat.st_mtime for stat in told), default=0.0)
    return Entry(
        path, kind, sum(s.st_size for s in told), max(0.0, time.time() - last), made, is_now if is_whole else "unfinished"
    )


def _stat(path: Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):  # it went meanwhile
        return path.stat()


def prune(
    kinds: Iterable[str] = KINDS,
    is_stale: bool = False,
    older_than_s: float | None = None,
    max_bytes: float | None = None,
    with_unknown: bool = False,
) -> Iterator[tuple[Entry, bool]]:
    """Delete what can be made again, but nothing that is in use or under way, and no links.

    Args:
        kinds: That may be deleted, and that `max_bytes` counts.
        is_stale: What other code has made.
        older_than_s: What was not used for so long [s].
        max_bytes: Then, while more is kept: stale first, next frames and features, next what was not used for the longest time.
        with_unknown: Whether what does not say what made it may go too, except datasets: those a person has recorded.

    Yields:
        An entry that was to go, and whether it has gone.
    """
    kept = [e for e in entries(kinds) if not e.path.is_symlink() and _can_be_made_again(e, with_unknown)]
    chosen = [e for e in kept if is_stale and e.state in ("stale", "unknown") and e.kind != "studies"]
    chosen += [e for e in kept if older_than_s is not None and e.age_s > older_than_s and e not in chosen]
    left = [e for e in kept if e not in chosen]
    total = sum(e.n_bytes for e in left)
    for entry in chosen:
        has_gone = _delete(entry)
        total += 0 if has_gone else entry.n_bytes
        yield entry, has_gone
    for entry in sorted(left, key=lambda e: (e.state == "current", e.kind not in DERIVED, -e.age_s)):
        if max_bytes is None or total <= max_bytes:
            return
        has_gone = _delete(entry)
        total -= entry.n_bytes if has_gone else 0
        yield entry, has_gone


def _can_be_made_again(entry: Entry, with_unknown: bool) -> bool:
    """Whether an entry says what made it, or is not what a person may have recorded or searched for."""
    return "roots" in entry.made or (entry.kind != "datasets" and (with_unknown or entry.state == "unfinished"))


def make_room() -> None:
    """Delete features that were not used for the longest time, as far as they take more than their limit."""
    limit = float(os.environ.get("RVLM_FEATURES_GB") or FEATURES_GB)
    for _ in prune(("features",), max_bytes=limit * 1e9):
        pass


def _delete(entry: Entry) -> bool:
    """Delete what nobody uses; first it takes another name, so that nobody finds half of it."""
    is_under_way = entry.state == "unfinished" and entry.age_s < FRESH_S
    locks = {entry.path.name.removesuffix(".partial"), entry.path.name}  # of who asks for it, and of who works on it
    with contextlib.ExitStack() as stack:
        try:
            for name in sorted(locks):
                stack.enter_context(FileLock(entry.path.with_name(f"{name}.lock"), timeout=0))
        except (Timeout, OSError):
            return False
        if is_under_way or not _is_free(entry.path):
            return False
        gone = temporary(entry.path)
        entry.path.rename(gone)
        for name in locks:  # who waits for one sees that it is no file any more
            entry.path.with_name(f"{name}.lock").unlink(missing_ok=True)
    shutil.rmtree(gone, ignore_errors=True)
    gone.unlink(missing_ok=True) if gone.is_file() else None
    return not gone.exists()


def _is_free(path: Path) -> bool:
    """Whether no process, this one included, has said that it uses a folder; frames are held by their `about.json`."""
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
