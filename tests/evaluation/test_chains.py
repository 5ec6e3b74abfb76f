"""Chains: sampled among feasible transitions, kept in one scene, counted as in closed form."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from toy_suites import tabletop

from rvlm.envs.tabletop import chain_sampling
from rvlm.envs.tabletop.chain_sampling import SymbolicState, category
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.scene import SETTINGS
from rvlm.envs.tabletop.tasks import TASK_FAMILIES
from rvlm.evaluation import chains
from rvlm.evaluation.chains import LENGTH, ChainEvaluation
from rvlm.evaluation.closed_loop import FIRST_HELD_OUT_SEED, evaluate

SEEDS = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + 40)
SIMPLE = SETTINGS["simple"]


def sampled_chains(seeds, tasks, length=LENGTH):
    return chain_sampling.sample_chains(seeds, tasks, length, robot="franka7", setting=SIMPLE)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))


def test_a_chain_has_one_subtask_per_category_and_is_the_same_for_the_same_seed():
    sampled = sampled_chains(SEEDS, tuple(TASK_FAMILIES))
    assert sampled == sampled_chains(SEEDS, tuple(TASK_FAMILIES))
    assert sampled[5:6] == sampled_chains(SEEDS[5:6], tuple(TASK_FAMILIES))
    for chain in sampled:
        assert len(chain) == LENGTH == len({category(family) for family in chain})
    assert len({chain[0] for chain in sampled}) > 8 and len(set(sampled)) > 35


def test_families_of_too_few_kinds_are_refused():
    with pytest.raises(ValueError, match="needs as many categories; these families have 2: drawer, push"):
        sampled_chains(SEEDS, ("push_left", "push_right", "open_drawer", "close_drawer"))


def test_families_that_cannot_be_chained_are_refused_by_name():
    """Of enough kinds each, but more objects than there are."""
    too_many_objects = ("close_drawer", "place_in_drawer", "stack", "rotate_left", "lift")
    for families, length in ((too_many_objects, 5), (("stack", "lift", "place_in_drawer", "rotate_left"), 4)):
        with pytest.raises(
            ValueError, match=rf"no feasible chain of {length} subtasks of {', '.join(families)} in the scene of seed"
        ):
            sampled_chains(SEEDS[:1], families, length)


def test_a_chain_that_is_hardly_ever_sampled_is_found(monkeypatch):
    often = sampled_chains(SEEDS[:5], tuple(TASK_FAMILIES))
    monkeypatch.setattr(chain_sampling, "N_DRAWS", 0)
    found = sampled_chains(SEEDS[:5], tuple(TASK_FAMILIES))
    assert found == sampled_chains(SEEDS[:5], tuple(TASK_FAMILIES)) != often
    world = chain_sampling.World("franka7", SIMPLE)
    for seed, chain in zip(SEEDS, found, strict=False):
        world.randomize(chain_sampling.np_random(seed)[0])
        assert chain_sampling._is_feasible(world, chain, LENGTH)


def test_success_leaves_what_the_next_task_needs():
    """The expert meets no infeasible subtask, and the symbolic state has the simulator's fixtures."""
    evaluation = ChainEvaluation("expert", n_episodes=12, suite=tabletop(60), tasks=tuple(TASK_FAMILIES))
    table = evaluate({"expert": evaluation}, n_workers=2, show_progress=False)
    assert not (table["failure"] == "infeasible").any()
    assert chains.avg_len(table)["expert"].mean > 4
    for _, rows in table.groupby("seed"):
        assert rows["subtask"].tolist() == list(range(len(rows)))
        assert rows["is_success"].iloc[:-1].all() and (
            rows["is_success"].iloc[-1] == (len(rows) == LENGTH) or len(rows) == LENGTH
        )


def test_the_scene_is_kept_between_tasks():
    env = Tabletop(image_size=16, max_steps=40)
    (first, second) = ("close_drawer", "turn_on_light")  # the hand has to let go of the handle on its way
    seed = next(s for s in SEEDS if sampled_chains([s], tuple(TASK_FAMILIES))[0][:1] == (first,))
    env.reset(seed=seed, options={"task": first})
    second = "turn_off_light" if env.world.is_light_on else second
    rows = chains.rollout_chains(None, [env], [seed], [(first, second)])
    assert [row["is_success"] for row in rows] == [True, True] and env.world.joint_position("drawer") < 0.02
    env.close()


def test_an_infeasible_subtask_ends_the_chain_and_says_so():
    env = Tabletop(image_size=16, max_steps=40)
    rows = chains.rollout_chains(None, [env], [FIRST_HELD_OUT_SEED], [("open_drawer", "open_drawer", "lift")])
    assert [(row["is_success"], row["failure"]) for row in rows] == [(True, ""), (False, "infeasible")]
    env.close()


def test_the_symbolic_state_follows_the_simulator():
    env = Tabletop(image_size=16, max_steps=60)
    for seed in range(6):
        env.reset(seed=seed, options={"task": "lift"})
        scene = SymbolicState(env.world)
        fixtures = [family for family in TASK_FAMILIES if not TASK_FAMILIES[family].n_objects]
        assert [f for f in fixtures if scene.is_feasible(f)] == [f for f in fixtures if f in env.feasible()]
    env.close()


@pytest.mark.parametrize("p", [0.3, 0.8])
def test_lengths_are_those_of_independent_tosses(p):
    """An oracle that solves each task with probability p: k in a row with p ** k, a mean length of their sum."""
    rng, rows = np.random.default_rng(0), []
    for seed in range(4000):
        for subtask in range(LENGTH):
            rows.append({"name": "oracle", "seed": seed, "subtask": subtask, "is_success": rng.random() < p})
            if not rows[-1]["is_success"]:
                break
    table = pd.DataFrame(rows)
    rates, mean = chains.success_at_k(table), chains.avg_len(table)["oracle"]
    expected = [p**k for k in range(1, LENGTH + 1)]
    assert rates["rate"].to_numpy() == pytest.approx(expected, abs=0.02)
    assert sum(expected) == pytest.approx(mean.mean, abs=2 * (mean.high - mean.low)) and mean.n == 4000
    assert mean.mean == pytest.approx(rates["rate"].sum())


def test_rows_are_the_same_for_any_number_of_workers_and_a_short_run_is_continued():
    columns, tables = ["seed", "subtask", "task", "instruction", "is_success", "failure", "n_steps"], []
    for n_workers in (1, 2):
        evaluation = ChainEvaluation("random", n_episodes=12, suite=tabletop(3 + n_workers))
        tables.append(evaluate({"a": dataclasses.replace(evaluation, n_episodes=4)}, n_workers, show_progress=False)[columns])
        tables.append(evaluate({"a": evaluation}, n_workers, show_progress=False)[columns])
    assert len(set(tables[1]["seed"])) == 12 and set(tables[0]["seed"]) < set(tables[1]["seed"])
    pd.testing.assert_frame_equal(tables[1].drop(columns="n_steps"), tables[3].drop(columns="n_steps"))
