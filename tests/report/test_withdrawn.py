"""What is withdrawn is out of the findings, struck out in the executed notebooks, and nowhere in README and log."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from rvlm.files import ROOT
from rvlm.report.copies import cleaned, executed
from rvlm.report.withdrawn import TAG, amend, amended, withdrawn

LISTED = {
    "before": "2026-01-02",
    "reasons": {"frozen": {"what": "pre-training", "why": "It was frozen."}},
    "claims": {"08_cross": [{"says": "pre-training helps: .*?; ", "reason": "frozen"}]},
    "notes": {},
}


def record(sentence, n_trainings=5, **changes):
    values = {"name": "08_cross", "sentence": sentence, "numbers": {"trainings": n_trainings}, "n": 200, "seeds": [0]}
    return {**values, "interval": None, "verdict": "replicated", "date": "2026-01-01", **changes}


TWO = "pre-training helps: replicated (+14 points, +4 to +24); other robots help: {} ({} points, {} to {})."


def test_a_withdrawn_claim_is_cut_out_and_kept_with_its_reason():
    first = TWO.format("replicated", "+22", "+12", "+32")
    found = amended(record(first), LISTED)
    assert found["sentence"] == "Other robots help: supported (+22 points, +12 to +32)."
    assert found["said"] == first and found["verdict"] == "supported"
    assert [(t["text"], t["why"]) for t in found["withdrawn"]] == [
        ("pre-training helps: replicated (+14 points, +4 to +24)", "It was frozen.")
    ]
    assert amended(found, LISTED) == found


def test_findings_after_the_fix_are_not_amended():
    new = record(TWO.format("supported", "+22", "+12", "+32"), date="2026-01-03")
    assert amended(new, LISTED) is new


@pytest.mark.parametrize("n_trainings, note", [(1, "One training each: no verdict."), (2, "2 trainings each: no verdict.")])
def test_below_three_trainings_there_is_no_verdict(n_trainings, note):
    found = amended(record("A beats B: replicated (+9 points, +1 to +17).", n_trainings), LISTED)
    assert found["sentence"] == f"A beats B: no verdict (+9 points, +1 to +17). {note}" and found["verdict"] is None


WORD = re.compile("supported|reversed|undecided")


def test_old_verdicts_become_those_of_todays_rule_adjusted_for_several_contrasts():
    first = "A: replicated (+26 points, +14 to +39); B: not replicated (-30 points, -35 to -25); "
    first += "C: -4 points (-9 to -1, not replicated)."
    found = amended(record(first), LISTED)
    assert WORD.findall(found["sentence"]) == ["supported", "reversed", "undecided"]
    assert found["verdict"] == {"A": "supported", "B": "reversed", "C": "undecided"}, "one word for each contrast"
    many = "; ".join(f"D{i}: undecided (+0 points, -4 to +4)" for i in range(9))
    words = WORD.findall(amended(record(f"{first[:-1]}; {many}."), LISTED)["sentence"])
    assert words[:3] == ["undecided", "reversed", "undecided"], "of twelve contrasts one at p = 0.02 shows nothing"


@pytest.mark.parametrize("n_trainings, word", [(5, "undecided"), (30, "supported")])
def test_few_trainings_use_students_t(n_trainings, word):
    assert amended(record("A: replicated (+14 points, +4 to +24).", n_trainings), LISTED)["verdict"] == word


def test_contrasts_are_counted_before_any_is_cut_out_and_with_those_that_no_sentence_states():
    first, second = TWO.format("replicated", "+19", "+9", "+29"), TWO.format("replicated", "+22", "+12", "+32")
    alone = "Other robots help: replicated (+19 points, +9 to +29)."
    words = [amended(record(sentence), LISTED)["verdict"] for sentence in (alone, first, second)]
    assert words == ["supported", "undecided", "supported"]
    listed = LISTED | {"contrasts": {"08_cross": 3}}
    assert [amended(record(sentence), listed)["verdict"] for sentence in (alone, second)] == ["undecided", "undecided"]


def test_verdicts_come_from_the_unrounded_values_of_a_finding():
    """Rounded to whole points this interval would exclude zero."""
    kept, sentence = {"A": {"estimate": 0.156, "low": 0.056, "high": 0.264}}, "A: replicated (+16 points, +6 to +26)."
    assert amended(record(sentence), LISTED)["verdict"] == "supported"
    assert amended(record(sentence, interval=kept), LISTED)["verdict"] == "undecided"


def test_reworded_statements_and_everything_that_belongs_to_a_claim(tmp_path):
    claim = LISTED["claims"]["08_cross"][0] | {"keys": ["gain"], "tables": ["08_t"]}
    listed = LISTED | {"claims": {"08_cross": [claim]}}
    listed["reworded"] = {"08_cross": [{"says": r"(\d+) help", "reads": r"\1 of 9 help"}]}
    sentence = TWO.format("replicated", "+22", "+12", "+32").replace("robots", "robots 3")
    found = record(sentence, interval={"gain": [0.1, 0.2], "robots": [0.3, 0.4]})
    for name, text in (("findings/08_cross.json", json.dumps(found)), ("tables/08_t.csv", ""), ("tables/08_u.csv", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    changed = amend(tmp_path, listed)
    assert [path.name for path in changed] == ["08_cross.json", "08_t.csv"] and amend(tmp_path, listed) == []
    new = json.loads((tmp_path / "findings/08_cross.json").read_text())
    assert new["sentence"].startswith("Other robots 3 of 9 help") and list(new["interval"]) == ["robots"]
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["08_u.csv"]


def test_the_executed_notebook_has_a_banner_and_its_finding_is_struck_out(tmp_path):
    found = record(TWO.format("undecided", "+2", "-12", "+12"), commit=None, is_dirty=False)
    shown = {"output_type": "display_data", "metadata": {}, "data": {"text/markdown": [f"> **Finding.** {found['sentence']}"]}}
    cells = [{"cell_type": "markdown", "metadata": {}, "source": ["# 08 Cross"]}]
    cells += [{"cell_type": "code", "metadata": {"tags": ["finding"]}, "source": [], "outputs": [shown]}]
    for folder, name, content in (
        ("findings", "08_cross.json", found),
        ("notebooks", "08_cross.ipynb", {"cells": cells, "metadata": {}}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps(content))
    assert len(amend(tmp_path, LISTED)) == 2 and amend(tmp_path, LISTED) == []
    banner, _, finding = json.loads((tmp_path / "notebooks/08_cross.ipynb").read_text())["cells"]
    assert TAG in banner["metadata"]["tags"] and "~~pre-training helps" in "".join(banner["source"])
    lines = "".join(finding["outputs"][0]["data"]["text/markdown"]).splitlines()
    assert lines[0].startswith("> ~~pre-training helps: replicated") and lines[0].endswith("~~")
    assert "replicated" not in "".join(lines[1:]) and "Other robots help: undecided" in lines[2]


# --- this repository ----------------------------------------------------------------------------------------------------

RESULTS = [ROOT / "results", ROOT / "results/full"]


def test_this_repositorys_findings_and_executed_notebooks_are_amended():
    for results in RESULTS:
        for path in (results / "findings").glob("*.json"):
            found = json.loads(path.read_text())
            assert amended(found) == found, f"{path.name}: run 'rvlm report' and commit"
            assert not re.search(r"replicated", found["sentence"]) or found["date"] >= withdrawn()["before"], path.name
            for copy in (results / "notebooks").glob(f"{found['name'][:3]}*.ipynb") if "said" in found else []:
                cells = json.loads(copy.read_text())["cells"]
                assert TAG in cells[0]["metadata"].get("tags", []), copy.name


def old_findings():
    """Findings of every profile from before the fix: folder of results, finding."""
    found = [(results, json.loads(path.read_text())) for results in RESULTS for path in (results / "findings").glob("*.json")]
    return [(results, record) for results, record in found if record["date"] < withdrawn()["before"]]


def test_every_line_of_the_list_takes_something_back_from_every_profiles_finding():
    listed = withdrawn()
    assert set(listed["claims"]) | set(listed["reworded"]) <= {p.stem for r in RESULTS for p in (r / "findings").glob("*.json")}
    for results, found in old_findings():
        name = found["name"]
        for line in [*listed["claims"].get(name, ()), *listed["reworded"].get(name, ())]:
            if "says" in line:
                assert re.search(line["says"], found["said"]), (results, name, line)
                assert not re.search(line["says"], found["sentence"]), (results, name, line)
            assert not set(line.get("keys", ())) & set(found["interval"] or {}), (results, name, line)
            left = [path for table in line.get("tables", ()) for path in (results / "tables").glob(f"{table}.*")]
            assert not left, "run 'rvlm report' and commit"


def unstruck(text):
    """Text without struck-out parts and without Markdown's backslashes."""
    return re.sub(r"\\(?=[\W_])", "", re.sub(r"~~.*?~~", "", text, flags=re.DOTALL))


