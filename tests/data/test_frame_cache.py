"""Decoded frames on disk: keyed by content, shared, read once, within a limit."""

import json
import os

import numpy as np
import pandas as pd
import pytest
from toy_data import toy_frames

from rvlm import files
from rvlm.data import frame_cache, tables, video
from rvlm.data.actions import ActionSpec
from rvlm.data.errors import EpisodeError
from rvlm.data.windows import EpisodeDataset, EpisodeWriter

SPEC = ActionSpec.from_card("tabletop_franka7")


@pytest.fixture
def demos(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    writer = EpisodeWriter(tmp_path / "demos", SPEC)
    for seed in range(2):
        writer.add_episode(toy_frames(SPEC, 4, seed, 16), "lift")
    return writer.finalize()


def arrays():
    return {
        json.loads(p.read_text())["camera"].rsplit(".", 1)[-1]: p.parent
        for p in sorted((files.artifacts_dir() / "frames").glob("*/about.json"))
    }


def test_what_is_asked_twice_is_read_once(demos, monkeypatch):
    read, decoded, read_table, decode_frames = [], [], tables.read_table, video.decode_frames
    monkeypatch.setattr("rvlm.data.dataset.read_table", lambda path, names: read.append(names) or read_table(path, names))
    monkeypatch.setattr("rvlm.data.cameras.decode_frames", lambda *a: decoded.append(a) or decode_frames(*a))
    dataset = EpisodeDataset(demos)
    for _ in range(3):
        dataset.column("action")
        dataset.frames_cache()
        dataset.frames_cache(["wrist", "static"])
        EpisodeDataset(demos).frames_cache(["wrist"])
    assert read.count(["action"]) == 1 and len(decoded) == 4, "one look at the size and one pass over each camera"
    with pytest.raises(ValueError, match="read-only"):
        dataset.column("action")[0] = 0


def test_files_are_hashed_once(demos, monkeypatch):
    EpisodeDataset(demos).frames_cache()
    old = 1_600_000_000
    for path in demos.rglob("*.mp4"):
        os.utime(path, (old, old))
    monkeypatch.setattr(files.time, "time_ns", lambda now=files.time.time_ns: now() + 10**10)  # long after they were written
    EpisodeDataset(demos).frames_cache()
    hashed = []
    monkeypatch.setattr(files.hashlib, "file_digest", lambda *a: hashed.append(a))
    EpisodeDataset(demos).frames_cache()
    assert not hashed


def test_data_recorded_again_in_the_same_place_gives_its_own_frames(demos, tmp_path):
    before = EpisodeDataset(demos).frames_cache()["static"].copy()
    demos.rename(tmp_path / "before")
    writer = EpisodeWriter(demos, SPEC)
    for seed in (5, 6):
        writer.add_episode(toy_frames(SPEC, 4, seed, 16), "lift")
    after = EpisodeDataset(writer.finalize())
    assert (after.frames_cache()["static"] != before).any()
    assert (after.frames_cache()["static"][4:] == after.episode(1)["observation.images.static"]).all()


def test_other_places_in_the_same_videos_are_other_frames(demos):
    """The placement of frames is part of the key, not the videos alone."""
    dataset = EpisodeDataset(demos)
    before, table = dataset.frames_cache(["static"])["static"].copy(), demos / "meta/episodes/chunk-000/file-000.parquet"
    changed = pd.read_parquet(table)
    changed["videos/observation.images.static/from_timestamp"] = [0.4, 0.0]
    changed.to_parquet(table)
    exchanged = EpisodeDataset(demos).frames_cache(["static"])["static"]
    assert (exchanged[:4] == before[4:]).all() and (exchanged[4:] == before[:4]).all()


def test_the_limit_removes_what_was_used_longest_ago_and_nothing_in_use(demos, monkeypatch):
    size = 8 * 16 * 16 * 3
    dataset = EpisodeDataset(demos)
    held = dataset.frames_cache(["static"])["static"]
    dataset.frames_cache(["wrist"])
    os.utime(arrays()["static"] / "about.json", (1, 1))  # the older one, but in use
    monkeypatch.setenv("RVLM_FRAMES_GB", str(2.5 * size / 1e9))
    frame_cache.make_room(size)
    assert list(arrays()) == ["static"] and held.shape == (8, 16, 16, 3)
    monkeypatch.setenv("RVLM_FRAMES_GB", str(1.5 * size / 1e9))
    with pytest.raises(EpisodeError, match=r"expected room for .* GB of decoded frames, got .*; set RVLM_FRAMES_GB higher"):
        dataset.frames_cache(["wrist"])
    assert not list((files.artifacts_dir() / "frames").glob("*.part"))
    del held
    assert dataset.frames_cache(["wrist"])["wrist"].shape == (8, 16, 16, 3) and list(arrays()) == ["wrist"]


def test_what_could_not_be_decoded_leaves_nothing_behind(demos):
    path = next(demos.glob("videos/*wrist/*/*.mp4"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(EpisodeError, match=r"expected a whole mp4 file at .*file-000\.mp4"):
        EpisodeDataset(demos).frames_cache()
    assert list(arrays()) == ["static"] and not list((files.artifacts_dir() / "frames").glob("*.part"))


def test_a_full_disk_is_refused_before_anything_is_mapped(tmp_path, monkeypatch):
    monkeypatch.setenv("RVLM_HOME", str(tmp_path))

    def full(handle, start, n):
        assert (start, n) == (0, 128 + 192)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "posix_fallocate", full)
    with pytest.raises(files.DiskFullError, match=r"frames/.*: expected 320 bytes of free disk space, got \d+ \(No space"):
        frame_cache.cached_frames({"n": 1}, {}, lambda: (1, 8, 8, 3), lambda out: pytest.fail("written to"))
    assert [path.suffix for path in (tmp_path / "frames").iterdir()] in ([], [".lock"])


def test_an_error_of_the_disk_between_frames_is_no_complete_cache(demos, monkeypatch):
    """The system reports it once, to the call that meets it, here one in the background."""
    errors, fsync = [OSError(5, "Input/output error")], os.fsync

    def failing_once(file):
        if errors:
            raise errors.pop()
        fsync(file)

    monkeypatch.setattr(frame_cache, "SYNC_EVERY", 1)
    monkeypatch.setattr(frame_cache.os, "fsync", failing_once)
    with pytest.raises(OSError, match="Input/output error"):
        EpisodeDataset(demos).frames_cache(["wrist"])
    assert not errors and not arrays()


def test_damaged_frames_are_decoded_again_and_block_nothing(demos, monkeypatch):
    whole = np.array(EpisodeDataset(demos).frames_cache(["static"])["static"])
    kept = arrays()["static"] / "frames.npy"
    kept.write_bytes(kept.read_bytes()[:500])
    assert np.array_equal(EpisodeDataset(demos).frames_cache(["static"])["static"], whole)
    kept.unlink()
    frame_cache.make_room(1)
    monkeypatch.setenv("RVLM_FRAMES_GB", "nan")
    with pytest.raises(EpisodeError, match="expected RVLM_FRAMES_GB as a number of gigabytes"):
        frame_cache.make_room(1)


def test_images_are_written_by_row_and_of_one_size(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    out = frame_cache.FrameFile(tmp_path / "frames.npy", images.shape)
    for row in (2, 0, 1):
        out[row] = images[row][:, ::-1]  # not contiguous
    with pytest.raises(EpisodeError, match=r"expected images of shape \(4, 5, 3\), as the first, got \(5, 4, 3\) at row 1"):
        out[1] = images[1].swapaxes(0, 1)
    out.close()
    assert np.array_equal(np.load(tmp_path / "frames.npy"), images[:, :, ::-1])
