"""What `make gpu` wrote, as tables: and "not measured" where it wrote nothing."""

import json

import pandas as pd

from rvlm.report.gpu_rows import STEP_COLUMNS, measured_steps, with_measured
from rvlm.report.readme import on_gpu

STEP = {"kind": "training", "model": "M", "finetuning": "lora", "gradient_checkpointing": False, "device": {"name": "H100"}}
PLAN = {"model": "M", "gradient_checkpointing": False, "gpu": "L4"}
PLANNED = pd.DataFrame([{**PLAN, "finetuning": finetuning} for finetuning in ("lora", "full", "head")])


def written(folder):
    (folder / "gpu").mkdir()
    numbers = {"peak": 2e9, "seconds": 0.1, "ratio_to_bare": 1.04}
    failure = {**STEP, "finetuning": "full", "measured": {"failed": "OutOfMemoryError: tried"}, "planned": {"failed": "no"}}
    rows = {"a": {**STEP, "planned": {"peak": 1.9e9}, "measured": numbers}, "b": failure, "c": {"kind": "acting"}}
    for name, row in rows.items():
        (folder / "gpu" / f"{name}.json").write_text(json.dumps(row))
    return folder


def test_without_rows_nothing_is_measured(tmp_path):
    steps = measured_steps(tmp_path / "gpu")
    assert steps.empty and tuple(steps) == STEP_COLUMNS
    assert set(with_measured(PLANNED, steps)["measured"]) == {"not measured"} and "not measured" in on_gpu(tmp_path)


def test_rows_stand_beside_their_plans(tmp_path):
    steps = measured_steps(written(tmp_path) / "gpu")
    measured = with_measured(PLANNED, steps).set_index("finetuning")["measured"]
    assert measured.to_dict() == {"lora": "2.0 GB on H100", "full": "OutOfMemoryError: tried", "head": "not measured"}
    table = on_gpu(tmp_path)
    assert (
        "| M, lora | 1.9 | 2.0 | 100 ms, 1.04 x the bare model |" in table and "| M, full | – | – | OutOfMemoryError |" in table
    )
