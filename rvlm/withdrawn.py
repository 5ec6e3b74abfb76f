"""Statements that are taken back: out of the findings, and struck out in the executed notebooks under a banner that says why.

`results/withdrawn.yml` lists them. Findings of that time also get the verdicts that today's rule gives them: none below three
trainings, and of the others those that Holm's adjustment leaves. What a finding said at first stays in it, as `said`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from rvlm.files import ROOT, write_whole
from rvlm.report import Finding, as_markdown
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
    """The list: `before` (ISO date), `reasons` by name, `claims` and `notes` by the name of their finding."""
    return yaml.safe_load(path.read_text()) if path.exists() else {"before": "", "reasons": {}, "claims": {}, "notes": {}}


def amended(record: dict[str, Any], listed: dict[str, Any] | None = None) -> dict[str, Any]:
    """A finding without what is withdrawn, its verdicts by today's rule; as it is if it was found after the mend.

    Adds `said` (the sentence at first), `withdrawn` (what was taken back, each with its reason) and `notes` (what to bear in
    mind with the rest). Amending again changes nothing.
    """
    listed = listed or withdrawn()
    if record.get("date", "9") >= listed["before"]:
        return record
    first = record.get("said", record["sentence"])
    sentence, taken = first, []
    for claim in listed["claims"].get(record["name"], ()):
        found = re.search(claim["says"], sentence) if "says" in claim else None
        text = found.group() if found else claim.get("shows")
        if found:
            sentence = sentence[: found.start()] + sentence[found.end() :]
        if text:
            taken.append({"text": text.strip(" :;,."), **listed["reasons"][claim["reason"]]})
    n = trainings_of(record)
    sentence = _judged_anew(_tidy(sentence), n)
    notes = listed["notes"].get(record["name"], [])
    if sentence == first and not taken and not notes:
        return record
    kept = {"sentence": sentence, "said": first, "withdrawn": taken, "notes": notes}
    intervals = record["interval"]
    if isinstance(intervals, dict):  # an interval of what is withdrawn is not in the fine print any more
        kept["interval"] = {k: v for k, v in intervals.items() if not any(k in t["text"] for t in taken)}
    if record.get("verdict") and n < MIN_TRAININGS:
        kept["verdict"] = None
    elif record.get("verdict"):
        kept["verdict"] = next(iter(re.findall(r"supported|reversed|undecided", sentence)), None)
    return record | kept


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


def _judged_anew(sentence: str, n_trainings: int) -> str:
    """Verdict words by today's rule, from the intervals [points] that the sentence itself states."""
    found = list(_STATED.finditer(sentence))
    if not found:
        return sentence
    if n_trainings < MIN_TRAININGS:
        words = ["no verdict"] * len(found)
        note = " One training each: no verdict." if n_trainings == 1 else f" {n_trainings} trainings each: no verdict."
    else:
        words, note = _by_holm([[int(m[k] or m[k + "2"]) for k in ("at", "low", "high")] for m in found]), ""
    for match, word in reversed(list(zip(found, words, strict=True))):
        group = "word" if match["word"] else "word2"
        sentence = sentence[: match.start(group)] + word + sentence[match.end(group) :]
    return sentence + note


def _by_holm(contrasts: list[list[int]], level: float = 0.95) -> list[str]:
    """Verdicts on (estimate, low, high) that were stated together; p-values as if estimates were normal."""
    from scipy.stats import norm

    def p(at: int, low: int, high: int) -> float:
        width = max(at - low if at > 0 else high - at, 1e-9)
        return float(2 * norm.sf(abs(at) / width * norm.ppf((1 + level) / 2)))

    alone, words, worst = [p(*contrast) for contrast in contrasts], ["undecided"] * len(contrasts), 0.0
    for rank, i in enumerate(sorted(range(len(alone)), key=alone.__getitem__)):
        worst = max(worst, (len(alone) - rank) * alone[i])
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
    return changed


def _written(path: Path, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Path]:
    if new != old:
        yield write_whole(path, json.dumps(new, indent=1, ensure_ascii=False) + "\n")


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
