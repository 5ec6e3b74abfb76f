"""What loader workers get where processes are not forked (macOS; Linux from Python 3.14 on): pickled samples and collators."""

import pickle

import pytest
import torch
from toy_stages import ONE_STEP

from rvlm.training.stage_data import STAGE_BUILDERS
from rvlm.training.stages import DETECTION, ROBOT, VISION_LANGUAGE, Stage

INTERLEAVED = {"structure": "interleaved", "n_obs_steps": 2, "chunk_size": 3, "head_options": {"hidden": 32}}
KINDS = {  # the toy model is of SmolVLM's class, whose processor is built anew where torchvision is missing
    "detection": (DETECTION, {}),
    "questions": (VISION_LANGUAGE, {}),
    "questions, frozen vision": (VISION_LANGUAGE, {"freeze_vision": True}),
    "robot": (ROBOT, {"policy": ONE_STEP, "instructions": "paraphrased", "augment": {"color": 0.1}}),
    "robot, interleaved": (ROBOT, {"policy": INTERLEAVED}),
    "robot, frozen backbone": (ROBOT, {"policy": ONE_STEP, "finetuning": "head"}),
    "robot and questions": (ROBOT, {"policy": ONE_STEP, "vqa_fraction": 0.5}),
}


@pytest.mark.parametrize("name", KINDS)
def test_pickled_samples_and_collator_make_the_same_batches(name, home, toy_vlm, toy_demos, scenes):
    kind, settings = KINDS[name]
    data = str(toy_demos) if kind == ROBOT else scenes
    settings = settings | ({"vqa_data": (scenes,)} if "vqa_fraction" in settings else {})
    stage = Stage("toy", kind, (data,), str(toy_vlm), 16, batch_size=4, **settings)
    _, _, samples, collate = STAGE_BUILDERS[kind](stage)
    sent_samples, sent_collate = pickle.loads(pickle.dumps((samples, collate)))
    for start in range(0, 16, 4):
        positions = range(start, start + 4)
        ours, theirs = collate(samples.__getitems__(positions)), sent_collate(sent_samples.__getitems__(positions))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
