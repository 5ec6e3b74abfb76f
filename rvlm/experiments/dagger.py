"""DAgger: the policy acts, and the scripted expert labels each observation with its own action.

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
from rvlm.envs.tabletop.demonstrations import HELD_OUT, PER_SHARD, Collection, labelled_rollout
from rvlm.envs.tabletop.env import Tabletop
from rvlm.files import artifacts_dir, commit_on_hub, config_hash, model_hash
from rvlm.policy.policy import Policy, load_policy

DAGGER_CODE = Code(("rvlm.experiments.dagger",))
FIRST_SEED = 700_000  # of scenes without demonstrations, below the held-out ones


@dataclass(frozen=True)
class DAggerCollection:
    """Episodes of a policy, with the expert's actions as labels.

    Attributes:
        policy: Folder of a trained model.
        settings: Robot, families, image size, time limit and number of episodes; failed episodes are kept too.
    """

    policy: str
    settings: Collection

    @property
    def folder(self) -> Path:
        """Folder of the dataset, named by the robot and a hash of settings, data card, policy and code."""
        made_by = {"spec": asdict(self.settings.spec), "policy": model_hash(self.policy), "code": DAGGER_CODE.hash}
        key = config_hash({**asdict(self.settings), **made_by})
        return artifacts_dir() / "datasets" / f"dagger_{self.settings.robot}-{key}"


def rollout_with_expert_labels(policy: Policy, env: Tabletop, seed: int, family: str) -> dict[str, np.ndarray]:
    """One episode in which the policy acts; `action` is the expert's, in the state that the policy has reached.

    Returns:
        Columns as `labelled_rollout` gives them, for failed episodes too.
    """
    policy.reset()
    frames, _ = labelled_rollout(env, seed, family, lambda observation, _: policy.select_action([observation])[0])
    return frames


def dagger_shard(index: int, collection: DAggerCollection) -> Iterator[tuple[dict[str, np.ndarray], str, dict[str, Any]]]:
    """Frames, instruction and extra columns of each episode of one shard."""
    settings = collection.settings
    env = Tabletop(settings.robot, settings.image_size, settings.families, max_steps=settings.max_steps)
    policy = load_policy(collection.policy, revision=commit_on_hub(collection.policy), spec=env.action_spec)
    for i in range(index * PER_SHARD, min((index + 1) * PER_SHARD, settings.n_episodes)):
        family, seed = settings.families[i % len(settings.families)], FIRST_SEED + settings.first_seed + i
        frames = rollout_with_expert_labels(policy, env, seed, family)
        yield frames, env.task.instruction, {"family": family, "seed": seed}
    env.close()


def collect_corrections(collection: DAggerCollection, n_workers: int = 2, progress: bool = True) -> Path:
    """Record the episodes, unless they are cached; a run that was killed is resumed.

    Returns:
        Folder of a LeRobotDataset v3.0.
    """
    settings, folder = collection.settings, collection.folder
    if not folder.exists():
        DAGGER_CODE.require_unchanged()
    use_inputs([collection.policy])
    make, n_shards = functools.partial(dagger_shard, collection=collection), -(-settings.n_episodes // PER_SHARD)
    record_dataset(folder, settings.spec, make, n_shards, n_workers, progress, HELD_OUT)
    return register(folder, DAGGER_CODE, asdict(collection), [collection.policy])
