"""Checkpoints of a training: it resumes from the newest complete one, whatever is missing of others."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from toy_stages import toy_stage, trained

from rvlm.training.trainer import log_history, train_stage_in_process
from rvlm.training.trainer_checkpoints import last_checkpoint, write_manifest


def test_the_newest_complete_checkpoint_is_taken(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, is_complete in ((8, True), (20, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        if is_complete:
            write_manifest(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path).endswith("checkpoint-20")
    (tmp_path / "checkpoint-20" / "notes.txt").write_text("what others put there does not matter")
    assert last_checkpoint(tmp_path).endswith("checkpoint-20")


PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json")


DAMAGES = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.fixture(scope="module")
def checkpoint(toy_vlm, toy_demos, tmp_path_factory):
    """A stage of 40 steps, trained without interruption, and its folder with checkpoints at 20 and 40."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RVLM_HOME", str(folder / "home"))
        forty = toy_stage(toy_vlm, toy_demos, 40)
        train_stage_in_process(forty, folder)
    return forty, folder


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("part", PARTS)
def test_an_incomplete_checkpoint_is_skipped(checkpoint, part, damage, tmp_path):
    shutil.copytree(checkpoint[1] / "trainer", tmp_path, dirs_exist_ok=True)
    assert last_checkpoint(tmp_path).endswith("checkpoint-40")
    damage(tmp_path / "checkpoint-40" / part)
    assert last_checkpoint(tmp_path).endswith("checkpoint-20")
    damage(tmp_path / "checkpoint-20" / part)
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("whole", [(40,), (20,), ()], ids=["at the end", "half", "nothing"])
def test_a_stage_resumes_from_the_newest_complete_checkpoint(checkpoint, whole, tmp_path):
    """Its last checkpoint is at its end: only the model is left to write."""
    stage, uninterrupted = checkpoint
    shutil.copytree(uninterrupted / "trainer", tmp_path / "trainer")
    for step in {20, 40} - set(whole):
        DAMAGES["half"](tmp_path / "trainer" / f"checkpoint-{step}" / "optimizer.pt")
    resumed, expected = trained(stage, tmp_path), load_file(uninterrupted / "model" / "model.safetensors")
    assert all(torch.equal(resumed[k], expected[k]) for k in expected)
    first = next((entry["step"] for entry in log_history(tmp_path)), 0)
    assert first == min(max(whole, default=0) + 1, 40), "it began elsewhere"
