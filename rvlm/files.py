"""Where things are, how they are written so that they are whole or not there, and what stands for a content.

A cached result is found again by its name: a hash of the settings (`config_hash`), of the content of what went in (`file_hash`,
`hash_of_tree`, `hash_of_model`) and of the source code that computes it (`rvlm.code_hash`).
"""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"  # in git; `rvlm reproduce` alone writes there
_CARDS = Path(__file__).parent / "data_cards"  # of an installed package
CARDS = _CARDS if _CARDS.is_dir() else ROOT / "data_cards"
IS_CLONE = (ROOT / "notebooks" / "profiles.yaml").exists()  # else the package was installed without its repository
PACKAGE = Path(__file__).resolve().parent
LARGE = 1 << 20  # hashes of files from this size on [byte] are kept on disk, those of smaller ones in the process
NOT_CONTENT = ("made.json", "README.md")  # they tell about a folder's content and are not part of it


def results_dir() -> Path:
    """Where findings, figures, tables and executed notebooks go: ``RVLM_RESULTS``, else ``artifacts/tried/results``.

    What is tried, in JupyterLab or by any other way than `rvlm reproduce`, never stands among the results in git.
    """
    return Path(os.environ.get("RVLM_RESULTS") or artifacts_dir() / "tried" / "results")


def artifacts_dir() -> Path:
    """Where datasets, checkpoints and caches go: ``RVLM_HOME``, else ``artifacts/`` of a clone (ignored by git).

    Without a clone, ``rvlm`` in the user's cache folder (``XDG_CACHE_HOME``).
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rvlm"
    return Path(os.environ.get("RVLM_HOME") or (ROOT / "artifacts" if IS_CLONE else cache))


# --- writing ------------------------------------------------------------------------------------------------------------


def temporary(path: Path) -> Path:
    """A hidden name beside `path` that no other process, thread or call has: what is written there is renamed when whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


def atomic_write(path: Path, content: str | bytes) -> Path:
    """Write a file so that it is either there in full or as it was before; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(path)
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


class NoRoomError(ValueError):
    """A disk that is too full for what is to be written."""


def reserve(path: Path, n_bytes: int) -> None:
    """Give a file its size, with all of its room on the disk: who writes to a map of a file without room is killed.

    Raises:
        NoRoomError: The disk has less than that.
    """
    try:
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):  # Linux
                os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        raise NoRoomError(
            f"{path.parent}: expected room for {n_bytes} bytes, got {shutil.disk_usage(path.parent).free} that are free "
            f"({error.strerror}); make room, as by: rvlm cache --prune --stale"
        ) from error


def make_folder(final: Path, fill: Callable[[Path], Any]) -> Path:
    """The folder `final`, which `fill` writes unless it is there: whole or not at all, once for all that ask at the same time.

    Args:
        final: The folder's name.
        fill: Is given an empty folder, which takes the name `final` when it returns.
    """
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_name(f"{final.name}.lock")):
        if not final.is_dir():
            for left in final.parent.glob(f".{final.name}.*.part"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            part = temporary(final)
            part.mkdir()
            try:
                fill(part)
                part.replace(final)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return final


def replace_folder(part: Path, final: Path) -> None:
    """Put a whole folder in the place of another: at any moment one of the two is at `final`, and the old one ends at `part`.

    Where the system cannot exchange two names at once, `final` is missing for a moment, and comes back if that fails.
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
    """Exchange two names at one moment; whether the system could (Linux, on most of its file systems)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


# --- hashes of content --------------------------------------------------------------------------------------------------


def config_hash(settings: dict[str, Any]) -> str:
    """Twelve characters that stand for settings, whatever their order; by them a cached result is found again."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


_digests: dict[tuple, str] = {}


