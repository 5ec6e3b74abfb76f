"""The run: resumes by content, survives SIGKILL, keeps a failing notebook, refuses what it does not know."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rvlm import report
from rvlm.cli import reproduce
from rvlm.cli.execution import RunPaths
from rvlm.files import ROOT
from rvlm.report.notebooks import InvalidRun, parameters_of, read_profiles

KERNELSPEC = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
LOG = "import os, sys, time\nfrom pathlib import Path\nwith Path('log').open('a') as log: print({line}, file=log)"
FINDING = """from rvlm.report.findings import finding
finding("{stem}", f"It is {{n}}.", numbers={{"n": n}}, n=1, interval=None, seeds=[0])"""


def write(paths, stem, *cells, default=1):
    parameters = new_code_cell(f"n = {default}  # how many [1]", metadata={"tags": ["parameters"]})
    first = new_markdown_cell(f"# {stem[:2]} {stem[3:]}\n\n**Question.** Why {stem}?")
    notebook = new_notebook(cells=[first, parameters, *map(new_code_cell, cells)], metadata=KERNELSPEC)
    nbformat.write(notebook, paths.notebooks / f"{stem}.ipynb")


def log_line(stem, line="'{stem}', n"):
    return LOG.format(line=line.format(stem=stem))


@pytest.fixture
def paths(tmp_path):
    made = RunPaths(tmp_path, tmp_path / "notebooks", tmp_path / "results", tmp_path / "artifacts")
    for folder in (made.notebooks, tmp_path / "data_cards"):
        folder.mkdir()
    (made.notebooks / "profiles.yaml").write_text("smoke:\n  00_a: {n: 3}\n  01_b:\ncpu: {}\n")
    for stem in ("00_a", "01_b"):
        write(made, stem, log_line(stem), FINDING.format(stem=stem))
    return made


def log(paths):
    path = paths.root / "log"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def keys(paths, profile="cpu"):
    return {job.stem: job.key for job in reproduce.plan_jobs(paths, profile)}


def test_run_resumes_by_content_and_writes_a_report(paths, capsys):
    assert reproduce.reproduce(paths, "smoke") == 0
    assert log(paths) == ["00_a 3", "01_b 1"]  # in order, in the root, with the profile's parameters
    assert [(f["sentence"], f["profile"]) for f in report.load_findings(paths.results)] == [
        ("It is 3.", "smoke"),
        ("It is 1.", "smoke"),
    ]
    page = (paths.results / "report.html").read_text()
    assert "Why 00_a?" in page and "It is 3." in page and 'href="notebooks/01_b.ipynb"' in page
    copy = (paths.results / "notebooks/00_a.ipynb").read_text()
    nbformat.validate(nbformat.reads(copy, as_version=4))
    assert str(paths.root) not in copy, "an executed copy in git must not name a machine's folders"

    assert reproduce.reproduce(paths, "smoke") == 0
    assert len(log(paths)) == 2 and "00_a: finished before, kept" in capsys.readouterr().out

    (paths.results / "findings/01_b.json").unlink()  # the output of a finished notebook is gone: it runs again, and it alone
    reproduce.reproduce(paths, "smoke")
    reproduce.reproduce(paths, "smoke", only=["notebooks/01_b.ipynb"], force=True)
    assert log(paths)[2:] == ["01_b 1", "01_b 1"]


def test_results_without_receipts_are_not_taken_for_finished(paths):
    (job, _) = reproduce.plan_jobs(paths, "smoke")
    reproduce.run_notebook(job, paths, "smoke", is_quiet=True)
    assert reproduce.is_finished(job, paths, "smoke")
    assert not reproduce.is_finished(dataclasses.replace(job, key="other"), paths, "smoke")
    assert not reproduce.is_finished(job, dataclasses.replace(paths, artifacts=paths.root / "fresh clone"), "smoke")
    (paths.results / "notebooks/00_a.ipynb").unlink()
    assert not reproduce.is_finished(job, paths, "smoke")


def test_a_key_covers_cells_parameters_code_cards_and_what_came_before(paths):
    (paths.root / "rvlm").mkdir()
    seen = [keys(paths)]
    assert keys(paths) == seen[0] != keys(paths, "smoke")
    changes = [
        lambda: write(paths, "00_a", "other"),
        lambda: (paths.root / "rvlm/plots.py").write_text("x = 1"),
        lambda: (paths.root / "data_cards/robot.md").write_text("rate_hz: 5"),
        lambda: (paths.root / "data_cards/robot.md").write_text("rate_hz: 9"),
    ]
    for change in changes:
        change()
        seen.append(keys(paths))
    for stem in ("00_a", "01_b"):
        assert len({key[stem] for key in seen}) == len(seen), stem
    write(paths, "01_b", "other")
    assert keys(paths)["00_a"] == seen[-1]["00_a"] and keys(paths)["01_b"] != seen[-1]["01_b"]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait(condition, seconds=40):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_run_killed_by_sigkill_resumes(paths):
    write(paths, "01_b", log_line("01_b", "'{stem}', os.getpid()"), "while not Path('go').exists(): time.sleep(0.1)")
    code = "import sys; from pathlib import Path; from rvlm.cli.reproduce import *; "
    code += "reproduce(RunPaths(*map(Path, sys.argv[1:])), 'cpu')"
    folders = [str(getattr(paths, field.name)) for field in dataclasses.fields(paths)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *folders], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait(lambda: len(log(paths)) == 2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kernel = int(log(paths)[1].split()[1])
    wait(lambda: not is_alive(kernel), seconds=10)

    kept = paths.results / "notebooks/00_a.ipynb"
    before = kept.read_bytes()
    assert sorted(p.name for p in kept.parent.glob("[!.]*")) == ["00_a.ipynb"]
    (kept.parent / ".00_a.ipynb.99.part").write_text("half")
    (paths.root / "go").touch()
    assert reproduce.reproduce(paths, "cpu") == 0
    assert [line.split()[0] for line in log(paths)] == ["00_a", "01_b", "01_b"] and kept.read_bytes() == before
    assert sorted(p.name for p in kept.parent.iterdir()) == ["00_a.ipynb", "01_b.ipynb"]


def test_a_failing_notebook_is_kept_and_ends_the_run(paths, capsys):
    write(paths, "00_a", "1 / 0")
    assert reproduce.reproduce(paths, "cpu") == 1
    failed = paths.results / "notebooks/00_a.failed.ipynb"
    assert "ZeroDivisionError" in failed.read_text() and log(paths) == []
    assert "ZeroDivisionError: division by zero" in (paths.results / "report.html").read_text()
    assert "00_a: failed (ZeroDivisionError: division by zero)" in capsys.readouterr().out
    write(paths, "00_a", log_line("00_a"))
    assert reproduce.reproduce(paths, "cpu", only=["00"]) == 0
    assert not failed.exists() and log(paths) == ["00_a 1"]


def test_a_kernel_that_dies_is_a_failed_notebook(paths):
    write(paths, "00_a", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert reproduce.reproduce(paths, "cpu", only=["00_a"]) == 1
    failed = json.loads((paths.results / "notebooks/00_a.failed.ipynb").read_text())
    assert "DeadKernelError" in failed["metadata"]["rvlm"]["error"]
    assert "DeadKernelError" in (paths.results / "report.html").read_text()


@pytest.mark.parametrize(
    "profiles, profile, only, message",
    [
        (
            "cpu:\n  01_b: {n: 2, m: 3}",
            "cpu",
            [],
            r"profile 'cpu' sets m of 01_b, which has no such parameter; it has n; fix prof",
        ),
        ("cpu: {}\ngpu:\n  00_a: {m: 3}", "cpu", [], r"profile 'gpu' sets m of 00_a"),
        ("cpu:\n  07_x: {n: 2}", "cpu", [], r"no notebook '07_x'; those that exist: 00_a, 01_b"),
        ("cpu: {}", "cpu", ["3"], r"no notebook '3'; those that exist: 00_a, 01_b"),
        ("cpu: {}", "cpu", [""], r"no notebook ''; those that exist: 00_a, 01_b"),
        ("cpu: {}", "cpu", ["_"], r"'_' is in the name of several notebooks; those that exist: 00_a, 01_b"),
        (
            "cpu:\n  01_b: {n: many}",
            "cpu",
            [],
            r"profile 'cpu' sets n of 01_b to 'many', expected a whole number such as 1; fix",
        ),
        ("cpu: {}\nsmoke: {}", "tpu", [], r"no profile 'tpu'; those in profiles.yaml: cpu, smoke"),
    ],
)
def test_the_unknown_is_refused_before_anything_runs(paths, profiles, profile, only, message):
    (paths.notebooks / "profiles.yaml").write_text(profiles)
    with pytest.raises(InvalidRun, match=message):
        reproduce.reproduce(paths, profile, only)
    assert not paths.results.exists() and log(paths) == []


@pytest.mark.parametrize("name", ["artifacts/reproduce/cpu/00_a.json", "results/notebooks/00_a.ipynb"])
def test_what_a_broken_disk_has_cut_is_not_finished(paths, name):
    job, _ = reproduce.plan_jobs(paths, "cpu")
    reproduce.run_notebook(job, paths, "cpu", is_quiet=True)
    assert reproduce.is_finished(job, paths, "cpu")
    path = paths.root / name
    path.write_text(path.read_text()[:40])
    assert not reproduce.is_finished(job, paths, "cpu")


def test_two_runs_do_not_write_the_same_results(paths):
    paths.results.mkdir()
    with (
        FileLock(paths.results / ".reproduce.lock"),
        pytest.raises(InvalidRun, match=r"another run writes .*results at this moment"),
    ):
        reproduce.reproduce(paths, "cpu")
    assert log(paths) == []


def test_kernels_are_this_interpreter_with_the_packages_environment(paths, tmp_path, monkeypatch):
    hostile = tmp_path / "jupyter/kernels/python3"
    hostile.mkdir(parents=True)
    (hostile / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    shown = "[sys.executable, *map(os.environ.get, ('RVLM_RESULTS', 'RVLM_HOME', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'))]"
    figure = (
        "import numpy as np\nfrom rvlm.report import plots\nplots.filmstrip({'': np.zeros((3, 8, 8, 3), 'u1')}, 'lift', True)"
    )
    write(paths, "00_a", log_line("00_a", shown), figure)
    assert reproduce.reproduce(paths, "cpu", only=["00_a"]) == 0
    assert log(paths) == [str([sys.executable, str(paths.results), str(paths.artifacts), "PASSIVE", "7"])]
    outputs = json.loads((paths.results / "notebooks/00_a.ipynb").read_text())["cells"][-1]["outputs"]
    assert ["image/png" in out.get("data", {}) for out in outputs] == [True], "a figure is shown once"


def test_what_is_typed_into_a_notebook_changes_no_profile(paths, capsys):
    (paths.notebooks / "profiles.yaml").write_text("smoke:\n  01_b: {m: 3}\ncpu:\n  00_a: {n: 1}\n  01_b: {n: 1, m: 2}\n")
    write(paths, "00_a", log_line("00_a"), default=50)
    write(paths, "01_b", log_line("01_b", "'{stem}', n, m"), default="1  # [1]\nm = 2")
    reproduce.reproduce(paths, "cpu")
    assert log(paths) == ["00_a 1", "01_b 1 2"]
    assert "00_a: profile cpu does not use what its parameters cell says, try it with: rvlm run 00 -p n '50'" in (
        capsys.readouterr().out
    )
    reproduce.reproduce(paths, "smoke")
    assert log(paths)[2:] == ["00_a 1", "01_b 1 3"], "another profile says what differs from cpu"


def test_a_finding_bears_the_profile_only_with_the_profiles_parameters(paths):
    (paths.notebooks / "profiles.yaml").write_text("cpu:\n  00_a: {n: 1}\n")
    write(paths, "00_a", FINDING.format(stem="00_a"), "n = 9", FINDING.format(stem="00_b"))
    reproduce.reproduce(paths, "cpu", only=["00"])
    assert [(f["numbers"]["n"], f["profile"]) for f in report.load_findings(paths.results)] == [(1, "cpu"), (9, None)]
    assert "parameters of no profile" in report.provenance_line(report.load_findings(paths.results)[1])


def test_only_profile_cpu_writes_to_the_results_in_git(monkeypatch, tmp_path):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))
    monkeypatch.delenv("RVLM_RESULTS", raising=False)
    assert RunPaths.of_profile("cpu").results == ROOT / "results"
    assert RunPaths.of_profile("smoke").results == tmp_path / "smoke/results"
    monkeypatch.setenv("RVLM_RESULTS", str(tmp_path / "mine"))
    assert RunPaths.of_profile("smoke").results == RunPaths.of_profile("cpu").results == tmp_path / "mine"


def test_the_repositorys_profiles_fit_its_notebooks():
    assert set(read_profiles(ROOT / "notebooks")) == {"smoke", "cpu", "gpu", "full"}
    reproduce.plan_jobs(RunPaths.of_profile("cpu"), "cpu")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_profile_cpu_names_every_parameter_with_the_value_in_its_cell(path):
    tracked = read_profiles(ROOT / "notebooks")["cpu"].get(path.stem)
    assert tracked == parameters_of(path), "write the same values into notebooks/profiles.yaml, profile cpu"
