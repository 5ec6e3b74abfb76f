"""LeRobotDataset v3.0 on disk: its features, its statistics, its meta files.

    meta/info.json  meta/stats.json  meta/tasks.parquet  meta/episodes/chunk-000/file-000.parquet
    data/chunk-000/file-000.parquet                       many episodes a file, one row group each
    videos/observation.images.static/chunk-000/file-000.mp4

Source: huggingface/lerobot, src/lerobot/datasets (format v3.0).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rvlm.data.actions import ActionSpec
from rvlm.data.dataset_statistics import ImageHistogram, feature_stats
from rvlm.data.errors import EpisodeError
from rvlm.data.tables import stack_column
from rvlm.data.video import CODEC, PIX_FMT

EpisodeFrames = dict[str, np.ndarray] | Any  # Any: other types are refused with a message
CHUNKS_SIZE = 1000
IMAGES = "observation.images."
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
RESERVED_COLUMNS = {
    "episode_index",
    "tasks",
    "length",
    "dataset_from_index",
    "dataset_to_index",
    "instruction",
    "digest",
    "extra",
}
DEFAULT_FEATURES = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


def infer_features(spec: ActionSpec, frames: EpisodeFrames) -> dict[str, dict[str, Any]]:
    """The ``features`` block of info.json from the frames of an episode; dimension names are the card's."""
    names = {"action": list(spec.names), "observation.state": list(spec.state_names)}
    features: dict[str, dict[str, Any]] = {}
    for key, values in frames.items():
        shape = list(values.shape[1:]) or [1]
        if key.startswith(IMAGES):
            features[key] = {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]}
            features[key]["info"] = _video_info(spec.rate_hz, *shape)
        else:
            dtype = "float32" if key in names else str(values.dtype)
            features[key] = {"dtype": dtype, "shape": shape, "names": names.get(key)}
    return features


def _video_info(fps: float, height: int, width: int, channels: int) -> dict[str, Any]:
    size = {"video.height": height, "video.width": width, "video.channels": channels}
    codec = {"video.codec": "h264", "video.pix_fmt": PIX_FMT, "video.fps": _int_if_whole(fps), "video.encoder": CODEC}
    return size | codec | {"video.is_depth_map": False, "has_audio": False}


def _int_if_whole(fps: float) -> float | int:
    return int(fps) if float(fps).is_integer() else fps


def finalize_dataset(shards: Sequence[Path], folder: Path, spec: ActionSpec, held_out: dict[str, Any] | None = None) -> None:
    """Write one dataset from finished shards into `folder`."""
    shards = [s for s in shards if pq.read_metadata(s / "episodes.parquet").num_rows]
    if not shards:
        raise EpisodeError(f"expected at least one episode in {folder.parent}, got none; add episodes before finalize")
    features = common_features(shards)
    episodes = pd.concat([_episode_rows(s, i, spec) for i, s in enumerate(shards)], ignore_index=True)
    _assign_indices(episodes)
    _reject_duplicates(episodes)
    tasks = list(dict.fromkeys(episodes.pop("instruction")))
    tables = _write_data(folder, shards, episodes, features, tasks, spec)
    episodes, stats = _all_stats(tables, episodes)
    _write_meta(folder, episodes, features, tasks, stats, spec)
    if held_out is not None:
        (folder / "meta/held_out.json").write_text(json.dumps(held_out, indent=1))


def common_features(shards: Sequence[Path]) -> dict[str, Any]:
    """The features of all shards; raises `EpisodeError` if they differ."""
    features = [json.loads((s / "features.json").read_text()) for s in shards]
    for shard, other in zip(shards, features, strict=True):
        if other != features[0]:
            raise EpisodeError(
                f"expected the same features in every shard, got {other} in {shard} against {features[0]} in {shards[0]}; "
                "were the shards recorded with different image sizes? remove the odd ones and record them again"
            )
    return features[0]


def _episode_rows(shard: Path, i: int, spec: ActionSpec) -> pd.DataFrame:
    rows = pq.read_table(shard / "episodes.parquet").to_pandas()
    extra = pd.DataFrame([json.loads(e) for e in rows.pop("extra")])
    rows.insert(0, "tasks", [[t] for t in rows["instruction"]])
    rows["data/chunk_index"], rows["data/file_index"] = divmod(i, CHUNKS_SIZE)
    for key in [c.removeprefix("start/") for c in rows if c.startswith("start/")]:
        start = rows.pop(f"start/{key}")
        rows[f"videos/{key}/chunk_index"], rows[f"videos/{key}/file_index"] = divmod(i, CHUNKS_SIZE)
        rows[f"videos/{key}/from_timestamp"] = start / spec.rate_hz
        rows[f"videos/{key}/to_timestamp"] = (start + rows["length"]) / spec.rate_hz
    return pd.concat([rows, extra], axis=1)


def _assign_indices(episodes: pd.DataFrame) -> None:
    episodes.insert(0, "episode_index", np.arange(len(episodes)))
    episodes["dataset_to_index"] = episodes["length"].cumsum()
    episodes["dataset_from_index"] = episodes["dataset_to_index"] - episodes["length"]
    episodes["meta/episodes/chunk_index"], episodes["meta/episodes/file_index"] = 0, 0


