"""Recipes, few shots, continual learning and corrections, each at the size of a handful of episodes."""

import dataclasses
import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from rvlm.data.errors import SpecMismatch
from rvlm.data.windows import EpisodeDataset
from rvlm.envs import FIRST_HELD_OUT_SEED
from rvlm.envs.demonstrations import Collection
from rvlm.envs.tabletop.env import Tabletop
from rvlm.experiments.dagger import FIRST_SEED, DAggerCollection, collect_corrections, rollout_with_expert_labels
from rvlm.experiments.few_shot import FewShot, continual_learning, few_shot_experiment
from rvlm.experiments.recipes import (
    POLICY,
    RECIPES,
    SCRATCH,
    ExperimentSetup,
    low_data_target,
    main_policy,
    random_backbone_policy,
    train_recipe,
    train_recipes_parallel,
)
from rvlm.experiments.release import release
from rvlm.policy.model import VLAConfig
from rvlm.policy.policy import load_policy
from rvlm.training.stages import DETECTION, Stage
from rvlm.vlm.backbones import SMALL_VLM

TINY = {"n_episodes": 10, "tasks": ("move_slider_left",)}
SHORT = {"batch_size": 8, "n_processes": 1}


@pytest.fixture(scope="module")
def experiment(home):
    """Ten demonstrations each of two robots."""
    return ExperimentSetup(Collection(**TINY), (Collection("tabletop/ur6", **TINY),), n_samples=16, n_scenes=12, changes=SHORT)


def stage_of(model):
    return json.loads((model.parent / "stage.json").read_text())


