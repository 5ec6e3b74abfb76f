"""``rvlm cache``: list the cached artifacts and delete those that are not needed."""

import argparse
import re
from typing import Any

from rvlm.caches import ARTIFACT_KINDS, Artifact, list_artifacts, prune
from rvlm.cli import add_command
from rvlm.files import artifacts_dir
from rvlm.report.notebooks import InvalidRun

SUMMARY = "list the cached artifacts, and delete those that are not needed"
MORE = """State: current (made by the present code), stale (made by other code), unknown (without provenance), unfinished.
Never deleted: artifacts in use, locked or being written, links, and your own recordings. Frames are limited to RVLM_FRAMES_GB
(default 100), features to RVLM_FEATURES_GB (default 50).

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
    found = list_artifacts(arguments.kind)
    for artifact in found:
        print(_line(artifact))
    total = sum(artifact.n_bytes for artifact in found)
    print(f"{len(found)} in {artifacts_dir()}, {total / 1e9:.2f} GB; 'rvlm cache --prune --stale' deletes stale ones")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    if not arguments.stale and arguments.older_than is None and arguments.max_gb is None:
        raise InvalidRun("expected --prune with --stale, --older-than 30d or --max-gb 20; got none of them")
    n_bytes = None if arguments.max_gb is None else 1e9 * arguments.max_gb
    freed = 0
    for artifact, is_deleted in prune(arguments.kind, arguments.stale, arguments.older_than, n_bytes, arguments.unknown):
        print(f"{'deleted' if is_deleted else 'in use, kept'}: {_line(artifact)}")
        freed += artifact.n_bytes * is_deleted
    print(f"freed {freed / 1e9:.2f} GB")
    return 0


def _line(artifact: Artifact) -> str:
    made = artifact.made.get("commit")
    by = f"commit {made[:8]}" if made else "-"
    size = f"{artifact.n_bytes / 1e6:10.1f} MB"
    return f"{artifact.kind:12}{size}  {artifact.age_s / SECONDS['d']:6.1f} d  {artifact.state:11}{by:17}{artifact.path.name}"


def _age(text: str) -> float:
    """An age like "30d", "12h" or "2w", in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected an age like 30d, 12h or 2w, got {text!r}")
    return float(match[1]) * SECONDS[match[2]]


def add_cache(commands: Any) -> None:
    """Add the command."""
    command = add_command(commands, "cache", SUMMARY, MORE)
    command.add_argument("--prune", action="store_true", help="delete by one or several of the following")
    command.add_argument("--stale", action="store_true", help="artifacts made by other code")
    command.add_argument("--older-than", type=_age, metavar="30d", help="artifacts not used for this long (h, d, w)")
    command.add_argument("--max-gb", type=float, metavar="N", help="down to this size: stale first, then frames and features")
    command.add_argument("--unknown", action="store_true", help="also artifacts without provenance, except datasets")
    command.add_argument("--kind", nargs="+", choices=ARTIFACT_KINDS, default=ARTIFACT_KINDS, help="these kinds only")
    command.set_defaults(run=_cache)
