"""Read a LeRobotDataset (v3.0, or v2.1) from its folder: parquet tables, mp4 videos, and what they mean."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rvlm.actions import ActionSpec, NormStats, SpecMismatch, StatsAccumulator, stack_column
from rvlm.files import artifacts_dir
from rvlm.video import EpisodeError, iterate_frames, read_frames

READABLE = ("v3.0", "v2.1")
Index = int | np.integer
Episodes = Iterable[int] | np.ndarray


class EpisodeDataset:
    """A folder of demonstrations in LeRobot's format.

    Args:
        root: folder of the dataset, the one that holds ``meta/info.json``.
        spec: the robot's conventions; left out, they are taken from info.json, where `EpisodeWriter` stores them.

    Attributes:
        info: info.json as it is.
        spec: the robot's conventions, or None for a foreign dataset that was opened without a card.
        tasks: instructions; ``tasks[i]`` belongs to ``task_index`` i.
        episodes: one row per episode: length, tasks, first and last row, files, and the recorder's extra columns.
        cameras: names in the order of the card; feature keys by name stand in ``camera_keys``.
    """

    def __init__(self, root: str | Path, spec: ActionSpec | None = None) -> None:
        self.root = Path(root)
        self.info = self._read_info()
        self.features: dict[str, Any] = self.info["features"]
        stored = self.info.get("rvlm", {}).get("spec")
        self.spec = spec or (ActionSpec.from_dict(stored) if stored else None)
        read = self._read_v3 if self.info["codebase_version"] == "v3.0" else self._read_v21
        self.tasks, self.episodes = read()
        self.camera_keys = {k.rsplit(".", 1)[-1]: k for k, f in self.features.items() if f["dtype"] in ("video", "image")}
        self.cameras = tuple(self.spec.cameras if self.spec else self.camera_keys)
        self._check()

    # --- meta -------------------------------------------------------------------------------------------------------------

    def _read_info(self) -> dict[str, Any]:
        path = self.root / "meta/info.json"
        if not path.is_file():
            partial = self.root.with_name(self.root.name + ".partial")
            unfinished = f"{partial} is an unfinished recording: run it again to finish it"
            hint = unfinished if partial.is_dir() else "is this the right folder?"
            raise EpisodeError(f"expected a LeRobot dataset with meta/info.json in {self.root}, got none; {hint}")
        info = json.loads(path.read_text())
        version = info.get("codebase_version")
        if version not in READABLE:
            raise EpisodeError(
                f"{self.root}: expected format {' or '.join(READABLE)}, got {version!r}; convert it with LeRobot: "
                "python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=..."
            )
        return info

    def _read_v3(self) -> tuple[list[str], pd.DataFrame]:
        tasks = self._table(self.root / "meta/tasks.parquet").to_pandas()
        names = tasks.get("task", tasks.index)
        files = sorted((self.root / "meta/episodes").glob("*/*.parquet"))
        if not files:
            raise EpisodeError(f"{self.root}: expected parquet files in meta/episodes, got none; fetch the dataset again")
        tables = [self._table(f) for f in files]
        kept = [c for c in tables[0].column_names if not c.startswith(("stats/", "meta/"))]
        episodes = pd.concat([t.select(kept).to_pandas() for t in tables], ignore_index=True)
        return [str(n) for n in names], episodes.sort_values("episode_index", ignore_index=True)

    def _read_v21(self) -> tuple[list[str], pd.DataFrame]:
        tasks = pd.DataFrame(self._json_lines("meta/tasks.jsonl")).sort_values("task_index")
        episodes = pd.DataFrame(self._json_lines("meta/episodes.jsonl")).sort_values("episode_index", ignore_index=True)
        episodes["dataset_to_index"] = episodes["length"].cumsum()
        episodes["dataset_from_index"] = episodes["dataset_to_index"] - episodes["length"]
        return tasks["task"].tolist(), episodes

    def _json_lines(self, name: str) -> list[dict[str, Any]]:
        path = self.root / name
        if not path.is_file():
            have = sorted(p.name for p in (self.root / "meta").iterdir())
            raise EpisodeError(f"{self.root}: format v2.1 expects {name}; meta holds {have}; fetch the dataset again")
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def _check(self) -> None:
        if len(self.episodes) != self.info["total_episodes"] or self.episodes["length"].sum() != self.info["total_frames"]:
            raise EpisodeError(
                f"{self.root}: info.json promises {self.info['total_episodes']} episodes of {self.info['total_frames']} frames, "
                f"the episodes table has {len(self.episodes)} of {self.episodes['length'].sum()}; fetch or record it again"
            )
        if self.spec is None:
            return
        for key, names in (("action", self.spec.names), ("observation.state", self.spec.state_names)):
            feature = self.features.get(key, {"shape": [0], "names": None})
            if feature["shape"][0] != len(names):
                raise EpisodeError(
                    f"{self.root}: card {self.spec.dataset!r} expects {len(names)} dimensions of {key} {list(names)}, got "
                    f"{feature['shape'][0]} ({feature['names']}); use the card of this robot; features: {sorted(self.features)}"
                )
        for camera in self.spec.cameras:
            self.camera_key(camera)

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
        """What the dataset promises not to hold (`rvlm.protocols.leaks`); empty where nothing was promised."""
        path = self.root / "meta/held_out.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def instruction(self, i: Index) -> str:
        """What the robot was asked to do in episode i."""
        return str(self._row(i)["tasks"][0])

    def camera_key(self, camera: str) -> str:
        """Feature of a camera; an unknown one is an error that names those that exist."""
        if camera not in self.camera_keys:
            have = ", ".join(self.camera_keys) or "none"
            raise EpisodeError(f"{self.root}: unknown camera {camera!r}; cameras that exist: {have}; name one of these")
        return self.camera_keys[camera]

    def require_spec(self) -> ActionSpec:
        """The spec, or an error that says how to give one."""
        if self.spec is None:
            raise EpisodeError(
                f"{self.root} does not say what its actions mean; open it with EpisodeDataset(root, ActionSpec.from_card(...))"
            )
        return self.spec

    # --- tables -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def _table(path: Path, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
        try:
            return pq.read_table(path, columns=columns, filters=filters)
        except (pa.ArrowException, OSError) as error:
            raise EpisodeError(
                f"expected a whole parquet file at {path}, got: {error}; fetch the file again, or record it again"
            ) from error

    def _row(self, i: Index) -> dict[str, Any]:
        if not 0 <= i < self.n_episodes:
            raise EpisodeError(f"{self.root}: expected an episode from 0 to {self.n_episodes - 1}, got {i}")
        return self.episodes.iloc[i].to_dict()

    def _path(self, template: str, row: dict[str, Any], prefix: str, key: str = "") -> Path:
        """A file of an episode; v3.0 templates name chunk and file, v2.1 templates the episode."""
        episode = int(row["episode_index"])
        index = {"chunk_index": row.get(f"{prefix}/chunk_index"), "file_index": row.get(f"{prefix}/file_index")}
        old = {"episode_chunk": episode // self.info["chunks_size"], "episode_index": episode}
        return self.root / template.format(video_key=key, **index, **old)

    def _data_path(self, row: dict[str, Any]) -> Path:
        return self._path(self.info["data_path"], row, "data")

    def column(self, name: str) -> np.ndarray:
        """A whole column over all episodes, ``(n_frames, d)``, or ``(n_frames,)`` if it is scalar; no video is decoded."""
        if name not in self.features or self.features[name]["dtype"] in ("video", "image"):
            plain = sorted(k for k, f in self.features.items() if f["dtype"] not in ("video", "image"))
            raise EpisodeError(f"{self.root}: no column {name!r}; columns that exist: {', '.join(plain)}")
        paths = dict.fromkeys(self._data_path(row) for row in self.episodes.to_dict("records"))
        values = np.concatenate([stack_column(self._table(p, [name])[name]) for p in paths])
        if len(values) != self.n_frames:
            raise EpisodeError(f"{self.root}: expected {self.n_frames} rows of {name!r}, got {len(values)}; fetch it again")
        return values if self.features[name]["shape"] != [1] else values[:, 0]

    @property
    def episode_of_frame(self) -> np.ndarray:
        """Episode index of every frame ``(n_frames,)``."""
        return np.repeat(np.arange(self.n_episodes), self.episodes["length"])

    def episode(self, i: Index) -> dict[str, Any]:
        """One episode: every column ``(n, ...)``, decoded images ``(n, h, w, 3)`` uint8 by feature key, "instruction"."""
        row = self._row(i)
        table = self._table(self._data_path(row), filters=[("episode_index", "=", i)])
        if table.num_rows != row["length"]:
            raise EpisodeError(f"{self.root}: expected {row['length']} rows of episode {i}, got {table.num_rows}; fetch it again")
        out: dict[str, Any] = {"instruction": self.instruction(i)}
        for key, feature in self.features.items():
            if feature["dtype"] == "video":
                path, start = self._video(row, key)
                out[key] = read_frames(path, start, row["length"], self.fps)
            elif feature["dtype"] == "image":
                out[key] = np.stack([_decode_image(cell) for cell in table[key].to_pylist()])
            else:
                values = stack_column(table[key])
                out[key] = values[:, 0] if feature["shape"] == [1] else values
        return out

    def stats(self, kind: str = "q01_q99", episodes: Episodes | None = None) -> dict[str, NormStats]:
        """Statistics of "action" and "observation.state" over the given episodes: give the training ones only.

        The gripper of "action" is passed through; `ActionSpec.normalize` maps it to {0, 1}.
        """
        wanted = np.isin(self.episode_of_frame, self.checked_episodes(episodes))
        out = {}
        for key in (k for k in ("action", "observation.state") if k in self.features):
            passthrough = (self.require_spec().gripper_index,) if key == "action" else ()
            try:
                out[key] = StatsAccumulator().update(self.column(key)[wanted]).finish(kind, passthrough)
            except SpecMismatch as error:
                raise EpisodeError(f"{self.root}, {key}: {error}") from error
        return out

    def checked_episodes(self, episodes: Episodes | None) -> np.ndarray:
        """Episode indices, sorted; all of them for None; those that don't exist are refused."""
        chosen = np.arange(self.n_episodes) if episodes is None else np.asarray(sorted(set(map(int, episodes))), np.int64)
        if not len(chosen) or chosen[0] < 0 or chosen[-1] >= self.n_episodes:
            raise EpisodeError(f"{self.root}: expected episodes from 0 to {self.n_episodes - 1}, got {list(chosen[:5])} ...")
        return chosen

    # --- videos -----------------------------------------------------------------------------------------------------------

    def _video(self, row: dict[str, Any], key: str) -> tuple[Path, int]:
        """File that holds a camera's frames of an episode, and the first frame's number in it."""
        start = round(row.get(f"videos/{key}/from_timestamp", 0.0) * self.fps)
        return self._path(self.info["video_path"], row, f"videos/{key}", key), start

    def _sources(self, key: str) -> dict[Path, np.ndarray]:
        """For every file of a camera: the dataset's row of each frame in it, -1 where a frame belongs to none."""
        parts: dict[Path, list[tuple[int, dict[str, Any]]]] = {}
        for row in self.episodes.to_dict("records"):
            path, start = (self._data_path(row), 0) if self._is_embedded(key) else self._video(row, key)
            parts.setdefault(path, []).append((start, row))
        return {path: _rows_of_frames(spans, self._is_embedded(key)) for path, spans in parts.items()}

    def _is_embedded(self, key: str) -> bool:
        return self.features[key]["dtype"] == "image"

    def _images(self, path: Path, key: str) -> Iterator[tuple[int, np.ndarray]]:
        if not self._is_embedded(key):
            return iterate_frames(path, 0, self.fps)
        cells = self._table(path, [key])[key]
        return ((i, _decode_image(cell.as_py())) for i, cell in enumerate(cells))

    def frames_cache(self, cameras: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """All frames of the cameras, decoded once: ``{name: (n_frames, h, w, 3)}`` uint8, read-only maps of files on disk.

        They stand in the artifacts folder, under a name made from the videos' content.
        """
        cameras = tuple(cameras or self.cameras)
        folder = artifacts_dir() / "frames" / self._content_hash(cameras)
        if not folder.is_dir():
            temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for camera in cameras:
                self._decode_camera(camera, temporary / f"{camera}.npy")
            try:
                temporary.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(temporary, ignore_errors=True)
        return {camera: np.load(folder / f"{camera}.npy", mmap_mode="r") for camera in cameras}

    def _content_hash(self, cameras: tuple[str, ...]) -> str:
        digest = hashlib.blake2b(json.dumps([cameras, self.n_frames]).encode(), digest_size=12)
        for camera in cameras:
            for path in self._sources(self.camera_key(camera)):
                if not path.is_file():
                    raise EpisodeError(f"{self.root}: expected a video at {path}, got none; fetch or record it again")
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def _decode_camera(self, camera: str, target: Path) -> None:
        key = self.camera_key(camera)
        height, width = _image_size(self.features[key]["shape"])
        out = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=(self.n_frames, height, width, 3))

        def decode(item: tuple[Path, np.ndarray]) -> None:
            path, rows = item
            n = 0
            for n, (index, image) in enumerate(self._images(path, key), start=1):  # noqa: B007
                if index < len(rows) and rows[index] >= 0:
                    out[rows[index]] = image
            if n != len(rows):
                raise EpisodeError(f"expected {len(rows)} frames in {path}, got {n}; fetch the file again, or record it again")

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(decode, self._sources(key).items()))
        out.flush()


def _rows_of_frames(spans: list[tuple[int, dict[str, Any]]], embedded: bool) -> np.ndarray:
    if embedded:  # the file's rows are its episodes' rows, one after the other
        return np.concatenate([np.arange(r["dataset_from_index"], r["dataset_to_index"]) for _, r in spans])
    rows = np.full(max(start + row["length"] for start, row in spans), -1)
    for start, row in spans:
        rows[start : start + row["length"]] = np.arange(row["dataset_from_index"], row["dataset_to_index"])
    return rows


def _image_size(shape: list[int]) -> tuple[int, int]:
    """Height and width of a feature's shape, channels first or last."""
    return (shape[1], shape[2]) if shape[0] == 3 and shape[2] != 3 else (shape[0], shape[1])


def _decode_image(cell: dict[str, Any]) -> np.ndarray:
    """An image embedded in parquet as ``{bytes, path}`` -> ``(h, w, 3)`` uint8."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
