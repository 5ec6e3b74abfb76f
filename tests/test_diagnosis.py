"""The ladder: every planted fault is the first verdict, and nothing is said where nothing is wrong.

On the real simulator, with demonstrations recorded in it and the policy that ships.
"""

import dataclasses

import numpy as np
import pytest

from rvlm.data.windows import EpisodeDataset
from rvlm.diagnosis import ladder
from rvlm.diagnosis.cases import FIXES, DiagnosisInputs
from rvlm.diagnosis.faults import FAULTS, PerturbedDataset
from rvlm.diagnosis.ladder import CHECKS, diagnose, verdict
from rvlm.envs.tabletop.demonstrations import Collection, collect_demonstrations
from rvlm.envs.tabletop.env import Tabletop
from rvlm.experiments.recipes import POLICY
from rvlm.policy.policy import Policy, load_policy


@pytest.fixture(scope="module")
def case(home):
    dataset = EpisodeDataset(collect_demonstrations(Collection(n_episodes=50), n_workers=1, progress=False))
    env = Tabletop()
    yield DiagnosisInputs(load_policy(POLICY), dataset, env, n_episodes=2, n_frames=24)
    env.close()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.where}: {fault.how}")
def test_a_planted_fault_is_the_first_verdict(case, fault):
    """Laws 1 to 14."""
    rungs = diagnose(fault.plant(case))
    assert verdict(rungs) == fault.named, rungs[-1].measured
    assert all(rung.fault is None for rung in rungs[:-1]) and rungs[-1].mend == FIXES[fault.named]


def test_no_fault_no_verdict(case):
    """20 draws of episodes, no false alarm; the rungs that pictures, actions and the policy decide are climbed in all."""
    for seed in range(20):
        rungs = diagnose(dataclasses.replace(case, seed=seed, n_frames=12))
        assert verdict(rungs) is None, (seed, rungs[-1])
        assert [rung.name for rung in rungs] == list(CHECKS)


def test_a_column_is_read_once_a_rung_not_once_an_episode(case, monkeypatch):
    read, plain = [], EpisodeDataset.column
    monkeypatch.setattr(EpisodeDataset, "column", lambda self, name: (read.append(name), plain(self, name))[1])
    ladder.motion(dataclasses.replace(case))
    assert sorted(read) == ["action_executed", "observation.state"] and len(case.train()) > 2


def test_the_recorded_actions_reproduce_the_recording(case):
    evidence = ladder.replay(case).evidence
    assert evidence["candidate"].tolist() == ["as recorded"] and evidence.iloc[0, 1] < 1e-3


def test_without_recorded_starts_the_rungs_that_need_them_say_so(case):
    bare = case.dataset.episodes.drop(columns=["seed", "family"])
    rungs = diagnose(dataclasses.replace(case, dataset=PerturbedDataset(case.dataset, episodes=bare)))
    assert verdict(rungs) is None
    assert {r.name for r in rungs if "not recorded" in r.measured} == {"starts", "pictures", "replay"}


def test_a_policy_that_has_learned_nothing_is_told_so(case):
    model = load_policy(POLICY).model
    for parameter in model.head.parameters():
        parameter.data.zero_()
    rungs = diagnose(dataclasses.replace(case, policy=Policy(model, case.policy.prompter.processor)))
    assert verdict(rungs) == "not learned"


def test_another_robots_policy_is_refused_by_the_interface(case):
    env = Tabletop(robot="ur6", image_size=32)
    rung = ladder.interface(dataclasses.replace(case, env=env))
    assert rung.fault == "conventions differ" and "gripper_open: 1.0 against -1.0" in rung.measured
    env.close()


def test_planting_leaves_the_sound_case_alone(case):
    before = case.dataset.column("action").copy(), case.policy.model.stats["action"].q99.copy()
    for fault in FAULTS:
        fault.plant(case)
    assert np.array_equal(case.dataset.column("action"), before[0]) and case.env.max_steps == 60
    assert np.array_equal(case.policy.model.stats["action"].q99, before[1])


def test_every_verdict_has_a_mend_and_every_candidate_is_one():
    candidates = {name.split(":")[0] for name in (*ladder.IMAGE_ERRORS, *ladder.MISREADINGS)}
    assert candidates | {fault.named for fault in FAULTS} <= set(FIXES)
