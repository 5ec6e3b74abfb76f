"""The policy in the loop: how much of a chunk is executed, what the history holds, and what must not mix."""

import copy
import dataclasses
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from toy_data import TEXTS
from toy_policies import INTERLEAVED, ONE_STEP, POLICY_HEAD, SETTINGS, SPEC, a_batch, build, collate, inputs, observe

from rvlm.data.actions import ActionSpec, Group, StatsAccumulator
from rvlm.data.errors import SpecMismatch
from rvlm.data.rotations import LAYOUTS, from_rotation, to_rotation
from rvlm.policy.factory import load_vla, make_policy
from rvlm.policy.flow_matching import decoding_from
from rvlm.policy.observation_checks import ObservationError
from rvlm.policy.observation_history import KVCachedSequence, UncachedSequence
from rvlm.policy.policy import Policy, load_policy

STRUCTURES = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def test_a_policy_is_refused_where_actions_mean_something_else(saved):
    with pytest.raises(SpecMismatch, match=r"policy vs environment.*action group 1 open: 1.0 against -1.0"):
        load_policy(saved[0], spec=ActionSpec.from_card("tabletop_ur6"))


@pytest.mark.parametrize("n", [0, 4])
def test_more_actions_than_predicted_cannot_be_executed(saved, n):
    with pytest.raises(ValueError, match=rf"between 1 and the chunk of 3 predicted actions; got {n}"):
        load_policy(saved[0], n_action_steps=n)


def test_a_missing_camera_and_a_missing_robot_are_named(saved):
    policy, rng = load_policy(saved[0]), np.random.default_rng(0)
    observation = observe(rng)
    observation["images"].pop("wrist")
    with pytest.raises(ObservationError, match=r"add \['wrist'\]"):
        policy.select_action([observation])
    with pytest.raises(ValueError, match=r"expected an observation of each of 1 robots, got 2; begin with reset\(n_robots=2\)"):
        policy.select_action([observe(rng), observe(rng)])


@pytest.mark.parametrize("n_action_steps", [1, 2, 3])
def test_queued_actions_are_those_of_the_predicted_chunk(toy_vlm, toy_stats, n_action_steps):
    """A chunk is executed as far as was asked, and no further."""
    policy, rng = Policy(*build(toy_vlm, toy_stats, ONE_STEP), n_action_steps=n_action_steps), np.random.default_rng(0)
    seen = [observe(rng) for _ in range(6)]
    acted = [policy.select_action([o])[0] for o in seen]
    planned = []
    for i in range(0, 6, n_action_steps):
        policy.reset()
        planned += list(policy.predict_action_chunk([seen[i]])[0][:n_action_steps])
    np.testing.assert_allclose(acted, planned, atol=1e-5)


@pytest.mark.parametrize("settings", [ONE_STEP, POLICY_HEAD], ids=["one_step", "policy_head"])
def test_an_ensemble_is_the_weighted_mean_of_what_reaches_the_step(toy_vlm, toy_stats, settings):
    """Against a reference computation, oldest chunk first, as the window of chunks fills and slides."""
    model, processor = build(toy_vlm, toy_stats, settings)
    policy, plain = Policy(model, processor, temporal_ensemble_coeff=0.5), Policy(model, processor)
    rng, stats = np.random.default_rng(0), model.stats["action"]
    chunks = []
    for step in range(5):
        observation = observe(rng)
        chunks.append(plain.predict_action_chunk([observation])[0])
        predicted = np.stack([SPEC.normalize(chunks[i][step - i], stats) for i in range(max(0, step - 2), step + 1)])
        weights = np.exp(-0.5 * np.arange(len(predicted)))
        mean = (weights[:, None] * predicted).sum(0) / weights.sum()
        acted = SPEC.normalize(policy.select_action([observation])[0], stats)
        np.testing.assert_allclose(acted[:6], mean[:6], atol=1e-4)


