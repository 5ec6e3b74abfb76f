"""Run the notebooks in order, skip those that are up to date, write the report.

A notebook is up to date by content, never by time. Its key is the hash of its cells, its parameters, everything in ``rvlm/`` and
``data_cards/``, and the key of the notebook before it: a change runs again all that it can affect, and nothing else.
Long steps inside notebooks are cached by their own content under ``artifacts/``, so that running again is cheap.
A notebook is finished if its executed copy in ``results/notebooks/`` carries the key, and a marker under
``artifacts/reproduce/`` carries it too and lists the files that the notebook wrote, which still exist. Markers are not in git: a
new clone, or one whose artifacts were deleted, runs everything, although the results in git carry the same keys.
An executed copy is written to a temporary name and renamed when complete, so that the run can be killed at any moment.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rvlm.cli.execution import Job, NotebookFailed, RunPaths, execute, executed_copy
from rvlm.files import atomic_write
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

# --- planning -----------------------------------------------------------------------------------------------------------


def plan_jobs(paths: RunPaths, profile: str, only: Sequence[str] = ()) -> list[Job]:
    """The jobs of a profile, in order.

    Args:
        paths: folders of the run.
        profile: a key of ``profiles.yaml``.
        only: notebooks to run, by number ("05"), name ("evaluate", "06_evaluate") or path; empty for all.

    Raises:
        InvalidRun: an unknown profile, notebook or parameter, or parameters that are not literals.
    """
    notebooks = sorted(paths.notebooks.glob("[0-9][0-9]_*.ipynb"))
    profiles = read_profiles(paths.notebooks)
    if profile not in profiles:
        raise InvalidRun(f"no profile {profile!r}; those in {PROFILES}: {', '.join(profiles)}")
    for name, table in profiles.items():
        for stem, values in table.items():
            fix = f"fix {PROFILES} or the notebook's parameters cell"
            check_parameters(find_notebook(stem, notebooks), values, f"profile {name!r}", fix)
    selected = [find_notebook(name, notebooks) for name in only] or notebooks
    sizes = {path.stem: parameters_in(profiles, profile, path.stem) for path in notebooks}
    return [job for job in _chain(notebooks, sizes, hash_of_package(paths.root)) if job.notebook in selected]


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


def reproduce(paths: RunPaths, profile: str, only: Sequence[str] = (), force: bool = False) -> int:
    """Run a profile's notebooks in order, skip those that are finished, write the report.

    Returns:
        Exit status: 0, or 1 if a notebook failed (those after it depend on it and are not run).

    Raises:
        InvalidRun: As `plan_jobs`, or another run writes the same results.
    """
    jobs = plan_jobs(paths, profile, only)
    paths.results.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(paths.results / ".reproduce.lock", timeout=0):
            return _reproduce(jobs, paths, profile, force)
    except Timeout:
        problem = f"another run writes {paths.results} at this moment; wait for it, or name another folder in RVLM_RESULTS"
        raise InvalidRun(problem) from None


def _reproduce(jobs: Sequence[Job], paths: RunPaths, profile: str, force: bool) -> int:
    from tqdm.auto import tqdm

    status = 0
    for folder in ("notebooks", *WRITTEN):
        for part in (paths.results / folder).glob(".*.part*"):
            part.unlink(missing_ok=True)  # incomplete files of a killed run
    bar = tqdm(jobs, desc=f"profile {profile}", unit="notebook", disable=None)
    say = functools.partial(print, flush=True) if bar.disable else bar.write
    for job in bar:
        if ignored := ignored_edits(job):
            say(f"{job.stem}: profile {profile} does not use what its parameters cell says, {ignored}")
        if not force and is_finished(job, paths, profile):
            say(f"{job.stem}: finished before, kept")
            continue
        if bar.disable:  # without a bar nothing else shows progress
            say(f"{job.stem}: started")
        try:
            say(f"{job.stem}: done in {run_notebook(job, paths, profile, is_quiet=bar.disable):.0f} s")
        except NotebookFailed as error:
            say(str(error))
            status = 1
            break
    bar.close()
    print(f"report: {html_report(paths.results, paths.notebooks)}")
    return status


def _done_marker(job: Job, paths: RunPaths, profile: str) -> Path:
    return paths.artifacts / "reproduce" / profile / f"{job.stem}.json"


def is_finished(job: Job, paths: RunPaths, profile: str) -> bool:
    """Whether marker and executed copy carry this key, and all files that the notebook wrote still exist."""
    marker, executed = _done_marker(job, paths, profile), executed_copy(job, paths)
    if not marker.exists() or not executed.exists():
        return False
    try:
        done, copy = json.loads(marker.read_text()), json.loads(executed.read_text())
        keys = {done["key"], copy["metadata"].get("rvlm", {}).get("key")}
    except (ValueError, KeyError):  # truncated
        return False
    return keys == {job.key} and all((paths.results / name).exists() for name in done["files"])


def ignored_edits(job: Job) -> str:
    """How to run with the values of the parameters cell that differ from profile cpu's; "" if none do."""
    tracked = parameters_in(read_profiles(job.notebook.parent), GIT_PROFILE, job.stem)
    own = {name: value for name, value in parameters_of(job.notebook).items() if name in tracked and value != tracked[name]}
    words = " ".join(f"-p {name} {str(value)!r}" for name, value in own.items())
    return f"try it with: rvlm run {job.stem[:2]} {words}" if own else ""


def run_notebook(job: Job, paths: RunPaths, profile: str, is_quiet: bool = False) -> float:
    """Execute a profile's notebook, save its copy, and write the marker that `is_finished` reads.

    Returns:
        Duration [s].

    Raises:
        NotebookFailed: it stopped with an error; the copy is ``NN_name.failed.ipynb``, traceback included.
    """
    started = time.time()
    execute(job, paths, profile, is_quiet)
    written = {"key": job.key, "files": _written_since(started - 1, paths.results)}
    atomic_write(_done_marker(job, paths, profile), json.dumps(written, indent=1))
    return time.time() - started


def _written_since(moment: float, results: Path) -> list[str]:
    folders = [results / name for name in WRITTEN]
    paths = [path for folder in folders for path in folder.glob("*") if path.stat().st_mtime >= moment]
    return sorted(path.relative_to(results).as_posix() for path in paths)
