"""Record demonstrations as a LeRobotDataset v3.0.

A recording consists of *shards* (`rvlm.data.shards`), each written under a temporary name and renamed when complete.
`EpisodeWriter` writes one shard per episode and merges them into larger files in the end; `record_dataset` writes shards of many
episodes in parallel. `finalize` numbers the episodes and writes the meta files, again under a temporary name. After a kill at any
time, complete shards are kept, and an unfinished dataset cannot be mistaken for a finished one:

    ROOT.partial/shard.4f1c.../      being written
    ROOT.partial/shard-00007/        finished
    ROOT/                            the finished dataset
    ROOT.lock                        held by the recording process

Source: huggingface/lerobot, src/lerobot/datasets (format v3.0).  Taught in: 02_episodes_and_actions.
"""

from __future__ import annotations

import json
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import EpisodeError
from rvlm.data.lerobot_format import EpisodeFrames, finalize_dataset
from rvlm.data.shards import (
    COMPLETE_MARK,
    Shard,
    extra_columns,
    finished_shards,
    merge_shards,
    n_episodes,
    recover_shards,
    rename_shard,
    rename_to_next,
    shard_index,
)
from rvlm.files import atomic_write, lock_of
from rvlm.processes import in_parallel

Episode = tuple[EpisodeFrames, str, dict[str, Any] | None]
FINALIZED_MARK = "assembled"  # in a recording: inode of the dataset that was made from it


class EpisodeWriter:
    """Write a LeRobotDataset v3.0 from one process, episode by episode; each is on disk when `add_episode` returns.

    A ``with`` block finalizes the dataset at its end; after an error, the recorded episodes are kept and a new writer resumes.
    Two writers of one process may record into one folder, two processes may not.

    Args:
        root: folder of the dataset, which must not exist. Until `finalize`, everything is in ``ROOT.partial``.
        spec: the action spec; actions, state and cameras are checked against it, and it is stored in info.json.
        features: LeRobot's ``features`` block; from the first episode if left out.
        episodes_per_file: episodes per parquet and mp4 file.

    Attributes:
        n_resumed: episodes kept from an earlier, interrupted recording; continue with the next one.

    Raises:
        EpisodeError: the dataset is finished, another process is recording it, or an unfinished one has other settings.

    Example:
        >>> images = np.random.default_rng(0).integers(0, 256, (20, 96, 96, 3), np.uint8)
        >>> frames = {f"observation.images.{camera}": images for camera in ("static", "wrist")}
        >>> frames |= {name: np.zeros((20, 7), np.float32) for name in ("observation.state", "action")}
        >>> with rvlm.EpisodeWriter("recorded", rvlm.ActionSpec.from_card("tabletop_franka7")) as writer:
        ...     writer.add_episode(frames, "lift the red cube")
        >>> rvlm.EpisodeDataset("recorded").tasks
        ['lift the red cube']
    """

    def __init__(
        self, root: str | Path, spec: ActionSpec, features: dict[str, Any] | None = None, episodes_per_file: int = 100
    ) -> None:
        self.root, self.spec, self.episodes_per_file = Path(root), spec, episodes_per_file
        self._partial = partial_folder(self.root)
        self._refuse_finished()
        self._release = weakref.finalize(self, _locked(self.root).release)
        try:
            self._refuse_finished()
            _open_partial(self._partial, {"spec": spec.to_dict(), "n_shards": None})
            recover_shards(self._partial)
            kept = finished_shards(self._partial)
            self.n_resumed, self.features = sum(map(n_episodes, kept)), _features_of(kept, features)
            self._extra = extra_columns(kept)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.finalize()
        else:
            self.close()

    def add_episode(self, frames: EpisodeFrames, instruction: str, extra: dict[Any, Any] | None = None) -> None:
        """Append one episode of n frames.

        Args:
            frames: "observation.images.NAME" ``(n, h, w, 3)`` uint8 for each camera of the card, "observation.state" ``(n, s)``
                float32, "action" ``(n, a)`` float32 in raw units; further columns as ``(n,)`` or ``(n, d)``.
            instruction: in words.
            extra: scalars that describe the episode (task, seed, ...); columns of the episodes table.

        Raises:
            EpisodeError: the episode contradicts the card or the recording's features, could not be written, or the dataset is
                finished.
        """
        self._refuse_finished()
        shard = Shard(self._partial, self.spec, self.features, extra=self._extra)
        shard.add(frames, instruction, extra)
        rename_to_next(shard.write())
        self.features, self._extra = shard.features, shard.extra

    def finalize(self) -> Path:
        """Merge the episodes into files, write the meta files and rename the dataset; returns ``root``.

        May be called again, also after a kill.
        """
        if not _is_finished(self.root):
            recover_shards(self._partial)
            _finalize(merge_shards(self._partial, self.episodes_per_file), self.root, self.spec)
        self.close()
        return self.root

    def close(self) -> None:
        """Release the lock; recorded episodes are kept."""
        self._release()

    def _refuse_finished(self) -> None:
        if self.root.exists():
            _is_finished(self.root)
            raise EpisodeError(
                f"expected no folder at {self.root} yet, got one; read it with EpisodeDataset, or remove it. A finished dataset "
                "takes no more episodes: record them into another folder, and train on both"
            )


