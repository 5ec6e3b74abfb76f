"""Cache keys: settings, content of the inputs, and exactly the code that runs."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_data import TEXTS, toy_frames
from toy_suites import tabletop

from rvlm import code_hash, files
from rvlm.caches import list_artifacts, prune
from rvlm.code_hash import code_of
from rvlm.data.actions import ActionSpec
from rvlm.data.windows import EpisodeDataset, EpisodeWriter
from rvlm.training.stages import DETECTION, ROBOT, VISION_LANGUAGE, Stage
from rvlm.training.trainer import train_stage_in_process

SPEC = ActionSpec.from_card("tabletop_franka7")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def record(root, seed=0):
    writer = EpisodeWriter(root, SPEC)
    for i in range(10):
        writer.add_episode(toy_frames(SPEC, 5, seed + i), TEXTS[0])
    return writer.finalize()


def a_stage(data, init, **changes):
    policy = {"structure": "one_step", "chunk_size": 2, "head_options": {"hidden": 32}}
    fixed = {"policy": policy, "batch_size": 4, "n_processes": 1, **changes}
    return Stage("toy", ROBOT, (str(data),), str(init), 8, **fixed)


# --- names --------------------------------------------------------------------------------------------------------------


def test_a_stage_is_named_by_its_datas_content(home, toy_vlm, tmp_path):
    first, second = record(tmp_path / "a" / "train"), record(tmp_path / "b" / "train", seed=50)
    copy = shutil.copytree(second, tmp_path / "c" / "copy")
    stage = a_stage(first, toy_vlm)
    before = stage.folder
    assert a_stage(second, toy_vlm).folder != before, "two folders of one name"
    assert a_stage(second, toy_vlm).folder == a_stage(copy, toy_vlm).folder, "one content in two folders"
    shutil.rmtree(first)
    assert record(first, seed=50) == first and stage.folder == a_stage(second, toy_vlm).folder != before, "recorded anew"
    with pytest.raises(ValueError, match=r"stage 'toy': expected a folder with files at .*nowhere, got none"):
        _ = a_stage(tmp_path / "nowhere", toy_vlm).folder


def test_the_precision_of_a_stage_is_what_the_machine_computes_in(home, toy_vlm, toy_demos, monkeypatch):
    folders = {name: a_stage(toy_demos, toy_vlm, precision=name).folder for name in ("auto", "fp32", "bf16")}
    assert folders["auto"] == folders["fp32"] != folders["bf16"]
    monkeypatch.setattr("rvlm.vlm.quantization.precision", lambda: torch.bfloat16)
    assert a_stage(toy_demos, toy_vlm).folder == folders["bf16"]


def codes():
    """The code roots of every kind of cache, by name."""
    from rvlm.envs.demonstrations import Collection
    from rvlm.envs.tabletop import rendered_scenes
    from rvlm.evaluation.chains import ChainEvaluation
    from rvlm.evaluation.closed_loop import Evaluation
    from rvlm.experiments import dagger

    shared = {"init": "vlm", "n_samples": 8, "batch_size": 4, "n_processes": 1}
    return {
        "robot": Stage("a", ROBOT, ("demos",), **shared).training_code,
        "varied": Stage("a", ROBOT, ("demos",), instructions="paraphrased", **shared).training_code,
        "questions": Stage("a", VISION_LANGUAGE, ("scenes",), **shared).training_code,
        "detection": Stage("a", DETECTION, ("scenes",), **shared).training_code,
        "policy": Evaluation("folder").code, "expert": Evaluation("expert").code, "chains": ChainEvaluation("expert").code,
        "demonstrations": Collection().code, "scenes": rendered_scenes.SCENES_CODE,
        "corrections": dagger.DAggerCollection("folder", Collection()).code,
    }  # fmt: skip


ROBOT_STAGES, VLM_STAGES = {"robot", "varied"}, {"questions", "detection"}
ACTED = {"policy", "expert", "chains"}
CHANGED: dict[str, set[str]] = {  # file -> caches that are recomputed after its code has changed
    "policy/heads.py": {*ROBOT_STAGES, "policy", "corrections"},
    "policy/fast_tokenizer.py": {*ROBOT_STAGES, "policy", "corrections"},
    "training/trainer.py": {*ROBOT_STAGES, *VLM_STAGES},
    "training/feature_cache.py": {*ROBOT_STAGES, "questions"},
    "training/frozen_backbone.py": ROBOT_STAGES,
    "training/action_vocabulary.py": ROBOT_STAGES,
    "training/detection.py": {"detection"},
    "evaluation/rollouts.py": {*ACTED, "corrections"},
    "evaluation/chains.py": {"chains"},
    "envs/tabletop/tasks.py": {*ACTED, "questions", "varied", "demonstrations", "corrections", "scenes"},
    "envs/tabletop/experts.py": {*ACTED, "demonstrations", "corrections", "scenes"},
    "data/writer.py": {"demonstrations", "corrections"},
    "experiments/dagger.py": {"corrections"},
}
NOTHING = (
    *("report/findings", "policy/model_card", "statistics/intervals", "training/search", "experiments/recipes"),
    *("report/plots/rates", "caches", "training/stages"),
)
CHANGED |= {f"{name}.py": set() for name in NOTHING}


def test_a_change_of_code_invalidates_its_own_caches_and_no_others(tmp_path, monkeypatch):
    source = shutil.copytree(files.PACKAGE, tmp_path / "rvlm", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    asked = {name: code.hash for name, code in codes().items()}
    monkeypatch.setattr(code_hash, "PACKAGE", source)
    assert {name: code.hash for name, code in codes().items()} == asked, "installed elsewhere, the same code"
    for name, expected in CHANGED.items():
        plain = (source / name).read_text()
        (source / name).write_text(plain.replace('"""', '"""Said otherwise: ', 1))
        assert {name: code.hash for name, code in codes().items()} == asked, f"a docstring of {name}"
        (source / name).write_text(plain + "\n_CHANGED = 1\n")
        assert {what for what, code in codes().items() if code.hash != asked[what]} == expected, name
        (source / name).write_text(plain)


# --- the code that is hashed is the code that runs ----------------------------------------------------------------------


def traced(function):
    """The package's modules, and functions in them, that run: not what runs when they are imported."""
    ran = set()

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_flags & 0x1 and code.co_filename.startswith(f"{files.PACKAGE}{os.sep}"):
            names = Path(code.co_filename).relative_to(files.PACKAGE.parent).with_suffix("").parts
            ran.add((".".join(names).removesuffix(".__init__"), code.co_qualname.split(".")[0]))

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return ran