@pytest.mark.parametrize("layout", [layout for layout, n in LAYOUTS.items() if n])
def test_an_ensemble_averages_targets_of_rotations_as_rotations(toy_vlm, layout):
    """Across the wrap of angles and the antipode of quaternions; positions and grippers are weighted means."""
    n, high = LAYOUTS[layout], 181.0 if layout == "euler_xyz" else 4.0
    names, units = ("x", *(f"r{i}" for i in range(n))), ("m", *("deg" if layout == "euler_xyz" else "1",) * n)
    held = Group("pose", names, units, frame="base", rotation=layout)
    pose = dataclasses.replace(held, low=(-high,) * (n + 1), high=(high,) * (n + 1))
    jaw = Group("gripper", ("jaw",), ("1",), low=(0.0,), high=(1.0,), open=1.0, close=0.0)
    spec = ActionSpec("arm", "arm", 10.0, ("static",), (pose, jaw), (held,))
    turned = Rotation.from_rotvec(np.radians([[178, 0, 0], [-179, 1, 0], [179, 0, 2]]))
    numbers = from_rotation(turned, layout) / pose.radians
    raw = np.concatenate([[[0.1], [0.2], [0.6]], numbers, [[0.0], [0.5], [1.0]]], 1)
    draws = np.random.default_rng(0).uniform(-1, 1, (99, n + 2))
    sides = {"action": (draws, spec.placed_action), "observation.state": (draws[:, :-1], spec.placed_state)}
    stats = {key: StatsAccumulator().update(x).finish("min_max", placed=placed) for key, (x, placed) in sides.items()}
    policy = Policy(*make_policy(toy_vlm, spec, stats, **{**ONE_STEP, "has_state": False}), temporal_ensemble_coeff=0.5)
    chunks = iter(raw)
    policy._predict = lambda: torch.as_tensor(stats["action"].normalize(np.tile(next(chunks), (1, 3, 1))), dtype=torch.float32)
    seen = {**observe(np.random.default_rng(0)), "state": np.ones(n + 1, np.float32)}
    seen["images"] = {"static": seen["images"]["static"]}
    acted = np.stack([policy.select_action([seen])[0] for _ in range(3)])
    np.testing.assert_allclose(acted[0], raw[0], atol=1e-5)
    for i in (1, 2):
        weights = np.exp(-0.5 * np.arange(i + 1))
        np.testing.assert_allclose(acted[i, [0, -1]], np.average(raw[: i + 1, [0, -1]], 0, weights), atol=1e-5)
        found = to_rotation(acted[i : i + 1, 1:-1] * pose.radians, layout)
        assert (found * turned[: i + 1].mean(weights).inv()).magnitude() < 1e-4
        assert np.abs(acted[i, 1:-1]).max() <= high


