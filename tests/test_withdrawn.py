"""What is withdrawn is out of the findings, struck out in the executed notebooks, and nowhere in README and log."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from rvlm.copies import cleaned, executed
from rvlm.files import ROOT
from rvlm.withdrawn import TAG, amend, amended, withdrawn

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


def test_what_was_found_after_the_mend_speaks_for_itself():
    new = record(TWO.format("supported", "+22", "+12", "+32"), date="2026-01-03")
    assert amended(new, LISTED) is new


@pytest.mark.parametrize("n_trainings, note", [(1, "One training each: no verdict."), (2, "2 trainings each: no verdict.")])
def test_below_three_trainings_there_is_no_verdict(n_trainings, note):
    found = amended(record("A beats B: replicated (+9 points, +1 to +17).", n_trainings), LISTED)
    assert found["sentence"] == f"A beats B: no verdict (+9 points, +1 to +17). {note}" and found["verdict"] is None


def test_old_words_become_those_of_todays_rule_adjusted_for_several_contrasts():
    first = "A: replicated (+26 points, +14 to +39); B: not replicated (-30 points, -40 to -20); "
    first += "C: -4 points (-9 to -1, not replicated)."
    words = re.findall(r"supported|reversed|undecided", amended(record(first), LISTED)["sentence"])
    assert words == ["supported", "reversed", "reversed"]
    many = "; ".join(f"D{i}: undecided (+0 points, -4 to +4)" for i in range(9))
    words = re.findall(r"supported|reversed|undecided", amended(record(f"{first[:-1]}; {many}."), LISTED)["sentence"])
    assert words[:3] == ["supported", "reversed", "undecided"], "of twelve contrasts one at p = 0.01 shows nothing"


def test_the_executed_notebook_wears_a_banner_and_its_finding_is_struck_out(tmp_path):
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


def test_every_line_of_the_list_takes_something_back_or_its_finding_is_new():
    listed = withdrawn()
    for name, claims in listed["claims"].items():
        paths = [path for results in RESULTS if (path := results / f"findings/{name}.json").exists()]
        found = [json.loads(path.read_text()) for path in paths]
        old = [f["said"] for f in found if f["date"] < listed["before"]]
        missed = [c["says"] for c in claims if "says" in c and old and not any(re.search(c["says"], said) for said in old)]
        assert not missed, (name, missed)


def test_readme_docs_and_notebooks_do_not_say_what_is_withdrawn():
    taken = [t["text"] for results in RESULTS for path in (results / "findings").glob("*.json") for t in withdrawn_of(path)]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    says = {page.name: page.read_text() for page in pages}
    found = [(name, text) for name, page in says.items() for text in taken if text in page]
    assert taken and not found, found


def withdrawn_of(path):
    return json.loads(path.read_text()).get("withdrawn", [])


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
    drive, warning, picture, value = kept["cells"][0]["outputs"]
    assert drive["data"] == {"text/plain": ["(a widget: it needs a running kernel, see make lab)"]}
    assert warning["text"] == ["a warning\n"] and value == outputs[-1]
    with Image.open(io.BytesIO(base64.b64decode(picture["data"]["image/png"]))) as image:
        assert image.mode == "P" and np.abs(np.asarray(image.convert("RGB"), int) - 60 * noise).max() <= 8
