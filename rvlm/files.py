"""Where things are, how they are written so that they are whole or not there, and what stands for a content.

A cached result is found again by its name: a hash of the settings (`config_hash`), of the content of what went in (`digest`,
`hash_of_tree`, `hash_of_model`) and of the source code that computes it (`hash_of_code`).
"""

import ast
import contextlib
import ctypes
import functools
import hashlib
import json
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
RESULTS = ROOT / "results"  # in git; `rvlm reproduce` alone writes there
_CARDS = Path(__file__).parent / "data_cards"  # of an installed package
CARDS = _CARDS if _CARDS.is_dir() else ROOT / "data_cards"
IS_CLONE = (ROOT / "notebooks" / "profiles.yaml").exists()  # else the package was installed without its repository
PACKAGE = Path(__file__).resolve().parent
LARGE = 1 << 20  # hashes of files from this size on [byte] are kept on disk, those of smaller ones in the process
NOT_CONTENT = ("made.json", "README.md")  # they tell about a folder's content and are not part of it
# Where results go and how they are asked for: that changes no result.
PLUMBING = (
    *("rvlm", "rvlm.files", "rvlm.caches", "rvlm.provenance", "rvlm.processes"),
    *("rvlm.training.stages", "rvlm.policy.model_card"),
)


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
    asked, known = time.time_ns(), _stamp(path)
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
            if asked - changed < tick or _stamp(path) != known:
                return value
            _digests[known] = value
            if is_large:
                with contextlib.suppress(OSError):  # a full or read-only disk: then it is read again
                    atomic_write(kept, value)
    return _digests[known]


def _stamp(path: Path) -> tuple[str, int, int, int, int]:
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


# --- hashes of code -----------------------------------------------------------------------------------------------------


def hash_of_code(*roots: str, without: tuple[str, ...] = ()) -> str:
    """Twelve characters that stand for the source code that computes something; comments and docstrings don't count.

    Args:
        roots: Modules ("rvlm.evaluation.rollouts"), which stand for all that they import within the package, within functions
            too; or functions, classes and constants ("rvlm.evaluation.closed_loop:run_batch"), which stand for their own source,
            what they import themselves, and the functions, classes and constants of the same module that they name.
        without: Modules and packages that are imported somewhere on the way but not used by what is computed.

    Raises:
        ValueError: There is no such module, function, class or constant.
    """
    return config_hash({"code": _closure(roots, without)})


def code_of(*roots: str, without: tuple[str, ...] = ()) -> list[str]:
    """The modules, functions, classes and constants that `hash_of_code` hashes, by name."""
    return sorted(_closure(roots, without))


def _closure(roots: tuple[str, ...], without: tuple[str, ...]) -> dict[str, str]:
    """Name -> hash, of all code that the roots stand for."""
    found: dict[str, str] = {}
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name in found or name in PLUMBING or any(f"{name}.".startswith(f"{other}.") for other in without):
            continue
        part, parsed = _part(name), _parsed(*_bytes(name))
        if part not in parsed:
            raise ValueError(
                f"expected a function, class or constant {name!r}; {name.split(':')[0]} has {', '.join(filter(None, parsed))}"
            )
        found[name], imported, named = parsed[part]
        todo += [module for told in imported for module in _modules(told)]
        todo += [f"{name.partition(':')[0]}:{other}" for other in named if part and other in parsed]
        todo += [] if part else _modules(name.rpartition(".")[0])  # a package's own code runs before its modules'
    return found


def refuse_changed_code(*roots: str, without: tuple[str, ...] = ()) -> None:
    """Refuse to compute with code that has changed on disk since this process loaded it: the result would bear the wrong name.

    Raises:
        ValueError: The code of `hash_of_code` differs from what was there when this process began.
    """
    for name in code_of(*roots, without=without):
        path, now = _bytes(name)
        part, then = _part(name), _at_start.get(path, now)
        if now != then and _parsed(path, now)[part][0] != _parsed(path, then).get(part, ("",))[0]:
            raise ValueError(
                f"expected the code that this process has loaded; {path} has changed since, so that what is computed "
                "now would be kept under the name of other code; start the kernel or process again"
            )


def _part(name: str) -> str:
    return name.partition(":")[2]


def _modules(name: str) -> list[str]:
    """The module of an imported name, as "rvlm.data.actions" of "rvlm.data.actions.ActionSpec"; none outside the package."""
    while name.split(".")[0] == PACKAGE.name:
        if _file(name) is not None:
            return [name]
        name = name.rpartition(".")[0]
    return []


def _file(module: str) -> Path | None:
    package, *names = module.split(".")
    path = PACKAGE.joinpath(*names)
    places = (path.with_suffix(".py"), path / "__init__.py") if package == PACKAGE.name else ()
    return next((place for place in places if place.is_file()), None)


def _bytes(name: str) -> tuple[Path, bytes]:
    path = _file(name.partition(":")[0])
    if path is None:
        raise ValueError(f"expected a module of {PACKAGE.name}, or module:function, got {name!r}")
    return path, _read(*_stamp(path))


@functools.lru_cache(maxsize=1024)
def _read(path: str, *_: int) -> bytes:
    return Path(path).read_bytes()


@functools.lru_cache(maxsize=1024)
def _parsed(path: Path, source: bytes) -> dict[str, tuple[str, frozenset[str], frozenset[str]]]:
    """Of a module (under "") and of each of its functions, classes and constants: hash, names it imports, names it uses."""
    tree = ast.parse(source)
    package = ".".join((PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]))
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *named)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    parts: dict[str, Any] = {"": tree, **{node.name: node for node in tree.body if isinstance(node, named)}}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        parts |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return {name: (_hash_of(node), frozenset(_imported(node, package)), _named(node)) for name, node in parts.items()}


def _named(node: ast.AST) -> frozenset[str]:
    """Names that a piece of code reads when it runs, which those of types in its signatures are not."""
    told = [getattr(n, name, None) for n in ast.walk(node) for name in ("annotation", "returns")]
    types = {id(n) for kind in told if kind is not None for n in ast.walk(kind)}
    read = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in types)
    return frozenset(n.id for n in read)


def _hash_of(node: ast.AST) -> str:
    return hashlib.sha256(ast.dump(node).encode()).hexdigest()[:12]


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """Full names that a piece of code imports when it runs; those for type checkers alone are none."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        base = ".".join([*package.split(".")[: len(package.split(".")) + 1 - node.level], *filter(None, [node.module])])
        yield from (f"{base if node.level else node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imported(child, package)


_at_start = {path: path.read_bytes() for path in PACKAGE.rglob("*.py")}
