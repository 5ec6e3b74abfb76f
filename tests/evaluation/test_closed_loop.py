"""Evaluation: distinct held-out seeds, the same rows whoever runs them, input ablations that remove what they say."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from statsmodels.stats.proportion import proportion_confint
from toy_data import TEXTS, TOY
from toy_suites import TASKS, StubEnv, stub_suite, tabletop

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.envs import FIRST_HELD_OUT_SEED
from rvlm.envs.demonstrations import Collection, collect_demonstrations
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.tasks import DEFAULT_TASKS
from rvlm.evaluation import closed_loop
from rvlm.evaluation.closed_loop import EPISODES_PER_BATCH as BATCH
from rvlm.evaluation.closed_loop import Evaluation, evaluate
from rvlm.evaluation.replay import record_rollout, replay_episode
from rvlm.evaluation.rollouts import INPUT_ABLATIONS, RandomPolicy, permute_instructions, rollout
from rvlm.evaluation.success import success_differences, success_table
from rvlm.policy.factory import make_policy
from rvlm.policy.policy import load_policy
from rvlm.statistics import paired_difference
from rvlm.training.stages import ROBOT, Stage
from rvlm.training.trainer import train_stage_in_process
from rvlm.vlm.small import small_vlm, train_tokenizer

FAMILIES = ("push_left", "turn_on_light")
FEW = Evaluation("expert", n_episodes=4, suite=tabletop(40), tasks=FAMILIES)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def small_envs():
    envs = [Tabletop(image_size=16, max_steps=6) for _ in range(3)]
    yield envs
    for env in envs:
        env.close()


class Recorder(RandomPolicy):
    """Records its observations."""

    def reset(self, n_robots=1):
        super().reset(n_robots)
        self.shown = []

    def select_action(self, observations):
        self.shown.append(observations)
        return super().select_action(observations)


SPEC = ActionSpec.from_card("tabletop_franka7")
EPISODES = [(FIRST_HELD_OUT_SEED + i, "lift") for i in range(3)]


def test_every_episode_has_a_held_out_seed_of_its_own():
    episodes = Evaluation("random", n_episodes=200).episodes()
    seeds = [episode.seed for episode in episodes]
    assert len(set(seeds)) == 200 and min(seeds) == FIRST_HELD_OUT_SEED
    assert [episode.task for episode in episodes[: len(DEFAULT_TASKS)]] == list(DEFAULT_TASKS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_seed": FIRST_HELD_OUT_SEED + 0.5}, "evaluation seeds start at 900000.*got 900000.5"),
        ({"first_seed": FIRST_HELD_OUT_SEED - 1}, "evaluation seeds start at 900000.*got 899999"),
        ({"device": "gpu"}, "expected device 'cpu', 'cuda' or one of several such as 'cuda:1', got 'gpu'"),
        ({"ablation": "blindfold"}, "no input ablation 'blindfold'; there are none, no_language, shuffled_language, blank_image"),
        ({"n_episodes": 0}, "expected at least one episode"),
        ({"execution": "late"}, "no execution 'late'; there are synchronous, asynchronous, real_time_chunking"),
        ({"delay_steps": 2}, "expected a trained policy to delay, got 'expert'"),
    ],
)
def test_what_would_measure_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FEW, **changes)


@pytest.mark.parametrize("ablation", INPUT_ABLATIONS)
def test_an_input_ablation_removes_what_it_says_and_nothing_else(small_envs, ablation):
    seen = {}
    for name in ("none", ablation):
        policy = Recorder(SPEC)
        rollout(policy, small_envs, EPISODES, name)
        seen[name] = policy.shown[0][0]
    whole, changed = seen["none"], seen[ablation]
    assert (changed["instruction"] == "") == (ablation == "no_language")
    assert (changed["instruction"] == whole["instruction"]) == (ablation in ("none", "blank_image"))
    for camera in ("static", "wrist"):
        before, after = whole["images"][camera], changed["images"][camera]
        assert before.any() and after.any() == (ablation != "blank_image") and after.shape == before.shape
    assert np.array_equal(changed["state"], whole["state"])


@pytest.mark.parametrize(
    "families",
    [("turn_on_light",), ("lift",), ("lift", "lift", "lift"), ("turn_on_light", "turn_on_light"), ("lift", "open_drawer")],
)
def test_shuffled_language_gives_each_episode_another_family_until_the_last_one_ends(small_envs, families):
    """In a batch of one too, of one family, and where only one episode still runs."""
    episodes = [(FIRST_HELD_OUT_SEED + i, family) for i, family in enumerate(families)]
    envs = small_envs[: len(families)]
    for env, max_steps in zip(envs, (2, 3, 4), strict=False):
        env.max_steps = max_steps
    policy = Recorder(SPEC)
    rows = rollout(policy, envs, episodes, "shuffled_language")
    for env in envs:
        env.max_steps = 6
    assert [len(shown) for shown in policy.shown] == [sum(row["n_steps"] > t for row in rows) for t in range(len(families) + 1)]
    own = {row["instruction"] for row in rows}
    family_words = {word for family in families for word in family.split("_")}
    for shown in policy.shown:
        for observation in shown:
            if len(set(families)) == 1:
                assert observation["instruction"] not in own and not family_words & set(observation["instruction"].split())
    if len(set(families)) == 2:
        first, second = (row["instruction"] for row in rows)
        assert [o["instruction"] for o in policy.shown[0]] == [second, first] and policy.shown[-1][0]["instruction"] == first


def test_an_ablation_of_language_that_changes_nothing_is_refused():
    same = [{"instruction": "lift it"}] * 3
    with pytest.raises(ValueError, match="expected episodes of several tasks, all of 3 have 'lift it'; add"):
        INPUT_ABLATIONS["shuffled_language"](same)
    with pytest.raises(ValueError, match="must change every instruction; 3 of 3 stay ''"):
        INPUT_ABLATIONS["no_language"]([{"instruction": ""}] * 3)
    assert permute_instructions(["lift it", ""], ["lift", "none"], lambda i: None) == ["", "lift it"]
    (first, *_, last) = INPUT_ABLATIONS["shuffled_language"]([*same, {"instruction": "open it"}])
    assert (first["instruction"], last["instruction"]) == ("open it", "lift it")


def test_random_actions_are_those_of_the_episode(small_envs):
    """Different in each episode, and the same whatever else is in the batch."""
    kept = rollout(RandomPolicy(SPEC), small_envs, EPISODES, keep_frames=True)
    (alone,) = rollout(RandomPolicy(SPEC), small_envs[:1], EPISODES[1:2], keep_frames=True)
    np.testing.assert_array_equal(alone["actions"], kept[1]["actions"])
    firsts = np.stack([row["actions"][0] for row in kept])
    assert len(np.unique(firsts, axis=0)) == len(EPISODES)


def test_a_rollout_keeps_its_frames_where_it_is_asked_to(small_envs):
    rows = rollout(RandomPolicy(SPEC), small_envs, EPISODES, keep_frames=True)
    for row in rows:
        assert {frames.shape for frames in row["frames"].values()} == {(row["n_steps"], 16, 16, 3)}
        assert row["actions"].shape == (row["n_steps"], 7)
        assert row["n_steps"] == 6 or row["is_success"]
    plain = rollout(RandomPolicy(SPEC), small_envs, EPISODES)
    assert "frames" not in plain[0] and [r["n_steps"] for r in plain] == [r["n_steps"] for r in rows]


class Whole(Recorder):
    """A policy without a smaller batch."""

    keep = property()  # as if there was none


def test_a_finished_episode_is_no_longer_stepped_and_costs_nothing():
    envs = [Tabletop(image_size=16, max_steps=n) for n in (2, 5)]
    for policy, shown in ((Recorder(SPEC), [2, 2, 1, 1, 1]), (Whole(SPEC), [2] * 5)):
        rows = rollout(policy, envs, EPISODES[:2], keep_frames=True)
        assert [row["n_steps"] for row in rows] == [2, 5] and envs[0].n_steps == 2
        assert [len(observations) for observations in policy.shown] == shown
        np.testing.assert_array_equal(
            rows[1]["actions"], rollout(RandomPolicy(SPEC), envs[1:], EPISODES[1:2], keep_frames=True)[0]["actions"]
        )
    for env in envs:
        env.close()


def test_the_expert_succeeds_and_chance_does_not_whoever_runs_them():
    """Rows are the same for one process, two and four, and each policy is where it must be."""
    tables = {}
    for n_workers in (1, 2, 4):
        runs = {
            "expert": dataclasses.replace(FEW, n_episodes=4 + BATCH, suite=tabletop(40 + n_workers)),  # another folder for each
            "random": Evaluation("random", n_episodes=4, suite=tabletop(10 + n_workers), tasks=FAMILIES),
        }
        tables[n_workers] = evaluate(runs, n_workers=n_workers, show_progress=False)
    columns = ["name", "seed", "task", "instruction", "is_success"]
    one, two, four = (table[columns] for table in tables.values())
    pd.testing.assert_frame_equal(one, two)
    pd.testing.assert_frame_equal(one, four)
    rates = one.groupby("name")["is_success"].mean()
    assert rates["expert"] >= 0.9 and rates["random"] <= 0.25
    assert one["seed"][one["name"] == "expert"].is_unique


def test_finished_batches_are_not_run_again_and_short_ones_are(monkeypatch):
    ran = []
    monkeypatch.setattr(closed_loop, "in_parallel", lambda work, jobs, n: (in_process(*job, ran) for job in jobs))
    more = dataclasses.replace(FEW, n_episodes=BATCH + 3)
    assert len(evaluate({"a": FEW}, show_progress=False)) == 4
    assert len(evaluate({"a": more}, show_progress=False)) == BATCH + 3
    table = evaluate({"a": more, "b": FEW}, show_progress=False)
    assert ran == [0, 0, 1]
    assert table["name"].tolist() == ["a"] * (BATCH + 3) + ["b"] * 4
    (more.folder / "00001.parquet").unlink()
    evaluate({"a": more}, show_progress=False)
    assert ran == [0, 0, 1, 1]
    whole = (more.folder / "00001.parquet").read_bytes()
    (more.folder / "00001.parquet").write_bytes(whole[: len(whole) // 2])
    assert len(evaluate({"a": more}, show_progress=False)) == BATCH + 3 and ran == [0, 0, 1, 1, 1], "a broken disk's half"
    whole = pd.read_parquet(more.folder / "00001.parquet")
    broken = bytearray((more.folder / "00001.parquet").read_bytes())
    broken[4 : len(broken) // 2] = bytes(len(broken) // 2 - 4)  # the table's foot still says what should be there
    (more.folder / "00001.parquet").write_bytes(bytes(broken))
    evaluate({"a": more}, show_progress=False)
    pd.testing.assert_frame_equal(pd.read_parquet(more.folder / "00001.parquet"), whole)
    with pytest.raises(ValueError, match="expected at least one evaluation, got none"):
        evaluate({})
    shuffled, fewer = (dataclasses.replace(e, ablation="shuffled_language") for e in (more, FEW))
    evaluate({"all": shuffled}, show_progress=False)
    assert not fewer.is_done(0), "in a smaller batch instructions are permuted otherwise"


def test_two_numbers_of_the_same_episodes_are_run_once(monkeypatch):
    """In either order: the larger evaluation contains the smaller."""
    ran = []
    monkeypatch.setattr(closed_loop, "in_parallel", lambda work, jobs, n: (in_process(*job, ran) for job in jobs))
    for max_steps, names in ((7, ("all", "few")), (8, ("few", "all"))):
        evaluations = {"all": dataclasses.replace(FEW, n_episodes=BATCH + 3, suite=tabletop(max_steps))}
        evaluations["few"] = dataclasses.replace(evaluations["all"], n_episodes=4)
        got = evaluate({name: evaluations[name] for name in names}, show_progress=False)["name"].value_counts()
        assert got.to_dict() == {"all": BATCH + 3, "few": 4} and ran == [0, 1]
        ran.clear()
    shuffled = {name: dataclasses.replace(e, ablation="shuffled_language") for name, e in evaluations.items()}
    with pytest.raises(ValueError, match=r"expected one number of episodes with shuffled language, .* got 13 and 4"):
        evaluate({name: shuffled[name] for name in ("few", "all")}, show_progress=False)


def in_process(job, batch, folder, ran):
    """A batch without a simulator."""
    ran.append(batch)
    episodes = job.episodes()[batch * BATCH : (batch + 1) * BATCH]
    rows = [{"seed": s, "task": f, "instruction": "", "is_success": True, "n_steps": 1} for s, f, _ in episodes]
    pd.DataFrame(rows).to_parquet(folder / f"{batch:05d}.parquet")
    return len(rows)


def test_the_folder_follows_settings_and_weights(tmp_path, monkeypatch):
    assert dataclasses.replace(FEW, n_episodes=9).folder == FEW.folder
    for changes in (
        {"ablation": "no_language"},
        {"suite": "tabletop/franka7/lighting"},
        {"n_action_steps": 2},
        {"suite": tabletop(50)},
    ):
        assert dataclasses.replace(FEW, **changes).folder != FEW.folder
    model = dataclasses.replace(FEW, policy=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = model.folder
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert model.folder == dataclasses.replace(model, device="cuda:1").folder != before, "another device rounds otherwise"
    monkeypatch.undo()
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert model.folder != before


def test_a_suite_by_name_and_the_suite_itself_are_one_evaluation():
    by_name = Evaluation("random", 4, "toy_suites:libero_stub")
    itself = Evaluation("random", 4, stub_suite("libero"), TASKS)
    assert by_name.folder == itself.folder != dataclasses.replace(by_name, tasks=TASKS[:1]).folder


@pytest.mark.parametrize("n_workers", [1, 2])
def test_episodes_of_anybodys_environment_end_as_it_says(n_workers):
    """The stub's outcomes are known; its third step is within one task's limit, and not within the other's."""
    suite = stub_suite("libero", max_steps={TASKS[0]: 6, TASKS[1]: 2 + n_workers % 2})
    table = evaluate({"a": Evaluation("random", BATCH + 4, suite), "b": Evaluation("expert", 2, suite)}, n_workers, False)
    rows = table[table["name"] == "a"]
    numbers = rows["seed"] + rows["task"].map(TASKS.index)
    limit = rows["task"].map(suite.limit)
    solved = (numbers % 4 != 0) & (limit >= 3)
    assert rows["is_success"].tolist() == solved.tolist() and rows["n_steps"].tolist() == np.where(solved, 3, limit).tolist()
    assert set(rows["failure"][~solved]) == {"missed"} and set(table["suite"]) == {"stub/libero"} and "start" not in table


