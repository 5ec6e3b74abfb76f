"""The HTML report: each notebook's question, findings, figures and tables on one page."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rvlm.files import ROOT, atomic_write, results_dir
from rvlm.provenance import provenance
from rvlm.report.copies import cleaned, executed
from rvlm.report.findings import load_findings, provenance_line
from rvlm.report.withdrawn import amend

PX_PER_DOT = 0.447  # figures have 300 dpi; a page-wide one fills the text's 60 rem, a column-wide one half of it
READING_NOTE = "Each finding names its own commit. In tables, low and high are the ends of 95 % intervals."
FULL = "full"  # subfolder of results for profile full
CSS = """
:root{color-scheme:light dark;--ink:#222;--soft:#636363;--page:#fff;--line:#ddd;--good:#f3faf7;--bad:#fdf4ee;--link:#0173b2}
@media(prefers-color-scheme:dark){
:root{--ink:#ddd;--soft:#a6a6a6;--page:#17191b;--line:#3b3f42;--good:#14251f;--bad:#30201a;--link:#6db9e8}}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:60rem;margin:0 auto;padding:1.2rem}
h1{font-size:1.7rem;margin:.8rem 0 .2rem}h2{font-size:1.25rem;margin:2.6rem 0 .3rem;scroll-margin-top:3.5rem}
a{color:var(--link)}.meta,small,figcaption{color:var(--soft);font-size:.82rem}.q{color:var(--soft);font-style:italic}
nav{position:sticky;top:0;display:flex;gap:.2rem 1rem;overflow-x:auto;white-space:nowrap;padding:.7rem 0;font-size:.87rem}
nav{background:var(--page);border-bottom:1px solid var(--line)}
.f,.fail{border-left:4px solid #029e73;background:var(--good);padding:.5rem .9rem;margin:.8rem 0}
.fail{border-color:#d55e00;background:var(--bad)}pre{overflow:auto;font-size:.8rem;line-height:1.35}
.shown{display:flex;flex-wrap:wrap;gap:1.2rem;align-items:flex-start}figure{margin:0;max-width:100%}
.scroll{display:block;overflow-x:auto}img{display:block;max-width:100%;height:auto;background:#fff}.page{max-width:max(100%,42rem)}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem;border-bottom:1px solid var(--line);text-align:left}td{white-space:nowrap}.n{text-align:right}
"""


@dataclass(frozen=True)
class NotebookInfo:
    """Title and question of a notebook, from its first cell.

    Attributes:
        stem: file name without suffix, e.g. "06_evaluate".
        title: without its number.
        question: the text after **Question.**.
        source: source of all cells.
    """

    stem: str
    title: str
    question: str
    source: str = ""

    def produced(self, name: str) -> bool:
        """Whether a finding, figure or table of this name was made by this notebook."""
        return name[:3] == self.stem[:3]

    def order(self, name: str) -> int:
        """Position in the source that names a figure or table, or its series ("06_film_0"); the end if there is none."""
        named = re.search(rf'"{name.rstrip("0123456789")}["{{]', self.source)
        return named.start() if named else len(self.source)


def list_notebooks(notebooks: Path | None = None) -> list[NotebookInfo]:
    """The notebooks of a folder, in order."""
    return [read_notebook_info(path) for path in sorted((notebooks or ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]


def read_notebook_info(path: Path) -> NotebookInfo:
    """Title and question from a notebook's first cell."""
    cells = json.loads(path.read_text())["cells"]
    text = "".join(cells[0]["source"]) if cells else ""
    title = re.search(r"^#\s+(?:\d\d\s+)?(.+)$", text, re.MULTILINE)
    question = re.search(r"\*\*Question\.?\*\*\.?\s*(.+?)(?:\n\s*\n|\Z)", text, re.DOTALL)
    return NotebookInfo(
        path.stem,
        title.group(1).strip() if title else path.stem[3:].replace("_", " "),
        " ".join(question.group(1).split()) if question else "",
        "".join(line for cell in cells for line in cell["source"]),
    )


def clean_results(results: Path) -> None:
    """Remove withdrawn statements from findings and executed notebooks, and shrink the notebooks; idempotent."""
    for folder in (results, results / FULL):
        amend(folder)
        for path in executed(folder):
            notebook = json.loads(path.read_text())
            if (small := cleaned(notebook)) != notebook:
                atomic_write(path, json.dumps(small, indent=1, ensure_ascii=False) + "\n")


def html_report(results: Path | None = None, notebooks: Path | None = None) -> Path:
    """Write ``results/report.html``: every notebook's question, findings, figures and tables, or its traceback."""
    results = results or results_dir()
    clean_results(results)
    found, listed = load_findings(results), list_notebooks(notebooks)
    sections = [_section(notebook, found, results) for notebook in listed]
    others = [f for f in found if not any(c.produced(f["name"]) for c in listed)]
    sections += [f"<h2>Further findings</h2>{_findings_html(others)}"] if others else []
    links = "".join(
        f'<a href="#{html.escape(quote(c.stem))}">{html.escape(c.stem[:2])} {html.escape(c.title)}</a>' for c in listed
    )
    links += f'<a href="{FULL}/report.html">Profile full</a>' if (results / FULL / "report.html").exists() else ""
    origin = provenance()
    hardware, commit = origin["hardware"], (origin["commit"] or "unknown")[:8]
    made = f"Page made {origin['date']}, commit {commit}, {hardware['cpu']}, {hardware['cores']} cores. {READING_NOTE}"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>rvlm: what was found</title><style>{CSS}</style></head><body><h1>What was found</h1>"
        f'<p class="meta">{html.escape(made)}</p><nav>{links}</nav>{"".join(sections)}</body></html>\n'
    )
    return atomic_write(results / "report.html", page)


def _section(notebook: NotebookInfo, found: list[dict[str, Any]], results: Path) -> str:
    parts = [f'<h2 id="{html.escape(notebook.stem)}">{html.escape(notebook.stem[:2])} {html.escape(notebook.title)}</h2>']
    parts.append(f'<p class="q">{html.escape(notebook.question)}</p>')
    failed, copy = (results / "notebooks" / f"{notebook.stem}{suffix}.ipynb" for suffix in (".failed", ""))
    if failed.exists():
        parts.append(_failure_html(failed))
    parts.append(_findings_html([f for f in found if notebook.produced(f["name"])]))
    shown = [path for path in [*results.glob("figures/*.png"), *results.glob("tables/*.csv")] if notebook.produced(path.stem)]
    shown.sort(key=lambda path: (notebook.order(path.stem), path.stem, path.suffix))
    parts.append('<div class="shown">')
    parts += [_figure_html(path) if path.suffix == ".png" else _table_html(path) for path in shown]
    parts.append("</div>")
    if copy.exists():
        parts.append(f'<p class="meta">Executed notebook: <a href="{_href("notebooks", copy)}">{html.escape(copy.name)}</a></p>')
    return "".join(parts)


def _findings_html(found: list[dict[str, Any]]) -> str:
    def bold(text: str) -> str:
        return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))

    def withdrawn(record: dict[str, Any]) -> str:
        lines = [f"<li><s>{html.escape(t['text'])}</s> {html.escape(t['why'])}</li>" for t in record.get("withdrawn", ())]
        lines += [f"<li>{html.escape(note)}</li>" for note in record.get("notes", ())]
        return f"<ul>{''.join(lines)}</ul>" if lines else ""

    return "".join(
        f'<div class="f">{html.escape(f["sentence"])}{withdrawn(f)}<br><small>{bold(provenance_line(f))}</small></div>'
        for f in found
    )


def _figure_html(path: Path) -> str:
    from PIL import Image

    image, buffer = Image.open(path), io.BytesIO()
    image.convert("RGB").quantize(256).convert("RGB").save(buffer, format="webp", lossless=True)
    width, data = round(PX_PER_DOT * image.width), base64.b64encode(buffer.getvalue()).decode()
    size = f'{"class=page " if width > 600 else ""}width="{width}"'
    alt = html.escape(image.info.get("Title", f"Figure {path.stem}"))
    name, link = html.escape(path.stem), _href("figures", path.with_suffix(".pdf"))
    return (
        f'<figure><a class="scroll" href="{link}"><img {size} alt="{alt}" src="data:image/webp;base64,{data}"></a>'
        f'<figcaption>Figure {name} (<a href="{link}">PDF</a>)</figcaption></figure>'
    )


def _href(folder: str, path: Path) -> str:
    """An escaped link to a file of a folder."""
    return html.escape(f"{folder}/{quote(path.name)}")


def _table_html(path: Path) -> str:
    import pandas as pd

    table = pd.read_csv(path).convert_dtypes()
    is_number = [pd.api.types.is_numeric_dtype(kind) and kind != "boolean" for kind in table.dtypes]
    rows = [("th", table.columns), *(("td", row) for row in table.to_dict("split")["data"])]
    return (
        f'<figure><div class="scroll"><table>{"".join(_row_html(tag, row, is_number) for tag, row in rows)}</table></div>'
        f'<figcaption>Table {html.escape(path.stem)} (<a href="{_href("tables", path)}">CSV</a>)</figcaption></figure>'
    )


def _row_html(tag: str, row: Iterable[Any], is_number: list[bool]) -> str:
    cells = (f"<{tag}{' class=n' if right else ''}>{_cell(value)}</{tag}>" for value, right in zip(row, is_number, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def _cell(value: Any) -> str:
    """A value to three significant digits, with thousands separators; a dash for a missing value."""
    if isinstance(value, bool | str):
        return html.escape(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:#.3g}".rstrip(".") if isinstance(value, float) else "–"


def _failure_html(path: Path) -> str:
    """The last traceback of an executed notebook, or the error in its metadata."""
    notebook = json.loads(path.read_text())
    errors = [out for cell in notebook["cells"] for out in cell.get("outputs", []) if out["output_type"] == "error"]
    text = (
        "\n".join(errors[-1]["traceback"])
        if errors
        else notebook["metadata"].get("rvlm", {}).get("error", "no traceback was kept")
    )
    text = html.escape(re.sub(r"\x1b\[[0-9;]*m", "", text))
    note = "This notebook failed; results below, if any, are from an earlier run."
    link = f'<a href="{_href("notebooks", path)}">{html.escape(path.name)}</a>'
    return f'<div class="fail"><b>{note}</b> {link}<pre>{text}</pre></div>'
