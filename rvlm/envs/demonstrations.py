"""Demonstrations by the expert of any suite, recorded with injected noise and the expert's corrections.

The executed action is the expert's plus noise; the recorded `action` is the expert's alone, so that the data show how to recover
from errors (DART: Laskey et al. 2017, "Noise Injection for Robust Imitation Learning", section 4). The executed action is
recorded as `action_executed`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from rvlm.caches import Code, register
from rvlm.data.actions import ActionSpec
from rvlm.data.observations import stack_images
from rvlm.data.writer import record_dataset
from rvlm.envs import FIRST_HELD_OUT_SEED
from rvlm.envs.suites import Suite, load_suite, method_of
from rvlm.files import artifacts_dir, config_hash
from rvlm.importing import code_roots

PER_SHARD = 50
SEEDS_PER_SHARD = 2 * PER_SHARD  # spare seeds for failed episodes


@dataclass(frozen=True)
class Collection:
    """Settings of a set of demonstrations.

    Attributes:
        suite: Environment with an expert: a `Suite`, or its name as `load_suite` takes it.
        n_episodes: Number of successful episodes, in shards of `PER_SHARD`.
        tasks: Some of the suite's, in turn; its `default_tasks` if left out.
        image_size: Of all images, as the suite's `make_env` takes it [px]; the environment's own if left out.
        noise: Largest standard deviation of the injected noise, in multiples of the suite's `noise_scale`; sampled per episode.
        max_steps: Longer episodes are dropped and sampled again; the suite's `demonstration_steps` if left out.
        first_seed: First seed of the scenes.
    """

    suite: str | Suite = "tabletop/franka7"
    n_episodes: int = 1000
    tasks: tuple[str, ...] = ()
    image_size: int | None = None
    noise: float = 0.6
    max_steps: int | None = None
    first_seed: int = 0

    def __post_init__(self) -> None:
        self.loaded_suite.known(self.tasks)

    @property
    def loaded_suite(self) -> Suite:
        """Its suite, loaded by name, with the time limit of demonstrations."""
        suite = load_suite(self.suite)
        return replace(suite, max_steps=self.max_steps or suite.demonstration_steps or suite.max_steps)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks that are demonstrated."""
        return tuple(self.tasks) or self.loaded_suite.default_tasks

    @property
    def code(self) -> Code:
        """The code that records it."""
        return Code(("rvlm.envs.demonstrations", *code_roots(self.loaded_suite.make_env)))

    @property
    def settings(self) -> dict[str, Any]:
        """Its fields as JSON values, with the names of the suite and of all tasks."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "suite": self.loaded_suite.name, "tasks": self.task_names}

    @property
    def content(self) -> dict[str, Any]:
        """All that decides what is recorded, as JSON values, except the code."""
        return {**self.settings, "suite": self.loaded_suite.content, "noise_scale": self.loaded_suite.noise_scale}

    @property
    def folder(self) -> Path:
        """Folder of the dataset, named by the suite and a hash of settings, data card and code."""
        key = config_hash({**self.content, "code": self.code.hash})
        return artifacts_dir() / "datasets" / f"{self.loaded_suite.name.replace('/', '_')}-{key}"

    @property
    def spec(self) -> ActionSpec:
        """The robot's action spec."""
        return self.loaded_suite.spec


class LabelledEpisode(NamedTuple):
    """An episode with the expert's action at every step.

    Attributes:
        columns: In LeRobot's keys over the n steps: images (n, h, w, 3) uint8; `observation.state` (n, s) in the card's units;
            `action`, the expert's, and `action_executed` (n, a), both float32 in raw units.
        instruction: Of the task.
        is_success: Whether the task succeeded in time.
    """

    columns: dict[str, np.ndarray]
    instruction: str
    is_success: bool


def labelled_rollout(
    env: gymnasium.Env, seed: int, task: str, act: Callable[[dict[str, Any], np.ndarray], np.ndarray]
) -> LabelledEpisode:
    """Roll out one episode with the actions of `act`, labelled by the expert at every step.

    Args:
        env: Of `Suite.make`, which ends episodes at their time limit; has `expert_action()`.
        seed: Of the scene.
        task: Of the suite.
        act: (observation, expert's action (a,)) -> executed action (a,), float32 in raw units.
    """
    expert_action, (observation, _) = method_of(env, "expert_action", "recording"), env.reset(seed=seed, options={"task": task})
    images, columns = [], {"observation.state": [], "action": [], "action_executed": []}
    instruction, is_success, is_over = observation["instruction"], False, False
    while not is_over:
        expert = expert_action()
        executed = act(observation, expert)
        images.append(observation["images"])
        for values, value in zip(columns.values(), (observation["state"], expert, executed), strict=True):
            values.append(value)
        observation, _, is_terminated, is_truncated, info = env.step(executed)
        is_success, is_over = bool(info["is_success"]), is_terminated or is_truncated
    recorded = {f"observation.images.{camera}": frames for camera, frames in stack_images(images).items()}
    return LabelledEpisode(recorded | {key: np.stack(values) for key, values in columns.items()}, instruction, is_success)


