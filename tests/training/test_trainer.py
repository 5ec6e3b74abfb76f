"""Stages: every setting has an effect, a budget has one order, a killed stage ends where an unbroken one does."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from toy_data import TEXTS, toy_frames
from toy_policies import a_batch, build
from transformers import TrainingArguments

from rvlm.data.actions import ActionSpec, SpecMismatch
from rvlm.data.augmentation import augment
from rvlm.data.sampling import FixedBudgetDataset
from rvlm.data.windows import EpisodeWriter
from rvlm.files import atomic_write
from rvlm.policy.checkpoints import merge_policy
from rvlm.training.launch import distributed_worker, prepare, train
from rvlm.training.stage_data import STAGE_BUILDERS
from rvlm.training.stages import ROBOT, VISION_LANGUAGE, Stage
from rvlm.training.trainer import (
    JsonlLogger,
    StageTrainer,
    arguments,
    log_history,
    step_decay,
    train_stage_in_process,
    training_seconds,
)
from rvlm.training.trainer_checkpoints import last_checkpoint, seal
from rvlm.vlm.backbones import SMALL_VLM
from rvlm.vlm.processors import load_processor
from rvlm.vlm.question_answering import VQACollator
from rvlm.vlm.tiny import tiny_vlm

ROOT = Path(__file__).parents[2]
ONE_STEP = {"structure": "one_step", "chunk_size": 3, "head_options": {"hidden": 32}}


@pytest.fixture
def stage(toy_vlm, toy_demos, tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    return Stage("toy", ROBOT, (str(toy_demos),), str(toy_vlm), 8 * 46, policy=ONE_STEP, batch_size=8, n_processes=1)


def trained(stage, folder):
    """The stage in this process; its weights."""
    train_stage_in_process(stage, folder)
    return load_file(folder / "model" / "model.safetensors")


def few(stage, n_steps=3, **changes):
    return dataclasses.replace(stage, n_samples=n_steps * stage.batch_size, **changes)


def moved(weights, others):
    return max(float((weights[k] - others[k]).abs().max()) for k in weights)


def distance(weights, others):
    return sum(float(((weights[k] - others[k]) ** 2).sum()) for k in weights) ** 0.5


# -- order and augmentation --------------------------------------------------------------------------------------------
def test_a_budget_sees_every_item_once_an_epoch_in_a_new_order():
    budget = FixedBudgetDataset(7, 20, seed=3, make=lambda i, rng: (i, rng.random()))
    order = [budget.index_at(i) for i in range(20)]
    assert len(budget) == 20
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14] and len(set(order[14:])) == 6


def test_a_sample_depends_on_its_place_alone():
    make = lambda i, rng: (i, rng.random())  # noqa: E731
    whole, again = FixedBudgetDataset(7, 20, 3, make), FixedBudgetDataset(7, 20, 3, make)
    forwards = [whole[i] for i in range(20)]
    assert [again[i] for i in reversed(range(20))] == forwards[::-1]
    assert len({value for _, value in forwards}) == 20
    assert [FixedBudgetDataset(7, 20, 4, make)[i] for i in range(20)] != forwards


VARIED = {"shift": {"shift": 3}, "crop": {"crop": 0.3}, "color": {"color": 0.2}, "all": {"shift": 3, "crop": 0.3, "color": 0.2}}


@pytest.mark.parametrize("how", VARIED.values(), ids=VARIED)
def test_augmentation_is_deterministic_and_moves_all_steps_of_a_camera_alike(how):
    images = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 2, 16, 16, 3), np.uint8), 3, axis=0)
    out = augment(images, np.random.default_rng(5), **how)
    assert out.shape == images.shape and out.dtype == np.uint8
    assert np.array_equal(out, augment(images, np.random.default_rng(5), **how))
    assert not np.array_equal(out, augment(images, np.random.default_rng(6), **how))
    assert np.array_equal(out[0], out[2]) and not np.array_equal(out, images)
    assert augment(images, np.random.default_rng(5)) is images


def test_augmentation_shifts_each_camera_by_its_own():
    images = np.zeros((1, 2, 33, 33, 3), np.uint8)
    images[:, :, 16, 16] = 255
    shifts = []
    for seed in range(20):
        out = augment(images, np.random.default_rng(seed), shift=4)
        assert sorted(np.unique(out)) == [0, 255] and (out == 255).sum() == (images == 255).sum(), "pixels are moved whole"
        spots = [np.argwhere(view == 255)[0, :2] - 16 for view in out[0, ..., :1]]
        assert np.abs(spots).max() <= 4
        shifts.append(spots)
    assert np.ptp(shifts, axis=0).min() >= 4 and any(not np.array_equal(a, b) for a, b in shifts)


def test_a_crop_shows_a_part_enlarged_and_color_keeps_hues():
    rows, columns = np.indices((64, 64), np.uint8)
    ramps = np.stack([rows, columns, rows], axis=-1)[None, None]
    parts = []
    for seed in range(20):
        seen = augment(ramps, np.random.default_rng(seed), crop=0.5)[0, 0].astype(float)
        shown = np.ptp(seen[0, :, 1]), np.ptp(seen[:, 0, 0])
        assert min(shown) >= 31 and max(shown) <= 63 and abs(shown[0] - shown[1]) <= 1, "as much of each side"
        parts.append(shown[0])
        assert np.diff(seen[0, :, 1]).min() >= 0 and np.ptp(seen[..., 0], axis=1).max() == 0
        image = np.broadcast_to(np.array([180, 90, 90], np.uint8), (1, 1, 4, 4, 3))
        red, green, blue = augment(image, np.random.default_rng(seed), color=0.2)[0, 0, 0, 0].astype(int)
        assert green == blue and 0.8 * 90 - 1 <= red - green <= 1.2 * 90 + 1
    assert np.ptp(parts) > 20


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
        ({"warmup": 3}, "expected 'warmup' as a finite number from 0 to 1, got 3"),
        ({"rank": 0}, "expected 'rank' as a whole number from 1 on, got 0"),
        ({"shots": -1}, "expected 'shots' as a whole number from 0 on, got -1"),
        ({"batch_size": 0}, "expected 'batch_size' as a whole number from 1 on"),
        ({"n_processes": 0}, "expected 'n_processes' as a whole number from 1 on"),
        ({"weights": (1.0, 1.0)}, "expected 'weights' above 0, one for each of 1 folders"),
        ({"weights": (float("nan"),)}, "expected 'weights' above 0"),
        ({"n_samples": 7}, "expected n_samples of at least one batch of 8; got 7"),
        ({"n_processes": 3}, r"a batch_size that 3 processes can share evenly, each in 1 part\(s\); got 8"),
        ({"kind": VISION_LANGUAGE}, "'policy' is read by 'robot' stages only"),
        ({"kind": VISION_LANGUAGE, "policy": {}, "finetuning": "head"}, "'finetuning' is read by 'robot' stages only"),
        ({"finetuning": "loraa"}, "no finetuning 'loraa'; there are full, head, lora, dora, qlora"),
        ({"precision": "int3"}, "no precision 'int3'; there are auto, fp32"),
        ({"optimizer": "adam9"}, "no optimizer 'adam9'; there are .*adamw_torch"),
        ({"schedule": "cosin"}, "no schedule 'cosin'; there are cosine, .*step_decay"),
        ({"rank": 4}, "'rank' is read with adapters only, not with finetuning='full'"),
        ({"gradient_accumulation_steps": 3}, r"each in 3 part\(s\); got 8"),
        ({"augment": {"flip": 1}}, r"no augmentation 'flip'; there are shift, crop, color \(images are never mirrored"),
        ({"augment": {"crop": 0.9}}, "expected crop as a share from 0 to 0.5; got 0.9"),
        ({"augment": {"shift": 2.5}}, "expected shift as whole pixels from 0 to 16; got 2.5"),
        ({"data": "demos"}, r"expected .data. as a tuple, got .demos.; write \(.demos.,\)"),
        ({"augment": {"shift": 2}, "freeze_vision": True}, "expected images as they are with freeze_vision=True"),
    ],
)
def test_settings_that_would_not_be_followed_are_refused(stage, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(stage, **changes)


def test_the_folder_is_named_by_what_makes_the_result(stage):
    for changes in ({"n_processes": 2}, {"augment": {"shift": 0}}):
        assert dataclasses.replace(stage, **changes).folder == stage.folder
    for changes in ({"seed": 1}, {"learning_rate": 2e-3}, {"augment": {"shift": 2}}, {"policy": {**ONE_STEP, "chunk_size": 4}}):
        assert dataclasses.replace(stage, **changes).folder != stage.folder


def test_a_start_that_was_made_anew_is_another_start(stage, tmp_path):
    shutil.copytree(stage.init, tmp_path / "vlm")
    copied = dataclasses.replace(stage, init=str(tmp_path / "vlm"))
    assert copied.folder == stage.folder, "the same weights elsewhere"
    weights = tmp_path / "vlm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert copied.folder != stage.folder


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": 1e-9}, {"learning_rate": 1e-5}, {"weight_decay": 50.0}, {"warmup": 1.0}, {"schedule": "constant"},
        {"augment": {"shift": 2}}, {"augment": {"crop": 0.1}}, {"augment": {"color": 0.1}}, {"seed": 1},
        {"is_pretrained": False}, {"freeze_vision": True},
        {"finetuning": "head"}, {"finetuning": "lora"}, {"finetuning": "dora"}, {"finetuning": "qlora"},
        {"finetuning": "lora", "rank": 2},
        {"optimizer": "sgd"}, {"precision": "bf16"},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_every_setting_has_an_effect(stage, changes, tmp_path, plain_weights):
    """Law 23."""
    assert moved(trained(few(stage, **changes), tmp_path / "changed"), plain_weights) > 1e-7


@pytest.fixture(scope="module")
def plain_weights(toy_vlm, toy_demos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RVLM_HOME", str(folder / "home"))
        plain = Stage("toy", ROBOT, (str(toy_demos),), str(toy_vlm), 24, policy=ONE_STEP, batch_size=8, n_processes=1)
        return trained(plain, folder)


def test_what_is_frozen_stands_still_and_the_rest_learns(stage, tmp_path):
    before = load_file(Path(stage.init) / "model.safetensors")
    for frozen, still in (({"freeze_vision": True}, "vision_model"), ({"finetuning": "head"}, "model")):
        train_stage_in_process(few(stage, **frozen), tmp_path / still)
        after = merge_policy(tmp_path / still / "model")[0].state_dict()
        kept = {name for name, value in before.items() if torch.equal(value, after[f"backbone.{name}"])}
        assert {name for name in before if still in name} <= kept
        assert (kept == set(before)) == (still == "model")


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics"])
def test_a_family_that_is_given_more_than_pixels_trains_with_a_frozen_tower(stage, tmp_path, family):
    """Its features are not kept, for they depend on more; the tower stands still all the same."""
    frozen = few(stage, init=tiny_vlm(family), freeze_vision=True)
    after, before = trained(frozen, tmp_path), load_file(Path(frozen.init) / "model.safetensors")
    towers = {name for name in before if "visual." in name or "vision_model." in name}
    learned = {name for name in before if not torch.equal(before[name], after[f"backbone.{name}"])}
    assert towers and learned and not towers & learned and not list((tmp_path / "home").glob("features/*/*.npy"))
    with pytest.raises(ValueError, match="expected a family whose only vision input is pixel_values, got that of"):
        VQACollator(load_processor(frozen.init))


def test_features_of_a_random_tower_are_not_those_of_the_trained_one(stage, tmp_path):
    """Each tower's features lie in a folder of their own, whichever is asked first."""
    few_frozen = few(stage, freeze_vision=True)
    for name, changes in (("a", {}), ("b", {"is_pretrained": False}), ("c", {"is_pretrained": False, "seed": 1})):
        trained(dataclasses.replace(few_frozen, **changes), tmp_path / name)
    kept = [np.load(path) for path in (tmp_path / "home").glob("features/*/features.npy")]
    assert len(kept) == 3 * 2 and len({features.tobytes() for features in kept}) == 6, "of three towers and two cameras"


