"""Features of a frozen vision tower: cached by content, written batch by batch; training on one's own data needs no simulator."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from toy_stages import ONE_STEP, few

from rvlm.files import file_hash
from rvlm.policy.factory import load_vla
from rvlm.training import feature_cache
from rvlm.training.trainer import train_stage_in_process
from rvlm.vlm.backbones import load_backbone, vision_features, vision_modules
from rvlm.vlm.processors import load_processor
from rvlm.vlm.prompts import PromptBuilder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


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
        feature_cache, "vision_features", lambda model, pixels: (seen.append(len(pixels)), vision_features(model, pixels))[1]
    )
    (got,) = feature_cache.cached_features(*tower, {"static": images}).values()
    assert seen == [64, 64, 22] and isinstance(got, np.memmap) and got.dtype == np.float16
    whole = vision_features(tower[0], PromptBuilder(tower[1], 1).pixels(np.array(images)[:, None])).numpy()
    assert got.shape == whole.shape and np.abs(got - whole).max() < 1e-2
    feature_cache.cached_features(*tower, {"another name": images})
    assert len(seen) == 3, "asked again, nothing is computed"


def test_features_are_of_these_images_and_this_tower(home, tower, toy_vlm, tmp_path):
    first, second = (some_images(tmp_path / name / "train.npy", 3, seed) for seed, name in enumerate("ab"))
    one, two = (feature_cache.cached_features(*tower, {"train": images})["train"] for images in (first, second))
    assert not np.array_equal(one, two), "two folders of one name"
    anew = some_images(tmp_path / "a" / "train.npy", 3, seed=1)
    assert np.array_equal(feature_cache.cached_features(*tower, {"train": anew})["train"], two), "recorded anew in place"
    other = load_backbone(toy_vlm, tower[1])
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if "vision_model" in name).add_(1)
    assert not np.array_equal(feature_cache.cached_features(other, tower[1], {"train": second})["train"], two)
    processor = load_processor(toy_vlm)
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    assert not np.array_equal(feature_cache.cached_features(tower[0], processor, {"train": second})["train"], two)


def test_features_of_another_attention_or_device_are_others(tower, toy_vlm, monkeypatch):
    """They round otherwise."""
    model, processor = tower
    named = {feature_cache.hash_of_network(model, processor, [model])}
    other = load_backbone(toy_vlm, processor)
    other.set_attn_implementation("eager")
    named.add(feature_cache.hash_of_network(other, processor, [other]))
    monkeypatch.setattr(feature_cache, "compute_device", lambda: torch.device("cuda"))
    named.add(feature_cache.hash_of_network(model, processor, [model]))
    assert len(named) == 3


def test_a_view_of_a_file_is_not_the_file(tmp_path):
    images = some_images(tmp_path / "x.npy", 4)
    views = [
        images,
        images[::-1],
        images.swapaxes(1, 2),
        images[..., ::-1],
        images.reshape(2, 2, 48, 48, 3),
        images.view(np.int8),
    ]
    views += [images[:3], images[1:]]
    written = np.load(tmp_path / "x.npy", mmap_mode="c")
    written[0] = 0
    kept = [feature_cache.array_hash(array) for array in (*views, written)]
    assert len(set(kept)) == len(kept) and kept[0] == file_hash(tmp_path / "x.npy")
    assert feature_cache.array_hash(views[1]) == feature_cache.array_hash(np.array(views[1]))


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, np.float16), (1e6, np.float32)])
def test_features_are_stored_in_a_dtype_that_can_represent_them(home, tower, tmp_path, monkeypatch, scale, dtype):
    """The second batch alone is too large for half precision; bfloat16 comes from towers on GPUs."""
    images = some_images(tmp_path / "x.npy", 70)

    def large(model, pixels):
        out = vision_features(model, pixels)
        return (out * scale if len(pixels) < 64 else out).bfloat16()

    monkeypatch.setattr(feature_cache, "vision_features", large)
    got = feature_cache.cached_features(*tower, {"x": images})["x"]
    assert got.dtype == dtype and np.isfinite(got).all() and (np.abs(got).max() > 65504) == (scale > 1)


def test_nan_features_are_refused_and_not_cached(home, tower, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "vision_features", lambda model, pixels: vision_features(model, pixels) * float("nan"))
    with pytest.raises(FloatingPointError, match="expected finite features of images from 0 on"):
        feature_cache.cached_features(*tower, {"x": some_images(tmp_path / "x.npy", 2)})
    assert not list(home.glob("features/*/*.npy"))


@pytest.mark.parametrize("finetuning", ["head", "lora", "dora"])
def test_features_of_a_backbone_in_half_precision_are_cached_and_trained_on(stage, finetuning, tmp_path, monkeypatch):
    """Frozen weights are held in bfloat16 where the machine computes in it; numpy has no such type."""
    seen = []

    def watched(model, pixels):
        seen.append((pixels.dtype, {p.dtype for p in vision_modules(model)[0].parameters()}))
        return vision_features(model, pixels)

    monkeypatch.setattr(feature_cache, "vision_features", watched)
    train_stage_in_process(few(stage, 1, finetuning=finetuning, precision="bf16", freeze_vision=True), tmp_path)
    assert seen and all(each == (torch.bfloat16, {torch.bfloat16}) for each in seen)
    (cached, *_) = [np.load(path) for path in (tmp_path / "home").glob("features/*/features.npy")]
    assert cached.dtype == np.float16 and np.array_equal(cached, torch.from_numpy(cached).bfloat16().half().numpy())
    model, _ = load_vla(tmp_path / "model")
    assert {p.dtype for p in vision_modules(model.backbone)[0].parameters()} == {torch.bfloat16}


def test_a_backbone_in_half_precision_is_read_once_and_trained_on(stage, tmp_path):
    """In float32, which holds every half-precision number."""
    policy = {**ONE_STEP, "has_state": False}
    train_stage_in_process(few(stage, 10, finetuning="head", precision="bf16", policy=policy), tmp_path)
    (cached,) = [np.load(path) for path in (tmp_path / "home").glob("features/*/features.npy")]
    assert cached.dtype == np.float32 and np.array_equal(cached, torch.from_numpy(cached).bfloat16().float().numpy())


WITHOUT_SIMULATOR = """
import sys
for name in ("mujoco", "OpenGL", "rvlm.envs.tabletop"):
    sys.modules[name] = None  # importing it is an error
from pathlib import Path
from rvlm.training.stages import Stage
from rvlm.training.trainer import train_stage_in_process
data, vlm, out = sys.argv[1:]
shared = {"batch_size": 4, "n_processes": 1, "policy": {"structure": "one_step"}}
for i, freeze in enumerate((False, True)):
    stage = Stage("own", "robot", (data,), vlm, 8, freeze_vision=freeze, **shared)
    stage.folder
    train_stage_in_process(stage, Path(out) / str(i))
"""


def test_training_on_own_data_needs_no_simulator(toy_vlm, toy_demos, tmp_path):
    environment = {**os.environ, "RVLM_HOME": str(tmp_path / "home"), "MUJOCO_GL": ""}
    command = [sys.executable, "-c", WITHOUT_SIMULATOR, str(toy_demos), str(toy_vlm), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "1" / "model").is_dir(), done.stderr[-3000:]
