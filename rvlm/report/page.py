"""Notebooks and what they found as a page: the HTML report, made from first cells and results."""

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
READING = "Each finding names its own commit. In tables, low and high are the ends of 95 % intervals."
FULL = "full"  # folder of results where those of the profile of that name are kept
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
    """What a notebook's first cell says of it.

    Attributes:
        stem: file name without suffix, e.g. "06_evaluate".
        title: without its number.
        question: the text after **Question.**.
        source: of all its cells.
    """

    stem: str
    title: str
    question: str
    source: str = ""

    def owns(self, name: str) -> bool:
        """Does a finding, figure or table of this name come from this notebook?"""
        return name[:3] == self.stem[:3]

    def place(self, name: str) -> int:
        """Where it names a figure or table, or the first of a series ("06_film_0"); after all others if it does not."""
        named = re.search(rf'"{name.rstrip("0123456789")}["{{]', self.source)
        return named.start() if named else len(self.source)


def chapters(notebooks: Path | None = None) -> list[NotebookInfo]:
    """The ordered notebooks of a folder."""
    return [read_chapter(path) for path in sorted((notebooks or ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]


def read_chapter(path: Path) -> NotebookInfo:
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


def put_in_order(results: Path) -> None:
    """Take withdrawn statements out of findings and executed notebooks, and make these small; what is so already stays."""
    for folder in (results, results / FULL):
        amend(folder)
        for path in executed(folder):
            notebook = json.loads(path.read_text())
            if (small := cleaned(notebook)) != notebook:
                atomic_write(path, json.dumps(small, indent=1, ensure_ascii=False) + "\n")


def html_report(results: Path | None = None, notebooks: Path | None = None) -> Path:
    """Write ``results/report.html``: every notebook's question, findings, figures and tables in one file, or its traceback."""
    results = results or results_dir()
    put_in_order(results)
    found, listed = load_findings(results), chapters(notebooks)
    sections = [_section(chapter, found, results) for chapter in listed]
    others = [f for f in found if not any(c.owns(f["name"]) for c in listed)]
    sections += [f"<h2>Further findings</h2>{_findings_html(others)}"] if others else []
    links = "".join(
        f'<a href="#{html.escape(quote(c.stem))}">{html.escape(c.stem[:2])} {html.escape(c.title)}</a>' for c in listed
    )
    links += f'<a href="{FULL}/report.html">Profile full</a>' if (results / FULL / "report.html").exists() else ""
    origin = provenance()
    hardware, commit = origin["hardware"], (origin["commit"] or "unknown")[:8]
    made = f"Page made {origin['date']}, commit {commit}, {hardware['cpu']}, {hardware['cores']} cores. {READING}"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>rvlm: what was found</title><style>{CSS}</style></head><body><h1>What was found</h1>"
        f'<p class="meta">{html.escape(made)}</p><nav>{links}</nav>{"".join(sections)}</body></html>\n'
    )
    return atomic_write(results / "report.html", page)


def _section(chapter: NotebookInfo, found: list[dict[str, Any]], results: Path) -> str:
    parts = [f'<h2 id="{html.escape(chapter.stem)}">{html.escape(chapter.stem[:2])} {html.escape(chapter.title)}</h2>']
    parts.append(f'<p class="q">{html.escape(chapter.question)}</p>')
    failed, copy = (results / "notebooks" / f"{chapter.stem}{suffix}.ipynb" for suffix in (".failed", ""))
    if failed.exists():
        parts.append(_failure_html(failed))
    parts.append(_findings_html([f for f in found if chapter.owns(f["name"])]))
    shown = [path for path in [*results.glob("figures/*.png"), *results.glob("tables/*.csv")] if chapter.owns(path.stem)]
    shown.sort(key=lambda path: (chapter.place(path.stem), path.stem, path.suffix))
    parts.append('<div class="shown">')
    parts += [_figure_html(path) if path.suffix == ".png" else _table_html(path) for path in shown]
    parts.append("</div>")
    if copy.exists():
        parts.append(f'<p class="meta">Executed notebook: <a href="{_href("notebooks", copy)}">{html.escape(copy.name)}</a></p>')
    return "".join(parts)


def _findings_html(found: list[dict[str, Any]]) -> str:
    def bold(text: str) -> str:
        return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))

    def taken_back(record: dict[str, Any]) -> str:
        lines = [f"<li><s>{html.escape(t['text'])}</s> {html.escape(t['why'])}</li>" for t in record.get("withdrawn", ())]
        lines += [f"<li>{html.escape(note)}</li>" for note in record.get("notes", ())]
        return f"<ul>{''.join(lines)}</ul>" if lines else ""

    return "".join(
        f'<div class="f">{html.escape(f["sentence"])}{taken_back(f)}<br><small>{bold(provenance_line(f))}</small></div>'
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
    """A link to a file of a folder, whatever its name holds."""
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
    """Three significant digits, thousands apart, a dash where there is nothing."""
    if isinstance(value, bool | str):
        return html.escape(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:#.3g}".rstrip(".") if isinstance(value, float) else "–"


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
    link = f'<a href="{_href("notebooks", path)}">{html.escape(path.name)}</a>'
    return f'<div class="fail"><b>{note}</b> {link}<pre>{text}</pre></div>'
