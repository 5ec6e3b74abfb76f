"""How attention is computed is a choice of whoever makes, trains or loads a policy."""

import dataclasses

import numpy as np
import pytest
import torch
from toy_policies import SPEC

from rvlm.policy.factory import make_policy, modify_policy
from rvlm.policy.policy import load_policy
from rvlm.training.stage_data import STAGE_BUILDERS
from rvlm.training.stages import ROBOT, Stage
from rvlm.vlm.backbones import vision_modules

OBSERVATION = {
    "images": {"static": np.full((48, 48, 3), 9, np.uint8), "wrist": np.full((48, 48, 3), 99, np.uint8)},
    "state": np.zeros(7, np.float32),
    "instruction": "lift the red cube",
}


def implementations(model):
    parts = (model.backbone, *vision_modules(model.backbone))
    return {part.config._attn_implementation for part in parts if hasattr(part, "config")}


def test_attention_is_computed_as_asked_for_with_the_same_actions(toy_vlm, toy_stats, tmp_path):
    torch.manual_seed(0)
    model, processor = make_policy(toy_vlm, SPEC, toy_stats, attn_implementation="eager")
    assert implementations(model) == {"eager"}
    model.save_pretrained(tmp_path, processor)
    acted = {}
    for name in ("eager", "sdpa"):
        policy = load_policy(tmp_path, attn_implementation=name)
        assert implementations(policy.model) == {name} == implementations(modify_policy(tmp_path, attn_implementation=name)[0])
        acted[name] = policy.predict_action_chunk([OBSERVATION])
    assert np.allclose(acted["eager"], acted["sdpa"], atol=1e-5)
    assert implementations(load_policy(tmp_path).model) == {"sdpa"}, "the library's choice"


def test_a_stage_passes_it_on(toy_vlm, toy_demos, tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))
    stage = Stage("eager", ROBOT, (str(toy_demos),), str(toy_vlm), 8, batch_size=8, n_processes=1, attn_implementation="eager")
    assert implementations(STAGE_BUILDERS[ROBOT](stage)[0]) == {"eager"}
    assert stage.folder != dataclasses.replace(stage, attn_implementation=None).folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash", "no attn_implementation 'flash'; there are eager, sdpa, flash_attention_2"),
        ("kernels-community/flash-attn", "no attn_implementation 'kernels-community/flash-attn'; there are"),
        ("flash_attention_2", r"(?s)expected an attention .*got 'flash_attention_2': the package .*take 'sdpa' or 'eager'"),
    ],
)
def test_attention_that_is_not_there_is_refused(toy_vlm, toy_stats, name, message, monkeypatch):
    def not_installed(*_):
        raise ImportError("the package flash_attn is not installed")

    monkeypatch.setattr("transformers.PreTrainedModel.set_attn_implementation", not_installed)
    with pytest.raises(ValueError, match=message):
        make_policy(toy_vlm, SPEC, toy_stats, attn_implementation=name)
