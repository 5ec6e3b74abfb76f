"""Checkpoints of a training under way: sealed when they are whole; training goes on from the newest whole one.

The Trainer writes a checkpoint file by file under its final name, so a kill or a full disk may leave any part of it. The seal
is written last and names every file with its hash: what was cut short, or is changed later, no longer matches it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from rvlm.files import atomic_write

SEAL = "whole.json"


class Seals(TrainerCallback):
    """Seals each checkpoint when all processes have written their part of it."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the checkpoint of this step."""
        PartialState().wait_for_everyone()
        if args.should_save:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def seal(checkpoint: Path) -> None:
    """Say that a checkpoint is whole as it is now."""
    atomic_write(checkpoint / SEAL, json.dumps(_hashes(checkpoint), indent=1))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was sealed and all that the seal names is as it was then."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text())
        return bool(sealed) and sealed.items() <= _hashes(checkpoint).items()
    except (OSError, ValueError, AttributeError):  # no seal, or half a one
        return False


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL and not path.name.endswith(".part"):
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in a folder, or None."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    newest_first = sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))
    return next((str(path) for path in newest_first if is_whole(path)), None)
