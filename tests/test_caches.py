"""Caches on disk record what made them, and none that is in use is deleted."""

import json
import os
import subprocess
import sys
import time

import pytest

from rvlm import caches, files
from rvlm.caches import Code, list_artifacts, prune, prune_features, read_provenance, register, use, used_artifacts
from rvlm.cli.main import main
from rvlm.files import atomic_write

VIDEO = Code(("rvlm.data.video",))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(caches, "_used", {})
    monkeypatch.setattr(caches, "_held", {})
    yield tmp_path / "home"
    for handle in caches._held.values():
        os.close(handle)


# --- what made it -------------------------------------------------------------------------------------------------------


def a_cache(kind, name, code=VIDEO, size=10, inputs=()):
    folder = files.artifacts_dir() / kind / name
    atomic_write(folder / "content", bytes(size))
    return register(folder, code, {"n": 1}, inputs)


def test_a_cache_says_what_made_it(home):
    made = read_provenance(a_cache("frames", "x"))
    assert made["code"] == VIDEO.hash and made["settings"] == {"n": 1} and made["roots"] == ["rvlm.data.video"]
    assert {"commit", "is_dirty", "versions", "date", "inputs"} <= set(made)


def by_other_code(folder):
    """As if the code had changed since."""
    atomic_write(folder / "made.json", json.dumps({**read_provenance(folder), "code": "0" * 12, "commit": "abc"}))


def test_what_was_used_is_remembered_with_what_it_was_made_from(home):
    old, new = a_cache("stages", "old"), None
    by_other_code(old)
    caches._used.clear()
    (old / "model").mkdir()
    new = a_cache("evaluations", "new", inputs=[old / "model"])
    assert [(u["kind"], u["n"], u["is_current"]) for u in used_artifacts()] == [("evaluations", 1, True), ("stages", 1, False)]
    use(new)
    assert sum(u["n"] for u in used_artifacts()) == 2 and used_artifacts()[1]["commits"] == ["abc"]


# --- what may go --------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(home):
    """Frames that other code made, frames and stages of today's, and a training under way."""
    found = {name: a_cache(kind, name, size=1000) for kind, name in (("frames", "stale"), ("frames", "now"), ("stages", "kept"))}
    by_other_code(found["stale"])
    found["under way"] = home / "stages" / "b.partial"
    atomic_write(found["under way"] / "log", bytes(1000))
    release()
    return found


def release():
    """As if this process had ended."""
    for handle in caches._held.values():
        os.close(handle)
    caches._held.clear()


def gone(**how):
    return sorted(entry.path.name for entry, has_gone in prune(**how) if has_gone)


def test_entries_say_size_age_and_whether_code_would_use_them(several):
    listed = {entry.path.name: (entry.kind, entry.state) for entry in list_artifacts()}
    assert listed == {
        "stale": ("frames", "stale"), "now": ("frames", "current"), "kept": ("stages", "current"),
        "b.partial": ("stages", "unfinished"),
    }  # fmt: skip
    assert all(1000 <= entry.n_bytes < 5000 and entry.age_s < 60 for entry in list_artifacts())


def test_stale_caches_go_and_others_stay(several):
    assert gone(is_stale=True) == ["stale"] and not several["stale"].exists()
    assert gone(is_stale=True) == [] and several["now"].is_dir() and several["kept"].is_dir()


def test_what_a_person_has_recorded_stays(several, home):
    """A user's recording has no record of what made it; neither do folders of earlier versions, which are deleted on request."""
    mine, linked, old = home / "datasets" / "mine", home / "datasets" / "linked", home / "stages" / "old"
    for folder in (mine, mine.with_name("more.partial"), old, home.with_name("disk")):
        atomic_write(folder / "data", bytes(1000))
    atomic_write(home.with_name("disk") / "made.json", (several["stale"] / "made.json").read_text())
    linked.symlink_to(home.with_name("disk"))
    time.sleep(0.01)
    assert gone(is_stale=True) == ["stale"] and not several["stale"].with_name("stale.lock").exists()
    assert gone(is_stale=True, older_than_s=0, max_bytes=0) == ["kept", "now"] and old.is_dir()
    assert gone(is_stale=True, older_than_s=0, max_bytes=0, with_unknown=True) == ["old"]
    assert sorted(path.name for path in mine.parent.iterdir()) == ["linked", "mine", "more.partial"]
    assert linked.is_symlink() and (linked / "data").exists()


