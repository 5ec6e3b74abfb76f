"""Recipes: which stages make the shipped models, the same stages at the size of a notebook, and the orders that are compared.

`rvlm vlm` and `rvlm policy` run them at full size and put the result, with a card that says how it was made, where the
package ships it. Stages and demonstrations are kept in the artifacts folder, so every recipe resumes.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from rvlm.caches import Code, register
from rvlm.data.windows import EpisodeDataset
from rvlm.envs.tabletop.demonstrations import Collection, collect_demonstrations
from rvlm.envs.tabletop.questions import QUESTION_KINDS, location_tokens, vocabulary
from rvlm.envs.tabletop.rendered_scenes import collect_scenes
from rvlm.files import artifacts_dir, make_folder, replace_folder, temporary
from rvlm.provenance import provenance
from rvlm.training.launch import train
from rvlm.training.stages import DETECTION, ROBOT, VISION_LANGUAGE, Stage
from rvlm.training.trainer import training_seconds
from rvlm.vlm.backbones import SMALL_VLM
from rvlm.vlm.small import small_vlm, train_tokenizer

POLICY = SMALL_VLM.parent / "policy"  # the shipped policy
SCENE_SEED, FRESH_SCENE_SEED, HELD_OUT_SCENE_SEED = 1_000, 2_000, 500_000  # of the scenes of stage 1: training, its end, exam
UNSEEN_SEED = 850_000  # first seed of demonstrations that are kept for measuring
UNTRAINED = Code(("rvlm.vlm.small", "rvlm.envs.tabletop.questions", "rvlm.experiments.recipes:untrained_vlm"))
HARD_QUESTIONS = ("where", "offset", "side", "color", "count")  # kinds of questions that are learned last
APPEARANCE_QUESTIONS = ("color", "shape", "count")  # ... and those that hang on an object of six pixels
ONE_STEP = {"structure": "one_step", "head": "mlp", "chunk_size": 4}
DISCRETE = {"structure": "one_step", "head": "tokens", "chunk_size": 4}
INTERLEAVED = {"structure": "interleaved", "head": "mlp", "n_obs_steps": 4, "chunk_size": 4}
POLICY_HEAD = {"structure": "policy_head", "head": "mlp", "history": "lstm", "n_obs_steps": 4, "chunk_size": 4}


def untrained_vlm(seed: int = 0) -> Path:
    """Folder of the small vision-language model before stage 1: tokenizer trained, weights random."""

    def fill(part: Path) -> None:
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(vocabulary(), location_tokens())
        model, processor = small_vlm(tokenizer)
        model.save_pretrained(part)
        processor.save_pretrained(part)

    final = make_folder(artifacts_dir() / "stages" / f"untrained-vlm-{seed}-{UNTRAINED.hash}", fill)
    return register(final, UNTRAINED, {"seed": seed})


def _n_processes(n_samples: int) -> int:
    """Two, unless a stage is over before a second process has started, which takes ten seconds on two cores."""
    return 2 if n_samples >= 500 else 1


def vision_language(n_scenes: int, n_samples: int, seed: int = 0) -> Stage:
    """Stage 1 on rendered scenes, in six steps.

    The tower detects; the language model points, answers, and answers what is hard; then everything learns together, at last
    on twice as many scenes that no step before has shown, for details of looks are learned by heart from those seen often.
    Pointing (a name, and where it is) comes before free questions because the circuit that binds a word to a place forms
    sooner on it. The tower stands still while the language model learns, so its features are computed once and a step
    costs little. The budgets of all steps are multiples of `n_samples`.
    """
    scenes = tuple(map(str, collect_scenes(n_scenes, SCENE_SEED)))
    shared: dict[str, Any] = {"seed": seed, "n_processes": _n_processes(4 * n_samples)}  # of its shortest step
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
    whole: dict[str, Any] = {"batch_size": 32, "learning_rate": 1e-3, **shared}
    together = Stage("together", VISION_LANGUAGE, scenes, str(train(drilling)), 7 * n_samples, vqa={"n": 8}, **whole)
    fresh = tuple(map(str, collect_scenes(2 * n_scenes, FRESH_SCENE_SEED)))
    looks = {"n": 8, "kinds": (*QUESTION_KINDS, *APPEARANCE_QUESTIONS, *APPEARANCE_QUESTIONS)}
    return Stage("vision_language", VISION_LANGUAGE, fresh, str(train(together)), 5 * n_samples, vqa=looks, **whole)


def in_domain(collection: Collection, n_samples: int, init: str | Path = SMALL_VLM, **changes: Any) -> Stage:
    """Stage 2: robot fine-tuning on the tabletop's demonstrations; `changes` are fields of `Stage`."""
    data = (str(collect_demonstrations(collection)),)
    return Stage("in_domain", ROBOT, data, str(init), n_samples, **{"policy": ONE_STEP, **changes})


