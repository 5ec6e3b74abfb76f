"""Saving and loading: what comes back is the trained policy whole, or an error that names folder and file."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_policies import ONE_STEP, SPEC, perturbed_policy, predicted
from transformers import AutoConfig, AutoModel, PreTrainedModel

from rvlm.policy.checkpoint_files import CheckpointError, tensors_hash
from rvlm.policy.factory import load_vla, make_policy
from rvlm.policy.model import VLA
from rvlm.policy.model_card import model_card
from rvlm.policy.policy import load_policy
from rvlm.statistics import wilson
from rvlm.training.stage_data import STAGE_BUILDERS
from rvlm.training.stages import ROBOT, Stage


@pytest.fixture(scope="module", params=["full", "head", "lora"])
def kept(request, toy_vlm, toy_stats, tmp_path_factory):
    model, processor = perturbed_policy(toy_vlm, toy_stats, request.param)
    folder = tmp_path_factory.mktemp(request.param) / "policy"
    model.save_pretrained(save_directory=folder)
    return folder, predicted(model, processor)


def test_from_pretrained_gives_the_trained_policy(kept):
    """Whichever parts were saved; never random weights with a warning."""
    folder, before = kept
    for loaded in (
        VLA.from_pretrained(folder),
        AutoModel.from_pretrained(folder),
        VLA.from_pretrained(str(folder), device="cpu"),
    ):
        assert isinstance(loaded, VLA) and not loaded.training
        assert torch.equal(predicted(loaded, loaded.processor), before)
    assert AutoConfig.from_pretrained(folder).model_type == "rvlm"
    assert {"config.json", "model.safetensors", "README.md", "processor_config.json", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert not [path for path in folder.parent.iterdir() if path != folder], "nothing is left beside it"


def test_a_policy_without_its_backbone_is_not_made_up(toy_vlm, toy_stats):
    config = perturbed_policy(toy_vlm, toy_stats, "head")[0].config
    with pytest.raises(ValueError, match=r"expected the backbone of this policy, .*vlm, got none; load it by"):
        VLA(config)


def test_saving_takes_what_the_library_and_its_callers_hand_over(toy_vlm, toy_stats, tmp_path):
    model, _ = perturbed_policy(toy_vlm, toy_stats)
    known = inspect.signature(PreTrainedModel.save_pretrained).parameters
    own = inspect.signature(VLA.save_pretrained).parameters
    assert {"save_directory", "is_main_process", "state_dict", "push_to_hub", "max_shard_size"} <= known.keys() & own.keys()
    model.save_pretrained(tmp_path / "other", is_main_process=False, save_function=None)
    assert not (tmp_path / "other").exists()
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "zeros", state_dict=zeros, max_shard_size="20KB")
    assert len(list((tmp_path / "zeros").glob("*.safetensors"))) > 1
    assert not any(weight.any() for weight in load_vla(tmp_path / "zeros")[0].head.parameters())
    with pytest.raises(TypeError, match=r"does not take \['varient'\] without push_to_hub=True"):
        model.save_pretrained(tmp_path / "typo", varient="fp16")
    with pytest.raises(TypeError, match=r"loaded as it was trained, without \['dtype'\]; there are revision"):
        VLA.from_pretrained(tmp_path / "zeros", dtype=torch.float16)
    model.processor = None
    with pytest.raises(ValueError, match="expected a folder and a processor to save with the policy, got no processor"):
        model.save_pretrained(tmp_path / "bare")


def test_a_folder_that_is_written_over_is_whole_or_refused(toy_vlm, toy_stats, tmp_path, monkeypatch):
    """A policy of another kind leaves no file of the previous one; an interrupted save can't be loaded."""
    adapted, processor = perturbed_policy(toy_vlm, toy_stats, "lora")
    adapted.save_pretrained(tmp_path / "policy")
    (tmp_path / "policy" / "notes.txt").write_text("mine")
    whole, _ = perturbed_policy(toy_vlm, toy_stats)
    whole.save_pretrained(tmp_path / "policy", max_shard_size="20KB")
    assert not (tmp_path / "policy" / "adapter").exists() and (tmp_path / "policy" / "notes.txt").exists()
    assert torch.equal(predicted(load_vla(tmp_path / "policy")[0], processor), predicted(whole, processor))
    replace, n = Path.replace, []

    def stopped(self, target):
        n.append(self)
        if len(n) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        adapted.save_pretrained(tmp_path / "policy")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"policy: expected config\.json as JSON, got .*was it cut short"):
        load_vla(tmp_path / "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


@pytest.fixture(scope="module")
def whole(toy_vlm, toy_stats, tmp_path_factory):
    """Folder of a complete saved policy."""
    folder = tmp_path_factory.mktemp("whole") / "policy"
    perturbed_policy(toy_vlm, toy_stats)[0].save_pretrained(folder)
    return folder


# -- refused by folder and file ----------------------------------------------------------------------------------------
def cut(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def config(change):
    def spoil(folder):
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))

    return spoil


