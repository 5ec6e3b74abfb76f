"""Episodes: recording, reading, windows, and the errors of broken data."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rvlm.data.actions import ActionSpec, Group
from rvlm.data.errors import EpisodeError
from rvlm.data.hub_datasets import fetch_dataset
from rvlm.data.lerobot_format import ImageHistogram
from rvlm.data.resizing import resize
from rvlm.data.windows import EpisodeDataset, EpisodeWriter, Windows, record_dataset, split
from rvlm.files import ROOT

SPEC = ActionSpec.from_card("tabletop_franka7")
LENGTHS = (7, 4, 9, 5, 6)
STATIC, WRIST = "observation.images.static", "observation.images.wrist"


def fake_scene(n, seed, size=32):
    """A few coloured blocks that move over a shaded table."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] * 2
    images = np.stack([np.stack([120 + y, 100 + x, 90 + (x + y) // 2], -1)] * n).astype(np.uint8)
    for color in rng.integers(0, 255, (4, 3)):
        at, step = rng.uniform(0, size - 8, 2), rng.uniform(-1, 1, 2)
        for t in range(n):
            i, j = ((at + t * step) % (size - 8)).astype(int)
            images[t, i : i + 6, j : j + 6] = color
    return images


def fake_episode(n, seed, spec=SPEC, size=32):
    rng = np.random.default_rng(seed)
    action = spec.set_grippers(rng.uniform(-1, 1, (n, 7)).astype(np.float32), rng.random((n, 1)) > 0.5)
    state = rng.normal(size=(n, 7)).astype(np.float32)
    images = {f"observation.images.{c}": fake_scene(n, seed + i, size) for i, c in enumerate(spec.cameras)}
    return {**images, "observation.state": state, "action": action}


def fake_shard(index):
    """Importable, so that a fresh process can make it."""
    time.sleep(float(os.environ.get("SLOW_SHARDS", "0")))
    for seed in (10 * index, 10 * index + 1):
        yield fake_episode(4, seed, size=16), f"task {index}", {"family": "lift", "seed": seed}


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "demos"
    writer = EpisodeWriter(root, SPEC, episodes_per_file=2)
    episodes = [fake_episode(n, 100 * i) for i, n in enumerate(LENGTHS)]
    for i, frames in enumerate(episodes):
        writer.add_episode(frames, ("lift the red cube", "press the button")[i % 2], {"family": "ab"[i % 2], "seed": np.int64(i)})
    assert not root.exists()
    return writer.finalize(), episodes


@pytest.fixture
def data(recorded, tmp_path, monkeypatch):
    """A copy of the recorded dataset to damage, with its own cache folder."""
    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(recorded[0], tmp_path / "demos"))


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    before = os.environ.get("RVLM_HOME")
    os.environ["RVLM_HOME"] = str(tmp_path_factory.mktemp("home"))
    yield
    if before is None:
        del os.environ["RVLM_HOME"]
    else:
        os.environ["RVLM_HOME"] = before


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


# --- round trip -----------------------------------------------------------------------------------------------------------


def test_layout_is_lerobot_v3(recorded):
    root, _ = recorded
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 10 and info["robot_type"] == "franka7"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (5, sum(LENGTHS), 2)
    assert info["splits"] == {"train": "0:5"}
    assert info["features"]["action"]["names"] == list(SPEC.names) and info["features"][STATIC]["dtype"] == "video"
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    numbered = [f"chunk-000/file-{i:03d}" for i in range(3)]
    videos = [f"videos/{key}/{n}.mp4" for key in (STATIC, WRIST) for n in numbered]
    meta = ["meta/episodes/chunk-000/file-000.parquet", "meta/info.json", "meta/stats.json", "meta/tasks.parquet"]
    assert files == sorted([*(f"data/{n}.parquet" for n in numbered), *meta, *videos])
    assert not root.with_name("demos.partial").exists()


def test_tables_are_as_lerobot_reads_them(recorded):
    root, _ = recorded
    tasks = pd.read_parquet(root / "meta/tasks.parquet")
    assert [tasks.iloc[i].name for i in tasks["task_index"]] == ["lift the red cube", "press the button"]
    episodes = pd.read_parquet(root / "meta/episodes/chunk-000/file-000.parquet")
    assert episodes["length"].tolist() == list(LENGTHS) and episodes["family"].tolist() == list("ababa")
    assert episodes["dataset_from_index"].tolist() == [0, 7, 11, 20, 25]
    assert np.allclose(episodes[f"videos/{STATIC}/from_timestamp"], [0, 0.7, 0, 0.9, 0])
    assert np.allclose(episodes[f"videos/{STATIC}/to_timestamp"], [0.7, 1.1, 0.9, 1.4, 0.6])
    assert {"stats/action/q01", "stats/action/count", f"stats/{STATIC}/mean", "stats/timestamp/max"} <= set(episodes)
    assert not [c for c in episodes if c.startswith(("histogram", "start/", "digest"))]
    table = pq.read_table(root / "data/chunk-000/file-001.parquet")
    assert table["episode_index"].to_pylist() == [2] * 9 + [3] * 5
    assert table["index"].to_pylist() == list(range(11, 25)) and table["task_index"].to_pylist() == [0] * 9 + [1] * 5
    assert np.allclose(table["timestamp"], [*np.arange(9) / 10, *np.arange(5) / 10])
    assert table.schema.field("action").type == pa.list_(pa.float32(), 7)
    assert pq.ParquetFile(root / "data/chunk-000/file-001.parquet").num_row_groups == 2


def test_columns_come_back_bit_for_bit_and_images_nearly(recorded):
    root, episodes = recorded
    dataset = EpisodeDataset(root)
    assert dataset.spec == SPEC and dataset.n_episodes == 5 and dataset.n_frames == sum(LENGTHS) and dataset.fps == 10
    for i, frames in enumerate(episodes):
        back = dataset.episode(i)
        for key in ("action", "observation.state"):
            assert back[key].dtype == np.float32 and back[key].tobytes() == frames[key].tobytes()
        for key in (STATIC, WRIST):
            assert back[key].shape == frames[key].shape and psnr(back[key], frames[key]) > 40
        assert back["instruction"] == dataset.instruction(i) == dataset.tasks[i % 2]
    whole = np.concatenate([e["action"] for e in episodes])
    assert (dataset.column("action") == whole).all()
    assert dataset.column("frame_index").tolist() == [t for n in LENGTHS for t in range(n)]
    assert dataset.episodes["seed"].tolist() == [0, 1, 2, 3, 4]


def test_stats_equal_numpy(recorded):
    root, episodes = recorded
    stats = json.loads((root / "meta/stats.json").read_text())
    for key in ("action", "observation.state"):
        x = np.concatenate([e[key] for e in episodes]).astype(float)
        _assert_stats(stats[key], x, count=sum(LENGTHS))
    for key in (STATIC, WRIST):
        x = np.concatenate([e[key] for e in episodes]).reshape(-1, 3) / 255
        assert np.shape(stats[key]["mean"]) == (3, 1, 1)
        _assert_stats({k: np.ravel(v) for k, v in stats[key].items()}, x, count=sum(LENGTHS))
    row = pd.read_parquet(root / "meta/episodes/chunk-000/file-000.parquet").iloc[1]
    assert np.allclose(row["stats/action/q99"], np.quantile(episodes[1]["action"].astype(float), 0.99, axis=0))


def _assert_stats(stats, x, count):
    expected = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    expected |= {f"q{q:02d}": np.quantile(x, q / 100, axis=0) for q in (1, 10, 50, 90, 99)}
    for name, values in expected.items():
        assert np.allclose(stats[name], values, atol=1e-9), name
    assert list(stats["count"]) == [count]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 5))
def test_image_histograms_are_exact(seed, n, size):
    x = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.uint8)
    merged = ImageHistogram(ImageHistogram().update(x[:1]).counts + ImageHistogram().update(x[1:]).counts, n)
    _assert_stats({k: np.ravel(v) for k, v in merged.stats().items()}, x.reshape(-1, 3) / 255, count=n)


