"""Recipes: the stages of the shipped models, at full or notebook size, and stage sequences to compare.

Stages and demonstrations are cached in the artifacts folder, so every recipe resumes.
"""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from rvlm.caches import Code, register
from rvlm.data.windows import EpisodeDataset
from rvlm.envs.demonstrations import Collection, collect_demonstrations
from rvlm.envs.tabletop.questions import QUESTION_KINDS, location_tokens, vocabulary
from rvlm.envs.tabletop.rendered_scenes import collect_scenes
from rvlm.files import artifacts_dir, make_folder
from rvlm.training.launch import train
from rvlm.training.stages import DETECTION, ROBOT, VISION_LANGUAGE, Stage
from rvlm.vlm.backbones import SMALL_VLM
from rvlm.vlm.small import small_vlm, train_tokenizer

POLICY = SMALL_VLM.parent / "policy"  # the shipped policy
SCENE_SEED, FRESH_SCENE_SEED, HELD_OUT_SCENE_SEED = 1_000, 2_000, 500_000  # stage 1: training, its last step, evaluation
UNSEEN_SEED = 850_000  # first seed of demonstrations for evaluation only
UNTRAINED = Code(("rvlm.vlm.small", "rvlm.envs.tabletop.questions", "rvlm.experiments.recipes:untrained_vlm"))
HARD_QUESTIONS = ("where", "offset", "side", "color", "count")  # kinds of questions that are learned last
APPEARANCE_QUESTIONS = ("color", "shape", "count")  # ... and those about an object of about six pixels
ONE_STEP = {"structure": "one_step", "head": "mlp", "chunk_size": 4}
DISCRETE = {"structure": "one_step", "head": "tokens", "chunk_size": 4}
INTERLEAVED = {"structure": "interleaved", "head": "mlp", "n_obs_steps": 4, "chunk_size": 4}
POLICY_HEAD = {"structure": "policy_head", "head": "mlp", "history": "lstm", "n_obs_steps": 4, "chunk_size": 4}


def untrained_vlm(seed: int = 0) -> Path:
    """Folder of the small vision-language model before stage 1: trained tokenizer, random weights."""

    def fill(part: Path) -> None:
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(vocabulary(), location_tokens())
        model, processor = small_vlm(tokenizer)
        model.save_pretrained(part)
        processor.save_pretrained(part)

    final = make_folder(artifacts_dir() / "stages" / f"untrained-vlm-{seed}-{UNTRAINED.hash}", fill)
    return register(final, UNTRAINED, {"seed": seed})


def _n_processes(n_samples: int) -> int:
    """Two, or one for stages shorter than the start of a second process (ten seconds on two cores)."""
    return 2 if n_samples >= 500 else 1


def vision_language(n_scenes: int, n_samples: int, seed: int = 0) -> Stage:
    """Stage 1 on rendered scenes, in six steps.

    The vision tower learns detection; the language model learns pointing, questions, and hard questions; then all weights are
    trained, at last on twice as many new scenes, since details of appearance are memorised from scenes that were seen often.
    Pointing (a name -> its location) comes first because word-location binding is learned faster on it than on free questions.
    The tower is frozen while the language model learns, so its features are computed once. The budgets of all steps are
    multiples of `n_samples`.
    """
    scenes = tuple(map(str, collect_scenes(n_scenes, SCENE_SEED)))
    shared: dict[str, Any] = {"seed": seed, "n_processes": _n_processes(4 * n_samples)}  # of the shortest step
    frozen: dict[str, Any] = {"freeze_vision": True, "learning_rate": 2e-3, **shared}
    tower = Stage(
        "detection", DETECTION, scenes, str(untrained_vlm(seed)), 12 * n_samples,
        batch_size=32, learning_rate=1.5e-3, **shared,
    )  # fmt: skip
    point = {"n": 10, "kinds": ("point", "point_wrist")}
    pointing = Stage("pointing", VISION_LANGUAGE, scenes, str(train(tower)), 8 * n_samples, vqa=point, **frozen)
    answering = Stage("answering", VISION_LANGUAGE, scenes, str(train(pointing)), 4 * n_samples, vqa={"n": 8}, **frozen)
    hard = {"n": 8, "kinds": HARD_QUESTIONS}
    drilling = Stage("drilling", VISION_LANGUAGE, scenes, str(train(answering)), 6 * n_samples, vqa=hard, **frozen)
    all_weights: dict[str, Any] = {"batch_size": 32, "learning_rate": 1e-3, **shared}
    together = Stage("together", VISION_LANGUAGE, scenes, str(train(drilling)), 7 * n_samples, vqa={"n": 8}, **all_weights)
    fresh = tuple(map(str, collect_scenes(2 * n_scenes, FRESH_SCENE_SEED)))
    appearance = {"n": 8, "kinds": (*QUESTION_KINDS, *APPEARANCE_QUESTIONS, *APPEARANCE_QUESTIONS)}
    return Stage("vision_language", VISION_LANGUAGE, fresh, str(train(together)), 5 * n_samples, vqa=appearance, **all_weights)