def test_each_fixed_initial_state_is_evaluated_once():
    suite = stub_suite("libero", n_starts=3)
    rows = evaluate({"a": Evaluation("random", 6, suite)}, 1, False)
    assert sorted(zip(rows["task"], rows["start"], strict=True)) == [(task, i) for task in sorted(TASKS) for i in range(3)]
    numbers = rows["start"] + rows["task"].map(TASKS.index)
    assert rows["is_success"].tolist() == (numbers % 4 != 0).tolist(), "the state is the task's start, not the seed's"
    with pytest.raises(ValueError, match=r"stub/libero has 3 initial states for each of 2 tasks, .* at most 6, got 7"):
        Evaluation("random", 7, suite)


def test_an_evaluation_names_the_tasks_and_the_expert_that_a_suite_lacks():
    with pytest.raises(ValueError, match=r"stub/libero has no task 'lift'; there are push the block, open the box"):
        Evaluation("random", 2, stub_suite("libero"), ("lift",))
    suite = stub_suite("libero", make_env=functools.partial(WithoutExpert, ActionSpec.from_card("libero")))
    with pytest.raises(ValueError, match=r"the policy 'expert' needs an environment with expert_action\(\), which WithoutExpert"):
        evaluate({"a": Evaluation("expert", 2, suite)}, 1, False)


