"""Train a model and put it where the package ships it, with a record of how it was made (`rvlm vlm`, `rvlm policy`)."""

import json
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from rvlm.files import replace_folder, temporary_folder
from rvlm.provenance import provenance
from rvlm.training.launch import train
from rvlm.training.stages import Stage
from rvlm.training.trainer import training_seconds


def release(stage: Stage, target: Path, command: str) -> Path:
    """Train `stage` and replace `target` by its model, with `made.json`: the stages that made it, and its provenance.

    The replacement is atomic; releases to one target run one after another.
    """
    model = train(stage)
    with FileLock(target.with_name(f".{target.name}.lock")):
        for left in target.parent.glob(f".{target.name}.*.part"):  # by a killed process
            shutil.rmtree(left)
        with temporary_folder(target) as part:
            shutil.copytree(model, part, dirs_exist_ok=True)
            record = {"command": command, "stages": [_stage_summary(folder) for folder in stage_lineage(model)], **provenance()}
            (part / "made.json").write_text(json.dumps(record, indent=1))
            replace_folder(part, target)
    return target


def stage_lineage(model: str | Path) -> list[Path]:
    """Folders of the stages that made a model, in the order of training."""
    folder = Path(model).parent
    if not (folder / "stage.json").exists():
        return []
    return [*stage_lineage(json.loads((folder / "stage.json").read_text())["init"]), folder]


def _stage_summary(folder: Path) -> dict[str, Any]:
    """A stage's settings, with the number of its data folders, the name of its initial model, and its duration [s]."""
    stage = json.loads((folder / "stage.json").read_text())
    init = "/".join(Path(stage["init"]).parts[-2:])
    return {**stage, "data": len(stage["data"]), "init": init, "seconds": training_seconds(folder)}