# --- collection -----------------------------------------------------------------------------------------------------------


def test_collect_in_parallel_equals_one_process(tmp_path):
    one = EpisodeDataset(record_dataset(tmp_path / "one", SPEC, fake_shard, 3, n_workers=1, progress=False))
    two = EpisodeDataset(record_dataset(tmp_path / "two", SPEC, fake_shard, 3, n_workers=2, progress=False))
    assert (one.column("action") == two.column("action")).all() and one.tasks == two.tasks == ["task 0", "task 1", "task 2"]
    assert one.episodes.equals(two.episodes) and one.episodes["seed"].tolist() == [0, 1, 10, 11, 20, 21]


def test_two_simultaneous_collections_share_one_recording(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        roots = list(
            pool.map(lambda _: record_dataset(tmp_path / "d", SPEC, fake_shard, 3, n_workers=1, progress=False), range(2))
        )
    assert roots == [tmp_path / "d"] * 2 and EpisodeDataset(roots[0]).n_episodes > 0


def test_collect_does_nothing_when_complete(tmp_path):
    root = record_dataset(tmp_path / "d", SPEC, fake_shard, 1, progress=False)
    assert record_dataset(root, SPEC, lambda i: pytest.fail("recorded again"), 1, progress=False) == root


def test_killed_collection_resumes(tmp_path):
    """SIGKILL in the middle: finished shards are kept, nothing partial counts as complete, the second run gives the same data."""
    root = tmp_path / "d"
    made_by = "from rvlm.data.windows import record_dataset; from test_dataset import SPEC, fake_shard"
    code = f"{made_by}; record_dataset({str(root)!r}, SPEC, fake_shard, 4, 1)"
    folders = os.pathsep.join(map(str, (Path(__file__).parent, ROOT)))
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"SLOW_SHARDS": "0.6", "PYTHONPATH": folders}, stderr=subprocess.DEVNULL
    )
    partial = tmp_path / "d.partial"
    for _ in range(400):
        if (partial / "shard-00001").is_dir():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p.name: p.stat().st_ino for p in partial.glob("shard-0000?")}
    assert kept and not root.exists()
    with pytest.raises(EpisodeError, match=r"d\.partial is an unfinished recording: run it again to finish it"):
        EpisodeDataset(root)
    made = []
    record_dataset(root, SPEC, lambda i: made.append(i) or fake_shard(i), 4, progress=False)
    assert made == [i for i in range(4) if f"shard-{i:05d}" not in kept]
    reference = EpisodeDataset(record_dataset(tmp_path / "e", SPEC, fake_shard, 4, progress=False))
    assert (EpisodeDataset(root).column("action") == reference.column("action")).all()


