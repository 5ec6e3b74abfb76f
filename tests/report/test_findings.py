"""Findings hold only computed numbers; figures, tables, report and README come out whole and the same each time."""

import html
import json
import re
import subprocess
import sys
from urllib.parse import quote

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from nbconvert.filters import markdown2html
from PIL import Image

from rvlm import report
from rvlm.files import ROOT, artifacts_dir, atomic_write, results_dir
from rvlm.report import plots
from rvlm.report.page import html_report, list_notebooks
from rvlm.report.readme import BOARD, PARTS, board, update_readme, updated_readme
from rvlm.statistics import holm, newcombe, paired_difference, verdict, wilson


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def notebooks(tmp_path):
    (tmp_path / "notebooks").mkdir()
    write_notebook(
        tmp_path / "notebooks/05_train.ipynb",
        "# 05 Train in stages\n\n**Question.** What does each\nstage add?\n\n**You will see** x",
    )
    write_notebook(tmp_path / "notebooks/06_evaluate.ipynb", "# 06 Evaluate\n\n**Question.** Does low loss | mean success?")
    return tmp_path / "notebooks"


def write_notebook(path, first, outputs=(), source="x"):
    code = {"cell_type": "code", "source": source, "outputs": list(outputs)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": first.splitlines(True)}, code], "metadata": {}}))


def find(sentence="Success is 47 % of 200 episodes.", name="06_success", **changes):
    rate = wilson(94, 200)
    values = {"numbers": {"success": rate.rate}, "n": rate.n, "interval": rate, "seeds": [0, 1], "seconds": 31.4} | changes
    return report.finding(name, sentence, **values)


def draw(width=3.4):
    fig, ax = plt.subplots(figsize=(width, 2))
    ax.plot([1, 2])
    plt.close(fig)
    return fig


def test_finding_is_written_with_all_that_it_rests_on(results):
    shown = find("The policy solves 47 % [40.2 %, 0.539] of 200 episodes over 2 seeds in 31 s.", verdict="undecided")
    (record,) = report.load_findings()
    assert set(record) == {
        *("name", "sentence", "numbers", "n", "interval", "seeds", "seconds", "verdict"),
        *("commit", "is_dirty", "versions", "hardware", "profile", "date", "artefacts"),
    }
    assert (record["n"], record["numbers"], record["seeds"], record["verdict"]) == (200, {"success": 0.47}, [0, 1], "undecided")
    assert record["interval"]["low"] == pytest.approx(0.402, abs=1e-3)
    assert record["hardware"]["cores"] >= 1 and record["versions"]["numpy"] == np.__version__
    assert "47 %" in shown._repr_markdown_() and "**undecided**" in shown._repr_markdown_()
    assert not list(results.rglob("*.part"))


def test_a_finding_takes_verdicts_of_the_rule_alone(results):
    rng = np.random.default_rng(0)
    solved = (rng.random((3, 3, 200)) < np.reshape([0.95, 0.3, 0.3], (3, 1, 1))).astype(float)
    gains = holm({"a over b": paired_difference(solved[0], solved[1]), "b over c": paired_difference(solved[1], solved[2])})
    verdicts = {claim: verdict(gain) for claim, gain in gains.items()}
    shown = find("Two contrasts.", interval=gains, verdict=verdicts)
    (record,) = report.load_findings()
    assert record["verdict"] == verdicts == {"a over b": "supported", "b over c": "undecided"}
    assert "**a over b: supported; b over c: undecided**" in shown._repr_markdown_()
    assert "95 % interval (of all contrasts together)" in shown._repr_markdown_()
    assert "sides" not in record["interval"]["a over b"] and record["interval"]["a over b"]["n_trainings"] == 3
    find("One episode has no interval.", interval=paired_difference([1.5], [1.0]))
    (record,) = report.load_findings()
    assert record["interval"]["low"] is None and "NaN" not in (results / "findings" / "06_success.json").read_text()
    for wrong in ("replicates", {"a over b": "shown"}):
        with pytest.raises(ValueError, match=r"no verdict '(replicates|shown)'"):
            find("No digits at all.", verdict=wrong)


@pytest.mark.parametrize(
    "sentence, numbers",
    [
        ("Loss falls from 1.25 to 0.031 in 1,500 steps.", {"loss": [1.2466, 0.0312], "steps": 1500}),
        ("It gains −3.2 points on SmolVLM2 with q99 and 7-DoF arms.", {"gain_points": -3.21, "dof": 7}),
        ("The rate is 1.2e-3 and 12.5 % go wrong.", {"by_kind": {"rate": 0.00123, "wrong": np.float32(0.125)}}),
        ("Tokens lose 12.5 % of it.", {"lost_percent": 12.5}),
        ("With a 95 % interval.", {}),
        ("No digits at all.", {}),
    ],
)
def test_computed_numbers_pass(results, sentence, numbers):
    find(sentence, numbers=numbers)


@pytest.mark.parametrize(
    "sentence, numbers, culprit",
    [
        ("Success is 48 %.", {"success": 0.47}, "48 %"),
        ("Success is 47.", {"success": 0.47}, "47"),
        ("Success is 0.5 %.", {"success": 0.5}, "0.5 %"),
        ("Loss is 0.032.", {"loss": 0.0312}, "0.032"),
        ("It gains 3.2 points.", {"gain_points": -3.2}, "3.2"),
        ("It took 1,501 steps.", {"steps": 1500}, "1,501"),
        ("All of 16 families.", {"is_good": True}, "16"),
    ],
)
def test_a_typed_number_is_refused(results, sentence, numbers, culprit):
    with pytest.raises(report.UncomputedNumber, match=rf"'{re.escape(culprit)}' is none of those given .*add it to numbers="):
        find(sentence, numbers=numbers)
    assert report.load_findings() == []


def test_level_counts_only_where_there_is_an_interval(results):
    with pytest.raises(report.UncomputedNumber, match="'95 %'"):
        find("With a 95 % interval.", interval=None)


def test_interval_may_be_a_pair_a_difference_or_a_dict_of_them(results):
    difference = newcombe(wilson(94, 200), wilson(60, 200))
    for interval in [(0.1, 0.2), difference, {"mlp": wilson(1, 9), "lstm": (0.1, 0.2)}, None]:
        assert report.provenance_line(find(interval=interval).record)


def test_an_interval_of_fewer_than_the_findings_count_says_so(results):
    assert "[0.402, 0.539] · seeds" in report.provenance_line(find().record)
    shown = report.provenance_line(
        find(interval={"ours": wilson(94, 200), "control": wilson(0, 1200), "pair": (0.1, 0.2)}).record
    )
    assert "ours [0.402, 0.539]; control [0, 0.00319] (n = 1,200); pair [0.1, 0.2] · seeds" in shown


def test_names_are_slugs(results):
    with pytest.raises(ValueError, match=r"e\.g\. '05_loss'; got '\.\./loss'"):
        find(name="../loss")


def test_export_writes_column_wide_files_that_repeat_byte_for_byte(results):
    fig = report.export(draw(), "05_loss")
    files = {suffix: results / f"figures/05_loss.{suffix}" for suffix in ("pdf", "png")}
    first = {suffix: path.read_bytes() for suffix, path in files.items()}
    report.export(draw(), "05_loss")
    assert {suffix: path.read_bytes() for suffix, path in files.items()} == first
    assert b"CreationDate" not in first["pdf"] and b"Software" not in first["png"]
    assert b"/MediaBox [ 0 0 252 " in first["pdf"].replace(b"\n", b" ")
    assert fig.get_size_inches() == pytest.approx([3.5, 2 * 3.5 / 3.4])
    assert report.export(draw(8.0), "05_wide").get_figwidth() == pytest.approx(7.16)


def test_fonts_of_an_exported_pdf_are_true_type(results):
    """Publishers refuse Type 3 fonts, which matplotlib embeds by default."""
    report.export(
        plots.estimates(pd.DataFrame({"name": ["a"], "panel": "x", "value": 1, "low": 0, "high": 2}), "A title"), "05_loss"
    )
    pdf = (results / "figures/05_loss.pdf").read_bytes()
    assert b"/Type3" not in pdf and b"/FontFile2" in pdf


def test_an_exported_png_has_a_palette_its_title_and_three_hundred_dots_an_inch(results):
    fig = draw()
    fig.suptitle("A sentence – with a dash")
    report.export(fig, "05_loss")
    with Image.open(results / "figures/05_loss.png") as image:
        assert (image.mode, image.info["Title"], round(image.info["dpi"][0])) == ("P", "A sentence – with a dash", 300)
        assert image.width == 1050


def test_save_table_writes_csv_and_booktabs(results):
    table = report.save_table(pd.DataFrame({"name": ["a_b"], "success": [0.123456]}), "06_rates")
    assert pd.read_csv(results / "tables/06_rates.csv").equals(table)
    tex = (results / "tables/06_rates.tex").read_text()
    assert "\\toprule" in tex and "a\\_b & 0.123" in tex


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "deep" / "a.txt", "old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        atomic_write(path, "new")
    assert path.read_text() == "old"


def test_directories_follow_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))
    monkeypatch.delenv("RVLM_RESULTS", raising=False)
    assert artifacts_dir() == tmp_path
    assert results_dir() == tmp_path / "tried" / "results", "only `rvlm reproduce` writes to the results in git"


