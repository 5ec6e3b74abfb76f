"""What was found: findings, figures, tables, provenance, the HTML report and the README's table.

A finding is a sentence whose numbers were computed: `finding` refuses a sentence that holds a number it was not given.
Names start with the number of the notebook that made them (``05_loss``); by that the report puts things where they belong.
Everything is written to a temporary name and renamed when whole, so that a killed run leaves no half of a file.
"""

from __future__ import annotations

import base64
import html
import importlib.metadata
import inspect
import io
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
README_MARKS = ("<!-- notebooks:begin -->", "<!-- notebooks:end -->")
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "numpy", "pandas", "mujoco", "gymnasium", "matplotlib")
NUMBER = re.compile(r"(?<![\w.,])[-−+]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s?%)?")


class UncomputedNumber(ValueError):
    """A finding's sentence holds a number that was not handed over with it."""


def results_dir() -> Path:
    """Where findings, figures, tables and executed notebooks go: ``RVLM_RESULTS``, else ``results/`` (in git)."""
    return Path(os.environ.get("RVLM_RESULTS") or ROOT / "results")


def artifacts_dir() -> Path:
    """Where datasets, checkpoints and caches go: ``RVLM_HOME``, else ``artifacts/`` (ignored by git)."""
    return Path(os.environ.get("RVLM_HOME") or ROOT / "artifacts")


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file so that it is either there in full or as it was before; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)
    return path


def _checked(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"expected a name of a-z, 0-9 and _, led by its notebook's number, e.g. '05_loss'; got {name!r}")
    return name


# --- provenance ---------------------------------------------------------------------------------------------------------


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch = sys.modules.get("torch")  # asked only where the notebook uses it: importing it takes seconds
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {"cpu": model or platform.machine(), "cores": cores, "gpus": gpus}


