"""Read a LeRobotDataset (v3.0, or v2.1) from its folder: parquet tables, mp4 videos, and what they mean.

Nothing that a dataset says of itself is believed unchecked: `rvlm.data.meta` checks its meta files, `rvlm.data.row_checks` its
rows against them, `rvlm.data.frame_placement` its videos against its rows. What disagrees is an
`EpisodeError` that names the file.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rvlm.data.actions import ActionSpec, NormStats, SpecMismatch, StatsAccumulator
from rvlm.data.camera_names import camera_names, find_camera, is_image
from rvlm.data.cameras import Camera
from rvlm.data.meta import check_card, file_path, read_episodes, read_info, read_tasks, stored_spec
from rvlm.data.row_checks import check_complete, rows_of_file
from rvlm.data.tables import column_of, episode_numbers, read_json, read_rows, read_table
from rvlm.data.video import EpisodeError

FAR = 100  # normalised units, beyond which somebody is told
Index = int | np.integer | Any  # of these two, whatever comes is looked at, so that the refusal is in words
Episodes = Iterable[int] | np.ndarray | Any


class EpisodeDataset:
    """A folder of demonstrations in LeRobot's format, as it was when it was opened.

    Args:
        root: folder of the dataset, the one that holds ``meta/info.json``.
        spec: the robot's conventions, or the name or path of their card; left out, they are taken from info.json, where
            `EpisodeWriter` stores them.

    Attributes:
        info: info.json as it is.
        spec: the robot's conventions, or None for a foreign dataset that was opened without a card.
        tasks: instructions, in the order of ``task_index``.
        episodes: one row per episode: length, tasks, first and last row, files, and the recorder's extra columns.
        cameras: names in the order of the card; feature keys by name stand in ``camera_keys``. Depth maps are no cameras.

    Raises:
        EpisodeError: the folder holds no such dataset, or its meta files are broken, contradict each other or the card.

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
        """What the dataset promises not to hold (`rvlm.evaluation.protocols`); empty where nothing was promised."""
        path = self.root / "meta/held_out.json"
        return read_json(path) if path.is_file() else {}

    def instruction(self, i: Index) -> str:
        """What the robot was asked to do in episode i; at its first frame, where it was asked to do several things."""
        row = self._row(i)
        return row["tasks"][0] if len(row["tasks"]) == 1 else self.tasks[self.task_of_frame[row["dataset_from_index"]]]

    def camera_key(self, camera: str) -> str:
        """Feature of a camera; an unknown or doubtful one is an error that names those that exist."""
        return find_camera(self.root, self.features, camera)

    def require_spec(self) -> ActionSpec:
        """The spec, or an error that says how to give one."""
        if self.spec is None:
            raise EpisodeError(
                f"{self.root} does not say what its actions mean; open it with EpisodeDataset(root, ActionSpec.from_card(...))"
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
        """Each row of a data file as a row of the dataset, looked up once."""
        if path not in self._rows:
            self._rows[path] = rows_of_file(path, self.episodes, self._task_names)
        return self._rows[path]

    def data_files(self) -> dict[Path, np.ndarray]:
        """Rows of every data file, which together are those of the dataset."""
        paths = dict.fromkeys(file_path(self.root, self.info, row) for row in self.episodes.to_dict("records"))
        files = {path: self._rows_of(path) for path in paths}
        check_complete(files, self.episodes)
        return files

    def column(self, name: str) -> np.ndarray:
        """A whole column over all episodes, ``(n_frames, d)``, or ``(n_frames,)`` if it is scalar; read-only, and read once.

        Rows stand in the order of episodes and frames, whatever order the files have. No video is decoded.
        """
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
        return values if self.features[name]["shape"] != [1] else values[:, 0]

    @property
    def episode_of_frame(self) -> np.ndarray:
        """Episode index of every frame ``(n_frames,)``."""
        return np.repeat(np.arange(self.n_episodes), self.episodes["length"])

    @property
    def task_of_frame(self) -> np.ndarray:
        """For every frame its place in ``tasks`` ``(n_frames,)``."""
        return np.searchsorted(list(self._task_names), self.column("task_index").astype(np.int64))

    def episode(self, i: Index) -> dict[str, Any]:
        """One episode: every column ``(n, ...)``, decoded images ``(n, h, w, 3)`` uint8 by feature key, "instruction".

        Columns of language and other structures come as lists of Python values. Depth maps are left out.
        """
        path, at = self.place_of(i)
        shown = {k: f for k, f in self.features.items() if not is_image(f)}
        table = read_rows(path, at, list(shown))
        out: dict[str, Any] = {"instruction": self.instruction(i)}
        for key in self.features:
            if key in self.camera_keys.values():
                out[key] = self._camera(key).episode(int(i))
            elif key in shown:
                out[key] = self._cells(table, key, path)
        return out

    def _cells(self, table: Any, key: str, path: Path) -> Any:
        feature = self.features[key]
        if feature["dtype"] == "language":
            return table[key].to_pylist()
        values = column_of(table, key, path, feature)
        return values[:, 0] if feature["shape"] == [1] else values

    def place_of(self, i: Index) -> tuple[Path, np.ndarray]:
        """Data file of an episode, and its rows there in the order of frames ``(n,)``; the table may name the file before."""
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

    def stats(self, kind: str = "q01_q99", episodes: Episodes | None = None) -> dict[str, NormStats]:
        """Statistics of "action" and "observation.state" over the given episodes: give the training ones only.

        The gripper of "action" is passed through; `ActionSpec.normalize` maps it to {0, 1}.
        """
        return pooled_stats([(self, self.validate_episodes(episodes))], kind)

    def validate_episodes(self, episodes: Episodes | None) -> np.ndarray:
        """Episode indices, sorted; all of them for None; those that don't exist are refused."""
        chosen = np.arange(self.n_episodes) if episodes is None else episode_numbers(episodes)
        if not len(chosen) or chosen[0] < 0 or chosen[-1] >= self.n_episodes:
            raise EpisodeError(f"{self.root}: expected episodes from 0 to {self.n_episodes - 1}, got {list(chosen[:5])} ...")
        return chosen

    # --- images -----------------------------------------------------------------------------------------------------------

    def _camera(self, key: str) -> Camera:
        if key not in self._cameras:
            self._cameras[key] = Camera(self, key)
        return self._cameras[key]

    def frames_cache(self, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """All frames of the cameras, decoded once: ``{name: (n_frames, h, w, 3)}`` uint8, read-only maps of files on disk.

        They stand in the artifacts folder, one array a camera, named by what they are made from (`rvlm.data.frame_cache`).
        """
        return {camera: self._camera(self.camera_key(camera)).frames() for camera in cameras or self.cameras}


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
    """Another card may choose cameras and mend the rate, but not say that the same numbers mean something else."""
    try:
        stored = stored_spec(root, info)
    except EpisodeError:  # one that is broken says nothing
        return
    if stored is not None:
        try:
            stored.require_same(replace(given, cameras=stored.cameras, rate_hz=stored.rate_hz), "stored card vs given card")
        except SpecMismatch as error:
            raise EpisodeError(f"{root}: {error}; or mend rvlm.spec in meta/info.json where that is wrong") from error


def _within(rows: np.ndarray, first: int, end: int) -> np.ndarray | None:
    """Where the rows from `first` to `end` stand, in order; None unless all of them do."""
    at = np.flatnonzero((rows >= first) & (rows < end))
    return at[np.argsort(rows[at])] if len(at) == end - first else None


def pooled_stats(parts: Sequence[tuple[EpisodeDataset, np.ndarray]], kind: str = "q01_q99") -> dict[str, NormStats]:
    """Statistics of "action" and "observation.state" over episodes of one robot that stand in several folders.

    Warns where a value lies further than 100 units from the rest once it is normalised.
    """
    spec = parts[0][0].require_spec()
    for data, _ in parts[1:]:
        spec.require_same(data.require_spec(), f"{parts[0][0].root} vs {data.root}")
    sides = {"action": (spec.names, spec.still), "observation.state": (spec.state_names, spec.state_still)}
    out = {}
    for key, (names, still) in ((k, v) for k, v in sides.items() if k in parts[0][0].features):
        accumulator = StatsAccumulator()
        for data, episodes in parts:
            try:
                accumulator.update(data.column(key)[np.isin(data.episode_of_frame, episodes)])
            except SpecMismatch as error:
                raise EpisodeError(f"{data.root}, {key}: {error}") from error
        out[key] = accumulator.finish(kind, (spec.gripper_index,) if key == "action" else (), still)
        _warn_of_outliers(f"{parts[0][0].root}, {key}", out[key], names)
    return out


def _warn_of_outliers(what: str, stats: NormStats, names: Sequence[str]) -> None:
    furthest = np.abs([stats.normalize(stats.min), stats.normalize(stats.max)]).max(0)
    for i in np.flatnonzero(furthest > FAR).tolist() if stats.kind != "identity" else ():
        told = f"{what}: {names[i]!r} reaches {furthest[i]:.0f} in normalised units, as it hardly ever moves "
        spread = f"(q01 {stats.q01[i]:.3g}, q99 {stats.q99[i]:.3g}, but {stats.min[i]:.3g} to {stats.max[i]:.3g}); "
        warnings.warn(f"{told}{spread}are these outliers? repair the rows, or leave the dimension out", stacklevel=3)
