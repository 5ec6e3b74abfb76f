"""Caches: named by settings, inputs and code; they say what made them, and nothing goes that is in use."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS, toy_frames

from rvlm import caches, features, files
from rvlm.actions import ActionSpec
from rvlm.backbones import load_backbone, vision_features
from rvlm.caches import Code, entries, keep, made_of, make_room, prune, use, used
from rvlm.episodes import EpisodeDataset, EpisodeWriter
from rvlm.files import code_of, write_whole
from rvlm.processors import load_processor
from rvlm.prompts import Prompter
from rvlm.stages import DETECTION, ROBOT, VISION_LANGUAGE, Stage
from rvlm.trainer import work

SPEC = ActionSpec.from_card("tabletop_franka7")
VIDEO = Code(("rvlm.video",))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(caches, "_used", {})
    monkeypatch.setattr(caches, "_held", {})
    yield tmp_path / "home"
    for handle in caches._held.values():
        os.close(handle)


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
    monkeypatch.setattr("rvlm.adapters.precision", lambda: torch.bfloat16)
    assert a_stage(toy_demos, toy_vlm).folder == folders["bf16"]


ASK = """
from rvlm.stages import Stage
from rvlm.evaluation import Evaluation
from rvlm.chains import ChainEvaluation
from rvlm.envs.tabletop.demonstrations import Collection
from rvlm.envs.tabletop import questions
from rvlm.dagger import Corrections
import sys
vlm, data = sys.argv[1:]
shared = {"n_processes": 1, "batch_size": 4}
asked = {
    "robot": Stage("a", "robot", (data,), vlm, 8, **shared).code.hash,
    "varied": Stage("a", "robot", (data,), vlm, 8, wordings="varied", **shared).code.hash,
    "questions": Stage("a", "vision_language", (data,), vlm, 8, **shared).code.hash,
    "detection": Stage("a", "detection", (data,), vlm, 8, **shared).code.hash,
    "policy": Evaluation(vlm).folder.name, "expert": Evaluation("expert").folder.name,
    "chains": ChainEvaluation("expert").folder.name, "demonstrations": Collection().folder.name,
    "corrections": Corrections(vlm, Collection()).folder.name, "scenes": questions.CODE.hash,
}
print(*asked, *asked.values())
"""
ROBOT_STAGES, ASKING = {"robot", "varied"}, {"questions", "detection"}
ACTED = {"policy", "expert", "chains"}
CHANGED = {  # file -> what is computed anew after its code has changed
    "heads.py": {*ROBOT_STAGES, "policy", "corrections"},
    "trainer.py": {*ROBOT_STAGES, *ASKING},
    "features.py": {*ROBOT_STAGES, "questions"},
    "detection.py": {"detection"},
    "rollouts.py": ACTED,
    "chains.py": {"chains"},
    "envs/tabletop/tasks.py": {*ACTED, *ASKING, "varied", "demonstrations", "corrections", "scenes"},
    "envs/tabletop/experts.py": {*ACTED, "demonstrations", "corrections", "scenes"},
    "recording.py": {"demonstrations", "corrections"},
    "dagger.py": {"corrections"},
    "report.py": set(), "grids.py": set(), "recipes.py": set(), "caches.py": set(), "stages.py": set(), "plots/charts.py": set(),
}  # fmt: skip


def test_what_changed_code_computes_is_computed_anew_and_nothing_else(toy_vlm, toy_demos, tmp_path):
    source = shutil.copytree(files.PACKAGE, tmp_path / "rvlm", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    cards = files.PACKAGE.parent / "data_cards"
    if cards.is_dir():
        shutil.copytree(cards, tmp_path / "data_cards")

    def asked():
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "RVLM_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", ASK, str(toy_vlm), str(toy_demos)]
        told = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
        return dict(zip(told[: len(told) // 2], told[len(told) // 2 :], strict=True))

    before = asked()
    for name, expected in CHANGED.items():
        plain = (source / name).read_text()
        (source / name).write_text(plain.replace('"""', '"""Said otherwise: ', 1) + "\n_CHANGED = 1\n" * bool(expected))
        after = asked()
        assert {what for what in before if before[what] != after[what]} == expected, name
        (source / name).write_text(plain)
    assert asked() == before


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
    """What ran and is not hashed."""
    hashed = set(code_of(*code.roots, without=code.without)) | set(files.PLUMBING)
    return sorted(f"{m}:{f}" for m, f in ran if m not in hashed and f"{m}:{f}" not in hashed)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    from rvlm.envs.tabletop.questions import make_scenes

    return make_scenes(tmp_path_factory.mktemp("scenes") / "few", "franka7", 0, 8, 48)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (ROBOT, {"freeze_vision": True}),
        (ROBOT, {"wordings": "varied", "tuning": "lora"}),
        (VISION_LANGUAGE, {"freeze_vision": True}),
        (DETECTION, {}),
    ],
    ids=["robot", "varied", "vision_language", "detection"],
)
def test_a_stage_runs_no_code_that_is_not_in_its_name(home, kind, changes, toy_demos, scenes, tmp_path):
    from rvlm.backbones import SMALL_VLM

    data, policy = (toy_demos, {"structure": "one_step"}) if kind == ROBOT else (scenes, {})
    stage = Stage("toy", kind, (str(data),), str(SMALL_VLM), 4, policy=policy, batch_size=4, n_processes=1, **changes)
    ran = traced(lambda: work(stage, tmp_path))
    assert ("rvlm.trainer", "work") in ran and missing(ran, stage.code) == []


def test_an_evaluation_runs_no_code_that_is_not_in_its_name(home, saved):
    from rvlm import evaluation
    from rvlm.chains import ChainEvaluation

    shared = {"n_episodes": 1, "max_steps": 2}
    for asked in (
        evaluation.Evaluation(str(saved[0]), **shared),
        evaluation.Evaluation("expert", **shared),
        ChainEvaluation("random", **shared, length=2),
    ):
        (home / asked.policy[-6:]).mkdir(parents=True)
        ran = traced(lambda a=asked: evaluation._run_batch(a, 0, home / a.policy[-6:]))
        assert ("rvlm.rollouts", "rollout") in ran and missing(ran, asked.code) == [], asked


def test_demonstrations_and_scenes_run_no_code_that_is_not_in_their_names(home, saved, tmp_path):
    from rvlm import dagger
    from rvlm.envs.tabletop import demonstrations, questions

    few = demonstrations.Collection(n_episodes=1, image_size=16, noise=0.0)
    asked = dagger.Corrections(str(saved[0]), dataclasses.replace(few, max_steps=2))
    assert missing(traced(lambda: list(demonstrations.make_shard(0, few))), demonstrations.CODE) == []
    assert missing(traced(lambda: list(dagger.make_shard(0, asked))), dagger.CODE) == []
    assert missing(traced(lambda: questions.make_scenes(tmp_path / "few", "franka7", 0, 2, 16)), questions.CODE) == []


# --- features of frozen towers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower(toy_vlm):
    processor = load_processor(toy_vlm)
    return load_backbone(toy_vlm, processor), processor


def some_images(path, n, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(seed).integers(0, 255, (n, 48, 48, 3), np.uint8))
    return np.load(path, mmap_mode="r")


def test_features_go_to_disk_batch_by_batch(home, tower, tmp_path, monkeypatch):
    images, seen = some_images(tmp_path / "x.npy", 150), []
    monkeypatch.setattr(
        features, "vision_features", lambda model, pixels: (seen.append(len(pixels)), vision_features(model, pixels))[1]
    )
    (got,) = features.cached_features(*tower, {"static": images}).values()
    assert seen == [64, 64, 22] and isinstance(got, np.memmap) and got.dtype == np.float16
    whole = vision_features(tower[0], Prompter(tower[1], 1).pixels(np.array(images)[:, None])).numpy()
    assert got.shape == whole.shape and np.abs(got - whole).max() < 1e-2
    features.cached_features(*tower, {"another name": images})
    assert len(seen) == 3, "asked again, nothing is computed"


def test_features_are_of_these_images_and_this_tower(home, tower, toy_vlm, tmp_path):
    first, second = (some_images(tmp_path / name / "train.npy", 3, seed) for seed, name in enumerate("ab"))
    one, two = (features.cached_features(*tower, {"train": images})["train"] for images in (first, second))
    assert not np.array_equal(one, two), "two folders of one name"
    anew = some_images(tmp_path / "a" / "train.npy", 3, seed=1)
    assert np.array_equal(features.cached_features(*tower, {"train": anew})["train"], two), "recorded anew in place"
    other = load_backbone(toy_vlm, tower[1])
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if "vision_model" in name).add_(1)
    assert not np.array_equal(features.cached_features(other, tower[1], {"train": second})["train"], two)
    processor = load_processor(toy_vlm)
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    assert not np.array_equal(features.cached_features(tower[0], processor, {"train": second})["train"], two)


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, np.float16), (1e6, np.float32)])
def test_features_are_kept_in_a_type_that_holds_them(home, tower, tmp_path, monkeypatch, scale, dtype):
    """The second batch alone is too large for half precision; bfloat16 comes from towers on GPUs."""
    images = some_images(tmp_path / "x.npy", 70)

    def large(model, pixels):
        out = vision_features(model, pixels)
        return (out * scale if len(pixels) < 64 else out).bfloat16()

    monkeypatch.setattr(features, "vision_features", large)
    got = features.cached_features(*tower, {"x": images})["x"]
    assert got.dtype == dtype and np.isfinite(got).all() and (np.abs(got).max() > 65504) == (scale > 1)


def test_features_that_are_no_numbers_are_refused_and_not_kept(home, tower, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "vision_features", lambda model, pixels: vision_features(model, pixels) * float("nan"))
    with pytest.raises(FloatingPointError, match="expected finite features of images from 0 on"):
        features.cached_features(*tower, {"x": some_images(tmp_path / "x.npy", 2)})
    assert not list(home.glob("features/*/*.npy"))


WITHOUT_SIMULATOR = """
import sys
for name in ("mujoco", "OpenGL", "rvlm.envs.tabletop"):
    sys.modules[name] = None  # importing it is an error
