"""The command line: what it refuses before anything runs, where it writes, what it prints."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rvlm import report
from rvlm.cli import lab
from rvlm.cli.main import main
from rvlm.cli.run import make_job
from rvlm.experiments import recipes
from rvlm.files import RESULTS, ROOT
from rvlm.report.notebooks import InvalidRun, parameters_of, parse_parameters

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RVLM_RESULTS", raising=False)
    return tmp_path / "home"


def try_it(path):
    """Commands under "Try it" of a notebook as (notebook, [(name, value)]), in full or with their parameters alone."""
    (cell,) = [cell for cell in json.loads(path.read_text())["cells"] if "".join(cell["source"]).startswith("## Try it")]
    for printed in re.findall(r"`((?:rvlm run|-p) [^`]+)`", "".join(cell["source"])):
        words = shlex.split(printed.replace("\n", " "))
        number, words = (words[2], words[3:]) if words[0] == "rvlm" else (path.stem[:2], words)
        assert words[::3] == ["-p"] * (len(words) // 3) and len(words) % 3 == 0, printed
        yield number, list(zip(words[1::3], words[2::3], strict=True))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_printed_lines_fit_their_notebook(path):
    printed = list(try_it(path))
    assert any(number == path.stem[:2] for number, _ in printed), "print one `rvlm run` line"
    assert "papermill" not in path.read_text()
    for _, pairs in printed:
        given = parse_parameters(path, pairs)
        changed = {name: value for name, value in given.items() if parameters_of(path)[name] != value}
        assert changed == given and given, f"{pairs} changes nothing"


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("n_episode", "4", r"-p sets n_episode of 02_episodes_and_actions, which has no such parameter; it has n_episodes, ep.*"),
        ("n_episodes", "many", r"-p sets n_episodes of 02_\w+ to 'many', expected a whole number such as 1200; nothing was run"),
        ("n_episodes", "2.5", r"to 2.5, expected a whole number such as 1200"),
        ("n_episodes", "True", r"to True, expected a whole number"),
        ("n_episodes", "[4]", r"to \[4\], expected a whole number"),
        ("n_episodes", "", r"to '', expected a whole number"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(name, value, message, home, capsys):
    assert main(["run", "02", "-p", name, value]) == 2
    assert re.search(message, capsys.readouterr().err) and not home.exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["99"], "no notebook '99'; those that exist: 00_look_first, "),
        (["00", "-p", "task", "liftt"], "no task 'liftt'; there are lift, "),
        (["00", "-p", "policy_folder", "no/such/folder"], "policy_folder: no folder "),
        (["04", "-p", "windows", "[2, 'four']"], "expected a list such as [2, 4, 8]"),
        (["04", "-p", "windows", "[]"], "expected a list such as [2, 4, 8]"),
        (["03", "-p", "learning_rate", "1e999"], "expected a number such as 0.001"),
        (["02", "-p", "bins", "16", "-p", "bins", "32"], "-p sets bins of 02_episodes_and_actions twice: 16 and '32'"),
        (["02", "-p", "n_episode", "4"], "did you mean n_episodes?"),
    ],
)
def test_choices_folders_and_lists_are_checked_too(words, message, home, capsys):
    assert main(["run", *words]) == 2
    assert message in capsys.readouterr().err and not home.exists()


def test_values_are_read_as_the_notebook_means_them(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    job, paths = make_job("04", [("windows", "2,3"), ("n_frames", "12_000")])
    assert job.parameters == {"windows": [2, 3], "n_frames": 12000} and job.notebook.parent == ROOT / "notebooks"
    assert paths.results == home / "tried" / f"04_history-{job.key}" and paths.artifacts == home
    assert make_job("00", [("policy_folder", "mine")])[0].parameters == {"policy_folder": str(tmp_path / "mine")}
    assert make_job("05", [("demonstrations", "mine")])[0].parameters == {"demonstrations": str(tmp_path / "mine")}
    assert make_job("05", [("demonstrations", "lab/lifts libero")])[0].parameters == {"demonstrations": "lab/lifts libero"}
    assert make_job("03", [("learning_rate", "1")])[0].parameters == {"learning_rate": 1}
    assert make_job("look_first", [])[0].key != make_job("0", [("seed", "1")])[0].key
    own = tmp_path / "04_history.ipynb"  # an edited copy does not write where the notebook itself does
    own.write_text((ROOT / "notebooks" / own.name).read_text().replace("# 04", "# 4"))
    assert make_job(str(own), [])[1].results != make_job("04", [])[1].results


TOY = [
    ("markdown", "# 00 Toy\n\n**Question.** Why?", []),
    ("code", "n = 1  # how many [1]", ["parameters"]),
    ("code", "from rvlm.report.findings import finding, results_dir\nprint(results_dir().name)", []),
    ("code", 'import os, torch\nprint(os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"])', []),
    ("code", 'finding("00_toy", f"It is {n}.", numbers={"n": n}, n=1, interval=None, seeds=[0])', ["finding"]),
]


def toy(path):
    cells = [
        {"cell_type": kind, "id": f"c{i}", "metadata": {"tags": tags}, "source": source}
        | ({"outputs": [], "execution_count": None} if kind == "code" else {})
        for i, (kind, source, tags) in enumerate(TOY)
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_a_try_runs_from_anywhere_and_leaves_results_and_readme_alone(home, tmp_path):
    """As from a user's shell: another directory, and none of the variables that the Makefile sets."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "RVLM_"))}
    variables = {"RVLM_HOME": str(home), "RVLM_PROFILE": "cpu", "PYTHONPATH": str(ROOT)}
    code = "import sys; from rvlm.cli.main import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "run", str(toy(tmp_path / "00_toy.ipynb")), "-p", "n", "3"]
    done = subprocess.run(words, cwd=tmp_path, env={**bare, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = (home / "tried").iterdir()
    (record,) = report.load_findings(folder)
    assert (record["sentence"], record["profile"]) == ("It is 3.", None)
    assert "00_toy: started, with n = 3" in done.stdout and str(folder / "notebooks/00_toy.ipynb") in done.stdout
    assert "It is 3." in done.stdout and "parameters of no profile" in done.stdout
    outputs = json.dumps(json.loads((folder / "notebooks/00_toy.ipynb").read_text())["cells"])
    assert folder.name in outputs and "PASSIVE 0" in outputs
    assert not list(tmp_path.glob("out*")) and {p.name for p in tmp_path.iterdir()} == {"00_toy.ipynb", "home"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_thread_settings_are_made_before_torch_reads_them(path):
    """OpenMP reads its settings when torch loads it, and `import rvlm` sets them first, in any kernel."""
    lines = [line for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code" for line in cell["source"]]
    modules = re.findall(r"^(?:import|from) (\w+)", "".join(f"{line.rstrip()}\n" for line in lines), re.MULTILINE)
    late = [name for name in modules[: modules.index("rvlm")] if name in ("torch", "transformers", "peft", "accelerate")]
    assert not late, f"import rvlm before {late}"


def test_importing_the_package_settles_how_threads_wait(monkeypatch):
    code = "import rvlm, os; print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'], os.environ['SVT_LOG'])"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": "7"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert shown == "PASSIVE 7 1\n", "what is set already wins"


# --- JupyterLab ---------------------------------------------------------------------------------------------------------


def edit(path, text):
    notebook = json.loads(path.read_text())
    notebook["cells"][1]["source"] = text
    path.write_text(json.dumps(notebook))


def test_jupyterlab_opens_copies_and_keeps_those_that_were_changed(tmp_path):
    (tmp_path / "source").mkdir()
    tracked, copy = toy(tmp_path / "source/00_toy.ipynb"), tmp_path / "lab/00_toy.ipynb"
    assert lab.copy_notebooks(tracked.parent, copy.parent) == []
    assert copy.read_bytes() == tracked.read_bytes()

    opened = json.loads(copy.read_text())  # outputs and metadata of a run are no change of the notebook
    opened["metadata"]["language_info"], opened["cells"][2]["execution_count"] = {"name": "python"}, 1
    copy.write_text(json.dumps(opened))
    lab.copy_notebooks(tracked.parent, copy.parent)
    assert json.loads(copy.read_text()) == opened, "its outputs are kept while the repository's is the same"
    edit(tracked, "n = 2  # how many [1]")
    assert lab.copy_notebooks(tracked.parent, copy.parent) == [] and copy.read_bytes() == tracked.read_bytes()

    edit(copy, "n = 10  # how many [1]")
    mine = copy.read_bytes()
    assert lab.copy_notebooks(tracked.parent, copy.parent) == [] and copy.read_bytes() == mine
    edit(tracked, "n = 3  # how many [1]")
    (line,) = lab.copy_notebooks(tracked.parent, copy.parent)
    assert line.startswith("00_toy.ipynb: you have edited this copy, so it is kept") and copy.read_bytes() == mine


def test_kernels_of_jupyterlab_write_results_of_their_own(home, monkeypatch):
    monkeypatch.setenv("RVLM_PROFILE", "cpu")
    monkeypatch.setenv("RVLM_RESULTS", str(RESULTS))
    environment = lab.environment(home / "lab")
    assert (environment["RVLM_RESULTS"], environment["RVLM_HOME"]) == (str(home / "lab/results"), str(home))
    assert "RVLM_PROFILE" not in environment
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent), "the terminal finds `rvlm`"


def test_jupyterlab_gets_its_own_options(home, monkeypatch, capsys):
    called = []

    def become(_, words, environment):
        called.append(words)
        raise SystemExit

    monkeypatch.setattr(lab.os, "execve", become)
    monkeypatch.setattr(lab.os, "geteuid", lambda: 0)
    with pytest.raises(SystemExit):
        main(["lab", "--no-browser", "--port", "8899"])
    (words,) = called
    assert words[-4:] == ["--allow-root", "--no-browser", "--port", "8899"] and str(home / "lab/notebooks") in words
    assert len(list((home / "lab/notebooks").glob("*.ipynb"))) == len(NOTEBOOKS)
    with pytest.raises(SystemExit):
        main(["findings", "--no-browser"])
    assert "unrecognized arguments: --no-browser" in capsys.readouterr().err


# --- what ships ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vlm", "policy"])
def test_shipped_models_are_replaced_only_on_explicit_request(name, home, monkeypatch, capsys):
    shipped, targets = {"vlm": recipes.SMALL_VLM, "policy": recipes.POLICY}[name], []
    monkeypatch.setattr("rvlm.experiments.release.release", lambda stage, target, command: targets.append(target))
    monkeypatch.setattr(recipes, {"vlm": "vision_language", "policy": "main_policy"}[name], lambda *sizes: sizes)
    assert main([name, "--profile", "smoke"]) == main([name]) == 0
    assert targets == [home / "shipped" / name] * 2 and f"the {name} that ships stays" in capsys.readouterr().out
    assert main([name, "--profile", "smoke", "--install"]) == 2
    assert f"--install replaces the {name} that ships, whose sizes are profile full's; got profile 'smoke'" in (
        capsys.readouterr().err
    )
    assert main([name, "--install"]) == 0 and targets[2:] == [shipped]


# --- what it prints ------------------------------------------------------------------------------------------------------


def test_findings_are_printed_for_people_and_for_scripts(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RVLM_RESULTS", str(tmp_path))
    assert main(["findings"]) == 0
    assert "'rvlm reproduce' makes them" in capsys.readouterr().out
    values = {"n": 200, "interval": (0.1, 0.2), "seeds": [0, 1], "seconds": 3.0, "verdict": "undecided"}
    report.finding("06_success", "It is 12.", numbers={"x": 12}, **values)
    main(["findings"])
    shown = capsys.readouterr().out
    assert shown.startswith("06_success: It is 12.\n    n = 200 · 95 % interval [0.1, 0.2] · seeds 0, 1 · 3 s")
    assert "undecided" in shown and "*" not in shown
    main(["findings", "--json"])
    (record,) = json.loads(capsys.readouterr().out)
    assert {"name", "sentence", "numbers", "n", "interval", "seeds", "seconds", "commit"} <= set(record)
    monkeypatch.delenv("RVLM_RESULTS")
    main(["findings", "--results", str(tmp_path)])
    assert capsys.readouterr().out == shown


def test_a_truncated_finding_is_named_with_its_fix(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RVLM_RESULTS", str(tmp_path))
    report.finding("06_success", "It is 12.", numbers={"x": 12}, n=1, interval=None, seeds=[0])
    path = tmp_path / "findings" / "06_success.json"
    path.write_text(path.read_text()[:50])
    assert main(["findings"]) == 2
    shown = capsys.readouterr().err
    assert str(path) in shown and "cut or changed" in shown and "run notebook 06 again, with the profile of this folder" in shown


def test_a_refused_command_is_one_line_and_status_2(capsys):
    assert main(["reproduce", "--profile", "tpu"]) == 2
    assert capsys.readouterr().err.startswith("rvlm: no profile 'tpu'; those in profiles.yaml: smoke, cpu, gpu, full\n")


def test_rvlm_alone_helps_and_every_command_says_more_than_its_name(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("examples:", "RVLM_RESULTS", "reproduce", "findings", "policy"))
    for command in ("reproduce", "run", "lab", "vlm", "policy"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert "artifacts/" in shown and f"rvlm {command} " in shown, command
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"rvlm \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_a_reader_that_has_enough_ends_it_quietly(tmp_path):
    for i in range(300):
        report_json = {"name": f"00_{i}", "sentence": "It is. " * 40, "n": 1, "interval": None, "seeds": [0]}
        (tmp_path / "findings").mkdir(exist_ok=True)
        (tmp_path / f"findings/00_{i}.json").write_text(json.dumps(report_json))
    code = "import sys; from rvlm.cli.main import main; sys.exit(main())"
    environment = os.environ | {"RVLM_RESULTS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code, "findings"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(30) == 141


def test_a_command_without_a_notebook_at_hand_says_where_they_are(tmp_path):
    with pytest.raises(InvalidRun, match="an installed package has none: they are in a clone"):
        lab.copy_notebooks(tmp_path / "notebooks", tmp_path / "lab")
