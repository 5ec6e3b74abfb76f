"""Images of one camera of a dataset: decoded, aligned with the rows, and cached as one array on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from rvlm.code_hash import hash_of_code
from rvlm.data.errors import EpisodeError
from rvlm.data.frame_alignment import align_frames
from rvlm.data.frame_cache import FrameFile, cached_frames
from rvlm.data.meta import file_path
from rvlm.data.resizing import resize
from rvlm.data.tables import read_rows
from rvlm.data.video import decode_frames, decode_image, frame_times
from rvlm.files import file_hash

CODE = (
    "rvlm.data.cameras",
    "rvlm.data.frame_cache",
    "rvlm.data.tables",
    "rvlm.data.video",
    "rvlm.data.frame_alignment",
    "rvlm.data.resizing",
)  # determine the cached frames
BATCH = 64  # embedded images read at once


class Camera:
    """One image feature of a dataset.

    Args:
        data: the `EpisodeDataset`.
        key: feature key.
    """

    def __init__(self, data: Any, key: str) -> None:
        self.data, self.key, self.feature = data, key, data.features[key]
        self._alignments: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
        self._first_shape: tuple[int, ...] | None = None

    @property
    def is_video(self) -> bool:
        """Whether the images are stored as video rather than in the tables."""
        return self.feature["dtype"] == "video"

    def episode(self, i: int) -> np.ndarray:
        """Images of one episode ``(n, h, w, 3)`` uint8."""
        if not self.is_video:
            return np.stack([image for _, image in self._embedded(*self.data.locate_episode(i))])
        row = self.data.episodes.iloc[i].to_dict()
        path = self._video(row)
        rows, ticks = self._aligned(path)
        is_in_episode = (rows >= row["dataset_from_index"]) & (rows < row["dataset_to_index"])
        images = dict(decode_frames(path, ticks[is_in_episode]))
        return np.stack([self._checked(path, images[n]) for n in range(len(images))])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images [px]."""
        if len(sizes := sizes_of(self.feature["shape"])) == 1:
            return next(iter(sizes))
        height, width, _ = self._size(self._existing_files())
        return height, width

    def frames(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """Images of all episodes ``(n_frames, h, w, 3)`` uint8: a read-only memory map of the cached array, made if missing.

        Args:
            size: Height and width to resize them to [px]; their own if left out.
        """
        files, data = self._existing_files(), self.data
        size = None if size is None or sizes_of(self.feature["shape"]) == {tuple(size)} else (size[0], size[1])
        made_from = {
            "files": [file_hash(path) for path in files],
            "rows": _hash(*files.values(), *([self._timestamps(), *self._spans().values()] if self.is_video else ())),
            "feature": [self.key, self.feature["dtype"], self.feature["shape"], float(data.info["fps"])],
            "size": size and list(size),
            "code": hash_of_code(*CODE),
        }

        def shape() -> tuple[int, ...]:
            return (data.n_frames, *(size or self._size(files)[:2]), 3)

        about = {"dataset": data.root.name, "camera": self.key, "roots": list(CODE)}
        return cached_frames(made_from, about, shape, lambda out: self._decode(files, out, size))

    # --- locating ----------------------------------------------------------------------------------------------------------

    def _video(self, row: dict[str, Any]) -> Path:
        return file_path(self.data.root, self.data.info, row, self.key)

    def _spans(self) -> dict[Path, np.ndarray]:
        """Video -> its episodes ``(episodes, 3)``: start in the video [s], first row and end row in the dataset."""
        spans: dict[Path, list[tuple[float, int, int]]] = {}
        for row in self.data.episodes.to_dict("records"):
            start = float(row.get(f"videos/{self.key}/from_timestamp", 0.0))
            spans.setdefault(self._video(row), []).append((start, row["dataset_from_index"], row["dataset_to_index"]))
        return {path: np.array(sorted(of_file)) for path, of_file in spans.items()}

    def _files(self) -> dict[Path, np.ndarray]:
        """File -> dataset rows whose images it holds."""
        if not self.is_video:
            return self.data.data_files()
        return {path: _rows(spans) for path, spans in self._spans().items()}

    def _existing_files(self) -> dict[Path, np.ndarray]:
        files = self._files()
        for path in files:
            if not path.is_file():
                raise EpisodeError(f"{self.data.root}: expected a video at {path}, got none; fetch or record it again")
        return files

    def _timestamps(self) -> np.ndarray:
        """Timestamps of the rows ``(n_frames,)``, of any clock; NaN if they are no numbers."""
        self.data.data_files()  # its errors are raised, while invalid timestamps are tolerated
        try:
            return self.data.column("timestamp").reshape(-1).astype(float)
        except (EpisodeError, ValueError):
            return np.full(self.data.n_frames, np.nan)

    def _aligned(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Dataset rows of a video, and the time of each in ticks."""
        if path not in self._alignments:
            ticks, tick = frame_times(path)
            spans = self._spans()[path]
            rows = _rows(spans)
            lengths = (spans[:, 2] - spans[:, 1]).astype(int)
            fps = float(self.data.info["fps"])
            frame = align_frames(path, ticks * float(tick), spans[:, 0], lengths, fps, lambda: self._timestamps()[rows])
            self._alignments[path] = rows, ticks[frame]
        return self._alignments[path]

    # --- decoding ---------------------------------------------------------------------------------------------------------

    def _size(self, files: dict[Path, np.ndarray]) -> tuple[int, ...]:
        """(h, w, 3) of the first image."""
        if self._first_shape is None:
            self._first_shape = next(self._images(next(iter(files))))[1].shape
        return self._first_shape

    def _images(self, path: Path) -> Iterator[tuple[int, np.ndarray]]:
        """Dataset row and image of each row of a file, in the order of the file."""
        if not self.is_video:
            rows = self.data.data_files()[path]
            return ((int(rows[n]), image) for n, image in self._embedded(path, np.arange(len(rows))))
        rows, ticks = self._aligned(path)
        return ((int(rows[n]), self._checked(path, image)) for n, image in decode_frames(path, ticks))

    def _embedded(self, path: Path, at: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        cells = chain.from_iterable(read_rows(path, at[i : i + BATCH], [self.key])[self.key] for i in range(0, len(at), BATCH))
        for n, cell in enumerate(cells):
            yield n, self._checked(path, decode_image(cell.as_py(), f"{path}, row {at[n]}, column {self.key!r}"))

    def _checked(self, path: Path, image: np.ndarray) -> np.ndarray:
        """The image; raises `EpisodeError` if info.json gives another size."""
        if image.shape[:2] not in sizes_of(self.feature["shape"]):
            raise EpisodeError(
                f"{path}: expected images of {self.key} as in info.json, shape {self.feature['shape']}, got "
                f"{image.shape[0]} x {image.shape[1]} pixels (height x width); fix info.json, or convert the dataset again"
            )
        return image

    def _decode(self, files: dict[Path, np.ndarray], out: FrameFile, size: tuple[int, int] | None) -> None:
        def decode(path: Path) -> None:
            for row, image in self._images(path):
                out[row] = resize(image, size)

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(decode, files))


def sizes_of(shape: list[int]) -> set[tuple[int, int]]:
    """Possible (height, width) of a feature's shape: channels last, first, or none."""
    sizes = {(shape[0], shape[1])} if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4)) else set()
    return sizes | ({(shape[1], shape[2])} if len(shape) == 3 and shape[0] in (1, 3, 4) else set())


def _rows(spans: np.ndarray) -> np.ndarray:
    return np.concatenate([np.arange(int(first), int(end)) for _, first, end in spans])


def _hash(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:12]
