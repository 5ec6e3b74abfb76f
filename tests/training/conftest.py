"""A stage for the tests of this folder."""

import pytest


@pytest.fixture
def stage(toy_vlm, toy_demos, tmp_path, monkeypatch):
    """46 steps of a one-step policy on synthetic demonstrations."""
    from toy_stages import toy_stage

    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    return toy_stage(toy_vlm, toy_demos, 46)
