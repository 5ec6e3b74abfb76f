"""Closed-loop evaluation: episodes with fixed, distinct seeds, success by the simulator's state, controls beside it.

Episodes run in batches of fixed composition, so the result does not depend on how many processes share them, and a
batch that is finished is kept on disk.
"""

import contextlib
import dataclasses
import errno
import functools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from rvlm.caches import Code, register
from rvlm.data.actions import ActionSpec
from rvlm.envs import FIRST_HELD_OUT_SEED
from rvlm.evaluation.rollouts import INPUT_ABLATIONS, RandomPolicy, rollout
from rvlm.files import artifacts_dir, atomic_write, commit_on_hub, config_hash, model_hash, weights_hash
from rvlm.processes import in_parallel
from rvlm.statistics import Difference, paired_difference, success_rate, wilson

BATCH = 10  # episodes that run side by side
_IN_THIS_PROCESS = threading.RLock()
_OWN = ("BATCH", "Evaluation", "run_batch", "policy_and_envs", "make_envs", "_judged", "_one_thread", "_run_batch", "_spec")
EPISODES = (
    "rvlm.evaluation.rollouts",
    "rvlm.envs.tabletop.env",
    *(f"rvlm.evaluation.closed_loop:{name}" for name in _OWN),
)  # the code of an episode


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A policy and the episodes that it is to be judged on.

    Attributes:
        policy: Folder of a trained model, or "random" or "expert".
        control: What is taken from the policy, a name in `INPUT_ABLATIONS`.
        robot, families, setting, max_steps: Of the tabletop.
        n_episodes: Episodes; families take turns.
        first_seed: Seed of the first episode; they count up.
        n_action_steps, ensemble: What is executed of the predicted chunks, as `Policy` takes them.
    """

    policy: str
    n_episodes: int = 200
    control: str = "none"
    robot: str = "franka7"
    families: tuple[str, ...] = ()
    setting: str = "simple"
    max_steps: int = 50
    first_seed: int = FIRST_HELD_OUT_SEED
    n_action_steps: int | None = None
    ensemble: float | None = None

    def __post_init__(self) -> None:
        if self.control not in INPUT_ABLATIONS:
            raise ValueError(f"no control {self.control!r}; there are {', '.join(INPUT_ABLATIONS)}")
        if self.first_seed < FIRST_HELD_OUT_SEED:
            raise ValueError(
                f"evaluation seeds start at {FIRST_HELD_OUT_SEED}, since lower ones are trained on; got {self.first_seed}"
            )
        if isinstance(self.families, str) or not all(isinstance(name, str) for name in self.families or ()):
            raise ValueError(f"expected families as a tuple of names, got {self.families!r}; write ({self.families!r},)")
        if type(self.n_episodes) is not int or self.n_episodes < 1:
            raise ValueError(f"expected at least one episode, a whole number; got n_episodes={self.n_episodes!r}")

    def episodes(self) -> list[tuple[int, str]]:
        """(seed, family) of every episode, all seeds distinct."""
        from rvlm.envs.tabletop.tasks import DEFAULT_TASKS

        families = self.families or DEFAULT_TASKS
        return [(self.first_seed + i, families[i % len(families)]) for i in range(self.n_episodes)]

    @property
    def n_batches(self) -> int:
        """Batches that its episodes make."""
        return -(-self.n_episodes // BATCH)

    def batch_size(self, batch: int) -> int:
        """Episodes in one of its batches; the last may be smaller."""
        return min(BATCH, self.n_episodes - batch * BATCH)

    def is_done(self, batch: int, folder: Path | None = None) -> bool:
        """Whether a batch is on disk, with as many episodes as are asked for now; `folder` spares asking where again."""
        path, asked = (folder or self.folder) / f"{batch:05d}.parquet", self.batch_size(batch)
        try:
            n = len(pq.read_table(path)["seed"].unique())
        except (OSError, pa.ArrowInvalid) as error:  # none, or one that a broken disk has cut or changed: it is run again
            if getattr(error, "errno", None) not in (None, errno.ENOENT):
                raise
            return False
        return n == asked or (n > asked and self.control != "shuffled_language")  # who is told what depends on who is there

    @property
    def weights(self) -> str | None:
        """Hash of the policy's weights, or None where it has none."""
        return weights_hash(self.policy)

    @property
    def code(self) -> Code:
        """The code that its episodes depend on."""
        if self.policy in ("random", "expert"):
            return Code(EPISODES, without=("rvlm.evaluation.closed_loop:_load",))
        return Code((*EPISODES, "rvlm.policy.policy", "rvlm.evaluation.closed_loop:_load"))

    @property
    def folder(self) -> Path:
        """Where finished batches are kept: named by these settings, the robot's card, the policy's content, and the code."""
        content = {**dataclasses.asdict(self), "n_episodes": None, "spec": dataclasses.asdict(_spec(self.robot))}
        content["policy"] = self.policy if self.policy in ("random", "expert") else model_hash(self.policy)
        return artifacts_dir() / "evaluations" / config_hash({**content, "code": self.code.hash})

    def run(self, batch: int) -> list[dict]:
        """Roll out one of its batches in this process; rows as `rollout` gives them."""
        return run_batch(self, batch)


