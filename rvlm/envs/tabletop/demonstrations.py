"""Scripted demonstrations on the tabletop, recorded with injected noise and the expert's corrections.

Each action that is executed is the expert's plus noise; what is recorded as `action` is the expert's alone, so that the
data hold the way back from where a policy's own errors would lead (DART: Laskey et al. 2017, "Noise Injection for Robust
Imitation Learning", section 4). The action that was executed is kept as `action_executed`.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rvlm.actions import ActionSpec
from rvlm.envs.tabletop.env import Tabletop
from rvlm.envs.tabletop.tasks import MIX
from rvlm.evaluation import FIRST_HELD_OUT_SEED
from rvlm.recording import collect
from rvlm.report import artifacts_dir

PER_SHARD = 50
NOISE_PER_DIM = (1.0, 1.0, 1.0, 0.3, 0.3, 0.3)  # rotations are disturbed less


@dataclass(frozen=True)
class Collection:
    """What a set of demonstrations is made of.

    Attributes:
        robot: Embodiment.
        n_episodes: Successful episodes, in shards of `PER_SHARD`.
        families: They take turns.
        image_size: Side of both images [px].
        noise: Largest standard deviation of the injected noise [raw action units]; each episode draws its own.
        max_steps: Longer episodes are given up and drawn anew.
        first_seed: Of the scenes.
    """

    robot: str = "franka7"
    n_episodes: int = 1000
    families: tuple[str, ...] = MIX
    image_size: int = 96
    noise: float = 0.6
    max_steps: int = 60
    first_seed: int = 0

    @property
    def folder(self) -> Path:
        """Where the dataset is: the robot and the hash of everything that makes it."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return artifacts_dir() / "datasets" / f"tabletop_{self.robot}-{digest}"


def demonstrate(env: Tabletop, seed: int, family: str, noise: float) -> dict[str, np.ndarray] | None:
    """One noisy expert episode as columns of frames, or None if it did not succeed in time."""
    observation, _ = env.reset(seed=seed, options={"family": family})
    rng = np.random.default_rng((seed, 1))
    spread = rng.uniform(0, noise) * np.array(NOISE_PER_DIM)
    columns: dict[str, list[Any]] = {k: [] for k in ("image", "wrist_image", "state", "action", "executed")}
    for _ in range(env.max_steps):
        action = env.expert_action()
        executed = action.copy()
        executed[:6] = np.clip(action[:6] + rng.normal(0, spread), env.action_spec.low[:6], env.action_spec.high[:6])
        for key, value in (*((k, observation[k]) for k in ("image", "wrist_image", "state")), ("action", action), ("executed", executed)):
            columns[key].append(value)
        observation, _, is_success, _, _ = env.step(executed)
        if is_success:
            return {k: np.stack(v) for k, v in columns.items()}
    return None


def make_shard(index: int, collection: Collection) -> Iterator[tuple[dict[str, np.ndarray], str, dict[str, Any]]]:
    """The episodes of one shard, in LeRobot's keys."""
    env = Tabletop(collection.robot, collection.image_size, collection.families, max_steps=collection.max_steps)
    n = min(PER_SHARD, collection.n_episodes - index * PER_SHARD)
    seed = collection.first_seed + index * 2 * PER_SHARD  # room for episodes that are drawn anew
    for i in range(n):
        family, columns = collection.families[(index * PER_SHARD + i) % len(collection.families)], None
        while columns is None:
            columns, used = demonstrate(env, seed, family, collection.noise), seed
            seed += 1
        frames = {
            "observation.images.static": columns["image"],
            "observation.images.wrist": columns["wrist_image"],
            "observation.state": columns["state"],
            "action": columns["action"],
            "action_executed": columns["executed"],
        }
        yield frames, env.task.instruction, {"family": family, "seed": used}
    env.close()


def collect_demonstrations(collection: Collection, n_workers: int = 2, progress: bool = True) -> Path:
    """Record the demonstrations unless they are there; killed, it goes on where it was.

    Returns:
        Folder of a LeRobotDataset v3.0.
    """
    n_shards = -(-collection.n_episodes // PER_SHARD)
    if collection.first_seed + 2 * n_shards * PER_SHARD > FIRST_HELD_OUT_SEED:
        raise ValueError(f"{collection.n_episodes} episodes would reach the held-out seeds from {FIRST_HELD_OUT_SEED}; collect fewer")
    spec = ActionSpec.from_card(f"tabletop_{collection.robot}")
    return collect(collection.folder, spec, functools.partial(make_shard, collection=collection), n_shards, n_workers, progress)
