"""The command line: run the notebooks in order, resume by content, report, list findings.

What is finished is decided by content, never by time. A notebook's key is the hash of its cells, its parameters, everything in
``rvlm/`` and ``data_cards/``, and the key of the notebook before it: whatever a change could touch is run again, nothing else.
Long steps inside notebooks are cached by their own content under ``artifacts/``, so that running again is cheap.
Two things must say that a notebook is finished: its executed copy in ``results/notebooks/`` carries the key, and a receipt
under ``artifacts/reproduce/`` names the files that it wrote, which still exist. Receipts are not in git: a fresh clone, or one
whose artifacts were deleted, runs everything, although the results that came with it carry the same keys.
An executed copy is written to a temporary name and renamed when whole, so that the run can be killed at any moment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rvlm import report
from rvlm.copies import cleaned
from rvlm.files import ROOT, artifacts_dir, results_dir, write_whole
from rvlm.page import html_report
from rvlm.readme import update_readme

PROFILES = "profiles.yaml"
GIT_PROFILE = "cpu"  # the one whose results are in git


class Refused(ValueError):
    """A run that was asked for can't be right; nothing was run."""


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; its copy is kept."""


@dataclass(frozen=True)
class Places:
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
    def of_profile(cls, profile: str) -> Places:
        """The repository's places; only profile cpu writes to the results in git, unless ``RVLM_RESULTS`` says where."""
        artifacts = artifacts_dir().resolve()
        own = results_dir() if profile == GIT_PROFILE or os.environ.get("RVLM_RESULTS") else artifacts / profile / "results"
        return cls(ROOT, ROOT / "notebooks", own.resolve(), artifacts)


@dataclass(frozen=True)
class Job:
    """A notebook to run: its file, the parameters that differ from its own defaults, and the hash of all that it depends on."""

    notebook: Path
    parameters: dict[str, Any]
    key: str

    @property
    def stem(self) -> str:
        """File name without suffix, e.g. "06_evaluate"."""
        return self.notebook.stem


# --- planning -----------------------------------------------------------------------------------------------------------


def plan(places: Places, profile: str, only: Sequence[str] = ()) -> list[Job]:
    """The jobs of a profile, in order.

    Args:
        places: where the notebooks are.
        profile: a key of ``profiles.yaml``.
        only: numbers ("05") or stems of the notebooks wanted; empty for all.

    Raises:
        Refused: an unknown profile, notebook or parameter, or parameters that are not literals.
    """
    notebooks = sorted(places.notebooks.glob("[0-9][0-9]_*.ipynb"))
    profiles = read_profiles(places.notebooks)
    if profile not in profiles:
        raise Refused(f"no profile {profile!r}; those in {PROFILES}: {', '.join(profiles)}")
    for name, table in profiles.items():
        _check_parameters(name, table, notebooks)
    wanted = [_find(name, notebooks) for name in only] or notebooks
    return [job for job in _chain(notebooks, profiles[profile], hash_of_code(places.root)) if job.notebook in wanted]


