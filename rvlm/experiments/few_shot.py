"""Few-shot adaptation to new tasks (support and query sets), and continual learning of a sequence of tasks."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rvlm.envs.demonstrations import Collection, collect_demonstrations
from rvlm.evaluation.closed_loop import Evaluation, evaluate
from rvlm.experiments.recipes import ONE_STEP
from rvlm.training.launch import train, train_parallel
from rvlm.training.stages import ROBOT, Stage


@dataclasses.dataclass(frozen=True)
class FewShot:
    """A few-shot experiment.

    Attributes:
        tasks: Held-out tasks.
        shots: Numbers of demonstrations per task to train on (support set).
        n_query: Evaluation episodes in new scenes, alternating between tasks (query set).
        n_samples: Training budget, the same for all shots.
        seeds: Of trainings; each draws its own support set.
        n_support: Demonstrations per task to draw shots from.
        suite: Environment with an expert, as `load_suite` takes it.
        changes: Fields of `Stage` to change from its defaults.
    """

    tasks: tuple[str, ...]
    shots: tuple[int, ...] = (1, 5, 10, 25)
    n_query: int = 40
    n_samples: int = 2000
    seeds: tuple[int, ...] = (0, 1)
    n_support: int = 60
    suite: str = "tabletop/franka7"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def support(self) -> Collection:
        """Demonstrations to draw shots from; a tenth of them is held out, as by `split`."""
        return Collection(self.suite, self.n_support * len(self.tasks), self.tasks)

    def stage(self, init: str | Path, shots: int, seed: int, **changes: Any) -> Stage:
        """The stage that fine-tunes `init`, a policy or a vision-language model, on `shots` demonstrations per task."""
        fields = {"shots": shots, "seed": seed, "n_processes": 1, "policy": ONE_STEP, **self.changes, **changes}
        return Stage("few_shot", ROBOT, (str(collect_demonstrations(self.support)),), str(init), self.n_samples, **fields)

    def query(self, policy: str | Path) -> Evaluation:
        """The evaluation of a policy on the query set."""
        return Evaluation(str(policy), self.n_query, self.suite, self.tasks)


def few_shot_experiment(starts: Mapping[str, Mapping[str, Any]], experiment: FewShot, n_workers: int = 2) -> pd.DataFrame:
    """Fine-tune every start on every number of shots with every seed, and evaluate each on the query set.

    Args:
        starts: Name -> `init`, and other fields of `Stage` (`is_pretrained`, `finetuning`).
        experiment: Tasks, shots and seeds.
        n_workers: Processes of the evaluation.

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
    """Continual learning: fine-tune on one collection after another, with replay of earlier ones.

    Args:
        init: Folder of a policy.
        tasks: Name -> demonstrations, in order of training.
        n_samples: Budget of each stage.
        replay: Share of samples from earlier collections; 0 for none.
        seed: Of every stage.
        changes: Fields of `Stage` to change from its defaults.

    Returns:
        Name -> folder of the policy after this collection.
    """
    if not 0 <= replay < 1:
        raise ValueError(f"expected replay as a share from 0 to below 1, got {replay}")
    earlier: list[str] = []
    models, model = {}, Path(init)
    for name, collection in tasks.items():
        new = str(collect_demonstrations(collection))
        data, weights = (new,), ()
        if replay and earlier:
            data, weights = (new, *earlier), (1 - replay, *[replay / len(earlier)] * len(earlier))
        fields = {"seed": seed, "n_processes": 1, "data_weights": weights, **changes}
        model = train(Stage("continual", ROBOT, data, str(model), n_samples, **fields), n_threads=1)
        models[name], earlier = model, [*earlier, new]
    return models
