"""On another device than the CPU: every part stands there, every input is moved there, and the results are the CPU's."""

import numpy as np
import pytest
import torch
from pretended_card import CARD, PretendedCard
from toy_policies import ONE_STEP, POLICY_HEAD, SETTINGS, a_batch, build, observe

from rvlm.policy.model import VLA
from rvlm.policy.policy import Policy, load_policy
from rvlm.vlm.backbones import load_backbone
from rvlm.vlm.quantization import compute_device, precision


def acts(policy, n_steps=4):
    """Actions of two robots, then of the second alone."""
    rng = np.random.default_rng(0)
    policy.reset(n_robots=2)
    steps = [[observe(rng), observe(rng, "push it to the left")] for _ in range(n_steps)]
    actions = [policy.select_action(step) for step in steps[:-1]]
    policy.keep([1])
    return np.concatenate([*actions, policy.select_action(steps[-1][1:])])


def everywhere(model):
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_policy_acts_and_learns_on_another_device_as_on_the_cpu(toy_vlm, toy_stats, settings):
    model, processor = build(toy_vlm, toy_stats, settings)
    batch, expected = a_batch(model, processor), acts(Policy(model, processor))
    torch.manual_seed(0)
    expected_loss = model(**batch).loss.item()
    with PretendedCard():
        model.to(CARD)
        assert acts(Policy(model, processor)) == pytest.approx(expected, abs=1e-5)
        torch.manual_seed(0)
        loss = model(**{name: value.to(CARD) for name, value in batch.items()}).loss
        loss.backward()
        assert loss.device == CARD and loss.item() == pytest.approx(expected_loss, abs=1e-5)
        assert {p.grad.device for p in model.parameters() if p.grad is not None} == {CARD}


@pytest.mark.parametrize("settings", [ONE_STEP, {**POLICY_HEAD, "embodiment_conditioning": "token"}], ids=["mlp", "lstm"])
def test_what_is_put_on_a_backbone_stands_where_it_stands(toy_vlm, toy_stats, settings):
    """As a backbone in 4 bits, which is loaded on the GPU."""
    model, processor = build(toy_vlm, toy_stats, settings)
    with PretendedCard():
        backbone = load_backbone(toy_vlm, processor).to(CARD)
        assert everywhere(VLA(model.config, backbone)) == {CARD}


def test_a_loaded_policy_acts_on_this_machines_gpu_unless_another_device_is_asked_for(toy_vlm, toy_stats, tmp_path, monkeypatch):
    model, processor = build(toy_vlm, toy_stats, ONE_STEP)
    model.save_pretrained(tmp_path, processor)
    monkeypatch.setattr("rvlm.policy.policy.compute_device", lambda name: torch.device(name or CARD))
    with PretendedCard():
        assert everywhere(load_policy(tmp_path).model) == {CARD}
        assert everywhere(load_policy(tmp_path, device="cpu").model) == {torch.device("cpu")}


@pytest.mark.parametrize(
    ("rank", "is_computed", "device", "dtype"), [(None, True, "cuda", torch.bfloat16), ("3", False, "cuda:3", torch.float16)]
)
def test_a_process_has_its_own_gpu_and_what_it_computes(monkeypatch, rank, is_computed, device, dtype):
    """bfloat16 that a card only emulates is slower than float16."""
    assert compute_device() == torch.device("cpu") and precision() == torch.float32
    for wrong in ("cuda", "gpu"):
        with pytest.raises(ValueError, match=rf"expected a device of this machine, cpu; got '{wrong}'"):
            compute_device(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or is_computed)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert compute_device() == torch.device(device) and precision() == dtype
