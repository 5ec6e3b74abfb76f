"""Train a stage in this process, on `transformers.Trainer`: settings, loss, log, checkpoints.

A restarted stage resumes from its newest complete checkpoint.
"""

import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rvlm.files import atomic_write
from rvlm.training.cost import measure_step
from rvlm.training.learning_rates import set_learning_rate, step_decay
from rvlm.training.stage_data import STAGE_BUILDERS
from rvlm.training.stages import STEP_DECAY, Stage
from rvlm.training.trainer_checkpoints import ManifestCallback, last_checkpoint
from rvlm.training.weight_averaging import EMACallback
from rvlm.vlm.backbones import as_encoder_outputs, check_loaded_weights
from rvlm.vlm.quantization import compute_device

DIVERGED = "diverged.txt"  # in a stage's folder: tells the process that started the training that it diverged
GPU_LOADER_WORKERS = 4  # processes that read and collate batches for one GPU, unless a stage says otherwise


class TrainingDiverged(RuntimeError, FloatingPointError):
    """A training ended with NaN or infinite weights."""


class JsonlLogger(TrainerCallback):
    """Appends every log entry to a JSON Lines file, which other processes can tail.

    `seconds` counts from the construction of this object, plus earlier runs that were killed, up to their last entry. Each
    entry has the number of processes and the model's wrapper, since a launcher that falls back to one process does not log it.
    """

    trainer: Trainer | None = None

    def __init__(self, folder: Path) -> None:
        self.path, self.started = folder / "log.jsonl", time.time()
        self.seconds_before = training_seconds(folder)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a") as file:
                file.write("\n")  # a killed process left a partial line

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        """Append one line."""
        if state.is_world_process_zero:
            seconds = round(self.seconds_before + time.time() - self.started, 1)
            entry = {**(logs or {}), "step": state.global_step, "n_steps": state.max_steps, "seconds": seconds}
            if self.trainer is not None:
                entry |= {"n_processes": args.world_size, "wrapper": type(self.trainer.model_wrapped).__name__}
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")