from pathlib import Path
from rvlm.stages import Stage
from rvlm.trainer import work
data, vlm, out = sys.argv[1:]
shared = {"batch_size": 4, "n_processes": 1, "policy": {"structure": "one_step"}}
for i, freeze in enumerate((False, True)):
    stage = Stage("own", "robot", (data,), vlm, 8, freeze_vision=freeze, **shared)
    stage.folder
    work(stage, Path(out) / str(i))
"""


def test_training_on_own_data_needs_no_simulator(toy_vlm, toy_demos, tmp_path):
    environment = {**os.environ, "RVLM_HOME": str(tmp_path / "home"), "MUJOCO_GL": ""}
    command = [sys.executable, "-c", WITHOUT_SIMULATOR, str(toy_demos), str(toy_vlm), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "1" / "model").is_dir(), done.stderr[-3000:]


# --- what made it -------------------------------------------------------------------------------------------------------


def a_cache(kind, name, code=VIDEO, size=10, inputs=()):
    folder = files.artifacts_dir() / kind / name
    write_whole(folder / "content", bytes(size))
    return keep(folder, code, {"n": 1}, inputs)


def test_a_cache_says_what_made_it(home):
    made = made_of(a_cache("frames", "x"))
    assert made["code"] == VIDEO.hash and made["settings"] == {"n": 1} and made["roots"] == ["rvlm.video"]
    assert {"commit", "is_dirty", "versions", "date", "inputs"} <= set(made)


def by_other_code(folder):
    """As if the code had changed since."""
    write_whole(folder / "made.json", json.dumps({**made_of(folder), "code": "0" * 12, "commit": "abc"}))


def test_what_was_used_is_remembered_with_what_it_was_made_from(home):
    old, new = a_cache("stages", "old"), None
    by_other_code(old)
    caches._used.clear()
    (old / "model").mkdir()
    new = a_cache("evaluations", "new", inputs=[old / "model"])
    assert [(u["kind"], u["n"], u["is_current"]) for u in used()] == [("evaluations", 1, True), ("stages", 1, False)]
    use(new)
    assert sum(u["n"] for u in used()) == 2 and used()[1]["commits"] == ["abc"]


# --- what may go --------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(home):
    """Frames that other code made, frames and stages of today's, and a training under way."""
    found = {name: a_cache(kind, name, size=1000) for kind, name in (("frames", "stale"), ("frames", "now"), ("stages", "kept"))}
    by_other_code(found["stale"])
    found["under way"] = home / "stages" / "b.partial"
    write_whole(found["under way"] / "log", bytes(1000))
    release()
    return found