class WithoutExpert(StubEnv):
    """A stub environment that does not know how its tasks are done."""

    expert_action = None


def test_a_trained_policy_is_run_at_its_own_image_size_and_on_its_own_robot(toy_vlm, toy_stats, tmp_path):
    folder = tmp_path / "policy"
    model, processor = make_policy(toy_vlm, SPEC, toy_stats, chunk_size=2)
    model.save_pretrained(folder, processor)
    evaluation = Evaluation(str(folder), n_episodes=2, suite=tabletop(3), n_action_steps=2)
    rows = closed_loop.run_batch(evaluation, 0, keep_frames=True)
    assert [row["n_steps"] for row in rows] == [3, 3] and rows[0]["frames"]["static"].shape[1:] == (48, 48, 3)
    with pytest.raises(SpecMismatch, match="policy vs environment"):
        closed_loop.run_batch(dataclasses.replace(evaluation, suite=tabletop(3, "ur6")), 0)


def test_a_policy_is_evaluated_with_a_delay_in_which_the_robot_is_held(toy_vlm, toy_stats, tmp_path):
    model, processor = make_policy(toy_vlm, SPEC, toy_stats, chunk_size=2)
    model.save_pretrained(tmp_path / "policy", processor)
    evaluation = Evaluation(str(tmp_path / "policy"), n_episodes=2, suite=tabletop(4), n_action_steps=2)
    delayed = dataclasses.replace(evaluation, delay_steps=1)
    at_once, late = (closed_loop.run_batch(e, 0, keep_frames=True)[0]["actions"] for e in (evaluation, delayed))
    assert (late[0, :6] == 0).all() and SPEC.is_open(late[0]) and (late[3, :6] == 0).all()
    np.testing.assert_allclose(late[1:3], at_once[:2], atol=1e-4)
    assert delayed.folder != evaluation.folder


