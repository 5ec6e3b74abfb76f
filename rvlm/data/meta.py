"""Meta files of LeRobot datasets, v3.0 and v2.1: info.json, tasks and episodes, all validated.

Path templates and camera names become file names; they are validated here, so that no dataset reads or writes outside its folder.
Links inside the folder may point elsewhere, as in the Hub's cache.
"""

from __future__ import annotations

import math
import re
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from rvlm.data.actions import ActionSpec
from rvlm.data.camera_names import depth_marks, find_camera, is_image
from rvlm.data.cards import CAMERA
from rvlm.data.dimensions import check_order
from rvlm.data.errors import CardError, EpisodeError
from rvlm.data.instruction_checks import instruction_error
from rvlm.data.tables import column_names, read_json, read_json_lines, read_table, whole_numbers

READABLE = ("v3.0", "v2.1")
PLACEHOLDERS = {"v3.0": {"chunk_index", "file_index", "video_key"}, "v2.1": {"episode_chunk", "episode_index", "video_key"}}
PADDED = re.compile(r"\d{0,2}d?")
CONVERT = "python -m lerobot.datasets.v{0}.convert_dataset_v{0}_to_v{1} --repo-id=... (with a LeRobot of that time)"
CONVERSION_HINTS = {
    "v2.0": f"convert it to v2.1, which is read: {CONVERT.format('20', '21')}",
    "v1": f"convert it to v2.0 first: {CONVERT.format('1', '2')}, then to v2.1",
}
NEWER = "it is newer than what is read here: write it as v3.0 with the LeRobot that made it"


# --- info.json --------------------------------------------------------------------------------------------------------------


def read_info(root: Path) -> dict[str, Any]:
    """info.json, with all used fields validated."""
    path = root / "meta/info.json"
    if not path.is_file():
        raise EpisodeError(f"expected a LeRobot dataset with meta/info.json in {root}, got none; {_hint(root)}")
    info = read_json(path)
    version = info.get("codebase_version")
    if version not in READABLE:
        fix = next(
            (hint for start, hint in CONVERSION_HINTS.items() if str(version).startswith(start)),
            NEWER if version else "fetch it again",
        )
        raise EpisodeError(f"{root}: expected format {' or '.join(READABLE)}, got {version!r}; {fix}")
    fps, counts = info.get("fps"), {name: info.get(name) for name in ("total_episodes", "total_frames")}
    if not isinstance(fps, (int, float)) or isinstance(fps, bool) or not (math.isfinite(fps) and fps > 0):
        raise EpisodeError(f"{path}: expected 'fps' as a number above 0, got {fps!r}; write the rate of the recording there")
    if version == "v2.1":
        counts["chunks_size"] = info.get("chunks_size")
    for name, value in counts.items():
        if type(value) is not int or value < (name != "total_frames"):
            raise EpisodeError(f"{path}: expected {name!r} as a whole number above 0, got {value!r}; fetch or record it again")
    _check_features(path, info.get("features"))
    _check_template(path, info, "data_path")
    videos = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    if videos and "video_key" not in _check_template(path, info, "video_path") and len(videos) > 1:
        raise EpisodeError(
            f"{path}: expected 'video_path' with {{video_key}}, as each of {videos} has videos of its own, got "
            f"{info['video_path']!r}; fix info.json"
        )
    return info


def _hint(root: Path) -> str:
    partial = root.with_name(root.name + ".partial")
    if partial.is_dir():
        return f"{partial} is an unfinished recording: run it again to finish it"
    if not root.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(root)):
        return f"this looks like a name on the Hub: hf download {root} --repo-type dataset --local-dir FOLDER, and give FOLDER"
    return "is this the right folder?" if root.exists() else "there is no such folder; is the path right?"


def _check_features(path: Path, features: Any) -> None:
    if not isinstance(features, dict) or not features:
        raise EpisodeError(f"{path}: expected 'features' as an object of names, got {features!r}; fetch or record it again")
    for key, feature in features.items():
        shape = feature.get("shape") if isinstance(feature, dict) else None
        is_valid = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
        if not is_valid or not isinstance(feature.get("dtype"), str):
            raise EpisodeError(
                f"{path}: expected feature {key!r} with a 'dtype' in words and a 'shape' of whole numbers, got {feature!r}"
            )
        if any(mark not in (True, False, None) for mark in depth_marks(feature)):
            raise EpisodeError(
                f"{path}: expected 'is_depth_map' of {key!r} as true or false, got {depth_marks(feature)}; fix info.json"
            )
        if is_image(feature) and (not CAMERA.fullmatch(key) or ".." in key):
            raise EpisodeError(
                f"{path}: {key!r} can't be the name of a camera's feature: expected letters, digits, '_', '-' and '.', as it "
                "becomes part of file names; rename it"
            )


