"""Statements that are taken back: out of the findings, and struck out in the executed notebooks under a banner that says why.

`results/withdrawn.yml` lists them. Findings of that time also get the verdicts that today's rule gives them, as far as their
recorded intervals tell: none below three trainings, else by Student's t, adjusted by Holm for all contrasts that the notebook had
at first. What a finding said at first stays in it, as `said`.
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
TAG = "withdrawn"  # of the banner's cell
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
    """A finding without what is withdrawn, its verdicts by today's rule; as it is if it was found after the mend.

    Adds `said` (the sentence at first), `withdrawn` (what was taken back, each with its reason) and `notes` (what to bear in
    mind with the rest). Amending again changes nothing.
    """
    listed = listed or withdrawn()
    if record.get("date", "9") >= listed["before"]:
        return record
    name, first = record["name"], record.get("said", record["sentence"])
    sentence, taken, hidden = _without(listed["claims"].get(name, ()), listed["reasons"], first)
    for change in listed.get("reworded", {}).get(name, ()):
        sentence = re.sub(change["says"], change["reads"], sentence, count=1)
    family = max(len(_STATED.findall(first)), listed.get("contrasts", {}).get(name, 0))  # before anything was cut out
    sentence, words = _judged_anew(_tidy(sentence), record, family)
    notes = listed["notes"].get(name, [])
    if sentence == first and not taken and not notes:
        return record
    kept = {"sentence": sentence, "said": first, "withdrawn": taken, "notes": notes}
    intervals = record["interval"]
    if isinstance(intervals, dict):  # an interval of what is withdrawn is not in the fine print any more
        kept["interval"] = {k: v for k, v in intervals.items() if k not in hidden and not any(k in t["text"] for t in taken)}
    if record.get("verdict"):
        kept["verdict"] = next(iter(words.values())) if len(words) == 1 else words or None
    return record | kept


def _without(claims: Iterable[dict[str, Any]], reasons: dict[str, Any], said: str) -> tuple[str, list[dict[str, str]], list[str]]:
    """A sentence without what is withdrawn; what was taken back, with reasons; the names of intervals that go with it."""
    taken, hidden = [], []
    for claim in claims:
        found = re.search(claim["says"], said) if "says" in claim else None
        text = found.group() if found else claim.get("shows")
        if found:
            said = said[: found.start()] + said[found.end() :]
        if text:
            taken.append({"text": text.strip(" :;,."), **reasons[claim["reason"]]})
            hidden += claim.get("keys", [])
    return said, taken, hidden


def trainings_of(record: dict[str, Any]) -> int:
    """How many trainings of each side a finding rests on."""
    return int(record["numbers"].get("trainings") or record["numbers"].get("seeds") or 1)


def _tidy(sentence: str) -> str:
    """A sentence without the seams of what was cut out of it."""
    sentence = re.sub(r"; that the first is nearer is: flow over mlp \w+", "; flow over mlp", sentence)
    sentence = re.sub(r"each: At a", "each. At a", sentence)
    sentence = re.sub(r"\s+([.;,])", r"\1", re.sub(r"[;,:]\s*(?=\.)", "", sentence))
    sentence = sentence.strip(" ;,")
    return sentence[:1].upper() + sentence[1:]


def _judged_anew(sentence: str, record: dict[str, Any], family: int) -> tuple[str, dict[str, str]]:
    """A sentence with today's verdict words for the contrasts [points] that it states, and these words by contrast."""
    found, n = list(_STATED.finditer(sentence)), trainings_of(record)
    if not found:
        return sentence, {}
    if n < MIN_TRAININGS:
        note = " One training each: no verdict." if n == 1 else f" {n} trainings each: no verdict."
        words, by_contrast = ["no verdict"] * len(found), {}
    else:
        stated = [tuple(int(m[k] or m[k + "2"]) for k in ("at", "low", "high")) for m in found]
        words, note = _by_holm([_unrounded(record, *contrast) for contrast in stated], n, family), ""
        contrasts = [re.split(r"[.;] ", sentence[: m.start()])[-1].strip(" :") for m in found]
        by_contrast = dict(zip(contrasts, words, strict=True))
    for match, word in reversed(list(zip(found, words, strict=True))):
        group = "word" if match["word"] else "word2"
        sentence = sentence[: match.start(group)] + word + sentence[match.end(group) :]
    return sentence + note, by_contrast