def test_show_source_looks_through_decorators():
    text = report.show_source(list_notebooks).data
    assert text.startswith("`rvlm/report/page.py`\n```python\n") and "def list_notebooks(" in text


def test_a_rate_may_be_stated_as_a_percentage(results):
    report.finding("06_rate", "It solves 25% of 4.", {"ours": wilson(1, 4)}, 4, wilson(1, 4), [0])
    assert report.load_findings(results)[0]["numbers"]["ours"]["rate"] == 0.25
    with pytest.raises(report.UncomputedNumber, match="26%"):
        report.finding("06_rate", "It solves 26% of 4.", {"ours": wilson(1, 4)}, 4, wilson(1, 4), [0])


def test_report_is_one_file_with_findings_figures_tables_and_links(results, notebooks):
    find()
    find(name="bench", sentence="An unnumbered finding.")
    report.export(draw(), "06_success")
    report.save_table(pd.DataFrame({"task": ["lift"], "success": [0.47]}), "06_rates")
    write_notebook(results / "notebooks/06_evaluate.ipynb", "# 06 Evaluate")
    page = html_report(notebooks=notebooks).read_text()
    train, evaluate = page.split('<h2 id="06_evaluate">')
    assert "What does each stage add?" in train and "<img" not in train
    parts = ("Success is 47 %", "n = 200", 'src="data:image/webp;base64,', "<td>lift</td>", 'href="notebooks/06_evaluate.ipynb"')
    assert [part for part in parts if part not in evaluate] == []
    assert "Further findings" in evaluate and "An unnumbered finding." in evaluate
    assert not re.search(r'(src|href)="(https?:)?//|@import|<script', page)


