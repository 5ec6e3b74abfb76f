"""pyproject.toml, requirements.lock, environment.yml and the Makefile name the same versions."""

import ast
import importlib.metadata
import re
import sys
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
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, EXTRAS = PYPROJECT["project"], PYPROJECT["project"]["optional-dependencies"]
LOCKED_EXTRAS = [line for extra, lines in EXTRAS.items() if extra not in ("all", "arms") for line in lines]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"] + LOCKED_EXTRAS]
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
def test_direct_dependency_is_a_range_that_holds_what_is_locked(requirement):
    locked = LOCK.get(canonicalize_name(requirement.name))
    assert locked is not None, f"{requirement} is not in the lock; run `make lock`"
    assert requirement.specifier.contains(locked), f"the lock has {locked}, which {requirement} excludes; run `make lock`"
    assert not any(s.operator in ("==", "===") for s in requirement.specifier), "exact versions stand in the lock alone"
    assert any(s.operator == ">=" for s in requirement.specifier), "say the oldest version that will do"


def closure(requirements):
    """Names of the packages that these pull in, themselves included, by what is installed."""
    found, todo = set(), [(requirement, "") for requirement in requirements]
    while todo:
        requirement, of = todo.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": of}):
            continue
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) not in found and name in LOCK:
                found.add((name, extra))
                todo += [(wanted, extra) for wanted in map(Requirement, importlib.metadata.requires(name) or [])]
    return {name for name, _ in found}


def test_lock_holds_nothing_that_nobody_wants():
    orphans = set(LOCK) - closure(DEPENDENCIES)
    assert not orphans, f"no dependency wants {sorted(orphans)}; run `make lock`"


# Packages that are declared and imported under another name, or needed without an import, and why.
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "py-rattler": "rattler", "ipython": "IPython", "pyzmq": "zmq"}
WITHOUT_IMPORT = {
    "accelerate": "transformers.Trainer",
    "beartype": "checks shapes, by an option of pytest",
    "codespell": "make lint",
    "jupyterlab": "make lab",
    "nbstripout": "make lint",
    "num2words": "SmolVLM's processor",
    "pre-commit": "hooks",
    "pyopengl": "mujoco draws with it",
    "pyright": "make lint",
    "pytest-cov": ".ci/run",
    "pytest-xdist": "make test",
    "ruff": "make lint",
    "setuptools": "builds the package without a network",
    "tensorboard": "curves of transformers.Trainer, where it is there",
    "robosuite": "meshes, read as files",
}
OWN = {"rvlm", *(path.stem for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))}


def imported():
    """Top-level modules of others that a file of the repository imports, at any depth -> where."""
    found = {}
    for path in (path for folder in ("rvlm", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.split(".")[0] for name in names} - OWN - sys.stdlib_module_names:
                found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_every_import_is_declared_and_every_dependency_is_used():
    declared = {canonicalize_name(Requirement(line).name) for lines in EXTRAS.values() for line in lines} - {"rvlm"}
    declared |= {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    modules = {MODULES.get(name, name).replace("-", "_"): name for name in declared}
    found = imported()
    undeclared = {name: sorted(files) for name, files in found.items() if name not in modules}
    assert not undeclared, f"declare in pyproject.toml what is imported: {undeclared}"
    unused = {name for module, name in modules.items() if module not in found} - set(WITHOUT_IMPORT)
    assert not unused, f"nothing imports {sorted(unused)}; leave it out of pyproject.toml, or say why it is needed"


def test_packages_in_the_wheel_are_those_in_the_tree():
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    tree = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "rvlm").rglob("__init__.py")}
    assert sorted(listed) == sorted({*tree, "rvlm.data_cards"}), "name every package in pyproject.toml"


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
    assert re.search(r"^TORCH\s+\?= \$\(shell grep -m 1 '\^torch==' \$\(LOCK\)\)$", makefile, re.MULTILINE)
    assert makefile.index('"$(TORCH)"') < makefile.index("install -r $(LOCK)")
