"""Mixtures: every robot with its own conventions and statistics, in an order that depends on the sample position alone."""

import dataclasses
import gc
import json
import pickle
import shutil
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_data import TEXTS, toy_frames

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import CardError, SpecMismatch
from rvlm.data.sampling import FixedBudgetDataset, Mixture
from rvlm.data.windows import EpisodeDataset, EpisodeWriter, Windows, split
from rvlm.envs.tabletop.tasks import ALL_FAMILIES, paraphrases
from rvlm.policy.config import MAX_EMBODIMENTS
from rvlm.policy.embodiments import Embodiment, reorder_state, with_embodiment_name
from rvlm.policy.factory import load_vla, make_policy
from rvlm.policy.observation_history import UncachedSequence
from rvlm.policy.policy import Policy, load_policy
from rvlm.training.stage_data import STAGE_BUILDERS
from rvlm.training.stages import ROBOT, Stage
from rvlm.training.trainer import log_history, train_stage_in_process

ROBOTS = ("tabletop_franka7", "tabletop_ur6", "tabletop_small5")
ONE_STEP = {"structure": "one_step", "chunk_size": 3, "head_options": {"hidden": 32}}


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Twelve synthetic demonstrations of each robot, of three tasks."""
    folders = {}
    for number, name in enumerate(ROBOTS):
        spec = ActionSpec.from_card(name)
        writer = EpisodeWriter(tmp_path_factory.mktemp("demos") / name, spec)
        for seed in range(12):
            frames = toy_frames(spec, 5 + seed % 3, 100 * number + seed)
            frames["action"][:, :6] *= 0.2 * (number + 1)  # each robot moves in its own range
            writer.add_episode(frames, TEXTS[seed % 3], {"task": f"task {seed % 3}"})
        folders[name] = str(writer.finalize())
    return folders


@pytest.fixture
def stage(demos, toy_vlm, tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    return Stage("mixed", ROBOT, tuple(demos.values()), str(toy_vlm), 48, policy=ONE_STEP, batch_size=8, n_processes=1)


def drawn(stage):
    _, _, data, _ = STAGE_BUILDERS[ROBOT](stage)
    return data


# -- the order ---------------------------------------------------------------------------------------------------------
def parts(sizes, n):
    return [FixedBudgetDataset(range(size), n, seed, lambda i, rng, seed=seed: (seed, i)) for seed, size in enumerate(sizes)]


def test_parts_come_by_weight_each_in_epochs_of_its_own():
    mixed = Mixture(parts((5, 50), 2000), (1, 3), 2000, seed=0)
    got = [mixed[i] for i in range(2000)]
    assert np.mean([part == 1 for part, _ in got]) == pytest.approx(0.75, abs=0.03)
    for part, size in ((0, 5), (1, 50)):
        own = [item for at, item in got if at == part]
        assert sorted(own[:size]) == list(range(size)) == sorted(own[size : 2 * size])


def test_a_mixed_sample_depends_on_its_position_alone():
    forwards, backwards = (Mixture(parts((7, 3), 60), (), 60, seed=4) for _ in range(2))
    assert [forwards[i] for i in range(60)] == [backwards[i] for i in reversed(range(60))][::-1]
    other = Mixture(parts((7, 3), 60), (), 60, seed=5)
    assert [forwards[i] for i in range(60)] != [other[i] for i in range(60)]


def test_blocks_are_of_one_part():
    mixed = Mixture(parts((7, 3), 64), (), 64, seed=0, block=8)
    assert len({tuple(mixed.part[i : i + 8]) for i in range(0, 64, 8)}) == 2
    assert all(len(set(mixed.part[i : i + 8])) == 1 for i in range(0, 64, 8))


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -1), (1, 1, 1)])
def test_invalid_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"expected a weight above 0 for each of 2 parts of the data, got"):
        Mixture(parts((7, 3), 8), weights, 8, seed=0)


# -- every robot by its own numbers ------------------------------------------------------------------------------------
def test_a_sample_in_a_mixture_is_that_of_its_robot_alone(stage, demos):
    """Statistics of one dataset never touch another's actions; what comes back is what was recorded."""
    model, _, data, _ = STAGE_BUILDERS[ROBOT](stage)
    seen = set()
    for i in range(len(data)):
        sample, part = data[i], int(data.part[i])
        dataset = EpisodeDataset(stage.data[part])
        robot = model.embodiment(dataset.require_spec())
        alone = Windows(dataset, 1, 3, split(dataset)[0])
        row = int(np.flatnonzero(dataset.episode_of_frame == sample["episode_index"])[0] + sample["frame_index"])
        raw = robot.spec.unnormalize(sample["action"][0, 0], robot.stats["action"])
        assert np.allclose(raw, dataset.column("action")[row], atol=1e-5)
        assert np.allclose(robot.stats["action"].q99, alone.stats["action"].q99)
        seen.add(part)
    assert seen == {0, 1, 2}
    q99 = [model.embodiment(ActionSpec.from_card(name)).stats["action"].q99[0] for name in ROBOTS]
    assert q99[0] < q99[1] < q99[2]


