"""Hashes of files, folders, models and code for cache keys; writes are atomic."""

import ast
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rvlm import code_hash, files
from rvlm.code_hash import code_of, hash_of_code
from rvlm.files import (
    atomic_write,
    file_hash,
    folder_hash,
    make_folder,
    model_hash,
    temporary,
    weights_hash,
)


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Names of the files that were read whole to be hashed, in an artifacts folder of the test's own."""
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(files, "_digests", {})
    names, plain = [], files.hashlib.file_digest
    monkeypatch.setattr(
        files.hashlib, "file_digest", lambda file, kind: (names.append(Path(file.name).name), plain(file, kind))[1]
    )
    return names


def settled(path):
    """Let the clock pass the tick in which a file was written."""
    while files.time.time_ns() - path.stat().st_ctime_ns < 60_000_000:
        files.time.sleep(0.02)
    return path


# --- content ------------------------------------------------------------------------------------------------------------


def test_a_file_is_read_once_and_a_large_one_once_for_all_processes(opened, tmp_path, monkeypatch):
    small, large = tmp_path / "small", tmp_path / "large.safetensors"
    small.write_bytes(b"s")
    large.write_bytes(bytes(files.LARGE))
    settled(large)
    first = [(file_hash(small), file_hash(large)) for _ in range(42)]
    assert len(set(first)) == 1 and sorted(opened) == ["large.safetensors", "small"]
    monkeypatch.setattr(files, "_digests", {})  # as in another process
    assert (file_hash(small), file_hash(large)) == first[0] and opened[2:] == ["small"]


def test_a_file_that_is_rewritten_in_place_is_read_again(opened, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 100)
    before, times = file_hash(settled(path)), path.stat()
    with path.open("r+b") as file:
        file.write(b"b")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_ino == times.st_ino and path.stat().st_mtime_ns == times.st_mtime_ns
    assert file_hash(path) != before


def test_a_file_that_was_just_written_is_not_remembered(opened, tmp_path, monkeypatch):
    """Two writes within one tick of the clock leave the same size, times and inode."""
    path = tmp_path / "weights"
    path.write_bytes(b"a")
    identity = files.file_identity(path)
    monkeypatch.setattr(files, "file_identity", lambda _: identity)
    monkeypatch.setattr(files.time, "time_ns", lambda: identity[-1] + 1_000_000)
    before = file_hash(path)
    path.write_bytes(b"b")
    assert file_hash(path) != before


def test_a_tree_is_its_files_wherever_it_is(tmp_path):
    first, second = tmp_path / "a" / "train", tmp_path / "b" / "copy"
    for name in ("data/file-000.parquet", "videos/x/file-000.mp4", "meta/info.json"):
        atomic_write(first / name, name)
    shutil.copytree(first, second)
    for name in ("made.json", "README.md", ".cache/x", "data.lock"):
        atomic_write(second / name, "about it")
    assert folder_hash(first) == folder_hash(second)
    atomic_write(second / "videos/x/file-000.mp4", "other frames")
    assert folder_hash(first) != folder_hash(second)
    (second / "videos/x/file-000.mp4").rename(second / "videos/x/file-001.mp4")
    atomic_write(second / "videos/x/file-001.mp4", "videos/x/file-000.mp4")
    assert folder_hash(first) != folder_hash(second), "names count"
    with pytest.raises(ValueError, match=r"expected a folder with files at .*nowhere, got none; make it first"):
        folder_hash(tmp_path / "nowhere")


def test_a_tree_is_what_its_links_lead_to(tmp_path):
    """Downloaded data is elsewhere; the dataset's folder holds links."""
    trees = []
    for name in "ab":
        atomic_write(tmp_path / "elsewhere" / name / "chunk-000/file-000.mp4", name)
        atomic_write(tmp_path / name / "meta/info.json", "same")
        (tmp_path / name / "videos").symlink_to(tmp_path / "elsewhere" / name)
        trees.append(folder_hash(tmp_path / name))
    assert trees[0] != trees[1]
    (tmp_path / "elsewhere/a/round").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"expected no circular links, got .*videos/round, which points to"):
        folder_hash(tmp_path / "a")


def test_a_model_is_its_weights_and_its_processor(tmp_path, toy_vlm, monkeypatch):
    copy = shutil.copytree(toy_vlm, tmp_path / "copy")
    assert model_hash(copy) == model_hash(toy_vlm) and weights_hash(copy) == weights_hash(toy_vlm)
    settings = copy / "processor_config.json"
    atomic_write(settings, settings.read_text().replace("48", "24"))
    assert model_hash(copy) != model_hash(toy_vlm) and weights_hash(copy) == weights_hash(toy_vlm)


def failing(error):
    def fail(*_):
        raise error

    return fail


def test_a_model_of_the_hub_is_its_name_and_commit(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(files, "hub_commits", {})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing(OSError))
    assert model_hash("somebody/model") == "somebody/model"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: f"/hub/{name}/snapshots/0123abc/{file}")
    assert model_hash("somebody/model") == "somebody/model@0123abc"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing(OSError))
    assert files.commit_on_hub("somebody/model") == "0123abc", "which is what is loaded, whatever is sent there meanwhile"


# --- code ---------------------------------------------------------------------------------------------------------------

