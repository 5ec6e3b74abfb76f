"""Shards: groups of episodes that are written atomically.

A shard is written under a temporary name and renamed when complete: one parquet file, one mp4 file per camera, the episodes
table, and, written last, the features. Recorded data is never removed here.

Source: huggingface/lerobot, src/lerobot/datasets (format v3.0).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rvlm.data.actions import ActionSpec
from rvlm.data.episode_checks import check_arrays, check_extra, check_frames
from rvlm.data.errors import EpisodeError
from rvlm.data.instruction_checks import instruction_error
from rvlm.data.lerobot_format import IMAGES, EpisodeFrames, ImageHistogram, common_features, infer_features, link
from rvlm.data.video import VideoWriter, concatenate
from rvlm.files import atomic_write

COMPLETE_MARK = "features.json"  # written last: a folder with it is complete


class Shard:
    """Writer of one shard.

    Args:
        partial: folder of the unfinished recording.
        spec: the action spec.
        features: LeRobot's ``features`` block; from the first episode if left out.
        name: final name of the shard; the next free one by default.
        extra: extra columns of earlier episodes, with one value each.
    """

    def __init__(
        self,
        partial: Path,
        spec: ActionSpec,
        features: dict[str, Any] | None = None,
        name: str = "shard",
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.spec, self.features, self.extra = spec, features, dict(extra or {})
        self._folder = partial / f"{name}.{uuid.uuid4().hex}"
        self._tables: list[pa.Table] = []
        self._rows: list[dict[str, Any]] = []
        self._videos: dict[str, VideoWriter] = {}

    def add(self, frames: EpisodeFrames, instruction: str, extra: dict[Any, Any] | None = None) -> None:
        """Append one episode; see `EpisodeWriter.add_episode`."""
        if not self.spec.state_names:  # an empty one is none
            frames = {key: values for key, values in frames.items() if key != "observation.state" or np.size(values)}
        check_arrays(frames)
        features = self.features or infer_features(self.spec, frames)
        n = check_frames(self.spec, features, frames)
        if error := instruction_error(instruction):
            raise EpisodeError(f"expected an instruction in words, got {error}; every episode needs one")
        plain = check_extra(extra, self.extra)
        row = {"instruction": instruction, "length": n, "extra": json.dumps(plain), "digest": _digest(frames)}
        with self._reporting_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            for key in (k for k in frames if k.startswith(IMAGES)):
                row[f"start/{key}"] = self._add_video(key, frames[key])
                row[f"histogram/{key}"] = ImageHistogram().update(frames[key]).counts.reshape(-1)
        self._tables.append(_table({k: v for k, v in frames.items() if not k.startswith(IMAGES)}))
        self._rows.append(row)
        self.features, self.extra = features, {**plain, **self.extra}

    def _add_video(self, key: str, images: np.ndarray) -> int:
        if key not in self._videos:
            self._videos[key] = VideoWriter(self._folder / f"{key}.mp4", self.spec.rate_hz, *images.shape[1:3])
        start = self._videos[key].n_frames
        self._videos[key].add(images)
        return start

    def write(self) -> Path:
        """Finish the videos and write the tables; returns the complete folder, still under its temporary name."""
        with self._reporting_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            for video in self._videos.values():
                video.close()
            _write_tables(self._folder, pa.concat_tables(self._tables) if self._rows else None, self._rows)
            _finish(self._folder, self.features)
        return self._folder

    @contextlib.contextmanager
    def _reporting_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.FFmpegError, pa.ArrowException) as error:
            raise EpisodeError(
                f"{self._folder}: an episode could not be written ({error}); all that were recorded before it are kept in "
                f"{self._folder.parent}; make room or fix the disk, then record this one again"
            ) from error


def _write_tables(folder: Path, data: pa.Table | None, rows: list[dict[str, Any]]) -> None:
    if data is not None:
        pq.write_table(data, folder / "data.parquet")
    pq.write_table(pa.Table.from_pylist(rows), folder / "episodes.parquet")


def _finish(folder: Path, features: dict[str, Any] | None) -> None:
    """Flush all files to disk, then write the completion mark, in this order even after a power failure."""
    _fsync([path for path in folder.iterdir() if path.is_file()])
    _fsync([atomic_write(folder / COMPLETE_MARK, json.dumps(features))])


def _fsync(paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def rename_shard(folder: Path, final: Path) -> bool:
    """Rename a complete shard; False, without a change, if the name is taken.

    Raises:
        EpisodeError: Renaming failed; the shard stays where it is.
    """
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise EpisodeError(
            f"{folder}: the shard is complete there, but could not be renamed to {final.name} ({error}); fix the disk and "
            "resume the recording, which recovers the shard: don't add its episodes again"
        ) from error
    return True


def rename_to_next(folder: Path) -> Path:
    """Rename a complete shard to the next free name."""
    partial = folder.parent
    number = max((shard_index(shard) for shard in finished_shards(partial)), default=-1) + 1
    while not rename_shard(folder, partial / f"shard-{number:05d}"):
        number += 1
    return partial / f"shard-{number:05d}"


def recover_shards(partial: Path) -> None:
    """Rename complete shards that a kill or an error has left under temporary names."""
    for last in sorted(partial.glob(f"shard*.*/{COMPLETE_MARK}"), key=lambda path: path.stat().st_mtime_ns):
        name = last.parent.name.partition(".")[0]
        if name == "shard":
            rename_to_next(last.parent)
        else:
            rename_shard(last.parent, partial / name)


def shard_index(shard: Path) -> int:
    """Index of a shard, from its name."""
    return int(shard.name.removeprefix("shard-"))


def finished_shards(partial: Path) -> list[Path]:
    """Folders of the finished shards, in order."""
    return sorted((p for p in partial.glob("shard-*") if p.name.removeprefix("shard-").isdecimal()), key=shard_index)


def n_episodes(shard: Path) -> int:
    """Number of episodes in a shard."""
    return pq.read_metadata(shard / "episodes.parquet").num_rows


def extra_columns(shards: Sequence[Path]) -> dict[str, Any]:
    """Extra columns of all episodes, with the first value of each; `EpisodeError` if types differ."""
    found: dict[str, Any] = {}
    for shard in (s for s in shards if n_episodes(s)):
        for row in pq.read_table(shard / "episodes.parquet", columns=["extra"])["extra"].to_pylist():
            found = {**check_extra(json.loads(row), found), **found}
    return found


def merge_shards(partial: Path, per_file: int) -> list[Path]:
    """Copy the episodes into shards of at least ``per_file`` each; the shards of `partial` are not changed."""
    target, group = partial / "files", []
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for shard in finished_shards(partial):
        group.append(shard)
        if sum(map(n_episodes, group)) >= per_file:
            _merge(group, target)
            group = []
    if group:
        _merge(group, target)
    return finished_shards(target)


def _merge(group: Sequence[Path], target: Path) -> None:
    folder = target / f"shard-{len(finished_shards(target)):05d}"
    if len(group) == 1:
        shutil.copytree(group[0], folder, copy_function=link)
        return
    folder.mkdir()
    features, rows, before = common_features(group), [], 0
    for shard in group:
        own = pq.read_table(shard / "episodes.parquet").to_pylist()
        rows += [{k: v + before if k.startswith("start/") else v for k, v in row.items()} for row in own]
        before += sum(row["length"] for row in own)
    _write_tables(folder, pa.concat_tables([pq.read_table(shard / "data.parquet") for shard in group]), rows)
    for key in (key for key in features if key.startswith(IMAGES)):
        concatenate([shard / f"{key}.mp4" for shard in group], folder / f"{key}.mp4", features[key]["info"]["video.fps"])
    _finish(folder, features)


def _digest(frames: EpisodeFrames) -> str:
    return hashlib.sha256(b"".join(frames[key].tobytes() for key in ("action", "observation.state") if key in frames)).hexdigest()


def _table(columns: EpisodeFrames) -> pa.Table:
    return pa.table({key: _arrow(values) for key, values in columns.items()})


def _arrow(values: np.ndarray) -> pa.Array:
    """``(n,)`` or ``(n, 1)`` -> scalars, ``(n, d)`` -> lists of fixed size."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    width = int(np.prod(values.shape[1:]))
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