def test_a_policy_of_a_large_image_size_is_recorded_for_trained_and_run_at_it(tmp_path):
    """Beyond the 96 px of the small tier: what is recorded, trained on and rendered is 256 px, without resizing."""
    settings = {**TOY, "image_size": 256, "patch_size": 32}
    model, processor = small_vlm(train_tokenizer(TEXTS, ["<loc00>"]), **settings)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "vlm")
    recorded = collect_demonstrations(Collection(n_episodes=2, tasks=("push_left",), image_size=256), 1, progress=False)
    stage = Stage("large", ROBOT, (str(recorded),), str(tmp_path / "vlm"), 4, batch_size=4, n_processes=1)
    train_stage_in_process(stage, tmp_path / "trained")
    policy = load_policy(tmp_path / "trained" / "model")
    assert policy.image_size == (256, 256) == (policy.prompt_builder.image_size,) * 2
    evaluation = Evaluation(str(tmp_path / "trained" / "model"), n_episodes=1, suite=tabletop(2))
    assert closed_loop.run_batch(evaluation, 0, keep_frames=True)[0]["frames"]["static"].shape == (2, 256, 256, 3)


@pytest.mark.parametrize("by", ["name", ("name", "task")])
def test_the_table_is_statsmodels(by):
    rng = np.random.default_rng(0)
    episodes = pd.DataFrame({"name": list("aab") * 20, "task": list("xy") * 30, "is_success": rng.random(60) < 0.7})
    table = success_table(episodes, by)
    keys = [by] if isinstance(by, str) else list(by)
    assert len(table) == len(episodes[keys].drop_duplicates())
    for row in table.to_dict("records"):
        group = episodes[np.logical_and.reduce([episodes[k] == row[k] for k in keys])]["is_success"]
        low, high = proportion_confint(group.sum(), len(group), method="wilson")
        assert (row["successes"], row["n"], row["rate"]) == (group.sum(), len(group), pytest.approx(group.mean()))
        assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))


