"""A policy's own mistakes, corrected: it acts, the scripted expert says what it would have done there (DAgger).

Source: Ross, Gordon and Bagnell 2011, "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online Learning"
(arXiv 1011.0686), algorithm 3.1 with the policy alone acting.
"""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rvlm.caches import Code, register, use_inputs
from rvlm.data.writer import record_dataset
from rvlm.envs.tabletop.demonstrations import HELD_OUT, PER_SHARD, Collection, rollout_expert
from rvlm.envs.tabletop.env import Tabletop
from rvlm.files import artifacts_dir, commit_on_hub, config_hash, model_hash
from rvlm.policy.policy import Policy, load_policy

CODE = Code(("rvlm.experiments.dagger",))
FIRST_SEED = 700_000  # of scenes that no demonstration has shown, below those that are held out


@dataclass(frozen=True)
class DAggerCollection:
    """Episodes that a policy acts in and the expert corrects.

    Attributes:
        policy: Folder of a trained model.
        like: Robot, families, image size and time limit, as of demonstrations; `n_episodes` of them, whether solved or not.
    """

    policy: str
    like: Collection

    @property
    def folder(self) -> Path:
        """Where the dataset is: the robot, and the hash of these settings, the robot's card, the policy and the code."""
        made_by = {"spec": asdict(self.like.spec), "policy": model_hash(self.policy), "code": CODE.hash}
        key = config_hash({**asdict(self.like), **made_by})
        return artifacts_dir() / "datasets" / f"dagger_{self.like.robot}-{key}"


def rollout_with_expert_labels(policy: Policy, env: Tabletop, seed: int, family: str) -> dict[str, np.ndarray]:
    """One episode in which the policy acts; `action` is the expert's, at what the policy has come to.

    Returns:
        Columns as `rollout_expert` gives them, whether solved or not.
    """
    policy.reset()
    frames, _ = rollout_expert(env, seed, family, lambda observation, _: policy.select_action([observation])[0])
    return frames


def make_shard(index: int, corrections: DAggerCollection) -> Iterator[tuple[dict[str, np.ndarray], str, dict[str, Any]]]:
    """The episodes of one shard."""
    like = corrections.like
    env = Tabletop(like.robot, like.image_size, like.families, max_steps=like.max_steps)
    policy = load_policy(corrections.policy, revision=commit_on_hub(corrections.policy), spec=env.action_spec)
    for i in range(index * PER_SHARD, min((index + 1) * PER_SHARD, like.n_episodes)):
        family, seed = like.families[i % len(like.families)], FIRST_SEED + like.first_seed + i
        frames = rollout_with_expert_labels(policy, env, seed, family)
        yield frames, env.task.instruction, {"family": family, "seed": seed}
    env.close()


def collect_corrections(corrections: DAggerCollection, n_workers: int = 2, progress: bool = True) -> Path:
    """Record the episodes unless they are there; killed, it goes on where it was.

    Returns:
        Folder of a LeRobotDataset v3.0.
    """
    like, folder = corrections.like, corrections.folder
    if not folder.exists():
        CODE.require_unchanged()
    use_inputs([corrections.policy])
    make, n_shards = functools.partial(make_shard, corrections=corrections), -(-like.n_episodes // PER_SHARD)
    record_dataset(folder, like.spec, make, n_shards, n_workers, progress, HELD_OUT)
    return register(folder, CODE, asdict(corrections), [corrections.policy])