def file_hash(path: str | Path) -> str:
    """Twelve characters that stand for a file's content.

    A file is read once: as long as name, size, times and inode are the same, the answer is remembered, for large files by later
    processes too. A file that was written only a moment ago is read again next time, for a clock's tick could hide a change.
    """
    path = Path(path).resolve()
    asked, known = time.time_ns(), stamp(path)
    if known not in _digests:
        kept = artifacts_dir() / "digests" / config_hash({"file": known})
        is_large = known[1] >= LARGE
        if is_large and kept.is_file():
            _digests[known] = kept.read_text()
        else:
            with path.open("rb") as file:
                value = hashlib.file_digest(file, "sha256").hexdigest()[:12]
            changed = known[-1]
            tick = 50_000_000 if changed % 1_000_000_000 else 2_000_000_000  # of file systems that count seconds [ns]
            if asked - changed < tick or stamp(path) != known:
                return value
            _digests[known] = value
            if is_large:
                with contextlib.suppress(OSError):  # a full or read-only disk: then it is read again
                    atomic_write(kept, value)
    return _digests[known]


def stamp(path: Path) -> tuple[str, int, int, int, int]:
    """What is different where a file is: name, size, time of writing, inode, and time of the last change, which none can set."""
    told = path.stat()
    return str(path), told.st_size, told.st_mtime_ns, told.st_ino, told.st_ctime_ns


def hash_of_tree(folder: str | Path) -> str:
    """Twelve characters that stand for all files of a folder, a recording's or a model's, wherever the folder is.

    Hidden files, locks, and what only tells about the content (`NOT_CONTENT`) don't count.

    Raises:
        ValueError: There is no such folder, it holds no files, or a link leads round in a circle.
    """
    folder = Path(folder)
    counted = [name for name in _names_in(folder) if name.name not in NOT_CONTENT and name.suffix != ".lock"]
    if not counted:
        raise ValueError(
            f"expected a folder with files at {folder}, got {'an empty one' if folder.is_dir() else 'none'}; make it first"
        )
    return config_hash({name.as_posix(): file_hash(folder / name) for name in counted})


def _names_in(folder: Path) -> list[Path]:
    """Names of all files in a folder and in those that it links to, without hidden ones."""
    found: list[Path] = []
    for at, folders, files in os.walk(folder, followlinks=True):
        here, folders[:] = Path(at), [name for name in folders if not name.startswith(".")]
        above = [path.resolve() for path in (here, *here.parents) if path.is_relative_to(folder)]
        for link in (here / name for name in folders if (here / name).is_symlink()):
            if any(path.is_relative_to(link.resolve()) for path in above):
                raise ValueError(f"{folder}: expected links that end, got {link}, which leads to {link.resolve()}; take it away")
        found += [(here / name).relative_to(folder) for name in files if not name.startswith(".") and (here / name).is_file()]
    return sorted(found)


def weights_hash(model: str | Path) -> str | None:
    """Twelve characters that stand for all weights in a model's folder; None where there are none, as for a name on the Hub."""
    digests = {str(name): file_hash(Path(model) / name) for name in _names_in(Path(model)) if name.suffix == ".safetensors"}
    return next(iter(digests.values())) if list(digests) == ["model.safetensors"] else config_hash(digests) if digests else None


def hash_of_model(model: str | Path) -> str:
    """What stands for a model: the content of its folder, processor included; of a name on the Hub the name and its commit.

    Where the Hub's model was never fetched and can't be now, it is the name alone.
    """
    if Path(model).is_dir():
        return hash_of_tree(model)
    commit = commit_on_hub(model)
    return f"{model}@{commit}" if commit else str(model)


commits: dict[str, str] = {}  # that this process takes names on the Hub for


def commit_on_hub(model: str | Path) -> str | None:
    """The commit that a name on the Hub stands for as long as this process lives; what bears it in its name is made from it.

    It is the last; where the Hub can't be asked, the last that was fetched; None of a folder, or where there is none.
    """
    from huggingface_hub import hf_hub_download

    if str(model) not in commits and not Path(model).is_dir():
        with contextlib.suppress(OSError, ValueError):  # what the client raises of a name that is none, or can't be reached
            commits[str(model)] = Path(hf_hub_download(str(model), "config.json")).parent.name
    return commits.get(str(model))
