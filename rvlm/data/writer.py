"""Record demonstrations as a LeRobotDataset v3.0.

A recording is made of *shards* (`rvlm.data.shards`), each written under a name of its own and renamed when whole. `EpisodeWriter`
writes a shard for each episode as it ends, and joins them into files of many when all are there; `record_dataset` has processes
make shards of many. `finalize` numbers the episodes through and writes the dataset's meta files, again under a temporary name.
Killed at any time, what is whole is kept, and an unfinished dataset is never mistaken for a finished one:

    ROOT.partial/shard.4f1c.../      being written
    ROOT.partial/shard-00007/        finished
    ROOT/                            the whole dataset
    ROOT.lock                        held by the process that records

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
from rvlm.data.lerobot_format import Frames, finalize_dataset
from rvlm.data.shards import LAST, Shard, extra_of, finished, joined, n_episodes, number_of, place, place_next, take_up
from rvlm.data.video import EpisodeError
from rvlm.files import atomic_write
from rvlm.processes import in_parallel

Episode = tuple[Frames, str, dict[str, Any] | None]
ASSEMBLED = "assembled"  # in an unfinished recording: the inode of the dataset that all it holds has gone into


class EpisodeWriter:
    """Write a LeRobotDataset v3.0 from one process, episode by episode; each is on the disk when `add_episode` returns.

    In a ``with`` block the dataset is finished at its end; where the block is left by an error, what was recorded is kept to go
    on with. Two writers of one process may record into one folder, two processes may not.

    Args:
        root: folder of the dataset; it must not exist yet. Until `finalize` everything stands in ``ROOT.partial``.
        spec: the robot's conventions; actions, state and cameras are checked against it and it is stored in info.json.
        features: LeRobot's ``features`` block; taken from the first episode if left out.
        episodes_per_file: so many episodes share a parquet and an mp4 file.

    Attributes:
        n_kept: episodes of an earlier, killed recording that are kept; go on with the next one.

    Raises:
        EpisodeError: the dataset is finished already, another process records it, or an unfinished one is of another kind.

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
            take_up(self._partial)
            kept = finished(self._partial)
            self.n_kept, self.features = sum(map(n_episodes, kept)), _features_of(kept, features)
            self._extra = extra_of(kept)
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

    def add_episode(self, frames: Frames, instruction: str, extra: dict[Any, Any] | None = None) -> None:
        """Append one episode of n frames.

        Args:
            frames: "observation.images.NAME" ``(n, h, w, 3)`` uint8 for each camera of the card, "observation.state" ``(n, s)``
                float32, "action" ``(n, a)`` float32 in raw units; further columns as ``(n,)`` or ``(n, d)``.
            instruction: what the robot was asked to do, in words.
            extra: scalars that describe the episode (family, seed, ...): columns of the episodes table.

        Raises:
            EpisodeError: the episode breaks the card or the recording's features, could not be written, or comes too late.
        """
        self._refuse_finished()
        shard = Shard(self._partial, self.spec, self.features, extra=self._extra)
        shard.add(frames, instruction, extra)
        place_next(shard.write())
        self.features, self._extra = shard.features, shard.extra

    def finalize(self) -> Path:
        """Join the episodes into files, write the meta files and give the dataset its name; returns ``root``.

        Asked again, it does nothing; killed, it is asked again.
        """
        if not _is_finished(self.root):
            take_up(self._partial)
            _assemble(joined(self._partial, self.episodes_per_file), self.root, self.spec)
        self.close()
        return self.root

    def close(self) -> None:
        """Let others record; what was recorded stays to go on with."""
        self._release()

    def _refuse_finished(self) -> None:
        if self.root.exists():
            _is_finished(self.root)
            raise EpisodeError(
                f"expected no folder at {self.root} yet, got one; read it with EpisodeDataset, or remove it. A finished dataset "
                "takes no more episodes: record them into another folder, and train on both"
            )


def _locked(root: Path) -> FileLock:
    """The lock of a recording, taken by this process; it ends with the process, also where that is killed."""
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
    """Of the episodes that are kept, which those to come must share."""
    if not kept:
        return features
    found = json.loads((kept[0] / LAST).read_text())
    if features not in (None, found):
        raise EpisodeError(
            f"{kept[0].parent} holds an unfinished recording with other features: expected {found}, got {features}; resume with "
            "the same ones, or remove it"
        )
    return found


def partial_folder(root: Path) -> Path:
    """Where a dataset stands while it is being recorded."""
    return root.with_name(root.name + ".partial")


def _open_partial(partial: Path, header: dict[str, Any]) -> None:
    if not (partial / "header.json").exists():
        atomic_write(partial / "header.json", json.dumps(header))
    _refuse_other(partial, header)


def _refuse_other(partial: Path, header: dict[str, Any]) -> None:
    """Raise `EpisodeError` where an unfinished recording is of another kind."""
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


def _assemble(shards: list[Path], root: Path, spec: ActionSpec, held_out: dict[str, Any] | None = None) -> Path:
    """Make the dataset, under a temporary name; then what it was made of is no longer needed."""
    whole, mark = partial_folder(root) / f"whole.{uuid.uuid4().hex}", partial_folder(root) / ASSEMBLED
    finalize_dataset(shards, whole, spec, held_out)
    mark.write_text(str(whole.stat().st_ino))
    try:
        whole.rename(root)
    except OSError as error:
        mark.unlink()
        raise EpisodeError(
            f"{root}: the dataset is whole in {whole}, but could not be renamed ({error}); all that was recorded is kept there: "
            "mend what stands in the way, and finalize again"
        ) from error
    _is_finished(root)
    return root


def _is_finished(root: Path) -> bool:
    """Whether the dataset is there; a kill may have left what it was made of, which is removed then."""
    partial = partial_folder(root)
    mark = partial / ASSEMBLED
    if root.exists() and mark.exists() and mark.read_text() == str(root.stat().st_ino):
        for path in partial.glob("*/"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)  # with the mark, at last
    return root.exists() and not partial.exists()


def record_shard(partial: str, index: int, spec: ActionSpec, make_shard: Callable[[int], Iterable[Episode]]) -> int:
    """Record one shard from start to end (the work of one process); returns its index."""
    final = Path(partial) / f"shard-{index:05d}"
    shard = Shard(Path(partial), spec, name=final.name)
    for frames, instruction, extra in make_shard(index):
        shard.add(frames, instruction, extra)
    place(shard.write(), final)  # or another process has made the same one first
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
    root, header = Path(root), {"spec": spec.to_dict(), "n_shards": n_shards}
    if root.exists():
        _is_finished(root)
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(root)
    _refuse_other(partial, header)  # at once, not when another recorder lets go
    with FileLock(f"{root}.lock"):  # who asks for the same recording meanwhile waits for it
        if root.exists():
            return root
        _open_partial(partial, header)
        take_up(partial)
        done = {number_of(shard) for shard in finished(partial)}
        todo = [i for i in range(n_shards) if i not in done]
        with tqdm(total=n_shards, initial=len(done), desc=f"record {root.name}", unit="shard", disable=not progress) as bar:
            for _ in in_parallel(record_shard, [(str(partial), i, spec, make_shard) for i in todo], n_workers):
                bar.update()
        extra_of(finished(partial))  # of one kind each, or refused
        return _assemble(finished(partial), root, spec, held_out)