def test_writer_keeps_what_an_earlier_run_finished(tmp_path):
    first = EpisodeWriter(tmp_path / "d", SPEC, episodes_per_file=1)
    first.add_episode(fake_episode(3, 0), "lift")
    again = EpisodeWriter(tmp_path / "d", SPEC, episodes_per_file=1)
    assert again.n_resumed == 1
    again.add_episode(fake_episode(3, 1), "lift")
    assert EpisodeDataset(again.finalize()).n_episodes == 2


def test_resuming_with_other_settings_is_refused(tmp_path):
    EpisodeWriter(tmp_path / "d", SPEC)
    with pytest.raises(EpisodeError, match=r"differs in \['spec'\].*resume with the same settings, or remove it"):
        EpisodeWriter(tmp_path / "d", ActionSpec.from_card("tabletop_ur6"))


def test_one_seed_twice_is_refused(tmp_path):
    """Copies of one episode are one episode."""
    writer = EpisodeWriter(tmp_path / "d", SPEC)
    for seed in (0, 1, 0):
        writer.add_episode(fake_episode(3, seed), "lift")
    with pytest.raises(EpisodeError, match=r"episodes 0 and 2 are identical .* give every shard seeds of its own"):
        writer.finalize()


def test_empty_recording_is_refused(tmp_path):
    with pytest.raises(EpisodeError, match="expected at least one episode"):
        EpisodeWriter(tmp_path / "d", SPEC).finalize()


def test_existing_dataset_is_not_overwritten(recorded):
    with pytest.raises(EpisodeError, match="read it with EpisodeDataset, or remove it"):
        EpisodeWriter(recorded[0], SPEC)


# --- bad frames at the writer ---------------------------------------------------------------------------------------------


def _without(key):
    return lambda f: f.pop(key)


def _set(key, make):
    return lambda f: f.update({key: make(f.get(key))})


def _nan(x):
    x = x.copy()
    x[2, 1] = np.nan
    return x