def test_a_step_decay_warms_up_and_falls_twice(stage, tmp_path):
    """In the rates that the optimizer was given, and across a stop."""
    decayed = few(stage, n_steps=40, schedule="step_decay", warmup=0.1)
    expected = [0, 0.25, 0.5, 0.75, *[1] * 16, *[0.1] * 10, *[0.01] * 10]
    assert [step_decay(i, 4, 40) for i in range(40)] == pytest.approx(expected)
    for _ in range(2):  # the second time from the checkpoint in the middle
        train_stage_in_process(decayed, tmp_path)
        rates = [entry["learning_rate"] / stage.learning_rate for entry in log_history(tmp_path) if "learning_rate" in entry]
        assert rates == pytest.approx(expected)
        shutil.rmtree(tmp_path / "trainer" / "checkpoint-40")


def test_a_training_that_explodes_says_so(stage, tmp_path):
    """The library would log a loss of 0, and a policy of no numbers would be saved."""
    with pytest.raises(FloatingPointError, match="'toy': its weights are no numbers any more; take a smaller learning_rate"):
        train_stage_in_process(few(stage, n_steps=40, learning_rate=1e30, schedule="constant", warmup=0.0), tmp_path)
    assert not (tmp_path / "model").exists() and not np.isfinite(log_history(tmp_path)[-2]["loss"])


