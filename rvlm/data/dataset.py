"""Read a LeRobotDataset (v3.0 or v2.1) from its folder: parquet tables, mp4 videos, and the action spec.

The dataset is validated: its meta files by `rvlm.data.meta`, its rows by `rvlm.data.row_checks`, the alignment of videos and rows
by `rvlm.data.frame_alignment`. A contradiction is an `EpisodeError` that names the file.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rvlm.data.actions import ActionSpec, NormStats
from rvlm.data.camera_names import camera_names, find_camera, is_image
from rvlm.data.cameras import Camera
from rvlm.data.errors import EpisodeError, SpecMismatch
from rvlm.data.meta import check_card, file_path, read_episodes, read_info, read_tasks, stored_spec
from rvlm.data.pooled_statistics import pooled_stats
from rvlm.data.row_checks import check_complete, rows_of_file
from rvlm.data.tables import column_of, episode_indices, read_json, read_rows, read_table

Index = int | np.integer | Any  # Any: other types are refused with a message
EpisodeIndices = Iterable[int] | np.ndarray | Any
VECTORS = ("action", "action_executed", "observation.state")  # columns that are (n, d) also where d is 1


class EpisodeDataset:
    """A folder of demonstrations in LeRobot's format; changes on disk after opening are not seen.

    Args:
        root: folder of the dataset, with ``meta/info.json``.
        spec: the action spec, or the name or path of its card; by default the one that `EpisodeWriter` stored in info.json.

    Attributes:
        info: content of info.json.
        spec: the action spec, or None for an external dataset that was opened without a card.
        tasks: instructions, in the order of ``task_index``; '' of episodes that have none, which a warning counts.
        episodes: one row per episode: length, tasks, first and last row, files, and extra columns.
        cameras: names of the colour cameras, in the order of the card.
        camera_keys: camera name -> feature key.

    Raises:
        EpisodeError: no such dataset, or its meta files are broken, contradict each other or the card.

    Example:
        >>> data = rvlm.EpisodeDataset("demonstrations")
        >>> data.n_episodes, data.cameras
        (12, ('static', 'wrist'))
        >>> data.column("action").shape
        (72, 7)
    """

    def __init__(self, root: str | Path, spec: ActionSpec | str | Any | None = None) -> None:
        self.root = Path(root)
        self.info = read_info(self.root)
        self.features: dict[str, Any] = self.info["features"]
        given = _spec_of(spec)
        self.spec = stored_spec(self.root, self.info) if given is None else given
        if given is not None:
            _refuse_contradiction(self.root, self.info, given)
        self._task_names = read_tasks(self.root, self.info)
        self.tasks, self.episodes = list(self._task_names.values()), read_episodes(self.root, self.info)
        _warn_of_no_instruction(self.root, self.episodes)
        self.camera_keys = camera_names(self.features)
        if self.spec is not None:
            check_card(self.root, self.info, self.spec)
            self.camera_keys |= {camera: self.camera_key(camera) for camera in self.spec.cameras}
        self.cameras = tuple(self.spec.cameras if self.spec else self.camera_keys)
        self._columns: dict[str, np.ndarray] = {}
        self._rows: dict[Path, np.ndarray] = {}
        self._cameras: dict[str, Camera] = {}

    def __repr__(self) -> str:
        return f"EpisodeDataset({self.root.name!r}: {self.n_episodes} episodes, {self.n_frames} frames)"

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    @property
    def n_frames(self) -> int:
        """Number of frames of all episodes together."""
        return int(self.episodes["length"].to_numpy().sum())

    @property
    def fps(self) -> float:
        """Frames, and actions, per second."""
        return float(self.info["fps"])

    @property
    def held_out(self) -> dict[str, Any]:
        """Seeds, templates and words held out of the dataset (`rvlm.evaluation.protocols`); empty if none are declared."""
        path = self.root / "meta/held_out.json"
        return read_json(path) if path.is_file() else {}

    def instruction(self, i: Index) -> str:
        """Instruction of episode i; that of its first frame if it has several."""
        row = self._row(i)
        return row["tasks"][0] if len(row["tasks"]) == 1 else self.tasks[self.task_of_frame[row["dataset_from_index"]]]

    def camera_key(self, camera: str) -> str:
        """Feature key of a camera; `EpisodeError` if it is unknown or ambiguous."""
        return find_camera(self.root, self.features, camera)

    def require_spec(self) -> ActionSpec:
        """The action spec; `EpisodeError` if there is none."""
        if self.spec is None:
            raise EpisodeError(
                f"{self.root} does not say what its actions mean; open it with EpisodeDataset(root, ActionSpec.from_card(...)), "
                "or give a stage the folder that rvlm.data.hub_datasets.fetch_dataset(root, card) makes, which stores the card"
            )
        return self.spec

    # --- tables -----------------------------------------------------------------------------------------------------------

    def _row(self, i: Index) -> dict[str, Any]:
        try:
            number = -1 if isinstance(i, bool) else operator.index(i)
        except TypeError:
            number = -1
        if not 0 <= number < self.n_episodes:
            raise EpisodeError(f"{self.root}: expected an episode from 0 to {self.n_episodes - 1}, got {i!r}")
        return self.episodes.iloc[number].to_dict()

    def _rows_of(self, path: Path) -> np.ndarray:
        """Dataset row of each row of a data file, cached."""
        if path not in self._rows:
            self._rows[path] = rows_of_file(path, self.episodes, self._task_names)
        return self._rows[path]

    def data_files(self) -> dict[Path, np.ndarray]:
        """Data file -> dataset rows; all files together hold every row once."""
        paths = dict.fromkeys(file_path(self.root, self.info, row) for row in self.episodes.to_dict("records"))
        files = {path: self._rows_of(path) for path in paths}
        check_complete(files, self.episodes)
        return files

    def column(self, name: str) -> np.ndarray:
        """A column over all episodes, ``(n_frames, d)``, or ``(n_frames,)`` if it is scalar; read-only and cached.

        Rows are in the order of episodes and frames. Actions and states are never scalar.
        """
        if name == "observation.state" and name not in self.features and self.spec is not None:
            return np.empty((self.n_frames, 0), np.float32)  # of a robot that tells none
        if name not in self.features or is_image(self.features[name]):
            plain = sorted(k for k, f in self.features.items() if not is_image(f))
            raise EpisodeError(f"{self.root}: no column {name!r}; columns that exist: {', '.join(plain)}")
        if name not in self._columns:
            self._columns[name] = self._read_column(name)
            self._columns[name].flags.writeable = False
        return self._columns[name]

    def _read_column(self, name: str) -> np.ndarray:
        files = self.data_files()
        parts = [column_of(read_table(path, [name]), name, path, self.features[name]) for path in files]
        rows = np.concatenate(list(files.values()))
        values = np.empty((self.n_frames, parts[0].shape[1]), np.result_type(*{p.dtype for p in parts}))
        values[rows] = np.concatenate(parts)
        return values[:, 0] if self._is_scalar(name) else values

    def _is_scalar(self, name: str) -> bool:
        return self.features[name]["shape"] == [1] and name not in VECTORS

    @property
    def episode_of_frame(self) -> np.ndarray:
        """Episode index of every frame ``(n_frames,)``."""
        return np.repeat(np.arange(self.n_episodes), self.episodes["length"])

    @property
    def task_of_frame(self) -> np.ndarray:
        """Index in ``tasks`` of every frame ``(n_frames,)``."""
        return np.searchsorted(list(self._task_names), self.column("task_index").astype(np.int64))

    def episode(self, i: Index) -> dict[str, Any]:
        """One episode: every column ``(n, ...)``, decoded images ``(n, h, w, 3)`` uint8 by feature key, "instruction".

        Language columns are lists of Python values. Depth maps are left out.
        """
        path, at = self.locate_episode(i)
        plain = {k: f for k, f in self.features.items() if not is_image(f)}
        table = read_rows(path, at, list(plain))
        out: dict[str, Any] = {"instruction": self.instruction(i)}
        for key in self.features:
            if key in self.camera_keys.values():
                out[key] = self._camera(key).episode(int(i))
            elif key in plain:
                out[key] = self._cells(table, key, path)
        return out

    def _cells(self, table: Any, key: str, path: Path) -> Any:
        feature = self.features[key]
        if feature["dtype"] == "language":
            return table[key].to_pylist()
        values = column_of(table, key, path, feature)
        return values[:, 0] if self._is_scalar(key) else values

    def locate_episode(self, i: Index) -> tuple[Path, np.ndarray]:
        """Data file of an episode, and its rows there in the order of frames ``(n,)``; all files are searched if need be."""
        row = self._row(i)
        first, end, named = row["dataset_from_index"], row["dataset_to_index"], file_path(self.root, self.info, row)
        if (at := _within(self._rows_of(named), first, end)) is not None:
            return named, at
        for path, rows in self.data_files().items():
            if (at := _within(rows, first, end)) is not None:
                return path, at
        raise EpisodeError(
            f"{self.root}: expected the rows of episode {i} in one data file, got them in several; convert it again"
        )

    def stats(
        self, kind: str = "q01_q99", episodes: EpisodeIndices | None = None, relative_chunk: int | None = None
    ) -> dict[str, NormStats]:
        """As `pooled_stats`, over episodes, which should be the training ones only.

        Binary grippers of "action" are not normalised; `ActionSpec.normalize` maps them to {0, 1}.
        """
        return pooled_stats([(self, self.validate_episodes(episodes))], kind, relative_chunk)

    def validate_episodes(self, episodes: EpisodeIndices | None) -> np.ndarray:
        """Sorted episode indices, all for None; `EpisodeError` if one does not exist."""
        chosen = np.arange(self.n_episodes) if episodes is None else episode_indices(episodes)
        if not len(chosen) or chosen[0] < 0 or chosen[-1] >= self.n_episodes:
            raise EpisodeError(f"{self.root}: expected episodes from 0 to {self.n_episodes - 1}, got {list(chosen[:5])} ...")
        return chosen

    # --- images -----------------------------------------------------------------------------------------------------------

    def _camera(self, key: str) -> Camera:
        if key not in self._cameras:
            self._cameras[key] = Camera(self, key)
        return self._cameras[key]

    def image_sizes(self, cameras: Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
        """Camera -> height and width of its images [px]."""
        return {camera: self._camera(self.camera_key(camera)).size for camera in cameras or self.cameras}

    def frames_cache(self, cameras: Sequence[str] | None = None, size: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
        """All frames of the cameras: ``{name: (n_frames, h, w, 3)}`` uint8, read-only memory maps.

        They are decoded once and cached in the artifacts folder (`rvlm.data.frame_cache`).

        Args:
            cameras: Names; the card's if left out.
            size: Height and width to resize all of them to [px]; their own if left out.
        """
        return {camera: self._camera(self.camera_key(camera)).frames(size) for camera in cameras or self.cameras}


def _warn_of_no_instruction(root: Path, episodes: pd.DataFrame) -> None:
    n_without = sum("" in names for names in episodes["tasks"])
    if n_without:
        warnings.warn(
            f"{root}: {n_without} of {len(episodes)} episodes have no instruction and are read with ''; to write instructions, "
            "or to leave these episodes out: lerobot-edit-dataset --operation.type modify_tasks, or delete_episodes",
            stacklevel=3,
        )


def _spec_of(spec: Any) -> ActionSpec | None:
    if isinstance(spec, (str, Path)):
        return ActionSpec.from_card(spec)
    if spec is not None and not isinstance(spec, ActionSpec):
        raise EpisodeError(
            f"expected the robot's conventions as an ActionSpec or the name of a card, got {type(spec).__name__}; "
            "ActionSpec.from_card(...) or ActionSpec.from_dict(...) gives one"
        )
    return spec


def _refuse_contradiction(root: Path, info: dict[str, Any], given: ActionSpec) -> None:
    """A given card may change cameras and rate, but not the meaning of the stored numbers."""
    try:
        stored = stored_spec(root, info)
    except EpisodeError:  # a broken spec is ignored
        return
    if stored is not None:
        try:
            stored.require_same(replace(given, cameras=stored.cameras, rate_hz=stored.rate_hz), "stored card vs given card")
        except SpecMismatch as error:
            raise EpisodeError(f"{root}: {error}; or fix rvlm.spec in meta/info.json where that is wrong") from error


def _within(rows: np.ndarray, first: int, end: int) -> np.ndarray | None:
    """Positions of the rows from `first` to `end`, in order; None unless all are present."""
    at = np.flatnonzero((rows >= first) & (rows < end))
    return at[np.argsort(rows[at])] if len(at) == end - first else None
