"""Record demonstrations as a LeRobotDataset v3.0.

A dataset is made of *shards*: one parquet file, one mp4 file per camera, and the rows that describe their episodes. Shards
are independent, so any number of processes can record them; each is written under a temporary name and renamed when whole.
`finalize` numbers the episodes through and writes the dataset's meta files, again under a temporary name. Killed at any
time, finished shards are kept, and an unfinished dataset is never mistaken for a whole one:

    ROOT.partial/shard-00007.1234/   being written by process 1234
    ROOT.partial/shard-00007/        a finished shard
    ROOT/                            the whole dataset

Source: huggingface/lerobot, src/lerobot/datasets (format v3.0).  Taught in: 02_episodes_and_actions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm.auto import tqdm

from rvlm.actions import ActionSpec
from rvlm.lerobot import IMAGES, Frames, ImageHistogram, assemble, check_extra, check_frames, finished_shards, infer_features
from rvlm.video import EpisodeError, VideoWriter

Episode = tuple[Frames, str, dict[str, Any] | None]


class Shard:
    """Episodes that share one parquet file and one mp4 file per camera; exists under its name only when whole."""

    def __init__(self, partial: Path, index: int, spec: ActionSpec, features: dict[str, Any] | None = None) -> None:
        self.spec, self.features = spec, features
        self._final = partial / f"shard-{index:05d}"
        self._folder = partial / f"{self._final.name}.{os.getpid()}"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._tables: list[pa.Table] = []
        self._rows: list[dict[str, Any]] = []
        self._videos: dict[str, VideoWriter] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, frames: Frames, instruction: str, extra: dict[str, Any] | None = None) -> None:
        """Append one episode; see `EpisodeWriter.add_episode`."""
        self.features = self.features or infer_features(self.spec, frames)
        n = check_frames(self.spec, self.features, frames)
        if not isinstance(instruction, str) or not instruction.strip():
            raise EpisodeError(f"expected an instruction in words, got {instruction!r}; every episode needs one")
        row = {"instruction": instruction, "length": n, "extra": check_extra(extra), "digest": _digest(frames)}
        for key in (k for k in frames if k.startswith(IMAGES)):
            row[f"start/{key}"] = self._add_video(key, frames[key])
            row[f"histogram/{key}"] = ImageHistogram().update(frames[key]).counts.reshape(-1)
        self._tables.append(_table({k: v for k, v in frames.items() if not k.startswith(IMAGES)}))
        self._rows.append(row)

    def _add_video(self, key: str, images: np.ndarray) -> int:
        if key not in self._videos:
            self._videos[key] = VideoWriter(self._folder / f"{key}.mp4", self.spec.rate_hz, *images.shape[1:3])
        start = self._videos[key].n_frames
        self._videos[key].add(images)
        return start

    def close(self) -> None:
        """Write the tables, finish the videos, and give the folder its final name."""
        for video in self._videos.values():
            video.close()
        if self._rows:
            pq.write_table(pa.concat_tables(self._tables), self._folder / "data.parquet")
        pq.write_table(pa.Table.from_pylist(self._rows), self._folder / "episodes.parquet")
        (self._folder / "features.json").write_text(json.dumps(self.features))
        try:
            self._folder.rename(self._final)
        except OSError:  # another process has finished this shard first
            shutil.rmtree(self._folder, ignore_errors=True)


def _digest(frames: Frames) -> str:
    return hashlib.sha256(frames["action"].tobytes() + frames["observation.state"].tobytes()).hexdigest()


def _table(columns: Frames) -> pa.Table:
    return pa.table({key: _arrow(values) for key, values in columns.items()})


def _arrow(values: np.ndarray) -> pa.Array:
    """``(n,)`` or ``(n, 1)`` -> scalars, ``(n, d)`` -> lists of fixed size."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    width = int(np.prod(values.shape[1:]))
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)


