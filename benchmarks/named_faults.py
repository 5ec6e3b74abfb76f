"""How many faults does the diagnosis name? On robots that it was not written for, with faults that it was not written for.

Robots: stand-ins of five public cards (`rvlm.envs.stand_in`: displacements and targets, poses and joints, one arm and two, a
plane), with a policy of which only `select_action` is known; with `--robots` the tabletop's, with trained policies: the shipped
one of "franka7", the first of `benchmarks/robots.py` of others. For each: diagnoses without a fault, the faults that the checks
were written for, held-out ones (`held_out_faults.py`), and pairs of the first kind, where one of the two must be named. Writes
`results/named_faults.csv`; prints it with 95 % intervals (Wilson).

    python benchmarks/named_faults.py [--cards so101 ...] [--robots franka7 so101 ...]
"""

import argparse
import json
import tempfile
from pathlib import Path

import pandas as pd
from held_out_faults import HELD_OUT

from rvlm.data.windows import EpisodeDataset
from rvlm.diagnosis.checklist import diagnose, first_fault
from rvlm.diagnosis.faults import faults_of
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.naming import false_alarms, named_faults, named_pairs, stand_in_inputs
from rvlm.envs.demonstrations import Collection, collect_demonstrations
from rvlm.envs.suites import load_suite
from rvlm.experiments.recipes import POLICY
from rvlm.experiments.robots import ROBOT_RECIPES, RobotRecipe, train_on_robot
from rvlm.files import atomic_write, results_dir
from rvlm.policy.policy import load_policy
from rvlm.statistics import wilson

CARDS = ("libero", "fractal", "so101", "aloha", "pusht")
N_CLEAN, N_PAIRS = 20, 40


def tabletop_inputs(robot):
    """Demonstrations, environment and a trained policy of one of the tabletop's robots."""
    recipe = ROBOT_RECIPES.get(robot) or RobotRecipe(f"tabletop/{robot}", n_demonstrations=60)
    policy = load_policy(train_on_robot(robot)[0] if robot in ROBOT_RECIPES else POLICY)
    data = EpisodeDataset(collect_demonstrations(Collection(recipe.suite, recipe.n_demonstrations, recipe.tasks)))
    return DiagnosisInputs(policy, data, load_suite(recipe.suite).make(policy.image_size), n_episodes=3, n_frames=48)


def rows_of(robot, inputs):
    """A row per diagnosis: robot, kind, fault, what was named, and whether that is right."""
    for i, named in enumerate(false_alarms(inputs, N_CLEAN)):
        yield robot, "no fault", f"draw {i}", named, named is None
    known = faults_of(inputs)
    for row in named_faults(inputs, known).itertuples():
        yield robot, "known", row.name, row.fault, row.is_right
    for fault in HELD_OUT:
        if fault.applies(inputs.dataset.require_spec()):
            named = first_fault(diagnose(fault.inject(inputs)))
            kind = "held out" if fault.names else "held out, without a name"
            yield robot, kind, f"{fault.where}: {fault.description}", named, named in fault.names if fault.names else bool(named)
    for one, other, named in named_pairs(inputs, known, N_PAIRS):
        name = f"{one.where}: {one.description} + {other.where}: {other.description}"
        yield robot, "pair", name, named, named in (one.expected, other.expected)


def main():
    """Diagnose, and print the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cards", nargs="*", default=CARDS)
    parser.add_argument("--robots", nargs="*", default=[], choices=["franka7", *ROBOT_RECIPES])
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for card in arguments.cards:
            rows += rows_of(f"{card} (stand-in)", stand_in_inputs(card, Path(folder) / card, n_episodes=4, n_frames=40))
    for robot in arguments.robots:
        rows += rows_of(f"tabletop_{robot}", tabletop_inputs(robot))
    table = pd.DataFrame(rows, columns=["robot", "kind", "fault", "named", "is_right"])
    atomic_write(results_dir() / "named_faults.csv", table.to_csv(index=False))
    counts = table.groupby(["kind", "robot"], sort=False)["is_right"].agg(["sum", "size"])
    for (kind, robot), (right, n) in counts.iterrows():
        rate = wilson(int(right), int(n))
        print(f"{kind:26} {robot:22} {int(right):3}/{int(n):<3} {rate.rate:5.0%} [{rate.low:.0%}, {rate.high:.0%}]")
    missed = table[~table["is_right"]].drop(columns="is_right")
    print(json.dumps(missed.to_dict("records"), indent=1, default=str))


if __name__ == "__main__":
    main()
