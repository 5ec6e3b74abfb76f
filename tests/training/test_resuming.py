"""Killed at any moment, every kind of stage gives the result of an uninterrupted one."""

import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_data import TEXTS, toy_frames

from rvlm.data.actions import ActionSpec
from rvlm.data.windows import EpisodeWriter
from rvlm.training.launch import _fork, prepare, train
from rvlm.training.stages import DETECTION, ROBOT, VISION_LANGUAGE, Stage
from rvlm.training.trainer import log_history
from rvlm.training.trainer_checkpoints import last_checkpoint

POLICY = {"structure": "one_step", "chunk_size": 3, "head_options": {"hidden": 32}}


@pytest.fixture(scope="module")
def other_robot(toy_home):
    """Folder of ten synthetic demonstrations of another robot."""
    spec = ActionSpec.from_card("tabletop_ur6")
    with EpisodeWriter(toy_home / "ur6", spec) as writer:
        for seed in range(10):
            writer.add_episode(toy_frames(spec, 5, 100 + seed), TEXTS[0])
    return str(toy_home / "ur6")


@pytest.fixture
def stages(home, toy_vlm, llava, toy_demos, scenes, other_robot):
    """One of each kind; one of a family whose files name weights otherwise than its modules."""
    common = {"init": str(toy_vlm), "n_samples": 8 * 45, "batch_size": 8, "n_processes": 1}
    robot = {**common, "kind": ROBOT, "policy": POLICY}
    mixed = {
        "data": (str(toy_demos), other_robot),
        "data_weights": (0.7, 0.3),
        "allow_new_embodiment": True,
        "vqa_data": (scenes,),
    }
    return {
        "detection": Stage("tower", DETECTION, (scenes,), **common),
        "vision_language": Stage("frozen", VISION_LANGUAGE, (scenes,), freeze_vision=True, **{**common, "init": str(llava)}),
        "adapters": Stage("adapted", data=(str(toy_demos),), finetuning="lora", lora_rank=2, freeze_vision=True, **robot),
        "mixture": Stage("mixed", **mixed, **robot),
    }


@pytest.mark.parametrize("kind", ["detection", "vision_language", "adapters", "mixture"])
def test_a_repeatedly_killed_stage_gives_the_result_of_an_uninterrupted_one(stages, kind, monkeypatch, tmp_path):
    """SIGKILL to the trainer: once after its first checkpoint, then at random."""
    stage, rng = stages[kind], np.random.default_rng(16)
    started = time.monotonic()
    uninterrupted = train(stage, show_progress=False, n_threads=1)
    seconds = time.monotonic() - started
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    partial = prepare(stage)
    for moment in [None, *rng.uniform(0, seconds, 5)]:
        trainer = _fork(partial, 1)
        until = time.monotonic() + (300 if moment is None else moment)
        while time.monotonic() < until and trainer.poll() is None:
            if moment is None and last_checkpoint(partial / "trainer"):
                break
            time.sleep(0.01)
        trainer.stop()
        trainer.wait()
        assert trainer.poll() in (0, -signal.SIGKILL), (partial / "output.txt").read_text()[-2000:]
    model = train(stage, show_progress=False, n_threads=1)
    for path in sorted(uninterrupted.rglob("*.safetensors")):
        expected, got = load_file(path), load_file(model / path.relative_to(uninterrupted))
        assert expected.keys() == got.keys() and all(torch.equal(got[k], expected[k]) for k in expected)
    lines = (stage.folder / "log.jsonl").read_text()
    assert lines.count('"step": 3,') <= 6 and log_history(stage.folder)[-1]["step"] == 45
