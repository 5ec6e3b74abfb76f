"""Model, processor, samples and collator of each kind of stage.

The processor is the one that is saved with the model. A vision-language model is trained on images of one tile, and its processor
saved as its files said: whether images are split is the choice of the policy that is made of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, ProcessorMixin

from rvlm.data.augmentation import augment
from rvlm.data.pooled_statistics import pooled_stats
from rvlm.data.sampling import FixedBudgetDataset, Mixture
from rvlm.data.scenes import Scenes
from rvlm.data.windows import EpisodeDataset, Windows, split
from rvlm.files import commit_on_hub
from rvlm.importing import import_by_name
from rvlm.policy.checkpoint_files import is_policy
from rvlm.policy.collation import RobotCollator
from rvlm.policy.config import VLAConfig
from rvlm.policy.embodiments import Embodiment, EmbodimentConditioning
from rvlm.policy.factory import make_policy, modify_policy
from rvlm.policy.hub import fetch
from rvlm.training.action_vocabulary import learn_from_episodes
from rvlm.training.feature_cache import cached_features
from rvlm.training.frozen_backbone import FeaturesOfRows, observation_features, why_at_every_step
from rvlm.training.stages import DETECTION, ROBOT, VISION_LANGUAGE, Stage
from rvlm.vlm.backbones import freeze_vision, load_backbone
from rvlm.vlm.processors import load_processor
from rvlm.vlm.prompts import PromptBuilder
from rvlm.vlm.question_answering import VQACollator


@dataclasses.dataclass(frozen=True)
class QuestionSamples:
    """VQA samples: images (2, h, w, 3) uint8 of a scene, and (question, answer) pairs about it.

    Attributes:
        questions: Name of the function that asks, as `Stage.questions`.
        vqa: Its arguments.
    """

    questions: str
    vqa: dict[str, Any]

    def __call__(self, item: tuple[np.ndarray, dict], rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, str]]]:
        """A scene of `rvlm.data.scenes.Scenes` with random questions."""
        images, scene = item
        return images, import_by_name(self.questions)(scene, rng, **self.vqa)


def _vision_language(stage: Stage) -> tuple[PreTrainedModel, ProcessorMixin, Any, Any]:
    folder = fetch(stage.init, commit_on_hub(stage.init))
    processor, saved_processor = (load_processor(folder, is_tiled) for is_tiled in (False, True))
    model = load_backbone(folder, processor, is_pretrained=stage.is_pretrained)
    scenes, collate = Scenes(stage.data), VQACollator(processor)
    if stage.freeze_vision:
        freeze_vision(model)
        features = cached_features(model, processor, {str(i): images for i, images in enumerate(scenes.images)})
        scenes.images = list(features.values())
    samples = FixedBudgetDataset(scenes, stage.n_samples, stage.seed, QuestionSamples(stage.questions, stage.vqa))
    return model, saved_processor, samples, collate


def _detection(stage: Stage) -> tuple[Any, ProcessorMixin, Any, Any]:
    from rvlm.training.detection import DetectionCollator, Detector

    folder = fetch(stage.init, commit_on_hub(stage.init))
    processor, saved_processor = (load_processor(folder, is_tiled) for is_tiled in (False, True))
    scenes = Scenes(stage.data)
    model = Detector(load_backbone(folder, processor, is_pretrained=stage.is_pretrained), scenes.words)
    samples = FixedBudgetDataset(scenes, stage.n_samples, stage.seed, _unchanged)
    return model, saved_processor, samples, DetectionCollator(processor, scenes.words)


def _unchanged(scene: Any, rng: np.random.Generator) -> Any:
    return scene


def _robot(stage: Stage) -> tuple[PreTrainedModel, ProcessorMixin, Any, Any]:
    datasets = [EpisodeDataset(root) for root in stage.data]
    train = [_select_shots(stage, data, split(data)[0]) for data in datasets]
    model, processor = _load_policy(stage, _embodiments(datasets, train, _relative_chunk(stage)))
    learn_from_episodes(model, datasets, train)
    _set_image_sizes(model, datasets)
    prompt_builder = model.prompt_builder(processor)
    precomputed = _precomputed(stage, model, prompt_builder, datasets, train)
    parts = []
    for i, (data, episodes, given) in enumerate(zip(datasets, train, precomputed, strict=True)):
        embodiment, config = model.embodiment(data.require_spec()), model.config
        window = (config.n_obs_steps, config.chunk_size, episodes, embodiment.stats, config.cameras, config.image_size)
        is_relative = config.relative_chunk is not None
        windows = Windows(data, *window, is_relative, dataset_index=i, **given)
        samples = RobotSamples(embodiment, model.conditioning, stage.instructions, stage.paraphrases, stage.augment)
        parts.append(FixedBudgetDataset(windows, stage.n_samples, stage.seed + i, samples))
    samples: Any = parts[0] if len(parts) == 1 else Mixture(parts, stage.data_weights, stage.n_samples, stage.seed)
    collate: Any = RobotCollator(prompt_builder)
    if stage.vqa_data:
        samples, collate = _with_vqa(stage, processor, samples, collate)
    return model, processor, samples, collate


def _precomputed(
    stage: Stage, model: Any, prompt_builder: PromptBuilder, datasets: Sequence[Any], train: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """What `Windows` of each dataset takes instead of images: features of a frozen backbone or vision tower, if there are any."""
    if stage.freeze_vision:
        freeze_vision(model.backbone)
    rows = [np.flatnonzero(np.isin(data.episode_of_frame, episodes)) for data, episodes in zip(datasets, train, strict=True)]
    is_one_text = all(_has_one_text(data, at) for data, at in zip(datasets, rows, strict=True))
    if why_at_every_step(stage, model, sum(map(len, rows)), is_one_text) is None:
        return [
            {"features": _observation_features(stage, model, prompt_builder, data, at)}
            for data, at in zip(datasets, rows, strict=True)
        ]
    frames = [data.frames_cache(model.config.cameras, model.config.image_size) for data in datasets]
    sizes = {images.shape[-3:-1] for cameras in frames for images in cameras.values()}
    if not stage.freeze_vision or not all(prompt_builder.is_separable(*size) for size in sizes):
        return [{}] * len(datasets)
    processor = prompt_builder.processor
    return [{"frames": list(cached_features(model.backbone, processor, images).values())} for images in frames]


def _has_one_text(data: Any, rows: np.ndarray) -> bool:
    """Whether the rows of each episode have the same instruction."""
    pairs = set(zip(data.episode_of_frame[rows].tolist(), data.task_of_frame[rows].tolist(), strict=True))
    return len(pairs) == len(np.unique(data.episode_of_frame[rows]))


def _observation_features(stage: Stage, model: Any, prompt_builder: PromptBuilder, data: Any, rows: np.ndarray) -> FeaturesOfRows:
    embodiment = model.embodiment(data.require_spec())
    texts = [
        model.conditioning.instruction(embodiment, instruction_of(stage.instructions, data.tasks[task], stage.paraphrases))
        for task in data.task_of_frame[rows].tolist()
    ]
    frames = list(data.frames_cache(model.config.cameras, model.config.image_size).values())
    return observation_features(
        model.backbone, model.config.act_id, prompt_builder, frames, rows, texts, stage.resolved_precision
    )


def _set_image_sizes(model: Any, datasets: Sequence[EpisodeDataset]) -> None:
    """The size that the policy sees, by default that of its first camera, and the sizes of each robot's cameras [px]."""
    config, sizes = model.config, dict(model.config.camera_sizes or {})
    for data in datasets:
        of_cameras = {camera: list(size) for camera, size in data.image_sizes(config.cameras).items()}
        card = data.require_spec().dataset
        if sizes.setdefault(card, of_cameras) != of_cameras:
            raise ValueError(
                f"{data.root}: expected images of {card!r} in the sizes (h, w) of its other recordings, {sizes[card]}, got "
                f"{of_cameras}; resize them alike when you convert the data, or give the data a card of its own"
            )
    config.camera_sizes = sizes
    config.image_size = list(config.image_size or sizes[datasets[0].require_spec().dataset][config.cameras[0]])