def read_profiles(notebooks: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """``profiles.yaml``: profile -> notebook's stem -> {parameter: value}."""
    path = notebooks / PROFILES
    if not path.exists():
        raise Refused(f"expected {path}: profile -> notebook -> parameter -> value; a profile may be empty ('cpu: {{}}')")
    read = yaml.safe_load(path.read_text()) or {}
    return {str(name): {stem: values or {} for stem, values in (table or {}).items()} for name, table in read.items()}


def _find(name: str, notebooks: Sequence[Path]) -> Path:
    found = [path for path in notebooks if name in (path.stem, path.name) or name.zfill(2) == path.stem[:2]]
    if not found:
        raise Refused(f"no notebook {name!r}; those that exist: {', '.join(path.stem for path in notebooks) or 'none'}")
    return found[0]


def _check_parameters(profile: str, table: Mapping[str, Mapping[str, Any]], notebooks: Sequence[Path]) -> None:
    """Papermill only warns of an unknown parameter, and runs."""
    import papermill

    for stem, values in table.items():
        known = papermill.inspect_notebook(str(_find(stem, notebooks)))
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise Refused(
                f"profile {profile!r} sets {', '.join(unknown)} of {stem}, which has no such parameter; "
                f"it has {', '.join(known) or 'none'}; mend {PROFILES} or the notebook's parameters cell"
            )


def _chain(notebooks: Sequence[Path], table: Mapping[str, Mapping[str, Any]], code: str) -> Iterator[Job]:
    key = code
    for path in notebooks:
        parameters = dict(table.get(path.stem, {}))
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
        key = hashlib.sha256(json.dumps([key, path.stem, cells, parameters], sort_keys=True, default=str).encode()).hexdigest()
        yield Job(path, parameters, key)


def hash_of_code(root: Path) -> str:
    """Hash of every file of the package (code, shipped weights) and every data card."""
    total = hashlib.sha256()
    for path in sorted(p for folder in ("rvlm", "data_cards") for p in (root / folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            total.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


# --- running ------------------------------------------------------------------------------------------------------------


def reproduce(places: Places, profile: str, only: Sequence[str] = (), force: bool = False) -> int:
    """Run a profile's notebooks in order, skipping what is finished; then write the report.

    Returns:
        Exit status: 0, or 1 where a notebook failed (those after it are not run: they build on it).
    """
    from tqdm.auto import tqdm

    jobs, status = plan(places, profile, only), 0
    for part in places.results.glob("**/.*.part*"):
        part.unlink(missing_ok=True)  # what a killed run left half written
    bar = tqdm(jobs, desc=f"profile {profile}", unit="notebook", disable=None)
    for job in bar:
        if not force and is_finished(job, places, profile):
            bar.write(f"{job.stem}: finished before, kept")
            continue
        try:
            bar.write(f"{job.stem}: done in {run(job, places, profile, is_quiet=bar.disable):.0f} s")
        except NotebookFailed as error:
            bar.write(str(error))
            status = 1
            break
    bar.close()
    print(f"report: {html_report(places.results, places.notebooks)}")
    return status


def _receipt(job: Job, places: Places, profile: str) -> Path:
    return places.artifacts / "reproduce" / profile / f"{job.stem}.json"


def _executed(job: Job, places: Places, state: str = "") -> Path:
    return places.results / "notebooks" / f"{job.stem}{state}.ipynb"


def is_finished(job: Job, places: Places, profile: str) -> bool:
    """Do receipt and executed copy carry this key, and does everything that the notebook wrote still exist?"""
    receipt, executed = _receipt(job, places, profile), _executed(job, places)
    if not receipt.exists() or not executed.exists():
        return False
    told, copy = json.loads(receipt.read_text()), json.loads(executed.read_text())
    keys = {told["key"], copy["metadata"].get("rvlm", {}).get("key")}
    return keys == {job.key} and all((places.results / name).exists() for name in told["files"])


def run(job: Job, places: Places, profile: str, is_quiet: bool = False) -> float:
    """Execute one notebook and keep its copy.

    Returns:
        How long it took [s].

    Raises:
        NotebookFailed: it stopped with an error; the copy is ``NN_name.failed.ipynb``, traceback included.
    """
    started, part = time.time(), places.results / "notebooks" / f".{job.stem}.part.ipynb"
    part.parent.mkdir(parents=True, exist_ok=True)
    failed = _executed(job, places, ".failed")
    try:
        _execute(job, part, places, profile, is_quiet)
    except Exception as error:  # whatever ends a notebook: its own error, a dead kernel, a full disk
        _keep(part, failed, job, profile, time.time() - started, error)
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise NotebookFailed(f"{job.stem}: failed ({last[0]}); its copy with the traceback: {failed}") from error
    _keep(part, _executed(job, places), job, profile, time.time() - started)
    failed.unlink(missing_ok=True)
    written = {"key": job.key, "files": _written_since(started - 1, places.results)}
    write_whole(_receipt(job, places, profile), json.dumps(written, indent=1))
    return time.time() - started


def _execute(job: Job, part: Path, places: Places, profile: str, is_quiet: bool) -> None:
    import papermill

    from rvlm.kernels import kernel_manager

    bar: Any = False if is_quiet else {"desc": job.stem, "position": 1, "leave": False}
    papermill.execute_notebook(
        str(job.notebook),
        str(part),
        parameters=job.parameters,
        kernel_name="python3",
        language="python",
        cwd=str(places.root),
        progress_bar=bar,
        kernel_manager_class=kernel_manager(kernel_environment(places, profile)),
    )


def kernel_environment(places: Places, profile: str) -> dict[str, str]:
    """What a notebook reads of the run that executes it."""
    return {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "RVLM_PROFILE": profile,
        "RVLM_RESULTS": str(places.results),
        "RVLM_HOME": str(places.artifacts),
    }


def _keep(part: Path, final: Path, job: Job, profile: str, seconds: float, error: Exception | None = None) -> None:
    """Give an executed copy its final name, with its key and without this machine's paths in the metadata."""
    source = part if part.exists() else job.notebook  # a kernel that never started leaves no copy
    notebook = json.loads(source.read_text())
    notebook["metadata"]["rvlm"] = {"key": job.key, "profile": profile, "seconds": round(seconds, 1)}
    if error is not None:
        notebook["metadata"]["rvlm"]["error"] = f"{type(error).__name__}: {error}"
    if "papermill" in notebook["metadata"]:
        notebook["metadata"]["papermill"] |= {"input_path": f"notebooks/{job.notebook.name}", "output_path": final.name}
    write_whole(final, json.dumps(cleaned(notebook), indent=1, ensure_ascii=False) + "\n")
    part.unlink(missing_ok=True)


def _written_since(moment: float, results: Path) -> list[str]:
    folders = [results / name for name in ("findings", "figures", "tables")]
    paths = [path for folder in folders for path in folder.glob("*") if path.stat().st_mtime >= moment]
    return sorted(path.relative_to(results).as_posix() for path in paths)


# --- commands -----------------------------------------------------------------------------------------------------------


def _reproduce(arguments: argparse.Namespace) -> int:
    from rvlm.envs.gl import choose_gl

    choose_gl()  # kernels inherit the answer
    places = Places.of_profile(arguments.profile)
    status = reproduce(places, arguments.profile, arguments.only, arguments.force)
    if status == 0 and places.results == ROOT / "results":
        print(f"README: {update_readme()}")
    return status


def _report(arguments: argparse.Namespace) -> int:
    print(f"report: {html_report()}")
    print(f"README: {update_readme()}")
    return 0


def _findings(arguments: argparse.Namespace) -> int:
    found = report.load_findings()
    if arguments.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    for record in found:
        print(f"{record['name']}: {record['sentence']}\n    {report.fine_print(record)}")
    if not found:
        print(f"no findings in {results_dir()}; 'rvlm reproduce' makes them")
    return 0


def _sizes(profile: str, stem: str) -> dict[str, Any]:
    """A notebook's parameters in a profile, which must name them (the notebook's own defaults are the cpu size)."""
    table = read_profiles(ROOT / "notebooks")
    if profile not in table or stem not in table[profile]:
        raise Refused(f"expected sizes of {stem} in profile {profile!r} of notebooks/profiles.yaml; profiles: {', '.join(table)}")
    return table[profile][stem]


def _vlm(arguments: argparse.Namespace) -> int:
    from rvlm import recipes

    sizes = _sizes(arguments.profile, "01_load_a_vlm")
    stage = recipes.vision_language(sizes["n_scenes"], sizes["n_samples"])
    print(recipes.ship(stage, recipes.SMALL_VLM, f"rvlm vlm --profile {arguments.profile}"))
    return 0


def _policy(arguments: argparse.Namespace) -> int:
    from rvlm import recipes

    sizes = _sizes(arguments.profile, "05_train_in_stages")
    stage = recipes.main_policy(sizes["n_episodes"], sizes["n_samples"])
    print(recipes.ship(stage, recipes.POLICY, f"rvlm policy --profile {arguments.profile}"))
    return 0


def parser() -> argparse.ArgumentParser:
    """Every command of ``rvlm``; a new one is an ``add_parser`` and a ``set_defaults(run=...)``."""
    top = argparse.ArgumentParser(prog="rvlm", description="Robot policies from vision-language models.")
    commands = top.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("reproduce", help="run the notebooks in order, skip what is finished, write the report")
    command.add_argument("--profile", default=GIT_PROFILE, help="smoke, cpu (default), gpu or full: sizes, nothing else")
    command.add_argument("--only", nargs="+", default=[], metavar="NN", help="these notebooks only")
    command.add_argument("--force", action="store_true", help="run even what is finished")
    command.set_defaults(run=_reproduce)

    command = commands.add_parser("report", help="write the HTML report and the README's table from the results at hand")
    command.set_defaults(run=_report)

    for name, run, what in (("vlm", _vlm, "vision-language model (stage 1)"), ("policy", _policy, "policy (stage 2)")):
        command = commands.add_parser(name, help=f"make the shipped {what} anew")
        command.add_argument("--profile", default="full", help="sizes, from notebooks/profiles.yaml")
        command.set_defaults(run=run)

    command = commands.add_parser("findings", help="print what was found")
    command.add_argument("--json", action="store_true", help="everything about each, for scripts")
    command.set_defaults(run=_findings)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``rvlm``; returns the exit status."""
    from rvlm.envs.gl import NoHeadlessOpenGL

    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (Refused, NoHeadlessOpenGL) as error:
        print(f"rvlm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rvlm: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