def evaluated(rates, n_trainings=3, n_episodes=40):
    """Synthetic episodes of several trainings; policies by their probability of success."""
    rng = np.random.default_rng(0)
    rows = [
        (name, str(training), 900_000 + i, rng.random() < rate)
        for training in range(n_trainings)
        for name, rate in rates.items()
        for i in range(n_episodes)
    ]
    return pd.DataFrame(rows, columns=["name", "training", "seed", "is_success"]).sample(frac=1, random_state=0)


def test_differences_pair_episodes_and_trainings():
    episodes = evaluated({"a": 0.8, "b": 0.4, "c": 0.1})
    got = success_differences(episodes, {"a over b": ("a", "b"), "c over b": ("c", "b")})
    outcomes = episodes.set_index(["name", "training", "seed"])["is_success"].astype(float).sort_index().unstack()
    a, b, c = (outcomes.loc[name].to_numpy() for name in "abc")
    assert got == {"a over b": paired_difference(a, b), "c over b": paired_difference(c, b)}
    once = episodes[episodes["training"] == "0"].drop(columns="training")
    assert success_differences(once, {"it": ("a", "b")}) == {"it": paired_difference(a[0], b[0])}


def test_differences_refuse_policies_that_were_not_evaluated_alike():
    episodes = evaluated({"a": 0.8, "b": 0.4})
    last = episodes["seed"].max()
    with pytest.raises(ValueError, match=r"same episodes for all policies; \[\('b', '0'\)"):
        success_differences(episodes[(episodes["name"] == "a") | (episodes["seed"] < last)], {"it": ("a", "b")})
    with pytest.raises(ValueError, match="same episodes"):
        success_differences(episodes[(episodes["name"] == "a") | (episodes["training"] == "0")], {"it": ("a", "b")})


def test_differences_refuse_names_that_are_not_there_and_episodes_that_count_twice():
    episodes = evaluated({"a": 0.8, "b": 0.4})
    with pytest.raises(ValueError, match=r"expected contrasts of policies in column 'name', got \['c'\]; there are \['a', 'b'\]"):
        success_differences(episodes, {"it": ("a", "c")})
    with pytest.raises(ValueError, match=r"expected each episode once, got .* twice, as {'name': 'a', 'training': "):
        success_differences(pd.concat([episodes, episodes]), {"it": ("a", "b")})
    with pytest.raises(ValueError, match=r"expected each episode once, got 120 twice, as {'name': 'a', 'training': "):
        success_table(pd.concat([episodes, episodes[episodes["name"] == "a"]]))
    with pytest.raises(ValueError, match=r"expected each episode once, .* a column 'training'"):
        success_differences(episodes.drop(columns="training"), {"it": ("a", "b")})