def provenance() -> dict[str, Any]:
    """Commit (and whether code differs from it), package versions, hardware, profile and date of whoever asks."""
    versions = {package: version for package in PACKAGES if (version := _version(package))}
    return {
        "commit": _git("rev-parse", "HEAD") or None,
        "is_dirty": bool(_git("status", "--porcelain", "--", "rvlm", "notebooks", "data_cards", "pyproject.toml")),
        "versions": {"python": platform.python_version(), **versions},
        "hardware": _hardware(),
        "profile": os.environ.get("RVLM_PROFILE"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# --- findings -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A finding as it was written; a notebook shows it as Markdown."""

    record: dict[str, Any]

    def _repr_markdown_(self) -> str:
        return f"> **Finding.** {self.record['sentence']}\n>\n> <sub>{fine_print(self.record)}</sub>"


def finding(
    name: str,
    sentence: str,
    numbers: Mapping[str, Any],
    n: int,
    interval: Any,
    seeds: Sequence[int],
    seconds: float | int | None = None,
    verdict: str | None = None,
) -> Finding:
    """Write a finding to ``results/findings/{name}.json`` and show it.

    Args:
        name: led by its notebook's number, e.g. "06_success".
        sentence: what was found; each of its digits must come from the arguments below, rounded as the sentence shows it.
            ``47 %`` stands for a number 0.468, or for 46.8 if its key ends in "percent" or "points".
        numbers: what was computed, by name; numbers, or lists or dicts of them.
        n: episodes (or samples) behind it.
        interval: 95 % interval: ``(low, high)``, a `Rate` or `Difference`, a dict of them, or None.
        seeds: that it was computed with.
        seconds: how long it took [s].
        verdict: "replicated", "not replicated" or "undecided", from `rvlm.statistics.verdict`.

    Raises:
        UncomputedNumber: the sentence holds a number that is in none of the arguments.
    """
    record = {"name": _checked(name), "sentence": sentence, "numbers": _plain(numbers), "n": int(n), "interval": _plain(interval)}
    record |= {"seeds": _plain(list(seeds)), "seconds": seconds, "verdict": verdict}
    _check_sentence(record)
    record |= provenance()
    write_whole(results_dir() / "findings" / f"{name}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return Finding(record)


def _plain(value: Any) -> Any:
    """Numpy, dataclasses and tuples as what JSON holds; a `Rate` also says its rate."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value) | ({"rate": value.rate} if hasattr(value, "rate") else {})
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _numbers_in(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number within nested lists and dicts, with the key that it stands under."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, float(value)
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _numbers_in(v, k)
    elif isinstance(value, list):
        for v in value:
            yield from _numbers_in(v, key)


def _says(text: str, key: str, value: float) -> bool:
    """Is ``text`` ("1,234", "-0.25", "47 %") this value, rounded to as many digits as the text shows?"""
    digits = text.rstrip(" %").replace(",", "").replace("−", "-")
    is_percent = text.endswith("%") and not key.endswith(("percent", "points"))
    mantissa, _, exponent = digits.lower().partition("e")
    step = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(digits) - value * (100 if is_percent else 1)) <= step * (0.5 + 1e-6)


def _check_sentence(record: Mapping[str, Any]) -> None:
    given = [*_numbers_in(record["numbers"]), *_numbers_in(record["interval"]), ("n", float(record["n"]))]
    given += [("seeds", float(len(record["seeds"]))), *_numbers_in(record["seconds"], "seconds")]
    given += [("level", 0.95)] if record["interval"] is not None else []
    for match in NUMBER.finditer(record["sentence"]):
        if not any(_says(match.group(), key, value) for key, value in given):
            listed = ", ".join(f"{key} = {value:.6g}" for key, value in given)
            raise UncomputedNumber(
                f"finding {record['name']!r}: expected only computed numbers in {record['sentence']!r}; {match.group()!r} "
                f"is none of those given ({listed}); compute it, add it to numbers=, and format it into the sentence"
            )


def load_findings(results: Path | None = None) -> list[dict[str, Any]]:
    """Every finding of a results folder, by name."""
    return [json.loads(path.read_text()) for path in sorted(((results or results_dir()) / "findings").glob("*.json"))]


def fine_print(record: Mapping[str, Any]) -> str:
    """n, interval, seeds, seconds, profile, commit and verdict in one line."""
    parts = [f"n = {record['n']:,}"]
    if record["interval"] is not None:
        parts.append(f"95 % interval {_interval(record['interval'])}")
    parts.append(f"seeds {', '.join(map(str, record['seeds'])) or 'none'}")
    parts += [f"{record['seconds']:,.0f} s"] if record.get("seconds") is not None else []
    parts += [f"profile {record['profile']}"] if record.get("profile") else []
    parts += [f"commit {record['commit'][:8]}{' with changes' if record.get('is_dirty') else ''}"] if record.get("commit") else []
    parts += [f"**{record['verdict']}**"] if record.get("verdict") else []
    return " · ".join(parts)


def _interval(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(f"{v:.3g}" for v in value) + "]"
    if {"low", "high"} <= set(value):
        return f"[{value['low']:.3g}, {value['high']:.3g}]"
    return "; ".join(f"{k} {_interval(v)}" for k, v in value.items())


# --- figures, tables, source --------------------------------------------------------------------------------------------


def export(fig: Figure, name: str) -> Figure:
    """Write ``results/figures/{name}.pdf`` and ``.png`` at column or page width; same figure, same bytes.

    Returns:
        The figure, so that a cell can end in ``export(plots.filmstrip(...), "06_failures")``.
    """
    from rvlm.plots import COLUMN_IN, PAGE_IN

    width, height = fig.get_size_inches()
    target = min((COLUMN_IN, PAGE_IN), key=lambda w: abs(w - width))
    fig.set_size_inches(target, height * target / width)
    for suffix, metadata in (("pdf", {"CreationDate": None, "Producer": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        fig.savefig(buffer, format=suffix, dpi=300, metadata=metadata)
        write_whole(results_dir() / "figures" / f"{_checked(name)}.{suffix}", buffer.getvalue())
    return fig


def save_table(table: pd.DataFrame, name: str, float_format: str = "%.3g") -> pd.DataFrame:
    """Write ``results/tables/{name}.csv`` (full precision) and ``.tex`` (booktabs, rounded); returns the table."""
    folder = results_dir() / "tables"
    write_whole(folder / f"{_checked(name)}.csv", table.to_csv(index=False))
    write_whole(folder / f"{name}.tex", table.to_latex(index=False, escape=True, float_format=float_format))
    return table


def show_source(function: Callable[..., Any] | type) -> Any:
    """The source of a function or class, as a notebook shows code; GitHub, Jupyter and nbconvert all colour it."""
    from IPython.display import Markdown

    plain = inspect.unwrap(function)
    path = Path(inspect.getsourcefile(plain) or "").resolve()
    where = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return Markdown(f"`{where}`\n```python\n{textwrap.dedent(inspect.getsource(plain)).rstrip()}\n```")


def published(benchmark: str, split: str | None = None) -> pd.DataFrame:
    """Results from the literature with their sources, from ``data_cards/published.csv``.

    Args:
        benchmark: e.g. "calvin".
        split: e.g. "ABCD->D"; all of the benchmark's if left out.
    """
    import pandas as pd

    table = pd.read_csv(ROOT / "data_cards" / "published.csv")
    chosen = table[(table["benchmark"] == benchmark) & (True if split is None else table["split"] == split)]
    if chosen.empty:
        have = ", ".join(sorted({f"{b} {s}" for b, s in zip(table["benchmark"], table["split"], strict=True)}))
        raise ValueError(f"no published results of {benchmark!r}, split {split!r}; there are {have}")
    return chosen.reset_index(drop=True)


# --- notebooks, README --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chapter:
    """What a notebook's first cell says of it.

    Attributes:
        stem: file name without suffix, e.g. "06_evaluate".
        title: without its number.
        question: the text after **Question.**.
    """

    stem: str
    title: str
    question: str

    def owns(self, name: str) -> bool:
        """Does a finding, figure or table of this name come from this notebook?"""
        return name[:3] == self.stem[:3]


def chapters(notebooks: Path | None = None) -> list[Chapter]:
    """The ordered notebooks of a folder."""
    return [read_chapter(path) for path in sorted((notebooks or ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]


def read_chapter(path: Path) -> Chapter:
    """Title and question from a notebook's first cell."""
    cells = json.loads(path.read_text())["cells"]
    text = "".join(cells[0]["source"]) if cells else ""
    title = re.search(r"^#\s+(?:\d\d\s+)?(.+)$", text, re.MULTILINE)
    question = re.search(r"\*\*Question\.?\*\*\.?\s*(.+?)(?:\n\s*\n|\Z)", text, re.DOTALL)
    return Chapter(
        path.stem,
        title.group(1).strip() if title else path.stem[3:].replace("_", " "),
        " ".join(question.group(1).split()) if question else "",
    )


def readme_table(notebooks: Path | None = None, results: Path | None = None) -> str:
    """The README's table of notebooks: title, question, finding."""
    findings = load_findings(results or ROOT / "results")
    rows = []
    for chapter in chapters(notebooks):
        found = " ".join(f["sentence"] for f in findings if chapter.owns(f["name"]))
        link = f"[{chapter.stem[:2]} {chapter.title}](notebooks/{chapter.stem}.ipynb)"
        rows.append(" | ".join(cell.replace("|", "\\|") for cell in (link, chapter.question, found or "–")))
    return "".join(f"| {row} |\n" for row in ["Notebook | Question | Finding", "--- | --- | ---", *rows]) if rows else ""


def updated_readme(readme: Path, notebooks: Path | None = None, results: Path | None = None) -> str:
    """The README's text with its table made anew between the two markers."""
    text, (begin, end) = readme.read_text(), README_MARKS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"{readme}: expected the lines '{begin}' and '{end}' once each, in this order; add them where the table belongs"
        )
    before, after = text[: text.index(begin)], text[text.index(end) :]
    return f"{before}{begin}\n{readme_table(notebooks, results)}{after}"


def update_readme(readme: Path | None = None, notebooks: Path | None = None, results: Path | None = None) -> Path:
    """Write the README's table of notebooks from first cells and findings."""
    readme = readme or ROOT / "README.md"
    text = updated_readme(readme, notebooks, results)
    return readme if text == readme.read_text() else write_whole(readme, text)


# --- the HTML report ----------------------------------------------------------------------------------------------------

CSS = """
body{font:16px/1.55 system-ui,sans-serif;color:#222;max-width:60rem;margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{font-size:1.25rem;margin:2.6rem 0 .3rem;border-top:1px solid #ddd;padding-top:1.2rem}
.q{color:#555;font-style:italic}.f{border-left:4px solid #029e73;background:#f3faf7;padding:.5rem .9rem;margin:.8rem 0}
.f small,.meta{color:#666;font-size:.82rem}img{max-width:100%;margin:.7rem 0;display:block}
.fail{border-left:4px solid #d55e00;background:#fdf4ee;padding:.5rem .9rem}pre{overflow:auto;font-size:.8rem;line-height:1.35}
table{border-collapse:collapse;font-size:.85rem;margin:.8rem 0}
th,td{padding:.2rem .7rem;border-bottom:1px solid #e3e3e3;text-align:left}
a{color:#0173b2}nav a{margin-right:.9rem;white-space:nowrap}
"""


def html_report(results: Path | None = None, notebooks: Path | None = None) -> Path:
    """Write ``results/report.html``: every notebook's question, findings, figures and tables in one file, or its traceback."""
    results = results or results_dir()
    found, listed = load_findings(results), chapters(notebooks)
    sections = [_section(chapter, found, results) for chapter in listed]
    others = [f for f in found if not any(c.owns(f["name"]) for c in listed)]
    sections += [f"<h2>Further findings</h2>{_findings_html(others)}"] if others else []
    links = "".join(f'<a href="#{c.stem}">{c.stem[:2]} {html.escape(c.title)}</a>' for c in listed)
    origin = provenance()
    hardware, commit = origin["hardware"], (origin["commit"] or "unknown")[:8]
    made = f"{origin['date']}, commit {commit}, {hardware['cpu']}, {hardware['cores']} cores"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Report</title><style>{CSS}</style></head><body><h1>What was found</h1>"
        f'<p class="meta">{html.escape(made)}</p><nav>{links}</nav>{"".join(sections)}</body></html>\n'
    )
    return write_whole(results / "report.html", page)


def _section(chapter: Chapter, found: list[dict[str, Any]], results: Path) -> str:
    parts = [f'<h2 id="{chapter.stem}">{chapter.stem[:2]} {html.escape(chapter.title)}</h2>']
    parts.append(f'<p class="q">{html.escape(chapter.question)}</p>')
    failed, executed = (results / "notebooks" / f"{chapter.stem}{suffix}.ipynb" for suffix in (".failed", ""))
    if failed.exists():
        parts.append(_failure_html(failed))
    parts.append(_findings_html([f for f in found if chapter.owns(f["name"])]))
    parts += [_figure_html(path) for path in sorted((results / "figures").glob("*.png")) if chapter.owns(path.stem)]
    parts += [_table_html(path) for path in sorted((results / "tables").glob("*.csv")) if chapter.owns(path.stem)]
    if executed.exists():
        parts.append(f'<p class="meta">Executed notebook: <a href="notebooks/{executed.name}">{executed.name}</a></p>')
    return "".join(parts)


def _findings_html(found: list[dict[str, Any]]) -> str:
    def bold(text: str) -> str:
        return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))

    return "".join(f'<div class="f">{html.escape(f["sentence"])}<br><small>{bold(fine_print(f))}</small></div>' for f in found)


