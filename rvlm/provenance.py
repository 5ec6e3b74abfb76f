"""Provenance of a result: commit, versions, hardware, profile and date."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rvlm.files import IS_CLONE, ROOT

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate", "numpy", "pandas")
PACKAGES += ("mujoco", "gymnasium", "matplotlib")


def _git(*arguments: str) -> str:
    if not IS_CLONE:  # an installed package may be inside another repository
        return ""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch = sys.modules.get("torch")  # only if already imported, which takes seconds
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {"cpu": model or platform.machine(), "cores": cores, "gpus": gpus}


def _profile() -> str | None:
    """The profile of `rvlm reproduce`, if the notebook's variables still have the profile's parameters."""
    given = json.loads(os.environ.get("RVLM_PARAMETERS") or "null")
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if given is None or any(shell.user_ns.get(name) != value for name, value in given.items() if shell):
        return None
    return os.environ.get("RVLM_PROFILE") or None


def provenance() -> dict[str, Any]:
    """Commit (and whether the code differs from it), package versions, hardware, profile and date."""
    versions = {package: version for package in PACKAGES if (version := _version(package))}
    return {
        "commit": _git("rev-parse", "HEAD") or None,
        "is_dirty": bool(_git("status", "--porcelain", "--", "rvlm", "notebooks", "data_cards", "pyproject.toml")),
        "versions": {"python": platform.python_version(), **versions},
        "hardware": _hardware(),
        "profile": _profile(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
