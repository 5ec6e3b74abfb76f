"""Time saved by no longer stepping finished episodes: the shipped policy's evaluation, both ways in turn.

Every batch of ten episodes of the setting `simple` is rolled out twice: with a policy that computes actions for the running
episodes alone, and with one that computes them for all ten until the last has ended. Prints the ratio of CPU seconds over all
episodes, its range over batches, the share of rows that run, and how many outcomes differ.
"""

import time

import numpy as np
import torch

from rvlm.evaluation.closed_loop import EPISODES_PER_BATCH, Evaluation, policy_and_envs
from rvlm.evaluation.rollouts import rollout
from rvlm.experiments.recipes import POLICY

N_EPISODES = 200


class AllToTheEnd:
    """A policy without a smaller batch: it computes actions for all robots until the last episode ends."""

    def __init__(self, policy):
        self.reset, self.select_action = policy.reset, policy.select_action


def main():
    torch.set_num_threads(1)
    evaluation = Evaluation(str(POLICY), N_EPISODES)
    policy, envs = policy_and_envs(evaluation)
    episodes, seconds, differ, rows_used = evaluation.episodes(), [], 0, []
    for batch in range(evaluation.n_batches):
        chosen = episodes[batch * EPISODES_PER_BATCH : (batch + 1) * EPISODES_PER_BATCH]
        took, outcomes = [], []
        ways = [policy, AllToTheEnd(policy)]
        for way in ways if batch % 2 else ways[::-1]:
            started = time.process_time()
            rows = rollout(way, envs[: len(chosen)], chosen)
            took.append(time.process_time() - started)
            outcomes.append([row["is_success"] for row in rows])
        seconds.append(took if batch % 2 else took[::-1])
        differ += int(np.sum(np.array(outcomes[0]) != outcomes[1]))
        steps = [row["n_steps"] for row in rows]
        rows_used.append(sum(steps) / (len(steps) * max(steps)))
    now, before = np.array(seconds).T
    low, high = np.quantile(before / now, [0.25, 0.75])
    print(
        f"all to the end / what runs, {N_EPISODES} episodes: {before.sum() / now.sum():.2f} (batches {low:.2f} to {high:.2f})   "
        f"{before.sum():.1f} s / {now.sum():.1f} s   {100 * np.mean(rows_used):.0f} % of rows run   {differ} outcomes differ"
    )


if __name__ == "__main__":
    main()