def _figure_html(path: Path, max_width: int = 1400) -> str:
    from PIL import Image

    image, buffer = Image.open(path), io.BytesIO()
    image.thumbnail((max_width, 10 * max_width))  # the full resolution lies beside the report
    image.convert("RGB").quantize(256).save(buffer, format="png", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<a href="figures/{path.stem}.pdf"><img alt="{path.stem}" src="data:image/png;base64,{data}"></a>'


def _table_html(path: Path) -> str:
    import pandas as pd

    return pd.read_csv(path).to_html(index=False, border=0, na_rep="–", float_format="{:.3g}".format)


def _failure_html(path: Path) -> str:
    """The last traceback of an executed notebook, or what its metadata says ended it."""
    notebook = json.loads(path.read_text())
    errors = [out for cell in notebook["cells"] for out in cell.get("outputs", []) if out["output_type"] == "error"]
    text = (
        "\n".join(errors[-1]["traceback"])
        if errors
        else notebook["metadata"].get("rvlm", {}).get("error", "no traceback was kept")
    )
    text = html.escape(re.sub(r"\x1b\[[0-9;]*m", "", text))
    note = "This notebook failed; what follows it here, if anything, is of an earlier run."
    return f'<div class="fail"><b>{note}</b> <a href="notebooks/{path.name}">{path.name}</a><pre>{text}</pre></div>'
