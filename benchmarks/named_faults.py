"""How many faults does the diagnosis name? On robots that it was not written for, with faults that it was not written for.

Robots: stand-ins of five public cards (`rvlm.envs.stand_in`: displacements and targets, poses and joints, one arm and two, a
plane), with a policy of which only `select_action` is known; with `--tabletop` also the tabletop's arm with the shipped policy.
For each: diagnoses without a fault, the faults that the checks were written for, held-out ones (`held_out_faults.py`), and pairs
of the first kind, where one of the two must be named. Writes `results/named_faults.csv`; prints it with 95 % intervals (Wilson).

    python benchmarks/named_faults.py [--tabletop]
"""

import argparse
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from held_out_faults import HELD_OUT

from rvlm.data.actions import ActionSpec
from rvlm.data.windows import EpisodeDataset
from rvlm.diagnosis.checklist import diagnose, first_fault
from rvlm.diagnosis.faults import faults_of
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.envs.stand_in import StandIn, record_stand_in
from rvlm.envs.stand_in_expert import StandInExpert
from rvlm.files import atomic_write, results_dir
from rvlm.statistics import wilson

CARDS = ("libero", "fractal", "so101", "aloha", "pusht")
N_EPISODES, N_CLEAN, N_PAIRS = 24, 20, 40


def stand_in_inputs(card, folder):
    """Data, environment and a policy of a public card's robot."""
    spec = ActionSpec.from_card(card)
    data = EpisodeDataset(record_stand_in(StandIn(spec), folder, range(N_EPISODES)))
    return DiagnosisInputs(StandInExpert(spec), data, StandIn(spec), n_episodes=4, n_frames=40)


def tabletop_inputs():
    """Data, environment and the shipped policy of the tabletop."""
    from rvlm.envs.tabletop.demonstrations import Collection, collect_demonstrations

    from rvlm import Tabletop, load_policy, recipes

    data = EpisodeDataset(collect_demonstrations(Collection(n_episodes=60)))
    return DiagnosisInputs(load_policy(recipes.POLICY), data, Tabletop(), n_episodes=3, n_frames=48)


def rows_of(robot, inputs):
    """A row per diagnosis: robot, kind, fault, what was named, and whether that is right."""
    for seed in range(N_CLEAN):
        named = first_fault(diagnose(dataclasses.replace(inputs, seed=seed)))
        yield robot, "no fault", f"seed {seed}", named, named is None
    known = faults_of(inputs)
    for fault in known:
        named = first_fault(diagnose(fault.inject(inputs)))
        yield robot, "known", f"{fault.where}: {fault.description}", named, named == fault.expected
    for fault in HELD_OUT:
        if fault.applies(inputs.dataset.require_spec()):
            named = first_fault(diagnose(fault.inject(inputs)))
            kind = "held out" if fault.names else "held out, without a name"
            yield robot, kind, f"{fault.where}: {fault.description}", named, named in fault.names if fault.names else bool(named)
    pairs = [pair for pair in itertools.combinations(known, 2) if pair[0].expected != pair[1].expected]
    for i in np.random.default_rng(0).permutation(len(pairs))[:N_PAIRS]:
        one, other = pairs[i]
        named = first_fault(diagnose(other.inject(one.inject(inputs))))
        yield robot, "pair", f"{one.where}: {one.description} + {other.where}: {other.description}", named, named in (
            one.expected, other.expected
        )  # fmt: skip


def main():
    """Diagnose, and print the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tabletop", action="store_true")
    parser.add_argument("--cards", nargs="*", default=CARDS)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for card in arguments.cards:
            rows += rows_of(f"{card} (stand-in)", stand_in_inputs(card, Path(folder) / card))
        if arguments.tabletop:
            rows += rows_of("tabletop_franka7", tabletop_inputs())
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
