"""Cache of decoded frames on disk: one array per camera of a dataset, named by the hash of its inputs, with a size limit.

    ARTIFACTS/frames/KEY/frames.npy     (n_frames, h, w, 3) uint8
    ARTIFACTS/frames/KEY/about.json     inputs, dataset and camera; its modification time is that of the last use

All arrays together take at most ``RVLM_FRAMES_GB`` (default 100 GB). The least recently used are removed to make room, but
never one that a process has open.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from rvlm.data.errors import EpisodeError
from rvlm.files import artifacts_dir, config_hash, reserve

SYNC_EVERY = 64_000_000  # bytes


def limit_bytes() -> float:
    """Size limit of all decoded frames: ``RVLM_FRAMES_GB`` [bytes]."""
    setting = os.environ.get("RVLM_FRAMES_GB") or "100"
    try:
        limit = float(setting)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise EpisodeError(
            f"expected RVLM_FRAMES_GB as a number of gigabytes from 0 on, got {setting!r}; change it, or leave it out"
        )
    return limit * 1e9


def cached_frames(
    made_from: dict[str, Any], about: dict[str, Any], shape: Callable[[], tuple[int, ...]], decode: Callable
) -> np.ndarray:
    """A read-only memory map of decoded frames on disk, decoded if it does not exist.

    Args:
        made_from: JSON values that determine the content; hashed for the name.
        about: further JSON values for people.
        shape: returns (n_frames, h, w, 3); called before decoding.
        decode: called with what takes an image by its row, ``out[row] = image``; also from several threads.
    """
    folder = artifacts_dir() / "frames" / config_hash(made_from)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock(folder)):  # concurrent requests wait
        if not _is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, shape(), decode, {**about, "made_from": made_from})
        hold = (folder / "about.json").open("rb")
        fcntl.flock(hold, fcntl.LOCK_SH)
        os.utime(folder / "about.json")
    frames = np.load(folder / "frames.npy", mmap_mode="r")
    weakref.finalize(frames, hold.close)
    return frames


def _is_complete(folder: Path) -> bool:
    """Whether all frames exist; a truncated file is incomplete."""
    try:
        shape = json.loads((folder / "about.json").read_text())["shape"]
        return (folder / "frames.npy").stat().st_size > int(np.prod(shape))  # and a header
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


class FrameFile:
    """A file of frames, written image by image: to a memory map it would take a page fault for every 4 kB.

    Args:
        path: of the ``.npy`` file to make.
        shape: (n_frames, h, w, 3).
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self._file, self._shape, self._n_bytes = path.open("w+b"), shape[1:], math.prod(shape[1:])
        np.lib.format.write_array_header_1_0(self._file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        self._file.flush()
        self._start = self._file.tell()
        self._syncer, self._syncs, self._n_unsynced = ThreadPoolExecutor(1), [], 0
        reserve(path, self._start + math.prod(shape))

    def __setitem__(self, row: int, image: np.ndarray) -> None:
        if image.shape != self._shape:
            raise EpisodeError(f"expected images of shape {self._shape}, as the first, got {image.shape} at row {row}")
        os.pwrite(self._file.fileno(), np.ascontiguousarray(image).data, self._start + row * self._n_bytes)
        self._n_unsynced += self._n_bytes
        if self._n_unsynced > SYNC_EVERY:  # the disk writes while the next frames are decoded
            self._n_unsynced = 0
            self._syncs.append(self._syncer.submit(os.fsync, self._file.fileno()))

    def close(self) -> None:
        """Write all frames to the disk: what is renamed to a complete cache must outlast a power failure."""
        self._syncer.shutdown()
        for sync in self._syncs:
            sync.result()  # an error of the disk is reported once, to the call that meets it
        os.fsync(self._file.fileno())
        self._file.close()


def _make(folder: Path, shape: tuple[int, ...], decode: Callable[[FrameFile], None], about: dict[str, Any]) -> None:
    make_room(int(np.prod(shape)))
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        out = FrameFile(temporary / "frames.npy", shape)
        decode(out)
        out.close()
        (temporary / "about.json").write_text(json.dumps({**about, "shape": list(shape)}, indent=1))
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_room(n_bytes: int) -> None:
    """Remove the least recently used frames until ``n_bytes`` fit below the limit.

    Raises:
        EpisodeError: frames in use leave too little room.
    """
    limit, stored = limit_bytes(), sorted((artifacts_dir() / "frames").glob("*/about.json"), key=lambda p: p.stat().st_mtime)
    sizes = {path.parent: sum(file.stat().st_size for file in path.parent.glob("frames.npy")) for path in stored}
    for folder in list(sizes):
        if sum(sizes.values()) + n_bytes > limit and _remove(folder):
            del sizes[folder]
    if (free := limit - sum(sizes.values())) < n_bytes:
        raise EpisodeError(
            f"expected room for {n_bytes / 1e9:.3g} GB of decoded frames, got {free / 1e9:.3g} of {limit / 1e9:.3g} GB; set "
            "RVLM_FRAMES_GB higher, or use fewer cameras or smaller images"
        )


def _remove(folder: Path) -> bool:
    """Remove one array of frames unless it is being written or used."""
    try:
        with FileLock(_lock(folder), timeout=0), (folder / "about.json").open("rb") as hold:
            if not _is_free(hold):
                return False
            shutil.rmtree(folder)
            return True
    except (Timeout, FileNotFoundError):
        return False


def _is_free(hold: BinaryIO) -> bool:
    try:
        fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