BAD_FRAMES = {
    "nan action": (_set("action", _nan), "action: expected finite numbers, got nan for 'dy' in row 2.*repair the frame"),
    "nan state": (_set("observation.state", _nan), r"observation.state: expected finite numbers.*frame 2"),
    "dimensions": (
        _set("action", lambda x: x[:, :6]),
        r"action: expected 7 action dimensions .*got shape \(5, 6\).*use the card",
    ),
    "state": (_set("observation.state", lambda x: x[:, :5]), "expects 7 dimensions .*got 5; fix the card or the data"),
    "missing camera": (_without(WRIST), r"expects \['static', 'wrist'\], got \['static'\]"),
    "unknown camera": (_set("observation.images.top", lambda _: fake_scene(5, 0)), r"got \['static', 'top', 'wrist'\]"),
    "lengths": (_set("action", lambda x: x[:4]), "same number of frames .*'action': 4"),
    "float64": (_set("action", lambda x: x.astype(float)), r"action: expected float32 of shape \(n, 7\), got float64"),
    "float images": (_set(STATIC, lambda x: x / 255), "expected uint8 of shape .*got float64"),
    "no action": (_without("action"), r"expected the features .*'action'"),
    "text": (_set("note", lambda _: np.array(["a"] * 5)), r"note: expected images .* or numbers"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_bad_frames_are_refused(tmp_path, damage, message):
    frames = fake_episode(5, 0)
    damage(frames)
    with pytest.raises(EpisodeError, match=message):
        EpisodeWriter(tmp_path / "d", SPEC).add_episode(frames, "lift")


def test_bad_instruction_extra_and_size_are_refused(tmp_path):
    writer = EpisodeWriter(tmp_path / "d", SPEC)
    with pytest.raises(EpisodeError, match="expected an instruction in words, got ''"):
        writer.add_episode(fake_episode(3, 0), "")
    with pytest.raises(EpisodeError, match=r"extra: expected scalars under names other than .*'length': 3"):
        writer.add_episode(fake_episode(3, 0), "lift", {"length": 3})
    writer.add_episode(fake_episode(3, 0), "lift")
    with pytest.raises(EpisodeError, match=r"expected uint8 of shape \(n, 32, 32, 3\), got uint8 \(3, 16, 16, 3\)"):
        writer.add_episode(fake_episode(3, 1, size=16), "lift")


def test_an_episode_that_was_refused_leaves_no_trace(tmp_path):
    writer = EpisodeWriter(tmp_path / "d", SPEC)
    writer.add_episode(fake_episode(3, 0), "lift")
    with pytest.raises(EpisodeError):
        writer.add_episode(fake_episode(3, 1), "lift", {"x": [1]})
    writer.add_episode(fake_episode(3, 2), "lift")
    assert Windows(EpisodeDataset(writer.finalize()))[5]["episode_index"] == 1


# --- bad files at the reader ----------------------------------------------------------------------------------------------


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _edit_info(root, **values):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_truncated_parquet(data):
    _truncate(data / "data/chunk-000/file-001.parquet")
    dataset = EpisodeDataset(data)
    for read in (lambda: dataset.column("action"), lambda: dataset.episode(2)):
        with pytest.raises(
            EpisodeError, match=r"expected a whole parquet file at .*file-001\.parquet, got: .*fetch the file again"
        ):
            read()


def test_truncated_mp4(data):
    _truncate(data / f"videos/{WRIST}/chunk-000/file-000.mp4")
    dataset = EpisodeDataset(data)
    for read in (lambda: dataset.episode(0), dataset.frames_cache):
        with pytest.raises(EpisodeError, match=r"expected a whole mp4 file at .*file-000\.mp4, got: .*fetch the file again"):
            read()
    assert dataset.episode(2)[WRIST].shape == (9, 32, 32, 3)
    assert [json.loads(p.read_text())["camera"] for p in (data.parent / "home/frames").glob("*/about.json")] == [STATIC]
    assert not list((data.parent / "home/frames").glob("*.part")), "nothing half-written stays"


def test_missing_mp4(data):
    (data / f"videos/{WRIST}/chunk-000/file-000.mp4").unlink()
    with pytest.raises(EpisodeError, match=r"expected a video at .*file-000\.mp4, got none; fetch or record it again"):
        EpisodeDataset(data).frames_cache()
    with pytest.raises(EpisodeError, match=r"beside it: file-001\.mp4, file-002\.mp4"):
        EpisodeDataset(data).episode(0)


def test_video_that_is_shorter_than_its_episodes(data):
    folder = data / f"videos/{WRIST}/chunk-000"
    shutil.copy(folder / "file-002.mp4", folder / "file-001.mp4")
    with pytest.raises(EpisodeError, match=r"expected 14 frames in .*file-001\.mp4, got 6"):
        EpisodeDataset(data).frames_cache()
    with pytest.raises(
        EpisodeError, match=r"expected 14 frames in .*file-001\.mp4, got 6: .*no frame is near row 6 .*the video and the parquet"
    ):
        EpisodeDataset(data).episode(2)


def test_video_that_is_longer_than_its_episodes(data):
    folder = data / f"videos/{WRIST}/chunk-000"
    shutil.copy(folder / "file-001.mp4", folder / "file-002.mp4")
    with pytest.raises(EpisodeError, match=r"expected 6 frames in .*file-002\.mp4, got 14"):
        EpisodeDataset(data).frames_cache()


def test_nan_in_a_recorded_action(data):
    path = data / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    rows = table["action"].to_pylist()
    rows[3][2] = float("nan")
    field = table.schema.get_field_index("action")
    pq.write_table(table.set_column(field, "action", pa.array(rows, pa.list_(pa.float32(), 7))), path)
    with pytest.raises(EpisodeError, match=r"demos, action: statistics: expected finite numbers, got nan in row 3, dimension 2"):
        Windows(EpisodeDataset(data))
    with pytest.raises(EpisodeError, match=r"demos, action: expected finite numbers, got nan for 'dz' in row 3"):
        Windows(EpisodeDataset(data), stats=EpisodeDataset(data).stats(episodes=[4]))


def test_card_that_does_not_fit_the_data(data):
    info = json.loads((data / "meta/info.json").read_text())
    info["features"]["action"] |= {"shape": [8], "names": list("abcdefgh")}
    _edit_info(data, features=info["features"])
    with pytest.raises(
        EpisodeError, match=r"card 'tabletop_franka7' expects 7 dimensions of action \['dx'.*got 8 \(\['a', .*use the card"
    ):
        EpisodeDataset(data)


def test_one_action_and_one_state_number_are_read_as_rows(tmp_path):
    jaw = Group("gripper", ("jaw",), ("1",), low=(0.0,), high=(1.0,), open=1.0, close=0.0)
    spec = ActionSpec("jaw", "jaw", 10.0, ("front",), (jaw,), (Group("gripper", ("jaw",), ("1",)),))
    values = np.linspace(0, 1, 6, dtype=np.float32)[:, None]
    images = np.zeros((6, 32, 32, 3), np.uint8)
    with EpisodeWriter(tmp_path / "one", spec) as writer:
        writer.add_episode({"observation.images.front": images, "action": values, "observation.state": values}, "open")
    data = EpisodeDataset(tmp_path / "one")
    for column in ("action", "observation.state"):
        assert data.features[column]["shape"] == [1] and data.column(column).shape == data.episode(0)[column].shape == (6, 1)
    assert data.stats()["observation.state"].q99.shape == (1,) and Windows(data, stats=data.stats())[0]["state"].shape == (1, 1)


def test_a_robot_without_a_state_is_recorded_and_read(tmp_path):
    spec, episode = dataclasses.replace(SPEC, state=()), fake_episode(5, 0)
    state = episode.pop("observation.state")
    for name, column in {"left out": {}, "empty": {"observation.state": state[:, :0]}}.items():
        with EpisodeWriter(tmp_path / name, spec) as writer:
            writer.add_episode({**episode, **column}, "lift the red cube")
        dataset = EpisodeDataset(tmp_path / name)
        assert "observation.state" not in dataset.features and dataset.column("observation.state").shape == (5, 0)
        assert dataset.stats()["observation.state"].count == 5 and Windows(dataset).batch([0, 4])["state"].shape == (2, 1, 0)
    writer = EpisodeWriter(tmp_path / "another", spec)
    with pytest.raises(EpisodeError, match=r"expects 0 dimensions .* got 7"):
        writer.add_episode({**episode, "observation.state": state}, "lift the red cube")
    writer.close()
    with pytest.raises(EpisodeError, match=r"differ: state group 0 kind: None against pose"):
        EpisodeDataset(tmp_path / "empty", dataclasses.replace(SPEC, dataset="another"))


def test_unknown_camera_column_and_episode(data):
    dataset = EpisodeDataset(data)
    with pytest.raises(EpisodeError, match="unknown camera 'front'; cameras that exist: static, wrist; name one"):
        Windows(dataset, cameras=["front"])
    with pytest.raises(EpisodeError, match=r"no column 'actions'; columns that exist: action, .*observation.state"):
        dataset.column("actions")
    with pytest.raises(EpisodeError, match="expected an episode from 0 to 4, got 5"):
        dataset.episode(5)
    with pytest.raises(EpisodeError, match="expected episodes from 0 to 4"):
        dataset.stats(episodes=[7])


def test_unknown_version_names_the_fix(data):
    _edit_info(data, codebase_version="v1.6")
    with pytest.raises(
        EpisodeError, match=r"expected format v3\.0 or v2\.1, got 'v1\.6'; convert it to v2\.0 first: .*convert_dataset_v1_to_v2"
    ):
        EpisodeDataset(data)


def test_counts_that_disagree(data):
    _edit_info(data, total_frames=99)
    with pytest.raises(EpisodeError, match="promises 5 episodes of 99 frames, the episodes table has 5 of 31"):
        EpisodeDataset(data)


def test_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(EpisodeError, match=r"expected a LeRobot dataset with meta/info.json in .*is this the right folder"):
        EpisodeDataset(tmp_path)


def test_foreign_dataset_needs_a_card(data):
    _edit_info(data, rvlm={})
    dataset = EpisodeDataset(data)
    assert dataset.cameras == ("static", "wrist") and dataset.column("action").shape == (31, 7)
    with pytest.raises(EpisodeError, match=r"does not say what its actions mean; open it with EpisodeDataset\(root, ActionSpec"):
        Windows(dataset)
    with pytest.raises(EpisodeError, match=r"or give a stage the folder that rvlm.data.hub_datasets.fetch_dataset\(root, card\)"):
        dataset.require_spec()
    assert EpisodeDataset(fetch_dataset(data, "tabletop_franka7")).spec == SPEC
    assert len(Windows(EpisodeDataset(data, SPEC))) == 31


# --- v2.1 -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def v21(recorded, tmp_path, monkeypatch):
    """The same episodes in v2.1, written without LeRobot: one file per episode, json lines, one camera embedded as PNG."""
    import io

    from PIL import Image

    from rvlm.data.video import VideoWriter

    monkeypatch.setenv("RVLM_HOME", str(tmp_path / "home"))
    _, episodes = recorded
    root = tmp_path / "old"
    info = json.loads((recorded[0] / "meta/info.json").read_text())
    info["features"][WRIST] = {"dtype": "image", "shape": [32, 32, 3], "names": ["height", "width", "channel"]}
    info["features"][STATIC] |= {"shape": [3, 32, 32], "names": ["channels", "height", "width"]}
    paths = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    for folder in ("meta", "data/chunk-000", f"videos/chunk-000/{STATIC}"):
        (root / folder).mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info | paths | {"codebase_version": "v2.1", "rvlm": {}}))
    names = ["lift the red cube", "press the button"]
    (root / "meta/tasks.jsonl").write_text("\n".join(json.dumps({"task_index": i, "task": t}) for i, t in enumerate(names)))
    rows = [{"episode_index": i, "tasks": [names[i % 2]], "length": n} for i, n in enumerate(LENGTHS)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for i, frames in enumerate(episodes):
        video = VideoWriter(root / f"videos/chunk-000/{STATIC}/episode_{i:06d}.mp4", 10, 32, 32)
        video.add(frames[STATIC])
        video.close()
        pngs = []
        for image in frames[WRIST]:
            Image.fromarray(image).save(buffer := io.BytesIO(), "png")
            pngs.append({"bytes": buffer.getvalue(), "path": None})
        columns = {"action": list(frames["action"]), "observation.state": list(frames["observation.state"]), WRIST: pngs}
        rows = range(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1]))
        index = {"episode_index": i, "task_index": i % 2, "frame_index": range(len(pngs)), "timestamp": 0.0, "index": rows}
        pd.DataFrame(columns | {k: [v] * len(pngs) if not isinstance(v, range) else v for k, v in index.items()}).to_parquet(
            root / f"data/chunk-000/episode_{i:06d}.parquet"
        )
    return root


