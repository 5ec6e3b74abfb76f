"""What a diagnosis examines: a policy, its training data, and the environment in which it fails; or less."""

import dataclasses
import functools
from typing import Any

import numpy as np

from rvlm.data.windows import EpisodeDataset, split
from rvlm.envs.suite_checks import in_words
from rvlm.policy.policy import Policy


@dataclasses.dataclass(frozen=True)
class DiagnosisInputs:
    """A policy, the demonstrations that it was trained on, and the environment in which it fails.

    Attributes:
        policy: As `load_policy` gives it; or anything with its verbs `reset` and `select_action`, such as a client of a policy
            that is served elsewhere; or None. What only a `Policy` shows is skipped for others, and the result says so.
        dataset: With the columns `seed` and `task` per episode, so that the environment can be reset to recorded episodes;
            without them the checks that need this are skipped, and say so.
        env: A `gymnasium.Env` with an `action_spec`, as `Suite.make` gives it; or None: checks of data and policy alone.
        n_episodes: Recorded episodes to examine.
        n_frames: Of them, how many frames at most the policy predicts actions for.
        seed: Of the draw of episodes.

    Example:
        >>> policy, data = rvlm.load_policy(rvlm.recipes.POLICY), rvlm.EpisodeDataset("demonstrations")
        >>> inputs = rvlm.DiagnosisInputs(policy, data, rvlm.Tabletop(), n_episodes=3)
        >>> len(inputs.sampled_episodes())
        3
    """

    policy: Policy | Any | None
    dataset: EpisodeDataset
    env: Any = None
    n_episodes: int = 6
    n_frames: int = 200
    seed: int = 0

    @property
    def trained(self) -> Policy | None:
        """The policy, if its model can be looked into."""
        return self.policy if isinstance(self.policy, Policy) else None

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras of the policy, or of the data."""
        return tuple(self.trained.model.config.cameras) if self.trained else self.dataset.cameras

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
        """Reset the environment to a recorded episode: its first observation; None without environment, seed or task.

        Raises:
            SuiteError: The environment raises an error of its own.
        """
        row = self.dataset.episodes.iloc[episode]
        if self.env is None or "seed" not in row:
            return None
        tasks = [row["task"]] if "task" in row else getattr(getattr(self.env, "suite", None), "tasks", ())
        if len(tasks) > 1:
            return None
        options: dict[str, Any] = {"task": str(tasks[0])} if tasks else {}
        options |= {"start": int(row["start"])} if "start" in row else {}
        return self._reset(int(row["seed"]), options)

    def _reset(self, seed: int, options: dict[str, Any]) -> dict:
        asked = f"a reset with seed {seed} and options {options}"
        with in_words(f"the environment refuses {asked}", "do the data's tasks and seeds belong to it?"):
            return self.env.reset(seed=seed, options=options or None)[0]

    def step(self, action: np.ndarray) -> tuple[dict, bool, bool]:
        """One step of the environment: its observation, whether the episode is over, and whether it is a success.

        Raises:
            SuiteError: The environment raises an error of its own.
        """
        asked = f"a step with action {np.round(action, 3).tolist()}"
        with in_words(f"the environment refuses {asked}", "does it take the card's raw actions?"):
            observation, _, is_terminated, is_truncated, info = self.env.step(action)
            return observation, bool(is_terminated or is_truncated), bool(info.get("is_success", False))

    def reset_three_times(self) -> list[dict]:
        """First observations of three seeds, or of three of the environment's fixed initial states."""
        suite = getattr(self.env, "suite", None)
        if suite is None:
            return [self._reset(seed, {}) for seed in (1, 2, 3)]
        task = {"task": suite.default_tasks[0]}
        if suite.n_starts is None:
            return [self._reset(seed, task) for seed in (1, 2, 3)]
        return [self._reset(0, task | {"start": i}) for i in range(min(3, suite.n_starts))]
