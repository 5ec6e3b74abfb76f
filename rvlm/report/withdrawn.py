"""Withdrawn statements: removed from the findings, and struck out in the executed notebooks under a banner with the reasons.

`results/withdrawn.yml` lists them. Findings of that time also get the verdicts of the present rule, from their recorded
intervals: none below three trainings, else by Student's t, adjusted by Holm for all contrasts of the original sentence. The
original sentence stays in the finding as `said`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from rvlm.files import ROOT, atomic_write
from rvlm.report.findings import Finding, as_markdown
from rvlm.statistics.verdicts import MIN_TRAININGS

LIST = ROOT / "results" / "withdrawn.yml"
TAG = "withdrawn"  # tag of the banner's cell
_NUMBERS = r"(?P<at>[+-]\d+) points, (?P<low>[+-]\d+) to (?P<high>[+-]\d+)"
_OLD = r"(?P<word>not replicated|replicated|undecided)"
_STATED = re.compile(
    rf"{_OLD} \({_NUMBERS}\)|(?P<at2>[+-]\d+) points \((?P<low2>[+-]\d+) to (?P<high2>[+-]\d+), {_OLD.replace('word', 'word2')}\)"
)


@functools.cache
def withdrawn(path: Path = LIST) -> dict[str, Any]:
    """The list: `before` (ISO date), `reasons` by name; by finding's name `claims`, `reworded`, `notes` and `contrasts`."""
    return yaml.safe_load(path.read_text()) if path.exists() else {"before": "", "reasons": {}, "claims": {}, "notes": {}}


def amended(record: dict[str, Any], listed: dict[str, Any] | None = None) -> dict[str, Any]:
    """A finding without its withdrawn statements, its verdicts by the present rule; unchanged if it is newer than the list.

    Adds `said` (the original sentence), `withdrawn` (the withdrawn statements, each with its reason) and `notes` (caveats for
    the rest). Idempotent.
    """
    listed = listed or withdrawn()
    if record.get("date", "9") >= listed["before"]:
        return record
    name, original = record["name"], record.get("said", record["sentence"])
    sentence, removed, hidden = _without(listed["claims"].get(name, ()), listed["reasons"], original)
    for change in listed.get("reworded", {}).get(name, ()):
        sentence = re.sub(change["says"], change["reads"], sentence, count=1)
    n_contrasts = max(len(_STATED.findall(original)), listed.get("contrasts", {}).get(name, 0))  # of the original sentence
    sentence, words = _with_present_verdicts(_tidy(sentence), record, n_contrasts)
    notes = listed["notes"].get(name, [])
    if sentence == original and not removed and not notes:
        return record
    kept = {"sentence": sentence, "said": original, "withdrawn": removed, "notes": notes}
    intervals = record["interval"]
    if isinstance(intervals, dict):  # without those of withdrawn statements
        kept["interval"] = {k: v for k, v in intervals.items() if k not in hidden and not any(k in r["text"] for r in removed)}
    if record.get("verdict"):
        kept["verdict"] = next(iter(words.values())) if len(words) == 1 else words or None
    return record | kept


def _without(
    claims: Iterable[dict[str, Any]], reasons: dict[str, Any], sentence: str
) -> tuple[str, list[dict[str, str]], list[str]]:
    """The sentence without withdrawn statements; these with their reasons; the names of their intervals."""
    removed, hidden = [], []
    for claim in claims:
        found = re.search(claim["says"], sentence) if "says" in claim else None
        text = found.group() if found else claim.get("shows")
        if found:
            sentence = sentence[: found.start()] + sentence[found.end() :]
        if text:
            removed.append({"text": text.strip(" :;,."), **reasons[claim["reason"]]})
            hidden += claim.get("keys", [])
    return sentence, removed, hidden


def trainings_of(record: dict[str, Any]) -> int:
    """Number of trainings on each side of a finding's comparison."""
    return int(record["numbers"].get("trainings") or record["numbers"].get("seeds") or 1)


def _tidy(sentence: str) -> str:
    """Repair punctuation and capitals after statements were cut out."""
    sentence = re.sub(r"; that the first is nearer is: flow over mlp \w+", "; flow over mlp", sentence)
    sentence = re.sub(r"each: At a", "each. At a", sentence)
    sentence = re.sub(r"\s+([.;,])", r"\1", re.sub(r"[;,:]\s*(?=\.)", "", sentence))
    sentence = sentence.strip(" ;,")
    return sentence[:1].upper() + sentence[1:]


def _with_present_verdicts(sentence: str, record: dict[str, Any], n_contrasts: int) -> tuple[str, dict[str, str]]:
    """The sentence with the present rule's verdicts for its contrasts [points], and these verdicts by contrast."""
    found, n = list(_STATED.finditer(sentence)), trainings_of(record)
    if not found:
        return sentence, {}
    if n < MIN_TRAININGS:
        note = " One training each: no verdict." if n == 1 else f" {n} trainings each: no verdict."
        words, by_contrast = ["no verdict"] * len(found), {}
    else:
        stated = [tuple(int(m[k] or m[k + "2"]) for k in ("at", "low", "high")) for m in found]
        words, note = _by_holm([_unrounded(record, *contrast) for contrast in stated], n, n_contrasts), ""
        contrasts = [re.split(r"[.;] ", sentence[: m.start()])[-1].strip(" :") for m in found]
        by_contrast = dict(zip(contrasts, words, strict=True))
    for match, word in reversed(list(zip(found, words, strict=True))):
        group = "word" if match["word"] else "word2"
        sentence = sentence[: match.start(group)] + word + sentence[match.end(group) :]
    return sentence + note, by_contrast