def main_policy(n_episodes: int, n_samples: int, seed: int = 0) -> Stage:
    """The policy of notebooks 05 and 06, and, at full size, the shipped one.

    Vision tower and connector stay as stage 1 left them: on a CPU the same minutes then show three times the samples.
    """
    shared: dict[str, Any] = {"seed": seed, "n_processes": _n_processes(n_samples)}
    return in_domain(Collection(n_episodes=n_episodes), n_samples, freeze_vision=True, **shared)


def main_data(n_episodes: int) -> EpisodeDataset:
    """The demonstrations of `main_policy`."""
    return EpisodeDataset(collect_demonstrations(Collection(n_episodes=n_episodes)))


def random_backbone_policy(n_episodes: int, n_samples: int, seed: int = 0) -> Stage:
    """A probe of what state and head alone can do: the backbone is random and, on purpose, frozen."""
    frozen: dict[str, Any] = {"freeze_vision": True, "finetuning": "head", "is_pretrained": False}
    return in_domain(Collection(n_episodes=n_episodes), n_samples, seed=seed, **frozen)


def unseen_demonstrations(n_episodes: int) -> EpisodeDataset:
    """Demonstrations that no policy is ever trained on, to measure open-loop error of policies with different training data."""
    return EpisodeDataset(collect_demonstrations(Collection(n_episodes=n_episodes, first_seed=UNSEEN_SEED)))


@dataclasses.dataclass(frozen=True)
class RecipeStage:
    """One stage of a recipe.

    Attributes:
        name: What it is called.
        robots: Whose demonstrations: "target" alone, or "all" in equal shares.
        share: Of the recipe's budget of samples.
        asks: Whether questions about scenes are mixed in (co-training).
    """

    name: str
    robots: str
    share: float
    asks: bool = False


_CROSS, _OWN = RecipeStage("cross_embodiment", "all", 0.5), RecipeStage("in_domain", "target", 0.5)
# Orders of stages after vision-language pre-training ("vl"), all at one budget. Source: RoboVLMs (arXiv 2412.14058), section on
# cross-embodiment data: in-domain alone, cross-embodiment, and both ("post-train").
RECIPES: dict[str, tuple[RecipeStage, ...]] = {
    "scratch": (RecipeStage("in_domain", "target", 1.0),),
    "vl -> in_domain": (RecipeStage("in_domain", "target", 1.0),),
    "vl -> cross_embodiment": (RecipeStage("cross_embodiment", "all", 1.0),),
    "vl -> cross_embodiment -> in_domain": (_CROSS, _OWN),
    "vl -> in_domain -> cross_embodiment": (_OWN, _CROSS),
    "vl -> co_train": (RecipeStage("co_train", "all", 1.0, asks=True),),
}


@dataclasses.dataclass(frozen=True)
class ExperimentSetup:
    """What a recipe is followed with; the same for all that are compared.

    Attributes:
        target: Demonstrations of the robot that the policy is for.
        others: Demonstrations of other robots.
        n_samples: Budget of all stages together.
        n_scenes: Scenes of which co-training asks.
        changes: Fields of `Stage` that differ from its own.
    """

    target: Collection
    others: tuple[Collection, ...]
    n_samples: int
    n_scenes: int = 400
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


SCRATCH: dict[str, Any] = {"is_pretrained": False, "freeze_vision": False}  # random weights, of which none may be frozen
SHARED_TASKS = ("move_slider_left", "move_slider_right", "open_drawer", "turn_on_light", "push_left", "push_right")


