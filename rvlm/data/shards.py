"""Shards: episodes that are written together, whole or not there.

Each is written under a name of its own and renamed when it is whole: one parquet file, one mp4 file per camera, the rows
that describe its episodes, and, written last, their features. Nothing that has been recorded is ever removed here.

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
from rvlm.data.instructions import flaw_of
from rvlm.data.lerobot_format import IMAGES, Frames, ImageHistogram, common_features, infer_features, link
from rvlm.data.video import EpisodeError, VideoWriter, concatenate
from rvlm.files import atomic_write

LAST = "features.json"  # what is written last: a folder that has it is whole


class Shard:
    """Episodes under way to their place.

    Args:
        partial: where the recording stands.
        spec: the robot's conventions.
        features: LeRobot's; taken from the first episode if left out.
        name: that it is to have, if not the next one.
        extra: Extra columns of earlier episodes, by one value of each.
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

    def add(self, frames: Frames, instruction: str, extra: dict[Any, Any] | None = None) -> None:
        """Append one episode; see `EpisodeWriter.add_episode`."""
        check_arrays(frames)
        features = self.features or infer_features(self.spec, frames)
        n = check_frames(self.spec, features, frames)
        if flaw := flaw_of(instruction):
            raise EpisodeError(f"expected an instruction in words, got {flaw}; every episode needs one")
        plain = check_extra(extra, self.extra)
        row = {"instruction": instruction, "length": n, "extra": json.dumps(plain), "digest": _digest(frames)}
        with self._told():
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
        """Finish the videos and write the tables; returns the folder, which is then whole and has its own name still."""
        with self._told():
            self._folder.mkdir(parents=True, exist_ok=True)
            for video in self._videos.values():
                video.close()
            _write_tables(self._folder, pa.concat_tables(self._tables) if self._rows else None, self._rows)
            _finish(self._folder, self.features)
        return self._folder

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.FFmpegError, pa.ArrowException) as error:
            raise EpisodeError(
                f"{self._folder}: an episode could not be written ({error}); all that were recorded before it are kept in "
                f"{self._folder.parent}; make room or mend the disk, then record this one again"
            ) from error


def _write_tables(folder: Path, data: pa.Table | None, rows: list[dict[str, Any]]) -> None:
    if data is not None:
        pq.write_table(data, folder / "data.parquet")
    pq.write_table(pa.Table.from_pylist(rows), folder / "episodes.parquet")


def _finish(folder: Path, features: dict[str, Any] | None) -> None:
    """Put all that was written onto the disk, then say that it is whole: a power cut may not change the order."""
    _settle([path for path in folder.iterdir() if path.is_file()])
    _settle([atomic_write(folder / LAST, json.dumps(features))])


def _settle(paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def place(folder: Path, final: Path) -> bool:
    """Give a whole shard its name; False, and nothing is changed, where that is taken.

    Raises:
        EpisodeError: It could not be renamed, and stays where it is.
    """
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise EpisodeError(
            f"{folder}: what was recorded is whole there and kept, but could not be renamed to {final.name} ({error}); mend the "
            "disk and go on with the recording, which takes it up: don't add it a second time"
        ) from error
    return True


def place_next(folder: Path) -> Path:
    """Give a whole shard the next free name."""
    partial = folder.parent
    number = max((number_of(shard) for shard in finished(partial)), default=-1) + 1
    while not place(folder, partial / f"shard-{number:05d}"):
        number += 1
    return partial / f"shard-{number:05d}"


def take_up(partial: Path) -> None:
    """Give whole shards names that a kill or an error has left without one."""
    for last in sorted(partial.glob(f"shard*.*/{LAST}"), key=lambda path: path.stat().st_mtime_ns):
        name = last.parent.name.partition(".")[0]
        if name == "shard":
            place_next(last.parent)
        else:
            place(last.parent, partial / name)


def number_of(shard: Path) -> int:
    """Its place in the order of all."""
    return int(shard.name.removeprefix("shard-"))


def finished(partial: Path) -> list[Path]:
    """Folders of the finished shards, in order."""
    return sorted((p for p in partial.glob("shard-*") if p.name.removeprefix("shard-").isdecimal()), key=number_of)


def n_episodes(shard: Path) -> int:
    """How many episodes it holds."""
    return pq.read_metadata(shard / "episodes.parquet").num_rows


def extra_of(shards: Sequence[Path]) -> dict[str, Any]:
    """Extra columns of all their episodes, by the first value of each; of two kinds they are refused."""
    found: dict[str, Any] = {}
    for shard in (s for s in shards if n_episodes(s)):
        for row in pq.read_table(shard / "episodes.parquet", columns=["extra"])["extra"].to_pylist():
            found = {**check_extra(json.loads(row), found), **found}
    return found


def joined(partial: Path, per_file: int) -> list[Path]:
    """The same episodes in shards of so many each; those of `partial` stay as they are."""
    target, group = partial / "files", []
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for shard in finished(partial):
        group.append(shard)
        if sum(map(n_episodes, group)) >= per_file:
            _join(group, target)
            group = []
    if group:
        _join(group, target)
    return finished(target)


def _join(group: Sequence[Path], target: Path) -> None:
    folder = target / f"shard-{len(finished(target)):05d}"
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


def _digest(frames: Frames) -> str:
    return hashlib.sha256(frames["action"].tobytes() + frames["observation.state"].tobytes()).hexdigest()


def _table(columns: Frames) -> pa.Table:
    return pa.table({key: _arrow(values) for key, values in columns.items()})


def _arrow(values: np.ndarray) -> pa.Array:
    """``(n,)`` or ``(n, 1)`` -> scalars, ``(n, d)`` -> lists of fixed size."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    width = int(np.prod(values.shape[1:]))
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
