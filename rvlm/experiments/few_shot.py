"""New tasks for a trained policy: few demonstrations (support) judged on new scenes (query), and tasks one after another."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rvlm.envs.tabletop.demonstrations import Collection, collect_demonstrations
from rvlm.evaluation.closed_loop import Evaluation, evaluate
from rvlm.experiments.recipes import ONE_STEP
from rvlm.training.launch import train, train_parallel
from rvlm.training.stages import ROBOT, Stage


@dataclasses.dataclass(frozen=True)
class FewShot:
    """An experiment with few demonstrations.

    Attributes:
        families: Held-out task families.
        shots: Demonstrations of each family that a policy is shown (support).
        n_query: Episodes of new scenes that it is judged on, families taking turns.
        n_samples: Budget of each adaptation; the same whatever the shots.
        seeds: Of adaptations; each draws its own support.
        n_support: Demonstrations of each family that shots are drawn from.
        robot: Embodiment.
        changes: Fields of `Stage` that differ from its own.
    """

    families: tuple[str, ...]
    shots: tuple[int, ...] = (1, 5, 10, 25)
    n_query: int = 40
    n_samples: int = 2000
    seeds: tuple[int, ...] = (0, 1)
    n_support: int = 60
    robot: str = "franka7"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def support(self) -> Collection:
        """Demonstrations that shots are drawn from; a tenth of them is held out, as ever."""
        return Collection(self.robot, self.n_support * len(self.families), self.families)

    def stage(self, init: str | Path, shots: int, seed: int, **changes: Any) -> Stage:
        """Adapt `init`, a policy or a vision-language model, to so many shots."""
        fixed = {"shots": shots, "seed": seed, "n_processes": 1, "policy": ONE_STEP, **self.changes, **changes}
        return Stage("few_shot", ROBOT, (str(collect_demonstrations(self.support)),), str(init), self.n_samples, **fixed)

    def query(self, policy: str | Path) -> Evaluation:
        """The new scenes."""
        return Evaluation(str(policy), self.n_query, robot=self.robot, families=self.families)


def few_shot_experiment(starts: Mapping[str, Mapping[str, Any]], experiment: FewShot, n_workers: int = 2) -> pd.DataFrame:
    """Adapt every start to every number of shots with every seed, and judge each on the query set.

    Args:
        starts: Name -> `init`, and fields of `Stage` that this start needs (`is_pretrained`, `finetuning`).
        experiment: What is asked.
        n_workers: Processes that evaluate.

    Returns:
        Episodes as `rvlm.evaluation.closed_loop.evaluate` gives them, with columns `start`, `shots` and `training` (the seed).
    """
    stages = {
        f"{name}|{shots}|{seed}": experiment.stage(shots=shots, seed=seed, **start)
        for seed in experiment.seeds
        for name, start in starts.items()
        for shots in experiment.shots
    }
    models = train_parallel(stages)
    episodes = evaluate({name: experiment.query(model) for name, model in models.items()}, n_workers)
    episodes[["start", "shots", "training"]] = episodes["name"].str.split("|", expand=True).to_numpy()
    return episodes.assign(shots=episodes["shots"].astype(int))


def continual_learning(
    init: str | Path, tasks: Mapping[str, Collection], n_samples: int, replay: float, seed: int = 0, **changes: Any
) -> dict[str, Path]:
    """Continual learning: the tasks of each collection after those before it.

    Args:
        init: A policy.
        tasks: Name -> demonstrations, in the order in which they come.
        n_samples: Budget of each.
        replay: Share of samples that are demonstrations of what came before; 0 for none.
        seed: Of every stage.
        changes: Fields of `Stage` that differ from its own.

    Returns:
        Name -> the policy after these tasks.
    """
    if not 0 <= replay < 1:
        raise ValueError(f"expected replay as a share from 0 to below 1, got {replay}")
    before: list[str] = []
    models, model = {}, Path(init)
    for name, collection in tasks.items():
        new = str(collect_demonstrations(collection))
        data, weights = (new,), ()
        if replay and before:
            data, weights = (new, *before), (1 - replay, *[replay / len(before)] * len(before))
        fixed = {"seed": seed, "n_processes": 1, "weights": weights, **changes}
        model = train(Stage("continual", ROBOT, data, str(model), n_samples, **fixed), n_threads=1)
        models[name], before = model, [*before, new]
    return models