SAY = """
import sys
from rvlm.code_hash import hash_of_code
print(*(hash_of_code(*roots.split(","), without=("rvlm.envs.tabletop",)) for roots in sys.argv[1:]))
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package's source, which a test may change; `hashes_of` gives its hashes in a new process."""
    source = shutil.copytree(files.PACKAGE, tmp_path / "site" / "rvlm", ignore=shutil.ignore_patterns("assets", "__pycache__"))

    def hashes_of(*roots):
        environment = {**os.environ, "PYTHONPATH": str(source.parent)}
        done = subprocess.run(
            [sys.executable, "-c", SAY, *roots], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    return source, hashes_of


def test_comments_and_docstrings_do_not_change_the_hash_of_code(package):
    source, hashes_of = package
    roots = ("rvlm.policy.model", "rvlm.data.writer", "rvlm.evaluation.success:success_differences")
    before = hashes_of(*roots)
    assert before == [hash_of_code(root, without=("rvlm.envs.tabletop",)) for root in roots], "installed elsewhere, the same code"
    path = source / "policy" / "heads.py"
    plain = path.read_text()
    path.write_text(plain.replace('"""', '"""Other words. ', 1).replace("\nclass ", "\n# A remark.\nclass ", 1))
    assert path.read_text() != plain and hashes_of(*roots) == before
    path.write_text(plain + "\nTWO = 2\n")
    after = hashes_of(*roots)
    assert after[0] != before[0] and after[1:] == before[1:], "heads are imported by the policy, not by the recorder"


def test_the_hash_of_a_function_covers_its_source_and_what_it_names(package):
    source, hashes_of = package
    roots = ("rvlm.evaluation.success:success_differences", "rvlm.evaluation.success:_check_trainings")
    before = hashes_of(*roots)
    path = source / "evaluation" / "success.py"

    def change(function):
        text = path.read_text()
        assert text.count(f"def {function}(") == 1
        path.write_text(text.replace(f"def {function}(", f"def {function}(*_, "))

    change("success_differences")
    after = hashes_of(*roots)
    assert after[0] != before[0] and after[1] == before[1]
    change("outcome_table")
    last = hashes_of(*roots)
    assert last[0] not in (before[0], after[0]) and last[1] == before[1], "a function beside it, which it calls"


def test_imports_are_followed_within_functions_and_through_packages():
    found = code_of("rvlm.training.stage_data")
    within_functions = {"rvlm.training.detection", "rvlm.vlm.adapters"}
    assert {"rvlm.vlm", "rvlm.policy.factory", "rvlm.policy.heads", *within_functions} <= set(found)
    assert "rvlm.files" not in found and "rvlm.report.findings" not in found
    assert "rvlm.training.detection" not in code_of("rvlm.training.stage_data", without=("rvlm.training.detection",))


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("nowhere.video", "a module of rvlm, or module:function"),
        ("rvlm.data.video:nobody", "class or constant 'rvlm.data.video:nobody'; .*has "),
    ],
)
def test_unknown_code_is_refused(root, message):
    with pytest.raises(ValueError, match=message):
        hash_of_code(root)


CHANGE = """
from rvlm import code_hash, files
code_hash.require_unchanged_code("rvlm.data.video")
path = files.PACKAGE / "data" / "video.py"
plain = path.read_text()
path.write_text(plain + "# a remark\\n")
code_hash.require_unchanged_code("rvlm.data.video")
path.write_text(plain + "TWO = 2\\n")
code_hash.require_unchanged_code("rvlm.envs.gl")
code_hash.require_unchanged_code("rvlm.data.video")
"""


def test_code_that_changed_under_a_running_process_computes_nothing(package):
    source, _ = package
    environment = {**os.environ, "PYTHONPATH": str(source.parent)}
    done = subprocess.run([sys.executable, "-c", CHANGE], env=environment, cwd=source, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()
    assert "video.py has changed since" in last[-1], done.stderr
    assert "line 10" in done.stderr, "only the last of the four is refused"


# --- writing ------------------------------------------------------------------------------------------------------------


def test_temporary_names_are_those_of_one_call(tmp_path):
    assert temporary(tmp_path / "x") != temporary(tmp_path / "x")


def test_a_folder_is_made_once_and_whole(tmp_path):
    made, both = [], threading.Barrier(2)

    def fill(part):
        made.append(part)
        (part / "content").write_text("whole")

    def ask():
        both.wait()
        make_folder(tmp_path / "final", fill)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and (tmp_path / "final" / "content").read_text() == "whole" and not made[0].exists()


def test_a_folder_whose_making_fails_is_not_there(tmp_path):
    left = tmp_path / ".final.0123.part"
    left.mkdir()

    def fill(part):
        (part / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        make_folder(tmp_path / "final", fill)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == [], "what a killed process left goes too"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, can_exchange, monkeypatch):
    """Where the second of two renames fails, the old one comes back."""
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    final = tmp_path / "final"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        files.replace_folder(tmp_path / name, final)
        assert [path.name for path in final.iterdir()] == [name]
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["first"]
    if not can_exchange:
        with pytest.raises(FileNotFoundError):
            files.replace_folder(tmp_path / "nothing", final)
        assert [path.name for path in final.iterdir()] == ["second"]


def test_one_thread_at_a_time_builds_a_syntax_tree(monkeypatch):
    """CPython 3.11 raises SystemError where two do."""
    parse, inside, overlaps = ast.parse, [], []

    def slow(*arguments):
        overlaps.append(len(inside))
        inside.append(1)
        time.sleep(0.01)
        try:
            return parse(*arguments)
        finally:
            inside.pop()

    monkeypatch.setattr(code_hash.ast, "parse", slow)
    code_hash._parts.cache_clear()
    modules = ("rvlm.data.cards", "rvlm.data.video", "rvlm.vlm.causality", "rvlm.statistics.power")
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(code_hash.hash_of_code, modules))) == 4
    assert len(overlaps) > 4 and not any(overlaps)
