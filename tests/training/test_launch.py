"""Processes of a stage: one or two, killed, launched by the user or twice, give the result of one uninterrupted process."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from toy_data import TEXTS
from toy_policies import a_batch, build
from toy_stages import ONE_STEP, few, trained

from rvlm.files import atomic_write
from rvlm.training.launch import _n_processes, distributed_worker, prepare, train
from rvlm.training.stages import ROBOT, Stage
from rvlm.training.trainer import log_history, train_stage_in_process
from rvlm.training.trainer_checkpoints import last_checkpoint

ROOT = Path(__file__).parents[2]


def test_a_killed_stage_gives_the_result_of_an_uninterrupted_one(stage, tmp_path):
    """SIGKILL in the middle, to the parent process and not to the trainer: the trainer ends too, and the next run resumes."""
    stage = few(stage, 100)  # the trainer checks its parent twice a second, so it must have seconds left
    uninterrupted = trained(stage, tmp_path / "uninterrupted")
    partial = stage.folder.with_name(stage.folder.name + ".partial")
    n_threads = torch.get_num_threads()  # the order of sums changes the result
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
    assert all(torch.equal(resumed[k], uninterrupted[k]) for k in uninterrupted)
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
    """Living processes that train into a folder: its path is an argument, or its log is open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is not ours
            arguments = (process / "cmdline").read_text().split("\0")
            holds = any(path.readlink() == folder / "output.txt" for path in (process / "fd").iterdir())
            found += [process.name] if holds or (str(folder) in arguments and "rvlm.training.launch" in arguments) else []
    return [pid for pid in found if int(pid) != os.getpid()]


@pytest.fixture(scope="module")
def by_two(llava, toy_demos, tmp_path_factory):
    """A stage of 60 steps with nothing masked, and its folder, trained by two processes over gloo.

    Of a family in which no gradient reaches the last layer of the vision tower.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RVLM_HOME", str(tmp_path_factory.mktemp("two")))
        how = {"policy": {**ONE_STEP, "chunk_size": 1}, "batch_size": 8, "n_processes": 2}
        sixty = Stage("toy", ROBOT, (str(toy_demos),), str(llava), 8 * 60, **how)
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
    """Launch a stage's processes by torchrun, in their own process group."""
    command = [sys.executable, "-m", *launcher, "-m", "rvlm.training.launch", str(prepare(stage))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


TWO = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_two_processes_by_torchrun_resume_after_a_kill(by_two, tmp_path, monkeypatch):
    """The launcher and its workers are killed at the first checkpoint; launched again they reach the loss without a kill."""
    stage, uninterrupted = by_two
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
    losses = [[e["loss"] for e in log_history(f) if "loss" in e][-1] for f in (stage.folder, uninterrupted)]
    assert losses[0] == losses[1]
    assert train(stage, show_progress=False) == stage.folder / "model", "the result of torchrun is found"


@pytest.mark.parametrize(("n_gpus", "n_accumulated", "expected"), [(8, 1, 6), (4, 1, 4), (5, 1, 4), (3, 2, 3), (1, 1, 1)])
def test_fewer_gpus_than_processes_share_the_batch_evenly(stage, monkeypatch, n_gpus, n_accumulated, expected):
    """Else the batch of an update would be another than the stage's."""
    stage = dataclasses.replace(stage, batch_size=24, n_samples=24, n_processes=6, gradient_accumulation_steps=n_accumulated)
    assert _n_processes(stage) == 6, "without a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    assert _n_processes(stage) == expected


def test_accelerate_reads_the_shipped_configuration():
    """Accelerate's own parser knows every field and reads FSDP2; there is no GPU to run it on."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "docs" / "fsdp2.yaml"))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2


def test_a_launcher_that_falls_back_to_one_process_is_refused(stage):
    """`accelerate launch` on CPUs silently starts one process, whatever `--num_processes` is."""
    two = few(stage, 3, n_processes=2)
    process = launched(("accelerate.commands.launch", "--cpu", "--num_processes=2"), two)
    output = process.communicate()[0].decode()
    assert process.returncode and "expected 2 processes, got 1; start as many by torchrun" in output
    assert not two.folder.exists()


def test_sharded_weights_have_the_same_losses(toy_vlm, toy_stats, tmp_path):
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
    """World size and wrapper in the first entry of a log."""
    entry = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    return entry["n_processes"], entry["wrapper"]


def test_two_simultaneous_calls_share_one_training(stage, monkeypatch):
    """The lock file of a killed process does not block; the caller's environment is unchanged."""
    short = few(stage, 6)
    short.folder.parent.mkdir(parents=True)
    short.folder.with_name(f"{short.folder.name}.lock").touch()
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environment = dict(os.environ)
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(lambda _: train(short, show_progress=False, n_threads=1), range(2)))
    assert not list(short.folder.rglob("checkpoint-*")), "a finished stage keeps no checkpoint"
    assert models[0] == models[1] and (short.folder / "log.jsonl").read_text().count('"step": 3,') == 1
    assert dict(os.environ) == environment


def test_torchrun_trains_nothing_twice_and_refuses_a_second_launch(stage, monkeypatch):
    folder = prepare(stage)
    monkeypatch.setattr("rvlm.training.launch._load_stage", lambda _: stage)  # JSON has no tuples, and types are checked here
    with (
        FileLock(f"{stage.folder}.lock"),
        pytest.raises(RuntimeError, match=r"'toy': another process is training it in .*toy-\w+\.partial; wait for it"),
    ):
        distributed_worker(folder)
    stage.folder.mkdir()
    distributed_worker(folder)
    assert not (folder / "log.jsonl").exists() and not list(stage.folder.iterdir())


def test_a_stage_that_fails_says_why(stage, tmp_path):
    atomic_write(tmp_path / "nowhere" / "notes.txt", "no dataset")
    broken = dataclasses.replace(stage, data=(str(tmp_path / "nowhere"),))
    with pytest.raises(RuntimeError, match=r"(?s)stage 'toy' failed.*expected a LeRobot dataset with meta/info.json") as raised:
        train(broken, show_progress=False, n_threads=1)
    assert "nowhere" in str(raised.value) and not broken.folder.exists()