def test_a_dimension_trains_only_where_it_exists(stage, demos, tmp_path):
    """A dimension of the head gets no gradient from a robot without it, and one from a robot with it."""
    spec = dataclasses.replace(ActionSpec.from_card(ROBOTS[1]), dataset="no_roll").replace_group(
        "action", 0, absent=("droll", "dyaw")
    )
    writer = EpisodeWriter(tmp_path / "no_roll", spec)
    for seed in range(12):
        frames = toy_frames(spec, 5, seed)
        frames["action"][:, [3, 5]] = 0
        writer.add_episode(frames, TEXTS[seed % 3])
    folder = str(writer.finalize())
    for data, has_gradient in (((folder,), False), ((folder, stage.data[0]), True)):
        model, _, budget, collate = STAGE_BUILDERS[ROBOT](dataclasses.replace(stage, data=data))
        batch = collate([budget[i] for i in range(16)])
        model(**batch).loss.backward()
        out = [m for m in model.head.modules() if isinstance(m, torch.nn.Linear)][-1].weight.grad
        rows = out.reshape(3, 7, -1).abs().sum((0, 2))
        assert (rows[[3, 5]] > 0).all() == has_gradient and (rows[[0, 1, 2, 4, 6]] > 0).all()
        assert batch["action_mask"][..., 3].any() == has_gradient
    actions = spec.unnormalize(np.full((2, 7), 0.5), Embodiment(spec, EpisodeDataset(folder).stats()).stats["action"])
    assert not actions[:, [3, 5]].any() and actions[:, 0].all()


def test_absent_dimensions_are_the_arms():
    with pytest.raises(CardError, match=r"absent is \['gripper'\]; expected some of gripper, and no gripper"):
        ActionSpec.from_card(ROBOTS[0]).replace_group("action", 1, absent=("gripper",))


def test_state_dimensions_are_matched_by_name():
    state = np.array([[1.0, 2.0, 3.0]])
    assert reorder_state(state, ("x", "y", "z"), ("z", "q", "x")).tolist() == [[3.0, 0.0, 1.0]]
    assert reorder_state(state, ("x", "y", "z"), ("x", "y", "z")) is state


@pytest.fixture
def trained(stage, tmp_path):
    train_stage_in_process(stage, tmp_path / "stage")
    return tmp_path / "stage" / "model"