def _check_template(path: Path, info: dict[str, Any], name: str) -> set[str]:
    """The placeholders of a path template, which must be a path below the dataset's folder."""
    template, known = info.get(name), PLACEHOLDERS[info["codebase_version"]]
    if not isinstance(template, str):
        raise EpisodeError(f"{path}: expected {name!r} as a path with placeholders, got {template!r}; fix info.json")
    try:
        fields = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise EpisodeError(f"{path}: expected {name!r} as a path with placeholders, got {template!r} ({error})") from error
    wrong = [
        f"{{{field}:{spec}}}"
        for field, spec, how in fields
        if field not in known or how or not PADDED.fullmatch(spec or "") or (spec and field == "video_key")
    ]
    if wrong:
        raise EpisodeError(f"{path}: {name!r} is {template!r} with the placeholders {wrong}; those that exist: {sorted(known)}")
    relative = PurePosixPath(template)
    if not template or relative.is_absolute() or ".." in relative.parts or not template.isprintable():
        raise EpisodeError(f"{path}: expected {name!r} as a path below the dataset's folder, got {template!r}; fix info.json")
    return {field for field, _, _ in fields if field is not None}


def file_path(root: Path, info: dict[str, Any], episode: dict[str, Any], key: str | None = None) -> Path:
    """The data file of an episode or, given a camera's key, its video file."""
    prefix, name = ("data", "data_path") if key is None else (f"videos/{key}", "video_path")
    number = int(episode["episode_index"])
    if info["codebase_version"] == "v2.1":
        indices = {"episode_chunk": number // info["chunks_size"], "episode_index": number}
    else:
        indices = {part: int(episode[f"{prefix}/{part}"]) for part in ("chunk_index", "file_index")}
    return root / info[name].format(**indices, video_key=key)


def stored_spec(root: Path, info: dict[str, Any]) -> ActionSpec | None:
    """The action spec that `EpisodeWriter` stored in info.json, or None."""
    block = info.get("rvlm") or {}
    values = block.get("spec") if isinstance(block, dict) else block
    if not values:
        return None
    try:
        return ActionSpec.from_dict(values)
    except CardError as error:
        raise EpisodeError(f"{root}/meta/info.json, rvlm.spec: {error}") from error


# --- tables -----------------------------------------------------------------------------------------------------------------


def read_tasks(root: Path, info: dict[str, Any]) -> dict[int, str]:
    """``task_index`` -> instruction, '' for none, sorted by index."""
    if info["codebase_version"] == "v2.1":
        path = root / "meta/tasks.jsonl"
        named: list[tuple[Any, Any]] = [(line.get("task_index"), line.get("task")) for line in read_json_lines(path)]
    else:
        path = root / "meta/tasks.parquet"
        table = read_table(path, [*dict.fromkeys([*column_names(path), "task_index"])])
        named = list(zip(whole_numbers(table, "task_index", path).tolist(), _task_column(path, table), strict=True))
    for number, name in named:
        if type(number) is not int or not isinstance(name, str):
            raise EpisodeError(f"{path}: expected a number and words as task_index and task, got {number!r}, {name!r}")
        if name and (error := instruction_error(name)):  # '' stands for none
            raise EpisodeError(
                f"{path}: expected an instruction in words for task {number}, got {error}; write one, or '' for none, there and "
                "in the tasks of meta/episodes"
            )
    tasks = dict(sorted(named))
    if len(tasks) != len(named) or not tasks:
        raise EpisodeError(f"{path}: expected tasks with a task_index of their own, got {sorted(named)[:20]}; number them again")
    return tasks


def _task_column(path: Path, table: pa.Table) -> list[Any]:
    """The column of instructions: "task", or the only text column, which may be a pandas index."""
    texts = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    found = ["task"] if "task" in table.column_names else texts
    if len(found) != 1:
        have = table.column_names
        raise EpisodeError(f"{path}: expected a number and words as task_index and task, got the columns {have}; name it 'task'")
    return table[found[0]].to_pylist()


def read_episodes(root: Path, info: dict[str, Any]) -> pd.DataFrame:
    """One row per episode, in order; first and last row of each are computed from the lengths, as files may be wrong."""
    is_v3 = info["codebase_version"] == "v3.0"
    episodes = _episodes_v3(root, info) if is_v3 else _episodes_v21(root)
    episodes = episodes.sort_values("episode_index", ignore_index=True, kind="stable")
    where, numbers = root / "meta/episodes", episodes["episode_index"].tolist()
    if numbers != list(range(len(numbers))):
        wrong = next(i for i, number in enumerate(numbers) if number != i)
        raise EpisodeError(
            f"{where}: expected episode_index 0 to {len(numbers) - 1}, each once, got {numbers[wrong]} for episode {wrong}; "
            "was an episode deleted or recordings merged? number episodes, rows and files again with LeRobot's dataset tools"
        )
    for i, length in enumerate(episodes["length"]):
        if length < 1:
            raise EpisodeError(
                f"{where}: episode {i} has length {length}; expected at least one frame: remove it and number again"
            )
    for i, names in enumerate(episodes["tasks"]):
        if not len(names) or not all(isinstance(name, str) for name in names):
            raise EpisodeError(f"{where}: expected the tasks of episode {i} in words, got {names!r}; convert the dataset again")
    if len(episodes) != info["total_episodes"] or episodes["length"].sum() != info["total_frames"]:
        raise EpisodeError(
            f"{root}: info.json promises {info['total_episodes']} episodes of {info['total_frames']} frames, the episodes table "
            f"has {len(episodes)} of {episodes['length'].sum()}; fetch or record it again"
        )
    episodes["dataset_to_index"] = episodes["length"].cumsum()
    episodes["dataset_from_index"] = episodes["dataset_to_index"] - episodes["length"]
    return episodes


def _episodes_v3(root: Path, info: dict[str, Any]) -> pd.DataFrame:
    files = sorted(path for path in (root / "meta/episodes").glob("*/*.parquet") if not path.name.startswith("."))
    if not files:
        raise EpisodeError(f"{root}: expected parquet files in meta/episodes, got none; fetch the dataset again")
    videos = [f"videos/{key}/" for key, feature in info["features"].items() if feature["dtype"] == "video"]
    indices = [f"{prefix}{part}" for prefix in ("data/", *videos) for part in ("chunk_index", "file_index")]
    starts = [f"{prefix}from_timestamp" for prefix in videos]
    needed = ["episode_index", "length", *indices]
    tables = []
    for path in files:
        kept = [c for c in column_names(path) if not c.startswith(("stats/", "meta/"))]
        table = read_table(path, [*dict.fromkeys([*kept, *needed, *starts, "tasks"])])
        frame = table.to_pandas(ignore_metadata=True)  # a pandas index becomes a column
        for name in needed:
            frame[name] = whole_numbers(table, name, path)
            if name in indices and len(frame) and frame[name].min() < 0:
                raise EpisodeError(f"{path}, column {name!r}: expected numbers from 0, got {frame[name].min()}; convert it again")
        for name in starts:
            _check_times(path, name, frame[name])
        frame["tasks"] = [_as_list(names) for names in frame["tasks"]]
        tables.append(frame)
    return pd.concat(tables, ignore_index=True)


def _check_times(path: Path, name: str, values: pd.Series) -> None:
    numbers = np.asarray(pd.to_numeric(values, errors="coerce"), np.float64)
    if not (np.isfinite(numbers) & (numbers >= 0)).all():
        row = int(np.flatnonzero(~(np.isfinite(numbers) & (numbers >= 0)))[0])
        raise EpisodeError(
            f"{path}, column {name!r}: expected seconds from 0, got {values.iloc[row]} in row {row}; convert it again"
        )


def _as_list(names: Any) -> list[Any]:
    return [names] if isinstance(names, str) else list(names) if isinstance(names, (list, tuple, np.ndarray)) else [names]


def _episodes_v21(root: Path) -> pd.DataFrame:
    path = root / "meta/episodes.jsonl"
    rows = read_json_lines(path)
    for n, row in enumerate(rows, 1):
        if type(row.get("episode_index")) is not int or type(row.get("length")) is not int or "tasks" not in row:
            raise EpisodeError(f"{path}, entry {n}: expected whole numbers episode_index and length, and tasks; got {row!r}")
    if not rows:
        raise EpisodeError(f"{path}: expected one line an episode, got none; fetch the dataset again")
    return pd.DataFrame([{**row, "tasks": _as_list(row["tasks"])} for row in rows])


# --- consistency with the card ----------------------------------------------------------------------------------------------


def check_card(root: Path, info: dict[str, Any], spec: ActionSpec) -> None:
    """Raise `EpisodeError` if info.json and the robot's card disagree: rate, dimensions and their names, cameras."""
    fps, features = info["fps"], info["features"]
    if abs(fps - spec.rate_hz) > 0.01 * spec.rate_hz:
        raise EpisodeError(
            f"{root}: card {spec.dataset!r} says {spec.rate_hz:g} Hz, info.json {fps:g} frames per second (fps); fix "
            f"whichever is wrong, or give a card of this rate: dataclasses.replace(spec, rate_hz={fps:g})"
        )
    for key, names in (("action", spec.names), ("observation.state", spec.state_names)):
        feature = features.get(key, {"shape": [0], "names": None})
        shape = feature["shape"]
        if shape != [len(names)]:
            raise EpisodeError(
                f"{root}: card {spec.dataset!r} expects {len(names)} dimensions of {key} {list(names)}, got "
                f"{shape[0] if len(shape) == 1 else shape} ({feature.get('names')}); use the card of this robot; features: "
                f"{sorted(features)}"
            )
        check_order(root, key, feature.get("names"), names, spec.dataset)
    for camera in spec.cameras:
        find_camera(root, features, camera)
