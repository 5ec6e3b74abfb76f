"""Training stages on `transformers.Trainer`: one stage is data, a start and a budget; its result is a folder.

A stage runs in processes of its own (one per core or GPU, by torchrun), saves every minute, and goes on where it was
when it is started again. Its folder is named by the hash of what made it, so nothing is trained twice.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback, TrainingArguments

from rvlm.backbones import (
    ACT,
    Prompter,
    as_encoder_outputs,
    freeze_vision,
    load_backbone,
    load_processor,
    pad,
    vision_features,
)
from rvlm.report import artifacts_dir

DETECTION, VISION_LANGUAGE, ROBOT = "detection", "vision_language", "robot"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: What it is called in figures and folders.
        kind: "detection" (the vision tower alone), "vision_language" (next-token loss on answers) or "robot" (action loss).
        data: Folders of scenes, or of demonstrations.
        init: Folder or Hub name that the weights come from.
        dialogue: Arguments of `questions.draw`, for vision-language stages.
        is_pretrained: False draws random weights instead (the recipe `scratch`).
        policy: Fields of `VLAConfig`, for robot stages.
        n_samples: Budget: samples seen.
        batch_size: Samples per optimizer step, over all processes.
        learning_rate, weight_decay, warmup, schedule: Of AdamW; `warmup` is a fraction of the steps, `schedule` a name of
            transformers.
        max_grad_norm: Gradients are clipped to this norm.
        freeze_vision: Keep vision tower and connector as they are and compute their features once per frame.
        augment: Largest shift of an image [px], with brightness and contrast varied too; 0 for none.
        seed: Of weights, order and augmentation.
        n_processes: Data-parallel processes.
    """

    name: str
    kind: str
    data: tuple[str, ...]
    init: str
    n_samples: int
    dialogue: dict[str, Any] = dataclasses.field(default_factory=lambda: {"n": 6})
    is_pretrained: bool = True
    policy: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.03
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    freeze_vision: bool = False
    augment: int = 2
    seed: int = 0
    n_processes: int = 2

    def __post_init__(self) -> None:
        if self.kind not in BUILDERS:
            raise ValueError(f"stage {self.name!r}: no kind {self.kind!r}; there are {', '.join(BUILDERS)}")
        if self.n_samples < self.batch_size:
            raise ValueError(
                f"stage {self.name!r}: expected n_samples of at least one batch of {self.batch_size}; got {self.n_samples}"
            )
        if self.batch_size % self.n_processes:
            raise ValueError(
                f"stage {self.name!r}: expected a batch_size that {self.n_processes} processes can share evenly; "
                f"got {self.batch_size}"
            )
        if self.policy and self.kind != ROBOT:
            raise ValueError(
                f"stage {self.name!r}: 'policy' is read by {ROBOT!r} stages only, and this one is {self.kind!r}; leave it out"
            )

    @property
    def folder(self) -> Path:
        """Where its result is: the name and the hash of everything that makes it, except how many processes share it."""
        content = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("name", "n_processes")}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        return artifacts_dir() / "stages" / f"{self.name}-{digest}"


class Budget(Dataset):
    """Exactly `n_samples` samples in a fixed order: epoch after epoch of shuffled data, each with a seed of its own.

    What a sample is depends on its place in the order alone, so a stage that was killed goes on with the same data.

    Args:
        n_items: Items of the data.
        n_samples: Budget.
        seed: Of the order and of every sample.
        make: (index of an item, generator) -> sample.
    """

    def __init__(self, n_items: int, n_samples: int, seed: int, make: Any) -> None:
        self.n_items, self.n_samples, self.seed, self.make = n_items, n_samples, seed, make
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.n_samples

    def item(self, i: int) -> int:
        """Which item of the data stands at place `i`."""
        epoch, place = divmod(i, self.n_items)
        if epoch not in self._epochs:
            self._epochs = {epoch: np.random.default_rng((self.seed, epoch)).permutation(self.n_items)}
        return int(self._epochs[epoch][place])

    def __getitem__(self, i: int) -> Any:
        return self.make(self.item(i), np.random.default_rng((self.seed, 1, i)))


