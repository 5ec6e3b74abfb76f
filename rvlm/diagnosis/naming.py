"""How many faults the diagnosis names, one at a time and in pairs, and how often it names one where there is none.

Counts without intervals: the faults are chosen, and diagnoses that draw from the same episodes are no sample.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rvlm.data.actions import ActionSpec
from rvlm.data.windows import EpisodeDataset
from rvlm.diagnosis.checklist import diagnose, first_fault
from rvlm.diagnosis.faults import Fault
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.envs.stand_in import StandIn, record_stand_in
from rvlm.envs.stand_in_expert import StandInExpert


def named_faults(inputs: DiagnosisInputs, faults: Iterable[Fault]) -> pd.DataFrame:
    """Inject one fault at a time, and diagnose.

    Returns:
        A row per fault: `name`, the `check` that failed and the `fault` that it named (None where no check failed), `is_right`.
    """
    rows = []
    for fault in faults:
        last = diagnose(fault.inject(inputs))[-1]
        row = {"name": f"{fault.where}: {fault.description}", "check": last.name if last.fault else None, "fault": last.fault}
        rows.append({**row, "is_right": last.fault == fault.expected})
    return pd.DataFrame(rows)


def false_alarms(inputs: DiagnosisInputs, n: int) -> list[str | None]:
    """What is named where nothing was injected, in n diagnoses that draw from the same episodes; None is right."""
    return [first_fault(diagnose(dataclasses.replace(inputs, seed=inputs.seed + i))) for i in range(n)]


def named_pairs(inputs: DiagnosisInputs, faults: Sequence[Fault], n: int) -> Iterator[tuple[Fault, Fault, str | None]]:
    """Two faults at once that have different names, n pairs drawn at random, and what is named: one of the two is right."""
    pairs = [pair for pair in itertools.combinations(faults, 2) if pair[0].expected != pair[1].expected]
    for i in np.random.default_rng(inputs.seed).permutation(len(pairs))[:n]:
        one, other = pairs[i]
        yield one, other, first_fault(diagnose(other.inject(one.inject(inputs))))


def stand_in_inputs(card: str, folder: Path, n_recorded: int = 24, **sizes: int) -> DiagnosisInputs:
    """A robot's stand-in, its recordings, and its expert as a policy of which `select_action` alone is known.

    Args:
        card: Of the robot.
        folder: Of the recordings, to be made.
        n_recorded: Episodes.
        sizes: `n_episodes` and `n_frames` that are examined, and `seed`, as of `DiagnosisInputs`.
    """
    spec = ActionSpec.from_card(card)
    data = EpisodeDataset(record_stand_in(StandIn(spec), folder, range(n_recorded)))
    return DiagnosisInputs(StandInExpert(spec), data, StandIn(spec), **sizes)
