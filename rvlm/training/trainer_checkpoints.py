"""Checkpoints of a running training, verified by a manifest of file hashes; training resumes from the newest complete one.

The Trainer writes a checkpoint file by file under its final name, so a kill or a full disk may leave any part of it. The
manifest is written last: files that are truncated, or changed later, do not match it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from rvlm.files import atomic_write

MANIFEST = "manifest.json"


class ManifestCallback(TrainerCallback):
    """Writes the manifest of each checkpoint when all processes have written their part of it."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the manifest of this step's checkpoint."""
        PartialState().wait_for_everyone()
        if args.should_save:
            write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def write_manifest(checkpoint: Path) -> None:
    """Write the hashes of all files of a checkpoint."""
    atomic_write(checkpoint / MANIFEST, json.dumps(_hashes(checkpoint), indent=1))


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has a manifest and all files that it lists are unchanged."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        return bool(manifest) and manifest.items() <= _hashes(checkpoint).items()
    except (OSError, ValueError, AttributeError):  # no manifest, or a truncated one
        return False


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST and not path.name.endswith(".part"):
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in a folder, or None."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    newest_first = sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))
    return next((str(path) for path in newest_first if is_complete(path)), None)