def test_clipping_bounds_what_one_step_can_do(stage, tmp_path, toy_vlm, toy_demos):
    """Law 23: with plain gradient descent a clipped step is as long as the clip says."""
    options = {"max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant"}
    for clip in (1e-3, 1e-2):
        before, after = a_step(stage, tmp_path / str(clip), max_grad_norm=clip, per_device_train_batch_size=8, **options)
        length = sum(float(((after[k] - before[k]) ** 2).sum()) for k in before) ** 0.5
        assert length == pytest.approx(clip, rel=0.05)


def test_accumulated_batches_equal_one_large_batch(stage, tmp_path):
    """Law 23, for windows without masks: two halves of eight make the step of eight."""
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
    args = arguments(dataclasses.replace(stage, warmup=0.5), tmp_path, world_size=1)
    assert args.max_steps == 46 and args.warmup_steps == 23 and args.per_device_train_batch_size == 8
    assert args.max_grad_norm == stage.max_grad_norm and args.weight_decay == stage.weight_decay


def test_loss_falls_on_one_batch(stage, tmp_path, monkeypatch):
    one = dataclasses.replace(stage, n_samples=8 * 60, learning_rate=3e-3, schedule="constant")
    monkeypatch.setattr(FixedBudgetDataset, "item", lambda self, i: i % 8)
    train_stage_in_process(one, tmp_path)
    logged = [entry["loss"] for entry in log_history(tmp_path) if "loss" in entry]
    assert np.mean(logged[-5:]) < 0.3 * logged[0]
    assert {"arm_loss", "gripper_loss", "grad_norm", "learning_rate"} <= log_history(tmp_path)[0].keys()


