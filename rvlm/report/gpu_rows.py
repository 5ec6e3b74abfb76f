"""Rows of `make gpu` as a table: what was measured on a GPU, with the plan; empty where nothing was."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from rvlm.files import RESULTS

STEP_COLUMNS = (
    "model",
    "finetuning",
    "gradient_checkpointing",
    "batch size",
    "GPU",
    "planned [GB]",
    "measured [GB]",
    "step [s]",
    "to bare model",
    "failed",
)
NOT_MEASURED = "not measured"


def load_gpu_rows(folder: Path = RESULTS / "gpu") -> list[dict[str, Any]]:
    """Every row of `benchmarks/gpu.py` that has a file, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def measured_steps(folder: Path = RESULTS / "gpu") -> pd.DataFrame:
    """Training steps of real models on a GPU, in `STEP_COLUMNS`; "failed" is the reason why there is no measurement, or empty."""
    rows = [_training_row(row) for row in load_gpu_rows(folder) if row["kind"] == "training"]
    return pd.DataFrame(rows, columns=list(STEP_COLUMNS))


def _training_row(row: dict[str, Any]) -> dict[str, Any]:
    planned, measured = row["planned"], row["measured"]
    return {
        **{name: row[name] for name in STEP_COLUMNS[:3]},
        "batch size": measured.get("batch_size"),
        "GPU": row["device"]["name"],
        "planned [GB]": planned.get("peak", float("nan")) / 1e9,
        "measured [GB]": measured.get("peak", float("nan")) / 1e9,
        "step [s]": measured.get("seconds"),
        "to bare model": measured.get("ratio_to_bare"),
        "failed": measured.get("failed", ""),
    }


def measured_on(steps: pd.DataFrame) -> str:
    """How many steps of `measured_steps` have a measurement, and on which GPUs; or "not measured"."""
    done = steps[steps["failed"] == ""]
    return NOT_MEASURED if done.empty else f"{len(done)} measured on {', '.join(sorted(set(done['GPU'])))}"


def with_measured(planned: pd.DataFrame, measured: pd.DataFrame, batch_size: int) -> pd.DataFrame:
    """Plans with the column "measured": [GB] and GPU, the failure, or "not measured".

    Args:
        planned: Of `rvlm.training.memory_plan.compare`.
        measured: Of `measured_steps`; steps of another batch size are no measurement of these plans.
        batch_size: Of the plans.
    """
    keys, same = list(STEP_COLUMNS[:3]), measured.query("`batch size` == @batch_size")
    texts = {tuple(row[key] for key in keys): _text(row) for row in same.to_dict("records")}
    found = [texts.get(tuple(row), NOT_MEASURED) for row in planned[keys].itertuples(index=False)]
    return planned.assign(measured=found)


def _text(row: dict[str, Any]) -> str:
    return row["failed"] or f"{row['measured [GB]']:.1f} GB on {row['GPU']}"
