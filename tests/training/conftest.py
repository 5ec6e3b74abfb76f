"""A stage for the tests of this folder."""

import pytest


@pytest.fixture
def stage(toy_vlm, toy_demos, tmp_path, monkeypatch):
    """46 steps of a one-step policy on synthetic demonstrations."""
    from toy_stages import ONE_STEP

    from rvlm.training.stages import ROBOT, Stage

    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    return Stage("toy", ROBOT, (str(toy_demos),), str(toy_vlm), 8 * 46, policy=ONE_STEP, batch_size=8, n_processes=1)
