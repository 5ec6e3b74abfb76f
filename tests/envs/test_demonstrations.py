"""Demonstrations: the expert's label beside what was done, the same twice, never a held-out scene."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from rvlm.data.normalization import StatsAccumulator
from rvlm.data.windows import EpisodeDataset, Windows, split
from rvlm.envs import FIRST_HELD_OUT_SEED, demonstrations
from rvlm.envs.demonstrations import Collection, LabelledEpisode, collect_demonstrations, demonstrate, make_shard
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.suite import NOISE_SCALE
from rvlm.training.stages import ROBOT, Stage
from rvlm.training.trainer import train_stage_in_process

SMALL = Collection(n_episodes=6, tasks=("lift", "push_left", "turn_on_light"), image_size=48)


@pytest.fixture(scope="module")
def dataset(home):
    return EpisodeDataset(collect_demonstrations(SMALL, n_workers=1, progress=False))


@pytest.fixture(scope="module")
def env():
    env = Tabletop(image_size=32)
    yield env
    env.close()


def test_the_label_is_the_experts_and_the_noise_was_executed(env):
    columns = demonstrate(env, 7, "push_left", 0.6, NOISE_SCALE).columns
    env.reset(seed=7, options={"task": "push_left"})
    for label, executed, state in zip(columns["action"], columns["action_executed"], columns["observation.state"], strict=True):
        assert np.array_equal(env.world.state(), state)
        assert np.array_equal(env.expert_action(), label)
        env.step(executed)
    noise = columns["action_executed"] - columns["action"]
    assert np.abs(noise[:, :6]).max() > 0.05 and not noise[:, 6].any()
    assert (np.abs(columns["action_executed"]) <= 1).all()


def test_the_noise_is_drawn_with_the_given_spread(env):
    rng = np.random.default_rng((7, 1))
    spread = rng.uniform(0, 0.6) * np.array(NOISE_SCALE[:6])
    columns = demonstrate(env, 7, "push_left", 0.6, NOISE_SCALE).columns
    wanted = [np.clip(label[:6] + rng.normal(0, spread), -1, 1) for label in columns["action"]]
    np.testing.assert_allclose(columns["action_executed"][:, :6], wanted, atol=1e-6)
    silent = demonstrate(env, 7, "push_left", 0.0, NOISE_SCALE).columns
    assert np.array_equal(silent["action_executed"], silent["action"])


def test_an_episode_that_takes_too_long_is_given_up():
    env = Tabletop(image_size=16, max_steps=2)
    assert not demonstrate(env, 0, "lift", 0.0, NOISE_SCALE).is_success
    env.close()


def test_the_same_collection_twice_gives_identical_columns():
    two = dataclasses.replace(SMALL, n_episodes=2, image_size=16)
    for one, other in zip(make_shard(0, two), make_shard(0, two), strict=True):
        assert one[1:] == other[1:]
        assert all(np.array_equal(one[0][k], other[0][k]) for k in one[0])


def test_it_reads_back_with_its_tasks_and_seeds(dataset):
    assert dataset.n_episodes == 6
    assert dataset.episodes["task"].tolist() == ["lift", "push_left", "turn_on_light"] * 2
    assert dataset.episodes["seed"].is_unique and dataset.episodes["seed"].max() < FIRST_HELD_OUT_SEED
    first = next(iter(make_shard(0, SMALL)))
    episode = dataset.episode(0)
    assert dataset.instruction(0) == first[1]
    assert dataset.require_spec().dataset == "tabletop_franka7"
    assert np.array_equal(episode["action"], first[0]["action"])
    assert np.array_equal(episode["action_executed"], first[0]["action_executed"])


def test_windows_hold_labels_and_both_cameras(dataset):
    windows = Windows(dataset, n_obs_steps=2, chunk_size=3)
    sample = windows[0]
    assert len(windows) == dataset.n_frames
    assert sample["images"].shape == (2, 2, 48, 48, 3) and sample["action"].shape == (2, 3, 7)
    raw = dataset.require_spec().unnormalize(sample["action"][-1], windows.stats["action"])
    np.testing.assert_allclose(raw, dataset.column("action")[:3], atol=1e-5)


def test_a_policys_statistics_come_from_its_training_episodes(toy_vlm, toy_demos, tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    data = EpisodeDataset(toy_demos)
    train, held_out = split(data)
    train_stage_in_process(Stage("toy", ROBOT, (str(toy_demos),), str(toy_vlm), 8, batch_size=8, n_processes=1), tmp_path)
    from rvlm.policy.factory import load_vla

    model, _ = load_vla(tmp_path / "model")
    rows = pd.read_parquet(toy_demos / "data")
    parts = (rows[rows["episode_index"].isin(train)], rows)
    wanted, leaking = (StatsAccumulator().update(np.stack(part["action"].tolist())).finish() for part in parts)
    assert len(held_out) and model.stats["action"].count == wanted.count < leaking.count
    assert np.array_equal(model.stats["action"].q01, wanted.q01) and not np.array_equal(wanted.mean, leaking.mean)


@pytest.mark.parametrize("changes", [{"first_seed": FIRST_HELD_OUT_SEED}, {"first_seed": FIRST_HELD_OUT_SEED - 50}])
def test_seeds_never_reach_the_held_out_ones(home, changes):
    with pytest.raises(ValueError, match=r"expected seeds below 900000.*may use seeds up to \d+; collect fewer, or begin lower"):
        collect_demonstrations(dataclasses.replace(SMALL, **changes))


def test_a_shard_never_takes_its_neighbours_seeds(monkeypatch):
    used = []
    monkeypatch.setattr(demonstrations, "demonstrate", lambda env, seed, *_: used.append(seed) or LabelledEpisode({}, "", False))
    with pytest.raises(
        RuntimeError, match=r"expert to succeed in at least 50 of 100 scenes.*'turn_on_light' of tabletop/franka7; allow more"
    ):
        list(make_shard(1, dataclasses.replace(SMALL, n_episodes=60)))
    assert used == list(range(100, 200))


def test_the_folder_is_named_by_what_makes_it(home):
    assert dataclasses.replace(SMALL).folder == SMALL.folder
    assert SMALL.folder.name.startswith("tabletop_franka7-")
    for changes in ({"noise": 0.1}, {"tasks": ("lift",)}, {"image_size": 64}, {"n_episodes": 7}):
        assert dataclasses.replace(SMALL, **changes).folder != SMALL.folder
