"""What a diagnosis examines: a policy, its training data, and the environment in which it fails."""

import dataclasses
import functools
from typing import Any

import numpy as np

from rvlm.data.windows import EpisodeDataset, split
from rvlm.policy.policy import Policy


@dataclasses.dataclass(frozen=True)
class DiagnosisInputs:
    """A policy, the demonstrations that it was trained on, and the environment in which it fails.

    Attributes:
        policy: As `load_policy` gives it.
        dataset: With the columns `seed` and `task` per episode, so that the environment can be reset to recorded episodes;
            without them the checks that need this are skipped, and say so.
        env: A `gymnasium.Env` with an `action_spec`.
        n_episodes: Recorded episodes to examine.
        n_frames: Of them, how many frames at most the policy predicts actions for.
        seed: Of the draw of episodes.

    Example:
        >>> policy, data = rvlm.load_policy(rvlm.recipes.POLICY), rvlm.EpisodeDataset("demonstrations")
        >>> inputs = rvlm.DiagnosisInputs(policy, data, rvlm.Tabletop(), n_episodes=3)
        >>> len(inputs.sampled_episodes())
        3
    """

    policy: Policy
    dataset: EpisodeDataset
    env: Any
    n_episodes: int = 6
    n_frames: int = 200
    seed: int = 0

    def training_episodes(self) -> np.ndarray:
        """Indices of the training episodes, as `rvlm.data.windows.split` gives them."""
        return split(self.dataset)[0]

    def sampled_episodes(self) -> list[int]:
        """Indices of the `n_episodes` training episodes that are examined, drawn at random."""
        train = self.training_episodes()
        order = np.random.default_rng(self.seed).permutation(len(train))
        return [int(train[i]) for i in order[: self.n_episodes]]

    def frame_slice(self, episode: int) -> slice:
        """Rows of an episode in the dataset's columns."""
        row = self.dataset.episodes.iloc[episode]
        return slice(int(row["dataset_from_index"]), int(row["dataset_to_index"]))

    @functools.cached_property
    def _all_executed_actions(self) -> np.ndarray:
        """Raw actions (n_frames, a), read once: `action_executed` where it was recorded, else `action`."""
        is_recorded = "action_executed" in self.dataset.features
        return self.dataset.column("action_executed" if is_recorded else "action")

    def executed_actions(self, episode: int) -> np.ndarray:
        """Raw actions (n, a) that were executed in an episode."""
        return self._all_executed_actions[self.frame_slice(episode)]

    def reset_to_recorded(self, episode: int) -> dict | None:
        """Reset the environment to a recorded episode: its first observation, or None where no seed was recorded."""
        if "seed" not in self.dataset.episodes:
            return None
        row = self.dataset.episodes.iloc[episode]
        options = {"task": str(row["task"])} if "task" in row else None
        return self.env.reset(seed=int(row["seed"]), options=options)[0]
