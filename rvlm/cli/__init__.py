"""The command line: one small module a command; `rvlm.cli.main` puts them together."""

import argparse
from typing import Any


def add_command(commands: Any, name: str, about: str, more: str = "") -> argparse.ArgumentParser:
    """A command's parser: one line about it, and what else its help says (examples, where results go)."""
    raw = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=more, formatter_class=raw)
