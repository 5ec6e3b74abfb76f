"""Executed notebooks as they are stored: small, without progress bars and widgets."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

from rvlm.report.findings import small_png

WIDGET = "application/vnd.jupyter.widget-view+json"
BAR = re.compile(r"\d+%\|")  # a progress bar, whose stored state is its first
NOISE = re.compile(r"^.*(?:SyncActivityProfilerHandler|\d+%\|).*\n?", re.MULTILINE)  # log lines of the profiler, bars as text
N_COLORS = 128  # of an image's palette


def cleaned(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook without progress bars, profiler lines and widget state; its images have a palette.

    A text replaces each widget. Idempotent.
    """
    cells = [cell | {"outputs": _outputs(cell["outputs"])} if "outputs" in cell else cell for cell in notebook["cells"]]
    metadata = {key: value for key, value in notebook["metadata"].items() if key != "widgets"}
    return notebook | {"cells": cells, "metadata": metadata}


def _outputs(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [kept for output in outputs if (kept := _output(output)) is not None]


def _output(output: dict[str, Any]) -> dict[str, Any] | None:
    if output["output_type"] == "stream":
        text = NOISE.sub("", "".join(output["text"]))
        return output | {"text": text.splitlines(True)} if text else None
    data = output.get("data", {})
    if WIDGET in data:
        if BAR.search("".join(data.get("text/plain", ""))):
            return None
        return output | {"data": {"text/plain": ["(a widget: it needs a running kernel, see make lab)"]}}
    if "image/png" in data:
        return output | {"data": data | {"image/png": _smaller(data["image/png"])}}
    return output


def _smaller(encoded: str | list[str]) -> str:
    from PIL import Image

    text = "".join(encoded)
    data = base64.b64decode(text)
    with Image.open(io.BytesIO(data)) as image:
        if image.mode == "P":
            return text
    return base64.b64encode(small_png(data, N_COLORS)).decode() + "\n"


def executed(results: Path) -> list[Path]:
    """The executed notebooks of a results folder."""
    return sorted((results / "notebooks").glob("[0-9][0-9]_*.ipynb"))
