"""`rvlm run`: one notebook with other parameters; its results are separate from those of any profile."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rvlm.cli import add_command
from rvlm.cli.execution import Job, NotebookFailed, RunPaths, execute
from rvlm.files import ROOT, artifacts_dir, config_hash, file_hash
from rvlm.report.findings import load_findings, provenance_line
from rvlm.report.notebooks import InvalidRun, find_notebook, parse_parameters

RUN_EXAMPLES = """examples:
  rvlm run 00 -p seed 11 -p task open_drawer
  rvlm run 07 -p shots "[1, 5, 10, 25, 50]" -p n_seeds 5
  rvlm run 02_episodes_and_actions.ipynb -p bins 16

Names and values are checked against the notebook's parameters cell before anything runs. Works from any directory.
The executed copy, figures, tables and findings go to artifacts/tried/NAME-KEY/ (RVLM_HOME moves artifacts/), where KEY is the
hash of the values: results/ and the README stay as they are. Long steps are cached and shared with every other run."""

NOTEBOOK_SUITE = "tabletop/franka7"  # of the notebooks' parameter `task`


def add_run(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(commands, "run", "run one notebook with other parameters", RUN_EXAMPLES)
    command.add_argument("notebook", metavar="NN", help="number, name or path of the notebook")
    given = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    command.add_argument("-p", dest="parameters", help="a parameter; may be repeated", **given)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rvlm.envs.gl import choose_gl

    job, paths = make_job(arguments.notebook, [(name, value) for name, value in arguments.parameters])
    choose_gl()
    print(f"{job.stem}: started, with {_in_words(job.parameters)}", flush=True)
    try:
        copy = execute(job, paths, None)
    except NotebookFailed as error:
        print(error)
        return 1
    for record in load_findings(paths.results):
        print(f"{record['name']}: {record['sentence']}\n    {provenance_line(record).replace('**', '')}")
    print(f"executed copy: {copy}\nfigures, tables, findings: {paths.results}")
    return 0


def _in_words(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r}" for name, value in parameters.items()) or "its own parameters"


def make_job(name: str, pairs: Sequence[tuple[str, str]]) -> tuple[Job, RunPaths]:
    """The job of `rvlm run`, and the folders it reads and writes.

    Args:
        name: number, name or path of a notebook.
        pairs: names and values as the command line has them.

    Raises:
        InvalidRun: no such notebook, parameter or folder, or a value of the wrong type or choice.
    """
    notebook = _notebook(name)
    parameters = {key: _checked_value(key, value) for key, value in parse_parameters(notebook, pairs).items()}
    key, artifacts = config_hash(parameters | {"": file_hash(notebook)}), artifacts_dir().resolve()
    paths = RunPaths(ROOT, notebook.parent, artifacts / "tried" / f"{notebook.stem}-{key}", artifacts)
    return Job(notebook, parameters, key), paths


def _notebook(name: str) -> Path:
    path = Path(name).resolve()
    if path.suffix == ".ipynb" and path.is_file():  # any file, such as an edited copy
        return path
    return find_notebook(name, sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")))


def _checked_value(name: str, value: Any) -> Any:
    """A value with an absolute path, as the notebook runs in another directory; missing folders and tasks are refused."""
    if name == "task":
        from rvlm.envs.suites import load_suite

        if value not in (tasks := load_suite(NOTEBOOK_SUITE).tasks):
            raise InvalidRun(f"no task {value!r}; there are {', '.join(tasks)}")
    folder = Path(str(value)).expanduser().resolve()
    if name.endswith("_folder") and value and not folder.is_dir():
        raise InvalidRun(f"{name}: no folder {folder}")
    is_folder = isinstance(value, str) and value and name.endswith(("folder", "vlm", "demonstrations")) and folder.is_dir()
    return str(folder) if is_folder else value
