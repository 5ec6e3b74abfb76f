"""A training step of history and head on what a frozen backbone gave once, against one that runs the backbone.

Both steps take turns in one process: batch from the dataset, forward, backward, optimizer. Two backbones: the shipped one, and
an untrained one of its class with SmolVLM-500M's widths and two layers each. Frames are
noise; a batch has 16 windows.
"""

import os
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from bench_structures import BATCH, SPEC, STRUCTURES, TEXT, ratio

from rvlm.data.windows import EpisodeWriter
from rvlm.training import stage_data
from rvlm.training.stages import ROBOT, Stage
from rvlm.vlm.backbones import SMALL_VLM
from rvlm.vlm.small import small_vlm, train_tokenizer

N_EPISODES, LENGTH, N_ROUNDS = 4, 40, 7


def record(root):
    rng, writer = np.random.default_rng(0), EpisodeWriter(root, SPEC)
    for _ in range(N_EPISODES):
        images = {f"observation.images.{c}": rng.integers(0, 256, (LENGTH, 96, 96, 3), np.uint8) for c in SPEC.cameras}
        action = SPEC.set_grippers(rng.uniform(-1, 1, (LENGTH, 7)).astype(np.float32), rng.random((LENGTH, 1)) > 0.5)
        state = rng.normal(size=(LENGTH, 7)).astype(np.float32)
        writer.add_episode({**images, "observation.state": state, "action": action}, TEXT)
    return str(writer.finalize())


def wide_vlm(folder):
    model, processor = small_vlm(train_tokenizer([TEXT], []), width=960, vision_width=768, vision_layers=2, text_layers=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def training_step(stage):
    """A function that does the stage's next step."""
    torch.manual_seed(0)
    model, _, samples, collate = stage_data.STAGE_BUILDERS[ROBOT](stage)
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], fused=True)
    starts = iter(range(0, len(samples), stage.batch_size))

    def step():
        start = next(starts)
        batch = collate(samples.__getitems__(range(start, start + stage.batch_size)))
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"RVLM_HOME": folder}):
        data, wide = record(Path(folder) / "demos"), wide_vlm(Path(folder) / "wide")
        rows = [("shipped", str(SMALL_VLM), name) for name in STRUCTURES if name != "interleaved"]
        for backbone, vlm, name in [*rows, ("960 wide", wide, "one-step")]:
            policy = {**STRUCTURES[name], "has_state": False}
            options = {"policy": policy, "batch_size": BATCH, "finetuning": "head", "n_processes": 1}
            stage = Stage("bench", ROBOT, (data,), vlm, BATCH * 50, **options)
            once = training_step(stage)
            with mock.patch.object(stage_data, "why_at_every_step", lambda *_: "for comparison"):
                always = training_step(stage)
            ratio(f"{backbone} backbone, {name}: at every step / once", always, once, N_ROUNDS)


if __name__ == "__main__":
    main()
