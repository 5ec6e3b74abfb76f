"""Settings, gaps, probes and leaks."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.proportion import confint_proportions_2indep
from toy_suites import stub_suite

from rvlm import report
from rvlm.data.windows import EpisodeDataset
from rvlm.envs.demonstrations import Collection, collect_demonstrations
from rvlm.envs.suite_checks import SuiteError
from rvlm.envs.suites import load_suite
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.suite import HELD_OUT
from rvlm.envs.tabletop.tasks import ALL_FAMILIES, DEFAULT_TASKS
from rvlm.evaluation import protocols
from rvlm.evaluation.closed_loop import FIRST_HELD_OUT_SEED


@pytest.fixture(scope="module")
def dataset(home):
    return EpisodeDataset(collect_demonstrations(Collection(n_episodes=10, image_size=32), n_workers=1, progress=False))


def test_every_setting_asks_for_the_same_scenes_and_unseen_targets_for_objects_alone():
    evaluations = protocols.evaluations_by_setting("expert", 20)
    assert list(evaluations) == list(protocols.PROTOCOL_SETTINGS)
    assert len({tuple(seed for seed, *_ in e.episodes()) for e in evaluations.values()}) == 1
    assert all(ALL_FAMILIES[family].n_objects for _, family, _ in evaluations["unseen_target"].episodes())
    assert {family for _, family, _ in evaluations["simple"].episodes()} == set(DEFAULT_TASKS)


def test_a_probe_changes_one_thing():
    plain = protocols.Evaluation("folder", 10, n_action_steps=1)
    probes = protocols.shortcut_probes("folder", 10, n_action_steps=1)
    assert list(probes) == list(protocols.SHORTCUT_PROBES)
    for name, probe in probes.items():
        changed = {f.name for f in dataclasses.fields(probe) if getattr(probe, f.name) != getattr(plain, f.name)}
        (field,) = protocols.SHORTCUT_PROBES[name]
        assert changed == {"suite" if field == "setting" else field}


def test_a_suite_without_settings_is_probed_with_the_rest():
    suite = stub_suite("libero")
    assert set(protocols.SHORTCUT_PROBES) - set(protocols.shortcut_probes("random", 2, suite)) == {"farther start poses"}
    with pytest.raises(SuiteError, match="stub/libero has no setting 'simple'; there are none"):
        protocols.evaluations_by_setting("random", 2, suite)


def test_a_suite_of_ones_own_keeps_its_limits_and_needs_no_name_that_loads():
    suite = dataclasses.replace(load_suite("tabletop/franka7"), max_steps=5, name="mine")
    evaluations = protocols.evaluations_by_setting("random", 2, suite)
    probes = protocols.shortcut_probes("random", 2, suite)
    for evaluation in (*evaluations.values(), *probes.values()):
        assert {evaluation.loaded_suite.limit(task) for task in evaluation.task_names} == {5}
    assert evaluations["simple"].suite == suite and evaluations["unseen_background"].loaded_suite.setting == "unseen_background"


def test_starts_farther_out_leave_the_scene_as_it_is():
    tables, hands = [], []
    for setting in ("simple", "new_start"):
        env = Tabletop(image_size=16, setting=setting)
        env.reset(seed=3, options={"task": "lift"})
        tables.append([env.world.pos_object(i)[:2].copy() for i in range(3)])
        hands.append(env.world.pos_tcp_world.copy())
        env.close()
    assert np.allclose(tables[0], tables[1], atol=1e-3) and np.abs(hands[0] - hands[1]).max() > 0.003


def test_the_gap_is_newcombes_over_the_families_that_both_settings_ask_for():
    rng = np.random.default_rng(0)
    rows = [
        {"setting": setting, "task": family, "is_success": rng.random() < p}
        for setting, families, p in (("simple", "ab", 0.8), ("unseen_target", "a", 0.4))
        for family in families
        for _ in range(50)
    ]
    episodes = pd.DataFrame(rows)
    (gap,) = protocols.generalisation_gap(episodes).to_dict("records")
    seen, unseen = (
        episodes[(episodes["setting"] == s) & (episodes["task"] == "a")]["is_success"] for s in ("simple", "unseen_target")
    )
    low, high = confint_proportions_2indep(seen.sum(), 50, unseen.sum(), 50, method="newcomb", compare="diff", correction=False)
    assert gap["n_seen"] == gap["n_unseen"] == 50
    assert (gap["gap"], gap["low"], gap["high"]) == pytest.approx((seen.mean() - unseen.mean(), low, high))


def evaluated(**changes):
    row = {"seed": FIRST_HELD_OUT_SEED, "instruction": "take the red cube off the table", "setting": "novel_description"}
    return pd.DataFrame([{**row, **changes}])


def test_what_is_held_out_travels_with_the_data_and_nothing_leaks(dataset):
    assert dataset.held_out == HELD_OUT
    assert protocols.train_test_leaks(dataset, evaluated()) == []


def test_every_leak_is_named(dataset):
    seed = int(dataset.episodes["seed"].iloc[0])
    assert protocols.train_test_leaks(dataset, evaluated(seed=seed)) == [f"1 seeds were trained on, the first is {seed}"]
    trained = dataset.tasks[0]
    novel = protocols.train_test_leaks(dataset, evaluated(instruction=trained))
    assert novel == ["1 instructions of the setting novel_description were trained on"]
    for task, message in (
        ("take the red cube off the table", "held-out wordings, the first is 'take the red cube off the table'"),
        ("lift the pink cube", "name held-out objects, the first is 'lift the pink cube'"),
    ):
        leaky = EpisodeDataset(dataset.root)
        leaky.tasks = [*dataset.tasks, task]
        assert protocols.train_test_leaks(leaky, evaluated(instruction="")) == [
            f"1 instructions {'have ' if 'word' in message else ''}{message}"
        ]


def test_the_store_is_one_tidy_table(tmp_path, monkeypatch):
    monkeypatch.setattr("rvlm.report.findings.results_dir", lambda: tmp_path)
    saved = report.save_episodes(evaluated(is_success=True), "06_episodes")
    read = pd.read_parquet(tmp_path / "episodes/06_episodes.parquet")
    pd.testing.assert_frame_equal(read, saved)
    assert {"seed", "setting", "is_success", "commit", "versions"} <= set(read)
