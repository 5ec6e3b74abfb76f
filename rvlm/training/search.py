"""Grid search over a stage's settings with Optuna: resumable, pruned, one storage for many workers.

The storage is an Optuna URL: by default an SQLite file; PostgreSQL or MySQL for a study that machines share.
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
from rvlm.training.stages import ROBOT, UNUSED_MODULES, Stage
from rvlm.training.trainer import TrainingDiverged

Grid = Mapping[str, Sequence[Any]]
PAPER: Grid = {  # one GPU node and more
    "learning_rate": (1e-4, 2e-5, 1e-5),
    "weight_decay": (0.0, 0.1),
    "batch_size": (128, 256, 512),
    "warmup_ratio": (0.25, 0.5),
}
SMALL: Grid = {  # two CPU cores, from the shipped model
    "learning_rate": (3e-3, 1e-3, 3e-4),
    "weight_decay": (0.0, 0.1),
    "batch_size": (8, 32),
    "warmup_ratio": (0.03, 0.25),
}
# That makes a study's trials; other code needs another study.
SEARCH_CODE = Code(("rvlm.training.trainer", "rvlm.training.launch"), (*UNUSED_MODULES[ROBOT], "rvlm.envs"))
# What all trials of a study share, by the name under which its hash is stored.
SHARED = {"code": "training code", "stages": "data, initial weights or settings", "score": "score"}
REASON = "reason"  # user attribute of a diverged trial
logging.getLogger("optuna").setLevel(logging.WARNING)


def default_storage(name: str) -> str:
    """URL of the study's own SQLite file in the artifacts folder, one per version of the training code.

    Raises:
        ValueError: The name is no valid file name.
    """
    if not re.fullmatch(r"\w[\w .,=+-]*", name):
        raise ValueError(f"study {name!r}: expected a file name of letters, digits, '_', '-', '.', ',', '=', '+' or spaces")
    folder = artifacts_dir() / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / name}-{SEARCH_CODE.hash}.db"


def load_or_create_study(name: str, grid: Grid, storage: str | None = None, seed: int = 0) -> optuna.Study:
    """The study of this name, created if it does not exist.

    Trials that are worse than the median of the earlier ones at the same step are pruned.

    Raises:
        ValueError: The name is no valid file name, or the study was created with another grid or other training code.
    """
    url = storage or default_storage(name)
    with _lock(url):  # two processes that create one file at once both fail
        study = optuna.create_study(
            storage=url,
            study_name=name,
            sampler=optuna.samplers.GridSampler({key: list(_labels(key, grid[key])) for key in grid}, seed=seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
            direction="minimize",
            load_if_exists=True,
        )
        _require_same(study, {"code": SEARCH_CODE.hash}, f" in {url}")
    _require_same_grid(study, grid)
    return study


def _lock(url: str) -> contextlib.AbstractContextManager:
    """File lock of an SQLite study; database servers do their own locking."""
    path = url.removeprefix("sqlite:///")
    return FileLock(f"{path}.lock") if path != url else contextlib.nullcontext()


def _labels(key: str, values: Sequence[Any]) -> dict[Any, Any]:
    """Label -> value, for a study's storage, which holds scalars only: other values are labelled by their JSON."""
    try:
        labels = {v if v is None or isinstance(v, (bool, int, float, str)) else json.dumps(v): v for v in values}
    except TypeError as error:
        raise ValueError(f"grid: expected JSON-serializable values of {key!r}, got {values!r} ({error})") from error
    if len(labels) != len(values) or not labels:
        raise ValueError(f"grid: expected one or more distinct values of {key!r}, got {values!r}")
    return labels


def _require_same_grid(study: optuna.Study, grid: Grid) -> None:
    """Check that the study's trials, which are compared with each other, are of this grid."""
    created, advice = f"study {study.study_name!r} was created with", "use the same grid, or another study name"
    for trial in study.get_trials(deepcopy=False):
        stored: dict[str, Any] = {key: list(d.choices) for key, d in trial.distributions.items() if hasattr(d, "choices")}
        for key, values in stored.items():
            labels = list(_labels(key, grid[key])) if key in grid else None
            if labels != values:
                raise ValueError(f"{created} {key!r} of {values}, got {labels or 'no such setting'}; {advice}")
        missing = [key for key in grid if stored and trial.state.is_finished() and key not in stored]
        if missing:
            raise ValueError(f"{created} {', '.join(stored)}, got {', '.join(missing)} too; {advice}")


def _require_same(study: optuna.Study, hashes: Mapping[str, str], where: str = "") -> None:
    """Check that what the study's trials share has the hashes of when it was created; stores those that are not there yet."""
    is_old = "code" not in study.user_attrs and study.get_trials(deepcopy=False)  # of a version that stored other hashes
    for what, value in hashes.items():
        stored = "" if is_old else study.user_attrs.get(what, value)
        if stored != value:
            raise ValueError(f"study {study.study_name!r}{where} was created with other {SHARED[what]}; use another study name")
        study.set_user_attr(what, stored)


