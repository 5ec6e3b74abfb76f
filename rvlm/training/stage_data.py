"""From a stage's data to the batches that its model takes: order, augmentation, collators.

What a sample is depends on its place in the order alone, so a stage that was killed goes on with the same data.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, ProcessorMixin

from rvlm.files import commit_on_hub
from rvlm.policy.hub import fetch
from rvlm.policy.mixtures import Embodiment, FixedBudgetDataset, Mixture
from rvlm.training.features import cached_features
from rvlm.training.stages import DETECTION, ROBOT, VISION_LANGUAGE, Stage
from rvlm.vlm.backbones import freeze_vision, load_backbone
from rvlm.vlm.processors import ACT, load_processor
from rvlm.vlm.prompts import PromptBuilder, pad


def augment(images: np.ndarray, rng: np.random.Generator, shift: int = 0, crop: float = 0, color: float = 0) -> np.ndarray:
    """Move and cut each camera's images at random (edges repeat), and vary brightness and contrast; hues stay, orders name them.

    Args:
        images: (t, cameras, h, w, 3) uint8; all observation steps of one camera move together.
        rng: Draws shift and cut of each camera, and one change of brightness and contrast for all.
        shift: Largest shift along each axis [px].
        crop: Largest part of each side that is cut away, before what is left is enlarged to the whole.
        color: Largest relative change of contrast, and of brightness in parts of half its range.
    """
    if not (shift or crop or color):
        return images
    h, w = images.shape[2:4]
    gain, bias = rng.uniform(1 - color, 1 + color), 128 * rng.uniform(-color, color)
    out = np.empty_like(images)
    for camera in range(images.shape[1]):
        part = rng.uniform(1 - crop, 1)
        x, y = rng.uniform(part - 1, 1 - part, 2) + 2 * rng.integers(-shift, shift + 1, 2) / (w, h)
        view = torch.tensor(images[:, camera]).permute(0, 3, 1, 2).float()
        theta = torch.tensor([[part, 0, x], [0, part, y]], dtype=torch.float32).expand(len(view), -1, -1)
        grid = functional.affine_grid(theta, list(view.shape), align_corners=False)
        moved = functional.grid_sample(view, grid, padding_mode="border", align_corners=False)
        out[:, camera] = ((moved - 128) * gain + 128 + bias).clamp(0, 255).round().permute(0, 2, 3, 1).numpy()
    return out


def vision_inputs(prompter: PromptBuilder, images: np.ndarray) -> dict[str, torch.Tensor]:
    """The vision half of a batch: pixels of images (n, m, h, w, 3) uint8, or features (n, m, tokens, d) of a frozen tower."""
    if images.dtype == np.uint8:
        return {"pixel_values": prompter.pixels(images)}
    return {"image_features": torch.from_numpy(images.reshape(len(images), -1, images.shape[-1]).astype(np.float32))}


def encode_vqa(prompter: PromptBuilder, pairs: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
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


class VQACollator:
    """Scenes with drawn questions to a batch for the next-token loss."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.prompter = PromptBuilder(processor, n_images=2)
        if not self.prompter.sees_pixels_alone:
            raise ValueError(
                f"expected a family that is given nothing of images but pixels, got that of {type(processor).__name__}; "
                "train such a one on dialogues by its own recipe, and its policy here"
            )

    def __call__(self, samples: Sequence[tuple[np.ndarray, list[tuple[str, str]]]]) -> dict[str, torch.Tensor]:
        """Images (2, h, w, 3) uint8 with (question, answer) pairs, to `input_ids`, `labels` (b, l) and `pixel_values`."""
        ids, labels = zip(*(encode_vqa(self.prompter, pairs) for _, pairs in samples), strict=True)
        pad_id = self.prompter.processor.tokenizer.pad_token_id
        seen = vision_inputs(self.prompter, np.stack([images for images, _ in samples]))
        return {**pad(ids, pad_id), "labels": pad(labels, -100)["input_ids"], **seen}


def _vision_language(stage: Stage) -> tuple[PreTrainedModel, ProcessorMixin, Any, Any]:
    from rvlm.envs.tabletop.questions import sample_questions
    from rvlm.envs.tabletop.rendered_scenes import Scenes

    folder = fetch(stage.init, commit_on_hub(stage.init))
    processor = load_processor(folder)
    model = load_backbone(folder, processor, is_pretrained=stage.is_pretrained)
    scenes, collate = Scenes(stage.data), VQACollator(processor)
    if stage.freeze_vision:
        freeze_vision(model)
        kept = cached_features(model, processor, {str(i): images for i, images in enumerate(scenes.images)})
        scenes.images = list(kept.values())

    def make(i: int, rng: np.random.Generator) -> Any:
        images, scene = scenes[i]
        return images, sample_questions(scene, rng, **stage.vqa)

    return model, processor, FixedBudgetDataset(len(scenes), stage.n_samples, stage.seed, make), collate


