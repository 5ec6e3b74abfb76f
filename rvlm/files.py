"""Folders of the project, atomic writes of files and folders, and content hashes.

The name of a cached result is a hash of its settings (`config_hash`), of the content of its inputs (`file_hash`, `folder_hash`,
`model_hash`) and of the source code that computes it (`rvlm.code_hash`).
"""

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"  # in git; written by `rvlm reproduce` only
_CARDS = Path(__file__).parent / "data_cards"  # in an installed package
CARDS = _CARDS if _CARDS.is_dir() else ROOT / "data_cards"
IS_CLONE = (ROOT / "notebooks" / "profiles.yaml").exists()  # false for an installed package
PACKAGE = Path(__file__).resolve().parent
LARGE = 1 << 20  # hashes of files of at least this size are cached on disk, of smaller ones in the process [byte]
NOT_CONTENT = ("made.json", "README.md")  # describe a folder's content and are not part of it


def results_dir() -> Path:
    """Folder of findings, figures, tables and executed notebooks: ``RVLM_RESULTS``, else ``artifacts/tried/results``.

    Results in git are written by `rvlm reproduce` only, which sets the variable.
    """
    return Path(os.environ.get("RVLM_RESULTS") or artifacts_dir() / "tried" / "results")


def artifacts_dir() -> Path:
    """Folder of datasets, checkpoints and caches: ``RVLM_HOME``, else ``artifacts/`` of a clone (ignored by git).

    Without a clone, ``rvlm`` in the user's cache folder (``XDG_CACHE_HOME``).
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rvlm"
    return Path(os.environ.get("RVLM_HOME") or (ROOT / "artifacts" if IS_CLONE else cache))


# --- writing ------------------------------------------------------------------------------------------------------------


def temporary(path: Path) -> Path:
    """A unique hidden path beside `path`, to write to and then rename."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


def atomic_write(path: Path, content: str | bytes) -> Path:
    """Write a file completely or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(path)
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


class DiskFullError(ValueError):
    """The disk has too little space."""


def reserve(path: Path, n_bytes: int) -> None:
    """Allocate disk space for a file, as a process that writes to a memory map without space is killed.

    Raises:
        DiskFullError: The disk has too little space.
    """
    try:
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):  # Linux
                os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        raise DiskFullError(
            f"{path.parent}: expected {n_bytes} bytes of free disk space, got {shutil.disk_usage(path.parent).free} "
            f"({error.strerror}); free some, for example by: rvlm cache --prune --stale"
        ) from error


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """An empty hidden folder beside `path`, to fill and then rename; what is left of it is deleted."""
    part = temporary(path)
    try:
        part.mkdir()
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def lock_of(final: Path) -> FileLock:
    """The lock under which a file or folder is made: other callers wait; it is released when its process ends or is killed.

    Raises:
        RuntimeError: In a worker process that imports a script which calls this: it would wait for its own parent.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            'expected calls under `if __name__ == "__main__":`, as worker processes import the script; got them at its top level'
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{final}.lock")


def make_folder(final: Path, write: Callable[[Path], Any]) -> Path:
    """Make the folder `final` unless it exists: completely or not at all, and once for concurrent processes.

    Args:
        final: The folder's path.
        write: Is given an empty folder to fill, which is renamed to `final` when it returns.
    """
    if final.is_dir():
        return final
    with lock_of(final):
        if not final.is_dir():
            for left in final.parent.glob(f".{final.name}.*.part"):  # of killed processes
                shutil.rmtree(left, ignore_errors=True)
            with temporary_folder(final) as part:
                write(part)
                part.replace(final)
    return final


def replace_folder(part: Path, final: Path) -> None:
    """Replace the folder `final` by `part`; the old one ends at `part`.

    Atomic on Linux. On systems that cannot exchange two names, `final` is missing for a moment, and restored on failure.
    """
    if not final.exists():
        part.replace(final)
    elif not _exchange(part, final):
        old = temporary(final)
        final.replace(old)
        try:
            part.replace(final)
        except BaseException:
            old.replace(final)
            raise
        old.replace(part)


def _exchange(one: Path, other: Path) -> bool:
    """Atomically exchange two names; false if the system cannot (Linux can, on most file systems)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


# --- hashes of content --------------------------------------------------------------------------------------------------


def config_hash(settings: dict[str, Any]) -> str:
    """Hash of settings, 12 characters, independent of their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


