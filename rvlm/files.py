"""Where things are, and how a file is written so that it is whole or not there."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def results_dir() -> Path:
    """Where findings, figures, tables and executed notebooks go: ``RVLM_RESULTS``, else ``results/`` (in git)."""
    return Path(os.environ.get("RVLM_RESULTS") or ROOT / "results")


def artifacts_dir() -> Path:
    """Where datasets, checkpoints and caches go: ``RVLM_HOME``, else ``artifacts/`` (ignored by git)."""
    return Path(os.environ.get("RVLM_HOME") or ROOT / "artifacts")


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file so that it is either there in full or as it was before; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)
    return path


def digest(path: Path) -> str:
    """Twelve characters that stand for a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def key_of(settings: dict[str, Any]) -> str:
    """Twelve characters that stand for settings, whatever their order; by them a cached result is found again."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def weights_of(model: str | Path) -> str | None:
    """Twelve characters that stand for all weights in a model's folder; None where there are none, as for a name on the Hub."""
    files = sorted(Path(model).rglob("*.safetensors")) if Path(model).is_dir() else []
    digests = {str(path.relative_to(model)): digest(path) for path in files}
    return next(iter(digests.values())) if list(digests) == ["model.safetensors"] else key_of(digests) if digests else None
