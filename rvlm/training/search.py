"""Search over a stage's settings with Optuna: one storage that many processes or machines share, resumable, pruned.

The storage is an address as Optuna takes it: an SQLite file here, PostgreSQL or MySQL where machines share a study.
Source of the large grid: RoboVLMs (arXiv 2412.14058), appendix on hyper-parameters.
"""

import contextlib
import functools
import inspect
import itertools
import json
import logging
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from filelock import FileLock

from rvlm.caches import Code
from rvlm.code_hash import hash_of_code
from rvlm.files import PACKAGE, artifacts_dir, config_hash
from rvlm.training.launch import train
from rvlm.training.stages import ROBOT, UNUSED, Stage
from rvlm.training.trainer import TrainingDiverged

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
# Of a study's trials; other code makes those of another study.
SEARCH_CODE = Code(("rvlm.training.trainer", "rvlm.training.launch"), (*UNUSED[ROBOT], "rvlm.envs"))
REASON = "reason"  # of a trial that failed: why
logging.getLogger("optuna").setLevel(logging.WARNING)


def default_storage(name: str) -> str:
    """Address of the study's own SQLite file among the artifacts; one for each code that trains.

    Raises:
        ValueError: The name cannot be a file's.
    """
    if not re.fullmatch(r"\w[\w .,=+-]*", name):
        raise ValueError(
            f"study {name!r}: expected a name of letters, digits, '_', '-', '.', ',', '=', '+' or blanks, for a file's"
        )
    folder = artifacts_dir() / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / name}-{SEARCH_CODE.hash}.db"


def load_or_create_study(name: str, grid: Grid, storage: str | None = None, seed: int = 0) -> optuna.Study:
    """The study of this name, as it is by now; made if there is none.

    Trials that are worse than the median of those before them at the same step are stopped.

    Raises:
        ValueError: The name cannot be a file's, or the study was begun over another grid or by other code.
    """
    address = storage or default_storage(name)
    with _lock(address):  # two that make one file at once both fail
        study = optuna.create_study(
            storage=address,
            study_name=name,
            sampler=optuna.samplers.GridSampler({key: list(_labels(key, grid[key])) for key in grid}, seed=seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
            direction="minimize",
            load_if_exists=True,
        )
        _refuse_unlike_before(study, {"by other code that trains": SEARCH_CODE.hash}, f" in {address}")
    _refuse_other_grid(study, grid)
    return study


def _lock(address: str) -> contextlib.AbstractContextManager:
    """Of a study in a file; a server keeps order itself."""
    path = address.removeprefix("sqlite:///")
    return FileLock(f"{path}.lock") if path != address else contextlib.nullcontext()


def _labels(key: str, values: Sequence[Any]) -> dict[Any, Any]:
    """What stands for each value in a study's storage, which keeps scalars alone: others as JSON."""
    try:
        labels = {v if v is None or isinstance(v, (bool, int, float, str)) else json.dumps(v): v for v in values}
    except TypeError as error:
        raise ValueError(f"grid: expected values of {key!r} that JSON can hold, got {values!r} ({error})") from error
    if len(labels) != len(values) or not labels:
        raise ValueError(f"grid: expected one or more values of {key!r}, each once, got {values!r}")
    return labels


def _refuse_other_grid(study: optuna.Study, grid: Grid) -> None:
    """A study's trials are compared with each other, so all are of one grid."""
    for trial in study.get_trials(deepcopy=False):
        begun: dict[str, Any] = {key: list(d.choices) for key, d in trial.distributions.items() if hasattr(d, "choices")}
        for key, values in begun.items():
            now = list(_labels(key, grid[key])) if key in grid else None
            if now != values:
                raise ValueError(
                    f"study {study.study_name!r} was begun with {key!r} of {values}, got {now or 'no such setting'}; go on with "
                    "the same grid, or give the new one another name"
                )
        missing = [key for key in grid if begun and trial.state.is_finished() and key not in begun]
        if missing:
            raise ValueError(
                f"study {study.study_name!r} was begun with {', '.join(begun)}, got {', '.join(missing)} too; go on with the "
                "same grid, or give the new one another name"
            )


def _refuse_unlike_before(study: optuna.Study, now: Mapping[str, str], where: str = "") -> None:
    """A study's trials are compared with each other: what stands for that which they share stays as it was when it was begun."""
    for what, value in now.items():
        begun = study.user_attrs.get(what, value)
        study.set_user_attr(what, begun)
        if begun != value:
            raise ValueError(f"study {study.study_name!r}{where} was begun {what}; give the new one another name")


def _code_of_score(score: Callable[[Path], float]) -> list[Any]:
    """What stands for it: what it does, by its compiled code, and the modules of the package that it names."""
    if not isinstance(score, types.FunctionType):
        raise ValueError(f"expected the score as a function, got {score!r}; give a def or a lambda of one argument")
    compiled, todo = [], [score.__code__]
    while todo:
        code = todo.pop()
        inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
        todo += inner
        compiled.append([code.co_code.hex(), repr([c for c in code.co_consts if c not in inner]), code.co_names])
    named = [score.__globals__[name] for _, _, names in compiled for name in names if name in score.__globals__]
    modules = {value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) or "" for value in named}
    return [compiled, hash_of_code(*sorted(name for name in modules if name.startswith(f"{PACKAGE.name}.")))]


