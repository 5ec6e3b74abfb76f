"""What one process of a training stage does, on `transformers.Trainer`: settings, loss, log, checkpoints.

A stage goes on from its newest whole checkpoint when it is started again.
"""

import functools
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from rvlm.files import atomic_write
from rvlm.training.cost import measure_step
from rvlm.training.stage_data import STAGE_BUILDERS
from rvlm.training.stages import Stage
from rvlm.training.trainer_checkpoints import Seals, last_checkpoint
from rvlm.vlm.backbones import as_encoder_outputs

DIVERGED = "diverged.txt"  # in a stage's folder: that it ended in no numbers, for the process that asked for it


class TrainingDiverged(RuntimeError, FloatingPointError):
    """A training has ended in weights that are no numbers any more."""


class JsonlLogger(TrainerCallback):
    """Appends every log entry to a file, from which another process can follow the training.

    An entry's `seconds` are those of the stage so far, from the making of this object on, earlier runs that were killed
    counted up to their last entry. Each entry says how many processes share the work, and what wraps the model for that: a
    launcher that falls back to one process says nothing itself.
    """

    trainer: Trainer | None = None

    def __init__(self, folder: Path) -> None:
        self.path, self.started = folder / "log.jsonl", time.time()
        self.seconds_before = training_seconds(folder)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as file:
                file.write("\n")  # a kill has cut the last line short

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
        self.factor: Callable[..., float] | None = None  # of the learning rate, where the library has no such schedule
        self._parts: dict[str, torch.Tensor] = {}  # of the loss: sum, and number of batches, since the last entry of the log

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The stage's own schedule, or the library's."""
        if self.factor is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        n_warmup = self.args.get_warmup_steps(num_training_steps)
        factor = functools.partial(self.factor, n_warmup=n_warmup, n_steps=num_training_steps)
        stepped: Any = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(stepped, factor)
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, **_: Any) -> Any:
        """The model's own loss."""
        if "image_features" in inputs and "labels" in inputs:
            inputs["mm_encoder_outputs"] = as_encoder_outputs(inputs.pop("image_features"))
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name.endswith("_loss"):
                one = torch.stack([value.detach().float(), value.new_ones((), dtype=torch.float32)])
                self._parts[name] = self._parts.get(name, 0) + one
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """A policy that is saved without its backbone puts its weights together itself."""
        policy: Any = self.model
        if getattr(getattr(policy, "config", None), "base_model", None) is not None:  # a detector has no configuration
            policy.load_own_weights(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the loss with its parts."""
        super().log({**logs, **self._means()}, *args, **kwargs)

    def _means(self) -> dict[str, float]:
        """Mean of each part of the loss since the last entry, over all batches that had it and all processes."""
        parts, self._parts = dict(sorted(self._parts.items())), {}
        if not parts:
            return {}
        sums: Any = self.accelerator.reduce(torch.stack(list(parts.values())), "sum")
        return {name: float(total / n) for name, (total, n) in zip(parts, sums, strict=True)}


def step_decay(step: int, n_warmup: int, n_steps: int) -> float:
    """Factor of the learning rate: a linear warm-up, then 1, 0.1 after half of the steps, 0.01 after three quarters."""
    if step < n_warmup:
        return step / n_warmup
    return 0.1 ** ((step >= n_steps / 2) + (step >= 3 * n_steps / 4))


CUSTOM_SCHEDULES = {"step_decay": step_decay}


def arguments(stage: Stage, folder: Path, world_size: int) -> TrainingArguments:
    """The stage in the Trainer's own words."""
    n_steps = stage.n_samples // stage.batch_size
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=n_steps,
        per_device_train_batch_size=stage.batch_size // (world_size * stage.gradient_accumulation_steps),
        gradient_accumulation_steps=stage.gradient_accumulation_steps,
        activation_checkpointing=stage.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        optim=stage.optimizer,
        train_sampling_strategy="sequential",  # `FixedBudgetDataset` has shuffled already
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        adam_beta2=0.98,
        warmup_steps=round(stage.warmup * n_steps),
        lr_scheduler_type="constant_with_warmup" if stage.schedule in CUSTOM_SCHEDULES else stage.schedule,
        max_grad_norm=stage.max_grad_norm,
        logging_steps=max(1, n_steps // 100),
        logging_nan_inf_filter=False,  # else a loss that is no number any more is logged as 0
        save_steps=max(20, n_steps // 25),
        save_total_limit=2,
        seed=stage.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=stage.computes_in == "bf16",
        fp16=stage.computes_in == "fp16",
        ddp_backend="gloo" if world_size > 1 and not torch.cuda.is_available() else None,
        ddp_find_unused_parameters=bool(stage.vqa_data),  # questions pass by the head
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
    )


def train_stage_in_process(stage: Stage, folder: Path) -> None:
    """Train in this process (one of `WORLD_SIZE`); the result is `folder/model`.

    Raises:
        TrainingDiverged: It ends in weights that are not finite.
    """
    torch.manual_seed(stage.seed)
    log = JsonlLogger(folder)
    model, processor, data, collate = STAGE_BUILDERS[stage.kind](stage)
    options = arguments(stage, folder, int(os.environ.get("WORLD_SIZE", 1)))
    trainer = StageTrainer(model, options, train_dataset=data, data_collator=collate, callbacks=[log, Seals()])
    trainer.factor = CUSTOM_SCHEDULES.get(stage.schedule)
    log.trainer = trainer
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / "trainer"))
    if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
        reason = f"stage {stage.name!r}: its weights are no numbers any more; take a smaller learning_rate"
        atomic_write(folder / DIVERGED, reason)
        raise TrainingDiverged(reason)
    whole = {}
    if trainer.is_fsdp_enabled:  # then each process has a part
        whole["state_dict"] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        model.save_pretrained(folder / "model", **whole)
        processor.save_pretrained(folder / "model")
    trainer.accelerator.end_training()  # processes that share the work part before they end


def profile_training_step(stage: Stage) -> dict[str, float]:
    """Peak memory [byte] and time [s] of one training step of a robot stage, taken in this process and forgotten.

    Returns:
        `peak` and `seconds`, as `rvlm.training.cost.measure_step`, with the `parameters` and how many of them are `trained`.
    """
    torch.manual_seed(stage.seed)
    model, _, data, collate = STAGE_BUILDERS[stage.kind](stage)
    with tempfile.TemporaryDirectory() as folder:
        trainer = StageTrainer(model, arguments(stage, Path(folder), 1))
    if stage.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = trainer.create_optimizer()
    batch = collate([data[i] for i in range(stage.batch_size // stage.gradient_accumulation_steps)])
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
    used = measure_step(step, sum(t.numel() * t.element_size() for t in [*parameters, *kept]))
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return {**used, "parameters": sum(p.numel() for p in parameters), "trained": trained}


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


def training_seconds(folder: Path) -> float:
    """How long a stage has trained so far [s], or 0; `folder` is the stage's, finished or not."""
    entries = log_history(folder)
    return entries[-1].get("seconds", 0.0) if entries else 0.0