def _unrounded(record: dict[str, Any], at: int, low: int, high: int) -> tuple[float, float, float]:
    """A stated contrast [points] with the precision recorded in its finding; as stated if none is recorded."""
    kept = [x for x in (record["interval"] or {}).values() if isinstance(x, dict)] if isinstance(record["interval"], dict) else []
    points = [(100 * x["estimate"], 100 * x["low"], 100 * x["high"]) for x in kept if "estimate" in x]
    points += [tuple(x) for key, x in record["numbers"].items() if key.endswith("_points") and len(x) == 3]
    return next((x for x in points if tuple(map(round, x)) == (at, low, high)), (at, low, high))


def _by_holm(contrasts: list[tuple[float, float, float]], n_trainings: int, n_contrasts: int, level: float = 0.95) -> list[str]:
    """Verdicts on contrasts (estimate, low, high) with bootstrap intervals, adjusted by Holm for ``n_contrasts``.

    Student's t with ``n_trainings - 1`` degrees of freedom; a bootstrap over m trainings has ``(m - 1) / m`` of their variance.
    Contrasts without known intervals rank last, which is conservative.
    """
    from scipy.stats import norm, t

    def p(at: float, low: float, high: float) -> float:
        error = (high - low) / (2 * norm.ppf((1 + level) / 2)) * math.sqrt(n_trainings / (n_trainings - 1))
        return float(2 * t.sf(abs(at) / max(error, 1e-9), n_trainings - 1))

    p_values, words, worst = [p(*contrast) for contrast in contrasts], ["undecided"] * len(contrasts), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, (n_contrasts - rank) * p_values[i])
        if worst < 1 - level:
            words[i] = "supported" if contrasts[i][0] > 0 else "reversed"
    return words


# --- findings and executed notebooks ------------------------------------------------------------------------------------


def amend(results: Path, listed: dict[str, Any] | None = None) -> list[Path]:
    """Amend every finding of a results folder and its executed notebook; returns the changed files."""
    changed = []
    for path in sorted((results / "findings").glob("*.json")):
        record = json.loads(path.read_text())
        new = amended(record, listed)
        changed += [*_written(path, record, new)] if new != record else []
        for copy in sorted((results / "notebooks").glob(f"{record['name'][:3]}*.ipynb")) if "said" in new else []:
            notebook = json.loads(copy.read_text())
            changed += [*_written(copy, notebook, struck(notebook, new))]
        changed += _without_tables(results / "tables", new, listed or withdrawn())
    return changed


def _without_tables(folder: Path, record: dict[str, Any], listed: dict[str, Any]) -> list[Path]:
    """Delete the tables of a finding's withdrawn statements; returns their files."""
    claims = listed["claims"].get(record["name"], ()) if "said" in record else ()
    gone = [path for claim in claims for name in claim.get("tables", ()) for path in sorted(folder.glob(f"{name}.*"))]
    for path in gone:
        path.unlink()
    return gone


def _written(path: Path, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Path]:
    if new != old:
        yield atomic_write(path, json.dumps(new, indent=1, ensure_ascii=False) + "\n")


def struck(notebook: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """An executed notebook with a banner on top and its finding struck out and restated; idempotent."""
    cells = [cell for cell in notebook["cells"] if TAG not in cell["metadata"].get("tags", [])]
    cells = [_finding_cell(cell, record) if "finding" in cell["metadata"].get("tags", []) else cell for cell in cells]
    banner = {"cell_type": "markdown", "id": TAG, "metadata": {"tags": [TAG]}, "source": banner_of(record).splitlines(True)}
    return notebook | {"cells": [banner, *cells]}


def banner_of(record: dict[str, Any]) -> str:
    """The withdrawn statements of a finding with their reasons, as Markdown."""
    lines = [
        f"> **Not all of this stands.** This copy was executed on {record['date'][:10]}. A verdict now needs {MIN_TRAININGS} "
        "trainings of each side, is adjusted for several contrasts, and is called supported, reversed or undecided; where a "
        "cell, table or figure below says (not) replicated or names a winner, read the finding at the end."
    ]
    whys = dict.fromkeys(entry["why"] for entry in record["withdrawn"])
    lines += [">", "> Withdrawn:", ">"] if whys else []
    for why in whys:
        what = "; ".join(f"~~{as_markdown(entry['text'])}~~" for entry in record["withdrawn"] if entry["why"] == why)
        lines.append(f"> - {what}. {as_markdown(why)}")
    lines += [">", "> Read with care:", ">"] if record["notes"] else []
    lines += [f"> - {as_markdown(note)}" for note in record["notes"]]
    return "\n".join(lines)


def _finding_cell(cell: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    old = f"> ~~{as_markdown(record['said'])}~~\n>\n" if record["said"] != record["sentence"] else ""
    markdown = old + Finding(record)._repr_markdown_()
    data = {"text/markdown": markdown.splitlines(True), "text/plain": [record["sentence"]]}
    shown = [
        out | {"data": data}
        if "text/markdown" in out.get("data", {}) and "Finding" in "".join(out["data"]["text/markdown"])
        else out
        for out in cell.get("outputs", [])
    ]
    return cell | {"outputs": shown}
