"""From a stage's data to the batches that its model takes: order, augmentation, features of frozen towers, collators.

What a sample is depends on its place in the order alone, so a stage that was killed goes on with the same data.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from rvlm.backbones import freeze_vision, load_backbone, vision_features
from rvlm.files import artifacts_dir, digest
from rvlm.processors import ACT, load_processor
from rvlm.prompts import Prompter, pad
from rvlm.stages import DETECTION, ROBOT, VISION_LANGUAGE, Stage


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


def cached_features(
    stage: Stage, model: PreTrainedModel, processor: ProcessorMixin, images: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A frozen tower's features of stored images, computed once per tower; processes that train together share the work.

    Args:
        stage: Its `init` names the tower; where random weights are drawn instead, its seed does.
        model: The vision-language model.
        processor: Its processor.
        images: Name -> (n, ..., h, w, 3) uint8; names are unique among all data.

    Returns:
        Name -> (n, ..., tokens, d) float16.
    """
    drawn = "" if stage.is_pretrained else f"-random-{stage.seed}"
    folder = artifacts_dir() / "features" / f"{digest(Path(stage.init) / 'model.safetensors')}{drawn}"
    prompter, names = Prompter(processor, 1), sorted(images)
    folder.mkdir(parents=True, exist_ok=True)
    start = int(os.environ.get("RANK", 0)) * len(names) // int(os.environ.get("WORLD_SIZE", 1))
    for name in names[start:] + names[:start]:
        path = folder / f"{name}.npy"
        with FileLock(path.with_suffix(".lock")):
            if path.exists():
                continue
            flat = images[name].reshape(-1, 1, *images[name].shape[-3:])
            parts = [vision_features(model, prompter.pixels(flat[i : i + 64])).numpy() for i in range(0, len(flat), 64)]
            features = np.concatenate(parts).astype(np.float16)
            partial = folder / f"{name}.partial.npy"
            np.save(partial, features.reshape(*images[name].shape[:-3], *features.shape[1:]))
            partial.replace(path)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in images}


def _see(prompter: Prompter, images: np.ndarray) -> dict[str, torch.Tensor]:
    """The vision half of a batch: pixels of images (n, m, h, w, 3) uint8, or features (n, m, tokens, d) of a frozen tower."""
    if images.dtype == np.uint8:
        return {"pixel_values": prompter.pixels(images)}
    return {"image_features": torch.from_numpy(images.reshape(len(images), -1, images.shape[-1]).astype(np.float32))}


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


class RobotCollator:
    """Windows of demonstrations to the batch that `VLA.forward` takes.

    Args:
        prompter: As `VLA.prompter` gives it. If it interleaves, the observations of a sample share one prompt, and those before
            the episode's start are left out of it; else each has a prompt of its own, in the order of the b * t observations.
    """

    def __init__(self, prompter: Prompter) -> None:
        self.prompter = prompter

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Samples of `Windows` to one batch."""
        keys = ("images", "state", "action", "action_mask", "obs_mask", "dataset_index")
        stacked = {k: np.stack([s[k] for s in samples]) for k in keys}
        images, is_there = stacked.pop("images"), stacked["obs_mask"]
        if self.prompter.is_interleaved:
            flat, n_steps, texts = images[is_there], is_there.sum(1).tolist(), [s["instruction"] for s in samples]
        else:
            flat, n_steps = images.reshape(-1, *images.shape[2:]), [1] * is_there.size
            texts = [s["instruction"] for s in samples for _ in range(is_there.shape[1])]
        if flat.dtype == np.uint8:
            prompts = self.prompter(flat, texts, n_steps)
        else:
            prompts = {**self.prompter.tokens(texts, n_steps), **_see(self.prompter, flat)}
        return {**prompts, **{k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in stacked.items()}}


def _robot(stage: Stage) -> tuple[PreTrainedModel, ProcessorMixin, Any, Any]:
    from rvlm.checkpoints import make_vla, remake_vla
    from rvlm.episodes import EpisodeDataset, Windows, split
    from rvlm.structures import VLAConfig

    (root,) = stage.data
    data = EpisodeDataset(root)
    train, _ = split(data)
    stats = data.stats(episodes=train)
    how: dict[str, Any] = {"tuning": stage.tuning, "rank": stage.rank}
    path = Path(stage.init) / "config.json"
    if path.exists() and json.loads(path.read_text())["model_type"] == VLAConfig.model_type:
        if not stage.is_pretrained:
            raise ValueError(
                f"stage {stage.name!r} starts from the policy in {stage.init}: expected is_pretrained=True, got False; "
                "leave it out, or start from a vision-language model"
            )
        model, processor = remake_vla(stage.init, **how, **stage.policy)
        model.spec.require_same(data.require_spec(), "policy vs demonstrations")
    else:
        how["is_pretrained"] = stage.is_pretrained
        model, processor = make_vla(stage.init, data.require_spec(), stats, **how, **stage.policy)
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
    return model, processor, budget, RobotCollator(model.prompter(processor))


BUILDERS = {DETECTION: _detection, VISION_LANGUAGE: _vision_language, ROBOT: _robot}