def test_v21_reads_like_v3(v21, recorded):
    old, new = EpisodeDataset(v21, SPEC), EpisodeDataset(recorded[0])
    assert old.tasks == new.tasks and (old.column("action") == new.column("action")).all()
    for i in (0, 4):
        a, b = old.episode(i), new.episode(i)
        assert (a[WRIST] == recorded[1][i][WRIST]).all() and psnr(a[STATIC], b[STATIC]) > 40
        assert a["instruction"] == b["instruction"]
    cache = old.frames_cache()
    assert (cache["wrist"][7:11] == recorded[1][1][WRIST]).all() and psnr(cache["static"], new.frames_cache()["static"]) > 40
    a, b = Windows(old, 2, 3)[9], Windows(new, 2, 3)[9]
    assert all((a[k] == b[k]).all() for k in ("action", "state", "action_mask", "obs_mask"))


def test_v21_without_its_episodes_file(v21):
    (v21 / "meta/episodes.jsonl").unlink()
    with pytest.raises(
        EpisodeError, match=r"expected a file at .*meta/episodes\.jsonl, got none; beside it: info\.json, tasks\.jsonl; fetch"
    ):
        EpisodeDataset(v21, SPEC)


# --- windows --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def dataset(recorded):
    return EpisodeDataset(recorded[0])


