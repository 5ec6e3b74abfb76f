"""Hyperparameter search: a study that workers share, that resumes, and that prunes bad trials."""

import dataclasses
import functools
import itertools
import multiprocessing
import shutil
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from rvlm.evaluation.open_loop import open_loop_errors
from rvlm.training.search import PAPER, SMALL, _code_of_score, default_storage, importance, load_or_create_study, search, table
from rvlm.training.stages import ROBOT, Stage
from rvlm.training.trainer import log_history

GRID = {"learning_rate": (1e-3, 1e-4), "weight_decay": (0.0, 0.1)}


@pytest.fixture
def stage(toy_vlm, toy_demos, tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    policy = {"structure": "one_step", "chunk_size": 3, "head_options": {"hidden": 32}}
    return Stage("grid", ROBOT, (str(toy_demos),), str(toy_vlm), 16, policy=policy, batch_size=8, n_processes=1)


def end_of(model):
    return [entry["loss"] for entry in log_history(Path(model).parent) if "loss" in entry][-1]


def test_the_grids_are_settings_of_a_stage(stage):
    assert len(PAPER["learning_rate"]) * len(PAPER["weight_decay"]) * len(PAPER["batch_size"]) * len(PAPER["warmup_ratio"]) == 36
    for grid in (PAPER, SMALL):
        for key, values in grid.items():
            assert all(dataclasses.replace(stage, n_samples=512, **{key: value}) for value in values)


def test_every_point_of_a_grid_is_tried_once_and_a_study_resumes(stage):
    make = lambda **settings: dataclasses.replace(stage, **settings)  # noqa: E731
    search("toy", GRID, make, end_of, n_trials=2, n_threads=1)
    assert len(table(load_or_create_study("toy", GRID))) == 2
    study = search("toy", GRID, make, end_of, n_trials=4, n_threads=1)
    tried = table(study)
    assert len(tried) == 4 and len(tried[["learning_rate", "weight_decay"]].drop_duplicates()) == 4
    assert tried["value"].notna().all() and (tried["seconds"] > 0).all()
    assert study.best_value == tried["value"].min()
    assert len(table(search("toy", GRID, make, end_of, n_trials=4, n_threads=1))) == 4, "what is complete is left as it is"
    assert set(importance(study).index) == set(GRID)


def share_a_study(stage, home):
    """A worker of a search; the study is tested, so nothing is trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RVLM_HOME", home)
        patch.setattr("rvlm.training.search.train", lambda *_, **__: "model")
        search("shared", GRID, lambda **s: dataclasses.replace(stage, **s), lambda _: 1.0, 4)


def test_two_workers_share_one_study(stage, tmp_path):
    context = multiprocessing.get_context("forkserver")
    workers = [context.Process(target=share_a_study, args=(stage, str(tmp_path / "home"))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    tried = table(optuna.load_study(study_name="shared", storage=default_storage("shared")))
    assert 4 <= len(tried) <= 5 and len(tried[["learning_rate", "weight_decay"]].drop_duplicates()) == 4


def test_a_bad_trial_is_pruned(stage, tmp_path):
    """Four good trainings, then one with a learning rate so large that its loss becomes NaN."""
    grid = {"learning_rate": (1e-3, 1.1e-3, 1.2e-3, 1.3e-3, 10.0)}
    study = load_or_create_study("pruned", grid)
    for rate in grid["learning_rate"]:
        study.enqueue_trial({"learning_rate": rate})
    long = dataclasses.replace(stage, n_samples=8 * 80, lr_scheduler_type="constant", warmup_ratio=0.0)
    search("pruned", grid, lambda **s: dataclasses.replace(long, **s), end_of, n_trials=5, n_threads=1)
    tried = table(load_or_create_study("pruned", grid)).sort_values("learning_rate")
    assert tried["state"].tolist() == ["COMPLETE"] * 4 + ["PRUNED"]
    assert tried["value"].notna().tolist() == [True] * 4 + [False]
    stopped = dataclasses.replace(long, learning_rate=10.0).folder
    assert not stopped.exists() and 0 < log_history(stopped.with_name(stopped.name + ".partial"))[-1]["step"] < 80


def untrained(monkeypatch, fail=lambda settings: None):
    """A search without training: a stage is its settings, its score the number of trials before it."""
    tried = []

    def run(settings, **_):
        tried.append(settings)
        fail(settings)
        return Path("model")

    monkeypatch.setattr("rvlm.training.search.train", run)

    def go_on(grid, n, name="toy"):
        make = lambda **settings: SimpleNamespace(name="toy", folder=Path("toy"), **settings)  # noqa: E731
        return search(name, grid, make, lambda _: 1.0, n)

    return tried, go_on


MANY = {"data_weights": [(0.5, 0.5), (0.9, 0.1)], "policy": ({"head": "mlp"}, {"head": "flow"}), "freeze_vision": (None,)}


def test_a_study_over_values_that_no_database_holds_resumes(home, monkeypatch):
    """Tuples, dictionaries, None: each trial's stage gets the values themselves, and its table can be read."""
    tried, go_on = untrained(monkeypatch)
    for n in (1, 2, 4, 20):
        study = go_on(MANY, n)
        assert len(study.trials) == min(n, 4) == len(tried)
    points = [(s.data_weights, s.policy["head"], s.freeze_vision) for s in tried]
    assert sorted(points, key=str) == sorted(itertools.product(MANY["data_weights"], ("mlp", "flow"), (None,)), key=str)
    assert set(table(study)["data_weights"]) == {"[0.5, 0.5]", "[0.9, 0.1]"}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            {**MANY, "data_weights": [*MANY["data_weights"], (0.1, 0.9)]},
            r"created with 'data_weights' of .*got .*0\.1, 0\.9.*another study",
        ),
        ({**MANY, "seed": (0, 1)}, "was created with .*, got seed too; use the same grid"),
        ({"data_weights": MANY["data_weights"]}, "was created with 'policy' of .*, got no such setting"),
        ({**MANY, "data_weights": []}, r"expected one or more distinct values of 'data_weights', got \[\]"),
        ({**MANY, "data_weights": [{1, 2}]}, "expected JSON-serializable values of 'data_weights'"),
    ],
)
def test_another_grid_is_refused_before_anything_is_tried(home, monkeypatch, grid, message):
    tried, go_on = untrained(monkeypatch)
    go_on(MANY, 1, "other")
    n = len(tried)
    with pytest.raises(ValueError, match=message):
        go_on(grid, 20, "other")
    assert len(tried) == n and len(load_or_create_study("other", MANY).trials) == 1