def test_a_recipe_is_its_stages_in_order_at_one_budget():
    assert set(RECIPES) >= {"scratch", "vl -> in_domain", "vl -> co_train", "vl -> cross_embodiment -> in_domain"}
    for name, steps in RECIPES.items():
        assert [step.name for step in steps] == name.removeprefix("vl -> ").replace("scratch", "in_domain").split(" -> ")
        assert sum(step.share for step in steps) == 1.0


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_its_stages(experiment, recipe):
    models = train_recipe(recipe, experiment, n_threads=1)
    assert len(models) == len(RECIPES[recipe])
    for step, model in zip(RECIPES[recipe], models, strict=True):
        stage = stage_of(model)
        assert (stage["name"], len(stage["data"])) == (step.name, 2 if step.robots == "all" else 1)
        assert stage["n_samples"] == 16 * step.share and bool(stage["vqa_data"]) == step.with_vqa
        assert stage["is_pretrained"] == (recipe != "scratch")
    starts = [str(SMALL_VLM), *map(str, models)]
    assert [stage_of(model)["init"] for model in models] == starts[: len(models)]
    config = VLAConfig.from_pretrained(models[-1])
    assert config.spec["robot"] == "franka7" and (config.embodiments is None) == all(
        s.robots == "target" for s in RECIPES[recipe]
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_random_vision_tower_is_never_frozen(recipe, monkeypatch):
    """The stages of notebooks 05, 07 and 08 as they are built: pre-trained towers are frozen, the random one learns."""
    built = []
    monkeypatch.setattr("rvlm.experiments.recipes.collect_demonstrations", lambda collection: Path(collection.spec.robot))
    monkeypatch.setattr("rvlm.experiments.recipes.collect_scenes", lambda n, seed: [Path("scenes")])
    monkeypatch.setattr("rvlm.experiments.recipes.train", lambda stage, n_threads=None: built.append(stage) or Path("model"))
    train_recipe(recipe, low_data_target(10, 10, 64))
    assert [stage.freeze_vision for stage in built] == [recipe != "scratch"] * len(RECIPES[recipe])
    assert [stage.is_pretrained for stage in built] == [recipe != "scratch"] * len(RECIPES[recipe])


def test_the_few_shot_start_from_scratch_learns_everything_and_the_probe_nothing_but_its_head(monkeypatch):
    monkeypatch.setattr("rvlm.experiments.few_shot.collect_demonstrations", lambda collection: Path("demos"))
    monkeypatch.setattr("rvlm.experiments.recipes.collect_demonstrations", lambda collection: Path("demos"))
    few = FewShot(("close_drawer",), changes=low_data_target(10, 10, 64).changes)
    starts = {"scratch": {"init": SMALL_VLM, **SCRATCH}, "vision-language": {"init": SMALL_VLM}}
    built = {name: few.stage(shots=1, seed=0, **start) for name, start in starts.items()}
    assert {name: (s.freeze_vision, s.is_pretrained) for name, s in built.items()} == {
        "scratch": (False, False),
        "vision-language": (True, True),
    }
    baseline = random_backbone_policy(Collection(n_episodes=10), 64)
    assert (baseline.freeze_vision, baseline.is_pretrained, baseline.finetuning) == (True, False, "head")


def test_recipes_start_from_any_model_and_train_on_any_dataset(monkeypatch):
    """As notebooks 05, 06 and 08 name them by their parameters; nothing is recorded for a dataset of one's own."""
    built = []
    monkeypatch.setattr("rvlm.experiments.recipes.collect_demonstrations", lambda collection: Path(collection.spec.robot))
    monkeypatch.setattr("rvlm.experiments.recipes.collect_scenes", lambda n, seed: [Path("scenes")])
    monkeypatch.setattr("rvlm.experiments.recipes.train", lambda stage, n_threads=None: built.append(stage) or Path("model"))
    train_recipe("vl -> cross_embodiment -> in_domain", low_data_target(10, 10, 64, "lab/vlm", learning_rate=1e-4))
    train_recipe("scratch", low_data_target(10, 10, 64, "lab/vlm", learning_rate=1e-4))
    assert [(stage.init, stage.learning_rate) for stage in built] == [("lab/vlm", 1e-4), ("model", 1e-4), ("lab/vlm", 1e-4)]
    changes = {"init": "lab/vlm", "batch_size": 32, "gradient_accumulation_steps": 4}
    own = main_policy("own", 64, finetuning="qlora", **changes)
    assert (own.data, own.init, own.finetuning, own.gradient_accumulation_steps) == (("own",), "lab/vlm", "qlora", 4)
    recorded = main_policy(Collection(n_episodes=10), 64)
    assert recorded.data == ("franka7",) and recorded.init == str(SMALL_VLM)
    probe = random_backbone_policy(Collection(n_episodes=10), 64, **changes)
    assert (probe.init, probe.finetuning, probe.is_pretrained) == ("lab/vlm", "head", False)


def test_what_recipes_share_is_trained_once(experiment):
    """Recipes with the same first stage share it; trained again, nothing is repeated."""
    made = train_recipes_parallel(["vl -> cross_embodiment -> in_domain", "vl -> in_domain"], experiment, seeds=[0])
    stamp = {path: path.stat().st_mtime_ns for models in made.values() for path in models}
    again = train_recipes_parallel(["vl -> cross_embodiment -> in_domain", "vl -> in_domain"], experiment, seeds=[0])
    assert again == made and {path: path.stat().st_mtime_ns for path in stamp} == stamp
    half = dataclasses.replace(experiment, n_samples=32)
    assert train_recipe("vl -> in_domain -> cross_embodiment", half, n_threads=1)[0] == made["vl -> in_domain", 0][0]


def test_impossible_recipes_are_refused(experiment):
    with pytest.raises(ValueError, match="no recipe 'vl'; there are scratch, vl -> in_domain"):
        train_recipe("vl", experiment)
    with pytest.raises(ValueError, match="trains on other robots too; expected demonstrations in others, got none"):
        train_recipe("vl -> co_train", dataclasses.replace(experiment, others=()))


def test_few_shots_are_adapted_to_and_evaluated_in_new_scenes(home):
    few = FewShot(
        ("move_slider_left",), shots=(1, 2), n_query=2, n_samples=16, seeds=(0,), changes={**SHORT, "freeze_vision": True}
    )
    starts = {"policy": {"init": POLICY}, "policy, head": {"init": POLICY, "finetuning": "head"}, "VL": {"init": SMALL_VLM}}
    episodes = few_shot_experiment(starts, few, n_workers=1)
    assert len(episodes) == 3 * 2 * 2 and set(episodes["start"]) == set(starts) and set(episodes["shots"]) == {1, 2}
    assert episodes["seed"].min() >= FIRST_HELD_OUT_SEED, "the query set is of scenes that no support shows"
    held = EpisodeDataset(few.stage(POLICY, 1, 0).data[0])
    assert held.episodes["seed"].max() < FIRST_HELD_OUT_SEED
    assert few.stage(POLICY, 1, 0).folder != few.stage(POLICY, 1, 1).folder != few.stage(POLICY, 2, 0).folder


def test_tasks_come_one_after_another_with_and_without_what_was_before(home):
    tasks = {name: Collection(n_episodes=10, tasks=(name,)) for name in ("open_drawer", "close_drawer")}
    for replay, seen in ((0.0, 1), (0.5, 2)):
        models = continual_learning(POLICY, tasks, 16, replay, **SHORT)
        assert list(models) == list(tasks)
        first, second = (stage_of(model) for model in models.values())
        assert first["init"] == str(POLICY) and second["init"] == str(models["open_drawer"])
        assert len(first["data"]) == 1 and len(second["data"]) == seen
        assert second["data_weights"] == ([0.5, 0.5] if replay else [])
    with pytest.raises(ValueError, match=r"expected replay as a share from 0 to below 1, got 1\.5"):
        continual_learning(POLICY, tasks, 16, 1.5)


def test_corrections_are_the_experts_labels_in_the_states_that_the_policy_visits(home):
    settings = Collection(n_episodes=3, tasks=("lift", "open_drawer"), max_steps=12)
    data = EpisodeDataset(collect_corrections(DAggerCollection(str(POLICY), settings), n_workers=1))
    assert data.n_episodes == 3 and sorted(data.episodes["seed"]) == [FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2]
    assert FIRST_SEED + 100_000 < FIRST_HELD_OUT_SEED
    labels, executed = data.column("action"), data.column("action_executed")
    assert not np.allclose(labels, executed) and labels.shape == executed.shape
    assert DAggerCollection(str(SMALL_VLM), settings).folder != DAggerCollection(str(POLICY), settings).folder
    with pytest.raises(SpecMismatch, match="policy vs environment"):
        rollout_with_expert_labels(load_policy(POLICY), Tabletop("ur6"), 0, "lift")


def test_a_release_is_one_complete_model_at_any_moment(home, tmp_path, monkeypatch):
    """Released again and again while another thread reads: weights and configuration are always there, and of one model."""
    versions, seen, is_over = itertools.count(), set(), threading.Event()
    target = tmp_path / "policy"

    def trained(_):
        model = tmp_path / f"stage-{next(versions)}" / "model"
        model.mkdir(parents=True)
        (model / "model.safetensors").write_text(model.parent.name)
        return model

    def look():
        while not is_over.is_set():
            try:
                seen.add((target / "model.safetensors").read_text())
            except FileNotFoundError:
                seen.add("missing")

    monkeypatch.setattr("rvlm.experiments.release.train", trained)
    stage = Stage("toy", DETECTION, ("scenes",), "vlm", 64)
    release(stage, target, "a command")
    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(30):
        release(stage, target, "a command")
    is_over.set()
    looking.join()
    assert "missing" not in seen and len(seen) > 2
    assert json.loads((target / "made.json").read_text())["command"] == "a command"
    assert [path.name for path in tmp_path.iterdir() if "policy" in path.name and path.suffix != ".lock"] == ["policy"]
