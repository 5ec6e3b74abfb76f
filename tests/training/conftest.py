"""Stages and scenes for the tests of this folder."""

import pytest
from toy_data import TEXTS, toy_frames

from rvlm.data.actions import ActionSpec
from rvlm.data.windows import EpisodeWriter
from rvlm.training.stages import DETECTION, ROBOT, VISION_LANGUAGE, Stage

POLICY = {"structure": "one_step", "chunk_size": 3, "head_options": {"hidden": 32}}


@pytest.fixture
def stage(toy_vlm, toy_demos, tmp_path, monkeypatch):
    """46 steps of a one-step policy on synthetic demonstrations."""
    from toy_stages import toy_stage

    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    return toy_stage(toy_vlm, toy_demos, 46)


@pytest.fixture(scope="session")
def scenes(toy_home):
    """Folder of twelve scenes with questions."""
    from rvlm.envs.tabletop.rendered_scenes import make_scenes

    return str(make_scenes(toy_home / "scenes", "franka7", 1000, 12, 48))


@pytest.fixture(scope="session")
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
    adapted = {"finetuning": "lora", "lora_rank": 2, "freeze_vision": True, "ema_decay": 0.9, "backbone_learning_rate": 1e-3}
    mixed = {
        "data": (str(toy_demos), other_robot),
        "data_weights": (0.7, 0.3),
        "allow_new_embodiment": True,
        "vqa_data": (scenes,),
    }
    return {
        "detection": Stage("tower", DETECTION, (scenes,), **common),
        "vision_language": Stage("frozen", VISION_LANGUAGE, (scenes,), freeze_vision=True, **{**common, "init": str(llava)}),
        "adapters": Stage("adapted", data=(str(toy_demos),), **adapted, **robot),
        "mixture": Stage("mixed", **mixed, **robot),
    }