@pytest.mark.parametrize("name", ["a/b", "../a", "", "a?b", "a#b", ".hidden"])
def test_a_name_that_is_no_file_name_is_refused(home, name):
    with pytest.raises(ValueError, match="expected a file name of letters, digits"):
        load_or_create_study(name, GRID)


def test_one_training_that_diverges_does_not_end_the_search(stage):
    """Its weights do become NaN; the other points are tried, and it is not tried again."""
    grid = {"learning_rate": (1e-3, 1e30, 1e-4)}
    make = lambda **settings: dataclasses.replace(stage, **settings, lr_scheduler_type="constant", warmup_ratio=0.0)  # noqa: E731
    for _ in range(2):
        study = search("diverging", grid, make, end_of, n_trials=3, n_threads=1)
        assert len(study.trials) == 3
    tried = table(study).set_index("learning_rate")
    assert tried["state"].to_dict() == {1e-3: "COMPLETE", 1e30: "FAIL", 1e-4: "COMPLETE"}
    assert "NaN or infinite; use a smaller learning_rate" in tried.loc[1e30, "reason"]
    assert study.best_params["learning_rate"] != 1e30


def test_an_interrupted_trial_is_tried_again(home, monkeypatch):
    """By the user, or by an error that is fixed meanwhile; a kill leaves a trial that seems to run, and is tried again too."""
    breaks = [KeyboardInterrupt, ZeroDivisionError]

    def fail(settings):
        if breaks:
            raise breaks.pop()

    _, go_on = untrained(monkeypatch, fail)
    load_or_create_study("broken", GRID).ask()  # the state after a kill
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error):
            go_on(GRID, 4, "broken")
    assert len(table(go_on(GRID, 4, "broken"))[["learning_rate", "weight_decay"]].drop_duplicates()) == 4


