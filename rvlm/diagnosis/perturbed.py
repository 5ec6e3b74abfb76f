"""Demonstrations and environments with a fault in them; nothing on disk is changed."""

from collections.abc import Callable
from typing import Any

import numpy as np

from rvlm.data.windows import EpisodeDataset


class PerturbedDataset(EpisodeDataset):
    """Demonstrations with some of their content changed as it is read.

    Args:
        dataset: The unchanged demonstrations.
        columns: Name of a column -> change of its values.
        frames: Change of images (n, h, w, 3).
        rate_hz: Rate to claim.
        attributes: Other attributes of `EpisodeDataset` to set.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        columns: dict[str, Callable[[np.ndarray], np.ndarray]] | None = None,
        frames: Callable[[np.ndarray], np.ndarray] = np.asarray,
        rate_hz: float | None = None,
        **attributes: Any,
    ) -> None:
        self.__dict__.update({**dataset.__dict__, **attributes})
        before = getattr(dataset, "_column_changes", {})
        self._column_changes = before | {name: _after(before.get(name), change) for name, change in (columns or {}).items()}
        self._frame_change = _after(getattr(dataset, "_frame_change", None), frames)
        self._rate_hz = rate_hz or dataset.fps

    @property
    def fps(self) -> float:
        """As of `EpisodeDataset`, or the claimed rate."""
        return self._rate_hz

    def column(self, name: str) -> np.ndarray:
        """As of `EpisodeDataset`, changed."""
        return self._column_changes.get(name, np.asarray)(super().column(name))

    def frames_cache(self, cameras: Any = None, size: Any = None) -> dict[str, np.ndarray]:
        """As of `EpisodeDataset`, changed."""
        return {camera: self._frame_change(images) for camera, images in super().frames_cache(cameras, size).items()}


def _after(first: Callable | None, then: Callable) -> Callable:
    """One change after another."""
    return then if first is None else lambda values: then(first(values))


class PerturbedEnv:
    """An environment with changed observations, actions or seeds.

    Args:
        env: The unchanged environment.
        observe: Change of an observation.
        act: Change of a raw action (a,).
        seed: Change of a seed.
    """

    def __init__(
        self,
        env: Any,
        observe: Callable[[dict], dict] = dict,
        act: Callable[[np.ndarray], np.ndarray] = np.asarray,
        seed: Callable[[int], int] = int,
    ) -> None:
        self._env, self._observe, self._act, self._seed = env, observe, act, seed

    def __getattr__(self, name: str) -> Any:
        if name == "_env":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._env, name)

    @property
    def unwrapped(self) -> Any:
        """The unchanged environment, which the conventions are read from."""
        return self._env.unwrapped

    def reset(self, *, seed: int, options: dict | None = None) -> tuple[dict, dict]:
        """As of the unchanged environment, with the changes."""
        observation, info = self._env.reset(seed=self._seed(seed), options=options)
        return self._observe(observation), info

    def step(self, action: np.ndarray) -> tuple:
        """As of the unchanged environment, with the changes."""
        observation, *rest = self._env.step(self._act(np.asarray(action)))
        return self._observe(observation), *rest
