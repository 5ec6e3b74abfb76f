"""One process of a stage: every setting has an effect, losses are logged as means, memory savers change no result."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_data import TEXTS, toy_frames
from toy_policies import EXPERT, a_batch, build
from toy_stages import ONE_STEP, few, toy_stage, trained
from transformers import TrainingArguments

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.data.sampling import FixedBudgetDataset
from rvlm.data.windows import EpisodeWriter
from rvlm.policy.factory import merge_policy
from rvlm.training.learning_rates import step_decay
from rvlm.training.stage_data import STAGE_BUILDERS
from rvlm.training.stages import ROBOT, VISION_LANGUAGE, Stage
from rvlm.training.trainer import (
    JsonlLogger,
    StageTrainer,
    freeze_unreached,
    log_history,
    train_stage_in_process,
    training_arguments,
    training_seconds,
)
from rvlm.training.weight_averaging import AVERAGE, EMACallback
from rvlm.vlm.backbones import SMALL_VLM
from rvlm.vlm.processors import load_processor
from rvlm.vlm.question_answering import VQACollator
from rvlm.vlm.tiny import tiny_vlm


def moved(weights, others):
    return max(float((weights[k] - others[k]).abs().max()) for k in weights)


def distance(weights, others):
    return sum(float(((weights[k] - others[k]) ** 2).sum()) for k in weights) ** 0.5


# -- settings ----------------------------------------------------------------------------------------------------------
def test_an_unknown_field_is_an_error(stage):
    with pytest.raises(TypeError, match="learning_rte"):
        dataclasses.replace(stage, learning_rte=1e-3)
    with pytest.raises(TypeError, match=r"stage 'toy': 'policy' has unknown settings \['chunksize'\]; there are .*chunk_size"):
        dataclasses.replace(stage, policy={"chunksize": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "robots"}, "no kind 'robots'; there are .*robot"),
        ({"data": ()}, "at least one folder in 'data'"),
        ({"learning_rate": float("nan")}, "expected 'learning_rate' as a finite number from 0 to"),
        ({"warmup_ratio": 3}, "expected 'warmup_ratio' as a finite number from 0 to 1, got 3"),
        ({"ema_decay": 1.0}, "expected 'ema_decay' as a finite number from 0 to"),
        ({"backbone_learning_rate": -1}, "expected 'backbone_learning_rate' as a finite number from 0 to"),
        ({"backbone_learning_rate": 1e-4, "finetuning": "head"}, "is for a backbone that is trained, not for finetuning='head'"),
        ({"lora_rank": 0}, "expected 'lora_rank' as an integer from 1 on, got 0"),
        ({"shots": -1}, "expected 'shots' as an integer from 0 on, got -1"),
        ({"batch_size": 0}, "expected 'batch_size' as an integer from 1 on"),
        ({"n_processes": 0}, "expected 'n_processes' as an integer from 1 on"),
        ({"n_loader_workers": -1}, "expected 'n_loader_workers' as an integer from 0 on, got -1"),
        ({"data_weights": (1.0, 1.0)}, "expected 'data_weights' above 0, one for each of 1 folders"),
        ({"data_weights": (float("nan"),)}, "expected 'data_weights' above 0"),
        ({"n_samples": 7}, "expected n_samples of at least one batch of 8; got 7"),
        ({"n_processes": 3}, r"a batch_size that 3 processes can share evenly, each in 1 part\(s\); got 8"),
        ({"kind": VISION_LANGUAGE}, "'policy' is read by 'robot' stages only"),
        (
            {"kind": VISION_LANGUAGE, "policy": {}, "attn_implementation": "sdpa"},
            "'attn_implementation' is read by 'robot' stages",
        ),
        ({"kind": VISION_LANGUAGE, "policy": {}, "finetuning": "head"}, "'finetuning' is read by 'robot' stages only"),
        ({"finetuning": "loraa"}, "no finetuning 'loraa'; there are full, head, lora, dora, qlora"),
        ({"precision": "int3"}, "no precision 'int3'; there are auto, fp32"),
        ({"optimizer": "adam9"}, "no optimizer 'adam9'; there are .*adamw_torch"),
        ({"lr_scheduler_type": "cosin"}, "no lr_scheduler_type 'cosin'; there are cosine, .*step_decay"),
        ({"lora_rank": 4}, "'lora_rank' is for adapters only, not for finetuning='full'"),
        ({"gradient_accumulation_steps": 3}, r"each in 3 part\(s\); got 8"),
        ({"augment": {"flip": 1}}, r"no augmentation 'flip'; there are shift, crop, color \(images are never mirrored"),
        ({"augment": {"crop": 0.9}}, "expected crop as a fraction from 0 to 0.5; got 0.9"),
        ({"augment": {"shift": 2.5}}, "expected shift as whole pixels from 0 to 16; got 2.5"),
        ({"data": "demos"}, r"expected .data. as a tuple, got .demos.; write \(.demos.,\)"),
        ({"augment": {"shift": 2}, "freeze_vision": True}, "expected no augmentation with freeze_vision=True"),
    ],
)
def test_settings_without_effect_are_refused(stage, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(stage, **changes)


def test_the_folder_is_named_by_what_makes_the_result(stage):
    for changes in ({"n_processes": 2}, {"augment": {"shift": 0}}, {"n_loader_workers": 2}):
        assert dataclasses.replace(stage, **changes).folder == stage.folder
    for changes in ({"seed": 1}, {"learning_rate": 2e-3}, {"augment": {"shift": 2}}, {"policy": {**ONE_STEP, "chunk_size": 4}}):
        assert dataclasses.replace(stage, **changes).folder != stage.folder


def test_a_retrained_initial_model_is_another_one(stage, tmp_path):
    shutil.copytree(stage.init, tmp_path / "vlm")
    copied = dataclasses.replace(stage, init=str(tmp_path / "vlm"))
    assert copied.folder == stage.folder, "the same weights elsewhere"
    weights = tmp_path / "vlm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert copied.folder != stage.folder


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": 1e-9}, {"learning_rate": 1e-5}, {"weight_decay": 50.0}, {"warmup_ratio": 1.0},
        {"lr_scheduler_type": "constant"},
        {"augment": {"shift": 2}}, {"augment": {"crop": 0.1}}, {"augment": {"color": 0.1}}, {"seed": 1},
        {"is_pretrained": False}, {"freeze_vision": True},
        {"finetuning": "head"}, {"finetuning": "lora"}, {"finetuning": "dora"}, {"finetuning": "qlora"},
        {"finetuning": "lora", "lora_rank": 2}, {"backbone_learning_rate": 1e-5}, {"ema_decay": 0.5},
        {"optimizer": "sgd"}, {"precision": "bf16"},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_every_setting_has_an_effect(stage, changes, tmp_path, plain_weights):
    assert moved(trained(few(stage, **changes), tmp_path / "changed"), plain_weights) > 1e-7


def test_loader_workers_change_no_weight(stage, tmp_path, plain_weights):
    """They read and collate the same samples, in the order of the budget."""
    with_workers = trained(few(stage, n_loader_workers=2), tmp_path)
    assert moved(with_workers, plain_weights) == 0
    augmented = few(stage, augment={"shift": 2}, batch_size=4)
    one, two = (trained(dataclasses.replace(augmented, n_loader_workers=n), tmp_path / str(n)) for n in (0, 2))
    assert moved(one, two) == 0 < moved(one, plain_weights)


@pytest.fixture(scope="module")
def plain_weights(toy_vlm, toy_demos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RVLM_HOME", str(folder / "home"))
        return trained(toy_stage(toy_vlm, toy_demos, 3), folder)


def test_frozen_weights_do_not_change_and_all_others_do(stage, tmp_path):
    before = load_file(Path(stage.init) / "model.safetensors")
    for frozen, still in (({"freeze_vision": True}, "vision_model"), ({"finetuning": "head"}, "model")):
        train_stage_in_process(few(stage, **frozen), tmp_path / still)
        after = merge_policy(tmp_path / still / "model")[0].state_dict()
        kept = {name for name, value in before.items() if torch.equal(value, after[f"backbone.{name}"])}
        assert {name for name in before if still in name} <= kept
        assert (kept == set(before)) == (still == "model")


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics"])
def test_a_family_that_is_given_more_than_pixels_trains_with_a_frozen_tower(stage, tmp_path, family):
    """Its features are not cached, for they depend on more than the pixels; the tower is frozen all the same."""
    frozen = few(stage, init=tiny_vlm(family), freeze_vision=True)
    after, before = trained(frozen, tmp_path), load_file(Path(frozen.init) / "model.safetensors")
    towers = {name for name in before if "visual." in name or "vision_model." in name}
    learned = {name for name in before if not torch.equal(before[name], after[f"backbone.{name}"])}
    assert towers and learned and not towers & learned and not list((tmp_path / "home").glob("features/*/*.npy"))
    with pytest.raises(ValueError, match="expected a family whose only vision input is pixel_values, got that of"):
        VQACollator(load_processor(frozen.init))


def test_features_of_a_random_tower_are_not_those_of_the_trained_one(stage, tmp_path):
    """Each tower's features have their own folder, in either order."""
    few_frozen = few(stage, freeze_vision=True)
    for name, changes in (("a", {}), ("b", {"is_pretrained": False}), ("c", {"is_pretrained": False, "seed": 1})):
        trained(dataclasses.replace(few_frozen, **changes), tmp_path / name)
    kept = [np.load(path) for path in (tmp_path / "home").glob("features/*/features.npy")]
    assert len(kept) == 3 * 2 and len({features.tobytes() for features in kept}) == 6, "of three towers and two cameras"


