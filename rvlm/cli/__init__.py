"""The command line: one module per command, combined in `rvlm.cli.main`.

Modules:
    kernels: the kernel in which papermill runs a notebook.
    execution: one notebook, executed in its own kernel.
    reproduce: run the notebooks in order, skipping those that are up to date.
    dry_run: what a run would download, need and take.
    run: one notebook with parameters of your own.
    lab: JupyterLab on copies of the notebooks.
    evaluate: a policy's closed-loop success on a suite.
    diagnose: the first fault of demonstrations, policy and environment.
    cache: list caches, and delete them.
    ship: make the shipped models.
    main: the parser, and the read-only commands.
"""

import argparse
from typing import Any


def add_command(commands: Any, name: str, about: str, more: str = "") -> argparse.ArgumentParser:
    """Add a command's parser, with a one-line description and the rest of its help (examples, where results go)."""
    raw = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=more, formatter_class=raw)