def demonstrate(env: gymnasium.Env, seed: int, task: str, noise: float, scale: Sequence[float]) -> LabelledEpisode:
    """One noisy expert episode.

    Args:
        env: As in `labelled_rollout`.
        seed: Of the scene and of the noise.
        task: Of the suite.
        noise: Largest standard deviation of the noise, in multiples of `scale`.
        scale: (a,) For each dimension [raw action units]; those at 0 stay exact.
    """
    rng, spec, noisy_dims = np.random.default_rng((seed, 1)), env.unwrapped.action_spec, np.flatnonzero(scale)
    spread, low, high = rng.uniform(0, noise) * np.asarray(scale)[noisy_dims], np.asarray(spec.low), np.asarray(spec.high)

    def noisy(_: dict[str, Any], expert: np.ndarray) -> np.ndarray:
        executed = expert.astype(np.float64)
        executed[noisy_dims] += rng.normal(0, spread)
        executed[noisy_dims] = np.clip(executed, low, high)[noisy_dims]
        return executed.astype(expert.dtype)

    return labelled_rollout(env, seed, task, noisy)


def make_shard(index: int, collection: Collection) -> Iterator[tuple[dict[str, np.ndarray], str, dict[str, Any]]]:
    """The episodes of one shard, in LeRobot's keys.

    Raises:
        RuntimeError: The expert failed too often for the shard's number of seeds.
    """
    env, tasks = collection.loaded_suite.make(collection.image_size), collection.task_names
    n = min(PER_SHARD, collection.n_episodes - index * PER_SHARD)
    first = collection.first_seed + index * SEEDS_PER_SHARD
    seeds = iter(range(first, first + SEEDS_PER_SHARD))
    for i in range(n):
        task = tasks[(index * PER_SHARD + i) % len(tasks)]
        seed, episode = _next_success(env, seeds, task, collection)
        yield episode.columns, episode.instruction, {"task": task, "seed": seed}
    env.close()


def _next_success(env: gymnasium.Env, seeds: Iterator[int], task: str, collection: Collection) -> tuple[int, LabelledEpisode]:
    scale = collection.loaded_suite.noise_scale or (0.0,) * collection.spec.n_dims
    for seed in seeds:
        episode = demonstrate(env, seed, task, collection.noise, scale)
        if episode.is_success:
            return seed, episode
    raise RuntimeError(
        f"expected the expert to succeed in at least {PER_SHARD} of {SEEDS_PER_SHARD} scenes, but it failed too often, last at "
        f"{task!r} of {collection.loaded_suite.name}; allow more than max_steps={collection.loaded_suite.limit(task)}, or less "
        f"than noise={collection.noise}"
    )


def collect_demonstrations(collection: Collection, n_workers: int = 2, progress: bool = True) -> Path:
    """Record the demonstrations unless they exist; resumes after a kill.

    Returns:
        Folder of a LeRobotDataset v3.0.

    Raises:
        ValueError: The seeds would overlap those held out for evaluation.
    """
    n_shards = -(-collection.n_episodes // PER_SHARD)
    last = collection.first_seed + n_shards * SEEDS_PER_SHARD - 1
    if last >= FIRST_HELD_OUT_SEED:
        raise ValueError(
            f"expected seeds below {FIRST_HELD_OUT_SEED}, where the held-out scenes begin; {collection.n_episodes} episodes from "
            f"seed {collection.first_seed} may use seeds up to {last}; collect fewer, or begin lower"
        )
    make, folder, suite = functools.partial(make_shard, collection=collection), collection.folder, collection.loaded_suite
    if not folder.exists():
        collection.code.require_unchanged()
    record_dataset(folder, collection.spec, make, n_shards, n_workers, progress, dict(suite.held_out))
    return register(folder, collection.code, collection.settings)