class StageTrainer(Trainer):
    """A `Trainer` that also logs the loss terms of the model's output, and knows `step_decay`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # losses are means: accumulated steps are averaged
        self.has_step_decay = False
        self.backbone_learning_rate: float | None = None
        self._loss_terms: dict[str, torch.Tensor] = {}  # sum and number of batches since the last log entry

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """`step_decay`, or a schedule of transformers."""
        if self.lr_scheduler is None and self.has_step_decay:
            n_warmup = self.args.get_warmup_steps(num_training_steps)
            decayed: Any = optimizer or self.optimizer
            self.lr_scheduler = step_decay(decayed, n_warmup, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The library's, with a learning rate of the backbone's own if there is one."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.backbone_learning_rate is not None:
            set_learning_rate(optimizer, cast(Any, self.model).backbone.parameters(), self.backbone_learning_rate)
        return optimizer

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, **_: Any) -> Any:
        """The model's own loss."""
        if "image_features" in inputs and "labels" in inputs:
            inputs["mm_encoder_outputs"] = as_encoder_outputs(inputs.pop("image_features"))
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name.endswith("_loss"):
                sum_and_count = torch.stack([value.detach().float(), value.new_ones((), dtype=torch.float32)])
                self._loss_terms[name] = self._loss_terms.get(name, 0) + sum_and_count
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint under the model's own names of weights: those of the family's files may be others, and are not found."""
        if not isinstance(self.model, PreTrainedModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            self.model.save_pretrained(str(output_dir or self.args.output_dir), state_dict=state_dict, save_original_format=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """A policy that is saved without its backbone loads its own weights."""
        policy: Any = self.model
        if getattr(getattr(policy, "config", None), "base_model", None) is not None:  # a detector has no configuration
            policy.load_own_weights(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks weights, or has others; the library warns and goes on with fresh ones."""
        missing = set(load_result.missing_keys) - set(getattr(self.model, "all_tied_weights_keys", ()))
        check_loaded_weights(str(self.args.output_dir), {"missing": missing, "unexpected": load_result.unexpected_keys})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the loss with its terms."""
        super().log({**logs, **self._mean_loss_terms()}, *args, **kwargs)

    def _mean_loss_terms(self) -> dict[str, float]:
        """Mean of each loss term since the last log entry, over the batches that have it, on all processes."""
        terms, self._loss_terms = dict(sorted(self._loss_terms.items())), {}
        if not terms:
            return {}
        sums: Any = self.accelerator.reduce(torch.stack(list(terms.values())), "sum")
        return {name: float(total / n) for name, (total, n) in zip(terms, sums, strict=True)}


def training_arguments(stage: Stage, folder: Path, world_size: int) -> TrainingArguments:
    """The stage's settings as the Trainer's; `folder` is the stage's.

    Raises:
        ValueError: float16 without a GPU: the library would train without scaling gradients, in no precision that it says.
    """
    if stage.resolved_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError(
            f"stage {stage.name!r}: expected a GPU for precision='fp16', got a CPU; leave it out, or take 'fp32' or 'bf16'"
        )
    n_steps, has_gpu = stage.n_samples // stage.batch_size, torch.cuda.is_available()
    n_workers = (GPU_LOADER_WORKERS if has_gpu else 0) if stage.n_loader_workers is None else stage.n_loader_workers
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=n_steps,
        per_device_train_batch_size=stage.batch_size // (world_size * stage.gradient_accumulation_steps),
        gradient_accumulation_steps=stage.gradient_accumulation_steps,
        activation_checkpointing=stage.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        optim=stage.optimizer,
        train_sampling_strategy="sequential",  # `FixedBudgetDataset` shuffles
        dataloader_num_workers=n_workers,
        dataloader_persistent_workers=n_workers > 0,
        dataloader_pin_memory=has_gpu,
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        adam_beta2=0.98,
        warmup_steps=round(stage.warmup_ratio * n_steps),
        lr_scheduler_type="constant_with_warmup" if stage.lr_scheduler_type == STEP_DECAY else stage.lr_scheduler_type,
        max_grad_norm=stage.max_grad_norm,
        logging_steps=max(1, n_steps // 100),
        logging_nan_inf_filter=False,  # else a NaN loss is logged as 0
        save_steps=max(20, n_steps // 25),
        save_total_limit=2,
        seed=stage.seed,
        use_cpu=not has_gpu,
        bf16=stage.resolved_precision == "bf16",
        fp16=stage.resolved_precision == "fp16",
        ddp_backend="gloo" if world_size > 1 and not has_gpu else None,
        ddp_find_unused_parameters=bool(stage.vqa_data),  # VQA batches do not use the action head
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
    )


def train_stage_in_process(stage: Stage, folder: Path) -> None:
    """Train in this process (one of `WORLD_SIZE`); the trained model is in `folder/model`.

    Raises:
        TrainingDiverged: Its weights are NaN or infinite.
    """
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(compute_device())  # before anything is loaded: weights in 4 bits go to the current GPU
    torch.manual_seed(stage.seed)
    log = JsonlLogger(folder)
    model, processor, data, collate = STAGE_BUILDERS[stage.kind](stage)
    arguments = training_arguments(stage, folder, int(os.environ.get("WORLD_SIZE", 1)))
    checkpoint = last_checkpoint(folder / "trainer")
    averages = [EMACallback(stage.ema_decay, checkpoint)] if stage.ema_decay else []
    callbacks = [log, *averages, ManifestCallback()]
    trainer = StageTrainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=callbacks)
    if averages and trainer.is_fsdp_enabled:
        raise ValueError(f"stage {stage.name!r}: expected ema_decay=0 where weights are sharded (FSDP), got {stage.ema_decay}")
    trainer.has_step_decay = stage.lr_scheduler_type == STEP_DECAY
    trainer.backbone_learning_rate = stage.backbone_learning_rate
    log.trainer = trainer
    if trainer.args.world_size > 1 and not stage.vqa_data and not trainer.is_fsdp_enabled:
        freeze_unreached(trainer, collate([data[0]]))
    trainer.train(resume_from_checkpoint=checkpoint)
    if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
        reason = f"stage {stage.name!r}: its weights are NaN or infinite; use a smaller learning_rate"
        atomic_write(folder / DIVERGED, reason)
        raise TrainingDiverged(reason)
    for average in averages:
        average.copy_to_model()
    full_state = {}
    if trainer.is_fsdp_enabled:  # each process holds a shard
        full_state["state_dict"] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        model.save_pretrained(folder / "model", **full_state)
        processor.save_pretrained(folder / "model")
    trainer.accelerator.end_training()  # destroys the process group


def freeze_unreached(trainer: StageTrainer, batch: dict[str, torch.Tensor]) -> None:
    """Freeze parameters that the loss does not depend on, for which data-parallel processes would wait for ever.

    In some families the features of a layer below the vision tower's last are read.
    """
    model: Any = trainer.model
    with torch.random.fork_rng(), trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
    trainer._loss_terms.clear()
    nodes, reached = {loss.grad_fn}, set()
    while nodes - reached:
        reached |= nodes
        nodes = {node for parent in nodes for node, _ in parent.next_functions if node is not None} - reached
    used = {id(node.variable) for node in reached if hasattr(node, "variable")}
    for weight in model.parameters():
        weight.requires_grad_(weight.requires_grad and id(weight) in used)


def profile_training_step(stage: Stage) -> dict[str, float]:
    """Peak memory [byte] and time [s] of one training step of a robot stage, profiled in this process; nothing is saved.

    Returns:
        `peak` and `seconds` as of `rvlm.training.cost.measure_step`, the number of `parameters`, and how many are `trained`.
    """
    torch.manual_seed(stage.seed)
    model, _, data, collate = STAGE_BUILDERS[stage.kind](stage)
    with tempfile.TemporaryDirectory() as folder:
        trainer = StageTrainer(model, training_arguments(stage, Path(folder), 1))
    if stage.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    prepared, optimizer = trainer.accelerator.prepare(model, trainer.create_optimizer())
    batch = collate([data[i] for i in range(stage.batch_size // stage.gradient_accumulation_steps)])
    batch = {name: value.to(trainer.args.device) for name, value in batch.items()}

    def step() -> None:
        trainer.accelerator.backward(prepared(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    step()
    parameters, states = list(model.parameters()), optimizer.state.values()
    state_tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    measured = measure_step(step, sum(t.numel() * t.element_size() for t in [*parameters, *state_tensors]))
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return {**measured, "parameters": sum(p.numel() for p in parameters), "trained": trained}


def log_history(folder: Path) -> list[dict[str, float]]:
    """Log entries of a stage so far; `folder` is the stage's, finished or not.

    Partial lines of killed processes are skipped; of steps that were repeated after a resume, the last entry counts.
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
    """Training time of a stage so far [s], or 0; `folder` is the stage's, finished or not."""
    entries = log_history(folder)
    return entries[-1].get("seconds", 0.0) if entries else 0.0