def test_an_ensemble_leaves_what_the_robot_lacks_at_0(toy_vlm):
    held = Group("pose", ("x", "rx", "ry", "rz"), ("m", *("rad",) * 3), frame="base", rotation="euler_xyz")
    pose = dataclasses.replace(held, low=(-3.2,) * 4, high=(3.2,) * 4, absent=("ry",))
    spec = ActionSpec("arm", "arm", 10.0, ("static",), (pose,), (held,))
    values = np.random.default_rng(0).uniform(-1, 1, (99, 4)) * [1, 1, 0, 1]
    placed = {"action": spec.placed_action, "observation.state": spec.placed_state}
    stats = {key: StatsAccumulator().update(values).finish("min_max", placed=groups) for key, groups in placed.items()}
    policy = Policy(*make_policy(toy_vlm, spec, stats, **{**ONE_STEP, "has_state": False}), temporal_ensemble_coeff=0.5)
    chunks = iter(np.array([[0.0, -0.6, 0, 0.2], [0.0, 0.6, 0, 1.4]]))
    policy._predict = lambda: torch.as_tensor(stats["action"].normalize(np.tile(next(chunks), (1, 3, 1))), dtype=torch.float32)
    seen = {**observe(np.random.default_rng(0)), "state": np.ones(4, np.float32)}
    seen["images"] = {"static": seen["images"]["static"]}
    assert [policy.select_action([seen])[0][2] for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("wrong", [{"temporal_ensemble_coeff": 0.1, "n_action_steps": 2}, {"temporal_ensemble_coeff": -1.0}])
def test_an_ensemble_of_chunks_that_do_not_overlap_is_refused(saved, wrong):
    with pytest.raises(ValueError, match="expected n_action_steps=1 and temporal_ensemble_coeff of at least 0; got"):
        load_policy(saved[0], **wrong)


def window_of(steps, now, settings):
    """Steps in the window at step `now`, oldest first."""
    t = settings.get("n_obs_steps", 1)
    if settings["structure"] != "interleaved":
        return [steps[max(0, now - i)] for i in range(t - 1, -1, -1)]  # the oldest fills what is missing
    length = 0
    for _ in range(now + 1):
        length = length + 1 if length < t else t // 2 + 1
    return steps[now + 1 - length : now + 1]


@pytest.mark.parametrize("settings", [*SETTINGS.values(), {**INTERLEAVED, "n_obs_steps": 2}], ids=[*SETTINGS, "interleaved-2"])
def test_the_closed_loop_equals_a_full_recomputation(toy_vlm, toy_stats, settings):
    """Every structure, as the window fills and slides, with two robots whose instructions differ in length."""
    model, processor = build(toy_vlm, toy_stats, settings)
    policy, rng = Policy(model, processor), np.random.default_rng(0)
    policy.reset(2)
    texts = [TEXTS[2], " and then ".join(TEXTS)]
    steps = [[observe(rng, text) for text in texts] for _ in range(8)]
    for now in range(8):
        action, samples = policy.select_action(steps[now]), []
        window = window_of(steps, now, settings)
        for robot, text in enumerate(texts):
            seen = [step[robot] for step in window]
            state = model.stats["observation.state"].normalize(np.stack([o["state"] for o in seen])).astype(np.float32)
            t, k = len(seen), settings["chunk_size"]
            samples.append({
                "images": np.stack([list(o["images"].values()) for o in seen]), "state": state, "instruction": text,
                "action": np.zeros((t, k, 7), np.float32), "action_mask": np.ones((t, k, 7), bool),
                "obs_mask": np.ones(t, bool), "dataset_index": 0,
            })  # fmt: skip
        noise = decoding_from(model.head, [(robot, now) for robot in range(2)])
        chunk = model.predict(decode=noise, **inputs(collate(model, processor, samples)))
        raw = SPEC.unnormalize(chunk.numpy(), model.stats["action"])[:, 0]
        np.testing.assert_allclose(action, raw, atol=1e-4)


def test_every_observation_passes_through_the_tower_once(toy_vlm, toy_stats):
    """A policy head and an interleaved policy encode an image once; the cache is rebuilt only where the window slides."""
    for settings in (POLICY_HEAD, INTERLEAVED):
        policy, rng, looks, lengths = Policy(*build(toy_vlm, toy_stats, settings)), np.random.default_rng(0), [], []
        policy.model.backbone.model.vision_model.register_forward_hook(lambda _, args, out, looks=looks: looks.append(1))
        policy.model.backbone.get_input_embeddings().register_forward_hook(
            lambda _, args, out, lengths=lengths: lengths.append(args[0].shape[1])
        )
        for _ in range(6):
            policy.select_action([observe(rng)])
        assert len(looks) == len(lengths) == 6
        one, more = lengths[0], lengths[1]
        if settings is INTERLEAVED:  # 1 new, 1, 1, then a window of 2, and so on
            assert more < one and lengths == [one, more, more, one + more, more, one + more]
        else:
            assert set(lengths) == {one}


def test_a_cache_that_cannot_be_appended_to_is_not_used(toy_vlm, toy_stats, monkeypatch):
    """Where the cached sequence differs from the uncached one, the uncached one acts."""
    model, processor = build(toy_vlm, toy_stats, INTERLEAVED)
    assert isinstance(Policy(model, processor).history, KVCachedSequence)
    monkeypatch.setattr(KVCachedSequence, "_decode_step", lambda self, height, width: None)
    history = Policy(model, processor).history
    assert type(history) is UncachedSequence


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trial_of_the_cache_notices_wrong_positions_and_a_lost_past(toy_vlm, toy_stats, monkeypatch, precision):
    model, processor = make_policy(toy_vlm, SPEC, toy_stats, **INTERLEAVED, finetuning="head", precision=precision)
    model.eval()

    def shifted(model, input_ids, inputs):
        return {"position_ids": inputs["attention_mask"].cumsum(-1)[:, -input_ids.shape[1] :] + 39}

    def blind(model, input_ids, inputs):
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][:, 5 : -input_ids.shape[1]] = 0
        return {}

    assert KVCachedSequence.matches_uncached(model, model.prompt_builder(processor))
    for wrong in (shifted, blind):
        monkeypatch.setattr("rvlm.vlm.hidden_states._position_ids_after_cache", wrong)
        assert not KVCachedSequence.matches_uncached(model, model.prompt_builder(processor)), wrong.__name__