def _unrounded(record: dict[str, Any], at: int, low: int, high: int) -> tuple[float, float, float]:
    """A stated contrast [points] with the digits that its finding keeps; as it was stated if it keeps none."""
    kept = [x for x in (record["interval"] or {}).values() if isinstance(x, dict)] if isinstance(record["interval"], dict) else []
    points = [(100 * x["estimate"], 100 * x["low"], 100 * x["high"]) for x in kept if "estimate" in x]
    points += [tuple(x) for key, x in record["numbers"].items() if key.endswith("_points") and len(x) == 3]
    return next((x for x in points if tuple(map(round, x)) == (at, low, high)), (at, low, high))


def _by_holm(contrasts: list[tuple[float, float, float]], n_trainings: int, family: int, level: float = 0.95) -> list[str]:
    """Verdicts on (estimate, low, high), of intervals by the bootstrap, for a family of at least as many contrasts.

    Student's t with ``n_trainings - 1`` degrees of freedom; a bootstrap over m trainings has ``(m - 1) / m`` of their variance.
    Contrasts of the family whose intervals are not known count as if they came last, by which none is called too much.
    """
    from scipy.stats import norm, t

    def p(at: float, low: float, high: float) -> float:
        error = (high - low) / (2 * norm.ppf((1 + level) / 2)) * math.sqrt(n_trainings / (n_trainings - 1))
        return float(2 * t.sf(abs(at) / max(error, 1e-9), n_trainings - 1))

    alone, words, worst = [p(*contrast) for contrast in contrasts], ["undecided"] * len(contrasts), 0.0
    for rank, i in enumerate(sorted(range(len(alone)), key=alone.__getitem__)):
        worst = max(worst, (family - rank) * alone[i])
        if worst < 1 - level:
            words[i] = "supported" if contrasts[i][0] > 0 else "reversed"
    return words


# --- findings and executed notebooks ------------------------------------------------------------------------------------


def amend(results: Path, listed: dict[str, Any] | None = None) -> list[Path]:
    """Amend every finding of a results folder, and the executed notebook that states it; returns the files that changed."""
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
    """Delete the tables of what is withdrawn from a finding; returns their files."""
    claims = listed["claims"].get(record["name"], ()) if "said" in record else ()
    gone = [path for claim in claims for name in claim.get("tables", ()) for path in sorted(folder.glob(f"{name}.*"))]
    for path in gone:
        path.unlink()
    return gone


def _written(path: Path, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Path]:
    if new != old:
        yield atomic_write(path, json.dumps(new, indent=1, ensure_ascii=False) + "\n")


def struck(notebook: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """An executed notebook with a banner on top, its finding struck out and stated anew; the same again changes nothing."""
    cells = [cell for cell in notebook["cells"] if TAG not in cell["metadata"].get("tags", [])]
    cells = [_finding_cell(cell, record) if "finding" in cell["metadata"].get("tags", []) else cell for cell in cells]
    banner = {"cell_type": "markdown", "id": TAG, "metadata": {"tags": [TAG]}, "source": banner_of(record).splitlines(True)}
    return notebook | {"cells": [banner, *cells]}


def banner_of(record: dict[str, Any]) -> str:
    """What no longer stands, and why, as Markdown."""
    lines = [
        f"> **Not all of this stands.** This copy was executed on {record['date'][:10]}. A verdict now needs {MIN_TRAININGS} "
        "trainings of each side, is adjusted for several contrasts, and is called supported, reversed or undecided; where a "
        "cell, table or figure below says (not) replicated or names a winner, read the finding at the end."
    ]
    whys = dict.fromkeys(taken["why"] for taken in record["withdrawn"])
    lines += [">", "> Withdrawn:", ">"] if whys else []
    for why in whys:
        what = "; ".join(f"~~{as_markdown(taken['text'])}~~" for taken in record["withdrawn"] if taken["why"] == why)
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
