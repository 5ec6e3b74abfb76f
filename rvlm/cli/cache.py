"""``rvlm cache``: what is kept between runs, and deleting what is not needed."""

import argparse
import re
from typing import Any

from rvlm.caches import KINDS, Entry, entries, prune
from rvlm.cli import add_command
from rvlm.files import artifacts_dir
from rvlm.report.notebooks import InvalidRun

ABOUT = "list what is kept between runs, and delete what is not needed"
MORE = """State: current (today's code would use it), stale (other code made it), unknown (it does not say), unfinished.
What is in use, locked or under way is never deleted, nor are links and recordings of your own. Frames keep below RVLM_FRAMES_GB
(default 100), features below RVLM_FEATURES_GB (default 50).

examples:
  rvlm cache
  rvlm cache --prune --stale
  rvlm cache --prune --older-than 30d --kind frames features
  rvlm cache --prune --max-gb 20"""
SECONDS = {"h": 3600, "d": 86_400, "w": 604_800}


def _cache(arguments: argparse.Namespace) -> int:
    if arguments.prune:
        return _prune(arguments)
    if arguments.stale or arguments.unknown or arguments.older_than is not None or arguments.max_gb is not None:
        raise InvalidRun("expected --prune with --stale, --older-than or --max-gb; without it nothing is deleted")
    found = entries(arguments.kind)
    for entry in found:
        print(_line(entry))
    total = sum(entry.n_bytes for entry in found)
    print(f"{len(found)} in {artifacts_dir()}, {total / 1e9:.2f} GB; 'rvlm cache --prune --stale' deletes what is stale")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    if not arguments.stale and arguments.older_than is None and arguments.max_gb is None:
        raise InvalidRun("expected with --prune what is to go: --stale, --older-than 30d or --max-gb 20; got none of them")
    n_bytes = None if arguments.max_gb is None else 1e9 * arguments.max_gb
    freed = 0
    for entry, has_gone in prune(arguments.kind, arguments.stale, arguments.older_than, n_bytes, arguments.unknown):
        print(f"{'deleted' if has_gone else 'in use, kept'}: {_line(entry)}")
        freed += entry.n_bytes * has_gone
    print(f"freed {freed / 1e9:.2f} GB")
    return 0


def _line(entry: Entry) -> str:
    made = entry.made.get("commit")
    by = f"commit {made[:8]}" if made else "-"
    size = f"{entry.n_bytes / 1e6:10.1f} MB"
    return f"{entry.kind:12}{size}  {entry.age_s / SECONDS['d']:6.1f} d  {entry.state:11}{by:17}{entry.path.name}"


def _age(text: str) -> float:
    """An age like "30d", "12h" or "2w", in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected an age like 30d, 12h or 2w, got {text!r}")
    return float(match[1]) * SECONDS[match[2]]


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(commands, "cache", ABOUT, MORE)
    command.add_argument("--prune", action="store_true", help="delete, by one of the following or several")
    command.add_argument("--stale", action="store_true", help="what other code has made")
    command.add_argument("--older-than", type=_age, metavar="30d", help="what was not used for so long (h, d, w)")
    command.add_argument("--max-gb", type=float, metavar="N", help="until no more is kept: stale first, then frames and features")
    command.add_argument("--unknown", action="store_true", help="also what does not say what made it, but no datasets")
    command.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS, help="of these kinds only")
    command.set_defaults(run=_cache)