@STRUCTURES
def test_robots_beside_each_other_do_not_mix_and_reset_forgets(toy_vlm, toy_stats, settings):
    policy, rng = Policy(*build(toy_vlm, toy_stats, settings), n_action_steps=2), np.random.default_rng(0)
    ours, others = [observe(rng) for _ in range(5)], [observe(rng, TEXTS[1]) for _ in range(5)]
    alone = [policy.select_action([o])[0] for o in ours]
    policy.reset(2)
    policy.seed_episodes([1, 0])  # the noise of a flow
    np.testing.assert_allclose([policy.select_action(list(pair))[1] for pair in zip(others, ours, strict=True)], alone, atol=1e-4)
    policy.reset()
    np.testing.assert_allclose(policy.select_action([ours[0]])[0], alone[0], atol=1e-5)


@pytest.mark.parametrize("name", ["one_step-mlp", "one_step-tokens", "interleaved-mlp"])
def test_policies_of_several_threads_may_share_a_model(toy_vlm, toy_stats, name):
    """Each adds its own state at `<act>`; a forward pass is made longer here, so that without turns they would overlap."""
    model, processor = build(toy_vlm, toy_stats, SETTINGS[name])
    rng = np.random.default_rng(0)
    seen = [[observe(rng) for _ in range(8)] for _ in range(2)]

    def chunks(observations):
        policy = Policy(model, processor)
        return [policy.predict_action_chunk([observation]) for observation in observations]

    alone = [chunks(observations) for observations in seen]
    model.backbone.get_input_embeddings().register_forward_pre_hook(lambda *_: time.sleep(0.01))
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(chunks, seen))
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert copy.deepcopy(model) is not model, "a lock is no part of it"


WAYS = {
    "first action": {"n_action_steps": 1},
    "chunk": {"n_action_steps": 2},
    "ensemble": {"n_action_steps": 1, "temporal_ensemble_coeff": 0.1},
}


def test_robots_are_dropped_before_the_first_observation_too(toy_vlm, toy_stats):
    policy, rng = Policy(*build(toy_vlm, toy_stats, ONE_STEP)), np.random.default_rng(0)
    policy.reset(3)
    policy.keep([2, 0])
    assert policy.select_action([observe(rng), observe(rng)]).shape == (2, 7)


