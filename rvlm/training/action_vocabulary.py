"""The byte pairs of head "fast", learned from the chunks that a stage trains on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rvlm.data.windows import EpisodeDataset, Windows
from rvlm.policy.fast_tokenizer import MAX_LEARNING_CHUNKS
from rvlm.policy.token_heads import learn_vocabulary

MAX_CUT = 0.05  # share of chunks that may need more tokens than an earlier stage's longest


def learn_from_episodes(model: Any, datasets: Sequence[EpisodeDataset], train: Sequence[np.ndarray]) -> None:
    """Give a policy of head "fast" a vocabulary if it has none yet; every other policy is left as it is.

    Args:
        model: A `VLA` that knows the robots of the data.
        datasets: Demonstrations.
        train: Training episodes of each.

    Raises:
        ValueError: Its vocabulary, of an earlier stage, cuts more than `MAX_CUT` of these chunks short.
    """
    if model.config.head != "fast":
        return
    action, mask = _training_chunks(model, datasets, train)
    if model.config.action_vocabulary is None:
        learn_vocabulary(model, action, mask)
    elif (cut := 1 - model.head.fast.is_whole(model.head.encode(action, mask).numpy()).mean()) > MAX_CUT:
        raise ValueError(
            f"expected chunks of at most {model.head.fast.n_tokens} tokens, of which the policy's vocabulary was learned, "
            f"but it cuts {cut:.0%} of these short; have one learned anew, by another n_vocab in policy={{'head_options': ...}}"
        )


def _training_chunks(model: Any, datasets: Sequence[EpisodeDataset], train: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Normalised chunks (n, k, a) of all robots, and their masks."""
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
    return torch.from_numpy(np.concatenate(action)), torch.from_numpy(np.concatenate(mask))