@pytest.mark.parametrize(("t", "k"), [(1, 1), (1, 4), (3, 2), (4, 6)])
def test_windows_equal_a_reference_computation(dataset, recorded, t, k):
    windows, cache = Windows(dataset, t, k), dataset.frames_cache()
    for index in range(len(windows)):
        sample = windows[index]
        episode = int(np.searchsorted(np.cumsum(LENGTHS), index, "right"))
        start, length = sum(LENGTHS[:episode]), LENGTHS[episode]
        assert (sample["episode_index"], sample["frame_index"]) == (episode, index - start)
        actions = SPEC.normalize(recorded[1][episode]["action"], windows.stats["action"])
        for i in range(t):
            at = index - start - t + 1 + i
            assert sample["obs_mask"][i] == (at >= 0)
            shown = [cache[camera][start + max(at, 0)] for camera in ("static", "wrist")]
            assert (sample["images"][i] == shown).all()
            for j in range(k):
                is_real = at >= 0 and at + j < length
                assert (sample["action_mask"][i, j] == is_real).all()
                assert np.allclose(sample["action"][i, j], actions[np.clip(at + j, 0, length - 1)], atol=1e-6)


def test_shapes_dtypes_and_batches(dataset):
    windows = Windows(dataset, n_obs_steps=3, chunk_size=4, dataset_index=2)
    samples = windows.__getitems__([0, 5, 30])
    expected = {
        "images": ((3, 2, 32, 32, 3), np.uint8), "state": ((3, 7), np.float32), "action": ((3, 4, 7), np.float32),
        "action_mask": ((3, 4, 7), bool), "obs_mask": ((3,), bool), "dataset_index": ((), np.int64),
        "episode_index": ((), np.int64), "frame_index": ((), np.int64),
    }  # fmt: skip
    for sample, index in zip(samples, (0, 5, 30), strict=True):
        assert {k: (v.shape, v.dtype) for k, v in sample.items() if k != "instruction"} == expected
        assert sample["dataset_index"] == 2 and isinstance(sample["instruction"], str)
        assert all(np.array_equal(v, windows[index][k]) for k, v in sample.items())
    assert len(windows) == 31 and set(np.unique(samples[0]["action"][..., 6])) <= {0, 1}


