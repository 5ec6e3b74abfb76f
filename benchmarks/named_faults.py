"""How many faults does the diagnosis name? Counts on robots for which its checks were not written first.

Robots: stand-ins of five public cards without physics (`rvlm.envs.stand_in`: displacements and targets, poses and joints, one arm
and two, a plane); their policy is the expert that recorded the demonstrations, of which only `select_action` is known. With
`--robots` the tabletop's, with trained policies: the shipped one of "franka7", the first of `benchmarks/robots.py` of others.

For each: diagnoses without a fault, the faults that the checks were written for, others, fresh ones (`other_faults.py`), and
pairs of the first kind, where one of the two must be named. Nothing here is a sample (diagnoses without a fault draw from the
same episodes, and each robot has the same faults), so counts have no intervals. Writes `results/tables/named_faults.csv`
(counts), `named_faults_each.csv` (what was named, fault by fault), and setup, commit and hardware to `results/named_faults.json`.

    python benchmarks/named_faults.py [--cards so101 ...] [--robots franka7 so101 ...]
"""

import argparse
import json
import tempfile
from pathlib import Path

import pandas as pd
from other_faults import FRESH, OTHER

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
from rvlm.provenance import provenance
from rvlm.report.findings import save_table

CARDS = ("so101", "pusht", "libero", "fractal", "aloha")
N_CLEAN, N_PAIRS = 20, 40
POLICIES = {"cards": "the expert that recorded the demonstrations", "robots": "trained"}
COLUMNS = ["robot", "kind", "fault", "right", "named", "is_right"]


def tabletop_inputs(robot):
    """Demonstrations, environment and a trained policy of one of the tabletop's robots."""
    recipe = ROBOT_RECIPES.get(robot) or RobotRecipe(f"tabletop/{robot}", n_demonstrations=60)
    policy = load_policy(train_on_robot(robot)[0] if robot in ROBOT_RECIPES else POLICY)
    data = EpisodeDataset(collect_demonstrations(Collection(recipe.suite, recipe.n_demonstrations, recipe.tasks)))
    return DiagnosisInputs(policy, data, load_suite(recipe.suite).make(policy.image_size), n_episodes=3, n_frames=48)


def rows_of(robot, inputs):
    """A row per diagnosis: robot, kind, fault, names that count as right, what was named, and whether that is right."""
    for i, named in enumerate(false_alarms(inputs, N_CLEAN)):
        yield robot, "no fault", f"draw {i}", "none", named or "none", named is None
    known = faults_of(inputs)
    for fault, row in zip(known, named_faults(inputs, known).itertuples(), strict=True):
        yield robot, "known", row.name, fault.expected, row.fault or "none", row.is_right
    for kind, faults in (("other", OTHER), ("fresh", FRESH)):
        for fault in faults:
            if fault.applies(inputs.dataset.require_spec()):
                yield robot, *row_of(kind, fault, first_fault(diagnose(fault.inject(inputs))))
    for one, other, named in named_pairs(inputs, known, N_PAIRS):
        name = f"{one.where}: {one.description} + {other.where}: {other.description}"
        yield robot, "pair", name, f"{one.expected} or {other.expected}", named or "none", named in (one.expected, other.expected)


def row_of(kind, fault, named):
    """The same for an injected fault of `other_faults.py`: any name is right where the fault has none."""
    right = " or ".join(fault.names) or "any fault"
    is_right = named in fault.names if fault.names else named is not None
    return kind if fault.names else f"{kind}, no name", f"{fault.where}: {fault.description}", right, named or "none", is_right


def counts_of(table):
    """Of each kind, on each robot and on all: how many diagnoses are right, of how many."""
    of_robots = table.groupby(["kind", "robot"], sort=False)["is_right"].agg(["sum", "size"]).reset_index()
    of_all = table.groupby("kind", sort=False)["is_right"].agg(["sum", "size"]).reset_index().assign(robot="all")
    return pd.concat([of_robots, of_all])[["kind", "robot", "sum", "size"]].set_axis(["kind", "robot", "right", "n"], axis=1)


def each_fault(table):
    """What was named of each single fault on each robot; empty where the robot cannot have it."""
    single = table[~table["kind"].isin(["no fault", "pair"])]
    keys = ["kind", "fault", "right"]
    named = single.pivot_table(index=keys, columns="robot", values="named", aggfunc="first", sort=False)
    n = single.groupby(keys, sort=False)["is_right"].agg(["sum", "size"])
    return named.fillna("").assign(count=n["sum"].astype(str) + "/" + n["size"].astype(str)).reset_index()


def main():
    """Diagnose, and write and print the counts."""
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
    save(pd.DataFrame(rows, columns=COLUMNS), vars(arguments))


def save(table, options):
    """Write the tables and the setup; print the counts, and what was missed."""
    counts = save_table(counts_of(table), "named_faults")
    each = save_table(each_fault(table), "named_faults_each")
    missed = table[~table["is_right"]].drop(columns="is_right")
    record = {**options, "policies": POLICIES, **provenance(), "counts": counts.to_dict("records")}
    atomic_write(results_dir() / "named_faults.json", json.dumps({**record, "missed": missed.to_dict("records")}, indent=1))
    for kind, robot, right, n in counts.itertuples(index=False):
        print(f"{kind:16} {robot:20} {right:3}/{n}")
    with pd.option_context("display.width", 250, "display.max_colwidth", 60, "display.max_columns", 12):
        print(each[["fault", "count"]].to_string(index=False))
        print(missed.to_string(index=False))


if __name__ == "__main__":
    main()