def _reject_duplicates(episodes: pd.DataFrame) -> None:
    """Refuse identical episodes: a seed was used twice, and a held-out copy of a training episode would be a leak."""
    digest = episodes.pop("digest")
    if digest.duplicated().any():
        second = int(np.argmax(digest.duplicated()))
        first = int(np.argmax(digest == digest[second]))
        raise EpisodeError(
            f"episodes {first} and {second} are identical ({digest.duplicated().sum()} such twins); "
            "was one seed used twice? give every shard seeds of its own"
        )


def _write_data(
    folder: Path, shards: list[Path], episodes: pd.DataFrame, features: dict[str, Any], tasks: list[str], spec: ActionSpec
) -> list[pa.Table]:
    """Write parquet files (one row group per episode) and videos; returns the table of each episode."""
    task_index = {task: i for i, task in enumerate(tasks)}
    tables = []
    for i, shard in enumerate(shards):
        chunk, file = divmod(i, CHUNKS_SIZE)
        rows = episodes[(episodes["data/chunk_index"] == chunk) & (episodes["data/file_index"] == file)]
        table, first = pq.read_table(shard / "data.parquet"), rows["dataset_from_index"].to_numpy()
        columns = zip(rows["episode_index"], first, rows["length"], rows["tasks"], strict=True)
        numbered = [
            _add_columns(table.slice(start - first[0], length), int(episode), int(start), task_index[names[0]], spec)
            for episode, start, length, names in columns
        ]
        _write_row_groups(folder / DATA_PATH.format(chunk_index=chunk, file_index=file), numbered)
        for key in (k for k in features if k.startswith(IMAGES)):
            link(shard / f"{key}.mp4", folder / VIDEO_PATH.format(video_key=key, chunk_index=chunk, file_index=file))
        tables += numbered
    return tables


def _all_stats(tables: list[pa.Table], episodes: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Episodes with statistics instead of histograms, and the statistics of the whole dataset."""
    per_episode, whole = [_table_stats(table) for table in tables], _table_stats(pa.concat_tables(tables))
    for name in [c for c in episodes if c.startswith("histogram/")]:
        key, counts = name.removeprefix("histogram/"), episodes.pop(name)
        for stats, c, n in zip(per_episode, counts, episodes["length"], strict=True):
            stats[key] = ImageHistogram(c, n).stats()
        whole[key] = ImageHistogram(np.sum(list(counts), axis=0), int(episodes["length"].to_numpy().sum())).stats()
    columns = {f"stats/{f}/{s}": [stats[f][s] for stats in per_episode] for f in whole for s in whole[f]}
    return pd.concat([episodes, pd.DataFrame(columns)], axis=1), whole


def _add_columns(table: pa.Table, episode: int, start: int, task_index: int, spec: ActionSpec) -> pa.Table:
    frame = np.arange(table.num_rows)
    columns = {
        "timestamp": (frame / spec.rate_hz).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full_like(frame, episode),
        "index": frame + start,
        "task_index": np.full_like(frame, task_index),
    }
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table


def _write_row_groups(path: Path, tables: list[pa.Table]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, tables[0].schema, compression="snappy", use_dictionary=True) as writer:
        for table in tables:
            writer.write_table(table)


def link(source: str | Path, target: str | Path) -> None:
    """Hard-link a file, or copy it on file systems without hard links."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _table_stats(table: pa.Table) -> dict[str, Any]:
    numeric = [name for name in table.column_names if not pa.types.is_string(table.schema.field(name).type)]
    return {name: feature_stats(stack_column(table[name])) for name in numeric}


def _write_meta(
    folder: Path, episodes: pd.DataFrame, features: dict[str, Any], tasks: list[str], stats: dict[str, Any], spec: ActionSpec
) -> None:
    (folder / EPISODES_PATH).parent.mkdir(parents=True)
    episodes.to_parquet(folder / EPISODES_PATH, index=False)
    index = pd.Index(tasks, name="task")
    pd.DataFrame({"task_index": np.arange(len(tasks))}, index=index).to_parquet(folder / "meta/tasks.parquet")
    (folder / "meta/stats.json").write_text(json.dumps(stats, indent=1))
    (folder / "meta/info.json").write_text(json.dumps(_info(episodes, features, tasks, spec), indent=1))


def _info(episodes: pd.DataFrame, features: dict[str, Any], tasks: list[str], spec: ActionSpec) -> dict[str, Any]:
    fps = _int_if_whole(spec.rate_hz)
    plain = {k: f if f["dtype"] == "video" else f | {"fps": fps} for k, f in (features | DEFAULT_FEATURES).items()}
    counts = {
        "total_episodes": len(episodes),
        "total_frames": int(episodes["length"].to_numpy().sum()),
        "total_tasks": len(tasks),
    }
    sizes = {"chunks_size": CHUNKS_SIZE, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
    paths = {"data_path": DATA_PATH, "video_path": VIDEO_PATH, "splits": {"train": f"0:{len(episodes)}"}}
    head = {"codebase_version": "v3.0", "robot_type": spec.robot, "fps": fps}
    return head | counts | sizes | paths | {"features": plain, "rvlm": {"spec": spec.to_dict()}}