def _code_of_score(score: Callable[[Path], float]) -> list[Any]:
    """Its bytecode, and the hash of the package's modules that it names."""
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
    build_stage: Callable[..., Stage],
    score: Callable[[Path], float],
    n_trials: int,
    storage: str | None = None,
    n_threads: int | None = None,
    seed: int = 0,
    scored_on: str = "",
) -> optuna.Study:
    """Train and score points of a grid, each once, until `n_trials` are done or the grid is; workers may share the study.

    Trials that diverge fail, with a reason in `table`; trials that were killed or interrupted are repeated.

    Args:
        name: Of the study.
        grid: Setting -> values.
        build_stage: Settings by name -> stage.
        score: Folder of a trained model -> objective, to minimise.
        n_trials: Completed, pruned or diverged, over all workers.
        storage: URL; by default the study's own SQLite file.
        n_threads: Of each training.
        seed: Of the order of the grid's points.
        scored_on: Hash of the data that the score uses, as `rvlm.files.folder_hash` of its folder.

    Raises:
        ValueError: As `load_or_create_study`, or the study was created with other data, settings or another score.
    """
    study = load_or_create_study(name, grid, storage, seed)
    labels = {key: _labels(key, values) for key, values in grid.items()}
    objective = functools.partial(_objective, labels=labels, build_stage=build_stage, score=score, n_threads=n_threads)
    n_trials = min(n_trials, math.prod(map(len, labels.values())))
    hashes = {
        "stages": _hash_of_stages(labels, build_stage),
        "score": config_hash({"code": _code_of_score(score), "on": scored_on}),
    }
    with _lock(storage or default_storage(name)):
        _require_same(study, hashes)
        if len(_finished_trials(study)) >= n_trials:
            return study
        _requeue_interrupted(study)
    study.optimize(objective, callbacks=[functools.partial(_stop_at, n_trials)], catch=TrainingDiverged)
    return study


def _hash_of_stages(labels: Mapping[str, Mapping[Any, Any]], build_stage: Callable[..., Stage]) -> str:
    """Of all stages of a grid, whose folders are named by hashes of their data, initial weights and settings."""
    points = itertools.product(*(values.values() for values in labels.values()))
    folders = [build_stage(**dict(zip(labels, point, strict=True))).folder.name for point in points]
    return config_hash({"stages": sorted(folders)})


def _objective(
    trial: optuna.Trial,
    labels: Mapping[str, Mapping[Any, Any]],
    build_stage: Callable[..., Stage],
    score: Callable[[Path], float],
    n_threads: int | None,
) -> float:
    """Train and score the stage of a trial."""
    stage = build_stage(**{key: values[trial.suggest_categorical(key, list(values))] for key, values in labels.items()})
    report = functools.partial(_report_and_prune, trial, set())
    try:
        value = score(train(stage, show_progress=False, n_threads=n_threads, on_log=report))
        if math.isnan(value):
            raise TrainingDiverged(f"stage {stage.name!r}: its score is NaN")
        return value
    except TrainingDiverged as error:
        trial.set_user_attr(REASON, str(error))
        raise


def _stop_at(n_trials: int, study: optuna.Study, _: Any) -> None:
    if len(_finished_trials(study)) >= n_trials:
        study.stop()


def _finished_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that were completed, pruned or diverged, not interrupted."""
    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state in finished or REASON in trial.user_attrs]


def _requeue_interrupted(study: optuna.Study) -> None:
    """Add interrupted trials again at their points of the grid, which the sampler takes for visited."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if "grid_id" in trial.system_attrs]
    last = {trial.system_attrs["grid_id"]: trial for trial in trials}
    for trial in last.values():
        if trial.state == optuna.trial.TrialState.FAIL and REASON not in trial.user_attrs:
            point = {key: trial.system_attrs[key] for key in ("grid_id", "search_space")}
            study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING, system_attrs=point))


def _report_and_prune(trial: optuna.Trial, reported: set[int], entry: Mapping[str, float]) -> None:
    """Report a training's loss to the study, once per tenth of its steps; raises `TrialPruned` for bad trials."""
    tenth = int(10 * entry["step"] / entry["n_steps"])
    if "loss" in entry and tenth not in reported:
        reported.add(tenth)
        trial.report(entry["loss"], tenth)
        if trial.should_prune():
            raise optuna.TrialPruned


def table(study: optuna.Study) -> pd.DataFrame:
    """Finished trials: settings, `value` (missing unless completed), `state`, `seconds`, and the `reason` of diverged ones."""
    frame = study.trials_dataframe(("number", "params", "value", "state", "duration"))
    frame = frame[frame["number"].isin([trial.number for trial in _finished_trials(study)])]
    frame["value"] = frame["value"].where(frame["state"] == "COMPLETE")  # of pruned trials it is the last reported loss
    frame["reason"] = frame["number"].map({trial.number: trial.user_attrs.get(REASON) for trial in _finished_trials(study)})
    return frame.rename(columns=lambda name: name.removeprefix("params_")).assign(seconds=frame["duration"].dt.total_seconds())


def importance(study: optuna.Study) -> pd.Series:
    """Fraction of the variance among good trials due to each setting. Source: PED-ANOVA (arXiv 2304.10255)."""
    values = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return pd.Series(values, name="importance")