def test_report_follows_the_notebook_that_made_its_figures_and_tables(results, notebooks):
    code = 'export(a, "06_zoo")\nexport(b, f"06_film_{i}")\nsave_table(c, "06_rates")\nexport(d, "06_film")'
    write_notebook(notebooks / "06_evaluate.ipynb", "# 06 Evaluate", source=code)
    for name in ("06_unnamed", "06_film", "06_film_1", "06_film_0", "06_zoo"):
        report.export(draw(), name)
    report.save_table(pd.DataFrame({"n": [1]}), "06_rates")
    captions = re.findall(r"<figcaption>(.*?) \(", html_report(notebooks=notebooks).read_text())
    order = ("Figure 06_zoo", "Figure 06_film_0", "Figure 06_film_1", "Table 06_rates", "Figure 06_film", "Figure 06_unnamed")
    assert captions == list(order)


def test_a_figures_alt_text_is_its_headline(results, notebooks):
    fig = draw()
    report.export(fig, "06_plain")
    fig.suptitle("“lift” at <act>: 3 ± 1 → 4 %")
    report.export(fig, "06_titled")
    alts = re.findall(r'<img [^>]*alt="(.*?)"', html_report(notebooks=notebooks).read_text())
    assert alts == ["Figure 06_plain", "“lift” at &lt;act&gt;: 3 ± 1 → 4 %"]


def test_report_tables_read_like_print(results, notebooks):
    table = pd.DataFrame({"name": ["a", None], "n": [1234567, 2], "rate": [0.5, np.nan], "is_on": [True, False]})
    report.save_table(table, "06_rates")
    page = html_report(notebooks=notebooks).read_text()
    assert "<th>name</th><th class=n>n</th><th class=n>rate</th><th>is_on</th>" in page
    assert "<td>a</td><td class=n>1,234,567</td><td class=n>0.500</td><td>True</td>" in page
    assert "<td>–</td><td class=n>2</td><td class=n>–</td><td>False</td>" in page


def test_report_shows_the_traceback_of_a_failed_notebook(results, notebooks):
    error = {"output_type": "error", "ename": "E", "evalue": "", "traceback": ["\x1b[31mZeroDivisionError\x1b[0m: <1/0>"]}
    write_notebook(results / "notebooks/05_train.failed.ipynb", "# 05", [error])
    page = html_report(notebooks=notebooks).read_text()
    assert "ZeroDivisionError: &lt;1/0&gt;" in page and "This notebook failed" in page and "\x1b" not in page


EMPTY = "before\n" + "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in PARTS) + "after\n"