def low_data_target(n_target: int, n_others: int, n_samples: int) -> ExperimentSetup:
    """The course of notebooks 07 and 08: few demonstrations of the target robot, more of two others, the same tasks for all.

    Vision tower and connector are frozen, except for the recipe `scratch` (see `train_recipe`).
    """
    changes = {"freeze_vision": True, "batch_size": 8}
    others = tuple(Collection(robot, n_others, SHARED_TASKS) for robot in ("ur6", "small5"))
    return ExperimentSetup(Collection(n_episodes=n_target, families=SHARED_TASKS), others, n_samples, changes=changes)


def train_recipe(recipe: str, course: ExperimentSetup, seed: int = 0, n_threads: int | None = None) -> list[Path]:
    """Train a recipe's stages one after another; what another recipe has begun alike is not trained again.

    In `scratch` every weight learns, whatever the course freezes: a frozen vision tower of random weights would see nothing.

    Args:
        recipe: Name in `RECIPES`.
        course: Data and budget.
        seed: Of every stage.
        n_threads: Of each process that trains.

    Returns:
        The model's folder after each stage.

    Raises:
        ValueError: An unknown recipe, or one that needs other robots where there are none.
    """
    if recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}")
    if not course.others and any(step.robots == "all" for step in RECIPES[recipe]):
        raise ValueError(f"recipe {recipe!r} learns from other robots too; expected others with demonstrations, got none")
    target = str(collect_demonstrations(course.target))
    everyone = (target, *(str(collect_demonstrations(other)) for other in course.others))
    model, models = SMALL_VLM, []
    for step in RECIPES[recipe]:
        asked = {"vqa_data": tuple(map(str, collect_scenes(course.n_scenes, SCENE_SEED)))} if step.asks else {}
        fixed = {"policy": ONE_STEP, "seed": seed, **asked, **course.changes, **(SCRATCH if recipe == "scratch" else {})}
        data = everyone if step.robots == "all" else (target,)
        model = train(
            Stage(step.name, ROBOT, data, str(model), round(step.share * course.n_samples), **fixed), n_threads=n_threads
        )
        models.append(model)
    return models


def train_recipes_parallel(
    recipes: Sequence[str], course: ExperimentSetup, seeds: Sequence[int]
) -> dict[tuple[str, int], list[Path]]:
    """Follow recipes with several seeds at the same time, one process each on the cores that there are."""
    alone = dataclasses.replace(course, changes={"n_processes": 1, **course.changes})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = {(recipe, seed): pool.submit(train_recipe, recipe, alone, seed, 1) for seed in seeds for recipe in recipes}
        return {key: models.result() for key, models in made.items()}


def release(stage: Stage, target: Path, command: str) -> Path:
    """Train `stage` and put its model where the package ships it, with a card of how it and what it started from were made.

    One after another, where several do; at any moment one whole model is there.
    """
    model = train(stage)
    with FileLock(target.with_name(f".{target.name}.lock")):
        for left in target.parent.glob(f".{target.name}.*.part"):  # by one that was killed
            shutil.rmtree(left)
        part = temporary(target)
        shutil.copytree(model, part)
        card = {"command": command, "stages": [_told(folder) for folder in stage_lineage(model)], **provenance()}
        (part / "made.json").write_text(json.dumps(card, indent=1))
        replace_folder(part, target)
        shutil.rmtree(part, ignore_errors=True)
    return target


def stage_lineage(model: str | Path) -> list[Path]:
    """Folders of the stages that made a model, the first first."""
    folder = Path(model).parent
    if not (folder / "stage.json").exists():
        return []
    return [*stage_lineage(json.loads((folder / "stage.json").read_text())["init"]), folder]


def _told(folder: Path) -> dict[str, Any]:
    """A stage's settings, with how many folders of data it read, what it started from, and how long it took."""
    stage = json.loads((folder / "stage.json").read_text())
    start = "/".join(Path(stage["init"]).parts[-2:])
    return {**stage, "data": len(stage["data"]), "init": start, "seconds": training_seconds(folder)}
