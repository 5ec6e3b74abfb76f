"""Grids: a study that is shared, gone on with, and stops what does badly."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from rvlm.grids import PAPER, SMALL, importance, search, storage_of, study_of, table
from rvlm.stages import ROBOT, Stage
from rvlm.trainer import log_history

GRID = {"learning_rate": (1e-3, 1e-4), "weight_decay": (0.0, 0.1)}


@pytest.fixture
def stage(toy_vlm, toy_demos, tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    policy = {"structure": "one_step", "chunk_size": 3, "head_options": {"hidden": 32}}
    return Stage("grid", ROBOT, (str(toy_demos),), str(toy_vlm), 16, policy=policy, batch_size=8, n_processes=1)


def end_of(model):
    return [entry["loss"] for entry in log_history(Path(model).parent) if "loss" in entry][-1]


def test_the_grids_are_settings_of_a_stage(stage):
    assert len(PAPER["learning_rate"]) * len(PAPER["weight_decay"]) * len(PAPER["batch_size"]) * len(PAPER["warmup"]) == 36
    for grid in (PAPER, SMALL):
        for key, values in grid.items():
            assert all(dataclasses.replace(stage, n_samples=512, **{key: value}) for value in values)


def test_every_point_of_a_grid_is_tried_once_and_a_study_is_gone_on_with(stage):
    make = lambda **settings: dataclasses.replace(stage, **settings)  # noqa: E731
    search("toy", GRID, make, end_of, n_trials=2, n_threads=1)
    assert len(table(study_of("toy", GRID))) == 2
    study = search("toy", GRID, make, end_of, n_trials=4, n_threads=1)
    tried = table(study)
    assert len(tried) == 4 and len(tried[["learning_rate", "weight_decay"]].drop_duplicates()) == 4
    assert tried["value"].notna().all() and (tried["seconds"] > 0).all()
    assert study.best_value == tried["value"].min()
    assert len(table(search("toy", GRID, make, end_of, n_trials=4, n_threads=1))) == 4, "what is complete is left as it is"
    assert set(importance(study).index) == set(GRID)


WORKER = """
import dataclasses, sys
from rvlm.grids import search
from rvlm.stages import Stage
import test_grids
stage = Stage(**{stage!r})
search("shared", test_grids.GRID, lambda **s: dataclasses.replace(stage, **s), test_grids.end_of, 4, n_threads=1)
"""


def test_two_workers_share_one_study(stage):
    study_of("shared", GRID)  # so that both find it
    code = WORKER.format(stage=dataclasses.asdict(stage))
    workers = [subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    tried = table(optuna.load_study(study_name="shared", storage=storage_of("shared")))
    assert 4 <= len(tried) <= 5 and len(tried[["learning_rate", "weight_decay"]].drop_duplicates()) == 4


def test_what_does_badly_is_stopped(stage, tmp_path):
    """Four good trainings, then one with a step so large that its loss is soon no number any more."""
    grid = {"learning_rate": (1e-3, 1.1e-3, 1.2e-3, 1.3e-3, 10.0)}
    study = study_of("pruned", grid)
    for rate in grid["learning_rate"]:
        study.enqueue_trial({"learning_rate": rate})
    long = dataclasses.replace(stage, n_samples=8 * 160, schedule="constant", warmup=0.0)
    search("pruned", grid, lambda **s: dataclasses.replace(long, **s), end_of, n_trials=5, n_threads=1)
    tried = table(study_of("pruned", grid)).sort_values("learning_rate")
    assert tried["state"].tolist() == ["COMPLETE"] * 4 + ["PRUNED"]
    assert tried["value"].notna().tolist() == [True] * 4 + [False]
    stopped = dataclasses.replace(long, learning_rate=10.0).folder
    assert not stopped.exists() and 0 < log_history(stopped.with_name(stopped.name + ".partial"))[-1]["step"] < 160