def in_domain(data: Collection | str | Path, n_samples: int, init: str | Path = SMALL_VLM, **changes: Any) -> Stage:
    """Stage 2: robot fine-tuning.

    Args:
        data: Demonstrations of the tabletop, or the folder of a dataset.
        n_samples: Budget.
        init: Vision-language model: folder or Hub name.
        changes: Fields of `Stage`.
    """
    folder = collect_demonstrations(data) if isinstance(data, Collection) else data
    return Stage("in_domain", ROBOT, (str(folder),), str(init), n_samples, **{"policy": ONE_STEP, **changes})


def main_policy(data: Collection | str | Path, n_samples: int, seed: int = 0, **changes: Any) -> Stage:
    """The policy of notebooks 05 and 06, and, at full size, the shipped one; arguments as of `in_domain`.

    Vision tower and connector are frozen, which allows three times the samples in the same time on a CPU.
    """
    shared: dict[str, Any] = {"seed": seed, "n_processes": _n_processes(n_samples), "freeze_vision": True}
    return in_domain(data, n_samples, **{**shared, **changes})


def random_backbone_policy(data: Collection | str | Path, n_samples: int, seed: int = 0, **changes: Any) -> Stage:
    """Baseline of what state and head achieve alone: the backbone is random and frozen; arguments as of `in_domain`."""
    frozen: dict[str, Any] = {"freeze_vision": True, "finetuning": "head", "is_pretrained": False}
    return in_domain(data, n_samples, seed=seed, **changes, **frozen)


def unseen_demonstrations(n_episodes: int, image_size: int = 96) -> EpisodeDataset:
    """Demonstrations that no policy is trained on, to compare open-loop errors of policies with different training data.

    The episodes are the same at every size of their images [px].
    """
    collection = Collection(n_episodes=n_episodes, first_seed=UNSEEN_SEED, image_size=image_size)
    return EpisodeDataset(collect_demonstrations(collection))


@dataclasses.dataclass(frozen=True)
class RecipeStage:
    """One stage of a recipe.

    Attributes:
        name: Of the stage.
        robots: Robots of the demonstrations: "target", or "all" in equal shares.
        share: Of the recipe's budget of samples.
        with_vqa: Co-training with questions about scenes.
    """

    name: str
    robots: str
    share: float
    with_vqa: bool = False


_CROSS, _OWN = RecipeStage("cross_embodiment", "all", 0.5), RecipeStage("in_domain", "target", 0.5)
# Sequences of stages after vision-language pre-training ("vl"), all with one budget. Source: RoboVLMs (arXiv 2412.14058), section
# on cross-embodiment data: in-domain alone, cross-embodiment, and both ("post-train").
RECIPES: dict[str, tuple[RecipeStage, ...]] = {
    "scratch": (RecipeStage("in_domain", "target", 1.0),),
    "vl -> in_domain": (RecipeStage("in_domain", "target", 1.0),),
    "vl -> cross_embodiment": (RecipeStage("cross_embodiment", "all", 1.0),),
    "vl -> cross_embodiment -> in_domain": (_CROSS, _OWN),
    "vl -> in_domain -> cross_embodiment": (_OWN, _CROSS),
    "vl -> co_train": (RecipeStage("co_train", "all", 1.0, with_vqa=True),),
}