def missing(ran, code):
    """What ran and is not hashed; a lambda at a module's top bears no name, and belongs to a constant or the module."""
    hashed = set(code_of(*code.roots, without=code.without)) | set(code_hash.PLUMBING)
    return sorted(f"{m}:{f}" for m, f in ran if f != "<lambda>" and m not in hashed and f"{m}:{f}" not in hashed)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    from rvlm.envs.tabletop.rendered_scenes import make_scenes

    return make_scenes(tmp_path_factory.mktemp("scenes") / "few", "franka7", 0, 8, 48)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (ROBOT, {"freeze_vision": True}),
        (ROBOT, {"instructions": "paraphrased", "finetuning": "lora"}),
        (VISION_LANGUAGE, {"freeze_vision": True}),
        (DETECTION, {}),
    ],
    ids=["robot", "varied", "vision_language", "detection"],
)
def test_a_stage_runs_no_code_that_is_not_in_its_name(home, kind, changes, toy_demos, scenes, tmp_path):
    from rvlm.vlm.backbones import SMALL_VLM

    data, policy = (toy_demos, {"structure": "one_step"}) if kind == ROBOT else (scenes, {})
    stage = Stage("toy", kind, (str(data),), str(SMALL_VLM), 4, policy=policy, batch_size=4, n_processes=1, **changes)
    ran = traced(lambda: train_stage_in_process(stage, tmp_path))
    assert ("rvlm.training.trainer", "train_stage_in_process") in ran and missing(ran, stage.training_code) == []


