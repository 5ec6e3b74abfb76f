"""`rvlm reproduce --dry-run`: what a run would download, need and take, by the memory plan; nothing is done or written.

Memory and time of trainings are planned, not measured: `rvlm.training.memory_plan` assumes a utilisation of each GPU. Times of
earlier runs are those of their executed copies, without what was cached then.
"""

import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from transformers import AutoConfig

from rvlm.cli.execution import Job, RunPaths, executed_copy
from rvlm.cli.reproduce import is_finished, plan_jobs
from rvlm.experiments.recipes import ONE_STEP
from rvlm.files import RESULTS
from rvlm.report.notebooks import GIT_PROFILE, read_profiles
from rvlm.training import memory_plan
from rvlm.vlm.backbones import SMALL_VLM
from rvlm.vlm.processors import load_processor
from rvlm.vlm.prompts import PromptBuilder

EXTRAS = {"sim": "mujoco", "grid": "optuna", "qlora": "bitsandbytes", "notebooks": "papermill"}  # extra -> a package of it
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a stored weight


class Trainings(NamedTuple):
    """Trainings of one kind in a notebook: its parameter with their samples, how many, and its parameter that multiplies that."""

    budget: str
    finetuning: str = ""  # the notebook's parameter if left out
    n: int = 1
    times: str = ""


TRAININGS = {  # of the notebooks that train the model of their parameter `vlm`; what 06 has from 05 is counted there
    "05_train_in_stages": (
        Trainings("n_samples"),
        Trainings("n_compare_samples", "full", 2),
        Trainings("n_stage_samples", "full"),
    ),
    "06_evaluate": (Trainings("n_probe_samples", "head"),),
    "08_cross_embodiment": (Trainings("n_samples", "full", 6, "n_seeds"),),
    "09_ablations": (Trainings("n_frames", "full", 16, "n_seeds"), Trainings("n_grid_samples", "full", 1, "n_trials")),
    "10_single_gpu_qlora": tuple(Trainings("n_frames", mode, 1, "n_seeds") for mode in ("head", "lora", "qlora", "full")),
}


def dry_run(paths: RunPaths, profile: str, only: Sequence[str] = (), force: bool = False) -> Iterator[str]:
    """Lines that say what `rvlm.cli.reproduce.reproduce` would do with the same arguments.

    Raises:
        InvalidRun: As `plan_jobs`.
    """
    jobs = plan_jobs(paths, profile, only)
    yield f"profile {profile}: results in {paths.results}; nothing is downloaded, trained or written now"
    yield f"this machine: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU; models of the Hub need one'}"
    for extra, package in ((e, p) for e, p in EXTRAS.items() if importlib.util.find_spec(p) is None):
        yield f"missing package: {package}; pip install 'rvlm[{extra}]'"
    yield f"memory and time of trainings: by the plan, at {100 * memory_plan.UTILISATION:.0f} % of a GPU's peak, not measured"
    tracked, names = read_profiles(paths.notebooks).get(GIT_PROFILE, {}), {}
    for job in jobs:
        if is_finished(job, paths, profile) and not force:
            yield f"{job.stem}: finished before, kept"
            continue
        yield f"{job.stem}: to run"
        yield from (f"  {line}" for line in _about(job, paths, profile, tracked.get(job.stem, {})))
        names |= _hub_names(job.parameters)
    yield from (f"download: {_download(name, kind)}" for name, kind in names.items()) if names else ("download: nothing",)


def _about(job: Job, paths: RunPaths, profile: str, tracked: Mapping[str, Any]) -> Iterator[str]:
    own = {name: value for name, value in job.parameters.items() if value != tracked.get(name)}
    if own:
        yield "parameters: " + ", ".join(f"{name} {v!r} ({GIT_PROFILE}: {tracked.get(name)!r})" for name, v in own.items())
    for trainings in TRAININGS.get(job.stem, ()) if "vlm" in job.parameters else ():
        yield _training(trainings, job.parameters)
    yield f"time of an earlier run of this profile: {_earlier(job, paths, profile)}"