def release():
    """As if this process had ended."""
    for handle in caches._held.values():
        os.close(handle)
    caches._held.clear()


def gone(**how):
    return sorted(entry.path.name for entry, has_gone in prune(**how) if has_gone)


def test_entries_say_size_age_and_whether_code_would_use_them(several):
    told = {entry.path.name: (entry.kind, entry.state) for entry in entries()}
    assert told == {
        "stale": ("frames", "stale"), "now": ("frames", "current"), "kept": ("stages", "current"),
        "b.partial": ("stages", "unfinished"),
    }  # fmt: skip
    assert all(1000 <= entry.n_bytes < 5000 and entry.age_s < 60 for entry in entries())


def test_stale_caches_go_and_others_stay(several):
    assert gone(is_stale=True) == ["stale"] and not several["stale"].exists()
    assert gone(is_stale=True) == [] and several["now"].is_dir() and several["kept"].is_dir()


def test_what_was_not_used_for_long_goes(several):
    for folder in (several["now"], several["under way"]):
        for path in (folder, *folder.iterdir()):
            os.utime(path, (time.time() - 10_000,) * 2)
    assert gone(older_than_s=5_000) == ["b.partial", "now"]


def test_above_the_limit_stale_goes_first_then_what_is_cheap_to_make(several):
    total = sum(entry.n_bytes for entry in entries())
    assert gone(max_bytes=total) == []
    assert gone(max_bytes=total - 1) == ["stale"]
    assert gone(max_bytes=0) == ["kept", "now"] and several["under way"].is_dir(), "what is under way stays"


def test_what_is_in_use_stays(several):
    held = "import sys; from rvlm.caches import use; use(sys.argv[1]); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", held, str(several["now"])], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        user.stdout.readline()
        assert gone(max_bytes=0) == ["kept", "stale"] and several["now"].is_dir()
        user.stdin.close()
    assert gone(max_bytes=0) == ["now"]
    use(a_cache("frames", "mine"))
    assert gone(max_bytes=0) == [], "this process's own"


def test_what_is_locked_stays(several):
    from filelock import FileLock

    with FileLock(several["kept"].with_name("kept.lock")):
        assert gone(max_bytes=0) == ["now", "stale"] and several["kept"].is_dir()


def test_frames_and_features_have_a_limit(several, monkeypatch):
    make_room()
    assert several["now"].is_dir()
    monkeypatch.setenv("RVLM_CACHE_GB", "1e-9")
    make_room()
    assert not several["now"].is_dir() and not several["stale"].is_dir() and several["kept"].is_dir()


def test_frames_of_a_dataset_say_what_made_them(home, tmp_path):
    EpisodeDataset(record(tmp_path / "demos")).frames_cache()
    assert [entry.state for entry in entries(["frames"])] == ["current"]