_digests: dict[tuple, str] = {}


def file_hash(path: str | Path) -> str:
    """Hash of a file's content, 12 characters.

    The hash is cached by name, size, times and inode, for large files also on disk. It is not cached for a file that was written
    within the last tick of the file system's clock, which could hide a change.
    """
    path = Path(path).resolve()
    now, key = time.time_ns(), file_identity(path)
    if key not in _digests:
        cached = artifacts_dir() / "digests" / config_hash({"file": key})
        is_large = key[1] >= LARGE
        if is_large and cached.is_file():
            _digests[key] = cached.read_text()
        else:
            with path.open("rb") as file:
                value = hashlib.file_digest(file, "sha256").hexdigest()[:12]
            changed = key[-1]
            tick = 50_000_000 if changed % 1_000_000_000 else 2_000_000_000  # the latter for clocks of whole seconds [ns]
            if now - changed < tick or file_identity(path) != key:
                return value
            _digests[key] = value
            if is_large:
                with contextlib.suppress(OSError):  # a full or read-only disk
                    atomic_write(cached, value)
    return _digests[key]


def file_identity(path: Path) -> tuple[str, int, int, int, int]:
    """Name, size, modification time [ns], inode, and change time [ns] of a file, which differ whenever its content does."""
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns


def folder_hash(folder: str | Path) -> str:
    """Hash of all files in a folder, 12 characters, independent of the folder's path.

    Hidden files, locks and descriptions (`NOT_CONTENT`) are ignored.

    Raises:
        ValueError: The folder does not exist, has no files, or a link is circular.
    """
    folder = Path(folder)
    counted = [name for name in _names_in(folder) if name.name not in NOT_CONTENT and name.suffix != ".lock"]
    if not counted:
        raise ValueError(
            f"expected a folder with files at {folder}, got {'an empty one' if folder.is_dir() else 'none'}; make it first"
        )
    return config_hash({name.as_posix(): file_hash(folder / name) for name in counted})


def _names_in(folder: Path) -> list[Path]:
    """Names of all files in a folder and in folders that it links to, without hidden ones."""
    found: list[Path] = []
    for at, folders, files in os.walk(folder, followlinks=True):
        here, folders[:] = Path(at), [name for name in folders if not name.startswith(".")]
        above = [path.resolve() for path in (here, *here.parents) if path.is_relative_to(folder)]
        for link in (here / name for name in folders if (here / name).is_symlink()):
            if any(path.is_relative_to(link.resolve()) for path in above):
                raise ValueError(f"{folder}: expected no circular links, got {link}, which points to {link.resolve()}; remove it")
        found += [(here / name).relative_to(folder) for name in files if not name.startswith(".") and (here / name).is_file()]
    return sorted(found)


def weights_hash(model: str | Path) -> str | None:
    """Hash of all weights in a model's folder, 12 characters; None if there are none, as for a name on the Hub."""
    digests = {str(name): file_hash(Path(model) / name) for name in _names_in(Path(model)) if name.suffix == ".safetensors"}
    return next(iter(digests.values())) if list(digests) == ["model.safetensors"] else config_hash(digests) if digests else None


def model_hash(model: str | Path) -> str:
    """Hash of a model's folder, processor included; for a name on the Hub, the name and commit.

    The name alone if the model was never fetched and the Hub cannot be reached.
    """
    if Path(model).is_dir():
        return folder_hash(model)
    commit = commit_on_hub(model)
    return f"{model}@{commit}" if commit else str(model)


hub_commits: dict[str, str] = {}  # name on the Hub -> commit that this process uses


def commit_on_hub(model: str | Path) -> str | None:
    """The commit of a model on the Hub that this process uses, the same until it ends.

    The latest one, or the last fetched if the Hub cannot be reached; None for a folder, or if there is none.
    """
    from huggingface_hub import hf_hub_download

    if str(model) not in hub_commits and not Path(model).is_dir():
        with contextlib.suppress(OSError, ValueError):  # an invalid name, or no connection
            hub_commits[str(model)] = Path(hf_hub_download(str(model), "config.json")).parent.name
    return hub_commits.get(str(model))
