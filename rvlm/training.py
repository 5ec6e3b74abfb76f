"""Training stages on `transformers.Trainer`: one stage is data, a start and a budget; its result is a folder.

A stage runs in processes of its own (one per core or GPU, by torchrun), saves every minute, and goes on where it was
when it is started again. Its folder is named by the hash of what made it, so nothing is trained twice.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from rvlm import adapters
from rvlm.backbones import as_encoder_outputs
from rvlm.batches import BUILDERS
from rvlm.plan import measure
from rvlm.stages import Stage

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # threads that wait must not spin


class LogFile(TrainerCallback):
    """Appends every log entry to a file, from which another process can follow the training.

    An entry's `seconds` are those of the stage so far, from the making of this object on, earlier runs that were killed
    counted up to their last entry. Each entry says how many processes share the work, and what wraps the model for that: a
    launcher that falls back to one process says nothing itself.
    """

    trainer: Trainer | None = None

    def __init__(self, folder: Path) -> None:
        self.path, self.started = folder / "log.jsonl", time.time()
        self.seconds_before = seconds_of(folder)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        """One line of JSON."""
        if state.is_world_process_zero:
            seconds = round(self.seconds_before + time.time() - self.started, 1)
            entry = {**(logs or {}), "step": state.global_step, "n_steps": state.max_steps, "seconds": seconds}
            if self.trainer is not None:
                entry |= {"n_processes": args.world_size, "wrapper": type(self.trainer.model_wrapped).__name__}
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


class StageTrainer(Trainer):
    """A `Trainer` that also logs the parts of the loss that the model names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # our losses are means: accumulated steps are averaged

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, **_: Any) -> Any:
        """The model's own loss."""
        if "image_features" in inputs and "labels" in inputs:
            inputs["mm_encoder_outputs"] = as_encoder_outputs(inputs.pop("image_features"))
        outputs = model(**inputs)
        if self.state.global_step % self.args.logging_steps == 0:
            self._parts = {k: float(v.detach()) for k, v in outputs.items() if k.endswith("_loss")}
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """A policy that is saved without its backbone puts its weights together itself."""
        policy: Any = self.model
        if getattr(policy.config, "base", None) is not None:
            policy.fill(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the loss with its parts."""
        super().log({**logs, **getattr(self, "_parts", {})}, *args, **kwargs)


def _precision() -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[adapters.precision()]


def arguments(stage: Stage, folder: Path, world_size: int) -> TrainingArguments:
    """The stage in the Trainer's own words."""
    n_steps = stage.n_samples // stage.batch_size
    precision = _precision() if stage.precision == "auto" else stage.precision
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=n_steps,
        per_device_train_batch_size=stage.batch_size // (world_size * stage.n_accumulated),
        gradient_accumulation_steps=stage.n_accumulated,
        activation_checkpointing=stage.is_checkpointed,
        activation_checkpointing_kwargs={"use_reentrant": False},
        optim=stage.optimizer,
        train_sampling_strategy="sequential",  # `Budget` has shuffled already
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        adam_beta2=0.98,
        warmup_steps=round(stage.warmup * n_steps),
        lr_scheduler_type=stage.schedule,
        max_grad_norm=stage.max_grad_norm,
        logging_steps=max(1, n_steps // 100),
        save_steps=max(20, n_steps // 25),
        save_total_limit=2,
        seed=stage.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        ddp_backend="gloo" if world_size > 1 and not torch.cuda.is_available() else None,
        ddp_find_unused_parameters=bool(stage.scenes),  # questions pass by the head
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=["tensorboard"],
    )


def work(stage: Stage, folder: Path) -> None:
    """Train in this process (one of `WORLD_SIZE`); the result is `folder/model`."""
    torch.manual_seed(stage.seed)
    log = LogFile(folder)
    model, processor, data, collate = BUILDERS[stage.kind](stage)
    options = arguments(stage, folder, int(os.environ.get("WORLD_SIZE", 1)))
    trainer = StageTrainer(model, options, train_dataset=data, data_collator=collate, callbacks=[log])
    log.trainer = trainer
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / "trainer"))
    whole = {}
    if trainer.is_fsdp_enabled:  # then each process has a part
        whole["state_dict"] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        model.save_pretrained(folder / "model", **whole)
        processor.save_pretrained(folder / "model")