def test_the_log_holds_the_mean_of_each_part_of_the_loss(stage, tmp_path):
    """Over the steps since the last entry and the parts of each: so they add up to the loss, which is such a mean."""
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
    """Bytes that one forward pass keeps for the backward pass, weights left out, and the gradients."""
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


def test_checkpointing_keeps_less_and_gives_the_same_gradients(toy_vlm, toy_stats):
    """Law 23."""
    model, processor = build(toy_vlm, toy_stats, ONE_STEP)
    batch = a_batch(model, processor)
    whole, gradients = kept_bytes(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": False})
    less, again = kept_bytes(model, batch)
    assert less < 0.7 * whole
    assert gradients.keys() == again.keys() and all(torch.allclose(gradients[k], again[k], atol=1e-6) for k in gradients)


def test_a_checkpointed_or_accumulated_stage_ends_where_the_plain_one_does(stage, tmp_path, plain_weights):
    """Law 23; accumulated windows with masks are weighted by their part of the batch, so there they agree less."""
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


def test_half_precision_computes_in_half_and_keeps_what_learns_in_full(stage, tmp_path, toy_vlm, toy_stats):
    seen = set()
    model, _, data, collate = STAGE_BUILDERS[ROBOT](stage)
    layer = model.backbone.model.get_decoder().layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    args = arguments(few(stage, precision="bf16"), tmp_path, 1)
    StageTrainer(model, args, train_dataset=data, data_collator=collate).train()
    assert seen == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_optimizer_of_eight_bits_remembers_less(stage, tmp_path):
    """On the shipped model's shapes; bitsandbytes keeps weights of less than 4,096 numbers in full."""
    sizes = {}
    for name in ("adamw_torch", "adamw_8bit"):
        shipped = few(stage, 2, init=str(SMALL_VLM), optimizer=name, batch_size=2)
        train_stage_in_process(shipped, tmp_path / name)
        kept = torch.load(next((tmp_path / name / "trainer").glob("*/optimizer.pt")), weights_only=True)
        tensors = [v for entry in kept["state"].values() for v in entry.values() if isinstance(v, torch.Tensor)]
        sizes[name] = sum(v.numel() * v.element_size() for v in tensors)
    assert sizes["adamw_8bit"] < 0.35 * sizes["adamw_torch"]


def test_a_stage_with_adapters_goes_on_where_it_was(stage, tmp_path):
    """Adapters are saved in a file of their own, which the Trainer alone would pass over."""
    adapted = few(stage, 40, finetuning="lora", rank=2)
    train_stage_in_process(adapted, tmp_path / "unbroken")
    shutil.copytree(tmp_path / "unbroken" / "trainer" / "checkpoint-20", tmp_path / "broken" / "trainer" / "checkpoint-20")
    train_stage_in_process(adapted, tmp_path / "broken")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        unbroken, resumed = (load_file(tmp_path / name / "model" / file) for name in ("unbroken", "broken"))
        assert all(torch.equal(resumed[k], unbroken[k]) for k in unbroken)


# -- killed and gone on ------------------------------------------------------------------------------------------------
def test_a_killed_stage_ends_where_an_unbroken_one_does(stage, tmp_path):
    """SIGKILL in the middle, to the asking process and not to the trainer: it ends too, and the next run goes on."""
    stage = few(stage, 100)  # the trainer looks for its asker twice a second, so it must have seconds left
    unbroken = trained(stage, tmp_path / "unbroken")
    partial = stage.folder.with_name(stage.folder.name + ".partial")
    n_threads = torch.get_num_threads()  # sums in another order end another way
    ask = "from rvlm.training.stages import Stage; from rvlm.training.launch import train; "
    ask += f"train(Stage(**{dataclasses.asdict(stage)!r}), False, {n_threads})"
    asking = subprocess.Popen([sys.executable, "-c", ask])
    wait_for(lambda: last_checkpoint(partial / "trainer"))
    asking.send_signal(signal.SIGKILL)
    asking.wait()
    assert partial.exists() and not stage.folder.exists()
    wait_for(lambda: not trainers_of(partial))
    first = Path(last_checkpoint(partial / "trainer")).name
    model = train(stage, show_progress=False, n_threads=n_threads)
    assert model == stage.folder / "model" and not partial.exists()
    assert first in ("checkpoint-20", "checkpoint-40", "checkpoint-60", "checkpoint-80")
    resumed = load_file(model / "model.safetensors")
    assert all(torch.equal(resumed[k], unbroken[k]) for k in unbroken)
    steps = [entry["step"] for entry in log_history(stage.folder)]
    assert steps == sorted(steps) and steps[-1] == 100
    assert (stage.folder / "log.jsonl").read_text().count('"step": 3,') == 1, "it began anew instead of going on"
    assert train(stage, show_progress=False) == model, "nothing is trained twice"


def wait_for(condition, timeout_s=300):
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def trainers_of(folder):
    """Living processes that train into a folder: they were told its name, or hold its log open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is not ours
            arguments = (process / "cmdline").read_text().split("\0")
            holds = any(path.readlink() == folder / "output.txt" for path in (process / "fd").iterdir())
            found += [process.name] if holds or (str(folder) in arguments and "rvlm.training.launch" in arguments) else []
    return [pid for pid in found if int(pid) != os.getpid()]


def test_the_newest_sealed_checkpoint_is_taken(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, is_sealed in ((8, True), (20, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        if is_sealed:
            seal(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path).endswith("checkpoint-20")
    (tmp_path / "checkpoint-20" / "notes.txt").write_text("what others put there does not matter")
    assert last_checkpoint(tmp_path).endswith("checkpoint-20")


PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "whole.json")
DAMAGES = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.fixture(scope="module")
def checkpoint(toy_vlm, toy_demos, tmp_path_factory):
    """A stage of 40 steps, trained without a break, and its folder with checkpoints at 20 and 40."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RVLM_HOME", str(folder / "home"))
        forty = Stage("toy", ROBOT, (str(toy_demos),), str(toy_vlm), 320, policy=ONE_STEP, batch_size=8, n_processes=1)
        train_stage_in_process(forty, folder)
    return forty, folder


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_that_lacks_any_part_is_passed_over(checkpoint, part, damage, tmp_path):
    shutil.copytree(checkpoint[1] / "trainer", tmp_path, dirs_exist_ok=True)
    assert last_checkpoint(tmp_path).endswith("checkpoint-40")
    damage(tmp_path / "checkpoint-40" / part)
    assert last_checkpoint(tmp_path).endswith("checkpoint-20")
    damage(tmp_path / "checkpoint-20" / part)
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("whole", [(40,), (20,), ()], ids=["at the end", "half", "nothing"])
def test_a_stage_goes_on_from_what_is_whole(checkpoint, whole, tmp_path):
    """Its last checkpoint is at its end: nothing is left to do then, but to write the model."""
    stage, unbroken = checkpoint
    shutil.copytree(unbroken / "trainer", tmp_path / "trainer")
    for step in {20, 40} - set(whole):
        DAMAGES["half"](tmp_path / "trainer" / f"checkpoint-{step}" / "optimizer.pt")
    resumed, expected = trained(stage, tmp_path), load_file(unbroken / "model" / "model.safetensors")
    assert all(torch.equal(resumed[k], expected[k]) for k in expected)
    first = next((entry["step"] for entry in log_history(tmp_path)), 0)
    assert first == min(max(whole, default=0) + 1, 40), "it began elsewhere"


