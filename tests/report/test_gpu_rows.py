"""What `make gpu` wrote, as tables: and "not measured" where it wrote nothing."""

import json

import pandas as pd

from rvlm.report.gpu_rows import STEP_COLUMNS, measured_on, measured_steps, with_measured
from rvlm.report.readme import on_gpu

STEP = {"kind": "training", "model": "M", "finetuning": "lora", "gradient_checkpointing": False, "device": {"name": "H100"}}
PLAN = {"model": "M", "gradient_checkpointing": False, "gpu": "L4"}
PLANNED = pd.DataFrame([{**PLAN, "finetuning": finetuning} for finetuning in ("lora", "full", "head")])


def written(folder):
    (folder / "gpu").mkdir()
    numbers = {"peak": 2e9, "seconds": 0.1, "ratio_to_bare": 1.04, "batch_size": 2}
    failure = {
        **STEP,
        "finetuning": "full",
        "measured": {"failed": "OutOfMemoryError: tried", "batch_size": 2},
        "planned": {"failed": "no"},
    }
    rows = {"a": {**STEP, "planned": {"peak": 1.9e9}, "measured": numbers}, "b": failure, "c": {"kind": "acting"}}
    for name, row in rows.items():
        (folder / "gpu" / f"{name}.json").write_text(json.dumps(row))
    return folder


def test_without_rows_nothing_is_measured(tmp_path):
    steps = measured_steps(tmp_path / "gpu")
    assert steps.empty and tuple(steps) == STEP_COLUMNS
    assert set(with_measured(PLANNED, steps, 2)["measured"]) == {"not measured"} and "not measured" in on_gpu(tmp_path)


def test_rows_stand_beside_their_plans(tmp_path):
    steps = measured_steps(written(tmp_path) / "gpu")
    measured = with_measured(PLANNED, steps, 2).set_index("finetuning")["measured"]
    assert measured.to_dict() == {"lora": "2.0 GB on H100", "full": "OutOfMemoryError: tried", "head": "not measured"}
    table = on_gpu(tmp_path)
    assert "| M, lora | 2 | 1.9 | 2.0 | H100 | 100 ms, 1.04 x the bare model |" in table
    assert "| M, full | 2 | – | – | H100 | OutOfMemoryError |" in table


def test_rows_of_several_cards_each_name_their_own(tmp_path):
    other = {**STEP, "device": {"name": "T4"}, "gradient_checkpointing": True, "planned": {"failed": "no"}}
    other["measured"] = {"peak": 1e9, "seconds": 0.2, "ratio_to_bare": 1.1, "batch_size": 2}
    (written(tmp_path) / "gpu" / "d.json").write_text(json.dumps(other))
    steps = measured_steps(tmp_path / "gpu")
    assert measured_on(steps) == "2 measured on H100, T4" and measured_on(steps.query("failed != ''")) == "not measured"
    assert "| M, lora, checkpointing | 2 | – | 1.0 | T4 | 200 ms, 1.10 x the bare model |" in on_gpu(tmp_path)


def test_a_plan_of_another_batch_size_has_no_measurement(tmp_path):
    steps = measured_steps(written(tmp_path) / "gpu")
    assert set(with_measured(PLANNED, steps, 64)["measured"]) == {"not measured"}