class EpisodeWriter:
    """Write a LeRobotDataset v3.0 from one process, episode by episode.

    Args:
        root: folder of the dataset; it must not exist yet. Until `finalize` everything stands in ``ROOT.partial``.
        spec: the robot's conventions; actions, state and cameras are checked against it and it is stored in info.json.
        features: LeRobot's ``features`` block; taken from the first episode if left out.
        episodes_per_file: after so many episodes a new parquet and mp4 file begins.

    Attributes:
        n_kept: episodes of an earlier, killed recording that are kept; go on with the next one.
    """

    def __init__(
        self, root: str | Path, spec: ActionSpec, features: dict[str, Any] | None = None, episodes_per_file: int = 100
    ) -> None:
        self.root, self.spec, self.features = Path(root), spec, features
        self.episodes_per_file = episodes_per_file
        if self.root.exists():
            raise EpisodeError(f"expected no folder at {self.root} yet, got one; read it with EpisodeDataset, or remove it")
        self._partial = partial_folder(self.root)
        _open_partial(self._partial, {"spec": spec.to_dict(), "n_shards": None})
        self._n_shards = len(finished_shards(self._partial))
        self.n_kept = sum(pq.read_metadata(s / "episodes.parquet").num_rows for s in finished_shards(self._partial))
        self._shard: Shard | None = None

    def add_episode(self, frames: Frames, instruction: str, extra: dict[str, Any] | None = None) -> None:
        """Append one episode of n frames.

        Args:
            frames: "observation.images.NAME" ``(n, h, w, 3)`` uint8 for each camera of the card, "observation.state" ``(n, s)``
                float32, "action" ``(n, a)`` float32 in raw units; further columns as ``(n,)`` or ``(n, d)``.
            instruction: what the robot was asked to do, in words.
            extra: scalars that describe the episode (family, seed, ...): columns of the episodes table.
        """
        self._shard = self._shard or Shard(self._partial, self._n_shards, self.spec, self.features)
        self._shard.add(frames, instruction, extra)
        self.features = self._shard.features
        if len(self._shard) >= self.episodes_per_file:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._n_shards, self._shard = self._n_shards + 1, None

    def finalize(self) -> Path:
        """Write the meta files and give the dataset its name; returns ``root``."""
        self._close_shard()
        return assemble(self._partial, self.root, self.spec)


def partial_folder(root: Path) -> Path:
    """Where a dataset stands while it is being recorded."""
    return root.with_name(root.name + ".partial")


def _open_partial(partial: Path, header: dict[str, Any]) -> None:
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / "header.json"
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(header))
        temporary.replace(path)
    found = json.loads(path.read_text())
    differing = [key for key in header if found.get(key) != header[key]]
    if differing:
        raise EpisodeError(
            f"{partial} holds an unfinished recording that differs in {differing}: expected "
            f"{[header[k] for k in differing]}, got {[found.get(k) for k in differing]}; "
            "resume with the same settings, or remove it"
        )


def record_shard(partial: str, index: int, spec: ActionSpec, make_shard: Callable[[int], Iterable[Episode]]) -> int:
    """Record one shard from start to end (the work of one process); returns its index."""
    shard = Shard(Path(partial), index, spec)
    for frames, instruction, extra in make_shard(index):
        shard.add(frames, instruction, extra)
    shard.close()
    return index


def collect(
    root: str | Path,
    spec: ActionSpec,
    make_shard: Callable[[int], Iterable[Episode]],
    n_shards: int,
    n_workers: int = 1,
    progress: bool = True,
    held_out: dict[str, Any] | None = None,
) -> Path:
    """Record a dataset of ``n_shards`` shards in parallel; call it again after a kill and it goes on where it was.

    Args:
        root: folder of the dataset. If it exists, it is whole and nothing is done: name it by what makes its content.
        spec: the robot's conventions, see `EpisodeWriter`.
        make_shard: shard index -> episodes ``(frames, instruction, extra)``; give every shard seeds of its own. With more
            than one worker it must be importable in a fresh process (a function of a module, or a partial of one).
        n_shards: number of shards, each a file of the dataset.
        n_workers: processes; 1 or less records in this one.
        progress: show a progress bar.
        held_out: what the dataset promises not to hold, for those who evaluate: ``meta/held_out.json``.
    """
    root = Path(root)
    if root.exists():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(root.name + ".lock")):  # who asks for the same recording meanwhile waits for it
        if root.exists():
            return root
        partial = partial_folder(root)
        _open_partial(partial, {"spec": spec.to_dict(), "n_shards": n_shards})
        done = {int(p.name[-5:]) for p in finished_shards(partial)}
        todo = [i for i in range(n_shards) if i not in done]
        with tqdm(total=n_shards, initial=len(done), desc=f"record {root.name}", unit="shard", disable=not progress) as bar:
            for _ in _in_parallel(partial, todo, spec, make_shard, n_workers):
                bar.update()
        return assemble(partial, root, spec, held_out)


def _in_parallel(partial: Path, todo: list[int], spec: ActionSpec, make_shard: Callable, n_workers: int) -> Iterable[int]:
    if n_workers <= 1 or len(todo) <= 1:
        yield from (record_shard(str(partial), i, spec, make_shard) for i in todo)
        return
    with ProcessPoolExecutor(min(n_workers, len(todo)), get_context("spawn"), exit_with_parent, (os.getpid(),)) as pool:
        futures = [pool.submit(record_shard, str(partial), i, spec, make_shard) for i in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def exit_with_parent(parent: int) -> None:
    """A worker whose parent was killed ends too, instead of waiting for work forever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