def _relative_chunk(stage: Stage) -> int | None:
    """Size of the policy's chunks if its actions are relative to the state."""
    commit = commit_on_hub(stage.init)
    start = VLAConfig.from_pretrained(folder) if is_policy(folder := fetch(stage.init, commit)) else VLAConfig()
    settings = {name: stage.policy.get(name, getattr(start, name)) for name in ("action_representation", "chunk_size")}
    return settings["chunk_size"] if settings["action_representation"] == "relative" else None


def _embodiments(datasets: Sequence[Any], train: Sequence[np.ndarray], relative_chunk: int | None = None) -> list[Embodiment]:
    """The embodiment of each dataset; datasets with the same data card share statistics, over all their training episodes."""
    cards = [data.require_spec().dataset for data in datasets]
    of_card = {
        card: [part for part, c in zip(zip(datasets, train, strict=True), cards, strict=True) if c == card] for card in cards
    }
    stats = {card: pooled_stats(parts, relative_chunk=relative_chunk) for card, parts in of_card.items()}
    return [Embodiment(data.require_spec(), stats[card]) for data, card in zip(datasets, cards, strict=True)]


def _select_shots(stage: Stage, data: Any, train: np.ndarray) -> np.ndarray:
    """The training episodes, or a random subset of `shots` per task."""
    if not stage.shots:
        return train
    has_tasks = "task" in data.episodes  # else instructions tell tasks apart
    tasks = data.episodes["task"].to_numpy()[train] if has_tasks else np.array([data.instruction(i) for i in train])
    order = np.random.default_rng((stage.seed, 3)).permutation(len(train))
    drawn = [order[tasks[order] == task][: stage.shots] for task in sorted(set(tasks))]
    short = [task for task, rows in zip(sorted(set(tasks)), drawn, strict=True) if len(rows) < stage.shots]
    if short:
        raise ValueError(
            f"stage {stage.name!r}: expected {stage.shots} training episodes of each task in {data.root}, got fewer of "
            f"{', '.join(short)}; record more, or use fewer shots"
        )
    return np.sort(train[np.concatenate(drawn)])