def _training(trainings: Trainings, parameters: Mapping[str, Any]) -> str:
    """Memory and time of trainings, on each GPU that holds them; the shipped model's time is not that of its FLOPs."""
    vlm, finetuning = parameters["vlm"] or str(SMALL_VLM), trainings.finetuning or parameters.get("finetuning", "full")
    n, samples = trainings.n * parameters.get(trainings.times, 1), parameters[trainings.budget]
    usual = 64 if "finetuning" in parameters else 8  # batch size of 05 and 06, and of the others
    batch = parameters.get("batch_size", usual) // parameters.get("gradient_accumulation_steps", 1)
    what = f"{n} x {trainings.budget} {samples:,}, {finetuning}, {batch} at a time"
    plan = _plan(vlm, finetuning, batch)
    if plan is None:
        return f"{what}: memory and time unknown, {vlm} is not among the plan's models"
    fitting = {gpu: _duration(n * samples / batch * plan.seconds(gpu)) for gpu in memory_plan.GPUS if plan.fits(gpu)}
    cards = [gpu if vlm == str(SMALL_VLM) else f"{gpu} {time}" for gpu, time in fitting.items()]
    return f"{what}: {plan.peak / 1e9:.1f} GB, fits {', '.join(cards) or 'none of ' + ', '.join(memory_plan.GPUS)}"


@functools.cache
def _plan(vlm: str, finetuning: str, batch_size: int) -> memory_plan.MemoryPlan | None:
    if Path(vlm).is_dir():
        prompt_builder = PromptBuilder(load_processor(vlm), 1)
        n_tokens = sum(i in prompt_builder.image_token_ids for i in prompt_builder.token_ids("lift it"))
        known = AutoConfig.from_pretrained(vlm), n_tokens
    elif entry := _entry(vlm):
        known = memory_plan.hub_configs()[entry["name"]]
    else:
        return None
    return memory_plan.plan_memory(*known, ONE_STEP, finetuning=finetuning, batch_size=batch_size)


def _entry(vlm: str) -> dict[str, Any]:
    entries = json.loads(memory_plan.HUB_CONFIGS.read_text())
    return next(({"name": name, **entry} for name, entry in entries.items() if entry["source"].endswith(f"/{vlm}")), {})


def _earlier(job: Job, paths: RunPaths, profile: str) -> str:
    """How long its last executed copy of this profile took, of this machine or of the results in git."""
    for results in (paths.results, RESULTS, RESULTS / profile):
        copy = executed_copy(job, RunPaths(paths.root, paths.notebooks, results, paths.artifacts))
        made = json.loads(copy.read_text())["metadata"].get("rvlm", {}) if copy.exists() else {}
        if made.get("profile") == profile:
            return _duration(made["seconds"])
    return "not known"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _hub_names(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Names on the Hub among a notebook's parameters, each "model" or "dataset"."""
    kinds = {"vlm": "model", "vlms": "model", "demonstrations": "dataset"}
    given = {name: kind for key, kind in kinds.items() for name in str(parameters.get(key, "")).split()}
    return {
        name: kind for name, kind in given.items() if "/" in name and name[-3:] != ".md" and not Path(name).expanduser().is_dir()
    }


def _download(name: str, kind: str) -> str:
    size = f"{e['parameters'] * BYTES[e['stored']] / 1e9:.1f} GB" if "stored" in (e := _entry(name)) else "size unknown"
    try:
        folder = Path(huggingface_hub.snapshot_download(name, repo_type=kind, local_files_only=True))
    except (OSError, ValueError):
        return f"{kind} {name}: {size}"
    if not any(folder.rglob("*.safetensors" if kind == "model" else "*.parquet")):
        return f"{kind} {name}: {size}"
    indices = [json.loads(path.read_text())["weight_map"] for path in folder.glob("*.safetensors.index.json")]
    is_whole = all((folder / shard).exists() for index in indices for shard in index.values())
    return f"{kind} {name}: " + ("in the local cache" if is_whole else f"{size}, partly in the local cache")
