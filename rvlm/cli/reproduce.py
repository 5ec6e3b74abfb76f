"""Run the notebooks in order, resume by content, write the report.

What is finished is decided by content, never by time. A notebook's key is the hash of its cells, its parameters, everything in
``rvlm/`` and ``data_cards/``, and the key of the notebook before it: whatever a change could touch is run again, nothing else.
Long steps inside notebooks are cached by their own content under ``artifacts/``, so that running again is cheap.
Two things must say that a notebook is finished: its executed copy in ``results/notebooks/`` carries the key, and a receipt
under ``artifacts/reproduce/`` names the files that it wrote, which still exist. Receipts are not in git: a fresh clone, or one
whose artifacts were deleted, runs everything, although the results that came with it carry the same keys.
An executed copy is written to a temporary name and renamed when whole, so that the run can be killed at any moment.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rvlm.files import RESULTS, ROOT, artifacts_dir, atomic_write
from rvlm.report.copies import cleaned
from rvlm.report.notebooks import (
    GIT_PROFILE,
    PROFILES,
    InvalidRun,
    check_parameters,
    find_notebook,
    parameters_in,
    parameters_of,
    read_profiles,
)
from rvlm.report.page import html_report

WRITTEN = ("findings", "figures", "tables", "episodes")  # folders that notebooks write results to


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; its copy is kept."""


@dataclass(frozen=True)
class RunPaths:
    """Where a run reads and writes.

    Attributes:
        root: working directory of every kernel; holds ``rvlm/`` and ``data_cards/``.
        notebooks: the ordered notebooks and ``profiles.yaml``.
        results: executed copies, findings, figures, tables, report.
        artifacts: caches, and receipts of finished notebooks.
    """

    root: Path
    notebooks: Path
    results: Path
    artifacts: Path

    @classmethod
    def of_profile(cls, profile: str) -> RunPaths:
        """The repository's places; only profile cpu writes to the results in git, unless ``RVLM_RESULTS`` says where."""
        artifacts = artifacts_dir().resolve()
        own = RESULTS if profile == GIT_PROFILE else artifacts / profile / "results"
        return cls(ROOT, ROOT / "notebooks", Path(os.environ.get("RVLM_RESULTS") or own).resolve(), artifacts)


@dataclass(frozen=True)
class Job:
    """A notebook to run: its file, the parameters that it is run with, and the hash of all that it depends on."""

    notebook: Path
    parameters: dict[str, Any]
    key: str

    @property
    def stem(self) -> str:
        """File name without suffix, e.g. "06_evaluate"."""
        return self.notebook.stem


# --- planning -----------------------------------------------------------------------------------------------------------


def plan(places: RunPaths, profile: str, only: Sequence[str] = ()) -> list[Job]:
    """The jobs of a profile, in order.

    Args:
        places: where the notebooks are.
        profile: a key of ``profiles.yaml``.
        only: the notebooks wanted, by number ("05"), name ("evaluate", "06_evaluate") or path; empty for all.

    Raises:
        InvalidRun: an unknown profile, notebook or parameter, or parameters that are not literals.
    """
    notebooks = sorted(places.notebooks.glob("[0-9][0-9]_*.ipynb"))
    profiles = read_profiles(places.notebooks)
    if profile not in profiles:
        raise InvalidRun(f"no profile {profile!r}; those in {PROFILES}: {', '.join(profiles)}")
    for name, table in profiles.items():
        for stem, values in table.items():
            mend = f"mend {PROFILES} or the notebook's parameters cell"
            check_parameters(find_notebook(stem, notebooks), values, f"profile {name!r}", mend)
    wanted = [find_notebook(name, notebooks) for name in only] or notebooks
    sizes = {path.stem: parameters_in(profiles, profile, path.stem) for path in notebooks}
    return [job for job in _chain(notebooks, sizes, hash_of_package(places.root)) if job.notebook in wanted]


