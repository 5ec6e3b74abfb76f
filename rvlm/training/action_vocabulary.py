"""The byte pairs of head "fast", learned from the chunks that a stage trains on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rvlm.data.windows import EpisodeDataset, Windows
from rvlm.policy.fast_tokenizer import MAX_LEARNING_CHUNKS
from rvlm.policy.token_heads import learn_vocabulary


def learn_from_episodes(model: Any, datasets: Sequence[EpisodeDataset], train: Sequence[np.ndarray]) -> None:
    """Give a policy of head "fast" a vocabulary if it has none yet; every other policy is left as it is.

    Args:
        model: A `VLA` that knows the robots of the data.
        datasets: Demonstrations.
        train: Training episodes of each.
    """
    if model.config.head != "fast" or model.config.action_vocabulary is not None:
        return
    config, action, mask = model.config, [], []
    for data, episodes in zip(datasets, train, strict=True):
        robot, nothing = model.embodiment(data.require_spec()), np.zeros((len(data.episode_of_frame), 0), np.float32)
        is_relative = config.relative_chunk is not None
        windows = Windows(
            data, 1, config.chunk_size, episodes, robot.stats, config.cameras, is_relative=is_relative, features=nothing
        )
        rows = np.arange(0, len(windows), -(-len(windows) * len(datasets) // MAX_LEARNING_CHUNKS))
        batch = windows.batch(rows)
        action.append(model.conditioning.align_action(robot, batch["action"][:, 0]))
        mask.append(model.conditioning.align_action(robot, batch["action_mask"][:, 0]))
    learn_vocabulary(model, *(torch.from_numpy(np.concatenate(parts)) for parts in (action, mask)))