def rehearse(stage: Stage) -> dict[str, float]:
    """Peak memory [byte] and time [s] of one training step of a robot stage, taken in this process and forgotten.

    Returns:
        `peak` and `seconds`, as `rvlm.plan.measure`, with the `parameters` and how many of them are `trained`.
    """
    torch.manual_seed(stage.seed)
    model, _, data, collate = BUILDERS[stage.kind](stage)
    with tempfile.TemporaryDirectory() as folder:
        trainer = StageTrainer(model, arguments(stage, Path(folder), 1))
    if stage.is_checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = trainer.create_optimizer()
    batch = collate([data[i] for i in range(stage.batch_size // stage.n_accumulated)])
    batch = {name: value.to(trainer.args.device) for name, value in batch.items()}

    def step() -> None:
        with trainer.accelerator.autocast():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    parameters, states = list(model.parameters()), optimizer.state.values()
    kept = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    used = measure(step, sum(t.numel() * t.element_size() for t in [*parameters, *kept]))
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return {**used, "parameters": sum(p.numel() for p in parameters), "trained": trained}


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; one that a kill has cut short is passed over."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            json.loads((path / "trainer_state.json").read_text())  # what the Trainer writes last
            return str(path)
    return None


def run(
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
        RuntimeError: Training failed; the message holds the end of its log.
    """
    final = stage.folder
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_name(final.name + ".lock")):  # who asks for the same stage meanwhile waits for it
        if not final.exists():
            _train(stage, final, show_progress, n_threads, watch)
    return final / "model"


def prepare(stage: Stage) -> Path:
    """Make the folder in which a stage is trained: for `torchrun ... -m rvlm.training FOLDER` by hand, on one machine or many."""
    partial = stage.folder.with_name(stage.folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "stage.json").write_text(json.dumps(dataclasses.asdict(stage), indent=1))
    return partial


def by_hand(folder: Path) -> None:
    """Train as one of the processes that a launcher has started; the first of them puts the result in its place.

    Raises:
        RuntimeError: The launcher has started another number of processes than the stage is meant for.
    """
    stage = Stage(**json.loads((folder / "stage.json").read_text()))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != stage.n_processes:
        raise RuntimeError(
            f"stage {stage.name!r}: expected {stage.n_processes} processes, got {world_size}; start as many by torchrun "
            "(on CPUs `accelerate launch` starts one, whatever it was told), or make the stage with another n_processes"
        )
    work(stage, folder)
    if os.environ.get("RANK", "0") == "0":
        folder.replace(stage.folder)


def _train(stage: Stage, final: Path, show_progress: bool, n_threads: int | None, watch: Any) -> None:
    partial = prepare(stage)
    process = _launch(stage, partial, n_threads) if _n_processes(stage) > 1 else _fork(partial, n_threads)
    try:
        _follow(process, partial, stage, show_progress, watch)
    finally:
        if process.poll() is None:
            process.stop()
            process.wait()
    if process.poll():
        raise RuntimeError(f"stage {stage.name!r} failed: {(partial / 'output.txt').read_text()[-3000:]}")
    partial.replace(final)


def _launch(stage: Stage, partial: Path, n_threads: int | None) -> SimpleNamespace:
    """Start a stage's processes by torchrun, in a session of their own."""
    threads = n_threads or max(1, (os.cpu_count() or 1) // _n_processes(stage))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **PASSIVE}
    several = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={_n_processes(stage)}")
    command = [sys.executable, *several, "-m", "rvlm.training", str(partial), str(os.getpid())]
    with (partial / "output.txt").open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    return SimpleNamespace(poll=process.poll, stop=lambda: os.killpg(process.pid, signal.SIGKILL), wait=process.wait)


def _fork(partial: Path, n_threads: int | None) -> SimpleNamespace:
    """Start a stage's only process from a server that has imported everything already, which spares seconds a stage."""
    os.environ.update(PASSIVE)  # before the server starts, for its children
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rvlm.training"])
    process = context.Process(target=_alone, args=(partial, os.getpid(), n_threads or os.cpu_count(), dict(os.environ)))
    process.start()
    return SimpleNamespace(poll=lambda: process.exitcode, stop=process.kill, wait=process.join)


def _alone(partial: Path, asker: int, n_threads: int, environment: dict[str, str]) -> None:
    """A stage's only process: as if it had been started from the command line by its asker."""
    os.environ.clear()
    os.environ.update(environment)  # the server may have been started in another one
    with (partial / "output.txt").open("ab") as output:
        for standard in (1, 2):
            os.dup2(output.fileno(), standard)
    exit_with(asker)
    torch.set_num_threads(n_threads)
    work(Stage(**json.loads((partial / "stage.json").read_text())), partial)


def run_side_by_side(stages: Mapping[str, Stage], show_progress: bool = True) -> dict[str, Path]:
    """Train independent stages at the same time, no more than there are cores; gives each one's model folder.

    Two processes of one thread train a small model about twice as fast as one process of two threads, so use stages with
    `n_processes=1`.
    """
    n_cores = os.cpu_count() or 1
    n_threads = max(1, n_cores // len(stages))
    with ThreadPoolExecutor(min(len(stages), n_cores)) as pool:
        futures = {name: pool.submit(run, stage, show_progress, n_threads) for name, stage in stages.items()}
        return {name: future.result() for name, future in futures.items()}


def _n_processes(stage: Stage) -> int:
    """As the stage asks, but no more than there are GPUs on a machine that has some."""
    return min(stage.n_processes, torch.cuda.device_count()) if torch.cuda.is_available() else stage.n_processes


def _follow(process: SimpleNamespace, partial: Path, stage: Stage, show_progress: bool, watch: Any) -> None:
    """Draw a progress bar from the log file until the process ends, and show its entries to whom it may concern."""
    n_shown = 0
    with tqdm(total=stage.n_samples, desc=f"train {stage.name}", unit="sample", disable=not show_progress) as bar:
        while process.poll() is None:
            time.sleep(0.5)
            entries = log_history(partial)
            for entry in entries[n_shown:] if watch else ():
                watch(entry)
            n_shown = len(entries)
            if entries:
                bar.n = entries[-1]["step"] * stage.batch_size
                bar.set_postfix({k: f"{v:.3f}" for k, v in entries[-1].items() if k.endswith("loss")})


def log_history(folder: Path) -> list[dict[str, float]]:
    """What a stage has logged so far; `folder` is the stage's, finished or not.

    A line that a kill has cut short is passed over, and steps that were taken again after it count once.
    """
    path, entries = folder / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        while entries and entries[-1]["step"] > entry["step"]:
            entries.pop()
        if entries and entries[-1]["step"] == entry["step"] and entries[-1].keys() == entry.keys():
            entries.pop()
        entries.append(entry)
    return entries


def seconds_of(folder: Path) -> float:
    """How long a stage has trained so far [s], or 0; `folder` is the stage's, finished or not."""
    entries = log_history(folder)
    return entries[-1].get("seconds", 0.0) if entries else 0.0


def exit_with(pid: int) -> None:
    """End this process when process `pid` is gone, as `exit_with_parent` does for a child.

    A worker of torchrun is a grandchild of the process that asked for the stage, in a session of its own.
    """

    def watch() -> None:
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    from rvlm.recording import exit_with_parent

    partial_folder = Path(sys.argv[1])
    if len(sys.argv) > 2:  # asked for by `run`, which puts the result in its place
        exit_with_parent(os.getppid())
        exit_with(int(sys.argv[2]))
        work(Stage(**json.loads((partial_folder / "stage.json").read_text())), partial_folder)
    else:
        by_hand(partial_folder)
