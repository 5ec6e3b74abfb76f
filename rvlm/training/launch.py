"""Run training stages in processes of their own: several by torchrun, or one forked from a server.

A stage's folder is named by the hash of what determines its result, so nothing is trained twice.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from filelock import Timeout
from tqdm.auto import tqdm

from rvlm.caches import use, use_inputs, write_provenance
from rvlm.files import atomic_write, hub_commits, lock_of
from rvlm.processes import PASSIVE, exit_when_process_ends
from rvlm.training.stages import Stage
from rvlm.training.trainer import DIVERGED, TrainingDiverged, log_history, train_stage_in_process


def train(
    stage: Stage,
    show_progress: bool = True,
    n_threads: int | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
) -> Path:
    """Train a stage in `n_processes` processes, unless its result exists; resumes after a kill.

    Args:
        stage: What to train.
        show_progress: Whether to draw a progress bar.
        n_threads: Of each process; by default the cores are divided among the processes.
        on_log: Called with each log entry; an exception from it stops the training, which can be resumed.

    Returns:
        The folder of the trained model.

    Raises:
        TrainingDiverged: Its weights are NaN or infinite.
        RuntimeError: Training failed; the message has the end of its output.

    Example:
        >>> stage = rvlm.Stage("short", "robot", ("demonstrations",), "vlm", n_samples=8, batch_size=8, n_processes=1)
        >>> folder = rvlm.train(stage, show_progress=False)
        >>> policy = rvlm.load_policy(folder)
    """
    final = stage.folder
    with lock_of(final):  # other callers of the same stage wait
        if not final.exists():
            _train(stage, final, show_progress, n_threads, on_log)
        _drop_checkpoints(final)
    return use(final) / "model"


def prepare(stage: Stage) -> Path:
    """Create the folder in which a stage is trained, also for `torchrun ... -m rvlm.training.launch FOLDER` on many machines."""
    partial = stage.folder.with_name(stage.folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / DIVERGED).unlink(missing_ok=True)
    stage.training_code.require_unchanged()
    settings = dataclasses.asdict(stage)
    atomic_write(partial / "stage.json", json.dumps(settings, indent=1))
    commits = {name: commit for name, commit in hub_commits.items() if name == stage.init}
    atomic_write(partial / "commits.json", json.dumps(commits))
    inputs = (stage.init, *stage.data, *stage.vqa_data)
    write_provenance(partial, stage.training_code, settings, inputs)
    use_inputs(inputs)
    return partial


def distributed_worker(folder: Path) -> None:
    """Train as one of the processes of an external launcher; rank 0 moves the result to the stage's folder.

    Returns at once if the stage is already trained.

    Raises:
        RuntimeError: The launcher started another number of processes than the stage's, or the stage is being trained.
    """
    stage = _load_stage(folder)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != stage.n_processes:
        raise RuntimeError(
            f"stage {stage.name!r}: expected {stage.n_processes} processes, got {world_size}; start as many by torchrun "
            "(on CPUs `accelerate launch` always starts one), or create the stage with another n_processes"
        )
    final = folder.with_name(folder.name.removesuffix(".partial"))  # its name at `prepare`
    if final.exists():
        return
    if os.environ.get("RANK", "0") != "0":
        train_stage_in_process(stage, folder)
        return
    try:
        with lock_of(final).acquire(timeout=0), lock_of(folder):
            train_stage_in_process(stage, folder)
            folder.replace(final)
            _drop_checkpoints(final)
    except Timeout as error:
        raise RuntimeError(f"stage {stage.name!r}: another process is training it in {folder}; wait for it") from error


def _child_worker(folder: Path) -> None:
    """Train as one of the processes of `train`, after waiting for a trainer whose parent was killed to end."""
    with lock_of(folder) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        train_stage_in_process(_load_stage(folder), folder)


def _load_stage(folder: Path) -> Stage:
    """The stage that is trained in a folder, with its Hub commits; marks its inputs as in use."""
    hub_commits.update(json.loads((folder / "commits.json").read_text()) if (folder / "commits.json").exists() else {})
    try:
        stage = Stage(**json.loads((folder / "stage.json").read_text()))
    except TypeError as error:
        raise ValueError(f"{folder}: expected the fields of a Stage, got {error}; prepare it again with this version") from error
    use_inputs((stage.init, *stage.data, *stage.vqa_data))
    return stage


def _train(stage: Stage, final: Path, show_progress: bool, n_threads: int | None, on_log: Any) -> None:
    partial = prepare(stage)
    process = _launch(stage, partial, n_threads) if _n_processes(stage) > 1 else _fork(partial, n_threads)
    try:
        _tail_log(process, partial, stage, show_progress, on_log)
    finally:
        if process.poll() is None:
            process.stop()
            process.wait()
    if (partial / DIVERGED).exists():
        raise TrainingDiverged((partial / DIVERGED).read_text())
    if process.poll():
        output = (partial / "output.txt").read_text(errors="replace")
        raise RuntimeError(f"stage {stage.name!r} failed: {output[-3000:]}")
    partial.replace(final)


def _drop_checkpoints(final: Path) -> None:
    """Remove a finished stage's checkpoints, several times its model's size."""
    for checkpoint in (final / "trainer").glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _launch(stage: Stage, partial: Path, n_threads: int | None) -> SimpleNamespace:
    """Start a stage's processes by torchrun, in a process group of their own."""
    threads = n_threads or max(1, (os.cpu_count() or 1) // _n_processes(stage))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **PASSIVE}
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={_n_processes(stage)}")
    command = [sys.executable, *torchrun, "-m", "rvlm.training.launch", str(partial), str(os.getpid())]
    with (partial / "output.txt").open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    return SimpleNamespace(poll=process.poll, stop=lambda: os.killpg(process.pid, signal.SIGKILL), wait=process.wait)


def _fork(partial: Path, n_threads: int | None) -> SimpleNamespace:
    """Fork a stage's only process from a server with all imports done, which saves seconds per stage."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rvlm.openmp", "rvlm.training.preload"])
    environment = {**os.environ, **PASSIVE}
    process = context.Process(target=_single_worker, args=(partial, os.getpid(), n_threads or os.cpu_count(), environment))
    process.start()
    return SimpleNamespace(poll=lambda: process.exitcode, stop=process.kill, wait=process.join)


def _single_worker(partial: Path, parent_pid: int, n_threads: int, environment: dict[str, str]) -> None:
    """Train as a stage's only process, with the environment of its parent."""
    os.environ.clear()
    os.environ.update(environment)  # the server may have another
    with (partial / "output.txt").open("ab") as output:
        for standard in (1, 2):
            os.dup2(output.fileno(), standard)
    exit_when_process_ends(parent_pid)
    torch.set_num_threads(n_threads)
    _child_worker(partial)


def train_parallel(stages: Mapping[str, Stage], show_progress: bool = True) -> dict[str, Path]:
    """Train independent stages in parallel, at most one per core; returns each one's model folder.

    Small models train about twice as fast in two processes of one thread as in one process of two, so use `n_processes=1`.
    With a GPU, one after another.

    Example:
        >>> few = {"n_samples": 8, "batch_size": 8, "n_processes": 1}
        >>> stages = {f"seed {i}": rvlm.Stage("short", "robot", ("demonstrations",), "vlm", seed=i, **few) for i in range(2)}
        >>> folders = rvlm.train_parallel(stages, show_progress=False)
        >>> sorted(folders)
        ['seed 0', 'seed 1']
    """
    n_cores = os.cpu_count() or 1
    n_threads = max(1, n_cores // len(stages))
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else min(len(stages), n_cores)) as pool:
        futures = {name: pool.submit(train, stage, show_progress, n_threads) for name, stage in stages.items()}
        return {name: future.result() for name, future in futures.items()}


def _n_processes(stage: Stage) -> int:
    """Its `n_processes`; on GPUs at most one each, as many as share the batch evenly."""
    most = min(stage.n_processes, torch.cuda.device_count()) if torch.cuda.is_available() else stage.n_processes
    return next(n for n in range(most, 0, -1) if stage.batch_size % (n * stage.gradient_accumulation_steps) == 0)


def _tail_log(process: SimpleNamespace, partial: Path, stage: Stage, show_progress: bool, on_log: Any) -> None:
    """Follow the log file until the process ends: draws a progress bar and calls `on_log`."""
    n_shown = 0
    with tqdm(total=stage.n_samples, desc=f"train {stage.name}", unit="sample", disable=not show_progress) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            entries = log_history(partial)
            for entry in entries[n_shown:] if on_log else ():
                on_log(entry)
            n_shown = len(entries)
            if entries:
                bar.n = entries[-1]["step"] * stage.batch_size
                bar.set_postfix({k: f"{v:.3f}" for k, v in entries[-1].items() if k.endswith("loss")})


if __name__ == "__main__":
    partial_folder = Path(sys.argv[1])
    if len(sys.argv) > 2:  # started by `train`, which moves the result
        exit_when_process_ends(os.getppid())
        exit_when_process_ends(int(sys.argv[2]))
        _child_worker(partial_folder)
    else:
        distributed_worker(partial_folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may abort the interpreter's shutdown (pytorch/pytorch#179291)