def pages_of(path):
    """Texts of a page; of a notebook those of its cells and their outputs."""
    if path.suffix != ".ipynb":
        return [path.read_text()]
    cells = json.loads(path.read_text())["cells"]
    outputs = [out for cell in cells for out in cell.get("outputs", ())]
    shown = [out.get("data", {}).get(kind, "") for out in outputs for kind in ("text/plain", "text/markdown")]
    return ["".join(text) for text in (*(c["source"] for c in cells), *shown, *(out.get("text", "") for out in outputs))]


def test_no_page_says_what_is_withdrawn_unless_it_is_struck_out():
    copies = [path for results in RESULTS for path in sorted((results / "notebooks").glob("*.ipynb"))]
    pages = [ROOT / "README.md", ROOT / "LOG.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    says = {path: "\n".join(unstruck(text) for text in pages_of(path)) for path in (*pages, *copies)}
    found = [(path, hit.group()) for path, text in says.items() for p in withdrawn()["nowhere"] if (hit := re.search(p, text))]
    for results, record in old_findings():
        own = [path for path in copies if path.parent.parent == results and path.name[:3] == record["name"][:3]]
        taken = [t["text"] for t in record.get("withdrawn", ()) if t["text"] in record["said"]]
        found += [(path, text) for text in taken for path in (*pages, *own) if text in says[path]]
    assert not found


def test_the_log_keeps_no_verdict_that_todays_rule_does_not_give():
    """Old lines keep their numbers; verdicts from fewer than three trainings are struck out and answered at the top."""
    lines = [line for line in (ROOT / "LOG.md").read_text().splitlines() if re.match(r"\| 2026-11-2[0-7] \|", line)]
    words = re.compile(r"(?i)\breplicated|\bsupported\b|\breversed\b|\bbeats\b|loses against|published [+]")
    assert lines and not [(found.group(), line[:90]) for line in lines if (found := words.search(unstruck(line)))]


def test_executed_notebooks_are_kept_clean():
    for results in RESULTS:
        for path in executed(results):
            notebook = json.loads(path.read_text())
            assert cleaned(notebook) == notebook, f"{path.name}: run 'rvlm report' and commit"


# --- copies -------------------------------------------------------------------------------------------------------------


def output(data, kind="display_data"):
    return {"output_type": kind, "metadata": {}, "data": data}


def test_a_copy_keeps_results_and_loses_bars_noise_and_the_state_of_widgets():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 4, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(60 * noise).save(buffer, "png")
    png = base64.b64encode(buffer.getvalue()).decode()
    widget = "application/vnd.jupyter.widget-view+json"
    outputs = [
        output({widget: {"model_id": "1"}, "text/plain": "train:   0%|          | 0/200 [00:00<?, ?it/s]"}),
        output({widget: {"model_id": "2"}, "text/plain": ["VBox(children=())"]}),
        {
            "output_type": "stream",
            "name": "stderr",
            "text": ["USDT:2026 1:1 SyncActivityProfilerHandler.cpp:52] profiler_start\n"],
        },
        {"output_type": "stream", "name": "stderr", "text": ["a warning\n", "episodes:  50%|##  | 1/2\n"]},
        output({"image/png": png, "text/plain": ["<Figure>"]}),
        output({"text/plain": ["42"]}, "execute_result"),
    ]
    notebook = {"metadata": {"widgets": {"state": {}}, "rvlm": {}}, "cells": [{"cell_type": "code", "outputs": outputs}]}
    kept = cleaned(notebook)
    assert kept["metadata"] == {"rvlm": {}} and cleaned(kept) == kept
    drive, warning, figure, value = kept["cells"][0]["outputs"]
    assert drive["data"] == {"text/plain": ["(a widget: it needs a running kernel, see make lab)"]}
    assert warning["text"] == ["a warning\n"] and value == outputs[-1]
    with Image.open(io.BytesIO(base64.b64decode(figure["data"]["image/png"]))) as image:
        assert image.mode == "P" and np.abs(np.asarray(image.convert("RGB"), int) - 60 * noise).max() <= 8