def test_an_evaluation_runs_no_code_that_is_not_in_its_name(home, saved):
    from rvlm.evaluation import closed_loop
    from rvlm.evaluation.chains import ChainEvaluation

    shared = {"n_episodes": 1, "suite": tabletop(2)}
    for asked in (
        closed_loop.Evaluation(str(saved[0]), **shared),
        closed_loop.Evaluation("expert", **shared),
        ChainEvaluation("random", **shared, length=2),
    ):
        (home / asked.policy[-6:]).mkdir(parents=True)
        ran = traced(lambda a=asked: closed_loop._cache_batch(a, 0, home / a.policy[-6:]))
        assert ("rvlm.evaluation.rollouts", "rollout") in ran and missing(ran, asked.code) == [], asked


def test_demonstrations_and_scenes_run_no_code_that_is_not_in_their_names(home, saved, tmp_path):
    from rvlm.envs import demonstrations
    from rvlm.envs.tabletop import rendered_scenes
    from rvlm.experiments import dagger

    few = demonstrations.Collection(n_episodes=1, image_size=16, noise=0.0)
    few.loaded_suite.make(16).close()  # the first of a process is checked, by code that decides nothing
    asked = dagger.DAggerCollection(str(saved[0]), dataclasses.replace(few, max_steps=2))
    assert missing(traced(lambda: list(demonstrations.make_shard(0, few))), few.code) == []
    assert missing(traced(lambda: list(dagger.dagger_shard(0, asked))), asked.code) == []
    assert (
        missing(traced(lambda: rendered_scenes.make_scenes(tmp_path / "few", "franka7", 0, 2, 16)), rendered_scenes.SCENES_CODE)
        == []
    )


def test_frames_and_features_run_no_code_that_is_not_in_their_names(home, toy_vlm, tmp_path):
    """The code that selects a dataset's rows is not in the key of its frames, for the rows are."""
    from rvlm.caches import Code
    from rvlm.data import cameras
    from rvlm.training import feature_cache, frozen_backbone
    from rvlm.vlm.backbones import load_backbone
    from rvlm.vlm.processors import ACT, load_processor
    from rvlm.vlm.prompts import PromptBuilder

    dataset, kept = EpisodeDataset(record(tmp_path / "demos")), {}
    ran = traced(lambda: kept.update(dataset.frames_cache(["static"])))
    assert ("rvlm.data.cameras", "Camera") in ran
    assert {
        m for m in missing(ran, Code(cameras.CODE)) if not m.startswith(("rvlm.data.dataset:", "rvlm.data.row_checks:"))
    } == set()
    processor = load_processor(toy_vlm)
    model = load_backbone(toy_vlm, processor)
    ran = traced(lambda: feature_cache.cached_features(model, processor, kept))
    assert ("rvlm.training.feature_cache", "write_batches") in ran and missing(ran, feature_cache.FEATURES_CODE) == []
    act_id = processor.tokenizer.convert_tokens_to_ids(ACT)
    asked = model, act_id, PromptBuilder(processor, 1), [kept["static"]], np.arange(3), TEXTS[:3], "fp32"
    ran = traced(lambda: frozen_backbone.observation_features(*asked))
    assert ("rvlm.vlm.hidden_states", "action_query_states") in ran and missing(ran, frozen_backbone.OBSERVATIONS_CODE) == []


def test_frames_of_a_dataset_say_what_made_them_and_stay_while_they_are_mapped(home, tmp_path):
    frames = EpisodeDataset(record(tmp_path / "demos")).frames_cache()
    assert {entry.state for entry in list_artifacts(["frames"])} == {"current"}
    assert [has_gone for _, has_gone in prune(["frames"], max_bytes=0)] == [False] * len(frames)
    del frames
    assert all(has_gone for _, has_gone in prune(["frames"], max_bytes=0))