def test_a_policy_acts_on_each_robot_that_it_was_trained_on(trained):
    """The same normalised action gives each robot its own raw action; an unknown robot is refused."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 48, 48, 3), np.uint8)
    observation = {"images": {"static": image[0], "wrist": image[1]}, "state": rng.normal(size=7), "instruction": TEXTS[0]}
    for name in ROBOTS:
        spec = ActionSpec.from_card(name)
        policy = load_policy(trained, spec=spec)
        assert policy.robot.spec == spec
        chunk = policy.predict_action_chunk([observation])[0]
        spec.check(np.clip(chunk, spec.low, spec.high))
        assert set(chunk[:, 6]) <= {spec.action[1].open, spec.action[1].close}
    second = ActionSpec.from_card(ROBOTS[1])
    stranger = dataclasses.replace(second, dataset="stranger").replace_group("state", 0, frame="ee")
    with pytest.raises(SpecMismatch, match="group 1 open"):
        load_policy(trained, spec=stranger)
    other = dataclasses.replace(second, rate_hz=5.0)
    with pytest.raises(SpecMismatch, match="rate_hz"):
        load_policy(trained, spec=other)
    assert load_policy(trained, spec=dataclasses.replace(second, dataset="a set of mine")).robot.spec == second


def test_two_robots_of_one_kind_are_told_apart_by_their_datasets(trained):
    """Each acts by statistics of its own; another name chooses none of them, unless one alone has these conventions."""
    model, processor = load_vla(trained)
    (first, own), *_ = model.embodiments.items()
    other = Embodiment(model.spec, model.stats)
    shifted = {name: dataclasses.replace(stats, q01=stats.q01 + 5, q99=stats.q99 + 5) for name, stats in own.stats.items()}
    twin = Embodiment(dataclasses.replace(own.spec, dataset="twin"), shifted)
    model.register_embodiments([other, own, twin])
    for robot in (own, twin):
        assert Policy(model, processor, spec=robot.spec).robot.to_dict() == robot.to_dict()
    for name in ("Twin", own.spec.robot):
        with pytest.raises(SpecMismatch, match=rf"these conventions, \['{first}', 'twin'\], .* got '{name}'; name the one that"):
            Policy(model, processor, spec=dataclasses.replace(own.spec, dataset=name))
    assert Policy(model, processor, spec=dataclasses.replace(other.spec, dataset="Twin")).robot.spec == other.spec


def test_swapped_statistics_are_refused(trained, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    first, second = config["embodiments"]
    for swap in ("stats", "both"):
        spoiled = json.loads(json.dumps(config))
        robots = spoiled["embodiments"]
        if swap == "both":
            robots[first], robots[second] = robots[second], robots[first]
        else:
            robots[first]["stats"], robots[second]["stats"] = robots[second]["stats"], robots[first]["stats"]
        folder = tmp_path / swap
        shutil.copytree(trained, folder)
        (folder / "config.json").write_text(json.dumps(spoiled))
        with pytest.raises(ValueError, match="as they were saved together"):
            load_vla(folder)


def test_a_policy_is_fine_tuned_on_another_robot_only_if_allowed(stage, trained, tmp_path):
    alone = dataclasses.replace(stage, data=stage.data[1:2], init=str(trained), n_samples=8)
    with pytest.raises(SpecMismatch, match="policy vs demonstrations"):
        train_stage_in_process(alone, tmp_path / "refused")
    train_stage_in_process(dataclasses.replace(alone, allow_new_embodiment=True), tmp_path / "moved")
    before, after = load_vla(trained)[0], load_vla(tmp_path / "moved" / "model")[0]
    assert after.spec.dataset == ROBOTS[1] and set(after.embodiments) == {ROBOTS[0], ROBOTS[2]}
    q99 = [m.embodiment(ActionSpec.from_card(ROBOTS[1])).stats["action"].q99 for m in (before, after)]
    assert np.array_equal(*q99), "what was learned was learned in these numbers"


def test_a_named_robot_is_named_alike_in_training_and_evaluation(stage, tmp_path):
    """Training and evaluation have the same prompt."""
    named_stage = dataclasses.replace(stage, policy={**ONE_STEP, "embodiment_conditioning": "name"})
    model, processor, data, _ = STAGE_BUILDERS[ROBOT](named_stage)
    for i in range(8):
        robot = model.embodiment(EpisodeDataset(stage.data[int(data.part[i])]).require_spec())
        assert data[i]["instruction"].startswith(f"{robot.spec.robot}: ")
    policy, asked = Policy(model.eval(), processor, spec=ActionSpec.from_card(ROBOTS[2])), []
    policy.history.add = lambda images, state, texts: asked.extend(texts)
    image = np.zeros((48, 48, 3), np.uint8)
    policy._observe([{"images": {"static": image, "wrist": image}, "state": np.zeros(7), "instruction": TEXTS[0]}])
    assert asked == [with_embodiment_name(policy.robot.spec, TEXTS[0])] == [f"small5: {TEXTS[0]}"]


WAYS = {
    "one step": {},
    "no state": {"has_state": False},
    "token after token": {"head": "tokens", "head_options": {"n_bins": 8}},
    "policy head": {"structure": "policy_head", "history": "lstm", "n_obs_steps": 3},
    "interleaved": {"structure": "interleaved", "n_obs_steps": 3},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_each_robot_has_its_own_embodiment_token(stage, tmp_path, way):
    """Same images, state and instruction; only the embodiment token differs, and it was trained."""
    train_stage_in_process(
        dataclasses.replace(stage, data=stage.data[:2], policy={**ONE_STEP, "embodiment_conditioning": "token", **way}),
        tmp_path / "stage",
    )
    model, processor = load_vla(tmp_path / "stage" / "model")
    assert model.embodiment_embedding.abs().sum(1).gt(0).tolist() == [True] * 2 + [False] * (MAX_EMBODIMENTS - 2)
    image = np.random.default_rng(0).integers(0, 256, (1, 2, 48, 48, 3), np.uint8)

    def features_as(name):
        policy = Policy(model, processor, spec=ActionSpec.from_card(name))
        slow = UncachedSequence(model, policy.prompt_builder)
        for _ in range(2):
            state = torch.as_tensor(model.conditioning.align_state(policy.robot, np.zeros((1, 7), np.float32)))
            for history in (policy.history, slow):
                history.add(image, state, [TEXTS[0]])
        assert model.config.structure != "interleaved" or torch.allclose(policy.history.predict(), slow.predict(), atol=1e-4)
        tokens = {"tokens": torch.zeros(1, model.head.n_queries, dtype=torch.int64)} if model.is_autoregressive else {}
        return model.history_features(state[:, None], **tokens, **policy.prompt_builder(image, [TEXTS[0]]))

    with torch.inference_mode():
        one, other = map(features_as, ROBOTS[:2])
        assert (one - other).abs().max() > 1e-6
        torch.nn.init.zeros_(model.embodiment_embedding)
        assert torch.equal(*map(features_as, ROBOTS[:2]))


def test_a_robot_keeps_its_token_whichever_embodiments_are_added(stage, tmp_path):
    first = dataclasses.replace(stage, data=stage.data[:2], policy={**ONE_STEP, "embodiment_conditioning": "token"}, n_samples=8)
    train_stage_in_process(first, tmp_path / "first")
    model = tmp_path / "first" / "model"
    train_stage_in_process(
        dataclasses.replace(first, data=(stage.data[2], stage.data[1]), init=str(model), policy={}), tmp_path / "second"
    )
    before, after = (load_vla(folder)[0] for folder in (model, tmp_path / "second" / "model"))
    assert after.spec.dataset == ROBOTS[2] and after.config.embodiment_ids == list(ROBOTS)
    moved = (
        (after.embodiment_embedding - before.embodiment_embedding)[:3].norm(dim=1) / after.embodiment_embedding[:3].norm(dim=1)
    ).tolist()
    assert moved[0] < 1e-3 < min(moved[1:]), "the first robot was not among the data; its token is only decayed"
    assert [after.conditioning.align_state(after.embodiment(ActionSpec.from_card(name)), np.zeros(7))[-1] for name in ROBOTS] == [
        0,
        1,
        2,
    ]
    alone, _ = make_policy(stage.init, before.spec, before.stats, **ONE_STEP, embodiment_conditioning="token")
    alone.register_embodiments([after.embodiment(ActionSpec.from_card(ROBOTS[1]))])
    assert alone.config.embodiment_ids == [before.spec.dataset, ROBOTS[1]], "whom it was made for comes first"
    with pytest.raises(ValueError, match=r"expected a state \(n, 8\), got one of 7"):
        alone.action_query_embeddings(1, torch.zeros(1, 7))
    strangers = [Embodiment(dataclasses.replace(after.spec, dataset=f"robot {i}"), after.stats) for i in range(MAX_EMBODIMENTS)]
    with pytest.raises(ValueError, match="expected at most 32 embodiments, got 35"):
        after.register_embodiments(strangers)
    with pytest.raises(ValueError, match="no embodiment_conditioning 'tag'; there are None, name, token"):
        STAGE_BUILDERS[ROBOT](dataclasses.replace(first, policy={**ONE_STEP, "embodiment_conditioning": "tag"}))


def test_a_dataset_does_not_hold_the_network(stage):
    """Samples need the policy's configuration alone, so that a loader's workers can be given the dataset."""
    model, _, data, _ = STAGE_BUILDERS[ROBOT](dataclasses.replace(stage, policy={**ONE_STEP, "embodiment_conditioning": "token"}))
    again = pickle.loads(pickle.dumps(data))
    for i in (0, len(data) - 1):
        first, second = data[i], again[i]
        assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
    reached, todo = set(), [data]
    while todo:
        one = todo.pop()
        if id(one) not in reached and not isinstance(one, type | types.ModuleType | types.FunctionType):
            reached.add(id(one))
            todo += gc.get_referents(one)
    assert id(model) not in reached and id(data.parts[0].transform) in reached


# -- shots, instructions, co-training --------------------------------------------------------------------------------------
def test_shots_are_as_many_of_each_task(stage):
    one = dataclasses.replace(stage, data=stage.data[:1], shots=2)
    episodes_of = lambda stage: {int(sample["episode_index"]) for sample in map(drawn(stage).__getitem__, range(48))}  # noqa: E731
    episodes = episodes_of(one)
    tasks = EpisodeDataset(stage.data[0]).episodes["task"].to_numpy()
    assert sorted(tasks[sorted(episodes)]) == ["task 0"] * 2 + ["task 1"] * 2 + ["task 2"] * 2
    assert episodes_of(dataclasses.replace(one, seed=1)) != episodes
    with pytest.raises(ValueError, match=r"expected 9 training episodes of each task in .*, got fewer of task 0"):
        drawn(dataclasses.replace(one, shots=9))


def test_every_template_of_a_family_is_a_paraphrase_of_the_others():
    for family in ALL_FAMILIES.values():
        all_of_them = tuple(t.format(a="red cube", b="blue ball") for t in family.templates)
        assert {paraphrases(template) for template in all_of_them} == {all_of_them}
    with pytest.raises(ValueError, match="expected an instruction of the tabletop's families, got 'dance'"):
        paraphrases("dance")


def test_instructions_are_paraphrased_or_made_canonical(stage):
    instructions = {
        how: {data[i]["instruction"] for i in range(48)}
        for how in ("original", "paraphrased", "canonical")
        for data in [drawn(dataclasses.replace(stage, data=stage.data[:1], instructions=how))]
    }
    assert instructions["original"] == set(TEXTS[:3]) and len(instructions["canonical"]) == 3 < len(instructions["paraphrased"])
    assert instructions["paraphrased"] == {paraphrase for text in TEXTS[:3] for paraphrase in paraphrases(text)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    from rvlm.envs.tabletop.rendered_scenes import collect_scenes

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RVLM_HOME", str(tmp_path_factory.mktemp("scenes")))
        return tuple(map(str, collect_scenes(12, 1000, n_workers=1, per_part=12)))


@pytest.mark.parametrize("n_processes", [1, 2])
def test_co_training_mixes_questions_and_actions(stage, scenes, tmp_path, n_processes):
    """A batch of questions reaches the backbone, and the head learns from the other batches."""
    from rvlm.training.launch import train

    both = dataclasses.replace(stage, vqa_data=scenes, vqa_fraction=0.5, n_samples=96, n_processes=n_processes)
    model = train(both, show_progress=False, n_threads=1)
    logged = log_history(model.parent)
    asked, acted = (sum(name in entry for entry in logged) for name in ("answer_loss", "arm_loss"))
    assert asked >= 2 and acted >= 2 and asked + acted >= 12
    alone = dataclasses.replace(stage, n_samples=96)
    train_stage_in_process(alone, tmp_path / "alone")
    mixed, plain = load_file(model / "model.safetensors"), load_file(tmp_path / "alone" / "model" / "model.safetensors")
    assert not torch.equal(mixed["backbone.model.text_model.norm.weight"], plain["backbone.model.text_model.norm.weight"])
