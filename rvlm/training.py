"""Training stages on `transformers.Trainer`: one stage is data, a start and a budget; its result is a folder.

A stage runs in processes of its own (one per core or GPU, by torchrun), saves every minute, and goes on where it was
when it is started again. Its folder is named by the hash of what made it, so nothing is trained twice.
"""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from rvlm.backbones import Prompter, load_backbone, load_processor, pad
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

    @property
    def folder(self) -> Path:
        """Where its result is: the name and the hash of everything that makes it, except how many processes share it."""
        content = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("name", "n_processes")}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        return artifacts_dir() / "stages" / f"{self.name}-{digest}"


class Budget(Dataset):
    """Exactly `n_samples` samples in a fixed order: epoch after epoch of shuffled data, each with a seed of its own.

    What a sample is depends on its place in the order alone, so a stage that was killed goes on with the same data.
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


# -- vision-language ---------------------------------------------------------------------------------------------------
def encode_dialogue(prompter: Prompter, pairs: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of images, questions and answers, and labels that supervise the answers alone (-100 elsewhere)."""
    tokenizer = prompter.processor.tokenizer
    ids = list(prompter.token_ids("")[:-1])  # without <act>
    labels = [-100] * len(ids)
    texts = [text for question, answer in pairs for text in (question, answer)]
    for i, part in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
        is_answer = i % 2 == 1
        part = part + [tokenizer.eos_token_id] if is_answer else part
        ids += part
        labels += part if is_answer else [-100] * len(part)
    return ids, labels