def test_windows_work_with_torch(dataset):
    from torch.utils.data import DataLoader

    batch = next(iter(DataLoader(Windows(dataset, 2, 4), batch_size=5)))
    assert (
        batch["images"].shape == (5, 2, 2, 32, 32, 3) and batch["action"].shape == (5, 2, 4, 7) and len(batch["instruction"]) == 5
    )


def test_gripper_polarity_reaches_the_batch(tmp_path):
    """Two robots with opposite signs give the same training gripper, 1 for open."""
    is_open = np.array([True, False, False, True])
    for name in ("tabletop_franka7", "tabletop_ur6", "tabletop_small5"):
        spec = ActionSpec.from_card(name)
        frames = fake_episode(4, 0, spec, 16)
        frames["action"] = spec.set_grippers(frames["action"], is_open[:, None])
        writer = EpisodeWriter(tmp_path / name, spec)
        writer.add_episode(frames, "lift")
        sample = Windows(EpisodeDataset(writer.finalize()), chunk_size=4)[0]
        assert sample["action"][0, :, 6].tolist() == [1, 0, 0, 1]


def test_statistics_see_the_training_episodes_only(tmp_path):
    """A held-out episode with its own range leaves no trace in the normalisation."""
    writer = EpisodeWriter(tmp_path / "d", SPEC)
    for seed, scale in enumerate((0.1, 0.1, 1.0)):
        frames = fake_episode(30, seed, size=16)
        frames["action"][:, :6] *= scale
        writer.add_episode(frames, "lift")
    dataset = EpisodeDataset(writer.finalize())
    training = Windows(dataset, episodes=[0, 1])
    assert training.stats["action"].max[0] < 0.11 < dataset.stats()["action"].max[0] and training.stats["action"].count == 60
    held_out = Windows(dataset, episodes=[2], stats=training.stats)
    assert np.abs(held_out[0]["action"][..., :6]).max() > 2