def test_readme_table_comes_from_first_cells_and_executed_copies(results, notebooks, tmp_path):
    copy = results / "notebooks/06_evaluate.ipynb"
    write_notebook(copy, "# 06 Evaluate")
    copy.write_text(json.dumps(json.loads(copy.read_text()) | {"metadata": {"rvlm": {"seconds": 200.0}}}))
    write_notebook(results / "full/notebooks/06_evaluate.ipynb", "# 06 Evaluate")
    readme = tmp_path / "README.md"
    readme.write_text(EMPTY)
    update_readme(readme, notebooks, results)
    once = readme.read_text()
    assert "| 05 Train in stages | What does each stage add? | – | – | [run](notebooks/05_train.ipynb) |\n" in once
    read = "[read](results/notebooks/06_evaluate.ipynb), [full](results/full/notebooks/06_evaluate.ipynb)"
    assert f"| 06 Evaluate | Does low loss \\| mean success? | 3 | {read} | [run](notebooks/06_evaluate.ipynb) |" in once
    assert "All 1 notebooks took 3 minutes" in once
    assert once.startswith("before\n") and once.endswith("-->\nafter\n") and "old" not in once
    update_readme(readme, notebooks, results)
    assert readme.read_text() == once


def test_the_report_leads_to_what_was_run_in_full(results, notebooks, monkeypatch):
    find()
    assert "Profile full" not in html_report(results, notebooks).read_text()
    monkeypatch.setenv("RVLM_RESULTS", str(results / "full"))
    html_report(results / "full", notebooks)
    assert '<a href="full/report.html">Profile full</a>' in html_report(results, notebooks).read_text()


def test_the_board_states_interval_size_and_verdict_of_profile_full_alone(results, monkeypatch):
    at = {"numbers": {"p": [27, 14, 39], "trainings": 5, "frames": 12000}, "n": 200, "interval": None}
    find("ten times the data helps: supported (+27 points, +14 to +39).", "09_ablations", **at)
    assert board(results) == ""
    monkeypatch.setenv("RVLM_RESULTS", str(results / "full"))
    find("ten times the data helps: supported (+27 points, +14 to +39).", "09_ablations", **at)
    row = "| ten times the demonstrations | 4.49 / 2.52 tasks | +27 (+14 to +39) | 5 x 200 | supported |"
    assert row in board(results).splitlines()


AWKWARD = r"At <act> & &lt;b>, a|b \| *c* _d_ `e` ~f~ [g](h) <!-- i --> cost $j$."


def test_a_notebook_shows_a_finding_as_it_was_written(results):
    shown = markdown2html(find(AWKWARD)._repr_markdown_())
    assert html.escape(AWKWARD, quote=False) in shown


def test_the_html_report_shows_names_and_sentences_as_they_were_written(results, notebooks):
    find(AWKWARD, interval={"<k>": (0.1, 0.2)})
    find(name="bench", sentence="An unnumbered <finding>.")
    report.save_table(pd.DataFrame({"<th>": ["<td> & more"]}), "06_rates")
    write_notebook(notebooks / "07_tokens.ipynb", "# 07 What <act> is\n\n**Question.** Is <act> a | token?")
    page = html_report(notebooks=notebooks).read_text()
    assert all(html.escape(text, quote=False) in page for text in (AWKWARD, "<k>", "<finding>", "<th>", "<td> & more"))
    assert page.count("What &lt;act&gt; is</") == 2 and "Is &lt;act&gt; a | token?" in page
    assert [tag for tag in ("<act>", "<k>", "<finding>", "<!-- i") if tag in page] == []


def test_readme_without_markers_is_one_clear_error(tmp_path, notebooks, results):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="expected the lines '<!-- success:begin -->' and"):
        update_readme(tmp_path / "README.md", notebooks, results)