def test_one_policy_evaluated_twice_is_not_two_trainings():
    episodes = evaluated({"a": 0.8, "b": 0.4})
    episodes["policy"] = episodes["name"] + episodes["training"]
    assert success_differences(episodes, {"it": ("a", "b")})["it"].n_trainings == episodes["training"].nunique()
    episodes.loc[episodes["policy"] == "b1", "policy"] = "b0"
    with pytest.raises(ValueError, match="'b' has 3 trainings, but 2 different weights; one policy evaluated twice is"):
        success_differences(episodes, {"it": ("a", "b")})


def test_one_training_evaluated_in_two_ways_is_paired_with_itself():
    episodes = evaluated({"waits": 0.8, "goes on": 0.4})
    episodes["policy"] = "weights " + episodes["training"]
    other = episodes.assign(policy=episodes["name"] + episodes["training"])
    contrast = {"it": ("waits", "goes on")}
    same, apart = success_differences(episodes, contrast)["it"], success_differences(other, contrast)["it"]
    assert same.same_trainings and not apart.same_trainings and same.estimate == apart.estimate
    assert same == paired_difference(*same.sides, same_trainings=True)
    assert (apart.low, apart.high) == (lambda d: (d.low, d.high))(paired_difference(*same.sides))
    swapped = episodes["policy"].where(
        episodes["name"] == "waits", "weights " + (2 - episodes["training"].astype(int)).astype(str)
    )
    assert not success_differences(episodes.assign(policy=swapped), contrast)["it"].same_trainings, "other pairs"


def test_rates_of_several_trainings_get_the_wider_interval():
    alike, apart = evaluated({"a": 0.5}), evaluated({"a": 0.5})
    apart["is_success"] = apart["training"] == "0"  # one training solves all, the others nothing
    tables = {"alike": alike, "apart": apart}
    wilson_of = {name: success_table(table[["name", "is_success"]]).iloc[0] for name, table in tables.items()}
    got = {name: success_table(table).iloc[0] for name, table in tables.items()}
    assert got["apart"]["high"] - got["apart"]["low"] > 0.8 and wilson_of["apart"]["high"] < 0.5
    for name, row in got.items():
        assert row["low"] <= wilson_of[name]["low"] and wilson_of[name]["high"] <= row["high"]
        assert row["rate"] == wilson_of[name]["rate"]


class Ended(StubEnv):
    """Its first step ends the episode, with an outcome of a kind."""

    outcome: object = False

    def step(self, action):
        observation, reward, *_, info = super().step(action)
        return observation, reward, True, False, {**info, "is_success": self.outcome}


def test_an_end_is_no_success(monkeypatch):
    env = Ended(ActionSpec.from_card("libero"))
    policy = SimpleNamespace(
        reset=lambda n_robots: None, predict_action_chunk=lambda observations: np.zeros((1, 2, 7), np.float32)
    )
    for outcome in (True, False, np.bool_(True)):
        monkeypatch.setattr(Ended, "outcome", outcome)
        assert record_rollout(policy, env, 0)["is_success"] is bool(outcome)
    for outcome in (float("nan"), 0.3):
        monkeypatch.setattr(Ended, "outcome", outcome)
        with pytest.raises(ValueError, match=r"expected info\['is_success'\] of Ended as True or False, got (nan|0.3)"):
            rollout(RandomPolicy(env.action_spec), [env], [(0, env.tasks[0])])


def test_a_task_twice_is_refused():
    with pytest.raises(ValueError, match=r"expected each task once, got \['lift', 'lift'\]"):
        Evaluation("random", 4, tasks=("lift", "lift"))


def test_other_tasks_of_the_same_seeds_are_other_episodes():
    episodes = evaluated({"a": 0.8, "b": 0.4}).assign(task=lambda rows: rows["name"].map({"a": "lift", "b": "push"}))
    with pytest.raises(ValueError, match="expected the same episodes for all policies"):
        success_differences(episodes, {"it": ("a", "b")})


def test_a_replay_names_the_seeds_that_exist():
    with pytest.raises(ValueError, match="seeds 900000 to 900004; got 900005"):
        replay_episode(Evaluation("random", n_episodes=5), 900_005)
