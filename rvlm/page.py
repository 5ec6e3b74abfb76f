"""Notebooks and what they found as pages: the README's table and the HTML report, both made from first cells and results."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvlm.files import ROOT, results_dir, write_whole
from rvlm.report import as_markdown, fine_print, load_findings, provenance

README_MARKS = ("<!-- notebooks:begin -->", "<!-- notebooks:end -->")
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
        found = " ".join(as_markdown(f["sentence"]) for f in findings if chapter.owns(f["name"]))
        link, question = f"[{chapter.stem[:2]} {chapter.title}](notebooks/{chapter.stem}.ipynb)", chapter.question
        rows.append(" | ".join([link.replace("|", "\\|"), question.replace("|", "\\|"), found or "–"]))
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
