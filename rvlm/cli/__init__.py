"""The command line: one module per command, combined in `rvlm.cli.main`."""

import argparse
from typing import Any


def add_command(commands: Any, name: str, about: str, more: str = "") -> argparse.ArgumentParser:
    """Add a command's parser, with a one-line description and the rest of its help (examples, where results go)."""
    raw = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=more, formatter_class=raw)