def _locked(root: Path) -> FileLock:
    """Acquire the lock of a recording, which is released when this process ends."""
    root.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{root}.lock", timeout=0, thread_local=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise EpisodeError(
            f"{root}: another process is recording it at this moment; wait until it has finished, or record into another folder "
            "and train on both"
        ) from error
    return lock


def _features_of(kept: list[Path], features: dict[str, Any] | None) -> dict[str, Any] | None:
    """Features of the kept episodes, which new ones must share."""
    if not kept:
        return features
    found = json.loads((kept[0] / COMPLETE_MARK).read_text())
    if features not in (None, found):
        raise EpisodeError(
            f"{kept[0].parent} holds an unfinished recording with other features: expected {found}, got {features}; resume with "
            "the same ones, or remove it"
        )
    return found


def partial_folder(root: Path) -> Path:
    """Folder of an unfinished recording."""
    return root.with_name(root.name + ".partial")


def _open_partial(partial: Path, header: dict[str, Any]) -> None:
    if not (partial / "header.json").exists():
        atomic_write(partial / "header.json", json.dumps(header))
    _refuse_other(partial, header)


def _refuse_other(partial: Path, header: dict[str, Any]) -> None:
    """Raise `EpisodeError` if an unfinished recording has other settings."""
    try:
        found = json.loads((partial / "header.json").read_text())
    except FileNotFoundError:
        return
    differing = [key for key in header if found.get(key) != header[key]]
    if differing:
        raise EpisodeError(
            f"{partial} holds an unfinished recording that differs in {differing}: expected "
            f"{[header[k] for k in differing]}, got {[found.get(k) for k in differing]}; "
            "resume with the same settings, or remove it"
        )


def _finalize(shards: list[Path], root: Path, spec: ActionSpec, held_out: dict[str, Any] | None = None) -> Path:
    """Make the dataset under a temporary name, rename it, and remove the shards."""
    folder, mark = partial_folder(root) / f"whole.{uuid.uuid4().hex}", partial_folder(root) / FINALIZED_MARK
    finalize_dataset(shards, folder, spec, held_out)
    mark.write_text(str(folder.stat().st_ino))
    try:
        folder.rename(root)
    except OSError as error:
        mark.unlink()
        raise EpisodeError(
            f"{root}: the dataset is complete in {folder}, but could not be renamed ({error}); all recorded episodes are kept: "
            "fix the cause, and finalize again"
        ) from error
    _is_finished(root)
    return root


def _is_finished(root: Path) -> bool:
    """Whether the dataset is finished; removes shards that a kill may have left."""
    partial = partial_folder(root)
    mark = partial / FINALIZED_MARK
    if root.exists() and mark.exists() and mark.read_text() == str(root.stat().st_ino):
        for path in partial.glob("*/"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)  # with the mark, last
    return root.exists() and not partial.exists()


def record_shard(partial: str, index: int, spec: ActionSpec, make_shard: Callable[[int], Iterable[Episode]]) -> int:
    """Record one shard (in a worker process); returns its index."""
    final = Path(partial) / f"shard-{index:05d}"
    shard = Shard(Path(partial), spec, name=final.name)
    for frames, instruction, extra in make_shard(index):
        shard.add(frames, instruction, extra)
    rename_shard(shard.write(), final)  # no effect if another process was first
    return index


def record_dataset(
    root: str | Path,
    spec: ActionSpec,
    make_shard: Callable[[int], Iterable[Episode]],
    n_shards: int,
    n_workers: int = 1,
    progress: bool = True,
    held_out: dict[str, Any] | None = None,
) -> Path:
    """Record a dataset of ``n_shards`` shards in parallel; called again after a kill, it resumes.

    Args:
        root: folder of the dataset. Nothing is done if it exists, so its name should be a hash of its settings.
        spec: the action spec, see `EpisodeWriter`.
        make_shard: shard index -> episodes ``(frames, instruction, extra)``, with different seeds for each shard. With more
            than one worker it must be importable in a new process (a function of a module, or a partial of one).
        n_shards: number of shards, each a file of the dataset.
        n_workers: processes; 1 or less records in this process.
        progress: show a progress bar.
        held_out: held-out seeds, templates and words for evaluation, stored in ``meta/held_out.json``.
    """
    root, header = Path(root), {"spec": spec.to_dict(), "n_shards": n_shards}
    if root.exists():
        _is_finished(root)
        return root
    partial = partial_folder(root)
    _refuse_other(partial, header)  # before waiting for the lock
    with lock_of(root):  # concurrent calls wait
        if root.exists():
            return root
        _open_partial(partial, header)
        recover_shards(partial)
        done = {shard_index(shard) for shard in finished_shards(partial)}
        todo = [i for i in range(n_shards) if i not in done]
        with tqdm(total=n_shards, initial=len(done), desc=f"record {root.name}", unit="shard", disable=not progress) as bar:
            for _ in in_parallel(record_shard, [(str(partial), i, spec, make_shard) for i in todo], n_workers):
                bar.update()
        extra_columns(finished_shards(partial))  # raises if types differ
        return _finalize(finished_shards(partial), root, spec, held_out)
