"""Diagnosis: every injected fault is the first that is named, and none is named where nothing is wrong.

On the real simulator, with demonstrations recorded in it and the policy that ships.
"""

import contextlib
import dataclasses

import numpy as np
import pytest

from rvlm.data.actions import ActionSpec
from rvlm.data.windows import EpisodeDataset
from rvlm.diagnosis.checklist import CHECKS, diagnose, first_fault
from rvlm.diagnosis.data_checks import check_motion
from rvlm.diagnosis.env_checks import check_replay
from rvlm.diagnosis.faults import FAULTS, faults_of, with_data
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.misreadings import ACTION_MISREADINGS, IMAGE_ERRORS
from rvlm.diagnosis.perturbed import PerturbedDataset
from rvlm.diagnosis.policy_checks import check_interface
from rvlm.diagnosis.results import FIXES
from rvlm.envs.demonstrations import Collection, collect_demonstrations
from rvlm.envs.suites import load_suite
from rvlm.envs.tabletop.env import Tabletop
from rvlm.experiments.recipes import POLICY
from rvlm.policy.policy import Policy, load_policy

SPEC = ActionSpec.from_card("tabletop_franka7")


@pytest.fixture(scope="module")
def inputs(home):
    dataset = EpisodeDataset(collect_demonstrations(Collection(n_episodes=50), n_workers=1, progress=False))
    env = Tabletop()
    yield DiagnosisInputs(load_policy(POLICY), dataset, env, n_episodes=2, n_frames=24)
    env.close()


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.applies(SPEC)], ids=lambda fault: f"{fault.where}: {fault.description}")
def test_an_injected_fault_is_the_first_that_is_named(inputs, fault):
    results = diagnose(fault.inject(inputs))
    assert first_fault(results) == fault.expected, results[-1].measured
    assert all(result.fault is None for result in results[:-1]) and results[-1].fix == FIXES[fault.expected]


def test_without_a_fault_none_is_named(inputs):
    """20 draws of episodes, no false alarm, and every check runs."""
    for seed in range(20):
        results = diagnose(dataclasses.replace(inputs, seed=seed, n_frames=12))
        assert first_fault(results) is None, (seed, results[-1])
        assert [result.name for result in results] == list(CHECKS)


def test_a_column_is_read_once_per_check_not_once_per_episode(inputs, monkeypatch):
    read, plain = [], EpisodeDataset.column
    monkeypatch.setattr(EpisodeDataset, "column", lambda self, name: (read.append(name), plain(self, name))[1])
    check_motion(dataclasses.replace(inputs))
    assert sorted(read) == ["action_executed", "observation.state"] and len(inputs.training_episodes()) > 2


def test_the_recorded_actions_reproduce_the_recording(inputs):
    evidence = check_replay(inputs).evidence
    assert evidence["candidate"].tolist() == ["as recorded"] and evidence.iloc[0, 1] < 1e-3


@pytest.mark.parametrize("missing", [["seed"], ["task"], ["seed", "task"]])
def test_without_recorded_seeds_or_tasks_the_checks_that_need_them_say_so(inputs, missing):
    bare = PerturbedDataset(inputs.dataset, episodes=inputs.dataset.episodes.drop(columns=missing))
    with contextlib.closing(load_suite("tabletop/franka7").make()) as env:
        results = diagnose(dataclasses.replace(inputs, dataset=bare, env=env))
    assert first_fault(results) is None
    assert {r.name for r in results if "not recorded" in r.measured} == {"resets", "images", "replay"}


def test_without_a_state_the_replay_is_left_out(inputs):
    blind = with_data(inputs, spec=dataclasses.replace(SPEC, state=()), columns={"observation.state": lambda old: old[:, :0]})
    assert check_replay(blind).measured == "skipped: the robot tells no state"


def test_a_policy_that_has_learned_nothing_is_named_so(inputs):
    model = load_policy(POLICY).model
    for parameter in model.head.parameters():
        parameter.data.zero_()
    results = diagnose(dataclasses.replace(inputs, policy=Policy(model, inputs.policy.prompt_builder.processor)))
    assert first_fault(results) == "not learned"


def test_another_robots_policy_is_refused_by_the_interface(inputs):
    env = Tabletop(robot="ur6", image_size=32)
    result = check_interface(dataclasses.replace(inputs, env=env))
    assert result.fault == "conventions differ" and "action group 1 open: 1.0 against -1.0" in result.measured
    env.close()


def test_injecting_leaves_the_inputs_unchanged(inputs):
    before = inputs.dataset.column("action").copy(), inputs.policy.model.stats["action"].q99.copy()
    assert {fault.where for fault in faults_of(inputs)} == {"data", "policy", "environment"}
    for fault in faults_of(inputs):
        fault.inject(inputs)
    assert np.array_equal(inputs.dataset.column("action"), before[0]) and inputs.env.max_steps == 60
    assert np.array_equal(inputs.policy.model.stats["action"].q99, before[1])


def test_every_fault_has_a_fix_and_every_candidate_is_one():
    candidates = {name.split(":")[0] for name in (*IMAGE_ERRORS, *ACTION_MISREADINGS)}
    assert candidates | {fault.expected for fault in FAULTS} <= set(FIXES)