def test_what_was_not_used_for_long_goes(several):
    for folder in (several["now"], several["under way"]):
        for path in (folder, *folder.iterdir()):
            os.utime(path, (time.time() - 10_000,) * 2)
    assert gone(older_than_s=5_000) == ["b.partial", "now"]


def test_above_the_limit_stale_goes_first_then_what_is_cheap_to_make(several):
    total = sum(entry.n_bytes for entry in list_artifacts())
    assert gone(max_bytes=total) == []
    assert gone(max_bytes=total - 1) == ["stale"]
    assert gone(max_bytes=0) == ["kept", "now"] and several["under way"].is_dir(), "what is under way stays"


def test_what_is_in_use_stays(several):
    held = "import sys; from rvlm.caches import use; use(sys.argv[1]); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", held, str(several["now"])], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        user.stdout.readline()
        assert gone(max_bytes=0) == ["kept", "stale"] and several["now"].is_dir()
        user.stdin.close()
    assert gone(max_bytes=0) == ["now"]
    use(a_cache("frames", "mine"))
    assert gone(max_bytes=0) == [], "this process's own"


def test_what_something_is_made_from_stays_meanwhile(several):
    """The policy that is evaluated, and the start and the data of a stage, in a process that a launcher has started too."""
    from rvlm.training.launch import _load_stage

    several["kept"].joinpath("model").mkdir()
    model, data = str(several["kept"] / "model"), str(a_cache("datasets", "data"))
    release()
    register(a_cache("evaluations", "of it"), VIDEO, {}, [model])
    assert gone(max_bytes=0) == ["data", "now", "stale"]
    release()
    fields = {"name": "toy", "kind": "robot", "data": [data], "init": model, "n_samples": 64}
    a_cache("datasets", "data")
    atomic_write(several["under way"] / "stage.json", json.dumps(fields))
    release()
    _load_stage(several["under way"])
    assert gone(max_bytes=0) == ["of it"]


def test_what_is_locked_stays(several):
    from filelock import FileLock

    with FileLock(several["kept"].with_name("kept.lock")):
        assert gone(max_bytes=0) == ["now", "stale"] and several["kept"].is_dir()


def test_features_have_a_limit(several, monkeypatch):
    features = a_cache("features", "of a tower")
    release()
    prune_features()
    assert features.is_dir()
    monkeypatch.setenv("RVLM_FEATURES_GB", "1e-9")
    prune_features()
    assert not features.is_dir() and several["now"].is_dir() and several["kept"].is_dir()


def test_the_command_lists_and_deletes_what_it_says(several, capsys):
    assert main(["cache"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("frames", "stale", "unfinished", "4 in ")) and several["stale"].is_dir()
    assert main(["cache", "--prune", "--older-than", "1d"]) == 0 and "freed 0.00 GB" in capsys.readouterr().out
    assert main(["cache", "--prune", "--stale"]) == 0
    assert "deleted: frames" in capsys.readouterr().out and not several["stale"].exists() and several["now"].is_dir()
    assert main(["cache", "--prune"]) == 2 and "--stale, --older-than 30d or --max-gb 20" in capsys.readouterr().err
    assert main(["cache", "--stale"]) == 2 and "expected --prune" in capsys.readouterr().err


def test_a_finding_says_where_other_code_made_what_it_rests_on(home, tmp_path, monkeypatch):
    from rvlm.report.findings import finding, provenance_line

    monkeypatch.setenv("RVLM_RESULTS", str(tmp_path / "results"))
    a_cache("evaluations", "of today")
    clean = finding("00_clean", "All is well.", {}, 1, None, []).record
    assert clean["artefacts"][0]["is_current"] and "mixed code" not in provenance_line(clean)
    old = a_cache("stages", "old")
    by_other_code(old)
    caches._used.clear()
    use(old)
    mixed = finding("00_mixed", "All is well.", {}, 1, None, []).record
    assert "mixed code**: 1 of stages (commit abc) made by other code" in provenance_line(mixed)
