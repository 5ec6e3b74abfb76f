"""The memory plan before a run agrees with the measured run."""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_data import TEXTS
from transformers import AutoConfig

from rvlm.policy.inspection import inspect_vlm
from rvlm.training import cost
from rvlm.training.memory_plan import CUDA_CONTEXT_BYTES, GPUS, _meta_policy, hub_configs, plan_memory
from rvlm.training.stages import ROBOT, Stage
from rvlm.training.trainer import profile_training_step
from rvlm.vlm.backbones import SMALL_VLM
from rvlm.vlm.tiny import FAMILIES

ONE_STEP = {"structure": "one_step", "chunk_size": 4}
INTERLEAVED = {"structure": "interleaved", "n_obs_steps": 3, "chunk_size": 4}
POLICY_HEAD = {"structure": "policy_head", "history": "lstm", "n_obs_steps": 3, "chunk_size": 4}
PUBLISHED = {"SmolVLM2-500M": 0.507e9, "SmolVLM2-2.2B": 2.246e9, "PaliGemma-3B": 2.923e9}
PUBLISHED |= {"Qwen2.5-VL-3B": 3.755e9, "Qwen2.5-VL-7B": 8.292e9}


def small_plan(policy=ONE_STEP, b=8, **settings):
    config = AutoConfig.from_pretrained(SMALL_VLM)
    n_text_tokens = len(TEXTS[0].split()) + 1
    return plan_memory(config, 16, policy, batch_size=b, n_text_tokens=n_text_tokens, precision="fp32", **settings)


CASES = [
    (policy, finetuning, False) for policy in (ONE_STEP, INTERLEAVED, POLICY_HEAD) for finetuning in ("full", "head", "lora")
]


@pytest.mark.parametrize(
    ("policy", "finetuning", "gradient_checkpointing"), [*CASES, (POLICY_HEAD, "full", True), (ONE_STEP, "lora", True)]
)
def test_the_plan_agrees_with_a_measured_step(toy_demos, policy, finetuning, gradient_checkpointing):
    """Parameters exactly, peak memory within a tenth."""
    plan = small_plan(policy, finetuning=finetuning, gradient_checkpointing=gradient_checkpointing)
    settings = {"finetuning": finetuning, "gradient_checkpointing": gradient_checkpointing, "batch_size": 8, "n_processes": 1}
    used = profile_training_step(Stage("step", ROBOT, (str(toy_demos),), str(SMALL_VLM), 8, policy=policy, **settings))
    assert (plan.parameters, plan.trained) == (used["parameters"], used["trained"])
    assert plan.peak == pytest.approx(used["peak"], rel=0.1)


def test_memory_savers_save_in_the_plan_too():
    full, half = small_plan(), small_plan(optimizer="adamw_8bit")
    assert half.optimizer == full.optimizer / 4 and small_plan(gradient_checkpointing=True).activations < 0.5 * full.activations
    assert small_plan(gradient_checkpointing=True).flops == pytest.approx(4 / 3 * full.flops, rel=0.2)
    assert small_plan(b=16).activations == pytest.approx(2 * full.activations, rel=0.01)
    with pytest.raises(ValueError, match="no optimizer 'adam' in the plan; there are adamw_torch"):
        small_plan(optimizer="adam")


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_of_the_hub_have_their_published_size(name):
    model, _ = _meta_policy(hub_configs()[name][0], ONE_STEP, "full", 0)
    assert 0 < sum(p.numel() for p in model.parameters()) - PUBLISHED[name] < 20e6, "its head"


@pytest.mark.parametrize("name", ["SmolVLM2-2.2B", "PaliGemma-3B"])
def test_fewer_trained_weights_and_fewer_bits_need_less_memory(name):
    config, n_image_tokens = hub_configs()[name]
    plans = {t: plan_memory(config, n_image_tokens, ONE_STEP, finetuning=t, batch_size=1) for t in ("full", "lora", "qlora")}
    assert plans["full"].peak > plans["lora"].peak > plans["qlora"].peak
    assert plans["qlora"].weights < 0.65 * plans["lora"].weights


def test_an_average_is_a_second_copy_of_what_is_trained():
    config, n_image_tokens = hub_configs()["SmolVLM2-2.2B"]
    for finetuning in ("full", "lora"):
        without, with_it = (
            plan_memory(config, n_image_tokens, ONE_STEP, finetuning=finetuning, batch_size=1, ema_decay=d) for d in (0.0, 0.99)
        )
        assert with_it.peak - without.peak == with_it.weights - without.weights == 4 * without.trained


def test_the_smallest_gpu_that_fits():
    config, n_image_tokens = hub_configs()["SmolVLM2-2.2B"]
    whole = plan_memory(config, n_image_tokens, ONE_STEP, batch_size=1)
    assert not whole.fits("L4") and whole.fits("A100") and whole.peak + CUDA_CONTEXT_BYTES < GPUS["A100"][0] * 1e9
    assert whole.seconds("L4") > whole.seconds("A100")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_planned_and_inspected(name, tmp_path):
    torch.manual_seed(0)
    FAMILIES[name](tmp_path)
    facts = inspect_vlm(tmp_path)
    has_all = name not in ("kosmos2", "florence2")
    assert (facts["structures"], facts["several images"]) == (("all", "yes") if has_all else ("one_step, policy_head", "no"))
    arguments = (AutoConfig.from_pretrained(tmp_path), int(facts["tokens per image"]), ONE_STEP)
    if name in ("idefics", "florence2"):
        with pytest.raises(ValueError, match=rf"expected a vision transformer before a decoder, got '{name}'; measure a step"):
            plan_memory(*arguments, finetuning="lora", lora_rank=2)
        return
    plan = plan_memory(*arguments, finetuning="lora", lora_rank=2)
    assert plan.parameters / 1e6 > facts["parameters [M]"] and plan.flops > 0 and plan.peak > 0
    assert ("token types" in facts["causal attention"]) == (name == "paligemma")


def test_output_of_a_profiler_past_python_stays_out_of_the_notebook(capfd):
    """Three warm-up steps come before the profiled one."""
    cost.measure_step(lambda: os.write(2, b"line\n") and torch.ones(9), 0.0)
    assert capfd.readouterr().err == "line\n" * 3
    os.write(2, b"written")
    assert capfd.readouterr().err == "written", "and stderr works again"


def test_a_step_on_a_gpu_is_timed_without_the_work_before_it(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    assert cost.measure_step(lambda: calls.append("step"), 0.0)["peak"] == 7
    assert calls == ["step", "step", "reset_peak_memory_stats", "synchronize", "step", "synchronize"]


def test_views_of_frozen_weights_are_not_activations():
    """`F.linear` takes the transposed weight where autograd does not record; the plan of LoRA counted each as a new tensor."""
    with FakeTensorMode():
        frozen, x = torch.nn.Linear(512, 512).requires_grad_(False), torch.zeros(4, 512, requires_grad=True)
        plain = cost.profile_forward_backward(frozen, lambda: frozen(x), False)
        viewed = cost.profile_forward_backward(frozen, lambda: frozen(x) + 0 * (x @ frozen.weight.t()), False)
    n_bytes = 4 * frozen.weight.numel()
    assert plain.peak < n_bytes and viewed.peak < n_bytes