def test_a_nan_score_is_recorded_as_the_reason(home, monkeypatch):
    monkeypatch.setattr("rvlm.training.search.train", lambda *_, **__: Path("model"))
    study = search(
        "nan", {"seed": (0, 1)}, lambda **s: SimpleNamespace(name="toy", folder=Path("toy")), lambda _: float("nan"), 2
    )
    assert table(study)["reason"].tolist() == ["stage 'toy': its score is NaN"] * 2


def test_trials_of_other_code_are_not_taken_over(home, monkeypatch):
    monkeypatch.setattr("rvlm.training.search.SEARCH_CODE", SimpleNamespace(hash="before"))
    address, before = default_storage("coded"), len(load_or_create_study("coded", GRID).trials)
    monkeypatch.setattr("rvlm.training.search.SEARCH_CODE", SimpleNamespace(hash="after"))
    assert default_storage("coded") != address and before == 0
    with pytest.raises(ValueError, match=r"study 'coded' .*was created with other training code; use another study name"):
        load_or_create_study("coded", GRID, storage=address)


def far_mm(model):
    return 1000 * open_loop_errors(model)


def test_trials_of_other_data_or_another_score_are_not_taken_over(stage, toy_demos, tmp_path, monkeypatch):
    """The same name with other demonstrations, another budget, another score, or other code that the score calls."""
    monkeypatch.setattr("rvlm.training.search.train", lambda *_, **__: Path("model"))
    go_on = lambda stage, score: search("one", GRID, lambda **s: dataclasses.replace(stage, **s), score, 1)  # noqa: E731
    go_on(stage, score := lambda _: 1.0)
    more = shutil.copytree(toy_demos, tmp_path / "more")
    (more / "notes.md").write_text("more")
    for other in (dataclasses.replace(stage, data=(str(more),)), dataclasses.replace(stage, n_samples=32)):
        with pytest.raises(
            ValueError, match=r"study 'one' was created with other data, initial weights or settings; use another study name"
        ):
            go_on(other, score)
    with pytest.raises(ValueError, match=r"study 'one' was created with other score; use another study name"):
        go_on(stage, lambda _: 2.0)
    assert len(load_or_create_study("one", GRID).trials) == 1

    with pytest.raises(ValueError, match=r"study 'one' was created with other score; use another study name"):
        search("one", GRID, lambda **s: dataclasses.replace(stage, **s), score, 1, scored_on="other episodes")
    with pytest.raises(ValueError, match=r"expected the score as a function, got functools.partial"):
        go_on(stage, functools.partial(far_mm))

    asked = []
    monkeypatch.setattr("rvlm.training.search.hash_of_code", lambda *names: asked.append(names) or "code")
    assert _code_of_score(far_mm) != _code_of_score(end_of)
    assert asked == [("rvlm.evaluation.open_loop",), ("rvlm.training.trainer",)], "another way to measure errors is another score"
    assert _code_of_score(lambda m: [round(open_loop_errors(x), DIGITS) for x in m]) != _code_of_score(lambda m: [0.0])
    assert asked[2] == ("rvlm.evaluation.open_loop",), "also where it is named within a comprehension"


DIGITS = 2


def test_a_reformatted_score_is_the_same():
    one = [_code_of_score(f) for f in (lambda _: 1.0, lambda _: 2.0)]
    two = [
        _code_of_score(lambda _: 1.0),  # alone on its line
    ]
    assert one[0] == two[0] != one[1]


def test_a_study_without_a_hash_of_what_its_trials_share_is_refused(home, stage, tmp_path):
    """As one that an earlier version wrote: its trials may be of other data."""
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(study_name="old", storage=storage, direction="minimize")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(ValueError, match=r"study 'old' .*was created with other training code; use another study name"):
        search("old", GRID, lambda **s: dataclasses.replace(stage, **s), lambda _: 1.0, 1, storage=storage)
