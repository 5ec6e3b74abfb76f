"""The wheel, installed where there is no clone: it loads the shipped models and acts, with its declared dependencies alone."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("installed.py")


def run(command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git tracks, so that the clone stays as it is."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if name.split("/")[0] in ("rvlm", "data_cards", "pyproject.toml", "README.md", "LICENSE") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run([*build, "-w", target, source])
    (made,) = target.glob("*.whl")
    return made


def closure(requirements):
    """Distributions of this environment that these requirements pull in."""
    found, todo = {}, [(Requirement(line), "") for line in requirements]
    while todo:
        requirement, of = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": of}):
            continue
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key not in found:
                try:
                    found[key] = importlib.metadata.distribution(requirement.name)
                except importlib.metadata.PackageNotFoundError:  # of an accelerator, which this build of torch does without
                    found[key] = None
                    continue
                todo += [(Requirement(line), extra) for line in found[key].requires or []]
    return {name: distribution for (name, _), distribution in found.items() if distribution is not None}


def environment(folder, wheel, extras):
    """A Python of its own with the wheel and links to what its metadata asks for, and to nothing else."""
    venv.create(folder, with_pip=False)
    own = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    zipfile.ZipFile(wheel).extractall(own)
    metadata = importlib.metadata.PathDistribution(next(own.glob("*.dist-info")))
    asked = [Requirement(line) for line in metadata.requires]
    named = [str(r) for r in asked if r.marker is None or r.marker.evaluate({"extra": extras})]
    link_packages(own, [name.partition(";")[0] for name in named])
    return folder / "bin" / "python"


def link_packages(folder, requirements):
    """Links to the packages of this environment that these requirements pull in, and to nothing else."""
    for distribution in closure(requirements).values():
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(distribution.locate_file(top))
            if source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)


def test_the_wheel_holds_code_cards_and_what_ships(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = run(["git", "ls-files", "rvlm", "data_cards"], cwd=ROOT).split()
    expected = {name if name.startswith("rvlm/") else f"rvlm/{name}" for name in tracked if not name.endswith(".gitignore")}
    assert not expected - names, f"left out: {sorted(expected - names)[:9]}"
    others = {name for name in names - expected if ".dist-info/" not in name and (ROOT / name).is_file() is False}
    assert not others, f"in the wheel, not in the clone: {sorted(others)[:9]}"


@pytest.mark.skipif(sys.platform == "win32", reason="the folders of a virtual environment are named for Linux and macOS")
@pytest.mark.parametrize("extras", ["core", "sim"])
def test_the_installed_package_acts_without_a_clone(wheel, extras, tmp_path):
    python, empty = environment(tmp_path / "venv", wheel, extras), tmp_path / "empty"
    empty.mkdir()
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RVLM_", "OMP_"))}
    output = run([python, SCRIPT, extras], cwd=empty, env={**bare, "HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"})
    assert '"action"' in output and f'"extras": "{extras}"' in output
