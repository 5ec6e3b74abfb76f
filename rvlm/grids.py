"""Search over a stage's settings with Optuna: one storage that many processes or machines share, resumable, pruned.

The storage is an address as Optuna takes it: an SQLite file here, PostgreSQL or MySQL where machines share a study.
Source of the large grid: RoboVLMs (arXiv 2412.14058), appendix on hyper-parameters.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from rvlm.files import artifacts_dir
from rvlm.stages import Stage
from rvlm.training import run

Grid = Mapping[str, Sequence[Any]]
PAPER: Grid = {  # one GPU node and more
    "learning_rate": (1e-4, 2e-5, 1e-5),
    "weight_decay": (0.0, 0.1),
    "batch_size": (128, 256, 512),
    "warmup": (0.25, 0.5),
}
SMALL: Grid = {  # two CPU cores, from the shipped model
    "learning_rate": (3e-3, 1e-3, 3e-4),
    "weight_decay": (0.0, 0.1),
    "batch_size": (8, 32),
    "warmup": (0.03, 0.25),
}
logging.getLogger("optuna").setLevel(logging.WARNING)


def storage_of(name: str) -> str:
    """Address of the study's own SQLite file among the artifacts."""
    folder = artifacts_dir() / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / name}.db"


def study_of(name: str, grid: Grid, storage: str | None = None, seed: int = 0) -> optuna.Study:
    """The study of this name, as it is by now; made if there is none.

    Trials that are worse than the median of those before them at the same step are stopped.
    """
    return optuna.create_study(
        storage=storage or storage_of(name),
        study_name=name,
        sampler=optuna.samplers.GridSampler({key: list(values) for key, values in grid.items()}, seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        direction="minimize",
        load_if_exists=True,
    )


def search(
    name: str,
    grid: Grid,
    make: Callable[..., Stage],
    score: Callable[[Path], float],
    n_trials: int,
    storage: str | None = None,
    n_threads: int | None = None,
    seed: int = 0,
) -> optuna.Study:
    """Go on with a study until it has `n_trials`, with all who do the same at the same time.

    Args:
        name: Of the study.
        grid: Setting -> values.
        make: Settings by name -> stage.
        score: Folder of a trained model -> what is to be small.
        n_trials: That end or are stopped, over all processes.
        storage: Address; the study's own SQLite file if left out.
        n_threads: Of each training.
        seed: Of the order in which the grid is tried.

    Returns:
        The study.
    """
    study = study_of(name, grid, storage, seed)

    def attempt(trial: optuna.Trial) -> float:
        stage = make(**{key: trial.suggest_categorical(key, list(values)) for key, values in grid.items()})
        watch = functools.partial(_watch, trial, set())
        return score(run(stage, show_progress=False, n_threads=n_threads, watch=watch))

    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    if len(study.get_trials(deepcopy=False, states=states)) < n_trials:
        study.optimize(attempt, callbacks=[optuna.study.MaxTrialsCallback(n_trials, states=states)], n_trials=n_trials)
    return study


def _watch(trial: optuna.Trial, told: set[int], entry: Mapping[str, float]) -> None:
    """Tell the study how a training is doing, each tenth once; stops one that does badly."""
    tenth = int(10 * entry["step"] / entry["n_steps"])
    if "loss" in entry and tenth not in told:
        told.add(tenth)
        trial.report(entry["loss"], tenth)
        if trial.should_prune():
            raise optuna.TrialPruned


def table(study: optuna.Study) -> pd.DataFrame:
    """Its trials: settings, `value` (missing where it was stopped), `state`, `seconds`."""
    frame = study.trials_dataframe(("number", "params", "value", "state", "duration"))
    frame = frame[frame["state"].isin(["COMPLETE", "PRUNED"])]
    frame["value"] = frame["value"].where(frame["state"] == "COMPLETE")  # of others it is the last loss that was reported
    return frame.rename(columns=lambda name: name.removeprefix("params_")).assign(seconds=frame["duration"].dt.total_seconds())


def importance(study: optuna.Study) -> pd.Series:
    """How much of the spread of good trials each setting accounts for. Source: PED-ANOVA (arXiv 2304.10255)."""
    told = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return pd.Series(told, name="importance")
