"""A tiny stage in this process, and shorter ones like it."""

import dataclasses

from safetensors.torch import load_file

from rvlm.training.trainer import train_stage_in_process

ONE_STEP = {"structure": "one_step", "chunk_size": 3, "head_options": {"hidden": 32}}


def trained(stage, folder):
    """The stage in this process; its weights."""
    train_stage_in_process(stage, folder)
    return load_file(folder / "model" / "model.safetensors")


def few(stage, n_steps=3, **changes):
    """The same stage with few steps and the given changes."""
    return dataclasses.replace(stage, n_samples=n_steps * stage.batch_size, **changes)
