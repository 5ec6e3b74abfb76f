"""Success of the scripted experts: every robot and task family over the same seeds, as a table.

    python benchmarks/experts.py [--seeds 200] [--workers N]

A cell is the share of seeds that the expert solves without noise within 100 control steps [%]. The exit status is 1 if a cell
is below 95 %; families out of a robot's reach have none.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pandas as pd

from rvlm.envs.tabletop.arms import ARMS
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.robosuite_arms import ROBOTS
from rvlm.envs.tabletop.tasks import ALL_FAMILIES

MAX_STEPS, FLOOR = 100, 0.95
SIMULATED = (*ARMS, "franka7_joint", "so101")


class StateOnly(Tabletop):
    """Without images: experts use the true state alone."""

    def _observe(self):
        return {}


def solved(robot, family, n_seeds):
    """Number of seeds from 0 on that the expert solves."""
    env, n = StateOnly(robot, max_steps=MAX_STEPS), 0
    for seed in range(n_seeds):
        env.reset(seed=seed, options={"task": family})
        is_success = is_over = False
        while not (is_success or is_over):
            _, _, is_success, is_over, _ = env.step(env.expert_action())
        n += is_success
    return robot, family, n


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    in_reach = {robot: ROBOTS[robot].workspace.families or ALL_FAMILIES for robot in SIMULATED}
    cells = [(robot, family, options.seeds) for robot in SIMULATED for family in ALL_FAMILIES if family in in_reach[robot]]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        rows = list(pool.map(solved, *zip(*cells, strict=True)))
    table = pd.DataFrame(rows, columns=["robot", "family", "solved"]).pivot(index="family", columns="robot", values="solved")
    print((100 * table.loc[list(ALL_FAMILIES), list(SIMULATED)] / options.seeds).round(1).to_string())
    worst = min(rows, key=lambda row: row[2])
    print(f"\n{options.seeds} seeds a cell, {options.workers} workers; lowest: {worst[0]} {worst[1]} {worst[2]}/{options.seeds}")
    sys.exit(worst[2] < FLOOR * options.seeds)


if __name__ == "__main__":
    main()
