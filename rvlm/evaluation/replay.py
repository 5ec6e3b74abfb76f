"""Run an evaluated episode again, to see it."""

import functools
from pathlib import Path

from rvlm.evaluation.closed_loop import EPISODES_PER_BATCH, Evaluation, run_batch, single_thread


def replay_episode(evaluation: Evaluation, seed: int) -> dict:
    """Run an evaluated episode again, in the same batch as before, and keep its frames.

    Returns:
        Its row of `rollout`, with `frames`, camera -> (n, h, w, 3) uint8, and raw `actions` (n, a).

    Raises:
        ValueError: The evaluation has no such episode.
    """
    index = seed - evaluation.first_seed
    if not 0 <= index < evaluation.n_episodes:
        last = evaluation.first_seed + evaluation.n_episodes - 1
        raise ValueError(f"this evaluation has episodes with seeds {evaluation.first_seed} to {last}; got {seed}")
    return _replay_batch(evaluation, index // EPISODES_PER_BATCH, evaluation.folder)[index % EPISODES_PER_BATCH]


@functools.lru_cache(maxsize=4)
def _replay_batch(evaluation: Evaluation, batch: int, folder: Path) -> list[dict]:
    """`folder`, which names the policy's content and the code, is part of the cache's key."""
    with single_thread():  # as in the evaluation
        return run_batch(evaluation, batch, keep_frames=True)
