"""Run training stages: one stage is data, a start and a budget; its result is a folder.

A stage runs in processes of its own (one per core or GPU, by torchrun). Its folder is named by the hash of what made it, so
nothing is trained twice.
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
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from rvlm.caches import use, use_inputs, write_provenance
from rvlm.files import atomic_write, hub_commits
from rvlm.processes import PASSIVE, exit_when_process_ends
from rvlm.training.stages import Stage
from rvlm.training.trainer import DIVERGED, TrainingDiverged, log_history, train_stage_in_process


def train(
    stage: Stage,
    show_progress: bool = True,
    n_threads: int | None = None,
    watch: Callable[[dict[str, float]], None] | None = None,
) -> Path:
    """Train a stage unless its result is there, in `n_processes` processes; resumes what was killed.

    Args:
        stage: What to train.
        show_progress: Whether to draw a progress bar.
        n_threads: Of each process; all cores shared between the processes if left out.
        watch: Is shown each log entry; what it raises stops the training, which goes on from there when it is run again.

    Returns:
        The folder of the trained model.

    Raises:
        TrainingDiverged: Its weights are no numbers any more.
        RuntimeError: Training failed; the message holds the end of its log.

    Example:
        >>> stage = rvlm.Stage("short", "robot", ("demonstrations",), "vlm", n_samples=8, batch_size=8, n_processes=1)
        >>> folder = rvlm.train(stage, show_progress=False)
        >>> policy = rvlm.load_policy(folder)
    """
    final = stage.folder
    with _lock(final):  # who asks for the same stage meanwhile waits for it
        if not final.exists():
            _train(stage, final, show_progress, n_threads, watch)
        _drop_checkpoints(final)
    return use(final) / "model"


def _lock(folder: Path) -> FileLock:
    """A lock that ends with the process that holds it, also where that is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(folder.name + ".lock"))


def prepare(stage: Stage) -> Path:
    """Make the folder in which a stage is trained, on one machine or many by `torchrun ... -m rvlm.training.launch FOLDER`."""
    partial = stage.folder.with_name(stage.folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / DIVERGED).unlink(missing_ok=True)
    stage.code.require_unchanged()
    told = dataclasses.asdict(stage)
    atomic_write(partial / "stage.json", json.dumps(told, indent=1))
    atomic_write(partial / "commits.json", json.dumps({name: of for name, of in hub_commits.items() if name == stage.init}))
    inputs = (stage.init, *stage.data, *stage.vqa_data)
    write_provenance(partial, stage.code, told, inputs)
    use_inputs(inputs)
    return partial


def distributed_worker(folder: Path) -> None:
    """Train as one of the processes that a launcher has started; the first of them puts the result in its place.

    A stage that is trained already is left as it is.

    Raises:
        RuntimeError: The launcher has started another number of processes than the stage is meant for, or others train it
            at this moment.
    """
    stage = _stage_in(folder)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != stage.n_processes:
        raise RuntimeError(
            f"stage {stage.name!r}: expected {stage.n_processes} processes, got {world_size}; start as many by torchrun "
            "(on CPUs `accelerate launch` starts one, whatever it was told), or make the stage with another n_processes"
        )
    final = folder.with_name(folder.name.removesuffix(".partial"))  # as it was named when it was prepared
    if final.exists():
        return
    if os.environ.get("RANK", "0") != "0":
        train_stage_in_process(stage, folder)
        return
    try:
        with _lock(final).acquire(timeout=0), _lock(folder):
            train_stage_in_process(stage, folder)
            folder.replace(final)
            _drop_checkpoints(final)
    except Timeout as error:
        raise RuntimeError(f"stage {stage.name!r}: another process trains it in {folder} at this moment; wait for it") from error


def _requested_worker(folder: Path) -> None:
    """Train as one of the processes that `train` has started, when a trainer whose asker was killed has left the folder."""
    with _lock(folder) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext():
        train_stage_in_process(_stage_in(folder), folder)


def _stage_in(folder: Path) -> Stage:
    """The stage that is trained in a folder, from the commit that is in its name; what it is made from is in use from now on."""
    hub_commits.update(json.loads((folder / "commits.json").read_text()) if (folder / "commits.json").exists() else {})
    stage = Stage(**json.loads((folder / "stage.json").read_text()))
    use_inputs((stage.init, *stage.data, *stage.vqa_data))
    return stage