def _detection(stage: Stage) -> tuple[Any, ProcessorMixin, Any, Any]:
    from rvlm.envs.tabletop.rendered_scenes import Scenes
    from rvlm.training.detection import DetectionCollator, Detector

    folder = fetch(stage.init, commit_on_hub(stage.init))
    processor = load_processor(folder)
    model = Detector(load_backbone(folder, processor, is_pretrained=stage.is_pretrained))
    scenes = Scenes(stage.data)
    budget = FixedBudgetDataset(len(scenes), stage.n_samples, stage.seed, lambda i, rng: scenes[i])
    return model, processor, budget, DetectionCollator(processor)


class RobotCollator:
    """Windows of demonstrations to the batch that `VLA.forward` takes.

    Args:
        prompter: As `VLA.prompt_builder` gives it. If it interleaves, the observations of a sample share one prompt, and those
            before the episode's start are left out of it; else each has its own, in the order of the b * t observations.
    """

    def __init__(self, prompter: PromptBuilder) -> None:
        self.prompter = prompter

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Samples of `Windows` to one batch."""
        keys = ("state", "action", "action_mask", "obs_mask", "dataset_index")
        stacked = {k: np.stack([s[k] for s in samples]) for k in keys}
        if self.prompter.is_interleaved:
            n_steps, texts = stacked["obs_mask"].sum(1).tolist(), [s["instruction"] for s in samples]
            seen = [images for s in samples for images in s["images"][s["obs_mask"]]]
        else:
            seen = [images for s in samples for images in s["images"]]
            n_steps, texts = [1] * len(seen), [s["instruction"] for s in samples for _ in s["images"]]
        flat = np.stack(seen) if len({images.shape for images in seen}) == 1 else seen  # datasets differ in their images' size
        if seen[0].dtype == np.uint8:
            prompts = self.prompter(flat, texts, n_steps)
        else:
            prompts = {**self.prompter.tokens(texts, n_steps), **vision_inputs(self.prompter, np.stack(seen))}
        return {**prompts, **{k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in stacked.items()}}


def _robot(stage: Stage) -> tuple[PreTrainedModel, ProcessorMixin, Any, Any]:
    from rvlm.data.windows import EpisodeDataset, split

    sets = [EpisodeDataset(root) for root in stage.data]
    train = [_select_shots(stage, data, split(data)[0]) for data in sets]
    robots = _robots(sets, train)
    model, processor = _policy(stage, robots)
    model.config.image_size = _image_size(sets, model.config.cameras)
    prompter, frames = model.prompt_builder(processor), [None] * len(sets)
    if stage.freeze_vision:
        freeze_vision(model.backbone)
        seen = [data.frames_cache(model.config.cameras) for data in sets]
        if all(prompter.is_separable(*images.shape[-3:-1]) for cameras in seen for images in cameras.values()):
            frames = [list(cached_features(model.backbone, processor, images).values()) for images in seen]
    parts = [
        _embodiment_dataset(stage, model, data, rows, seen, i)
        for i, (data, rows, seen) in enumerate(zip(sets, train, frames, strict=True))
    ]
    budget: Any = parts[0] if len(parts) == 1 else Mixture(parts, stage.weights, stage.n_samples, stage.seed)
    collate: Any = RobotCollator(prompter)
    if stage.vqa_data:
        budget, collate = _with_vqa(stage, processor, budget, collate)
    return model, processor, budget, collate


def _image_size(sets: Sequence[Any], cameras: Sequence[str]) -> list[int]:
    """Height and width of all images [px], which the policy then expects while it acts."""
    sizes = {(str(data.root), c): frames.shape[1:3] for data in sets for c, frames in data.frames_cache(cameras).items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"expected images of one size (h, w), got {sizes}; resize them alike when you convert the data")
    return list(next(iter(sizes.values())))


def _robots(sets: Sequence[Any], train: Sequence[np.ndarray]) -> list[Embodiment]:
    """The robot of each dataset; those under one card share statistics over the training episodes of all of them."""
    from rvlm.data.dataset import pooled_stats

    cards = [data.require_spec().dataset for data in sets]
    parts = {card: [part for part, of in zip(zip(sets, train, strict=True), cards, strict=True) if of == card] for card in cards}
    stats = {card: pooled_stats(of_card) for card, of_card in parts.items()}
    return [Embodiment(data.require_spec(), stats[card]) for data, card in zip(sets, cards, strict=True)]


def _select_shots(stage: Stage, data: Any, train: np.ndarray) -> np.ndarray:
    """The training episodes, or as many of each task family as `shots` says, drawn by the seed."""
    if not stage.shots:
        return train
    families = data.episodes["family"].to_numpy()[train]
    order = np.random.default_rng((stage.seed, 3)).permutation(len(train))
    drawn = [order[families[order] == family][: stage.shots] for family in sorted(set(families))]
    short = [family for family, rows in zip(sorted(set(families)), drawn, strict=True) if len(rows) < stage.shots]
    if short:
        raise ValueError(
            f"stage {stage.name!r}: expected {stage.shots} training episodes of each family in {data.root}, got fewer of "
            f"{', '.join(short)}; record more, or ask for fewer shots"
        )
    return np.sort(train[np.concatenate(drawn)])


def _policy(stage: Stage, robots: list[Embodiment]) -> tuple[Any, ProcessorMixin]:
    """The stage's policy, which knows the robots of the data; the first of them is the one that it is for."""
    from rvlm.policy.checkpoint_files import is_policy
    from rvlm.policy.checkpoints import make_policy, modify_policy

    commit = commit_on_hub(stage.init)
    how: dict[str, Any] = {"revision": commit, "finetuning": stage.finetuning, "rank": stage.rank, "precision": stage.precision}
    if is_policy(fetch(stage.init, commit)):
        if not stage.is_pretrained:
            raise ValueError(
                f"stage {stage.name!r} starts from the policy in {stage.init}: expected is_pretrained=True, got False; "
                "leave it out, or start from a vision-language model"
            )
        model, processor = modify_policy(stage.init, **how, **stage.policy)
        if len(robots) == 1 and not stage.allow_new_embodiment:
            model.spec.require_same(robots[0].spec, "policy vs demonstrations")
    else:
        how["is_pretrained"] = stage.is_pretrained
        model, processor = make_policy(stage.init, robots[0].spec, robots[0].stats, **how, **stage.policy)
    model.register_embodiments(robots)
    return model, processor