def test_cameras_in_the_order_asked_for(dataset):
    sample, swapped = Windows(dataset)[3]["images"], Windows(dataset, cameras=["wrist", "static"])[3]["images"]
    assert (sample[:, ::-1] == swapped).all() and (Windows(dataset, cameras=["wrist"])[3]["images"] == sample[:, 1:]).all()


def test_split_keeps_episodes_whole_and_is_repeatable(dataset):
    training, held_out = split(dataset, 0.4, seed=1)
    assert len(held_out) == 2 and sorted([*training, *held_out]) == list(range(5))
    assert all((a == b).all() for a, b in zip(split(dataset, 0.4, seed=1), (training, held_out), strict=True))
    assert {int(Windows(dataset, episodes=held_out)[i]["episode_index"]) for i in range(5)} <= set(held_out.tolist())
    assert [len(side) for side in split(dataset, 0.01)] == [4, 1], "one at least is held out, however few there are"
    for fraction in (0, 1, -0.1):
        with pytest.raises(EpisodeError, match="expected a fraction of the episodes to hold out, above 0 and below 1, got"):
            split(dataset, fraction)


def test_frames_cache_is_made_once_and_equals_the_episodes(data):
    dataset = EpisodeDataset(data)
    cache = dataset.frames_cache()
    for i, start in enumerate((0, 7, 11, 20, 25)):
        for camera, key in dataset.camera_keys.items():
            assert (cache[camera][start : start + LENGTHS[i]] == dataset.episode(i)[key]).all()
    arrays = sorted((data.parent / "home/frames").glob("*/frames.npy"))
    made = [path.stat().st_mtime_ns for path in arrays]
    EpisodeDataset(data).frames_cache(["wrist", "static"])
    assert sorted((data.parent / "home/frames").glob("*/frames.npy")) == arrays and len(arrays) == 2, "one array for each camera"
    assert [path.stat().st_mtime_ns for path in arrays] == made
    with pytest.raises(ValueError, match="read-only"):
        cache["static"][0] = 0


def test_cameras_of_different_sizes(tmp_path):
    frames = fake_episode(4, 0) | {WRIST: fake_scene(4, 0, 16)}
    writer = EpisodeWriter(tmp_path / "d", SPEC)
    writer.add_episode(frames, "lift")
    dataset = EpisodeDataset(writer.finalize())
    assert Windows(dataset, cameras=["wrist"])[0]["images"].shape == (1, 1, 16, 16, 3)
    with pytest.raises(EpisodeError, match=r"cameras of one size, got .*'wrist': \(16, 16\).*image_size=\(h, w\), or choose"):
        Windows(dataset)
    assert dataset.image_sizes() == {"static": frames["observation.images.static"].shape[1:3], "wrist": (16, 16)}
    windows = Windows(dataset, image_size=(20, 24))
    assert windows[0]["images"].shape == (1, 2, 20, 24, 3)
    own = dataset.frames_cache(["wrist"])["wrist"]
    assert (windows[2]["images"][0, 1] == resize(own[2], (20, 24))).all()
    assert np.array_equal(resize(own[2], (16, 16)), own[2])
