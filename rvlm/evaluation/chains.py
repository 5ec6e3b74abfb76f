"""Long-horizon evaluation: chains of subtasks in one scene, as in CALVIN.

The suite samples the chains (`Suite.sample_chains`); its environment keeps the scene between subtasks (the reset option
"keep_state") and lists the tasks that are feasible in it (`feasible()`). The first failure ends the chain. Reported are the
success rates of 1 to 5 subtasks in a row, and the mean number of subtasks in a row.

Source: Mees et al. 2022 (CALVIN, arXiv 2112.03227), section III-D on long-horizon evaluation.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from rvlm.caches import Code
from rvlm.envs.suite_checks import SuiteError
from rvlm.envs.suites import method_of
from rvlm.evaluation.acting import policy_and_envs
from rvlm.evaluation.closed_loop import EPISODES_PER_BATCH, Evaluation
from rvlm.evaluation.rollouts import rollout
from rvlm.evaluation.success import success_table
from rvlm.importing import code_roots
from rvlm.statistics import Mean, mean_interval

LENGTH = 5
SEED_STRIDE = 1_000_000  # between the seeds of a chain's subtasks


def rollout_chains(
    policy: Any, envs: Sequence[Any], seeds: Sequence[int], chains: Sequence[tuple], ablation: str = "none"
) -> list[dict]:
    """Run one chain in each environment, subtask by subtask; failed chains stop.

    Returns:
        Rows of `rollout` with `subtask`, counted from 0; failure "infeasible" where the state does not allow the next subtask.
    """
    rows, running = [], list(range(len(envs)))
    for subtask in range(len(chains[0])):
        if subtask:
            infeasible = [i for i in running if chains[i][subtask] not in method_of(envs[i], "feasible", "a chain")()]
            failed = {"subtask": subtask, "instruction": "", "is_success": False, "failure": "infeasible", "n_steps": 0}
            rows += [{"seed": seeds[i], "task": chains[i][subtask], **failed} for i in infeasible]
            running = [i for i in running if i not in infeasible]
        if not running:
            break
        episodes = [(seeds[i] + subtask * SEED_STRIDE, chains[i][subtask]) for i in running]
        part = rollout(policy, [envs[i] for i in running], episodes, ablation, keep_state=subtask > 0)
        rows += [{**row, "seed": seeds[i], "subtask": subtask} for i, row in zip(running, part, strict=True)]
        running = [i for i, row in zip(running, part, strict=True) if row["is_success"]]
    return rows


@dataclasses.dataclass(frozen=True)
class ChainEvaluation(Evaluation):
    """A policy and the chains to evaluate it on; `n_episodes` counts chains.

    Attributes:
        length: Subtasks per chain.
    """

    length: int = LENGTH

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loaded_suite.sample_chains is None:
            raise SuiteError(
                f"{self.loaded_suite.name} has no chains; expected a suite with sample_chains, such as the tabletop's"
            )

    @property
    def code(self) -> Code:
        """The code that computes its chains."""
        episode_code = super().code
        sampling = code_roots(self.loaded_suite.sample_chains)
        unused = ("rvlm.evaluation.closed_loop", "rvlm.evaluation.acting", "rvlm.evaluation.success", "rvlm.statistics")
        return Code((*episode_code.roots, "rvlm.evaluation.chains", *sampling), without=(*episode_code.without, *unused))

    def run(self, batch: int) -> list[dict]:
        """Run one of its batches in this process; rows as `rollout_chains` gives them."""
        first = self.first_seed + batch * EPISODES_PER_BATCH
        seeds = range(first, first + self.batch_size(batch))
        policy, envs = policy_and_envs(self, len(seeds))
        sample: Any = self.loaded_suite.sample_chains
        chains = sample(seeds, self.task_names, self.length)
        return rollout_chains(policy, envs, seeds, chains, self.ablation)


def chain_lengths(episodes: pd.DataFrame) -> pd.Series:
    """Number of subtasks solved in a row per chain (indexed by its seed), from the rows of one policy."""
    solved: Any = episodes.groupby("seed")["is_success"].sum()
    return solved.astype(int)


def success_at_k(episodes: pd.DataFrame, length: int = LENGTH) -> pd.DataFrame:
    """Success rates of the first k subtasks, with 95 % Wilson intervals over chains.

    Args:
        episodes: Rows of `rollout_chains`, with `name`.
        length: Subtasks per chain.

    Returns:
        One row per name and k (1 to length): name, k, successes, n, rate, low, high.
    """
    solved = [(name, n) for name, group in episodes.groupby("name", sort=False) for n in chain_lengths(group)]
    rows = [{"name": name, "k": k, "is_success": n >= k} for name, n in solved for k in range(1, length + 1)]
    return success_table(pd.DataFrame(rows), ("name", "k"))


def avg_len(episodes: pd.DataFrame, length: int = LENGTH) -> dict[str, Mean]:
    """CALVIN's mean number of subtasks solved in a row (0 to `length`) by name, with a 95 % interval over chains."""
    solved = {str(name): chain_lengths(group) for name, group in episodes.groupby("name", sort=False)}
    return {name: mean_interval(n, bounds=(0, length)) for name, n in solved.items()}
