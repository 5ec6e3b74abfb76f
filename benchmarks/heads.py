"""Success of every action head at one budget on the tabletop, as one table with intervals.

    python benchmarks/heads.py [--heads flow fast ...] [--trainings 3] [--episodes 60] [--samples 12000] [--workers N]

Every head is trained from the shipped vision-language model on the same demonstrations, with the same samples, batches, seeds,
chunk size, executed actions and learning rate, at its default settings but for the vocabulary of "fast", and evaluated in the
same scenes, which no setting was chosen on. Heads differ in weights too, which the table tells, and in time. Each is compared
with random actions in the same scenes (Holm); no contrast between heads is stated before the run, so there is no verdict on
them. Trains and evaluates what is not cached, so a run that was stopped goes on; writes `results/tables/heads.csv` and `.tex`,
and the setup with commit and hardware to `results/heads.json`.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np

from rvlm import load_policy
from rvlm.evaluation.closed_loop import Evaluation, evaluate
from rvlm.evaluation.success import outcome_table, success_table
from rvlm.experiments.recipes import ONE_STEP
from rvlm.experiments.robots import RobotRecipe
from rvlm.files import atomic_write, results_dir
from rvlm.provenance import provenance
from rvlm.report.findings import save_table
from rvlm.statistics import holm, paired_difference, verdict
from rvlm.training.launch import train_parallel

HEADS = {  # row of the table -> fields of `VLAConfig`
    "mlp": {"head": "mlp"},
    "flow": {"head": "flow"},
    "expert": {"head": "expert"},
    "tokens, autoregressive": {"head": "tokens"},
    "tokens, parallel": {"head": "tokens", "head_options": {"decoding": "parallel"}},
    "fast": {"head": "fast", "head_options": {"n_vocab": 256}},  # few demonstrations: byte pairs that are frequent enough
}
SUITE = "tabletop/franka7"
TASKS = ("move_slider_left", "move_slider_right", "open_drawer", "turn_on_light")  # that this budget suffices for


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--trainings", type=int, default=3)
    parser.add_argument("--first-training", type=int, default=1, help="seed")
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--first-seed", type=int, default=910_000, help="of the scenes")
    parser.add_argument("--demonstrations", type=int, default=240)
    parser.add_argument("--samples", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=8, help="samples per optimizer step")
    parser.add_argument("--chunk", type=int, default=8, help="actions predicted")
    parser.add_argument("--executed", type=int, default=4, help="actions executed of a chunk")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    return parser.parse_args()


def stages(options):
    """(head, seed) -> its training."""
    recipe = RobotRecipe(SUITE, TASKS, n_demonstrations=options.demonstrations, n_samples=options.samples)
    base = {**ONE_STEP, "chunk_size": options.chunk, "n_action_steps": options.executed}
    return {
        (head, seed): recipe.stage(seed, policy={**base, **HEADS[head]}, batch_size=options.batch)
        for head in options.heads
        for seed in range(options.first_training, options.first_training + options.trainings)
    }


def n_weights(model: Path) -> int:
    """Weights of a policy's head."""
    return sum(weight.numel() for weight in load_policy(model).model.head.parameters())


def gains_over_chance(episodes):
    """Head -> success minus that of random actions in the same scenes, adjusted together (Holm)."""
    outcomes = {head: outcome_table(rows, ["training"]).to_numpy() for head, rows in episodes.groupby("name", sort=False)}
    chance = outcomes.pop("random actions")
    return holm({
        head: paired_difference(own, np.broadcast_to(chance, own.shape), same_trainings=True) for head, own in outcomes.items()
    })  # fmt: skip


def main():
    options = arguments()
    started, wanted = time.perf_counter(), stages(options)
    models = train_parallel({f"{head}|{seed}": stage for (head, seed), stage in wanted.items()})
    trained_s = time.perf_counter() - started
    policies = {**models, "random actions|0": "random"}
    common = {"n_episodes": options.episodes, "first_seed": options.first_seed, "suite": SUITE, "tasks": TASKS}
    evaluations = {name: Evaluation(str(policy), **common) for name, policy in policies.items()}
    episodes = evaluate(evaluations, options.workers)
    episodes[["name", "training"]] = episodes["name"].str.split("|", expand=True).to_numpy()
    table = success_table(episodes).rename(columns={"name": "head"})
    weights = {head: n_weights(models[f"{head}|{options.first_training}"]) for head in options.heads}
    table["head weights"] = table["head"].map(weights).astype("Int64")
    table["trainings"] = table["trainings"].fillna(1).astype(int)
    setup = {**vars(options), "suite": SUITE, "tasks": TASKS, "policies": HEADS}
    setup |= {"stage": dataclasses.asdict(next(iter(wanted.values()))), "trained_s": round(trained_s)}
    setup["stage"] = {k: v for k, v in setup["stage"].items() if k not in ("policy", "data", "init", "seed")}
    gains = [
        {"head": head, "gain": gain.estimate, "low": gain.low, "high": gain.high, "verdict": verdict(gain)}
        for head, gain in gains_over_chance(episodes).items()
    ]
    record = {**setup, **provenance(), "gains": gains, "rows": json.loads(table.to_json(orient="records"))}
    atomic_write(results_dir() / "heads.json", json.dumps(record, indent=1))
    print(save_table(table, "heads").round(3).to_string(index=False))
    print(f"trained in {trained_s:.0f} s, evaluated in {time.perf_counter() - started - trained_s:.0f} s")


if __name__ == "__main__":
    main()
