"""What is read at `<act>` of a frozen backbone is computed once: the same policy as with the backbone at every step."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_policies import build
from toy_stages import ONE_STEP, few, trained

from rvlm.data.windows import EpisodeDataset
from rvlm.policy.factory import load_vla
from rvlm.policy.policy import load_policy
from rvlm.training import frozen_backbone, stage_data
from rvlm.training.frozen_backbone import FeaturesOfRows, random_settings, why_at_every_step
from rvlm.training.stage_data import STAGE_BUILDERS
from rvlm.training.stages import ROBOT
from rvlm.training.trainer import train_stage_in_process
from rvlm.vlm.backbones import load_backbone
from rvlm.vlm.processors import load_processor
from rvlm.vlm.tiny import tiny_vlm

NO_STATE = {**ONE_STEP, "has_state": False}
HISTORY = {**NO_STATE, "structure": "policy_head", "history": "lstm", "n_obs_steps": 3, "head": "flow"}


def frozen(stage, policy=None, n_steps=12, **changes):
    return few(stage, n_steps, finetuning="head", policy=policy or NO_STATE, **changes)


def at_every_step(monkeypatch):
    monkeypatch.setattr(stage_data, "why_at_every_step", lambda *_: "asked for")


@pytest.mark.parametrize(
    ("policy", "family"), [(NO_STATE, None), (HISTORY, None), ({**HISTORY, "history": "gpt", "head": "mlp"}, "qwen2_5_vl")]
)
def test_the_weights_are_those_of_a_backbone_at_every_step(stage, policy, family, tmp_path, monkeypatch):
    """Also where images become more than pixels."""
    stage = frozen(stage, policy, init=tiny_vlm(family) if family else stage.init)
    monkeypatch.setattr(frozen_backbone, "ROWS_PER_FILE", 24)
    once = trained(stage, tmp_path / "once")
    start = build(stage.init, EpisodeDataset(stage.data[0]).stats(), policy)[0].state_dict()
    at_every_step(monkeypatch)
    always = trained(stage, tmp_path / "always")
    assert once.keys() == always.keys() and max(float((once[k] - start[k]).abs().max()) for k in once) > 1e-3
    assert all(torch.allclose(once[k], always[k], rtol=0, atol=1e-6) for k in once)


def test_a_trained_policy_acts_on_what_was_read_of_its_frames(stage, tmp_path):
    """Saved and loaded as any policy; its action on a recorded frame is that of the head on the cached features."""
    samples = STAGE_BUILDERS[ROBOT](frozen(stage))[2]
    train_stage_in_process(frozen(stage), tmp_path)
    policy, loaded = load_policy(tmp_path / "model"), load_vla(tmp_path / "model")[0]
    windows = samples.items
    for i in (0, 11):
        sample = windows[i]
        episode, at = windows.dataset.episode(sample["episode_index"]), sample["frame_index"]
        images = {
            "images": {"static": episode["observation.images.static"][at], "wrist": episode["observation.images.wrist"][at]}
        }
        seen = {**images, "state": episode["observation.state"][at], "instruction": sample["instruction"]}
        state, features = (torch.from_numpy(sample[name][None]) for name in ("state", "features"))
        expected = loaded.predict(state, features=features)
        policy.reset()
        assert np.allclose(policy.predict_action_chunk([seen]), policy._unnormalized(expected), atol=1e-5)


def test_the_backbone_is_not_run_in_a_step(stage, tmp_path, monkeypatch):
    """Its features are shared: another head and another history train on those of the first."""
    STAGE_BUILDERS[ROBOT](frozen(stage))
    ran = []
    monkeypatch.setattr(frozen_backbone, "action_query_states", lambda *_, **__: ran.append("feature"))
    for policy in (NO_STATE, HISTORY):
        model, _, samples, collate = STAGE_BUILDERS[ROBOT](frozen(stage, policy))
        model.backbone.register_forward_pre_hook(lambda *_: ran.append("step"))
        model.backbone.model.register_forward_pre_hook(lambda *_: ran.append("step"))
        batch = collate([samples[i] for i in range(4)])
        assert "pixel_values" not in batch and "input_ids" not in batch
        model(**batch).loss.backward()
    assert not ran


def features_of(stage):
    _, _, samples, _ = STAGE_BUILDERS[ROBOT](stage)
    return np.stack([samples.items[i]["features"][-1] for i in range(20)])


def test_features_are_of_these_instructions_frames_and_weights(stage, tmp_path):
    """Each change of what they are made from is another file; what does not enter is none."""
    plain, n_files = frozen(stage), lambda: len(list((tmp_path / "home").glob("features/*/features.npy")))
    first = features_of(plain)
    assert np.array_equal(features_of(frozen(stage, {**HISTORY, "head": "mlp"}, batch_size=4)), first) and n_files() == 1
    changed = [
        frozen(stage, {**NO_STATE, "embodiment_conditioning": "name"}),
        frozen(stage, {**NO_STATE, "cameras": ["static"]}),
        frozen(stage, is_pretrained=False),
    ]
    for i, other in enumerate(changed):
        assert not np.allclose(features_of(other), first, atol=1e-4) and n_files() == 2 + i


def test_a_killed_process_loses_one_file(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_backbone, "ROWS_PER_FILE", 24)
    read, asked = frozen_backbone.action_query_states, []

    def once_killed(*args, **inputs):
        asked.append(len(inputs["input_ids"]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return read(*args, **inputs)

    monkeypatch.setattr(frozen_backbone, "action_query_states", once_killed)
    with pytest.raises(KeyboardInterrupt):
        features_of(frozen(stage))
    features_of(frozen(stage))
    assert asked == [24, 24, 19, 19], "of 67 frames"


def test_rows_are_found_in_their_files(monkeypatch):
    monkeypatch.setattr(frozen_backbone, "ROWS_PER_FILE", 3)
    rows = np.array([2, 3, 5, 7, 11, 13, 17])
    values = np.stack([rows, -rows], axis=1).astype(np.float32)
    features = FeaturesOfRows(rows, [values[:3], values[3:6], values[6:]])
    asked = np.array([[17, 2], [11, 11], [5, 7]])
    assert np.array_equal(features[asked], np.stack([asked, -asked], axis=-1))


REFUSED = [
    ({"finetuning": "full"}, {}, "finetuning='full' trains the backbone"),
    ({"finetuning": "lora"}, {}, "finetuning='lora' trains the backbone"),
    ({}, {"has_state": True}, "the state enters"),
    ({}, {"embodiment_conditioning": "token"}, "a learned embodiment token"),
    ({}, {"head": "tokens", "head_options": {"n_bins": 8}}, "head 'tokens' has trained query embeddings"),
    ({}, {"head": "expert", "head_options": {}}, "an action expert attends to every token"),
    ({}, {"vlm_layers": 2}, "several layers of the backbone are mixed"),
    ({}, {"structure": "interleaved", "n_obs_steps": 2}, "structure 'interleaved' reads the whole window"),
    ({"augment": {"shift": 2}}, {}, "images are augmented"),
    ({"instructions": "paraphrased"}, {}, "instructions are paraphrased"),
    ({"vqa_data": ("scenes",)}, {}, "questions"),
    ({"n_samples": 40}, {}, "reads 40 observations, fewer than the 66 frames"),
]


@pytest.mark.parametrize(("changes", "policy", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_trained_or_random_below_act_runs_the_backbone_at_every_step(stage, toy_vlm, toy_stats, changes, policy, reason):
    plain = build(toy_vlm, toy_stats, NO_STATE)[0]
    assert why_at_every_step(frozen(stage), plain, 66, is_one_text=False) is None
    model, _ = build(toy_vlm, toy_stats, {**NO_STATE, **policy})
    assert reason in why_at_every_step(dataclasses.replace(frozen(stage), **changes), model, 66, is_one_text=True)


def test_a_window_over_two_instructions_runs_the_backbone_at_every_step(stage, toy_vlm, toy_stats):
    model, _ = build(toy_vlm, toy_stats, HISTORY)
    assert "changes within an episode" in why_at_every_step(frozen(stage), model, 66, is_one_text=False)
    rows = SimpleNamespace(episode_of_frame=np.array([0, 0, 1, 1]), task_of_frame=np.array([3, 3, 4, 3]))
    assert stage_data._has_one_text(rows, np.arange(3)) and not stage_data._has_one_text(rows, np.arange(4))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("smolvlm", []),
        ("kosmos2", ["text_config.attention_dropout=0.1"]),
        ("florence2", ["text_config.dropout=0.1", "vision_config.drop_path_rate=0.1"]),
    ],
)
def test_a_backbone_that_is_random_in_training_says_by_what(family, expected):
    folder = tiny_vlm(family)
    backbone = load_backbone(folder, load_processor(folder))
    assert random_settings(backbone) == expected
    backbone.add_module("norm", torch.nn.BatchNorm1d(1))
    assert random_settings(backbone) == [*expected, "BatchNorm1d"]
