"""`rvlm evaluate`: what it writes for any suite, what it refuses, and that it resumes."""

import re

import av
import pandas as pd
import pytest
from toy_suites import TASKS

from rvlm.cli.main import main
from rvlm.evaluation import closed_loop
from rvlm.experiments.recipes import POLICY
from rvlm.statistics import wilson


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def evaluate(*words):
    return main(["evaluate", *map(str, words), "--workers", "1"])


def test_the_shipped_policy_on_the_tabletop(home, capsys):
    assert evaluate(POLICY, "tabletop/franka7", "--episodes", 4, "--tasks", "turn_on_light", "open_drawer", "--films", 1) == 0
    (folder,) = (home / "evaluated").iterdir()
    episodes, printed = pd.read_parquet(folder / "episodes.parquet"), capsys.readouterr().out
    assert episodes["task"].tolist() == ["turn_on_light", "open_drawer"] * 2 and episodes["suite"].unique() == [
        "tabletop/franka7"
    ]
    assert re.search(rf"all tasks +{episodes['is_success'].sum()}/4 ", printed) and str(folder) in printed
    (film,) = (folder / "films").iterdir()
    with av.open(str(film)) as video:
        (stream,) = video.streams.video
        seed = int(film.stem.split("_")[-1])
        assert stream.frames == episodes.set_index("seed").loc[seed, "n_steps"] and stream.width == 2 * stream.height


def test_anybodys_suite_by_module_and_function(tmp_path, capsys):
    assert evaluate("random", "toy_suites:libero_stub", "--episodes", 14, "--output", tmp_path / "out") == 0
    episodes = pd.read_parquet(tmp_path / "out" / "episodes.parquet")
    table, printed = pd.read_csv(tmp_path / "out" / "success.csv").set_index("task"), capsys.readouterr().out
    assert list(table.index) == [*TASKS, "all tasks"] and len(episodes) == 14
    for task, group in [*episodes.groupby("task"), ("all tasks", episodes)]:
        rate = wilson(int(group["is_success"].sum()), len(group))
        expected = [rate.successes, rate.n, rate.low, rate.high]
        assert table.loc[task, ["successes", "n", "low", "high"]].tolist() == pytest.approx(expected)
        assert re.search(rf"{task} +{rate.successes}/{rate.n} ", printed)
    films = {path.name for path in (tmp_path / "out" / "films").iterdir()}
    assert {name.split("_")[0] for name in films} == {"failure", "success"} and len(films) == 4


def test_a_stopped_run_resumes(tmp_path, monkeypatch):
    ran, run_batch = [], closed_loop.run_batch
    monkeypatch.setattr(closed_loop, "run_batch", lambda *args: ran.append(args[1]) or run_batch(*args))
    for n_episodes in (10, 14, 14):
        evaluate("expert", "toy_suites:libero_stub", "--episodes", n_episodes, "--films", 0, "--output", tmp_path / "out")
    assert ran == [0, 1] and len(pd.read_parquet(tmp_path / "out" / "episodes.parquet")) == 14


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["random", "kitchen"], "no suite 'kitchen'; there are tabletop/..."),
        (["random", "tabletop/franka9"], "no robot 'franka9'; there are franka7"),
        (["random", "toy_suites:libero_stub", "--tasks", "lift"], "has no task 'lift'; there are push the block"),
        (["random", "toy_suites:libero_stub", "--episodes", "0"], "n_episodes"),
        (["random", "toy_suites:libero_stub", "--tasks", TASKS[0], TASKS[0]], "expected each task once"),
        (["random", "tabletop/ur6", "--device", "gpu"], "expected device 'cpu', 'cuda'"),
        ([POLICY, "toy_suites:libero_stub", "--episodes", "2"], "policy vs environment"),
        (["random", "toy_suites:old_step"], "to return (observation, reward, terminated, truncated, info), got 4 values; return"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_words(words, message, capsys):
    assert evaluate(*words) == 2
    assert message in capsys.readouterr().err
