"""The front door: what `import rvlm` offers, and the examples of its docstrings, run as they stand."""

import doctest
import inspect

import numpy as np
import pytest
from transformers import AutoConfig

import rvlm

EXAMPLES = sorted(name for name in rvlm._OFFERED if not inspect.ismodule(getattr(rvlm, name)))


@pytest.fixture(scope="module")
def workplace(home, toy_vlm, toy_demos, tmp_path_factory):
    """A folder with a model, `vlm`, and twelve demonstrations, `demonstrations`."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "vlm").symlink_to(toy_vlm)
    (folder / "demonstrations").symlink_to(toy_demos)
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_what_is_offered_runs(name, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    names = {"rvlm": rvlm, "np": np, "AutoConfig": AutoConfig}
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(rvlm, name), name, globs=names)
    assert found.examples, f"rvlm.{name}: add an example to its docstring"
    failures: list[str] = []
    doctest.DocTestRunner(verbose=False).run(found, out=failures.append)
    assert not failures, "".join(failures)
