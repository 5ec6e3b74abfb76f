"""The policy's network: what it is made of, what moves its actions and what must not, save and load."""

import dataclasses
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_data import TEXTS
from toy_policies import (
    EXPERT,
    INTERLEAVED,
    ONE_STEP,
    POLICY_HEAD,
    SETTINGS,
    SPEC,
    TOKENS,
    a_batch,
    build,
    collate,
    fused,
    inputs,
    windows_like,
)

from rvlm.policy.factory import load_vla, make_policy
from rvlm.policy.policy import Policy
from rvlm.vlm.backbones import load_backbone
from rvlm.vlm.question_answering import VQACollator

STRUCTURES = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
SEQUENCES = {name: settings for name, settings in SETTINGS.items() if settings["structure"] != "one_step"}


# -- what it is made of ------------------------------------------------------------------------------------------------
THERE_ARE = (
    "there are one_step with mlp or flow or tokens or fast or expert, no history, n_obs_steps of 1; interleaved with mlp or "
    "flow or expert, no history, n_obs_steps from 2 on; policy_head with mlp or flow, lstm or gpt, n_obs_steps from 2 on"
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"structure": "two_step"}, "no structure 'two_step'; there are one_step, interleaved, policy_head"),
        ({"head": "mpl"}, "no head 'mpl'; there are mlp, flow, tokens, fast, expert"),
        ({"history": "rnn"}, "no history 'rnn'; there are None, lstm, gpt"),
        ({"history": "lstm"}, f"'one_step'.*history='lstm'.*do not go together; {THERE_ARE}"),
        ({"n_obs_steps": 4}, f"n_obs_steps=4 do not go together; {THERE_ARE}"),
        ({"structure": "interleaved"}, f"'interleaved'.*n_obs_steps=1 do not go together; {THERE_ARE}"),
        ({**INTERLEAVED, "history": "gpt"}, f"history='gpt'.*do not go together; {THERE_ARE}"),
        ({**INTERLEAVED, "head": "tokens"}, f"head='tokens'.*do not go together; {THERE_ARE}"),
        ({**POLICY_HEAD, "head": "tokens"}, f"head='tokens'.*do not go together; {THERE_ARE}"),
        ({**POLICY_HEAD, "history": None}, f"history=None.*do not go together; {THERE_ARE}"),
        ({**POLICY_HEAD, "n_obs_steps": 1}, f"history='lstm', n_obs_steps=1 do not go together; {THERE_ARE}"),
        ({**POLICY_HEAD, "history": "gpt", "n_obs_steps": 257}, "'gpt' is expected to hold at most 256 observations; got 257"),
        ({"chunk_size": 0}, "chunk_size is expected to be at least 1; got 0"),
        ({"cameras": ["static", "side"]}, "expected cameras of card 'tabletop_franka7', static, wrist; got .*side"),
        ({"head_options": {"arm_loss": "mae"}}, "no arm loss 'mae'; there are mse, huber, l1"),
        ({"vlm_layers": [0, 0]}, "as indices of different layers; got"),
        ({"vlm_layers": []}, r"vlm_layers is expected as a number from 1 on or as indices of different layers; got \[\]"),
        ({"vlm_layers": 0}, "vlm_layers is expected as a number from 1 on or as indices of different layers; got 0"),
        ({"vlm_layers": [9]}, r"expected hidden layers from 0 \(embeddings\) to 1, or from -1 .* down to -2, got \[9\]"),
        ({**EXPERT, "vlm_layers": [0, 1, 2]}, r"at most 2 layers, one for each of the action expert's; got \[0, 1, 2\]"),
        (
            {**EXPERT, "head_options": {"hidden": 32, "n_heads": 5}},
            "a width that its heads share evenly; .* hidden=32, n_heads=5",
        ),
        ({**POLICY_HEAD, **EXPERT}, f"head='expert'.*do not go together; {THERE_ARE}"),
        ({**TOKENS, "head_options": {"decoding": "beam"}}, "no decoding 'beam'; there are autoregressive, parallel"),
    ],
)
def test_an_unsupported_combination_is_refused(toy_vlm, toy_stats, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_policy(toy_vlm, SPEC, toy_stats, **{**ONE_STEP, **wrong})


def test_cameras_are_those_of_the_card_unless_named(toy_vlm, toy_stats):
    one = dataclasses.replace(SPEC, cameras=("front",))
    model, processor = make_policy(toy_vlm, one, toy_stats, **ONE_STEP)
    observation = {"images": {"front": np.zeros((48, 48, 3), np.uint8)}, "state": np.zeros(7), "instruction": TEXTS[0]}
    assert list(model.config.cameras) == ["front"] and Policy(model, processor).select_action([observation]).shape == (1, 7)
    assert list(make_policy(toy_vlm, SPEC, toy_stats, **ONE_STEP, cameras=["wrist"])[0].config.cameras) == ["wrist"]


@pytest.mark.parametrize("name", ["chunksize", "spec_", "model_type"])
def test_an_unknown_setting_is_an_error(toy_vlm, toy_stats, name):
    known = "action_representation, cameras, chunk_size, embodiment_conditioning, has_state"
    with pytest.raises(TypeError, match=rf"unknown settings \['{name}'\]; there are {known}"):
        make_policy(toy_vlm, SPEC, toy_stats, **{name: 1})


@STRUCTURES
def test_attaching_a_head_leaves_the_pretrained_weights_alone(toy_vlm, toy_stats, settings):
    model, processor = build(toy_vlm, toy_stats, settings)
    pretrained = load_backbone(toy_vlm, processor).state_dict()
    assert all(torch.equal(weight, pretrained[name]) for name, weight in model.backbone.state_dict().items())


# -- what moves its actions, and what must not -------------------------------------------------------------------------
@STRUCTURES
def test_gradients_reach_every_part(toy_vlm, toy_stats, settings):
    model, processor = build(toy_vlm, toy_stats, settings)
    model(**a_batch(model, processor)).loss.backward()
    base = model.backbone.model
    parts = {
        "vision": base.vision_model, "connector": base.connector, "language": base.text_model,
        "state": model.state_projector, "head": model.head, "history": model.history,
    }  # fmt: skip
    for name, part in parts.items():
        for parameter in part.parameters():
            assert parameter.grad is not None, name
        grads = [p.grad.abs().sum() for p in part.parameters()]
        assert not grads or sum(grads) > 0, name


def test_a_vision_language_batch_reaches_the_backbone_of_a_policy(toy_vlm, toy_stats):
    model, processor = build(toy_vlm, toy_stats, ONE_STEP)
    images = np.random.default_rng(0).integers(0, 256, (2, 2, 48, 48, 3), np.uint8)
    batch = VQACollator(processor)([(p, [("is the light on ?", "yes")]) for p in images])
    model.backbone(**batch).loss.backward()
    for part in (model.backbone.model.vision_model, model.backbone.model.text_model):
        assert sum(p.grad.abs().sum() for p in part.parameters() if p.grad is not None) > 0


@STRUCTURES
def test_padding_does_not_move_the_action(toy_vlm, toy_stats, settings):
    """Alone, or beside a prompt that is three times as long."""
    model, processor = build(toy_vlm, toy_stats, settings)
    samples = windows_like(model.config, b=2, texts=[TEXTS[2], " and then ".join(TEXTS)])
    together, alone = collate(model, processor, samples), collate(model, processor, samples[:1])
    assert alone["input_ids"].shape[1] < together["input_ids"].shape[1]
    torch.testing.assert_close(model.predict(**inputs(together))[:1], model.predict(**inputs(alone)), atol=2e-5, rtol=0)


@pytest.mark.parametrize("settings", SEQUENCES.values(), ids=SEQUENCES)
def test_padding_before_the_episodes_start_does_not_change_the_action(toy_vlm, toy_stats, settings):
    """Interleaved skips them; a policy head repeats the first observation, whatever the padding holds."""
    model, processor = build(toy_vlm, toy_stats, settings)
    (sample,) = windows_like(model.config, b=1)
    sample["obs_mask"][:2] = False
    if settings["structure"] == "interleaved":
        other = {**sample, "images": sample["images"].copy(), "state": sample["state"].copy()}
        other["images"][:2], other["state"][:2] = 0, 9
        ours, theirs = (model.predict(**inputs(collate(model, processor, [s]))) for s in (sample, other))
        assert torch.equal(ours, theirs)
        shorter = {k: v[2:] if isinstance(v, np.ndarray) else v for k, v in sample.items()}
        alone = model.predict(**inputs(collate(model, processor, [shorter])))
        torch.testing.assert_close(ours, alone, atol=2e-5, rtol=0)
    else:
        batch = collate(model, processor, [sample])
        assert batch["input_ids"].shape[0] == settings["n_obs_steps"]


@STRUCTURES
def test_state_image_and_language_reach_the_features(toy_vlm, toy_stats, settings):
    """Of an action expert: its actions."""
    model, processor = build(toy_vlm, toy_stats, settings)
    batch = a_batch(model, processor, b=1)
    read = (lambda batch: model.predict(**inputs(batch))) if model.is_expert else (lambda batch: fused(model, batch))
    before = read(batch)
    assert not torch.allclose(read({**batch, "state": batch["state"] + 1}), before, atol=1e-5)
    assert not torch.allclose(read({**batch, "pixel_values": -batch["pixel_values"]}), before, atol=1e-5)
    other = a_batch(model, processor, b=1, texts=[TEXTS[1]])
    assert not torch.allclose(read(other), before, atol=1e-5)


def test_without_state_the_state_does_not_matter(toy_vlm, toy_stats):
    model, processor = build(toy_vlm, toy_stats, {**ONE_STEP, "has_state": False})
    batch = inputs(a_batch(model, processor))
    assert torch.equal(model.predict(**batch), model.predict(**{**batch, "state": batch["state"] + 5}))


def test_state_is_required_where_the_policy_has_one(toy_vlm, toy_stats):
    model, processor = build(toy_vlm, toy_stats, ONE_STEP)
    batch = inputs(a_batch(model, processor))
    batch.pop("obs_mask")
    batch.pop("state")
    with pytest.raises(ValueError, match=r"expected a state \(n, 7\), got none; see `VLA.conditioning.align_state`"):
        model.observation_features(**batch)


@STRUCTURES
def test_masked_actions_do_not_change_the_loss(toy_vlm, toy_stats, settings):
    model, processor = build(toy_vlm, toy_stats, settings)
    batch = a_batch(model, processor)
    batch["action_mask"][:, :, 1:] = False

    def loss():
        torch.manual_seed(1)
        return model(**batch).loss

    before = loss()
    batch["action"][:, :, 1:, :6] += 100
    batch["action"][:, :, 1:, 6] = 1 - batch["action"][:, :, 1:, 6]
    assert torch.equal(loss(), before)
    batch["action"][:, :, :1, :6] += 1
    assert not torch.equal(loss(), before)
    batch["action_mask"][:] = False
    assert loss() == 0


@pytest.mark.parametrize("t", [1, 2, 3])
@pytest.mark.parametrize("settings", SEQUENCES.values(), ids=SEQUENCES)
def test_future_observations_never_change_past_actions(toy_vlm, toy_stats, settings, t):
    model, processor = build(toy_vlm, toy_stats, settings)
    (sample,) = windows_like(model.config, b=1)
    changed = {**sample, "images": sample["images"].copy(), "state": sample["state"].copy()}
    changed["state"][t:] += 1
    changed["images"][t:] = 255 - changed["images"][t:]
    with torch.inference_mode():
        before, after = (model.head.predict(fused(model, collate(model, processor, [s]))) for s in (sample, changed))
    torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
    assert t == 3 or not torch.allclose(after[:, t:], before[:, t:], atol=1e-5)


@pytest.mark.parametrize("settings", SEQUENCES.values(), ids=SEQUENCES)
def test_past_observations_change_the_action(toy_vlm, toy_stats, settings):
    model, processor = build(toy_vlm, toy_stats, settings)
    (sample,) = windows_like(model.config, b=1)
    changed = {**sample, "images": sample["images"].copy()}
    changed["images"][0] = 255 - changed["images"][0]
    before, after = (model.predict(**inputs(collate(model, processor, [s]))) for s in (sample, changed))
    assert not torch.allclose(after, before, atol=1e-5)


@STRUCTURES
def test_a_permuted_batch_permutes_the_actions(toy_vlm, toy_stats, settings):
    model, processor = build(toy_vlm, toy_stats, settings)
    samples, order = windows_like(model.config, b=3), [2, 0, 1]
    ours, permuted = (model.predict(**inputs(collate(model, processor, rows))) for rows in (samples, [samples[i] for i in order]))
    torch.testing.assert_close(permuted, ours[order], atol=2e-5, rtol=0)


# -- save and load -----------------------------------------------------------------------------------------------------


def test_a_saved_policy_acts_alike_and_knows_what_its_actions_mean(saved):
    folder, model = saved
    loaded, processor = load_vla(folder)
    assert loaded.spec == SPEC and not loaded.training
    batch = inputs(a_batch(model, processor))
    assert torch.equal(loaded.predict(**batch), model.predict(**batch))
    for name, stats in model.stats.items():
        assert loaded.stats[name].to_dict() == stats.to_dict()
    weights = [p.name for p in folder.iterdir() if p.suffix not in (".json", ".jinja", ".txt", ".md")]
    assert weights == ["model.safetensors"]


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_a_wrong_weight_is_named(saved, tmp_path, kind):
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


def test_policies_can_be_loaded_from_several_threads(toy_vlm, toy_stats, tmp_path):
    """transformers drops tied weights where two threads load at once."""
    model, processor = build(toy_vlm, toy_stats, ONE_STEP)
    model.save_pretrained(tmp_path, processor)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_vla(tmp_path)[0], range(12)))
    for other in loaded:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