@pytest.mark.parametrize(
    "settings, way",
    [(name, "first action") for name in SETTINGS if "flow" not in name]
    + [(name, way) for name in ("one_step-mlp", "policy_head-lstm-mlp", "interleaved-flow") for way in ("chunk", "ensemble")],
)
def test_robots_that_are_done_are_dropped_and_the_others_do_the_same(toy_vlm, toy_stats, settings, way):
    """As the window fills and slides, with any queue, history and cache."""
    policy, rng = Policy(*build(toy_vlm, toy_stats, SETTINGS[settings]), **WAYS[way]), np.random.default_rng(0)
    steps = [[observe(rng, " and then ".join(TEXTS[: 1 + i])) for i in range(4)] for _ in range(7)]
    policy.reset(4)
    whole = np.stack([policy.select_action(step) for step in steps])
    policy.reset(4)
    rows, dropped = [0, 1, 2, 3], {1: [0, 1, 3], 2: [1, 0], 5: [1]}  # after which step which places are kept
    for now, step in enumerate(steps):
        acted = policy.select_action([step[row] for row in rows])
        np.testing.assert_allclose(acted, whole[now][rows], atol=1e-4)
        if now in dropped:
            policy.keep(dropped[now])
            rows = [rows[place] for place in dropped[now]]
    assert rows == [0]
    for wrong in ([], [1]):
        with pytest.raises(ValueError, match=f"expected places of some of 1 robots to keep, got .{str(wrong)[1:]}"):
            policy.keep(wrong)


@pytest.mark.parametrize(
    "family, has_state, cameras",
    [("toy_vlm", has_state, cameras) for has_state in (True, False) for cameras in (("static",), ("static", "wrist"))]
    + [("llava", True, ("static", "wrist")), ("llava", False, ("static",))],
)
@STRUCTURES
def test_every_combination_learns_an_episode_is_saved_and_acts(
    family, settings, cameras, has_state, toy_stats, tmp_path, request
):
    """On two classes of models: the loss goes to nearly zero, loading changes nothing, and acting equals training."""
    settings = {**settings, "cameras": list(cameras), "has_state": has_state}
    model, processor = build(request.getfixturevalue(family), toy_stats, settings)
    batch = a_batch(model, processor, b=2, n_cameras=len(cameras))
    truth, optimizer = batch["action"][:, -1], torch.optim.AdamW(model.parameters(), 4e-3, fused=True)
    for _ in range(15):
        for _ in range(10):
            optimizer.zero_grad()
            model.train()(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        predicted = model.eval().predict(**inputs(batch))
        is_near = (predicted - truth)[..., :6].abs().mean() < 0.1 * truth[..., :6].abs().mean()
        if is_near and torch.equal(predicted[..., 6] > 0.5, truth[..., 6] > 0.5):
            break
    else:
        pytest.fail("not learned in 150 steps")
    model.save_pretrained(tmp_path, processor)
    loaded, processor = load_vla(tmp_path)
    assert torch.equal(loaded.predict(**inputs(batch)), predicted)
    policy, rng = Policy(loaded, processor), np.random.default_rng(0)
    for _ in range(3):
        action = policy.select_action([observe(rng)])
        assert action.shape == (1, 7) and np.isfinite(action).all() and action[0, 6] in (-1, 1)


ACTS = """
import sys
absent = "accelerate av bitsandbytes gymnasium matplotlib mujoco optuna pandas papermill peft pyarrow scipy tensorboard"
for name in absent.split():
    sys.modules[name] = None
import numpy as np, rvlm
from pathlib import Path
policy = rvlm.load_policy(Path(rvlm.__file__).parent / "assets" / "policy")
image, state = np.zeros((96, 96, 3), np.uint8), np.zeros(7, np.float32)
action = policy.select_action([{"images": {"static": image, "wrist": image}, "state": state, "instruction": "lift the red cube"}])
assert action.shape == (1, 7) and np.isfinite(action).all()
"""


def test_a_policy_acts_where_only_the_core_is_installed():
    """torch, transformers, safetensors, numpy and pillow; peft, and with it bitsandbytes, only where there are adapters."""
    acted = subprocess.run([sys.executable, "-c", ACTS], capture_output=True, text=True, check=False)
    assert acted.returncode == 0, acted.stderr[-2000:]
