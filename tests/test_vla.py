"""The policy's laws: what it is made of, what moves its actions and what must not, save and load, the closed loop."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TEXTS
from safetensors.torch import load_file, save_file
from test_backbones import llava  # noqa: F401  (a fixture)

from rvlm.actions import ActionSpec, SpecMismatch
from rvlm.backbones import Prompter, load_backbone, load_processor
from rvlm.batches import DialogueCollator, RobotCollator
from rvlm.heads import LSTMHistory, MLPHead
from rvlm.policy import Policy
from rvlm.vla import load_vla, make_vla

SPEC = ActionSpec.from_card("tabletop_franka7")
ONE_STEP = {"structure": "one_step", "head": "mlp", "chunk_size": 3, "head_options": {"hidden": 32}}
POLICY_HEAD = {**ONE_STEP, "structure": "policy_head", "history": "lstm", "n_obs_steps": 3}
STRUCTURES = pytest.mark.parametrize("settings", [ONE_STEP, POLICY_HEAD], ids=["one_step", "policy_head"])


def build(vlm, stats, settings):
    torch.manual_seed(0)
    model, processor = make_vla(vlm, SPEC, stats, **settings)
    return model.eval(), processor


def a_batch(processor, settings, b=3, seed=0, texts=TEXTS):
    """What `RobotCollator` makes of b made-up windows."""
    rng, t, k = np.random.default_rng(seed), settings.get("n_obs_steps", 1), settings["chunk_size"]
    samples = []
    for i in range(b):
        action = rng.uniform(-1, 1, (t, k, 7)).astype(np.float32)
        action[..., 6] = rng.random((t, k)) > 0.5
        samples.append({
            "images": rng.integers(0, 256, (t, 2, 48, 48, 3), np.uint8), "state": rng.normal(size=(t, 7)).astype(np.float32),
            "action": action, "action_mask": np.ones((t, k, 7), bool), "obs_mask": np.ones(t, bool), "dataset_index": 0,
            "instruction": texts[i % len(texts)],
        })  # fmt: skip
    return RobotCollator(processor, 2)(samples)


def observe(rng, instruction=TEXTS[0]):
    image = rng.integers(0, 256, (2, 48, 48, 3), np.uint8)
    state = rng.normal(size=7).astype(np.float32)
    return {"image": image[0], "wrist_image": image[1], "state": state, "instruction": instruction}


def inputs(batch):
    return {k: v for k, v in batch.items() if k not in ("action", "action_mask", "obs_mask", "dataset_index")}


# -- what it is made of ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"structure": "two_step"}, "no structure 'two_step'; there are one_step, policy_head"),
        ({"head": "mpl"}, "no head 'mpl'; there are mlp"),
        ({"history": "lstm"}, "one_step sees one observation and has no history.*use structure='policy_head'"),
        ({"n_obs_steps": 4}, r"one_step sees one observation.*got n_obs_steps=4"),
        ({"structure": "policy_head", "n_obs_steps": 2}, "policy_head fuses steps by one of lstm; got history=None"),
        ({"chunk_size": 0}, "chunk_size is expected to be at least 1; got 0"),
        ({"cameras": ["static", "side"]}, "expected cameras of card 'tabletop_franka7', static, wrist; got .*side"),
        ({"head_options": {"arm_loss": "mae"}}, "no arm loss 'mae'; there are mse, huber, l1"),
    ],
)
def test_a_combination_that_means_nothing_is_refused(toy_vlm, toy_stats, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_vla(toy_vlm, SPEC, toy_stats, **{**ONE_STEP, **wrong})


@pytest.mark.parametrize("name", ["chunksize", "spec_", "model_type"])
def test_an_unknown_setting_is_an_error(toy_vlm, toy_stats, name):
    """Law 24."""
    with pytest.raises(TypeError, match=rf"unknown settings \['{name}'\]; there are cameras, chunk_size, has_state"):
        make_vla(toy_vlm, SPEC, toy_stats, **{name: 1})


def test_an_unknown_option_of_the_head_is_an_error(toy_vlm, toy_stats):
    with pytest.raises(TypeError, match="depth"):
        make_vla(toy_vlm, SPEC, toy_stats, head_options={"depth": 3})


@STRUCTURES
def test_attaching_a_head_leaves_the_pretrained_weights_alone(toy_vlm, toy_stats, settings):
    model, processor = build(toy_vlm, toy_stats, settings)
    pretrained = load_backbone(toy_vlm, processor).state_dict()
    assert all(torch.equal(weight, pretrained[name]) for name, weight in model.backbone.state_dict().items())


# -- what moves its actions, and what must not -------------------------------------------------------------------------
@STRUCTURES
def test_gradients_reach_every_part(toy_vlm, toy_stats, settings):
    model, processor = build(toy_vlm, toy_stats, settings)
    model(**a_batch(processor, settings)).loss.backward()
    base = model.backbone.model
    parts = {
        "vision": base.vision_model, "connector": base.connector, "language": base.text_model,
        "state": model.state_in, "head": model.head, "history": model.history,
    }  # fmt: skip
    for name, part in parts.items():
        for parameter in part.parameters():
            assert parameter.grad is not None, name
        grads = [p.grad.abs().sum() for p in part.parameters()]
        assert not grads or sum(grads) > 0, name


def test_a_vision_language_batch_reaches_the_backbone_of_a_policy(toy_vlm, toy_stats):
    """Law 22."""
    model, processor = build(toy_vlm, toy_stats, ONE_STEP)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 2, 48, 48, 3), np.uint8)
    batch = DialogueCollator(processor)([(p, [("is the light on ?", "yes")]) for p in pictures])
    model.backbone(**batch).loss.backward()
    for part in (model.backbone.model.vision_model, model.backbone.model.text_model):
        assert sum(p.grad.abs().sum() for p in part.parameters() if p.grad is not None) > 0


@STRUCTURES
def test_padding_does_not_move_the_action(toy_vlm, toy_stats, settings):
    """Law 15: alone, or beside a prompt that is three times as long."""
    model, processor = build(toy_vlm, toy_stats, settings)
    together = a_batch(processor, settings, b=2, texts=[TEXTS[2], " and then ".join(TEXTS)])
    t = settings.get("n_obs_steps", 1)
    assert together["attention_mask"][0].sum() < 0.7 * together["input_ids"].shape[1]
    length = int(together["attention_mask"][0].sum())
    alone = {k: v[:t, :length] if v.ndim == 2 and k != "obs_mask" else v[:t] for k, v in inputs(together).items() if k != "state"}
    ours = model.predict(state=together["state"][:1], **alone)
    torch.testing.assert_close(model.predict(**inputs(together))[:1], ours, atol=2e-5, rtol=0)


@STRUCTURES
def test_state_image_and_language_reach_the_action(toy_vlm, toy_stats, settings):
    """Law 20."""
    model, processor = build(toy_vlm, toy_stats, settings)
    batch = inputs(a_batch(processor, settings, b=1))
    before = model.predict(**batch)
    assert not torch.allclose(model.predict(**{**batch, "state": batch["state"] + 1}), before, atol=1e-5)
    assert not torch.allclose(model.predict(**{**batch, "pixel_values": -batch["pixel_values"]}), before, atol=1e-5)
    said = inputs(a_batch(processor, settings, b=1, texts=[TEXTS[1]]))
    assert not torch.allclose(model.predict(**said), before, atol=1e-5)


def test_without_state_the_state_does_not_matter(toy_vlm, toy_stats):
    model, processor = build(toy_vlm, toy_stats, {**ONE_STEP, "has_state": False})
    batch = inputs(a_batch(processor, ONE_STEP))
    assert torch.equal(model.predict(**batch), model.predict(**{**batch, "state": batch["state"] + 5}))


def test_state_is_required_where_the_policy_has_one(toy_vlm, toy_stats):
    model, processor = build(toy_vlm, toy_stats, ONE_STEP)
    batch = inputs(a_batch(processor, ONE_STEP))
    batch.pop("state")
    with pytest.raises(ValueError, match="has_state=True; expected its state"):
        model.features(**batch)


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 4)])
def test_arm_and_gripper_are_split_on_the_last_axis(shape):
    """Law 16, for any leading shape."""
    torch.manual_seed(0)
    head, features = MLPHead(8, 5, 7), torch.randn(*shape, 8)
    raw, predicted = head(features), head.predict(features)
    assert predicted.shape == (*shape, 5, 7)
    assert torch.equal(predicted[..., :6], raw[..., :6])
    assert torch.equal(predicted[..., 6], raw[..., 6].sigmoid())
    action, mask = torch.zeros_like(raw), torch.ones_like(raw, dtype=torch.bool)
    before = head.loss(features, action, mask)
    action[..., 6] = 1
    after = head.loss(features, action, mask)
    assert after["arm_loss"] == before["arm_loss"] and after["gripper_loss"] != before["gripper_loss"]


@pytest.mark.parametrize("name", ["mse", "huber", "l1"])
def test_loss_is_the_published_formula(name):
    torch.manual_seed(0)
    head, features = MLPHead(8, 2, 7, arm_loss=name, gripper_weight=0.3), torch.randn(4, 8)
    action = torch.rand(4, 2, 7).round()
    raw = head(features)
    error = (raw[..., :6] - action[..., :6]).abs()
    arm = {"mse": error**2, "l1": error, "huber": torch.where(error < 1, error**2 / 2, error - 0.5)}[name].mean()
    p = raw[..., 6].sigmoid()
    bce = -(action[..., 6] * p.log() + (1 - action[..., 6]) * (1 - p).log()).mean()
    losses = head.loss(features, action, torch.ones_like(raw, dtype=torch.bool))
    torch.testing.assert_close(losses["loss"], arm + 0.3 * bce)


@STRUCTURES
def test_masked_actions_do_not_change_the_loss(toy_vlm, toy_stats, settings):
    model, processor = build(toy_vlm, toy_stats, settings)
    batch = a_batch(processor, settings)
    batch["action_mask"][:, :, 1:] = False
    before = model(**batch).loss
    batch["action"][:, :, 1:, :6] += 100
    batch["action"][:, :, 1:, 6] = 1 - batch["action"][:, :, 1:, 6]
    assert torch.equal(model(**batch).loss, before)
    batch["action"][:, :, :1, :6] += 1
    assert not torch.equal(model(**batch).loss, before)
    batch["action_mask"][:] = False
    assert model(**batch).loss == 0


def test_the_history_keeps_nothing_behind():
    """Law 21."""
    torch.manual_seed(0)
    history, features = LSTMHistory(8), torch.randn(2, 4, 8)
    before = history(features)
    history.train()(torch.randn(2, 4, 8)).sum().backward()
    assert torch.equal(history.eval()(features), before)


@pytest.mark.parametrize("t", [1, 2, 3])
def test_future_observations_never_change_past_actions(toy_vlm, toy_stats, t):
    model, processor = build(toy_vlm, toy_stats, POLICY_HEAD)
    batch = inputs(a_batch(processor, POLICY_HEAD, b=1))
    changed = {**batch, "state": batch["state"].clone(), "pixel_values": batch["pixel_values"].clone()}
    changed["state"][:, t:] += 1
    changed["pixel_values"][t:] *= -1
    with torch.inference_mode():
        before, after = (model.head(model.fused(**b)) for b in (batch, changed))
    torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
    assert t == 3 or not torch.allclose(after[:, t:], before[:, t:], atol=1e-5)


@STRUCTURES
def test_a_permuted_batch_permutes_the_actions(toy_vlm, toy_stats, settings):
    model, processor = build(toy_vlm, toy_stats, settings)
    batch, t = inputs(a_batch(processor, settings, b=3)), settings.get("n_obs_steps", 1)
    order = torch.tensor([2, 0, 1])
    permuted = {k: v.unflatten(0, (3, t))[order].flatten(0, 1) for k, v in batch.items() if k != "state"}
    ours = model.predict(state=batch["state"][order], **permuted)
    torch.testing.assert_close(ours, model.predict(**batch)[order], atol=2e-5, rtol=0)


# -- save and load -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(toy_vlm, toy_stats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    model, processor = build(toy_vlm, toy_stats, POLICY_HEAD)
    model.save_pretrained(folder, processor)
    return folder, model


def test_a_saved_policy_acts_alike_and_knows_what_its_actions_mean(saved):
    folder, model = saved
    loaded, processor = load_vla(folder)
    assert loaded.spec == SPEC and not loaded.training
    batch = inputs(a_batch(processor, POLICY_HEAD))
    assert torch.equal(loaded.predict(**batch), model.predict(**batch))
    for name, stats in model.stats.items():
        assert loaded.stats[name].to_dict() == stats.to_dict()
    weights = [p.name for p in folder.iterdir() if p.suffix not in (".json", ".jinja", ".txt")]
    assert weights == ["model.safetensors"]


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_a_wrong_weight_is_named(saved, tmp_path, kind):
    """Law 25."""
    folder = shutil.copytree(saved[0], tmp_path / "policy")
    weights = load_file(folder / "model.safetensors")
    name = "head.layers.1.weight"
    if kind == "unexpected":
        name, weights["head.extra.weight"] = "head.extra.weight", torch.zeros(3)
    else:
        weight = weights.pop(name)
        if kind == "mismatched":
            weights[name] = weight[:-1].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"expected exactly the weights.*{kind}_keys.*{re.escape(name)}"):
        load_vla(folder)


def test_an_unknown_field_of_a_saved_configuration_is_named(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "chunksize": 8}))
    with pytest.raises(ValueError, match=r"unknown fields \['chunksize'\]"):
        load_vla(folder)


# -- the closed loop ---------------------------------------------------------------------------------------------------
def test_a_policy_is_refused_where_actions_mean_something_else(saved):
    with pytest.raises(SpecMismatch, match=r"policy vs environment.*gripper_open: 1.0 against -1.0"):
        Policy.load(saved[0], spec=ActionSpec.from_card("tabletop_ur6"))


@pytest.mark.parametrize("n", [0, 4])
def test_more_actions_than_predicted_cannot_be_executed(saved, n):
    with pytest.raises(ValueError, match=rf"between 1 and the chunk of 3 predicted actions; got {n}"):
        Policy.load(saved[0], n_action_steps=n)


def test_a_missing_camera_and_a_missing_robot_are_named(saved):
    policy, rng = Policy.load(saved[0]), np.random.default_rng(0)
    observation = observe(rng)
    observation.pop("wrist_image")
    with pytest.raises(KeyError, match="add \\['wrist_image'\\]"):
        policy.select_action([observation])
    with pytest.raises(ValueError, match=r"expected an observation of each of 1 robots, got 2; begin with reset\(n_robots=2\)"):
        policy.select_action([observe(rng), observe(rng)])


@pytest.mark.parametrize("n_action_steps", [1, 2, 3])
def test_queued_actions_are_those_of_the_predicted_chunk(toy_vlm, toy_stats, n_action_steps):
    policy, rng = Policy(*build(toy_vlm, toy_stats, ONE_STEP), n_action_steps=n_action_steps), np.random.default_rng(0)
    seen = [observe(rng) for _ in range(6)]
    acted = [policy.select_action([o])[0] for o in seen]
    planned = []
    for i in range(0, 6, n_action_steps):
        policy.reset()
        planned += list(policy.predict_action_chunk([seen[i]])[0][:n_action_steps])
    np.testing.assert_allclose(acted, planned, atol=1e-5)


def test_remembered_features_equal_a_full_recomputation(saved):
    policy, model, rng = Policy.load(saved[0]), saved[1], np.random.default_rng(0)
    policy.reset(2)
    steps = [[observe(rng), observe(rng, TEXTS[1])] for _ in range(5)]
    acted = [policy.select_action(step) for step in steps]
    prompter = Prompter(load_processor(saved[0]), 2)
    for now, action in enumerate(acted):
        window = [steps[max(0, now - i)] for i in (2, 1, 0)]  # the oldest fills what is missing
        rows = [step[robot] for robot in range(2) for step in window]
        state = model.stats["observation.state"].normalize(np.stack([o["state"] for o in rows])).astype(np.float32)
        prompts = prompter(np.stack([[o["image"], o["wrist_image"]] for o in rows]), [o["instruction"] for o in rows])
        chunk = model.predict(state=torch.from_numpy(state).unflatten(0, (2, 3)), **prompts)
        raw = SPEC.unnormalize(chunk.numpy(), model.stats["action"])[:, 0]
        np.testing.assert_allclose(action, raw, atol=1e-4)


def test_robots_beside_each_other_do_not_mix_and_reset_forgets(saved):
    policy, rng = Policy.load(saved[0]), np.random.default_rng(0)
    ours, others = [observe(rng) for _ in range(3)], [observe(rng, TEXTS[1]) for _ in range(3)]
    alone = [policy.select_action([o])[0] for o in ours]
    policy.reset(2)
    np.testing.assert_allclose([policy.select_action(list(pair))[1] for pair in zip(others, ours, strict=True)], alone, atol=1e-4)
    policy.reset()
    np.testing.assert_allclose(policy.select_action([ours[0]])[0], alone[0], atol=1e-5)


def test_another_family_of_models_becomes_a_policy_too(llava, toy_stats, tmp_path):  # noqa: F811
    model, processor = build(llava, toy_stats, ONE_STEP)
    batch = a_batch(processor, ONE_STEP)
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.head.parameters())
    model.save_pretrained(tmp_path, processor)
    loaded, processor = load_vla(tmp_path)
    torch.testing.assert_close(loaded.predict(**inputs(batch)), model.predict(**inputs(batch)))
    action = Policy(loaded, processor).select_action([observe(np.random.default_rng(0))])
    assert action.shape == (1, 7) and action[0, 6] in (-1, 1)
