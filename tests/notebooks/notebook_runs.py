"""Run a notebook from end to end at smoke size, as `rvlm reproduce` runs it: a finding, figures, no error."""

import json
import re

import nbformat

from rvlm import report
from rvlm.cli import reproduce
from rvlm.cli.execution import RunPaths
from rvlm.envs.gl import choose_gl
from rvlm.files import ROOT

STEMS = [path.stem for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]


def run_and_find(stem, artifacts, tmp_path):
    choose_gl()
    paths = RunPaths(ROOT, ROOT / "notebooks", tmp_path / "results", artifacts)
    (job,) = reproduce.plan_jobs(paths, "smoke", only=[stem])
    reproduce.run_notebook(job, paths, "smoke", is_quiet=True)

    found = report.load_findings(paths.results)
    assert found and all(f["name"].startswith(stem[:3]) for f in found), [f["name"] for f in found]
    figures = {path.name for path in (paths.results / "figures").iterdir()}
    both = {f"{name[:-4]}.{suffix}" for name in figures for suffix in ("pdf", "png")}
    assert figures == both and figures and all(name.startswith(stem[:3]) for name in figures), figures

    path = paths.results / "notebooks" / f"{stem}.ipynb"
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < 12e6, "an executed notebook goes into git: show fewer or smaller images"
    outputs = json.dumps([cell["outputs"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"])
    text = re.sub(r"[A-Za-z0-9+/=]{500,}", "", outputs)
    assert not any(str(folder) in text for folder in (ROOT, artifacts, tmp_path)), "an output names a folder of this machine"