def test_robots_and_heads_are_tables_of_what_was_measured(tmp_path):
    assert PARTS["robots"](tmp_path) == PARTS["heads"](tmp_path) == "Not measured.\n"
    run = {"trainings": 3, "episodes": 60, "commit": "0123456789", "hardware": {"cpu": "AMD EPYC", "cores": 2}}
    rate = {"rate": 0.934, "low": 0.8, "high": 0.989}
    chance = {"rate": 0.0, "low": 0.0, "high": 0.061}
    rows = [
        {"robot": "tabletop/so101", "control": control, **(rate if control in ("trained", "expert") else chance)}
        for control in ("expert", "trained", "shuffled language", "black images", "random actions")
    ]
    gains = [
        {"robot": "tabletop/so101", "control": control, "verdict": "supported"} for control in ("black images", "random actions")
    ]
    (tmp_path / "robots.json").write_text(json.dumps({**run, "rows": rows, "gains": gains}))
    head, _, row, *note = PARTS["robots"](tmp_path).splitlines()
    assert head == "| Robot | Actions | Trained | Shuffled language | Black images | Random actions | Expert | Above |"
    assert row == "| so101 | 6: joint, gripper | 93 % (80 to 99) |" + " 0 % (0 to 6) |" * 3 + " 93 % (80 to 99) | all controls |"
    gains[0]["verdict"] = "undecided"
    counts = {"trained": 9, "black images": 2, "random actions": 1, "expert": 10}
    tasks = [{"robot": "tabletop/so101", "task": "push", "control": c, "successes": n, "n": 10} for c, n in counts.items()]
    (tmp_path / "robots.json").write_text(json.dumps({**run, "rows": rows, "gains": gains, "tasks": tasks}))
    assert PARTS["robots"](tmp_path).splitlines()[2].endswith("| black images: undecided |")
    assert "| Robot | Task | Trained | Black images | Random actions |" in PARTS["robots"](tmp_path)
    assert "| so101 | `push` | 9/10 | 2/10 | 1/10 |" in PARTS["robots"](tmp_path)
    assert (
        "3 trainings" in " ".join(note)
        and "60 episodes" in " ".join(note)
        and "commit 0123456, 2 cores of AMD EPYC" in " ".join(note)
    )
    budget = {"samples": 9000, "batch": 8, "demonstrations": 240, "chunk": 8, "executed": 4}
    random = {"head": "random actions", "rate": 0.05, "low": 0.02, "high": 0.14, "head weights": None}
    few = {"head": "fast", "rate": 0.08, "low": 0.03, "high": 0.2, "head weights": 72_000}
    measured = [{"head": "flow", **rate, "head weights": 358_000}, few, random]
    gains = [{"head": "flow", "verdict": "supported"}, {"head": "fast", "verdict": "undecided"}]
    (tmp_path / "heads.json").write_text(json.dumps({**run, **budget, "rows": measured, "gains": gains}))
    lines = PARTS["heads"](tmp_path).splitlines()
    assert lines[2:5] == [
        "| flow | 358,000 | 93 % (80 to 99) | supported |",
        "| fast | 72,000 | 8 % (3 to 20) | undecided |",
        "| random actions | – | 5 % (2 to 14) | – |",
    ]
    assert "9,000 samples in batches of 8 of 240 demonstrations" in lines[6]


def test_the_repositorys_readme_is_up_to_date():
    readme = ROOT / "README.md"
    expected = updated_readme(readme, results=ROOT / "results")
    assert readme.read_text() == expected, "the README's computed parts are stale: run 'rvlm report' and commit README.md"


def test_no_cell_of_the_readme_is_a_paragraph():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    words = [re.sub(r"\]\([^)]*\)", "]", cell).strip() for row in rows for cell in row.strip("|").split("|")]
    assert rows and max(map(len, words)) <= 80, max(words, key=len)
    assert len(BOARD) <= 10


def test_the_lines_of_the_readme_load_the_policy_and_act():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 9
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and re.fullmatch(r"\w[\w ]+ True\n", done.stdout), done.stdout + done.stderr


def test_names_of_files_are_escaped_in_the_report(results, notebooks):
    report.export(draw(), "06_fig")
    name = '06_<img src=x onerror="alert(1)">&'
    (results / "figures/06_fig.png").rename(results / f"figures/{name}.png")
    report.save_table(pd.DataFrame({"a": [1]}), "06_rates")
    (results / "tables/06_rates.csv").rename(results / f"tables/{name}.csv")
    write_notebook(notebooks / '06_"><script>.ipynb', "# 06 Evaluate")
    write_notebook(results / 'notebooks/06_"><script>.ipynb', "# 06 Evaluate")
    page = html_report(notebooks=notebooks).read_text()
    assert [tag for tag in ("<img src=x", "<script", 'onerror="alert') if tag in page] == []
    assert html.escape(name) in page and quote(f"{name}.csv") in page


def test_published_results_carry_their_source_and_unknown_ones_name_what_exists():
    table = report.published("calvin", "ABCD->D")
    assert (
        set(table["split"]) == {"ABCD->D"}
        and table["source"].notna().all()
        and "policy-head continuous" in set(table["structure"])
    )
    with pytest.raises(ValueError, match="no published results of 'metaworld', split None; there are calvin"):
        report.published("metaworld")
