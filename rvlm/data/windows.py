"""Training samples from demonstrations: windows of past observations and future actions.

The public interface to data: `EpisodeWriter` and `record_dataset` record a LeRobotDataset v3.0, `EpisodeDataset` reads one (or
a v2.1), `Windows` cuts it into samples, `split` holds out whole episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rvlm.data.actions import ActionSpec, NormStats
from rvlm.data.dataset import EpisodeDataset, EpisodeIndices, Index
from rvlm.data.errors import EpisodeError, SpecMismatch
from rvlm.data.representations import relative_actions
from rvlm.data.writer import EpisodeWriter, record_dataset

__all__ = ["EpisodeDataset", "EpisodeError", "EpisodeWriter", "Windows", "record_dataset", "split"]


def split(dataset: EpisodeDataset, fraction: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out episode indices, sorted. Whole episodes, as neighbouring frames are nearly equal.

    Each side has at least one episode.

    Example:
        >>> train, held_out = rvlm.split(rvlm.EpisodeDataset("demonstrations"))
        >>> len(train), len(held_out)
        (11, 1)
    """
    if dataset.n_episodes < 2:
        raise EpisodeError(
            f"{dataset.root}: expected at least 2 episodes, one to train on and one held out, got 1; record another"
        )
    if not 0 < fraction < 1:
        raise EpisodeError(f"expected a fraction of the episodes to hold out, above 0 and below 1, got {fraction}")
    n_held_out = min(max(round(dataset.n_episodes * fraction), 1), dataset.n_episodes - 1)
    order = np.random.default_rng(seed).permutation(dataset.n_episodes)
    return np.sort(order[n_held_out:]), np.sort(order[:n_held_out])


def check_finite_state(spec: ActionSpec, state: np.ndarray, where: str) -> None:
    """Raise `EpisodeError` with dimension and row of the first number of states ``(n, s)`` that is not finite."""
    for row, i in np.argwhere(~np.isfinite(state))[:1]:
        raise EpisodeError(
            f"{where}: expected finite numbers, got {state[row, i]} for {spec.state_names[i]!r} in row {row} "
            f"({(~np.isfinite(state)).any(1).sum()} of {len(state)} rows); drop or repair the frame"
        )


