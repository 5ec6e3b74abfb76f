"""Head "fast": its byte pairs are learned by the first stage, and kept by the next."""

import numpy as np
import pytest
import torch
from toy_policies import FAST
from toy_stages import few

from rvlm.data.windows import EpisodeDataset, Windows, split
from rvlm.policy.config import VLAConfig
from rvlm.training import action_vocabulary
from rvlm.training.stage_data import STAGE_BUILDERS
from rvlm.training.stages import ROBOT
from rvlm.training.trainer import train_stage_in_process


def test_the_first_stage_learns_the_byte_pairs_of_its_chunks_and_the_next_keeps_them(stage, tmp_path, monkeypatch):
    first = few(stage, 2, policy=FAST)
    model, *_ = STAGE_BUILDERS[ROBOT](first)
    learned = model.config.action_vocabulary
    data = EpisodeDataset(first.data[0])
    train = split(data)[0]
    windows = Windows(data, 1, model.config.chunk_size, train, model.stats)
    chunks = windows.batch(range(len(windows)))
    whole = chunks["action_mask"].all((1, 2, 3))
    ids = model.head.fast.encode(chunks["action"][whole, 0])
    assert learned["merges"] and learned["max_tokens"] == model.head.n_queries < model.head.fast.n_coefficients
    assert model.head.fast.is_whole(ids).all() and np.array_equal(model.head.out[1].bias.shape, [model.head.fast.n_vocab])

    train_stage_in_process(first, tmp_path)
    assert VLAConfig.from_pretrained(tmp_path / "model").action_vocabulary == learned
    second = few(stage, 2, init=str(tmp_path / "model"), policy=FAST)
    again, *_ = STAGE_BUILDERS[ROBOT](second)
    assert again.config.action_vocabulary == learned and again.head.fast == model.head.fast

    long = torch.rand(20, *chunks["action"].shape[2:], generator=torch.Generator().manual_seed(0)) * 2 - 1
    with monkeypatch.context() as patched:
        patched.setattr(action_vocabulary, "_training_chunks", lambda *_: (long, torch.ones_like(long, dtype=torch.bool)))
        with pytest.raises(ValueError, match=r"it cuts [1-9][0-9]*% of these short; have one learned anew, by another n_vocab"):
            STAGE_BUILDERS[ROBOT](second)
