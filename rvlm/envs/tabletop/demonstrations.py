"""Scripted demonstrations on the tabletop, recorded with injected noise and the expert's corrections.

The executed action is the expert's plus noise; the recorded `action` is the expert's alone, so that the data show how to recover
from errors (DART: Laskey et al. 2017, "Noise Injection for Robust Imitation Learning", section 4). The executed action is
recorded as `action_executed`.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rvlm.caches import Code, register
from rvlm.data.actions import ActionSpec
from rvlm.data.observations import stack_images
from rvlm.data.writer import record_dataset
from rvlm.envs import FIRST_HELD_OUT_SEED
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.scene import UNSEEN_COLORS
from rvlm.envs.tabletop.tasks import ALL_FAMILIES, DEFAULT_TASKS
from rvlm.files import artifacts_dir, config_hash

DEMONSTRATIONS_CODE = Code(("rvlm.envs.tabletop.demonstrations",))
PER_SHARD = 50
SEEDS_PER_SHARD = 2 * PER_SHARD  # spare seeds for failed episodes
HELD_OUT = {  # reserved for evaluation: seeds from the first on, instruction templates, and colours
    "first_seed": FIRST_HELD_OUT_SEED,
    "wordings": [wording for family in ALL_FAMILIES.values() for wording in family.held_out],
    "words": list(UNSEEN_COLORS),
}
NOISE_PER_DIM = (1.0, 1.0, 1.0, 0.3, 0.3, 0.3)  # rotations are noisy less


@dataclass(frozen=True)
class Collection:
    """Settings of a set of demonstrations.

    Attributes:
        robot: Embodiment.
        n_episodes: Number of successful episodes, in shards of `PER_SHARD`.
        families: Task families, in turn.
        image_size: Side of both images [px].
        noise: Largest standard deviation of the injected noise [raw action units]; sampled per episode.
        max_steps: Longer episodes are dropped and sampled again.
        first_seed: First seed of the scenes.
    """

    robot: str = "franka7"
    n_episodes: int = 1000
    families: tuple[str, ...] = DEFAULT_TASKS
    image_size: int = 96
    noise: float = 0.6
    max_steps: int = 60
    first_seed: int = 0

    @property
    def folder(self) -> Path:
        """Folder of the dataset, named by the robot and a hash of settings, data card and code."""
        key = config_hash({**asdict(self), "spec": asdict(self.spec), "code": DEMONSTRATIONS_CODE.hash})
        return artifacts_dir() / "datasets" / f"tabletop_{self.robot}-{key}"

    @property
    def spec(self) -> ActionSpec:
        """The robot's action spec."""
        return ActionSpec.from_card(f"tabletop_{self.robot}")


def labelled_rollout(
    env: Tabletop, seed: int, family: str, act: Callable[[dict[str, Any], np.ndarray], np.ndarray]
) -> tuple[dict[str, np.ndarray], bool]:
    """Roll out one episode with the actions of `act`, labelled by the expert at every step.

    Args:
        env: The environment; its `max_steps` is the time limit.
        seed: Of the scene.
        family: Task family.
        act: (observation, expert's action (a,)) -> executed action (a,), float32 in raw units.

    Returns:
        Columns in LeRobot's keys over the n steps: images (n, h, w, 3) uint8; `observation.state` (n, s) in the card's units;
        `action`, the expert's, and `action_executed` (n, a), both float32 in raw units. And whether the task succeeded in time.
    """
    observation, _ = env.reset(seed=seed, options={"family": family})
    images, columns = [], {"observation.state": [], "action": [], "action_executed": []}
    is_success = False
    for _ in range(env.max_steps):
        expert = env.expert_action()
        executed = act(observation, expert)
        images.append(observation["images"])
        for values, value in zip(columns.values(), (observation["state"], expert, executed), strict=True):
            values.append(value)
        observation, _, is_success, _, _ = env.step(executed)
        if is_success:
            break
    recorded = {f"observation.images.{camera}": frames for camera, frames in stack_images(images).items()}
    return recorded | {key: np.stack(values) for key, values in columns.items()}, is_success


def demonstrate(env: Tabletop, seed: int, family: str, noise: float) -> dict[str, np.ndarray] | None:
    """One noisy expert episode, or None if it did not succeed in time.

    Args:
        env: As in `labelled_rollout`.
        seed: Of the scene and of the noise.
        family: Task family.
        noise: Largest standard deviation of the noise [raw action units].

    Returns:
        Columns as of `labelled_rollout`.
    """
    rng = np.random.default_rng((seed, 1))
    spread = rng.uniform(0, noise) * np.array(NOISE_PER_DIM)

    def noisy(_: dict[str, Any], expert: np.ndarray) -> np.ndarray:
        moved = np.clip(expert[:6] + rng.normal(0, spread), env.action_spec.low[:6], env.action_spec.high[:6])
        return np.concatenate([moved, expert[6:]]).astype(expert.dtype)

    columns, is_success = labelled_rollout(env, seed, family, noisy)
    return columns if is_success else None


def make_shard(index: int, collection: Collection) -> Iterator[tuple[dict[str, np.ndarray], str, dict[str, Any]]]:
    """The episodes of one shard, in LeRobot's keys.

    Raises:
        RuntimeError: The expert failed too often for the shard's number of seeds.
    """
    env = Tabletop(collection.robot, collection.image_size, collection.families, max_steps=collection.max_steps)
    n = min(PER_SHARD, collection.n_episodes - index * PER_SHARD)
    first = collection.first_seed + index * SEEDS_PER_SHARD
    seeds = iter(range(first, first + SEEDS_PER_SHARD))
    for i in range(n):
        family = collection.families[(index * PER_SHARD + i) % len(collection.families)]
        seed, frames = _next_success(env, seeds, family, collection)
        yield frames, env.task.instruction, {"family": family, "seed": seed}
    env.close()


def _next_success(env: Tabletop, seeds: Iterator[int], family: str, collection: Collection) -> tuple[int, dict[str, np.ndarray]]:
    for seed in seeds:
        columns = demonstrate(env, seed, family, collection.noise)
        if columns is not None:
            return seed, columns
    raise RuntimeError(
        f"expected the expert to succeed in at least {PER_SHARD} of {SEEDS_PER_SHARD} scenes, but it failed too often, last at "
        f"{family!r} with {collection.robot}; allow more than max_steps={collection.max_steps}, or less than "
        f"noise={collection.noise}"
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
    make, folder = functools.partial(make_shard, collection=collection), collection.folder
    if not folder.exists():
        DEMONSTRATIONS_CODE.require_unchanged()
    record_dataset(folder, collection.spec, make, n_shards, n_workers, progress, HELD_OUT)
    return register(folder, DEMONSTRATIONS_CODE, asdict(collection))