def augment(images: np.ndarray, rng: np.random.Generator, shift: int) -> np.ndarray:
    """Shift each camera's images by up to `shift` px (edges repeat), and vary brightness and contrast.

    Args:
        images: (t, cameras, h, w, 3) uint8; all observation steps of one camera move together.
        rng: Draws the shift of each camera, and one change of brightness and contrast for all.
        shift: Largest shift along each axis [px]; 0 leaves the images as they are.
    """
    if not shift:
        return images
    out = np.empty_like(images)
    gain, bias = rng.uniform(0.85, 1.15), rng.uniform(-12, 12)
    for camera in range(images.shape[1]):
        dy, dx = rng.integers(-shift, shift + 1, 2)
        rows = np.clip(np.arange(images.shape[2]) + dy, 0, images.shape[2] - 1)
        columns = np.clip(np.arange(images.shape[3]) + dx, 0, images.shape[3] - 1)
        moved = images[:, camera][:, rows][:, :, columns].astype(np.float32)
        out[:, camera] = np.clip((moved - 128) * gain + 128 + bias, 0, 255)
    return out


# -- frozen towers -----------------------------------------------------------------------------------------------------
def cached_features(
    stage: Stage, model: PreTrainedModel, processor: ProcessorMixin, images: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A frozen tower's features of stored images, computed once per tower; processes that train together share the work.

    Args:
        stage: Its `init` names the tower.
        model: The vision-language model.
        processor: Its processor.
        images: Name -> (n, ..., h, w, 3) uint8; names are unique among all data.

    Returns:
        Name -> (n, ..., tokens, d) float16.
    """
    key = hashlib.sha256((Path(stage.init) / "model.safetensors").read_bytes()).hexdigest()[:12]
    folder, prompter, names = artifacts_dir() / "features" / key, Prompter(processor, 1), sorted(images)
    folder.mkdir(parents=True, exist_ok=True)
    start = int(os.environ.get("RANK", 0)) * len(names) // int(os.environ.get("WORLD_SIZE", 1))
    for name in names[start:] + names[:start]:
        path = folder / f"{name}.npy"
        if not path.exists():
            flat = images[name].reshape(-1, 1, *images[name].shape[-3:])
            parts = [vision_features(model, prompter.pixels(flat[i : i + 64])).numpy() for i in range(0, len(flat), 64)]
            features = np.concatenate(parts).astype(np.float16)
            partial = folder / f"{name}.{os.getpid()}.npy"
            np.save(partial, features.reshape(*images[name].shape[:-3], *features.shape[1:]))
            partial.replace(path)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in images}


def _see(prompter: Prompter, images: np.ndarray) -> dict[str, torch.Tensor]:
    """The vision half of a batch: pixels of images (n, m, h, w, 3) uint8, or features (n, m, tokens, d) of a frozen tower."""
    if images.dtype == np.uint8:
        return {"pixel_values": prompter.pixels(images)}
    return {"image_features": torch.from_numpy(images.reshape(len(images), -1, images.shape[-1]).astype(np.float32))}


# -- vision-language ---------------------------------------------------------------------------------------------------
def encode_dialogue(prompter: Prompter, pairs: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of images, questions and answers, and labels that supervise the answers alone (-100 elsewhere)."""
    tokenizer = prompter.processor.tokenizer
    prompt = prompter.token_ids("")
    ids = prompt[: prompt.index(tokenizer.convert_tokens_to_ids(ACT))]
    labels = [-100] * len(ids)
    texts = [text for question, answer in pairs for text in (question, answer)]
    for i, part in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
        is_answer = i % 2 == 1
        part = [*part, tokenizer.eos_token_id] if is_answer else part
        ids += part
        labels += part if is_answer else [-100] * len(part)
    return ids, labels


class DialogueCollator:
    """Scenes with drawn questions to a batch for the next-token loss."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.prompter = Prompter(processor, n_images=2)

    def __call__(self, samples: Sequence[tuple[np.ndarray, list[tuple[str, str]]]]) -> dict[str, torch.Tensor]:
        """Images (2, h, w, 3) uint8 with (question, answer) pairs, to `input_ids`, `labels` (b, l) and `pixel_values`."""
        ids, labels = zip(*(encode_dialogue(self.prompter, pairs) for _, pairs in samples), strict=True)
        pad_id = self.prompter.processor.tokenizer.pad_token_id
        seen = _see(self.prompter, np.stack([images for images, _ in samples]))
        return {**pad(ids, pad_id), "labels": pad(labels, -100)["input_ids"], **seen}


def _vision_language(stage: Stage) -> tuple[PreTrainedModel, ProcessorMixin, Any, Any]:
    from rvlm.envs.tabletop.questions import Scenes, draw

    processor = load_processor(stage.init)
    model = load_backbone(stage.init, processor, is_pretrained=stage.is_pretrained)
    scenes = Scenes(stage.data)
    if stage.freeze_vision:
        freeze_vision(model)
        scenes.images = list(cached_features(stage, model, processor, scenes.images_by_name()).values())

    def make(i: int, rng: np.random.Generator) -> Any:
        images, scene = scenes[i]
        return images, draw(scene, rng, **stage.dialogue)

    return model, processor, Budget(len(scenes), stage.n_samples, stage.seed, make), DialogueCollator(processor)


def _detection(stage: Stage) -> tuple[Any, ProcessorMixin, Any, Any]:
    from rvlm.detection import DetectionCollator, Detector
    from rvlm.envs.tabletop.questions import Scenes

    processor = load_processor(stage.init)
    model = Detector(load_backbone(stage.init, processor, is_pretrained=stage.is_pretrained))
    scenes = Scenes(stage.data)
    budget = Budget(len(scenes), stage.n_samples, stage.seed, lambda i, rng: scenes[i])
    return model, processor, budget, DetectionCollator(processor)


# -- robot -------------------------------------------------------------------------------------------------------------
class RobotCollator:
    """Windows of demonstrations to the batch that `VLA.forward` takes."""

    def __init__(self, processor: ProcessorMixin, n_cameras: int) -> None:
        self.prompter = Prompter(processor, n_cameras)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Samples of `Windows` to one batch; prompts stand in the order of the b * t observations."""
        keys = ("images", "state", "action", "action_mask", "obs_mask", "dataset_index")
        stacked = {k: np.stack([s[k] for s in samples]) for k in keys}
        images, n_obs_steps = stacked.pop("images"), samples[0]["images"].shape[0]
        texts = [s["instruction"] for s in samples for _ in range(n_obs_steps)]
        flat = images.reshape(-1, *images.shape[2:])
        is_raw = flat.dtype == np.uint8
        prompts = self.prompter(flat, texts) if is_raw else {**self.prompter.tokens(texts), **_see(self.prompter, flat)}
        return {**prompts, **{k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in stacked.items()}}


def _robot(stage: Stage) -> tuple[PreTrainedModel, ProcessorMixin, Any, Any]:
    from rvlm.episodes import EpisodeDataset, Windows, split
    from rvlm.vla import VLAConfig, load_vla, make_vla

    (root,) = stage.data
    data = EpisodeDataset(root)
    train, _ = split(data)
    stats = data.stats(episodes=train)
    path = Path(stage.init) / "config.json"
    if path.exists() and json.loads(path.read_text())["model_type"] == VLAConfig.model_type:
        model: Any
        model, processor = load_vla(stage.init)
        _require_same_policy(model, data, stage)
    else:
        model, processor = make_vla(stage.init, data.require_spec(), stats, is_pretrained=stage.is_pretrained, **stage.policy)
    config = model.config
    frames = None
    if stage.freeze_vision:
        freeze_vision(model.backbone)
        images = {f"{data.root.name}-{camera}": frames for camera, frames in data.frames_cache(config.cameras).items()}
        frames = list(cached_features(stage, model.backbone, processor, images).values())
    windows = Windows(data, config.n_obs_steps, config.chunk_size, train, model.stats, config.cameras, frames=frames)

    def make(i: int, rng: np.random.Generator) -> Any:
        sample = windows[i]
        return sample if stage.freeze_vision else {**sample, "images": augment(sample["images"], rng, stage.augment)}

    budget = Budget(len(windows), stage.n_samples, stage.seed, make)
    return model, processor, budget, RobotCollator(processor, len(config.cameras))


def _require_same_policy(model: Any, data: Any, stage: Stage) -> None:
    """A policy that is trained further keeps what it is made of: settings that would not be read are refused."""
    model.spec.require_same(data.require_spec(), "policy vs demonstrations")
    differing = {k: (v, getattr(model.config, k, None)) for k, v in stage.policy.items() if getattr(model.config, k, None) != v}
    if differing or not stage.is_pretrained:
        raise ValueError(
            f"stage {stage.name!r} goes on with the policy in {stage.init}: expected its own settings and is_pretrained=True; "
            f"got {differing} (asked, its own), is_pretrained={stage.is_pretrained}; leave them out, or start from a "
            "vision-language model"
        )


BUILDERS = {DETECTION: _detection, VISION_LANGUAGE: _vision_language, ROBOT: _robot}


# -- running -----------------------------------------------------------------------------------------------------------
class LogFile(TrainerCallback):
    """Appends every log entry to a file, from which another process can follow the training.

    An entry's `seconds` are those of the stage so far, from the making of this object on, earlier runs that were killed
    counted up to their last entry.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.started = folder / "log.jsonl", time.time()
        self.seconds_before = seconds_of(folder)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        """One line of JSON."""
        if state.is_world_process_zero:
            seconds = round(self.seconds_before + time.time() - self.started, 1)
            entry = {**(logs or {}), "step": state.global_step, "n_steps": state.max_steps, "seconds": seconds}
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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the loss with its parts."""
        super().log({**logs, **getattr(self, "_parts", {})}, *args, **kwargs)


def arguments(stage: Stage, folder: Path, world_size: int) -> TrainingArguments:
    """The stage in the Trainer's own words."""
    n_steps = stage.n_samples // stage.batch_size
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=n_steps,
        per_device_train_batch_size=stage.batch_size // world_size,
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
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        ddp_backend="gloo" if world_size > 1 and not torch.cuda.is_available() else None,
        ddp_find_unused_parameters=False,
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
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / "trainer"))
    if trainer.is_world_process_zero():
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; one that a kill has cut short is passed over."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            json.loads((path / "trainer_state.json").read_text())  # what the Trainer writes last
            return str(path)
    return None


