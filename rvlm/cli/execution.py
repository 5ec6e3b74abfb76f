"""Execution of one notebook: by papermill, in its own kernel; the executed copy is kept, with its traceback if it fails."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvlm.files import RESULTS, ROOT, artifacts_dir, atomic_write
from rvlm.report.copies import cleaned
from rvlm.report.notebooks import GIT_PROFILE


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; its executed copy is kept."""


@dataclass(frozen=True)
class RunPaths:
    """Folders that a run reads and writes.

    Attributes:
        root: working directory of every kernel; holds ``rvlm/`` and ``data_cards/``.
        notebooks: the ordered notebooks and ``profiles.yaml``.
        results: executed copies, findings, figures, tables, report.
        artifacts: caches, and markers of finished notebooks.
    """

    root: Path
    notebooks: Path
    results: Path
    artifacts: Path

    @classmethod
    def of_profile(cls, profile: str) -> RunPaths:
        """The repository's folders; only profile cpu writes to the results in git, unless ``RVLM_RESULTS`` is set."""
        artifacts = artifacts_dir().resolve()
        own = RESULTS if profile == GIT_PROFILE else artifacts / profile / "results"
        return cls(ROOT, ROOT / "notebooks", Path(os.environ.get("RVLM_RESULTS") or own).resolve(), artifacts)


@dataclass(frozen=True)
class Job:
    """A notebook to run: its file, its parameters, and the hash of all that it depends on."""

    notebook: Path
    parameters: dict[str, Any]
    key: str

    @property
    def stem(self) -> str:
        """File name without suffix, e.g. "06_evaluate"."""
        return self.notebook.stem


def execute(job: Job, paths: RunPaths, profile: str | None, is_quiet: bool = False) -> Path:
    """Execute one notebook and save the executed copy.

    Args:
        job: notebook and parameters.
        paths: folders to read and write.
        profile: name of the profile that the parameters come from; None for other values.
        is_quiet: whether to hide the progress bar.

    Returns:
        The executed copy.

    Raises:
        NotebookFailed: it stopped with an error; the copy is ``NN_name.failed.ipynb``, traceback included.
    """
    started, part = time.time(), paths.results / "notebooks" / f".{job.stem}.part.ipynb"
    part.parent.mkdir(parents=True, exist_ok=True)
    failed = executed_copy(job, paths, ".failed")
    try:
        _execute(job, part, paths, profile, is_quiet)
    except Exception as error:  # of any kind: the notebook's own error, a dead kernel, a full disk
        _save_executed(part, failed, job, profile, time.time() - started, error)
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise NotebookFailed(f"{job.stem}: failed ({last[0]}); its copy with the traceback: {failed}") from error
    _save_executed(part, executed_copy(job, paths), job, profile, time.time() - started)
    failed.unlink(missing_ok=True)
    return executed_copy(job, paths)


def _execute(job: Job, part: Path, paths: RunPaths, profile: str | None, is_quiet: bool) -> None:
    import papermill

    from rvlm.cli.kernels import kernel_manager

    bar: Any = False if is_quiet else {"desc": job.stem, "position": 1, "leave": False}
    papermill.execute_notebook(
        str(job.notebook),
        str(part),
        parameters=job.parameters,
        kernel_name="python3",
        language="python",
        cwd=str(paths.root),
        progress_bar=bar,
        kernel_manager_class=kernel_manager(kernel_environment(job, paths, profile)),
    )


def kernel_environment(job: Job, paths: RunPaths, profile: str | None) -> dict[str, str]:
    """Environment variables that a notebook reads."""
    return {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "RVLM_PROFILE": profile or "",
        "RVLM_PARAMETERS": json.dumps(job.parameters),
        "RVLM_RESULTS": str(paths.results),
        "RVLM_HOME": str(paths.artifacts),
    }


def _save_executed(
    part: Path, final: Path, job: Job, profile: str | None, seconds: float, error: Exception | None = None
) -> None:
    """Save an executed copy under its final name, with its key and without this machine's paths in the metadata."""
    source = part if part.exists() else job.notebook  # a kernel that never started leaves no copy
    notebook = json.loads(source.read_text())
    notebook["metadata"]["rvlm"] = {"key": job.key, "profile": profile, "seconds": round(seconds, 1)}
    if error is not None:
        notebook["metadata"]["rvlm"]["error"] = f"{type(error).__name__}: {error}"
    if "papermill" in notebook["metadata"]:
        notebook["metadata"]["papermill"] |= {"input_path": f"notebooks/{job.notebook.name}", "output_path": final.name}
    atomic_write(final, json.dumps(cleaned(notebook), indent=1, ensure_ascii=False) + "\n")
    part.unlink(missing_ok=True)


def executed_copy(job: Job, paths: RunPaths, state: str = "") -> Path:
    """Path of a notebook's executed copy; ``state`` ".failed" for the copy of a failed run."""
    return paths.results / "notebooks" / f"{job.stem}{state}.ipynb"