class Windows:
    """Map-style dataset with one sample per frame: t observations up to it, and k actions from each of them.

    A sample is a dict: "images" ``(t, cameras, h, w, 3)`` uint8, "state" ``(t, s)`` and "action" ``(t, k, a)`` float32
    normalised, the gripper being 1 (open) or 0; "action_mask" ``(t, k, a)`` bool, false past the episode's end, for
    padded observations, and in absent dimensions; "obs_mask" ``(t,)`` bool, false before the episode's start;
    "instruction"; "dataset_index", "episode_index", "frame_index" int64. Padding repeats the nearest frame, as in LeRobot.

    Args:
        dataset: demonstrations, with an action spec.
        n_obs_steps: observations per sample (t), the last one being the sample's frame.
        chunk_size: actions per observation (k), the first one being the action at that observation.
        episodes: indices of the episodes to use; all if left out.
        stats: from `EpisodeDataset.stats` over the *training* episodes; computed over ``episodes`` if left out.
        cameras: names, in the order of the model's input images; the card's if left out.
        is_relative: whether targets are relative to the state at their chunk's observation (`rvlm.data.representations`).
        image_size: height and width that images of all cameras are resized to [px]; their own if left out.
        dataset_index: index of the samples' card and statistics in a mixture.
        frames: arrays ``(n_frames, ...)`` per camera instead of the images, such as features of the vision tower.
        features: ``(n_frames, d)``, or what is indexed by row like it: samples have "features" ``(t, d)`` and no images.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        n_obs_steps: int | Any = 1,
        chunk_size: int | Any = 4,
        episodes: EpisodeIndices | None = None,
        stats: dict[str, NormStats] | None = None,
        cameras: Sequence[str] | None = None,
        image_size: tuple[int, int] | None = None,
        is_relative: bool = False,
        dataset_index: int = 0,
        frames: Sequence[np.ndarray] | None = None,
        features: Any = None,
    ) -> None:
        self.dataset, self.spec = dataset, dataset.require_spec()
        for name, value in (("n_obs_steps", n_obs_steps), ("chunk_size", chunk_size)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise EpisodeError(f"expected {name} as a whole number from 1 on, got {value!r}")
        self.n_obs_steps, self.chunk_size = n_obs_steps, chunk_size
        self.cameras, self.image_size = tuple(cameras or dataset.cameras), image_size
        self.is_relative = is_relative
        self.episodes = dataset.validate_episodes(episodes)
        self.stats = stats or dataset.stats(episodes=self.episodes)
        self.dataset_index = dataset_index
        self._load_columns()
        self._features = features
        self._frames = self._load_frames() if frames is None and features is None else list(frames or ())

    def _load_columns(self) -> None:
        self._action = self.dataset.column("action")
        try:
            self.spec.check(self._action)
        except SpecMismatch as error:
            raise EpisodeError(f"{self.dataset.root}, action: {error}") from error
        if not self.is_relative:
            self._action = self._normalized(self._action)
        self._raw_state = self.dataset.column("observation.state")
        check_finite_state(self.spec, self._raw_state, f"{self.dataset.root}, observation.state")
        self._state = self.spec.normalize_state(self._raw_state, self.stats["observation.state"]).astype(np.float32)
        self._task = self.dataset.task_of_frame
        self._episode = self.dataset.episode_of_frame
        table = self.dataset.episodes
        self._first = table["dataset_from_index"].to_numpy()
        self._end = table["dataset_to_index"].to_numpy()
        self._rows = np.flatnonzero(np.isin(self._episode, self.episodes))

    def _load_frames(self) -> list[np.ndarray]:
        cache = self.dataset.frames_cache(self.cameras, self.image_size)
        sizes = {camera: cache[camera].shape[1:3] for camera in self.cameras}
        if len(set(sizes.values())) > 1:
            raise EpisodeError(
                f"expected cameras of one size, got {sizes}; give the size to bring them to, image_size=(h, w), or choose some"
            )
        return [cache[camera] for camera in self.cameras]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Index) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Index] | np.ndarray) -> list[dict[str, Any]]:
        batch = self.batch(indices)
        return [{key: values[i] for key, values in batch.items()} for i in range(len(indices))]

    def _actions(self, rows: np.ndarray, obs: np.ndarray) -> np.ndarray:
        """Normalised actions ``(b, t, k, a)`` of rows ``(b, t, k)``, whose chunks begin at the observations ``(b, t)``."""
        if not self.is_relative:
            return self._action[rows]
        return self._normalized(relative_actions(self.spec, self._action[rows], self._raw_state[obs][:, :, None]))

    def _normalized(self, actions: np.ndarray) -> np.ndarray:
        return self.spec.normalize(actions, self.stats["action"]).astype(np.float32)

    def batch(self, indices: Sequence[Index] | np.ndarray) -> dict[str, Any]:
        """The samples at ``indices``, stacked: arrays with a leading ``b``, and a list of instructions."""
        row = self._rows[np.asarray(indices)]
        episode = self._episode[row]
        first, end = self._first[episode][:, None], self._end[episode][:, None]
        obs_rows = row[:, None] + np.arange(1 - self.n_obs_steps, 1)  # (b, t); may lie before the start
        obs, obs_mask = np.maximum(obs_rows, first), obs_rows >= first
        action_rows = obs_rows[..., None] + np.arange(self.chunk_size)  # (b, t, k); may lie past the end
        valid = obs_mask[..., None] & (action_rows < end[..., None])
        action = self._actions(np.clip(action_rows, first[..., None], end[..., None] - 1), obs)
        if self._features is None:
            seen = {"images": np.stack([frames[obs] for frames in self._frames], axis=2)}
        else:
            seen = {"features": self._features[obs]}
        return {
            **seen,
            "state": self._state[obs],
            "action": action,
            "action_mask": valid[..., None] & self.spec.present,
            "obs_mask": obs_mask,
            "instruction": [self.dataset.tasks[task] for task in self._task[row].tolist()],
            "dataset_index": np.full(len(row), self.dataset_index),
            "episode_index": episode,
            "frame_index": row - first[:, 0],
        }
