"""A tiny stage in this process, and shorter ones like it."""

import dataclasses

from safetensors.torch import load_file

from rvlm.training.stages import ROBOT, Stage
from rvlm.training.trainer import train_stage_in_process

ONE_STEP = {"structure": "one_step", "chunk_size": 3, "head_options": {"hidden": 32}}


def toy_stage(vlm, demos, n_steps):
    """A stage of `n_steps` steps of a one-step policy, in one process."""
    return Stage("toy", ROBOT, (str(demos),), str(vlm), 8 * n_steps, policy=ONE_STEP, batch_size=8, n_processes=1)


def trained(stage, folder):
    """The stage in this process; its weights."""
    train_stage_in_process(stage, folder)
    return load_file(folder / "model" / "model.safetensors")


def few(stage, n_steps=3, **changes):
    """The same stage with few steps and the given changes."""
    return dataclasses.replace(stage, n_samples=n_steps * stage.batch_size, **changes)