@dataclasses.dataclass(frozen=True)
class ExperimentSetup:
    """Data and budget of a recipe; the same for all that are compared.

    Attributes:
        target: Demonstrations of the target robot.
        others: Demonstrations of other robots.
        n_samples: Budget of all stages together.
        n_scenes: Scenes of the questions in co-training.
        changes: Fields of `Stage` to change from its defaults.
        vlm: Vision-language model that every recipe starts from, or, for `scratch`, its architecture: folder or Hub name.
    """

    target: Collection
    others: tuple[Collection, ...]
    n_samples: int
    n_scenes: int = 400
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    vlm: str = str(SMALL_VLM)


SCRATCH: dict[str, Any] = {"is_pretrained": False, "freeze_vision": False}  # random weights, none frozen
SHARED_TASKS = ("move_slider_left", "move_slider_right", "open_drawer", "turn_on_light", "push_left", "push_right")


def low_data_target(
    n_target: int, n_others: int, n_samples: int, vlm: str | Path = SMALL_VLM, image_size: int = 96, **changes: Any
) -> ExperimentSetup:
    """Setup of notebooks 05, 07 and 08: few demonstrations of the target robot, more of two others, the same tasks for all.

    Vision tower and connector are frozen, except for the recipe `scratch` (see `train_recipe`).

    Args:
        n_target: Demonstrations of the target robot.
        n_others: Of each other robot.
        n_samples: Budget of all stages together.
        vlm: As of `ExperimentSetup`.
        image_size: Of all demonstrations [px].
        changes: Fields of `Stage`.
    """
    changes = {"freeze_vision": True, "batch_size": 8, **changes}
    target = Collection(n_episodes=n_target, tasks=SHARED_TASKS, image_size=image_size)
    others = tuple(Collection(f"tabletop/{robot}", n_others, SHARED_TASKS, image_size=image_size) for robot in ("ur6", "small5"))
    return ExperimentSetup(target, others, n_samples, changes=changes, vlm=str(vlm))


def train_recipe(recipe: str, setup: ExperimentSetup, seed: int = 0, n_threads: int | None = None) -> list[Path]:
    """Train the stages of a recipe in sequence; stages that it shares with another recipe are cached.

    `scratch` trains every weight, whatever the setup freezes: a frozen vision tower of random weights would see nothing.

    Args:
        recipe: Name in `RECIPES`.
        setup: Data and budget.
        seed: Of every stage.
        n_threads: Of each training process.

    Returns:
        The model's folder after each stage.

    Raises:
        ValueError: An unknown recipe, or one with other robots where the setup has none.
    """
    if recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}")
    if not setup.others and any(stage.robots == "all" for stage in RECIPES[recipe]):
        raise ValueError(f"recipe {recipe!r} trains on other robots too; expected demonstrations in others, got none")
    target = str(collect_demonstrations(setup.target))
    all_robots = (target, *(str(collect_demonstrations(other)) for other in setup.others))
    model, models = setup.vlm, []
    for stage in RECIPES[recipe]:
        scenes = tuple(map(str, collect_scenes(setup.n_scenes, SCENE_SEED))) if stage.with_vqa else ()
        fields = {"policy": ONE_STEP, "seed": seed, "vqa_data": scenes, **setup.changes}
        fields |= SCRATCH if recipe == "scratch" else {}
        data, n_samples = all_robots if stage.robots == "all" else (target,), round(stage.share * setup.n_samples)
        model = train(Stage(stage.name, ROBOT, data, str(model), n_samples, **fields), n_threads=n_threads)
        models.append(model)
    return models


def train_recipes_parallel(
    recipes: Sequence[str], setup: ExperimentSetup, seeds: Sequence[int]
) -> dict[tuple[str, int], list[Path]]:
    """Train recipes with several seeds in parallel, one process each, as many at a time as there are cores; with a GPU, one."""
    single = dataclasses.replace(setup, changes={"n_processes": 1, **setup.changes})
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else os.cpu_count()) as pool:
        futures = {(recipe, seed): pool.submit(train_recipe, recipe, single, seed, 1) for seed in seeds for recipe in recipes}
        return {key: future.result() for key, future in futures.items()}
