"""`rvlm lab`: JupyterLab on copies of the notebooks, so that what is tried changes neither them nor the results in git."""

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
SETTINGS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
ABOUT = """The notebooks are copied to artifacts/lab/notebooks (RVLM_HOME moves artifacts/): a copy that you have changed is
kept, one that you have not follows the repository's. Findings, figures and tables go to artifacts/lab/results.

Options that are not listed here go to JupyterLab:
  rvlm lab --no-browser --port 8899      on a remote machine; from yours: ssh -L 8899:localhost:8899 HOST"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(commands, "lab", "open JupyterLab on copies of the notebooks", ABOUT)
    command.set_defaults(run=_lab, passes_on=True)


def _lab(arguments: argparse.Namespace) -> int:
    from rvlm.envs.gl import choose_gl

    folder = artifacts_dir().resolve() / "lab"
    for line in copy_notebooks(ROOT / "notebooks", folder / "notebooks"):
        print(line)
    settings = atomic_write(folder / "settings" / "overrides.json", json.dumps(SETTINGS)).parent
    choose_gl()  # kernels inherit the answer
    command = [sys.executable, "-m", "jupyterlab", str(folder / "notebooks"), f"--LabApp.app_settings_dir={settings}"]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    print(f"notebooks: {folder / 'notebooks'}\nresults: {folder / 'results'}", flush=True)
    os.execve(sys.executable, [*command, *arguments.rest], environment(folder))


def environment(folder: Path) -> dict[str, str]:
    """What kernels read: results of their own, and no profile, whatever this process was told."""
    others = {name: value for name, value in os.environ.items() if name not in ("RVLM_PROFILE", "RVLM_PARAMETERS")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # its terminal finds `rvlm`
    return {**others, "PATH": path, "RVLM_HOME": str(folder.parent), "RVLM_RESULTS": str(folder / "results")}


def copy_notebooks(source: Path, target: Path) -> list[str]:
    """Copy notebooks that are not there, and those whose copy nobody has changed; a changed one is kept.

    Returns:
        A line for each that was kept although the source is another by now.

    Raises:
        InvalidRun: there are no notebooks.
    """
    notebooks = sorted(source.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise InvalidRun(f"no notebooks in {source}; an installed package has none: they stand in a clone of the repository")
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
            lines.append(f"{copy.name}: you have changed this copy, so it is kept; the repository's is another by now")
    atomic_write(record, json.dumps(origins, indent=1))
    return lines


def _cells(notebook: Path) -> str:
    """Hash of what the cells say, without outputs and metadata, which opening a notebook changes."""
    try:
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook.read_text())["cells"]]
    except (ValueError, KeyError, TypeError):  # half-written or no notebook any more: whoever did that may want it back
        return ""
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()
