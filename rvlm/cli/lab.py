"""`rvlm lab`: JupyterLab on copies of the notebooks, so that edits change neither the notebooks nor the results in git."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rvlm.cli import add_command
from rvlm.files import ROOT, artifacts_dir, atomic_write
from rvlm.report.notebooks import InvalidRun

ORIGINS = ".origins.json"  # notebook -> hash of the cells that were copied
LAB_SETTINGS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
ABOUT = """The notebooks are copied to artifacts/lab/notebooks (RVLM_HOME moves artifacts/): a copy that you have edited is
kept, any other is updated from the repository. Findings, figures and tables go to artifacts/lab/results.

Options that are not listed here are passed to JupyterLab:
  rvlm lab --no-browser --port 8899      on a remote machine; from yours: ssh -L 8899:localhost:8899 HOST"""


def add_lab(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(commands, "lab", "open JupyterLab on copies of the notebooks", ABOUT)
    command.set_defaults(run=_lab, passes_on=True)


def _lab(arguments: argparse.Namespace) -> int:
    from rvlm.envs.gl import choose_gl

    folder = artifacts_dir().resolve() / "lab"
    for line in copy_notebooks(ROOT / "notebooks", folder / "notebooks"):
        print(line)
    settings = atomic_write(folder / "settings" / "overrides.json", json.dumps(LAB_SETTINGS)).parent
    choose_gl()  # kernels inherit MUJOCO_GL
    command = [sys.executable, "-m", "jupyterlab", str(folder / "notebooks"), f"--LabApp.app_settings_dir={settings}"]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    print(f"notebooks: {folder / 'notebooks'}\nresults: {folder / 'results'}", flush=True)
    os.execve(sys.executable, [*command, *arguments.rest], environment(folder))


def environment(folder: Path) -> dict[str, str]:
    """Environment of the kernels: their own results folder, and no profile."""
    others = {name: value for name, value in os.environ.items() if name not in ("RVLM_PROFILE", "RVLM_PARAMETERS")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # its terminal finds `rvlm`
    return {**others, "PATH": path, "RVLM_HOME": str(folder.parent), "RVLM_RESULTS": str(folder / "results")}


def copy_notebooks(source: Path, target: Path) -> list[str]:
    """Copy each notebook unless its copy was edited.

    Returns:
        A message for each edited copy whose source has changed since.

    Raises:
        InvalidRun: there are no notebooks.
    """
    notebooks = sorted(source.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise InvalidRun(f"no notebooks in {source}; an installed package has none: they are in a clone of the repository")
    record = target / ORIGINS
    origins = json.loads(record.read_text()) if record.exists() else {}
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    for notebook in notebooks:
        copy, now = target / notebook.name, _cells(notebook)
        if not copy.exists() or _cells(copy) == origins.get(notebook.name):
            if not copy.exists() or now != origins[notebook.name]:
                shutil.copyfile(notebook, copy)
            origins[notebook.name] = now
        elif now != origins.get(notebook.name):
            lines.append(f"{copy.name}: you have edited this copy, so it is kept; the repository's notebook has changed since")
    atomic_write(record, json.dumps(origins, indent=1))
    return lines


def _cells(notebook: Path) -> str:
    """Hash of the cells' source, without outputs and metadata, which opening a notebook changes."""
    try:
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook.read_text())["cells"]]
    except (ValueError, KeyError, TypeError):  # no valid notebook: kept, as it may be an edited copy
        return ""
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()
