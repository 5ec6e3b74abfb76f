"""Success of a policy of each kind of robot beside its controls, as one table with intervals.

    python benchmarks/robots.py [--robots so101 ...] [--trainings 3] [--episodes 60] [--workers N]

Records demonstrations, trains and evaluates what is not cached, and writes `results/tables/robots.csv` and `.tex`. The exit
status is 1 if a trained policy does not clearly beat a control: if their 95 % intervals overlap.
"""

import argparse
import os
import sys
import time

import pandas as pd

from rvlm.experiments.robots import ROBOT_RECIPES, beats_controls, evaluate_on_robot, robots_table, train_on_robot
from rvlm.report.findings import save_table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--robots", nargs="+", default=list(ROBOT_RECIPES), choices=list(ROBOT_RECIPES))
    parser.add_argument("--trainings", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    episodes = []
    for robot in options.robots:
        started = time.perf_counter()
        models = train_on_robot(robot, range(options.trainings))
        trained_s = time.perf_counter() - started
        episodes.append(evaluate_on_robot(robot, models, options.episodes, options.workers))
        evaluated_s = time.perf_counter() - started - trained_s
        print(f"{robot}: recorded and trained in {trained_s:.0f} s, evaluated in {evaluated_s:.0f} s")
    table = save_table(robots_table(pd.concat(episodes)), "robots")
    print(table.to_string(index=False, float_format="%.3f"))
    beats = beats_controls(table)
    print(
        ", ".join(
            f"{robot}: {'beats its controls' if does else 'not shown to beat its controls'}" for robot, does in beats.items()
        )
    )
    sys.exit(not all(beats.values()))


if __name__ == "__main__":
    main()