class DialogueCollator:
    """Scenes with drawn questions to a batch for the next-token loss."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.prompter = Prompter(processor, n_images=2)

    def __call__(self, samples: Sequence[tuple[np.ndarray, list[tuple[str, str]]]]) -> dict[str, torch.Tensor]:
        ids, labels = zip(*(encode_dialogue(self.prompter, pairs) for _, pairs in samples), strict=True)
        pad_id = self.prompter.processor.tokenizer.pad_token_id
        pixels = self.prompter.pixels(np.stack([images for images, _ in samples]))
        return {**pad(ids, pad_id), "labels": pad(labels, -100)["input_ids"], "pixel_values": pixels}


def _vision_language(stage: Stage) -> tuple[PreTrainedModel, ProcessorMixin, Any, Any]:
    from rvlm.envs.tabletop.questions import Scenes, draw

    processor = load_processor(stage.init)
    model = load_backbone(stage.init, processor, is_pretrained=stage.is_pretrained)
    scenes = Scenes(stage.data)

    def make(i: int, rng: np.random.Generator) -> Any:
        images, scene = scenes[i]
        return images, draw(scene, rng, n=6)

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
        stacked = {k: np.stack([s[k] for s in samples]) for k in ("images", "state", "action", "action_mask", "obs_mask", "dataset_index")}
        images, n_obs_steps = stacked.pop("images"), samples[0]["images"].shape[0]
        texts = [s["instruction"] for s in samples for _ in range(n_obs_steps)]
        prompts = self._prompts(images.reshape(-1, *images.shape[2:]), texts)
        return {**prompts, **{k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in stacked.items()}}


    def _prompts(self, images: np.ndarray, texts: list[str]) -> dict[str, torch.Tensor]:
        """Prompts with images (n, cameras, h, w, 3), or with features (n, cameras, tokens, d) of a frozen tower."""
        if images.dtype == np.uint8:
            return self.prompter(images, texts)
        features = torch.from_numpy(images.reshape(len(images), -1, images.shape[-1]).astype(np.float32))
        return {**self.prompter.tokens(texts), "image_features": features}


def cached_vision_features(model: Any, processor: ProcessorMixin, data: Any, cameras: Sequence[str], weights: Path) -> list[np.ndarray]:
    """Features of every frame of a dataset, (n_frames, tokens, d) float16 per camera, computed once per vision tower.

    Args:
        model: A `VLA`. weights: The file that its vision tower came from, which names the cache.
    """
    key = hashlib.sha256(weights.read_bytes() + str(data.root.resolve()).encode()).hexdigest()[:12]
    folder = artifacts_dir() / "features" / key
    prompter = Prompter(processor, 1)
    for camera, frames in data.frames_cache(cameras).items():
        path = folder / f"{camera}.npy"
        if path.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        parts = [model.vision_features(prompter.pixels(np.asarray(frames[i : i + 64])[:, None])).numpy() for i in range(0, len(frames), 64)]
        partial = folder / f"{camera}.{os.getpid()}.npy"
        np.save(partial, np.concatenate(parts).astype(np.float16))
        partial.replace(path)
    return [np.load(folder / f"{camera}.npy", mmap_mode="r") for camera in cameras]


def _robot(stage: Stage) -> tuple[PreTrainedModel, ProcessorMixin, Any, Any]:
    from rvlm.episodes import EpisodeDataset, Windows, split
    from rvlm.vla import VLAConfig, load_vla, make_vla

    (root,) = stage.data
    data = EpisodeDataset(root)
    train, _ = split(data)
    stats = data.stats(episodes=train)
    if (Path(stage.init) / "config.json").exists() and json.loads((Path(stage.init) / "config.json").read_text())["model_type"] == VLAConfig.model_type:
        model, processor = load_vla(stage.init)
    else:
        model, processor = make_vla(stage.init, data.spec, stats, is_pretrained=stage.is_pretrained, **stage.policy)
    config = model.config
    frames = None
    if stage.freeze_vision:
        model.freeze_vision()
        frames = cached_vision_features(model, processor, data, config.cameras, Path(stage.init) / "model.safetensors")
    windows = Windows(data, config.n_obs_steps, config.chunk_size, train, model.stats, config.cameras, frames=frames)

    def make(i: int, rng: np.random.Generator) -> Any:
        sample = windows[i]
        return sample if stage.freeze_vision else {**sample, "images": augment(sample["images"], rng, stage.augment)}

    return model, processor, Budget(len(windows), stage.n_samples, stage.seed, make), RobotCollator(processor, len(config.cameras))


BUILDERS = {DETECTION: _detection, VISION_LANGUAGE: _vision_language, ROBOT: _robot}


# -- running -----------------------------------------------------------------------------------------------------------
class LogFile(TrainerCallback):
    """Appends every log entry to a file, from which another process can follow the training."""

    def __init__(self, path: Path) -> None:
        self.path, self.started = path, time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({**(logs or {}), "step": state.global_step, "n_steps": state.max_steps}) + "\n")


class StageTrainer(Trainer):
    """A `Trainer` that also logs the parts of the loss that the model names."""

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        if self.state.global_step % self.args.logging_steps == 0:
            self._parts = {k: float(v) for k, v in outputs.items() if k.endswith("_loss")}
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
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
    model, processor, data, collate = BUILDERS[stage.kind](stage)
    options = arguments(stage, folder, int(os.environ.get("WORLD_SIZE", 1)))
    trainer = StageTrainer(model, options, train_dataset=data, data_collator=collate, callbacks=[LogFile(folder / "log.jsonl")])
    start = get_last_checkpoint(options.output_dir) if Path(options.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=start)
    if trainer.is_world_process_zero():
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")


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
    if final.exists():
        return final / "model"
    partial = final.with_name(final.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "stage.json").write_text(json.dumps(dataclasses.asdict(stage), indent=1))
    started = time.time()
    with (partial / "output.txt").open("ab") as output:
        process = subprocess.Popen(_command(stage, partial), env=_environment(stage, n_threads), stdout=output, stderr=output, start_new_session=True)
        try:
            _follow(process, partial, stage, show_progress)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(f"stage {stage.name!r} failed: {(partial / 'output.txt').read_text()[-3000:]}")
    (partial / "seconds.json").write_text(json.dumps(time.time() - started))
    partial.replace(final)
    return final / "model"


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
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={stage.n_processes}"] if stage.n_processes > 1 else []
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
    """What a stage has logged so far; `folder` is the stage's, finished or not."""
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    from rvlm.recording import exit_with_parent

    partial_folder = Path(sys.argv[1])
    if "WORLD_SIZE" not in os.environ:
        exit_with_parent(int(sys.argv[2]))
    work(Stage(**{**json.loads((partial_folder / "stage.json").read_text())}), partial_folder)
