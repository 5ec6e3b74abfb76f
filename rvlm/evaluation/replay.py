"""Run an episode to see it: an evaluated one again, or one with the chunks that are predicted."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from rvlm.data.observations import stack_images
from rvlm.evaluation.closed_loop import EPISODES_PER_BATCH, Evaluation, run_batch, single_thread
from rvlm.evaluation.rollouts import begin_episodes, require_same_specs


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


def record_rollout(policy: Any, env: Any, seed: int, task: str | None = None) -> dict[str, Any]:
    """One episode of one robot: observations, executed actions and the chunk predicted at every step.

    Returns:
        "images", camera -> (n, h, w, 3); per step "state" (n, s), "action" (n, a) and "chunk" (n, k, a), both raw;
        and "instruction", "seed", "is_success".

    Raises:
        SpecMismatch: As `rollout`.
    """
    require_same_specs(policy, [env])
    observation, _ = env.reset(seed=seed, options=None if task is None else {"task": task})
    begin_episodes(policy, [seed])
    images: list[dict[str, np.ndarray]] = []
    steps: list[dict[str, np.ndarray]] = []
    info, is_over = {}, False
    while not is_over:
        chunk = policy.predict_action_chunk([observation])[0]
        images.append(observation["images"])
        steps.append({"state": observation["state"], "action": chunk[0], "chunk": chunk})
        observation, _, is_terminated, is_truncated, info = env.step(chunk[0])
        is_over = is_terminated or is_truncated
    columns = {k: np.stack([step[k] for step in steps]) for k in steps[0]}
    return {
        "images": stack_images(images),
        **columns,
        "instruction": observation["instruction"],
        "seed": seed,
        "is_success": bool(info["is_success"]),
    }