def test_a_step_decay_warms_up_and_falls_twice(stage, tmp_path):
    """In the learning rates of the optimizer, and across an interruption."""
    decayed = few(stage, n_steps=40, lr_scheduler_type="step_decay", warmup_ratio=0.1)
    expected = [0, 0.25, 0.5, 0.75, *[1] * 16, *[0.1] * 10, *[0.01] * 10]
    assert rates_of(n_warmup=4, n_steps=40) == pytest.approx(expected)
    for _ in range(2):  # the second time from the checkpoint in the middle
        train_stage_in_process(decayed, tmp_path)
        rates = [entry["learning_rate"] / stage.learning_rate for entry in log_history(tmp_path) if "learning_rate" in entry]
        assert rates == pytest.approx(expected)
        shutil.rmtree(tmp_path / "trainer" / "checkpoint-40")


def rates_of(n_warmup, n_steps, resume_at=None):
    """Of `step_decay`, relative to the full learning rate; from `resume_at` on in a scheduler that loads the saved state."""
    rates, saved = [], None
    for start, end in ((0, resume_at or n_steps), (resume_at or n_steps, n_steps)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        scheduler = step_decay(optimizer, n_warmup, n_steps)
        if saved:
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        for _ in range(start, end):
            rates.append(optimizer.param_groups[0]["lr"] / 1e-3)
            optimizer.step()
            scheduler.step()
        saved = optimizer.state_dict(), scheduler.state_dict()
    return rates


@pytest.mark.parametrize(("n_warmup", "n_steps"), [(0, 7), (1, 3), (4, 40), (20, 40), (36, 41), (40, 40)])
def test_step_decay_follows_its_formula_and_resumes_anywhere(n_warmup, n_steps):
    """Also without a warm-up, and where it is longer than half of the steps; within rounding."""
    formula = [i / n_warmup if i < n_warmup else 0.1 ** ((i >= n_steps / 2) + (i >= 3 * n_steps / 4)) for i in range(n_steps)]
    whole = rates_of(n_warmup, n_steps)
    assert whole == pytest.approx(formula, rel=1e-14)
    assert all(rates_of(n_warmup, n_steps, resume_at) == whole for resume_at in range(1, n_steps))


def test_a_diverging_training_is_an_error(stage, tmp_path):
    """transformers would log a loss of 0, and a policy of NaN weights would be saved."""
    with pytest.raises(FloatingPointError, match="'toy': its weights are NaN or infinite; use a smaller learning_rate"):
        train_stage_in_process(
            few(stage, n_steps=40, learning_rate=1e30, lr_scheduler_type="constant", warmup_ratio=0.0), tmp_path
        )
    assert not (tmp_path / "model").exists() and not np.isfinite(log_history(tmp_path)[-2]["loss"])


def test_clipping_bounds_what_one_step_can_do(stage, tmp_path, toy_vlm, toy_demos):
    """With plain gradient descent a clipped step has the length of the clip."""
    options = {"max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant"}
    for clip in (1e-3, 1e-2):
        before, after = a_step(stage, tmp_path / str(clip), max_grad_norm=clip, per_device_train_batch_size=8, **options)
        length = sum(float(((after[k] - before[k]) ** 2).sum()) for k in before) ** 0.5
        assert length == pytest.approx(clip, rel=0.05)


def test_accumulated_batches_equal_one_large_batch(stage, tmp_path):
    """For windows without masks: two halves of eight make the step of eight."""
    options = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    _, whole = a_step(stage, tmp_path / "whole", per_device_train_batch_size=8, **options)
    _, halves = a_step(stage, tmp_path / "halves", per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    _, half = a_step(stage, tmp_path / "half", per_device_train_batch_size=4, **options)
    assert moved(whole, halves) < 1e-4 < moved(whole, half)


def a_step(stage, folder, **options):
    """Weights before and after training with options of the Trainer, on one fixed order of full windows."""
    torch.manual_seed(0)
    model, _, data, collate = STAGE_BUILDERS[ROBOT](stage)
    full = [sample for i in range(60) if (sample := data[i])["action_mask"].all()][:8]
    common = {"use_cpu": True, "remove_unused_columns": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(str(folder), train_sampling_strategy="sequential", **common, **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    StageTrainer(model, args, train_dataset=full, data_collator=collate).train()
    return before, model.state_dict()


def test_the_stage_is_handed_to_the_trainer_whole(stage, tmp_path):
    args = training_arguments(dataclasses.replace(stage, warmup_ratio=0.5), tmp_path, world_size=1)
    assert args.max_steps == 46 and args.warmup_steps == 23 and args.per_device_train_batch_size == 8
    assert args.max_grad_norm == stage.max_grad_norm and args.weight_decay == stage.weight_decay


def test_loss_falls_on_one_batch(stage, tmp_path, monkeypatch):
    one = dataclasses.replace(stage, n_samples=8 * 60, learning_rate=3e-3, lr_scheduler_type="constant")
    monkeypatch.setattr(FixedBudgetDataset, "index_at", lambda self, position: position % 8)
    train_stage_in_process(one, tmp_path)
    logged = [entry["loss"] for entry in log_history(tmp_path) if "loss" in entry]
    assert np.mean(logged[-5:]) < 0.3 * logged[0]
    assert {"arm_loss", "gripper_loss", "grad_norm", "learning_rate"} <= log_history(tmp_path)[0].keys()


def test_the_log_holds_the_mean_of_each_part_of_the_loss(stage, tmp_path):
    """Over the steps since the last entry and the parts of each batch, so that they add up to the loss."""
    model, _, data, collate = STAGE_BUILDERS[ROBOT](stage)
    common = {"use_cpu": True, "remove_unused_columns": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    steps = {"max_steps": 6, "logging_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = StageTrainer(model, TrainingArguments(str(tmp_path), **common, **steps), train_dataset=data, data_collator=collate)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [3, 6]
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["arm_loss"] + model.head.gripper_weight * entry["gripper_loss"], abs=1e-6)


# -- memory savers, each by its effect ------------------------------------------------------------------------------------
def kept_bytes(model, batch):
    """Bytes that one forward pass saves for the backward pass, without weights, and the gradients."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(**batch).loss
    loss.backward()
    return sum(kept.values()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("head", "most"), [({}, 0.7), ({**EXPERT, "vlm_layers": [0, -1]}, 0.9)], ids=["mlp", "expert"])
def test_gradient_checkpointing_saves_less_and_gives_the_same_gradients(toy_vlm, toy_stats, head, most):
    """An action expert's own activations are kept."""
    model, processor = build(toy_vlm, toy_stats, {**ONE_STEP, **head})
    batch, costs = a_batch(model, processor), []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # of flow matching's noise
        costs.append(kept_bytes(model, batch))
    (whole, gradients), (less, again) = costs
    assert less < most * whole
    assert gradients.keys() == again.keys() and all(torch.allclose(gradients[k], again[k], atol=1e-6) for k in gradients)


def test_a_checkpointed_or_accumulated_stage_ends_where_the_plain_one_does(stage, tmp_path, plain_weights):
    """Accumulated windows with masks are weighted by their part of the batch, so there they agree less."""
    checkpointed = trained(few(stage, gradient_checkpointing=True), tmp_path / "checkpointed")
    assert moved(checkpointed, plain_weights) < 1e-6
    short = few(stage, policy={**ONE_STEP, "chunk_size": 1})
    whole, parts = (
        trained(short, tmp_path / "whole"),
        trained(dataclasses.replace(short, gradient_accumulation_steps=4), tmp_path / "parts"),
    )
    assert distance(whole, parts) < 0.05 * distance(whole, plain_start(short, tmp_path))
    assert dataclasses.replace(short, gradient_accumulation_steps=4, gradient_checkpointing=True).folder == short.folder


def plain_start(stage, tmp_path):
    return trained(dataclasses.replace(stage, learning_rate=0.0), tmp_path / "start")


def test_half_precision_keeps_trained_weights_in_32_bits(stage, tmp_path, toy_vlm, toy_stats):
    seen = set()
    model, _, data, collate = STAGE_BUILDERS[ROBOT](stage)
    layer = model.backbone.model.get_decoder().layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    args = training_arguments(few(stage, precision="bf16"), tmp_path, 1)
    StageTrainer(model, args, train_dataset=data, data_collator=collate).train()
    assert seen == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["detection", "vision_language", "robot"])
def test_data_parallel_processes_wait_for_no_weight(stages, llava, toy_demos, kind, tmp_path):
    """What is trained after `freeze_unreached` is what gets a gradient, no less and no more."""
    robot = Stage("toy", ROBOT, (str(toy_demos),), str(llava), 8, policy=ONE_STEP, batch_size=8, n_processes=1)
    stage = few({**stages, "robot": robot}[kind], 1)
    model, _, data, collate = STAGE_BUILDERS[stage.kind](stage)
    trainer = StageTrainer(model, training_arguments(stage, tmp_path, 1))
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    freeze_unreached(trainer, collate([data[0]]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in before)
    trainer.compute_loss(model, collate([data[0]])).backward()
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert kind != "robot" or any("vision_tower" in name for name in before - trained)


def test_float16_without_a_gpu_is_refused(stage, tmp_path):
    """The library would train in float32 without a word."""
    with pytest.raises(ValueError, match=r"stage 'toy': expected a GPU for precision='fp16', got a CPU; .*'fp32' or 'bf16'"):
        training_arguments(few(stage, precision="fp16"), tmp_path, 1)


def test_an_8_bit_optimizer_has_a_smaller_state(stage, tmp_path):
    """On the shipped model's shapes; bitsandbytes keeps tensors of fewer than 4,096 elements in 32 bits."""
    sizes = {}
    for name in ("adamw_torch", "adamw_8bit"):
        shipped = few(stage, 2, init=str(SMALL_VLM), optimizer=name, batch_size=2)
        train_stage_in_process(shipped, tmp_path / name)
        kept = torch.load(next((tmp_path / name / "trainer").glob("*/optimizer.pt")), weights_only=True)
        tensors = [v for entry in kept["state"].values() for v in entry.values() if isinstance(v, torch.Tensor)]
        sizes[name] = sum(v.numel() * v.element_size() for v in tensors)
    assert sizes["adamw_8bit"] < 0.35 * sizes["adamw_torch"]


def test_a_stage_with_adapters_and_an_average_resumes(stage, tmp_path):
    """Adapters are saved in a separate file, which the Trainer alone would ignore, and so is the average of the weights."""
    adapted = few(stage, 40, finetuning="lora", lora_rank=2, ema_decay=0.9, backbone_learning_rate=1e-4)
    train_stage_in_process(adapted, tmp_path / "uninterrupted")
    shutil.copytree(tmp_path / "uninterrupted" / "trainer" / "checkpoint-20", tmp_path / "resumed" / "trainer" / "checkpoint-20")
    train_stage_in_process(adapted, tmp_path / "resumed")
    weights = []
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        uninterrupted, resumed = (load_file(tmp_path / name / "model" / file) for name in ("uninterrupted", "resumed"))
        assert all(torch.equal(resumed[k], uninterrupted[k]) for k in uninterrupted)
        weights += uninterrupted.values()
    average = load_file(tmp_path / "uninterrupted" / "trainer" / "checkpoint-40" / AVERAGE)
    assert average.pop("n_averaged") == 40
    missing = {k for k, value in average.items() if not any(torch.equal(value, saved) for saved in weights)}
    assert not missing, "the average is saved, not the weights of the last step"


def test_the_average_is_exponential_and_holds_the_trained_weights_only(tmp_path):
    """Also where it goes on from a checkpoint; its decay grows, so that a short training does not stay at its first weights."""
    model, rng = torch.nn.Linear(2, 1), torch.Generator().manual_seed(0)
    model.bias.requires_grad_(False)
    args, state = SimpleNamespace(should_save=True, output_dir=tmp_path), SimpleNamespace(global_step=2)
    (tmp_path / "checkpoint-2").mkdir()
    callback, expected = EMACallback(0.75, None), None
    callback.on_train_begin(args, state, None, model=model)
    for step in range(40):
        weights = torch.randn(1, 2, generator=rng)
        model.weight.data = weights.clone()
        callback.on_step_end(args, state, None)
        decay = min(0.75, (1 + step) / (10 + step))
        expected = weights if expected is None else decay * expected + (1 - decay) * weights
        if step == 1:
            callback.on_save(args, state, None)
            callback = EMACallback(0.75, str(tmp_path / "checkpoint-2"))
            callback.on_train_begin(args, state, None, model=model)
    saved = load_file(tmp_path / "checkpoint-2" / AVERAGE)
    assert sum(value.numel() for value in saved.values()) == 2 + 1  # weights, and the number of updates
    callback.copy_to_model()
    torch.testing.assert_close(model.weight.data, expected)


def test_the_backbone_has_a_learning_rate_of_its_own(stage, tmp_path):
    """With none it stays where it was, and the head learns as before."""
    still, halted = (few(stage, **{name: 0.0}) for name in ("learning_rate", "backbone_learning_rate"))
    before, after = trained(still, tmp_path / "still"), trained(halted, tmp_path / "halted")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head", "state_projector"}


# -- the log ----------------------------------------------------------------------------------------------------------


def test_a_truncated_log_is_read(tmp_path):
    lines = [{"step": s, "loss": 1.0} for s in (1, 2, 3)] + [{"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.4}]
    lines.append({"step": 3, "train_runtime": 1.0})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "lo')
    assert log_history(tmp_path) == [lines[0], *lines[3:]]
    an_entry(JsonlLogger(tmp_path), 4)
    assert [entry["step"] for entry in log_history(tmp_path)] == [1, 2, 3, 3, 4], "what follows it counts"
    assert log_history(tmp_path / "none") == []


def an_entry(log, step):
    log.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=10), None, {"loss": 0.9})


def test_seconds_count_on_after_a_kill(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 8, "loss": 1.0, "seconds": 40.0}\n')
    log = JsonlLogger(tmp_path)
    log.started -= 2.0
    an_entry(log, 9)
    assert 42.0 <= training_seconds(tmp_path) < 60.0 and training_seconds(tmp_path / "none") == 0.0


# -- going on with a policy --------------------------------------------------------------------------------------------
def test_a_further_stage_keeps_the_policys_settings_and_statistics(stage, tmp_path):
    trained(few(stage), tmp_path / "first")
    onwards = few(stage, init=str(tmp_path / "first" / "model"))
    before, after = (json.loads((trained_config(s, tmp_path / n)).read_text()) for s, n in ((onwards, "a"), (few(stage), "b")))
    assert before["stats"] == after["stats"]
    with pytest.raises(ValueError, match="expected is_pretrained=True, got False; leave it out, or start from a vision"):
        train_stage_in_process(dataclasses.replace(onwards, is_pretrained=False), tmp_path / "d")


def test_a_history_is_added_to_a_policy_and_shared_weights_are_kept(stage, tmp_path):
    """With learning rate 0 all shared weights are those of the first policy; the history is new."""
    trained(few(stage), tmp_path / "first")
    folder = tmp_path / "first" / "model"
    memory = {"structure": "policy_head", "history": "lstm", "n_obs_steps": 2}
    before = load_file(folder / "model.safetensors")
    after = trained(few(stage, init=str(folder), policy=memory, learning_rate=0.0), tmp_path / "second")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name.split(".")[0] for name in set(after) - set(before)} == {"history"}


def trained_config(stage, folder):
    train_stage_in_process(stage, folder)
    return folder / "model" / "config.json"


def test_a_policy_is_refused_on_demonstrations_of_another_robot(stage, tmp_path):
    trained(few(stage), tmp_path / "first")
    spec = ActionSpec.from_card("tabletop_ur6")
    writer = EpisodeWriter(tmp_path / "ur6", spec)
    for seed in range(10):
        writer.add_episode(toy_frames(spec, 5, seed), TEXTS[0])
    other = few(stage, init=str(tmp_path / "first" / "model"), data=(str(writer.finalize()),))
    with pytest.raises(SpecMismatch, match=r"policy vs demonstrations.*group 1 open"):
        train_stage_in_process(other, tmp_path / "second")