def _train(stage: Stage, final: Path, show_progress: bool, n_threads: int | None, watch: Any) -> None:
    partial = prepare(stage)
    process = _launch(stage, partial, n_threads) if _n_processes(stage) > 1 else _fork(partial, n_threads)
    try:
        _tail_log(process, partial, stage, show_progress, watch)
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
    """Remove what a finished stage could have gone on from, several times its model's size; a kill may have left it."""
    for checkpoint in (final / "trainer").glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _launch(stage: Stage, partial: Path, n_threads: int | None) -> SimpleNamespace:
    """Start a stage's processes by torchrun, in a session of their own."""
    threads = n_threads or max(1, (os.cpu_count() or 1) // _n_processes(stage))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **PASSIVE}
    several = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={_n_processes(stage)}")
    command = [sys.executable, *several, "-m", "rvlm.training.launch", str(partial), str(os.getpid())]
    with (partial / "output.txt").open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    return SimpleNamespace(poll=process.poll, stop=lambda: os.killpg(process.pid, signal.SIGKILL), wait=process.wait)


def _fork(partial: Path, n_threads: int | None) -> SimpleNamespace:
    """Start a stage's only process from a server that has imported everything already, which spares seconds a stage."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rvlm.passive", "rvlm.training.preload"])
    environment = {**os.environ, **PASSIVE}
    process = context.Process(target=_single_worker, args=(partial, os.getpid(), n_threads or os.cpu_count(), environment))
    process.start()
    return SimpleNamespace(poll=lambda: process.exitcode, stop=process.kill, wait=process.join)


def _single_worker(partial: Path, asker: int, n_threads: int, environment: dict[str, str]) -> None:
    """A stage's only process: as if it had been started from the command line by its asker."""
    os.environ.clear()
    os.environ.update(environment)  # the server may have been started in another one
    with (partial / "output.txt").open("ab") as output:
        for standard in (1, 2):
            os.dup2(output.fileno(), standard)
    exit_when_process_ends(asker)
    torch.set_num_threads(n_threads)
    _requested_worker(partial)


def train_parallel(stages: Mapping[str, Stage], show_progress: bool = True) -> dict[str, Path]:
    """Train independent stages at the same time, no more than there are cores; gives each one's model folder.

    Two processes of one thread train a small model about twice as fast as one process of two threads, so use stages with
    `n_processes=1`.

    Example:
        >>> few = {"n_samples": 8, "batch_size": 8, "n_processes": 1}
        >>> stages = {f"seed {i}": rvlm.Stage("short", "robot", ("demonstrations",), "vlm", seed=i, **few) for i in range(2)}
        >>> folders = rvlm.train_parallel(stages, show_progress=False)
        >>> sorted(folders)
        ['seed 0', 'seed 1']
    """
    n_cores = os.cpu_count() or 1
    n_threads = max(1, n_cores // len(stages))
    with ThreadPoolExecutor(min(len(stages), n_cores)) as pool:
        futures = {name: pool.submit(train, stage, show_progress, n_threads) for name, stage in stages.items()}
        return {name: future.result() for name, future in futures.items()}


def _n_processes(stage: Stage) -> int:
    """As the stage asks, but no more than there are GPUs on a machine that has some."""
    return min(stage.n_processes, torch.cuda.device_count()) if torch.cuda.is_available() else stage.n_processes


def _tail_log(process: SimpleNamespace, partial: Path, stage: Stage, show_progress: bool, watch: Any) -> None:
    """Draw a progress bar from the log file until the process ends, and show its entries to whom it may concern."""
    n_shown = 0
    with tqdm(total=stage.n_samples, desc=f"train {stage.name}", unit="sample", disable=not show_progress) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            entries = log_history(partial)
            for entry in entries[n_shown:] if watch else ():
                watch(entry)
            n_shown = len(entries)
            if entries:
                bar.n = entries[-1]["step"] * stage.batch_size
                bar.set_postfix({k: f"{v:.3f}" for k, v in entries[-1].items() if k.endswith("loss")})


if __name__ == "__main__":
    partial_folder = Path(sys.argv[1])
    if len(sys.argv) > 2:  # asked for by `train`, which puts the result in its place
        exit_when_process_ends(os.getppid())
        exit_when_process_ends(int(sys.argv[2]))
        _requested_worker(partial_folder)
    else:
        distributed_worker(partial_folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is written; gloo's threads may abort an interpreter that is torn down (pytorch/pytorch#179291)