def search(
    name: str,
    grid: Grid,
    make: Callable[..., Stage],
    score: Callable[[Path], float],
    n_trials: int,
    storage: str | None = None,
    n_threads: int | None = None,
    seed: int = 0,
    scored_on: str = "",
) -> optuna.Study:
    """Go on with a study until it has `n_trials`, with all who do the same at the same time.

    A training that diverges is a trial that failed, with its reason in `table`; one that was killed or stopped by hand is
    tried again.

    Args:
        name: Of the study.
        grid: Setting -> values.
        make: Settings by name -> stage.
        score: Folder of a trained model -> what is to be small.
        n_trials: That end, are stopped or diverge, over all processes.
        storage: Address; the study's own SQLite file if left out.
        n_threads: Of each training.
        seed: Of the order in which the grid is tried.
        scored_on: What stands for the data that the score reads, as `rvlm.files.folder_hash` of its folder.

    Returns:
        The study.

    Raises:
        ValueError: As `load_or_create_study`, or the study was begun on other data, from another start or with another score.
    """
    study = load_or_create_study(name, grid, storage, seed)
    labels = {key: _labels(key, values) for key, values in grid.items()}
    points = itertools.product(*(of.values() for of in labels.values()))
    stages = [make(**dict(zip(labels, point, strict=True))).folder.name for point in points]
    shared = {  # for data and start the stages' folders stand
        "with other data, start or settings": config_hash({"stages": sorted(stages)}),
        "with another score": config_hash({"code": _code_of_score(score), "on": scored_on}),
    }
    with _lock(storage or default_storage(name)):
        _refuse_unlike_before(study, shared)

    def attempt(trial: optuna.Trial) -> float:
        stage = make(**{key: of[trial.suggest_categorical(key, list(of))] for key, of in labels.items()})
        watch = functools.partial(_report_and_prune, trial, set())
        try:
            value = score(train(stage, show_progress=False, n_threads=n_threads, watch=watch))
            if math.isnan(value):
                raise TrainingDiverged(f"stage {stage.name!r}: its score is no number")
            return value
        except TrainingDiverged as error:
            trial.set_user_attr(REASON, str(error))
            raise

    def stop_if_enough(study: optuna.Study, _: Any = None) -> None:
        if len(_counted(study)) >= n_trials:
            study.stop()

    n_trials = min(n_trials, math.prod(map(len, labels.values())))
    if len(_counted(study)) < n_trials:
        with _lock(storage or default_storage(name)):
            _line_up_again(study)
        study.optimize(attempt, callbacks=[stop_if_enough], catch=TrainingDiverged)
    return study


def _counted(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that say something: they ended, were stopped, or diverged. Others were broken off."""
    known = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state in known or REASON in trial.user_attrs]


def _line_up_again(study: optuna.Study) -> None:
    """Trials that were broken off by hand or by an error, at their places in the grid; the sampler takes them for visited."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if "grid_id" in trial.system_attrs]
    last = {trial.system_attrs["grid_id"]: trial for trial in trials}
    for trial in last.values():
        if trial.state == optuna.trial.TrialState.FAIL and REASON not in trial.user_attrs:
            place = {key: trial.system_attrs[key] for key in ("grid_id", "search_space")}
            study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING, system_attrs=place))


def _report_and_prune(trial: optuna.Trial, told: set[int], entry: Mapping[str, float]) -> None:
    """Tell the study how a training is doing, each tenth once; stops one that does badly."""
    tenth = int(10 * entry["step"] / entry["n_steps"])
    if "loss" in entry and tenth not in told:
        told.add(tenth)
        trial.report(entry["loss"], tenth)
        if trial.should_prune():
            raise optuna.TrialPruned


def table(study: optuna.Study) -> pd.DataFrame:
    """Its trials: settings, `value` (missing where it did not end), `state`, `seconds`, and the `reason` of one that failed."""
    frame = study.trials_dataframe(("number", "params", "value", "state", "duration"))
    frame = frame[frame["number"].isin([trial.number for trial in _counted(study)])]
    frame["value"] = frame["value"].where(frame["state"] == "COMPLETE")  # of others it is the last loss that was reported
    frame["reason"] = frame["number"].map({trial.number: trial.user_attrs.get(REASON) for trial in _counted(study)})
    return frame.rename(columns=lambda name: name.removeprefix("params_")).assign(seconds=frame["duration"].dt.total_seconds())


def importance(study: optuna.Study) -> pd.Series:
    """How much of the spread of good trials each setting accounts for. Source: PED-ANOVA (arXiv 2304.10255)."""
    told = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return pd.Series(told, name="importance")