def weights(change, name="model.safetensors"):
    def spoil(folder):
        values = load_file(folder / name)
        change(values)
        save_file(values, folder / name, {"format": "pt"})

    return spoil


def first(values, change):
    name = sorted(values)[0]
    values[name] = change(values[name].clone())


def of_another_tokenizer(folder):
    """Swap the ids of two tokens."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    added = next(token for token in values["added_tokens"] if token["content"] == "<act>")
    other = next(token for token in values["added_tokens"] if token["content"] == "<image>")
    added["id"], other["id"] = other["id"], added["id"]
    vocabulary = values["model"]["vocab"]
    vocabulary["<act>"], vocabulary["<image>"] = vocabulary.get("<image>", 0), vocabulary.get("<act>", 1)
    path.write_text(json.dumps(values))


SPOILED = {
    "no configuration": (lambda f: (f / "config.json").unlink(), r"expected config\.json as JSON, got .*holds README"),
    "configuration cut short": (lambda f: cut(f / "config.json"), r"expected config\.json as JSON"),
    "configuration is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config\.json: expected a JSON object, got list",
    ),
    "another model": (config(lambda c: c.update(model_type="llava")), r"expected a policy \(model_type 'rvlm'\), got 'llava'"),
    "unknown field": (config(lambda c: c.update(chunksize=8)), r"unknown fields \['chunksize'\] in config\.json"),
    "field of another type": (config(lambda c: c.update(chunk_size="8")), r"config\.json: .*TypeError.*another version"),
    "unknown structure": (config(lambda c: c.update(structure="two_step")), r"config\.json: .*no structure 'two_step'"),
    "no spec": (config(lambda c: c.pop("spec")), r"config\.json: .*expected a configuration with backbone, spec and stats"),
    "spec of another version": (config(lambda c: c["spec"].pop("rate_hz")), r"config\.json: .*missing fields \['rate_hz'\]"),
    "no statistics": (config(lambda c: c["stats"].clear()), "expected statistics of .*got none"),
    "no statistics of the state": (config(lambda c: c["stats"].pop("observation.state")), r"add \['observation\.state'\]"),
    "camera of another card": (config(lambda c: c.update(cameras=["left"])), r"expected cameras of card .*got \['left'\]"),
    "unknown option of the head": (config(lambda c: c.update(head_options={"depth": 3})), r"policy: .*TypeError.*depth"),
    "weights cut short": (lambda f: cut(f / "model.safetensors"), r"model\.safetensors: expected a whole file of safetensors"),
    "weights cut in their header": (lambda f: cut(f / "model.safetensors", 0.0001), r"model\.safetensors: expected a whole file"),
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), r"model\.safetensors: expected a whole file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"expected weights in model\.safetensors, got none"),
    "a part of the weights": (
        lambda f: (
            (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors")
            and (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
        ),
        r"expected weights in model-00002-of-00002\.safetensors, got none",
    ),
    "weights that are no numbers": (
        weights(lambda w: first(w, lambda v: v.fill_(float("nan")))),
        r"expected weights of finite numbers, got others in ",
    ),
    "one infinite weight": (
        weights(lambda w: w["head.layers.1.bias"].__setitem__(0, float("inf"))),
        r"finite numbers, got others in head\.layers\.1\.bias \(1 in all\)",
    ),
    "no processor": (
        lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json")],
        r"expected the policy's processor .*the folder holds README\.md, config\.json, model\.safetensors",
    ),
    "processor cut short": (lambda f: cut(f / "tokenizer.json"), r"expected the policy's processor"),
    "processor of another model": (of_another_tokenizer, r"expected a tokenizer in which <act> has id \d+.*another model"),
}


@pytest.mark.parametrize(("spoil", "named"), SPOILED.values(), ids=SPOILED)
def test_what_is_missing_or_changed_is_named(whole, tmp_path, spoil, named):
    folder = shutil.copytree(whole, tmp_path / "policy")
    spoil(folder)
    with pytest.raises(CheckpointError, match=named) as refused:
        load_vla(folder)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: cut(f / "adapter" / "adapter_model.safetensors"), r"adapter_model\.safetensors: expected a whole file"),
        (lambda f: (f / "adapter" / "adapter_model.safetensors").unlink(), r"expected weights in adapter_model\.safetensors"),
        (lambda f: (f / "adapter" / "adapter_config.json").unlink(), r"expected adapter_config\.json as JSON"),
        (config(lambda c: c["base_model"].pop("finetuning")), r"policy: .*KeyError: 'finetuning'"),
        (config(lambda c: c["base_model"].update(name="no/such/model")), r"no folder no/such/model; and no such name on the Hub"),
    ],
)
def test_what_is_missing_of_adapters_is_named(toy_vlm, toy_stats, tmp_path, spoil, named):
    folder = tmp_path / "policy"
    perturbed_policy(toy_vlm, toy_stats, "lora")[0].save_pretrained(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=named):
        load_vla(folder)


@pytest.mark.parametrize("load", [load_vla, VLA.from_pretrained, load_policy], ids=["load_vla", "from_pretrained", "load_policy"])
def test_a_folder_that_does_not_exist_is_named(load):
    with pytest.raises(CheckpointError, match=r"no folder no/such/folder; and no such name on the Hub"):
        load("no/such/folder")


# -- precision, hashes, card -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("auto", torch.bfloat16)])
def test_frozen_weights_keep_the_given_precision(toy_vlm, toy_stats, tmp_path, monkeypatch, precision, dtype):
    """On a machine that is fastest in bfloat16, when the policy is made and when it is loaded."""
    monkeypatch.setattr("rvlm.vlm.quantization.precision", lambda: torch.bfloat16)
    model, _ = make_policy(toy_vlm, SPEC, toy_stats, finetuning="lora", lora_rank=2, precision=precision, **ONE_STEP)
    model.save_pretrained(tmp_path / "policy")
    for policy in (model, load_vla(tmp_path / "policy")[0]):
        still = {name: w for name, w in policy.backbone.named_parameters() if "lora" not in name and "trainable" not in name}
        assert {weight.dtype for weight in still.values()} == {dtype}
    with pytest.raises(ValueError, match="no precision 'fp8'; there are auto, fp32, bf16, fp16"):
        make_policy(toy_vlm, SPEC, toy_stats, finetuning="lora", precision="fp8")


def test_a_stage_keeps_frozen_weights_in_its_precision(toy_vlm, toy_demos, tmp_path, monkeypatch):
    monkeypatch.setattr("rvlm.vlm.quantization.precision", lambda: torch.bfloat16)
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))
    how = {"finetuning": "lora", "precision": "fp32", "policy": ONE_STEP, "batch_size": 8, "n_processes": 1}
    model, *_ = STAGE_BUILDERS[ROBOT](Stage("full precision", ROBOT, (str(toy_demos),), str(toy_vlm), 8, **how))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_the_hash_of_weights_is_of_what_they_hold(toy_vlm, tmp_path):
    whole = load_file(toy_vlm / "model.safetensors")
    names = sorted(whole)
    for i, part in enumerate((names[:3], names[3:])):
        tmp_path.joinpath("cut").mkdir(exist_ok=True)
        save_file({name: whole[name] for name in part}, tmp_path / "cut" / f"model-{i}.safetensors", {"note": "another file"})
    weight_map = {name: f"model-{int(i >= 3)}.safetensors" for i, name in enumerate(names)}
    (tmp_path / "cut" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert tensors_hash(tmp_path / "cut") == tensors_hash(toy_vlm)
    (tmp_path / "other").mkdir()
    first(whole, lambda value: value + 1e-3)
    save_file(whole, tmp_path / "other" / "model.safetensors")
    assert tensors_hash(tmp_path / "other") != tensors_hash(toy_vlm)


def test_the_model_card_states_what_the_numbers_mean(kept, toy_stats):
    folder, _ = kept
    text = (folder / "README.md").read_text()
    for name, unit in zip(SPEC.names, SPEC.units, strict=True):
        assert f"| {name} | {unit} | -1 to 1 |" in text
    for name, unit in zip(SPEC.state_names, SPEC.state_units, strict=True):
        assert f"| {name} | {unit} | " in text
    assert f"{toy_stats['action'].count} training frames of {SPEC.robot}" in text
    assert "at 10 Hz" in text and "gripper, 1 open, -1 closed" in text and "Not measured when this card was written" in text
    assert "Vision-language model: vlm, revision none, a folder" in text and f"torch {torch.__version__}" in text
    card = model_card(load_vla(folder)[0], {"simple": wilson(84, 100)}, "apache-2.0", ["It has never met a real robot."])
    assert "| simple | 84/100 | 84% | " in card and "license: apache-2.0" in card and "- It has never met a real robot." in card
