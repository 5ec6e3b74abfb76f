"""DAgger: the policy acts, and the environment's expert labels each observation with its own action.

Source: Ross, Gordon and Bagnell 2011, "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online Learning"
(arXiv 1011.0686), algorithm 3.1 with the policy alone acting.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from rvlm.caches import Code, register, use_inputs
from rvlm.data.writer import record_dataset
from rvlm.envs.demonstrations import PER_SHARD, Collection, LabelledEpisode, labelled_rollout
from rvlm.evaluation.rollouts import begin_episodes, require_same_specs
from rvlm.files import artifacts_dir, commit_on_hub, config_hash, model_hash
from rvlm.importing import code_roots
from rvlm.policy.policy import Policy, load_policy

FIRST_SEED = 700_000  # of scenes without demonstrations, below the held-out ones


@dataclass(frozen=True)
class DAggerCollection:
    """Episodes of a policy, with the expert's actions as labels.

    Attributes:
        policy: Folder of a trained model.
        settings: Suite, tasks, image size, time limit and number of episodes; failed episodes are kept too.
    """

    policy: str
    settings: Collection

    @property
    def code(self) -> Code:
        """The code that records it."""
        return Code(("rvlm.experiments.dagger", *code_roots(self.settings.loaded_suite.make_env)))

    @property
    def folder(self) -> Path:
        """Folder of the dataset, named by the suite and a hash of settings, data card, policy and code."""
        key = config_hash({**self.settings.content, "policy": model_hash(self.policy), "code": self.code.hash})
        return artifacts_dir() / "datasets" / f"dagger_{self.settings.loaded_suite.name.replace('/', '_')}-{key}"


def rollout_with_expert_labels(policy: Policy, env: gymnasium.Env, seed: int, task: str) -> LabelledEpisode:
    """One episode in which the policy acts; `action` is the expert's, in the state that the policy has reached.

    Returns:
        As `labelled_rollout`, failed episodes too.

    Raises:
        SpecMismatch: The environment's conventions differ from the policy's.
    """
    require_same_specs(policy, [env])
    begin_episodes(policy, [seed])
    return labelled_rollout(env, seed, task, lambda observation, _: policy.select_action([observation])[0])


def dagger_shard(index: int, collection: DAggerCollection) -> Iterator[tuple[dict[str, np.ndarray], str, dict[str, Any]]]:
    """Frames, instruction and extra columns of each episode of one shard."""
    settings, tasks = collection.settings, collection.settings.task_names
    policy = load_policy(collection.policy, revision=commit_on_hub(collection.policy), spec=settings.spec)
    env = settings.loaded_suite.make(settings.image_size or policy.image_size)
    for i in range(index * PER_SHARD, min((index + 1) * PER_SHARD, settings.n_episodes)):
        task, seed = tasks[i % len(tasks)], FIRST_SEED + settings.first_seed + i
        episode = rollout_with_expert_labels(policy, env, seed, task)
        yield episode.columns, episode.instruction, {"task": task, "seed": seed}
    env.close()


def collect_corrections(collection: DAggerCollection, n_workers: int = 2, progress: bool = True) -> Path:
    """Record the episodes, unless they are cached; a run that was killed is resumed.

    Returns:
        Folder of a LeRobotDataset v3.0.
    """
    settings, folder = collection.settings, collection.folder
    if not folder.exists():
        collection.code.require_unchanged()
    use_inputs([collection.policy])
    make, n_shards = functools.partial(dagger_shard, collection=collection), -(-settings.n_episodes // PER_SHARD)
    record_dataset(folder, settings.spec, make, n_shards, n_workers, progress, dict(settings.loaded_suite.held_out))
    return register(folder, collection.code, {"policy": collection.policy, **settings.settings}, [collection.policy])
