"""`make gpu` on a CPU with tiny models: the same code, row by row, with the packages that it needs and no others."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import bitsandbytes
import pytest
import torch
from test_wheel import link_packages
from toy_measuring import fake
from transformers import AutoConfig

from rvlm.policy.policy import Policy
from rvlm.training.memory_plan import hub_configs
from rvlm.vlm.backbones import language_model
from rvlm.vlm.processors import load_processor
from rvlm.vlm.prompts import PromptBuilder
from rvlm.vlm.quantization import is_quantized

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_models  # noqa: E402
import gpu_rows  # noqa: E402

PACKAGES = ["torch", "transformers", "peft", "numpy", "pandas", "safetensors", "pillow"]
TRIED = (
    "(paligemma-3b|qwen2.5-vl-3b)-(lora|full-grad.*|one_step|interleaved)$|"
    "500m-(qlora|policy_head|one_step-compile|ddp|fsdp2)$|shipped"
)


def run_script(site, results, *options):
    """The script in an environment of its declared packages alone; its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**kept, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-S", str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--size", "tiny"]
    done = subprocess.run([*script, "--results", results, *options], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_kind_of_row_is_measured_once_and_failures_are_recorded(tmp_path):
    site, results = tmp_path / "site", tmp_path / "results"
    site.mkdir()
    link_packages(site, PACKAGES)
    assert not any((site / name).exists() for name in ("jaxtyping", "num2words", "bitsandbytes", "gymnasium", "pyarrow"))
    output = run_script(site, results, "--only", TRIED)
    made = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert f"{len(made)} of {len(made)} rows" in output and {row["kind"] for row in made.values()} == set(gpu_kinds())
    failed = {name: row["measured"]["failed"] for name, row in made.items() if "failed" in row["measured"]}
    assert list(failed) == ["training-smolvlm2-500m-qlora"]
    assert "expected bitsandbytes for weights in 4 bits" in failed["training-smolvlm2-500m-qlora"]
    for row in made.values():
        assert row["versions"]["torch"] == torch.__version__ and row["device"]["name"] == "CPU" and row["seed"] == 0
        if row["kind"] == "training":
            assert row["planned"]["peak"] > row["planned"]["weights"] > 0
    trained = made["training-qwen2.5-vl-3b-lora"]
    assert trained["measured"]["trained"] == trained["planned"]["trained"] and trained["measured"]["ratio_to_bare"] > 0
    assert made["acting-smolvlm2-500m-one_step-compile"]["measured"]["difference"] < 1e-4
    assert {made[f"acting-{m}-interleaved"]["measured"]["history"] for m in ("paligemma-3b", "qwen2.5-vl-3b")} != set()
    is_resumed(site, results, made)


def is_resumed(site, results, made):
    """A second run makes only what is missing, and none once the time is over."""
    times = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    (removed,) = results.glob("small*.json")
    removed.unlink()
    assert f"{len(made) - 1} of {len(made)} rows" in run_script(site, results, "--only", TRIED, "--minutes", "0")
    assert f"{len(made)} of {len(made)} rows" in run_script(site, results, "--only", TRIED)
    assert {path for path, at in times.items() if path.stat().st_mtime_ns != at} == {removed}


def gpu_kinds():
    return {row["kind"] for row in gpu.rows("tiny")}


def run_fakes(folder, names, seconds):
    todo = [{"name": name, "kind": "acting"} for name in names]
    run = {"size": "tiny", "commit": "abc", "seed": 0}
    left = gpu.run_rows(todo, folder, run, time.monotonic() + seconds, gpu.Measuring(run, fake))
    return left, {path.stem: json.loads(path.read_text())["measured"] for path in folder.glob("*.json")}


def test_a_process_that_dies_costs_its_row_alone(tmp_path):
    left, made = run_fakes(tmp_path, ["first", "second", "dies", "third", "spoils", "fourth"], 600)
    assert left == 0 and made["dies"]["failed"] == "its process died, with exit code 3"
    processes = [made[name]["hz"] for name in ("first", "second", "third", "spoils", "fourth")]
    assert processes[0] == processes[1] and processes[2] == processes[3] and len(set(processes)) == 3


def test_rows_of_another_card_are_not_taken_for_this_ones(tmp_path):
    (tmp_path / "first.json").write_text(json.dumps({"device": {"name": "another card"}}))
    with pytest.raises(SystemExit, match=r"expected rows of .* got rows of another card; give another folder by --results"):
        run_fakes(tmp_path, ["first", "second"], 600)
    assert [path.stem for path in tmp_path.glob("*.json")] == ["first"]


def test_a_row_that_outlasts_the_time_is_left_to_the_next_run(tmp_path):
    left, made = run_fakes(tmp_path, ["sleeps", "never"], 8)
    assert left == 2 and made == {}


@pytest.mark.parametrize(("policy", "n_action_steps"), [("one step", 1), ("chunked", gpu_rows.CHUNK)])
def test_milliseconds_are_those_of_steps_that_predict(policy, n_action_steps, tmp_path, monkeypatch):
    predictions, predict = [], Policy._predict

    def timed(call):
        before = len(predictions)
        call()
        return 1.0 if len(predictions) > before else 0.001

    monkeypatch.setattr(Policy, "_predict", lambda self: predictions.append(self) or predict(self))
    monkeypatch.setattr(gpu_rows, "timed", timed)
    row = {"kind": "acting", "model": "SmolVLM2-500M", "policy": policy, "compile": False}
    measured = gpu_rows.acting(row, {"device": "cpu", "size": "tiny", "home": tmp_path})
    assert measured["prediction_ms"] == measured["slowest_ms"] == 1000
    assert measured["hz"] == (pytest.approx(1) if n_action_steps == 1 else pytest.approx(4 / 1.003))
    assert "1000.0 ms a prediction, slowest step 1000.0 ms, " in gpu.summary(measured, {})


@pytest.mark.parametrize("name", gpu.MODELS)
def test_real_processors_give_the_tokens_that_are_planned(name, tmp_path):
    config, n_image_tokens = hub_configs()[name]
    folder = gpu_models.vlm_folder(name, "true", tmp_path)
    assert gpu_models.token_counts(folder)[0] == n_image_tokens
    side = getattr(config.vision_config, "image_size", 224)
    assert PromptBuilder(load_processor(folder), 1).image_size == side
    assert AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers == config.get_text_config().num_hidden_layers


def test_random_weights_in_four_bits_are_those_weights(tmp_path):
    folder = gpu_models.vlm_folder("SmolVLM2-500M", "tiny", tmp_path)
    torch.manual_seed(0)
    small, _ = gpu_models.random_policy(folder, {}, "qlora", torch.float32, "cpu")
    torch.manual_seed(0)
    exact, _ = gpu_models.random_policy(folder, {}, "full", torch.float32, "cpu")
    layer = language_model(small.backbone).layers[0].mlp.down_proj.base_layer
    values = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    wanted = language_model(exact.backbone).layers[0].mlp.down_proj.weight
    assert 0 < (values - wanted).abs().mean() < 0.15 * wanted.abs().mean() and is_quantized(small.backbone)