@functools.lru_cache(maxsize=2)
def make_envs(robot: str, setting: str, max_steps: int, image_size: int, n: int = BATCH) -> tuple:
    """Environments to run a batch in, kept for the next batch."""
    from rvlm.envs.tabletop.env import Tabletop

    return tuple(Tabletop(robot, image_size, setting=setting, max_steps=max_steps) for _ in range(n))


def _spec(robot: str) -> ActionSpec:
    return ActionSpec.from_card(f"tabletop_{robot}")


def _judged(evaluation: Evaluation) -> Any:
    """The policy that is judged; None for the expert."""
    asked, spec = evaluation.policy, _spec(evaluation.robot)
    if asked in ("random", "expert"):
        return RandomPolicy(spec) if asked == "random" else None
    return _load(asked, model_hash(asked), evaluation.n_action_steps, evaluation.ensemble, evaluation.robot)


@functools.lru_cache(maxsize=4)
def _load(policy: str, content: str, n_action_steps: int | None, ensemble: float | None, robot: str) -> Any:
    """A trained policy, loaded once as long as its content is the same."""
    from rvlm.policy.policy import load_policy

    return load_policy(
        policy, revision=commit_on_hub(policy), n_action_steps=n_action_steps, ensemble=ensemble, spec=_spec(robot)
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As in every worker: sums in another order can end an episode another way. One at a time, for they share environments."""
    import torch

    with _IN_THIS_PROCESS:
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(n_threads)


def _run_batch(evaluation: Evaluation, batch: int, folder: Path) -> int:
    """Run one batch of episodes in this process and keep its rows on disk."""
    started = time.time()
    with _one_thread():
        rows = evaluation.run(batch)
    table = pd.DataFrame(rows).assign(wall_s=(time.time() - started) / len(rows))
    atomic_write(folder / f"{batch:05d}.parquet", table.to_parquet())
    return len(rows)


def run_batch(evaluation: Evaluation, batch: int, keep_frames: bool = False) -> list[dict]:
    """Roll out one batch of an evaluation's episodes in this process; rows as `rollout` gives them."""
    episodes = evaluation.episodes()[batch * BATCH : (batch + 1) * BATCH]
    policy, envs = policy_and_envs(evaluation)
    return rollout(policy, envs[: len(episodes)], episodes, evaluation.control, keep_frames)


def policy_and_envs(evaluation: Evaluation) -> tuple[Any, tuple]:
    """The policy that is judged, and the environments of a batch, at the image size that it takes."""
    policy = _judged(evaluation)
    size = 96 if policy is None or isinstance(policy, RandomPolicy) else policy.image_size[0]
    return policy, make_envs(evaluation.robot, evaluation.setting, evaluation.max_steps, size)


@functools.lru_cache(maxsize=4)
def _replayed_batch(evaluation: Evaluation, batch: int, folder: Path) -> list[dict]:
    with _one_thread():  # as when it was evaluated
        return run_batch(evaluation, batch, keep_frames=True)


def replay_episode(evaluation: Evaluation, seed: int) -> dict:
    """Run an evaluated episode again, among the episodes it was run with, and keep its frames.

    Returns:
        Its row of `rollout`, with `frames`, `wrist_frames` (n, h, w, 3) uint8 and raw `actions` (n, a).

    Raises:
        ValueError: The evaluation has no such episode.
    """
    place = seed - evaluation.first_seed
    if not 0 <= place < evaluation.n_episodes:
        last = evaluation.first_seed + evaluation.n_episodes - 1
        raise ValueError(f"this evaluation has episodes with seeds {evaluation.first_seed} to {last}; got {seed}")
    return _replayed_batch(evaluation, place // BATCH, evaluation.folder)[place % BATCH]


def evaluate(evaluations: dict[str, Evaluation], n_workers: int = 2, show_progress: bool = True) -> pd.DataFrame:
    """Run evaluations, batches in parallel; batches that are on disk are not run again.

    Args:
        evaluations: Name in tables and figures -> evaluation.
        n_workers: Processes; 1 or less runs all in this one.
        show_progress: Whether to draw a progress bar.

    Returns:
        One row per episode: name, seed, family, instruction, is_success, failure, n_steps, policy_s, simulator_s, wall_s,
        control, setting, and the hash of the policy's weights.

    Raises:
        ValueError: Nothing is asked for, or shuffled language for two numbers of the same episodes, of which each tells others.
    """
    if not evaluations:
        raise ValueError('expected at least one evaluation, got none; as {"shipped": Evaluation(folder)}')
    folders = {name: evaluation.folder for name, evaluation in evaluations.items()}
    asked = _largest(evaluations, folders)
    jobs, total = [], sum(evaluation.n_episodes for evaluation in asked.values())
    for folder, evaluation in asked.items():
        folder.mkdir(parents=True, exist_ok=True)
        todo = [batch for batch in range(evaluation.n_batches) if not evaluation.is_done(batch, folder)]
        if todo:
            evaluation.code.require_unchanged()
        register(folder, evaluation.code, dataclasses.asdict(evaluation), [evaluation.policy])
        jobs += [(evaluation, batch, folder) for batch in todo]
    with tqdm(total=total, desc="episodes", disable=not show_progress) as bar:
        bar.update(total - sum(e.batch_size(b) for e, b, _ in jobs))
        for n in in_parallel(_run_batch, jobs, n_workers):
            bar.update(n)
    return pd.concat([_read(name, e, folders[name]) for name, e in evaluations.items()], ignore_index=True)


def _largest(evaluations: dict[str, Evaluation], folders: dict[str, Path]) -> dict[Path, Evaluation]:
    """Of those that differ in their number of episodes alone the one with most, which holds the others' episodes."""
    largest: dict[Path, Evaluation] = {}
    for name, evaluation in evaluations.items():
        other = largest.setdefault(folders[name], evaluation)
        if evaluation.n_episodes != other.n_episodes and evaluation.control == "shuffled_language":
            raise ValueError(
                f"{name!r}: expected one number of episodes with shuffled language, for who is there decides who is told what; "
                f"got {evaluation.n_episodes} and {other.n_episodes}; evaluate them one after the other"
            )
        largest[folders[name]] = max(evaluation, other, key=lambda e: e.n_episodes)
    return largest


def _read(name: str, evaluation: Evaluation, folder: Path) -> pd.DataFrame:
    parts = [folder / f"{batch:05d}.parquet" for batch in range(evaluation.n_batches)]
    table = pd.concat([pd.read_parquet(p) for p in parts], ignore_index=True)
    table = table.loc[table["seed"] < evaluation.first_seed + evaluation.n_episodes]
    judged = {"control": evaluation.control, "setting": evaluation.setting, "policy": evaluation.weights or evaluation.policy}
    return table.assign(name=name, **judged)


def success_table(episodes: pd.DataFrame, by: Sequence[str] = ("name",)) -> pd.DataFrame:
    """Successes with 95 % intervals: Wilson's, or over trainings too where there are several, by `success_rate`.

    Args:
        episodes: As `evaluate` gives them; a column `training` tells where a policy was trained several times.
        by: Columns that make the groups.

    Returns:
        One row per group: the columns in `by`, then successes, n, rate, low, high, and where a group has several, trainings.
    """
    rows, columns = [], [by] if isinstance(by, str) else list(by)
    for key, group in episodes.groupby(columns, sort=False):
        is_several = "training" in group and len(set(group["training"])) > 1
        alone = wilson(int(group["is_success"].to_numpy().sum()), len(group))
        rate = success_rate(_outcomes(group, "training")) if is_several else alone
        counts = {"successes": rate.successes, "n": rate.n, "rate": rate.rate, "low": rate.low, "high": rate.high}
        counts |= {"trainings": len(set(group["training"]))} if is_several else {}
        rows.append({**dict(zip(columns, cast(tuple, key), strict=True)), **counts})
    return pd.DataFrame(rows)


def success_differences(episodes: pd.DataFrame, claims: Mapping[str, tuple[str, str]]) -> dict[str, Difference]:
    """How many more of the same episodes one policy solves than another, by `rvlm.statistics.paired_difference`.

    Several claims of one notebook are judged together by `rvlm.statistics.holm`.

    Args:
        episodes: As `evaluate` gives them; a column `training` tells where a policy was trained several times.
        claims: What is claimed -> (name of the policy that is said to be better, name of the other).

    Raises:
        ValueError: A claim is about a policy that is not there, the policies were not judged on the same episodes, one of them
            twice, or not trained equally often, or one training stands for two.
    """
    names, known = list(dict.fromkeys(name for pair in claims.values() for name in pair)), list(episodes["name"].unique())
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"expected claims about policies in 'name', got {missing}; there are {known}")
    asked = episodes.loc[episodes["name"].isin(names)]
    if {"training", "policy"} <= set(asked):
        _check_trainings(asked)
    solved = _outcomes(asked if "training" in asked else asked.assign(training=0), ["name", "training"])
    return {c: paired_difference(solved.loc[a].to_numpy(), solved.loc[b].to_numpy()) for c, (a, b) in claims.items()}


def _check_trainings(episodes: pd.DataFrame) -> None:
    """Trainings of one name have weights of their own."""
    for name, group in episodes.groupby("name", sort=False):
        n_trainings, n_weights = len(set(group["training"])), len(set(group["policy"]))
        if n_weights < n_trainings:
            raise ValueError(
                f"{name!r} has {n_trainings} trainings, but {n_weights} different weights; one policy judged twice is one "
                "training: train again with another seed"
            )


def _outcomes(episodes: pd.DataFrame, trained: str | list[str]) -> pd.DataFrame:
    """Success in {0, 1} of each training (a row) in each episode (a column)."""
    keys = [*([trained] if isinstance(trained, str) else trained), "seed"]
    if (twice := episodes[keys][episodes.duplicated(keys)]).size:
        raise ValueError(
            f"expected each episode once, got {len(twice)} twice, as {twice.iloc[0].to_dict()}; give each training of a policy a "
            "number in a column 'training', and tables that hold the same episodes once"
        )
    solved = episodes.astype({"is_success": float}).pivot(index=trained, columns="seed", values="is_success")
    if solved.isna().any(axis=None):
        short = solved.index[solved.isna().any(axis=1)].tolist()
        raise ValueError(f"expected all policies judged on the same episodes; {short} lack some of {solved.shape[1]} seeds")
    return solved
