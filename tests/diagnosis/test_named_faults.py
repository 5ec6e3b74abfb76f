"""Faults that the injected list does not hold: what counts as right is a fault's name, and counts stand without intervals."""

import sys

import numpy as np
import pandas as pd
import pytest

from rvlm.data.actions import ActionSpec
from rvlm.diagnosis.faults import FAULTS
from rvlm.diagnosis.naming import stand_in_inputs
from rvlm.diagnosis.results import FIXES
from rvlm.files import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from named_faults import COLUMNS, counts_of, each_fault, row_of
from other_faults import FRESH, OTHER


def test_what_counts_as_right_are_names_of_faults_and_no_known_fault_is_among_them():
    assert {name for fault in OTHER + FRESH for name in fault.names} <= set(FIXES)
    described = [(fault.where, fault.description) for fault in (*FAULTS, *OTHER, *FRESH)]
    assert len(described) == len(set(described)) and len(FRESH) >= 8


def test_a_circle_of_two_dimensions_is_left_out_as_it_is_a_swap():
    circles = [fault for fault in OTHER if "circle" in fault.description]
    for card, can in (("pusht", False), ("so101", True), ("libero", True)):
        assert [fault.applies(ActionSpec.from_card(card)) for fault in circles] == [can] * 3, card


@pytest.fixture(scope="module")
def inputs(home):
    return stand_in_inputs("so101", home / "named_faults", n_recorded=4, n_episodes=2)


@pytest.mark.parametrize("fault", [f for f in FRESH if f.where == "data"], ids=lambda fault: fault.description)
def test_a_fresh_fault_changes_the_recording_in_part(inputs, fault):
    def columns(data):
        instructions = np.array([data.instruction(i) for i in range(data.n_episodes)])
        numbers = [data.column("action"), data.column("observation.state"), instructions]
        return [*numbers, *data.frames_cache().values()]

    pairs = zip(columns(inputs.dataset), columns(fault.inject(inputs).dataset), strict=True)
    assert 0 < np.mean([(before != after).mean() for before, after in pairs]) < 0.5


def test_counts_have_no_intervals_and_any_name_is_right_where_a_fault_has_none():
    (named, unnamed) = (next(f for f in FRESH if bool(f.names) == has_name) for has_name in (True, False))
    answers = [(named, "units"), (named, named.names[0]), (unnamed, None), (unnamed, "units")]
    rows = [(f"robot {i % 2}", *row_of("fresh", fault, answer)) for i, (fault, answer) in enumerate(answers)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    assert table["is_right"].tolist() == [False, True, False, True] and table["named"][2] == "none"
    counts = counts_of(table)
    assert list(counts) == ["kind", "robot", "right", "n"]
    assert counts[counts["robot"] == "all"].to_numpy().tolist() == [["fresh", "all", 1, 2], ["fresh, no name", "all", 1, 2]]
    each = each_fault(table)
    assert each["count"].tolist() == ["1/2", "1/2"] and each["robot 0"].tolist() == ["units", "none"]
