"""The stand-in of any card's robot: its success is the policy's."""

import dataclasses

import pytest

from rvlm.data.actions import ActionSpec
from rvlm.envs.stand_in import TASKS, StandIn, stand_in_suite
from rvlm.envs.stand_in_expert import StandInExpert
from rvlm.evaluation.closed_loop import Evaluation, evaluate
from rvlm.evaluation.rollouts import RandomPolicy, rollout
from rvlm.files import CARDS

SHIPPED = sorted(path.stem for path in CARDS.glob("*.md"))


def successes(policy, spec, n=12):
    env, tasks = StandIn(spec), list(TASKS)
    rows = [rollout(policy, [env], [(900_000 + i, tasks[i % 2])])[0] for i in range(n)]
    assert {row["n_steps"] for row in rows} == {27}
    assert all(row["failure"] == ("" if row["is_success"] else "missed a point") for row in rows)
    return sum(row["is_success"] for row in rows)


@pytest.mark.parametrize("card", SHIPPED)
def test_who_goes_to_the_points_succeeds_and_who_acts_at_random_fails(card):
    spec = ActionSpec.from_card(card)
    assert successes(StandInExpert(spec), spec) == 12 and successes(RandomPolicy(spec), spec) == 0


def test_success_is_never_reported_where_the_state_does_not_show_what_moves():
    spec = ActionSpec.from_card("so101")
    bare = dataclasses.replace(spec, state=(dataclasses.replace(spec.state[0], kind="other"), *spec.state[1:]))
    assert successes(StandInExpert(bare), bare, 2) == 0


def test_the_suite_of_two_tasks_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))
    suite = stand_in_suite(ActionSpec.from_card("pusht"))
    rates = evaluate({name: Evaluation(name, 4, suite) for name in ("expert", "random")}, 1, False)
    assert rates.groupby("name")["is_success"].mean().to_dict() == {"expert": 1.0, "random": 0.0}
