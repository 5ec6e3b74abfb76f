"""Closed-loop evaluation: episodes with fixed, distinct seeds, or each of a suite's fixed initial states once.

Episodes run in batches of fixed composition, so results do not depend on the number of processes, and finished batches are
cached on disk.
"""

import contextlib
import dataclasses
import errno
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from rvlm.caches import Code, register
from rvlm.envs import FIRST_HELD_OUT_SEED
from rvlm.envs.suites import Suite, load_suite
from rvlm.evaluation.acting import device_type, policy_and_envs
from rvlm.evaluation.rollouts import INPUT_ABLATIONS, EpisodeStart, rollout
from rvlm.files import artifacts_dir, atomic_write, config_hash, model_hash, weights_hash
from rvlm.importing import code_roots
from rvlm.policy.delayed_policy import NO_DELAY, check_execution
from rvlm.processes import in_parallel

EPISODES_PER_BATCH = 10  # which run in step
_IN_THIS_PROCESS = threading.RLock()  # episodes of one process share environments
EPISODE_CODE = (
    *("rvlm.evaluation.rollouts", "rvlm.evaluation.acting:policy_and_envs", "rvlm.envs.suites"),
    *(f"rvlm.evaluation.closed_loop:{name}" for name in ("EPISODES_PER_BATCH", "Evaluation", "run_batch")),
    *(f"rvlm.evaluation.closed_loop:{name}" for name in ("_cache_batch", "single_thread")),
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A policy and the episodes to evaluate it on.

    Attributes:
        policy: Folder of a trained model, "random" (uniform actions) or "expert" (the environment's `expert_action`).
        n_episodes: Number of episodes; tasks alternate. With fixed initial states each is used once: at most as many episodes.
        suite: Environment and tasks: a `Suite`, or its name as `load_suite` takes it.
        tasks: Some of the suite's; its `default_tasks` if left out.
        ablation: Input ablation, a name in `INPUT_ABLATIONS`.
        first_seed: Of the first episode; later ones count up.
        n_action_steps, temporal_ensemble_coeff: How predicted chunks are executed, as `Policy` takes them.
        execution, delay_steps: What the robot does while a chunk is computed, and for how many control steps, as `DelayedPolicy`
            takes them.
        device: Of the policy's computation; this machine's GPU if it has one, else its CPU.

    Example:
        >>> evaluation = rvlm.Evaluation("random", n_episodes=4, tasks=("lift", "push_left"))
        >>> [(episode.seed, episode.task) for episode in evaluation.episodes()[:2]]
        [(900000, 'lift'), (900001, 'push_left')]
    """

    policy: str
    n_episodes: int = 200
    suite: str | Suite = "tabletop/franka7"
    tasks: tuple[str, ...] = ()
    ablation: str = "none"
    first_seed: int = FIRST_HELD_OUT_SEED
    n_action_steps: int | None = None
    temporal_ensemble_coeff: float | None = None
    execution: str = "synchronous"
    delay_steps: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        check_execution(self.execution, self.delay_steps)
        if (self.execution, self.delay_steps) != NO_DELAY and self.policy in ("random", "expert"):
            raise ValueError(f"expected a trained policy to delay, got {self.policy!r}, which has no chunks; leave the delay out")
        if self.ablation not in INPUT_ABLATIONS:
            raise ValueError(f"no input ablation {self.ablation!r}; there are {', '.join(INPUT_ABLATIONS)}")
        if type(self.first_seed) is not int or self.first_seed < FIRST_HELD_OUT_SEED:
            raise ValueError(
                f"evaluation seeds start at {FIRST_HELD_OUT_SEED}, since lower ones are for training; got {self.first_seed!r}"
            )
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", str(self.device)):
            raise ValueError(f"expected device 'cpu', 'cuda' or one of several such as 'cuda:1', got {self.device!r}")
        if type(self.n_episodes) is not int or self.n_episodes < 1:
            raise ValueError(f"expected at least one episode, a whole number; got n_episodes={self.n_episodes!r}")
        if len(set(self.loaded_suite.known(self.tasks))) < len(self.tasks):
            raise ValueError(f"expected each task once, got {list(self.tasks)}; leave out what is there twice")
        n_starts, tasks = self.loaded_suite.n_starts, self.task_names
        if n_starts is not None and self.n_episodes > n_starts * len(tasks):
            raise ValueError(
                f"{self.loaded_suite.name} has {n_starts} initial states for each of {len(tasks)} tasks, and each is evaluated "
                f"once; expected n_episodes of at most {n_starts * len(tasks)}, got {self.n_episodes}"
            )

    @property
    def loaded_suite(self) -> Suite:
        """Its suite, loaded by name."""
        return load_suite(self.suite)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks that are evaluated."""
        return tuple(self.tasks) or self.loaded_suite.default_tasks

    def episodes(self) -> list[EpisodeStart]:
        """Every episode: all seeds, or all pairs of task and initial state, are distinct."""
        tasks, has_starts = self.task_names, self.loaded_suite.n_starts is not None
        return [
            EpisodeStart(self.first_seed + i, tasks[i % len(tasks)], i // len(tasks) if has_starts else None)
            for i in range(self.n_episodes)
        ]

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return -(-self.n_episodes // EPISODES_PER_BATCH)

    def batch_size(self, batch: int) -> int:
        """Number of episodes in a batch; the last may be smaller."""
        return min(EPISODES_PER_BATCH, self.n_episodes - batch * EPISODES_PER_BATCH)

    def is_done(self, batch: int, folder: Path | None = None) -> bool:
        """Whether a batch is cached with all its episodes; `folder` (hashing it takes time) is `self.folder` if left out."""
        path, n_expected = (folder or self.folder) / f"{batch:05d}.parquet", self.batch_size(batch)
        try:
            n_cached = len(pq.read_table(path)["seed"].unique())
        except (OSError, pa.ArrowInvalid) as error:  # missing, or corrupted: the batch is run again
            if getattr(error, "errno", None) not in (None, errno.ENOENT):
                raise
            return False
        is_superset = n_cached > n_expected and self.ablation != "shuffled_language"  # whose instructions depend on the batch
        return n_cached == n_expected or is_superset

    @property
    def weights(self) -> str | None:
        """Hash of the policy's weights, or None where it has none."""
        return weights_hash(self.policy)

    @property
    def code(self) -> Code:
        """The code that computes its episodes."""
        roots = (*EPISODE_CODE, *code_roots(self.loaded_suite.make_env))
        if self.policy in ("random", "expert"):
            return Code(roots, without=("rvlm.evaluation.acting:_load",))
        return Code((*roots, "rvlm.policy.policy", "rvlm.policy.delayed_policy", "rvlm.evaluation.acting:_load"))

    @property
    def settings(self) -> dict[str, Any]:
        """Its fields as JSON values, with the names of the suite and of all tasks."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "suite": self.loaded_suite.name, "tasks": self.task_names}

    @property
    def folder(self) -> Path:
        """Cache of finished batches, named by a hash of settings, the suite's and the policy's content, and the code."""
        content = {**self.settings, "n_episodes": None, "suite": self.loaded_suite.content}
        is_trained = self.policy not in ("random", "expert")
        content["policy"] = model_hash(self.policy) if is_trained else self.policy
        content["device"] = device_type(self.device) if is_trained else None
        return artifacts_dir() / "evaluations" / config_hash({**content, "code": self.code.hash})

    def run(self, batch: int) -> list[dict]:
        """Run one of its batches in this process; rows as `rollout` gives them."""
        return run_batch(self, batch)


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """One torch thread, as in worker processes: the order of floating-point sums can change how an episode ends."""
    import torch

    with _IN_THIS_PROCESS:
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(n_threads)


def _cache_batch(evaluation: Evaluation, batch: int, folder: Path) -> int:
    """Run a batch in this process and write its rows to the cache; returns its number of episodes."""
    started = time.time()
    with single_thread():
        rows = evaluation.run(batch)
    table = pd.DataFrame(rows).assign(wall_s=(time.time() - started) / len(rows))
    atomic_write(folder / f"{batch:05d}.parquet", table.to_parquet())
    return len(rows)


def run_batch(evaluation: Evaluation, batch: int, keep_frames: bool = False) -> list[dict]:
    """Run one batch of an evaluation's episodes in this process; rows as `rollout` gives them."""
    episodes = evaluation.episodes()[batch * EPISODES_PER_BATCH : (batch + 1) * EPISODES_PER_BATCH]
    policy, envs = policy_and_envs(evaluation, len(episodes))
    return rollout(policy, envs, episodes, evaluation.ablation, keep_frames)


def evaluate(evaluations: dict[str, Evaluation], n_workers: int = 2, show_progress: bool = True) -> pd.DataFrame:
    """Run evaluations, batches in parallel; cached batches are not run again.

    Args:
        evaluations: Name in tables and figures -> evaluation.
        n_workers: Number of processes; up to 1 runs all in this one.
        show_progress: Whether to show a progress bar.

    Returns:
        One row per episode: name, seed, task, start (of suites with fixed initial states), instruction, is_success, failure,
        n_steps, policy_s, simulator_s, wall_s, ablation, suite, setting, and policy (the hash of its weights, or "random" or
        "expert").

    Raises:
        ValueError: No evaluations, or shuffled language on two numbers of the same episodes, whose permutations differ.

    Example:
        >>> random = rvlm.Evaluation("random", n_episodes=2, tasks=("lift",))
        >>> rows = rvlm.evaluate({"random": random}, n_workers=1, show_progress=False)
        >>> len(rows)
        2
    """
    if not evaluations:
        raise ValueError('expected at least one evaluation, got none; as {"shipped": Evaluation(folder)}')
    folders = {name: evaluation.folder for name, evaluation in evaluations.items()}
    to_run = _largest(evaluations, folders)
    jobs, total = [], sum(evaluation.n_episodes for evaluation in to_run.values())
    for folder, evaluation in to_run.items():
        folder.mkdir(parents=True, exist_ok=True)
        todo = [batch for batch in range(evaluation.n_batches) if not evaluation.is_done(batch, folder)]
        if todo:
            evaluation.code.require_unchanged()
        register(folder, evaluation.code, evaluation.settings, [evaluation.policy])
        jobs += [(evaluation, batch, folder) for batch in todo]
    with tqdm(total=total, desc="episodes", disable=not show_progress) as bar:
        bar.update(total - sum(e.batch_size(b) for e, b, _ in jobs))
        for n in in_parallel(_cache_batch, jobs, n_workers):
            bar.update(n)
    return pd.concat([_read(name, e, folders[name]) for name, e in evaluations.items()], ignore_index=True)


def _largest(evaluations: dict[str, Evaluation], folders: dict[str, Path]) -> dict[Path, Evaluation]:
    """Cache folder -> its evaluation with the most episodes, which include those of the others."""
    largest: dict[Path, Evaluation] = {}
    for name, evaluation in evaluations.items():
        other = largest.setdefault(folders[name], evaluation)
        if evaluation.n_episodes != other.n_episodes and evaluation.ablation == "shuffled_language":
            raise ValueError(
                f"{name!r}: expected one number of episodes with shuffled language, since instructions are permuted within "
                f"batches; got {evaluation.n_episodes} and {other.n_episodes}; evaluate them one after the other"
            )
        largest[folders[name]] = max(evaluation, other, key=lambda e: e.n_episodes)
    return largest


def _read(name: str, evaluation: Evaluation, folder: Path) -> pd.DataFrame:
    batches = [folder / f"{batch:05d}.parquet" for batch in range(evaluation.n_batches)]
    table = pd.concat([pd.read_parquet(p) for p in batches], ignore_index=True)
    table = table.loc[table["seed"] < evaluation.first_seed + evaluation.n_episodes]
    suite, policy = evaluation.loaded_suite, evaluation.weights or evaluation.policy
    columns = {"ablation": evaluation.ablation, "suite": suite.name, "setting": suite.setting, "policy": policy}
    return table.assign(name=name, **columns)
