"""`rvlm evaluate`: closed-loop success of a policy on a suite: a table per task, every episode, and films."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rvlm.cli import add_command
from rvlm.files import artifacts_dir, atomic_write
from rvlm.report.notebooks import InvalidRun

EVALUATE_ABOUT = "evaluate a policy in closed loop on a suite"
EVALUATE_MORE = """POLICY is the folder of a policy, its name on the Hub, "random" (chance), or "expert" (the environment's own).
SUITE is tabletop/ROBOT, tabletop/ROBOT/SETTING, or your own as package.module:function, looked up from here; the function
returns a Suite (python -c "import rvlm; help(rvlm.Suite)").

Tasks alternate. Episodes have fixed, distinct seeds, or each of the suite's fixed initial states once. The output folder gets
  success.csv        per task and over all: successes, n, rate, Wilson's 95 % interval
  episodes.parquet   a row an episode: task, seed, instruction, success, failure, steps, seconds
  films/             failed and successful episodes, the cameras side by side
Finished episodes are cached (RVLM_HOME moves the cache), so a stopped run resumes, and more episodes add to those that there are.

examples:
  rvlm evaluate rvlm/assets/policy tabletop/franka7 --episodes 100
  rvlm evaluate my_policy tabletop/franka7/new_start --tasks lift push_left --output lifts
  rvlm evaluate my_policy my_lab.kitchen:suite --device cuda:1 --films 0"""


def add_evaluate(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(commands, "evaluate", EVALUATE_ABOUT, EVALUATE_MORE)
    command.add_argument("policy", metavar="POLICY", help='folder, name on the Hub, "random" or "expert"')
    command.add_argument("suite", metavar="SUITE", help="environment and tasks, by name")
    about = "how many (default: 200, or every fixed initial state once)"
    command.add_argument("--episodes", type=int, metavar="N", help=about)
    command.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="some of the suite's (default: its default ones)")
    command.add_argument("--output", type=Path, metavar="DIR", help="folder to write to (default: artifacts/evaluated/...)")
    command.add_argument("--films", type=int, default=4, metavar="N", help="at most this many films (default: %(default)s)")
    command.add_argument("--action-steps", type=int, metavar="N", help="actions of a chunk to execute (default: the policy's)")
    command.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    command.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    command.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from rvlm.evaluation.closed_loop import evaluate

    sys.path.insert(0, str(Path.cwd()))  # where "my_module:suite" is looked up, also by worker processes
    try:
        evaluation = _evaluation(arguments)
        name = f"{Path(arguments.policy).name}-on-{evaluation.loaded_suite.name}".replace("/", "_").replace(":", "_")
        folder = arguments.output or artifacts_dir() / "evaluated" / f"{name}-{evaluation.folder.name}"
        episodes = evaluate({name: evaluation}, arguments.workers)
    except ValueError as error:  # suites, tasks, devices, conventions: refused in words
        raise InvalidRun(str(error)) from error
    table = _table(episodes)
    atomic_write(folder / "episodes.parquet", episodes.to_parquet())
    atomic_write(folder / "success.csv", table.to_csv(index=False))
    _print(table)
    for path in _films(evaluation, episodes, folder / "films", arguments.films):
        print(f"film: {path}")
    print(f"success.csv and episodes.parquet: {folder}")
    return 0


def _evaluation(arguments: argparse.Namespace) -> Any:
    from rvlm.envs.suites import load_suite
    from rvlm.evaluation.closed_loop import Evaluation

    suite = load_suite(arguments.suite)
    tasks = suite.known(tuple(arguments.tasks)) or suite.default_tasks
    policy = str(Path(arguments.policy).resolve()) if Path(arguments.policy).is_dir() else arguments.policy
    every = 200 if suite.n_starts is None else suite.n_starts * len(tasks)
    n = every if arguments.episodes is None else arguments.episodes
    options = {"n_action_steps": arguments.action_steps, "device": arguments.device}
    return Evaluation(policy, n, arguments.suite, tuple(arguments.tasks), **options)


def _table(episodes: Any) -> Any:
    """Success per task, and over all of them."""
    import pandas as pd

    from rvlm.evaluation.success import success_table

    together = success_table(episodes.assign(task="all tasks"), ["task"])
    return pd.concat([success_table(episodes, ["task"]), together], ignore_index=True)


def _print(table: Any) -> None:
    width = max(map(len, table["task"]))
    print(f"{'task':<{width}}  successes   rate  95 % interval")
    for row in table.itertuples():
        count, interval = f"{row.successes}/{row.n}", f"{100 * row.low:.0f} to {100 * row.high:.0f} %"
        print(f"{row.task:<{width}}  {count:>9}  {100 * row.rate:3.0f} %  {interval:>13}")


def _films(evaluation: Any, episodes: Any, folder: Path, n: int) -> list[Path]:
    """Films of the first failure and the first success of each task, failures first; at most n."""
    from rvlm.evaluation.replay import replay_episode
    from rvlm.report.plots.images import mp4, side_by_side

    firsts = episodes.drop_duplicates(["task", "is_success"]).sort_values("is_success", kind="stable").head(max(n, 0))
    paths = []
    for row in firsts.itertuples():
        film = side_by_side(replay_episode(evaluation, int(row.seed))["frames"])
        outcome = "success" if row.is_success else "failure"
        name = "".join(letter if letter.isalnum() else "_" for letter in str(row.task))
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{outcome}_{name}_{row.seed}.mp4")
        atomic_write(paths[-1], mp4(film, evaluation.loaded_suite.spec.rate_hz))
    return paths