def _embodiment_dataset(
    stage: Stage, model: Any, data: Any, train: np.ndarray, frames: list[np.ndarray] | None, index: int
) -> FixedBudgetDataset:
    """One dataset's samples, by its own robot's statistics."""
    from rvlm.data.windows import Windows

    reworded = _instruction_sampler(stage)
    config, robot = model.config, model.embodiment(data.require_spec())
    cut = (config.n_obs_steps, config.chunk_size, train, robot.stats, config.cameras)
    windows = Windows(data, *cut, dataset_index=index, frames=frames)

    def make(i: int, rng: np.random.Generator) -> Any:
        sample = windows[i]
        sample["instruction"] = reworded(sample["instruction"], rng)
        sample = model.condition_on_embodiment(robot, sample)
        return {**sample, "images": augment(sample["images"], rng, **stage.augment)} if stage.augment else sample

    return FixedBudgetDataset(len(windows), stage.n_samples, stage.seed + index, make)


def _instruction_sampler(stage: Stage) -> Callable[[str, np.random.Generator], str]:
    """Which instruction a sample gets; paraphrases need the tabletop, which knows them."""
    if stage.instructions == "original":
        return lambda recorded, rng: recorded
    from rvlm.envs.tabletop.tasks import paraphrases

    def worded(recorded: str, rng: np.random.Generator) -> str:
        words = paraphrases(recorded)
        return words[int(rng.integers(len(words)))] if stage.instructions == "paraphrased" else words[0]

    return worded


def _with_vqa(stage: Stage, processor: ProcessorMixin, robot: Any, collate: Any) -> tuple[Any, Any]:
    """Some batches of questions about scenes among those of actions: co-training."""
    from rvlm.envs.tabletop.questions import sample_questions
    from rvlm.envs.tabletop.rendered_scenes import Scenes

    scenes = Scenes(stage.vqa_data)
    talk = FixedBudgetDataset(
        len(scenes),
        stage.n_samples,
        stage.seed,
        lambda i, rng: (scenes[i][0], sample_questions(scenes[i][1], rng, **stage.vqa)),
    )
    weights = (1 - stage.vqa_fraction, stage.vqa_fraction)
    mixed = Mixture([robot, talk], weights, stage.n_samples, stage.seed, block=stage.batch_size)
    both = VQACollator(processor)
    return mixed, lambda samples: both(samples) if isinstance(samples[0], tuple) else collate(samples)


STAGE_BUILDERS = {DETECTION: _detection, VISION_LANGUAGE: _vision_language, ROBOT: _robot}