def _load_policy(stage: Stage, embodiments: list[Embodiment]) -> tuple[Any, ProcessorMixin]:
    """The stage's policy, with the embodiments of the data registered; a new policy's default is the first."""
    commit, specs = commit_on_hub(stage.init), [robot.spec for robot in embodiments]
    kwargs: dict[str, Any] = {
        "revision": commit,
        "finetuning": stage.finetuning,
        "lora_rank": stage.lora_rank,
        "precision": stage.precision,
        "attn_implementation": stage.attn_implementation,
    }
    if is_policy(fetch(stage.init, commit)):
        if not stage.is_pretrained:
            raise ValueError(
                f"stage {stage.name!r} starts from the policy in {stage.init}: expected is_pretrained=True, got False; "
                "leave it out, or start from a vision-language model"
            )
        model, processor = modify_policy(stage.init, **kwargs, specs=specs, **stage.policy)
        if len(embodiments) == 1 and not stage.allow_new_embodiment:
            model.spec.require_same(embodiments[0].spec, "policy vs demonstrations")
    else:
        kwargs["is_pretrained"] = stage.is_pretrained
        model, processor = make_policy(
            stage.init,
            embodiments[0].spec,
            embodiments[0].stats,
            **kwargs,
            specs=specs,
            **stage.policy,
        )
    model.register_embodiments(embodiments)
    return model, processor


@dataclasses.dataclass(frozen=True)
class RobotSamples:
    """Windows of one dataset as training samples: normalised, conditioned on the embodiment, augmented.

    Attributes:
        embodiment: The dataset's, with its statistics.
        conditioning: The policy's.
        instructions, paraphrases, augment: As of `Stage`.
    """

    embodiment: Embodiment
    conditioning: EmbodimentConditioning
    instructions: str
    paraphrases: str
    augment: dict[str, Any]

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """A window, with a random paraphrase and augmentation."""
        instruction = instruction_of(self.instructions, sample["instruction"], self.paraphrases, rng)
        sample = self.conditioning(self.embodiment, {**sample, "instruction": instruction})
        return {**sample, "images": augment(sample["images"], rng, **self.augment)} if self.augment else sample


def instruction_of(kind: str, original: str, paraphrases: str, rng: np.random.Generator | None = None) -> str:
    """The instruction of a sample: the original, the canonical one of its task, or a paraphrase that `rng` draws."""
    if kind == "original":
        return original
    options = import_by_name(paraphrases)(original)
    return options[0] if rng is None or kind == "canonical" else options[int(rng.integers(len(options)))]


def _with_vqa(stage: Stage, processor: ProcessorMixin, robot: Any, collate: Any) -> tuple[Any, Any]:
    """Co-training: whole batches of VQA among those of actions."""
    scenes = Scenes(stage.vqa_data)
    questions = FixedBudgetDataset(scenes, stage.n_samples, stage.seed, QuestionSamples(stage.questions, stage.vqa))
    weights = (1 - stage.vqa_fraction, stage.vqa_fraction)
    mixed = Mixture([robot, questions], weights, stage.n_samples, stage.seed, block=stage.batch_size)
    return mixed, CoTrainingCollator(collate, VQACollator(processor))


@dataclasses.dataclass(frozen=True)
class CoTrainingCollator:
    """Collates a whole batch of actions, or of VQA.

    Attributes:
        robot: Of windows of demonstrations.
        vqa: Of scenes with questions.
    """

    robot: RobotCollator
    vqa: VQACollator

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Samples of one of the two kinds to a batch."""
        return (self.vqa if isinstance(samples[0], tuple) else self.robot)(samples)


STAGE_BUILDERS = {DETECTION: _detection, VISION_LANGUAGE: _vision_language, ROBOT: _robot}