def run(stage: Stage, show_progress: bool = True, n_threads: int | None = None) -> Path:
    """Train a stage unless its result is there, in `n_processes` processes; resumes what was killed.

    Args:
        stage: What to train.
        show_progress: Whether to draw a progress bar.
        n_threads: Of each process; all cores shared between the processes if left out.

    Returns:
        The folder of the trained model.

    Raises:
        RuntimeError: Training failed; the message holds the end of its log.
    """
    final = stage.folder
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_name(final.name + ".lock")):  # who asks for the same stage meanwhile waits for it
        if not final.exists():
            _train(stage, final, show_progress, n_threads)
    return final / "model"


def _train(stage: Stage, final: Path, show_progress: bool, n_threads: int | None) -> None:
    partial = final.with_name(final.name + ".partial")
    partial.mkdir(exist_ok=True)
    (partial / "stage.json").write_text(json.dumps(dataclasses.asdict(stage), indent=1))
    with (partial / "output.txt").open("ab") as output:
        environment = _environment(stage, n_threads)
        process = subprocess.Popen(
            _command(stage, partial), env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            _follow(process, partial, stage, show_progress)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode:
        raise RuntimeError(f"stage {stage.name!r} failed: {(partial / 'output.txt').read_text()[-3000:]}")
    partial.replace(final)


def run_side_by_side(stages: Mapping[str, Stage], show_progress: bool = True) -> dict[str, Path]:
    """Train independent stages at the same time, the cores shared between them; gives each one's model folder.

    Two processes of one thread train a small model about twice as fast as one process of two threads, so use stages with
    `n_processes=1`.
    """
    n_threads = max(1, (os.cpu_count() or 1) // len(stages))
    with ThreadPoolExecutor(len(stages)) as pool:
        futures = {name: pool.submit(run, stage, show_progress, n_threads) for name, stage in stages.items()}
        return {name: future.result() for name, future in futures.items()}


def _command(stage: Stage, partial: Path) -> list[str]:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={stage.n_processes}"]
    launch = several if stage.n_processes > 1 else []
    return [sys.executable, *launch, "-m", "rvlm.training", str(partial), str(os.getpid())]


def _environment(stage: Stage, n_threads: int | None) -> dict[str, str]:
    threads = n_threads or max(1, (os.cpu_count() or 1) // stage.n_processes)
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def _follow(process: subprocess.Popen, partial: Path, stage: Stage, show_progress: bool) -> None:
    """Draw a progress bar from the log file until the process ends."""
    with tqdm(total=stage.n_samples, desc=f"train {stage.name}", unit="sample", disable=not show_progress) as bar:
        while process.poll() is None:
            time.sleep(0.5)
            entries = log_history(partial)
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
    exit_with_parent(os.getppid())
    exit_with(int(sys.argv[2]))
    work(Stage(**json.loads((partial_folder / "stage.json").read_text())), partial_folder)
