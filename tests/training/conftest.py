"""A stage and scenes for the tests of this folder."""

import pytest


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
