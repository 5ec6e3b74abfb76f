"""Success of a policy of each kind of robot beside its controls, as one table with intervals.

    python benchmarks/robots.py [--robots so101 ...] [--trainings 3] [--episodes 60] [--first-seed 910000] [--workers N]

Records demonstrations, trains and evaluates what is not cached, and writes `results/tables/robots.csv` and `robots_tasks.csv`
(and `.tex`), and the setup with commit and hardware to `results/robots.json`. No recipe was chosen on these scenes. Each trained
policy is compared with each control in the same scenes; the contrasts of a robot are adjusted together (Holm), and the exit
status is 1 unless all are supported.
"""

import argparse
import dataclasses
import json
import os
import sys
import time

import pandas as pd

from rvlm.experiments.robots import ROBOT_RECIPES, evaluate_on_robot, gains_over_controls, robots_table, train_on_robot
from rvlm.files import atomic_write, results_dir
from rvlm.provenance import provenance
from rvlm.report.findings import save_table
from rvlm.statistics import verdict


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--robots", nargs="+", default=list(ROBOT_RECIPES), choices=list(ROBOT_RECIPES))
    parser.add_argument("--trainings", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--first-seed", type=int, default=910_000, help="of the scenes")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    episodes, seconds = [], {}
    for robot in options.robots:
        started = time.perf_counter()
        models = train_on_robot(robot, range(options.trainings))
        trained_s = time.perf_counter() - started
        episodes.append(evaluate_on_robot(robot, models, options.episodes, options.workers, options.first_seed))
        evaluated_s = time.perf_counter() - started - trained_s
        seconds[robot] = {"recorded and trained": round(trained_s), "evaluated": round(evaluated_s)}
        print(f"{robot}: recorded and trained in {trained_s:.0f} s, evaluated in {evaluated_s:.0f} s")
    table = save_table(robots_table(pd.concat(episodes)), "robots")
    tasks = save_table(robots_table(pd.concat(episodes), ("robot", "task", "control")), "robots_tasks")
    print(table.to_string(index=False, float_format="%.3f"))
    gains = [
        {"robot": robot, "control": control, "gain": gain.estimate, "low": gain.low, "high": gain.high, "verdict": verdict(gain)}
        for robot, of_robot in gains_over_controls(pd.concat(episodes)).items()
        for control, gain in of_robot.items()
    ]
    print(pd.DataFrame(gains).to_string(index=False, float_format="%+.3f"))
    recipes = {robot: dataclasses.asdict(ROBOT_RECIPES[robot]) for robot in options.robots}
    record = {**vars(options), "recipes": recipes, "seconds": seconds, **provenance(), "gains": gains}
    record |= {"rows": table.to_dict("records"), "tasks": tasks.to_dict("records")}
    atomic_write(results_dir() / "robots.json", json.dumps(record, indent=1))
    sys.exit(any(gain["verdict"] != "supported" for gain in gains))


if __name__ == "__main__":
    main()