def test_a_log_that_was_cut_short_is_read(tmp_path):
    lines = [{"step": s, "loss": 1.0} for s in (1, 2, 3)] + [{"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.4}]
    lines.append({"step": 3, "train_runtime": 1.0})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "lo')
    assert log_history(tmp_path) == [lines[0], *lines[3:]]
    an_entry(JsonlLogger(tmp_path), 4)
    assert [entry["step"] for entry in log_history(tmp_path)] == [1, 2, 3, 3, 4], "what follows it counts"
    assert log_history(tmp_path / "none") == []


@pytest.fixture(scope="module")
def by_two(toy_vlm, toy_demos, tmp_path_factory):
    """A stage of 60 steps with nothing masked, and its folder, trained by two processes over gloo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RVLM_HOME", str(tmp_path_factory.mktemp("two")))
        how = {"policy": {**ONE_STEP, "chunk_size": 1}, "batch_size": 8, "n_processes": 2}
        sixty = Stage("toy", ROBOT, (str(toy_demos),), str(toy_vlm), 8 * 60, **how)
        return sixty, train(sixty, show_progress=False, n_threads=1).parent


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_two_processes_have_the_loss_of_one(stage, by_two, tmp_path, finetuning):
    """Half of each batch each; with nothing masked the mean of the halves' means is the mean of the whole."""
    shared, folder = by_two
    if finetuning != "full":
        shared = few(stage, 20, n_processes=2, policy=shared.policy, finetuning=finetuning)
        folder = train(shared, show_progress=False, n_threads=1).parent
    train_stage_in_process(dataclasses.replace(shared, n_processes=1), tmp_path / "one")
    for part in ("loss", "arm_loss", "gripper_loss"):
        one, two = ([e[part] for e in log_history(f) if part in e][:20] for f in (tmp_path / "one", folder))
        assert len(one) == 20 and np.allclose(one, two, atol=1e-4) and np.ptp(one) > 0.01
    assert world_and_wrapper(tmp_path / "one") == (1, "VLA")
    assert world_and_wrapper(folder) == (2, "DistributedDataParallel")


def launched(launcher, stage):
    """Start a stage's processes by hand, in a group of their own."""
    command = [sys.executable, "-m", *launcher, "-m", "rvlm.training.launch", str(prepare(stage))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


TWO = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_two_processes_by_hand_go_on_after_a_kill(by_two, tmp_path, monkeypatch):
    """The launcher and its workers are killed at the first checkpoint; launched again they end with the loss of no kill."""
    stage, unbroken = by_two
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))
    first = launched(TWO, stage)
    partial = stage.folder.with_name(stage.folder.name + ".partial")
    wait_for(lambda: last_checkpoint(partial / "trainer"))
    for pid in trainers_of(partial):
        os.kill(int(pid), signal.SIGKILL)
    first.wait()
    wait_for(lambda: not trainers_of(partial))
    assert not stage.folder.exists()
    second = launched(TWO, stage)
    assert second.wait() == 0, second.stdout.read().decode()[-2000:]
    assert world_and_wrapper(stage.folder) == (2, "DistributedDataParallel")
    assert (stage.folder / "log.jsonl").read_text().count('"step": 3,') == 1, "it began anew instead of going on"
    losses = [[e["loss"] for e in log_history(f) if "loss" in e][-1] for f in (stage.folder, unbroken)]
    assert losses[0] == losses[1]
    assert train(stage, show_progress=False) == stage.folder / "model", "what was trained by hand is found"


def test_the_shipped_configuration_is_read_by_the_launcher():
    """Accelerate's own reader knows every field, and takes it for FSDP2; it has no GPU to run on here."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "docs" / "fsdp2.yaml"))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2


def test_a_launcher_that_falls_back_to_one_process_is_refused(stage):
    """`accelerate launch` on CPUs starts one process, whatever it was told, and says nothing."""
    two = few(stage, 3, n_processes=2)
    process = launched(("accelerate.commands.launch", "--cpu", "--num_processes=2"), two)
    output = process.communicate()[0].decode()
    assert process.returncode and "expected 2 processes, got 1; start as many by torchrun" in output
    assert not two.folder.exists()


def test_weights_shared_out_over_processes_learn_alike(toy_vlm, toy_stats, tmp_path):
    """FSDP2 over gloo: half of the weights in each of two processes, the losses of one."""
    from sharded import losses_of

    model, processor = build(toy_vlm, toy_stats, {**ONE_STEP, "chunk_size": 1})
    model.save_pretrained(tmp_path / "policy", processor)
    batch = a_batch(model, processor, b=8, texts=TEXTS[:1])
    torch.save(batch, tmp_path / "batch.pt")
    script = Path(__file__).with_name("sharded.py")
    arguments = [str(script), str(tmp_path / "policy"), str(tmp_path / "batch.pt"), str(tmp_path / "result.json")]
    done = subprocess.run([sys.executable, "-m", *TWO, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["world"] == 2 and result["is_sharded"] and 0.4 < result["share"] < 0.6
    assert np.allclose(result["losses"], losses_of(model, batch).numpy(), atol=1e-4) and np.ptp(result["losses"]) > 0.01


def world_and_wrapper(folder):
    """World size and wrapper that the first entry of a log names."""
    entry = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    return entry["n_processes"], entry["wrapper"]


def test_two_who_ask_for_one_stage_at_once_get_one_training(stage, monkeypatch):
    """A lock's file that a killed process has left is in nobody's way; who asks keeps the environment that they had."""
    short = few(stage, 6)
    short.folder.parent.mkdir(parents=True)
    short.folder.with_name(f"{short.folder.name}.lock").touch()
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environment = dict(os.environ)
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(lambda _: train(short, show_progress=False, n_threads=1), range(2)))
    assert not list(short.folder.rglob("checkpoint-*")), "what is finished needs nothing to go on from"
    assert models[0] == models[1] and (short.folder / "log.jsonl").read_text().count('"step": 3,') == 1
    assert dict(os.environ) == environment


def test_by_hand_nothing_is_trained_twice_nor_by_two_at_once(stage, monkeypatch):
    folder = prepare(stage)
    monkeypatch.setattr("rvlm.training.launch._stage_in", lambda _: stage)  # JSON has no tuples, which types are checked for here
    with (
        FileLock(f"{stage.folder}.lock"),
        pytest.raises(RuntimeError, match=r"'toy': another process trains it in .*toy-\w+\.partial at this moment; wait for it"),
    ):
        distributed_worker(folder)
    stage.folder.mkdir()
    distributed_worker(folder)
    assert not (folder / "log.jsonl").exists() and not list(stage.folder.iterdir())


def an_entry(log, step):
    log.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=10), None, {"loss": 0.9})


def test_seconds_count_on_after_a_kill(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 8, "loss": 1.0, "seconds": 40.0}\n')
    log = JsonlLogger(tmp_path)
    log.started -= 2.0
    an_entry(log, 9)
    assert 42.0 <= training_seconds(tmp_path) < 60.0 and training_seconds(tmp_path / "none") == 0.0


def test_a_stage_that_fails_says_why(stage, tmp_path):
    atomic_write(tmp_path / "nowhere" / "notes.txt", "no dataset")
    broken = dataclasses.replace(stage, data=(str(tmp_path / "nowhere"),))
    with pytest.raises(RuntimeError, match=r"(?s)stage 'toy' failed.*expected a LeRobot dataset with meta/info.json") as raised:
        train(broken, show_progress=False, n_threads=1)
    assert "nowhere" in str(raised.value) and not broken.folder.exists()


# -- going on with a policy --------------------------------------------------------------------------------------------
def test_a_policy_goes_on_with_its_own_settings_and_statistics(stage, tmp_path):
    trained(few(stage), tmp_path / "first")
    onwards = few(stage, init=str(tmp_path / "first" / "model"))
    before, after = (json.loads((trained_config(s, tmp_path / n)).read_text()) for s, n in ((onwards, "a"), (few(stage), "b")))
    assert before["stats"] == after["stats"]
    with pytest.raises(ValueError, match="expected is_pretrained=True, got False; leave it out, or start from a vision"):
        train_stage_in_process(dataclasses.replace(onwards, is_pretrained=False), tmp_path / "d")


def test_a_policy_is_given_a_memory_and_keeps_what_it_can(stage, tmp_path):
    """With learning rate 0 all that the two have in common is the first policy's; the memory is new."""
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
    with pytest.raises(SpecMismatch, match=r"policy vs demonstrations.*gripper_open"):
        train_stage_in_process(other, tmp_path / "second")
