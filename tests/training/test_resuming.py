"""Killed at any moment, every kind of stage gives the result of an uninterrupted one."""

import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rvlm.training.launch import _fork, prepare, train
from rvlm.training.trainer import log_history
from rvlm.training.trainer_checkpoints import last_checkpoint


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
