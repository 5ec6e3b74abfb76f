"""Adapters: few weights are trained and saved, reloaded or merged policies act alike, other weights are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_data import TEXTS
from toy_policies import ONE_STEP, POLICY_HEAD, SPEC, a_batch, inputs

from rvlm.policy.factory import load_vla, make_policy, merge_policy, modify_policy
from rvlm.policy.policy import load_policy
from rvlm.vlm.backbones import ADAPTERS, load_backbone, vision_modules
from rvlm.vlm.processors import load_processor
from rvlm.vlm.quantization import is_quantized, precision

ADAPTED = ("lora", "dora", "qlora")


def build(vlm, stats, finetuning, **settings):
    torch.manual_seed(0)
    return make_policy(vlm, SPEC, stats, finetuning=finetuning, lora_rank=4, **{**ONE_STEP, **settings})


def take_steps(model, batch, n=6):
    """Some steps of AdamW; the losses on the way."""
    optimizer, losses = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], 1e-2), []
    for _ in range(n):
        losses.append(model(**batch).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    model.eval()
    return [loss.item() for loss in losses]


@pytest.fixture(scope="module", params=ADAPTED)
def adapted(request, toy_vlm, toy_stats, tmp_path_factory):
    """A policy with trained adapters: its model, its processor, its folder, a batch."""
    model, processor = build(toy_vlm, toy_stats, request.param)
    batch = a_batch(model, processor)
    losses = take_steps(model, batch)
    assert losses[-1] < 0.8 * losses[0]
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, processor)
    return model, processor, folder, batch


def predict(model, batch):
    return model.predict(**inputs(batch))


def test_only_adapters_and_the_act_embedding_of_a_backbone_are_trained(adapted, toy_vlm):
    model, *_ = adapted
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trainable} == {"backbone", "head", "state_projector"}
    in_backbone = {name for name in trainable if name.startswith("backbone")}
    assert all("lora_" in name or "trainable_tokens" in name for name in in_backbone)
    assert any("trainable_tokens" in name for name in in_backbone)
    tower = {id(p) for part in vision_modules(model.backbone) for p in part.parameters()}
    assert not tower & {id(p) for p in model.parameters() if p.requires_grad}


def test_every_linear_layer_of_the_language_model_is_adapted(adapted):
    model, *_ = adapted
    decoder = model.backbone.model.get_decoder()
    layers = {name.split(".lora_A")[0] for name, _ in decoder.named_parameters() if "lora_A" in name}
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-1] for name in layers} == {*attention, *mlp}
    assert len(layers) == 7 * len(decoder.layers)


def test_only_the_embedding_of_act_changes(adapted, toy_vlm):
    model, processor, *_ = adapted
    before = load_backbone(toy_vlm, processor).get_input_embeddings().weight
    ids = torch.arange(len(before))
    after = model.backbone.get_input_embeddings()(ids)
    changed = (after - before).abs().amax(-1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [model.config.act_id]


def test_a_small_checkpoint_reloads_to_the_same_action(adapted):
    model, _, folder, batch = adapted
    again, _ = load_vla(folder)
    assert torch.equal(predict(again, batch), predict(model, batch))
    assert is_quantized(again) == is_quantized(model)
    names = set(load_file(folder / "model.safetensors"))
    assert names and not any(name.startswith("backbone") for name in names)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".jinja", ".md"}


def test_a_reloaded_policy_can_be_trained_further(adapted):
    _, _, folder, batch = adapted
    again, _ = load_vla(folder)
    losses = take_steps(again, batch)
    assert losses[-1] < losses[0] and again.adapters is not None


def test_a_merged_policy_acts_like_the_adapted_one(adapted, tmp_path):
    model, processor, folder, batch = adapted
    merged, _ = merge_policy(folder)
    over_full_weights, _ = load_vla(folder, is_quantized=False)
    assert torch.allclose(predict(merged, batch), predict(over_full_weights, batch), atol=1e-4)
    assert is_quantized(model) or torch.allclose(predict(merged, batch), predict(model, batch), atol=1e-4)
    assert merged.config.base_model is None and not any("lora" in name for name in merged.state_dict())
    merged.save_pretrained(tmp_path, processor)
    shutil.rmtree(tmp_path / ADAPTERS, ignore_errors=True)
    assert torch.equal(predict(load_vla(tmp_path)[0], batch), predict(merged, batch))


def test_a_cpu_with_bfloat16_computes_4_bit_layers_like_any_other(toy_vlm, toy_stats, tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model, processor = build(toy_vlm, toy_stats, "qlora")
    batch = a_batch(model, processor)
    model.eval().save_pretrained(tmp_path / "adapted", processor)
    assert torch.equal(predict(load_vla(tmp_path / "adapted")[0], batch), predict(model, batch))
    build(toy_vlm, toy_stats, "full")[0].save_pretrained(tmp_path / "whole", processor)
    quantized = load_vla(tmp_path / "whole", is_quantized=True)[0]
    small = [layer for layer in quantized.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]
    assert small and not any(layer.support_avx512bf16_for_cpu for layer in small) and is_quantized(quantized)


def test_an_adapted_policy_acts(adapted):
    from toy_policies import observe

    _, _, folder, _ = adapted
    import numpy as np

    acted = load_policy(folder).select_action([observe(np.random.default_rng(0), TEXTS[0])])
    assert acted.shape == (1, 7) and np.isfinite(acted).all()


# -- refused -----------------------------------------------------------------------------------------------------------
def copied(adapted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(adapted[2], folder)
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", f"{ADAPTERS}/adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("corrupt", "problem"),
    [
        (lambda w, name: w.pop(name), "missing"),
        (lambda w, name: w.update(more=torch.zeros(1)), "unexpected"),
        (lambda w, name: w.update({name: torch.zeros(3)}), "mismatched"),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_a_checkpoint_with_other_weights_is_refused_by_name(adapted, tmp_path, file, corrupt, problem):
    folder = copied(adapted, tmp_path)
    weights = load_file(folder / file)
    name = sorted(weights)[0]
    corrupt(weights, name)
    save_file(weights, folder / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"(?s){problem}.*{'more' if problem == 'unexpected' else name}"):
        load_vla(folder)


def test_adapters_on_other_weights_are_refused(adapted, toy_vlm, tmp_path):
    folder = copied(adapted, tmp_path)
    other = tmp_path / "vlm"
    shutil.copytree(toy_vlm, other)
    model, _, _, batch = adapted
    assert torch.equal(predict(load_vla(folder, base_model=other)[0], batch), predict(model, batch)), "the same weights elsewhere"
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it was trained on .*; got .*vlm with .*; give their present place by base_model="):
        load_vla(folder, base_model=other)


def test_an_impossible_finetuning_is_refused(toy_vlm, toy_stats, tmp_path):
    with pytest.raises(ValueError, match="no finetuning 'lra'; there are full, head, lora, dora, qlora"):
        build(toy_vlm, toy_stats, "lra")
    model, processor = build(toy_vlm, toy_stats, "lora")
    model.save_pretrained(tmp_path, processor)
    with pytest.raises(ValueError, match="its adapters would be lost in 4 bits; merge"):
        modify_policy(tmp_path, finetuning="qlora")


# -- on top of a policy ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("finetuning", ADAPTED)
def test_adapters_on_a_policy_keep_its_actions(saved, finetuning, tmp_path):
    folder, before = saved
    model, processor = modify_policy(folder, finetuning=finetuning, lora_rank=4)
    batch = a_batch(before, processor)
    off = float((predict(model.eval(), batch) - predict(before, batch)).abs().max())
    assert off < (0.2 if finetuning == "qlora" else 1e-5), "new adapters change nothing"
    take_steps(model, batch)
    model.save_pretrained(tmp_path, processor)
    assert torch.equal(predict(load_vla(tmp_path)[0], batch), predict(model, batch))
    assert json.loads((tmp_path / "config.json").read_text())["history"] == POLICY_HEAD["history"]


def test_adapters_on_an_adapted_policy(adapted, tmp_path):
    """The next stage starts from the merged weights."""
    _, processor, folder, batch = adapted
    onwards, _ = modify_policy(folder, finetuning="lora", lora_rank=2)
    assert torch.allclose(predict(onwards.eval(), batch), predict(merge_policy(folder)[0], batch), atol=1e-5)
    take_steps(onwards, batch, 3)
    onwards.save_pretrained(tmp_path, processor)
    assert torch.allclose(predict(load_vla(tmp_path)[0], batch), predict(onwards, batch), atol=1e-6)


def test_with_a_frozen_backbone_only_the_head_is_trained_and_saved(toy_vlm, toy_stats, tmp_path):
    model, processor = build(toy_vlm, toy_stats, "head")
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"head", "state_projector"}
    batch = a_batch(model, processor)
    take_steps(model, batch)
    model.save_pretrained(tmp_path, processor)
    assert not any(name.startswith("backbone") for name in load_file(tmp_path / "model.safetensors"))
    assert torch.equal(predict(load_vla(tmp_path)[0], batch), predict(model, batch))
    assert torch.equal(predict(merge_policy(tmp_path)[0], batch), predict(model, batch))


def test_a_random_backbone_is_saved_in_full(toy_vlm, toy_stats, tmp_path):
    """It has no name to be loaded by."""
    model, processor = build(toy_vlm, toy_stats, "head", is_pretrained=False)
    model.eval().save_pretrained(tmp_path, processor)
    batch = a_batch(model, processor)
    assert torch.equal(predict(load_vla(tmp_path)[0], batch), predict(model, batch))
    with pytest.raises(ValueError, match="expected weights under adapters that can be loaded again, got random ones"):
        build(toy_vlm, toy_stats, "lora", is_pretrained=False)


def test_frozen_weights_are_in_half_precision_where_the_machine_computes_in_it(toy_vlm, toy_stats, tmp_path, monkeypatch):
    """As on a GPU: trained weights in float32, the same action after reloading."""
    monkeypatch.setattr("rvlm.vlm.quantization.precision", lambda: torch.bfloat16)
    model, processor = build(toy_vlm, toy_stats, "lora")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    batch = a_batch(model, processor)
    losses = take_steps(model, batch)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path, processor)
    assert torch.equal(predict(load_vla(tmp_path)[0], batch), predict(model, batch))


def test_only_the_language_model_is_in_4_bits(toy_vlm, toy_stats):
    model, _ = build(toy_vlm, toy_stats, "qlora")
    small = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    prefix = next(n for n, m in model.named_modules() if m is model.backbone.model.get_decoder())
    assert small and all(name.startswith(prefix) for name in small)
    full, _ = build(toy_vlm, toy_stats, "lora")
    size = lambda m: sum(p.numel() * p.element_size() for p in m.backbone.model.get_decoder().layers.parameters())  # noqa: E731
    assert size(model) < 0.5 * size(full)
    assert precision() == torch.float32 or torch.cuda.is_available()


def test_no_code_and_no_pickle_come_with_a_checkpoint(saved, tmp_path):
    """Only safetensors are read, and a model that brings its own code is not run."""
    folder = tmp_path / "pickled"
    shutil.copytree(saved[0], folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"expected weights in model\.safetensors, got none.*only safetensors are read"):
        load_vla(folder)
    brought = tmp_path / "brought"
    brought.mkdir()
    mark = tmp_path / "was_run"
    (brought / "own.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    (brought / "config.json").write_text(
        json.dumps(
            {"model_type": "brought", "auto_map": {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}}
        )
    )
    with pytest.raises((ValueError, OSError)):
        load_backbone(brought, load_processor(saved[0]))
    assert not Path(mark).exists()
