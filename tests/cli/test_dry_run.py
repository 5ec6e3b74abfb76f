"""What `rvlm reproduce --dry-run` says, and that it writes nothing."""

import json

import huggingface_hub
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, writes

from rvlm.cli import dry_run as module
from rvlm.cli.dry_run import TRAININGS, dry_run
from rvlm.cli.execution import RunPaths
from rvlm.cli.main import main
from rvlm.cli.reproduce import plan_jobs, run_notebook
from rvlm.files import ROOT
from rvlm.report.notebooks import parameters_of
from rvlm.training import memory_plan

MODEL, DATA = "lab/tiny", "lab/demonstrations"
PROFILES = f"""cpu:
  05_train_in_stages: {{vlm: "", demonstrations: "", n_samples: 64, n_compare_samples: 64, n_stage_samples: 64, batch_size: 8}}
gpu:
  05_train_in_stages: {{vlm: {MODEL}, demonstrations: {DATA}, n_samples: 6400}}
"""


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """A run of two notebooks, of which one trains a small model that the plan knows by a Hub name."""
    made = RunPaths(tmp_path, tmp_path / "notebooks", tmp_path / "results", tmp_path / "artifacts")
    made.notebooks.mkdir()
    (made.notebooks / "profiles.yaml").write_text(PROFILES)
    names = ("n_samples", "n_compare_samples", "n_stage_samples", "batch_size")
    values = {"vlm": "", "demonstrations": "", **dict.fromkeys(names, 64)}
    lines = "\n".join(f"{name} = {value!r}  # one [1]" for name, value in values.items())
    for stem, source in {"00_a": "n = 1  # one [1]", "05_train_in_stages": lines}.items():
        cells = [new_markdown_cell("# A"), new_code_cell(source, metadata={"tags": ["parameters"]})]
        (made.notebooks / f"{stem}.ipynb").write_text(writes(new_notebook(cells=cells)))
    config = json.loads((ROOT / "rvlm/assets/small-vlm/config.json").read_text())
    entry = {"source": f"https://huggingface.co/{MODEL}", "stored": "float32", "parameters": 2.5e8, "config": config}
    (tmp_path / "shapes.json").write_text(json.dumps({"tiny": {**entry, "n_image_tokens": 16}}))
    monkeypatch.setattr(memory_plan, "HUB_CONFIGS", tmp_path / "shapes.json")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module._plan.cache_clear()
    return made


def said(paths, profile, **kwargs):
    return "\n".join(dry_run(paths, profile, **kwargs))


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_names_parameters_downloads_memory_and_time_and_writes_nothing(paths):
    before = listing(paths.root)
    text = said(paths, "gpu")
    assert listing(paths.root) == before
    assert f"vlm '{MODEL}' (cpu: '')" in text and "n_samples 6400 (cpu: 64)" in text and "batch_size" not in text
    assert f"download: model {MODEL}: 1.0 GB" in text, "2.5e8 weights of 4 bytes"
    assert f"download: dataset {DATA}: size unknown" in text
    assert "this machine: no GPU" in text and "not measured" in text
    assert "time of an earlier run of this profile: not known" in text
    plan = memory_plan.plan_memory(*memory_plan.hub_configs()["tiny"], module.ONE_STEP, finetuning="full", batch_size=8)
    assert f"1 x n_samples 6,400, full, 8 at a time: {plan.peak / 1e9:.1f} GB, fits RTX 3070 " in text
    assert f"T4 {800 * plan.seconds('T4'):.0f} s" in text, "800 steps of the plan"
    assert "2 x n_compare_samples 64, full" in text


def test_the_memory_of_a_card_decides_what_fits(paths, monkeypatch):
    monkeypatch.setattr(memory_plan, "GPUS", {"small": (0.5, 1), "large": (24, 100)})
    assert "GB, fits large " in said(paths, "gpu")
    monkeypatch.setattr(memory_plan, "GPUS", {"small": (0.5, 1)})
    assert "GB, fits none of small" in said(paths, "gpu")


def test_without_a_model_of_the_hub_nothing_is_downloaded_and_no_time_is_planned(paths):
    text = said(paths, "cpu")
    assert "download: nothing" in text and "full, 8 at a time" in text and "RTX 3070, T4" in text
    assert "parameters:" not in text


def test_what_is_cached_or_unknown_or_missing_is_said(paths, monkeypatch):
    snapshot = paths.root / "snapshot"
    snapshot.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    assert f"model {MODEL}: 1.0 GB" in said(paths, "gpu"), "a snapshot without weights"
    (snapshot / "model.safetensors").touch()
    assert f"model {MODEL}: in the local cache" in said(paths, "gpu")
    shards = {"embed": "model-1.safetensors", "head": "model-2.safetensors"}
    (snapshot / "model.safetensors").rename(snapshot / "model-1.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert f"model {MODEL}: 1.0 GB, partly in the local cache" in said(paths, "gpu"), "one of two shards"
    (snapshot / "model-2.safetensors").touch()
    assert f"model {MODEL}: in the local cache" in said(paths, "gpu")
    memory_plan.HUB_CONFIGS.write_text("{}")
    module._plan.cache_clear()
    monkeypatch.setitem(module.EXTRAS, "qlora", "no_such_package")
    text = said(paths, "gpu")
    assert f"memory and time unknown, {MODEL} is not among the plan's models" in text
    assert "missing package: no_such_package; pip install 'rvlm[qlora]'" in text


def test_a_finished_notebook_is_kept_and_its_time_is_known(paths):
    (job, _) = plan_jobs(paths, "gpu")
    run_notebook(job, paths, "gpu", is_quiet=True)
    assert "00_a: finished before, kept" in said(paths, "gpu")
    again = said(paths, "gpu", only=["00"], force=True)
    assert "00_a: to run" in again and "earlier run of this profile: not known" not in again


@pytest.mark.parametrize("profile", ["cpu", "smoke", "full"])
def test_the_command_prints_and_writes_nothing(profile, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    assert main(["reproduce", "--profile", profile, "--dry-run", "--only", "00", "07"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"profile {profile}: ") and "download: nothing" in text
    assert ("earlier run of this profile: 54 min" in text) == (profile == "full"), "of the results in git"
    assert not (tmp_path / "home").exists()
    assert main(["reproduce", "--profile", "huge", "--dry-run"]) == 2
    assert "no profile 'huge'; those in profiles.yaml: smoke, cpu, gpu, full" in capsys.readouterr().err


@pytest.mark.parametrize("stem", TRAININGS)
def test_the_trainings_are_named_by_parameters_of_their_notebook(stem):
    known = parameters_of(ROOT / "notebooks" / f"{stem}.ipynb")
    for trainings in TRAININGS[stem]:
        assert trainings.budget in known and (trainings.times or trainings.budget) in known