def _chain(notebooks: Sequence[Path], table: Mapping[str, dict[str, Any]], code: str) -> Iterator[Job]:
    key = code
    for path in notebooks:
        parameters = table[path.stem]
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
        key = hashlib.sha256(json.dumps([key, path.stem, cells, parameters], sort_keys=True, default=str).encode()).hexdigest()
        yield Job(path, parameters, key)


def hash_of_package(root: Path) -> str:
    """Hash of every file of the package (code, shipped weights) and every data card."""
    total = hashlib.sha256()
    for path in sorted(p for folder in ("rvlm", "data_cards") for p in (root / folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            total.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


# --- running ------------------------------------------------------------------------------------------------------------


def reproduce(places: RunPaths, profile: str, only: Sequence[str] = (), force: bool = False) -> int:
    """Run a profile's notebooks in order, skipping what is finished; then write the report.

    Returns:
        Exit status: 0, or 1 where a notebook failed (those after it are not run: they build on it).

    Raises:
        InvalidRun: As `plan`, or another run writes the same results.
    """
    jobs = plan(places, profile, only)
    places.results.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(places.results / ".reproduce.lock", timeout=0):
            return _reproduce(jobs, places, profile, force)
    except Timeout:
        problem = f"another run writes {places.results} at this moment; wait for it, or name another folder in RVLM_RESULTS"
        raise InvalidRun(problem) from None


def _reproduce(jobs: Sequence[Job], places: RunPaths, profile: str, force: bool) -> int:
    from tqdm.auto import tqdm

    status = 0
    for folder in ("notebooks", *WRITTEN):
        for part in (places.results / folder).glob(".*.part*"):
            part.unlink(missing_ok=True)  # what a killed run left half written
    bar = tqdm(jobs, desc=f"profile {profile}", unit="notebook", disable=None)
    say = functools.partial(print, flush=True) if bar.disable else bar.write
    for job in bar:
        if ignored := ignored_edits(job):
            say(f"{job.stem}: profile {profile} does not use what its parameters cell says, {ignored}")
        if not force and is_finished(job, places, profile):
            say(f"{job.stem}: finished before, kept")
            continue
        if bar.disable:  # no bar tells that something is going on
            say(f"{job.stem}: started")
        try:
            say(f"{job.stem}: done in {run(job, places, profile, is_quiet=bar.disable):.0f} s")
        except NotebookFailed as error:
            say(str(error))
            status = 1
            break
    bar.close()
    print(f"report: {html_report(places.results, places.notebooks)}")
    return status


def _done_marker(job: Job, places: RunPaths, profile: str) -> Path:
    return places.artifacts / "reproduce" / profile / f"{job.stem}.json"


def _executed(job: Job, places: RunPaths, state: str = "") -> Path:
    return places.results / "notebooks" / f"{job.stem}{state}.ipynb"


def is_finished(job: Job, places: RunPaths, profile: str) -> bool:
    """Do receipt and executed copy carry this key, and does everything that the notebook wrote still exist?"""
    receipt, executed = _done_marker(job, places, profile), _executed(job, places)
    if not receipt.exists() or not executed.exists():
        return False
    try:
        told, copy = json.loads(receipt.read_text()), json.loads(executed.read_text())
        keys = {told["key"], copy["metadata"].get("rvlm", {}).get("key")}
    except (ValueError, KeyError):  # cut by a broken disk
        return False
    return keys == {job.key} and all((places.results / name).exists() for name in told["files"])


def ignored_edits(job: Job) -> str:
    """The values in a notebook's own cell that differ from profile cpu's, and how to run with them; "" where none do."""
    tracked = parameters_in(read_profiles(job.notebook.parent), GIT_PROFILE, job.stem)
    own = {name: value for name, value in parameters_of(job.notebook).items() if name in tracked and value != tracked[name]}
    words = " ".join(f"-p {name} {str(value)!r}" for name, value in own.items())
    return f"try it with: rvlm run {job.stem[:2]} {words}" if own else ""


def run(job: Job, places: RunPaths, profile: str, is_quiet: bool = False) -> float:
    """Execute a profile's notebook, keep its copy, and leave a receipt by which `is_finished` knows it.

    Returns:
        How long it took [s].

    Raises:
        NotebookFailed: it stopped with an error; the copy is ``NN_name.failed.ipynb``, traceback included.
    """
    started = time.time()
    execute(job, places, profile, is_quiet)
    written = {"key": job.key, "files": _written_since(started - 1, places.results)}
    atomic_write(_done_marker(job, places, profile), json.dumps(written, indent=1))
    return time.time() - started


def execute(job: Job, places: RunPaths, profile: str | None, is_quiet: bool = False) -> Path:
    """Execute one notebook and keep its copy.

    Args:
        job: notebook and parameters.
        places: where it reads and writes.
        profile: whose parameters they are; None for values of one's own, which stand for no profile.
        is_quiet: whether to draw no bar.

    Returns:
        The executed copy.

    Raises:
        NotebookFailed: it stopped with an error; the copy is ``NN_name.failed.ipynb``, traceback included.
    """
    started, part = time.time(), places.results / "notebooks" / f".{job.stem}.part.ipynb"
    part.parent.mkdir(parents=True, exist_ok=True)
    failed = _executed(job, places, ".failed")
    try:
        _execute(job, part, places, profile, is_quiet)
    except Exception as error:  # whatever ends a notebook: its own error, a dead kernel, a full disk
        _save_executed(part, failed, job, profile, time.time() - started, error)
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise NotebookFailed(f"{job.stem}: failed ({last[0]}); its copy with the traceback: {failed}") from error
    _save_executed(part, _executed(job, places), job, profile, time.time() - started)
    failed.unlink(missing_ok=True)
    return _executed(job, places)


def _execute(job: Job, part: Path, places: RunPaths, profile: str | None, is_quiet: bool) -> None:
    import papermill

    from rvlm.cli.kernels import kernel_manager

    bar: Any = False if is_quiet else {"desc": job.stem, "position": 1, "leave": False}
    papermill.execute_notebook(
        str(job.notebook),
        str(part),
        parameters=job.parameters,
        kernel_name="python3",
        language="python",
        cwd=str(places.root),
        progress_bar=bar,
        kernel_manager_class=kernel_manager(kernel_environment(job, places, profile)),
    )


def kernel_environment(job: Job, places: RunPaths, profile: str | None) -> dict[str, str]:
    """What a notebook reads of the run that executes it."""
    return {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "RVLM_PROFILE": profile or "",
        "RVLM_PARAMETERS": json.dumps(job.parameters),
        "RVLM_RESULTS": str(places.results),
        "RVLM_HOME": str(places.artifacts),
    }


def _save_executed(
    part: Path, final: Path, job: Job, profile: str | None, seconds: float, error: Exception | None = None
) -> None:
    """Give an executed copy its final name, with its key and without this machine's paths in the metadata."""
    source = part if part.exists() else job.notebook  # a kernel that never started leaves no copy
    notebook = json.loads(source.read_text())
    notebook["metadata"]["rvlm"] = {"key": job.key, "profile": profile, "seconds": round(seconds, 1)}
    if error is not None:
        notebook["metadata"]["rvlm"]["error"] = f"{type(error).__name__}: {error}"
    if "papermill" in notebook["metadata"]:
        notebook["metadata"]["papermill"] |= {"input_path": f"notebooks/{job.notebook.name}", "output_path": final.name}
    atomic_write(final, json.dumps(cleaned(notebook), indent=1, ensure_ascii=False) + "\n")
    part.unlink(missing_ok=True)


def _written_since(moment: float, results: Path) -> list[str]:
    folders = [results / name for name in WRITTEN]
    paths = [path for folder in folders for path in folder.glob("*") if path.stat().st_mtime >= moment]
    return sorted(path.relative_to(results).as_posix() for path in paths)
