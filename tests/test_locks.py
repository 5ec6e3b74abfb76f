"""pyproject.toml, requirements.lock, environment.yml and the Makefile speak of the same versions."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rattler import MatchSpec
from rattler import Version as CondaVersion

ROOT = Path(__file__).parents[1]
LOCK_LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCK = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LOCK_LINES)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
CONDA_SPECS = [spec for spec in CONDA["dependencies"] if isinstance(spec, str)]
PIP_SPECS = next(spec["pip"] for spec in CONDA["dependencies"] if isinstance(spec, dict))


def test_lock_is_exact_and_free_of_this_machine():
    wrong = [line for line in LOCK_LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)]
    assert not wrong, f"expected name==version without path or local build, got {wrong}; run `make lock`"
    assert len(LOCK) == len(LOCK_LINES), "a package stands in the lock twice"


def test_torch_comes_first():
    assert LOCK_LINES[0].startswith("torch==")


@pytest.mark.parametrize("requirement", DEPENDENCIES, ids=lambda requirement: requirement.name)
def test_direct_dependency_is_pinned_as_locked(requirement):
    locked = LOCK.get(canonicalize_name(requirement.name))
    assert str(requirement.specifier) == f"=={locked}", f"the lock has {locked}; change the pin, then `make lock`"


def test_environment_runs_what_is_locked():
    installed = {name: Version(importlib.metadata.version(name)).public for name in LOCK}
    different = {name: (version, LOCK[name]) for name, version in installed.items() if version != LOCK[name]}
    assert not different, f"(installed, locked): {different}; run `make env`"


def test_lock_holds_every_transitive_package():
    """Except below torch: its CUDA libraries belong to the build that a machine chooses."""
    missing = {
        f"{name} needs {wanted.name}"
        for name in LOCK
        if name != "torch"
        for wanted in map(Requirement, importlib.metadata.requires(name) or [])
        if (wanted.marker is None or wanted.marker.evaluate({"extra": ""})) and canonicalize_name(wanted.name) not in LOCK
    }
    assert not missing, f"{sorted(missing)}; run `make lock`"


@pytest.mark.parametrize("spec", CONDA_SPECS)
def test_conda_understands(spec):
    assert MatchSpec(spec).name is not None


def test_conda_python_is_one_that_the_package_accepts():
    python = next(MatchSpec(spec) for spec in CONDA_SPECS if MatchSpec(spec).name.normalized == "python")
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert CondaVersion(str(python.version).strip("=.*")) >= CondaVersion(oldest)


def test_conda_installs_the_lock_with_torch_first():
    assert [LOCK_LINES[0], "-r requirements.lock", "-e ."] == PIP_SPECS
    assert any(MatchSpec(spec).name.normalized == "pip" for spec in CONDA_SPECS), "conda wants pip named"


def test_makefile_installs_the_lock_with_torch_first():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^LOCK\s+:= requirements\.lock$", makefile, re.MULTILINE)
    assert makefile.index("grep -m 1 '^torch==' $(LOCK)") < makefile.index("install -r $(LOCK)")
