"""Consistency of a dataset's rows with its meta tables.

Each row has ``episode_index``, ``frame_index``, ``index`` and ``task_index``, by which rows are sorted, whatever their order in
the files; a contradiction to the episodes table is an error.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from rvlm.data.errors import EpisodeError
from rvlm.data.tables import read_table, whole_numbers

COLUMNS = ["episode_index", "frame_index", "index", "task_index"]
FIX = "was an episode deleted, or were recordings merged without numbering them again? convert the dataset again"


def rows_of_file(path: Path, episodes: pd.DataFrame, tasks: dict[int, str]) -> np.ndarray:
    """Dataset row of each row of a data file ``(n,)``, with episodes and frames in order.

    Raises:
        EpisodeError: a row belongs to no episode, or contradicts the tables; names file and row.
    """
    table = read_table(path, COLUMNS)
    episode, frame, index, task = (whole_numbers(table, name, path) for name in COLUMNS)
    _refuse(path, (episode < 0) | (episode >= len(episodes)), "episode_index", episode, f"0 to {len(episodes) - 1}")
    length = episodes["length"].to_numpy()[episode]
    _refuse(path, (frame < 0) | (frame >= length), "frame_index", frame, "a frame within its episode's length", length)
    row = episodes["dataset_from_index"].to_numpy()[episode] + frame
    _refuse(path, index != row, "index", index, "the number of the row in the dataset", row)
    _refuse(path, ~np.isin(task, list(tasks)), "task_index", task, f"one of the tasks {list(tasks)[:20]}")
    _check_tasks(path, table, episode, task, episodes, tasks)
    _, first = np.unique(row, return_index=True)
    repeated = np.setdiff1d(np.arange(len(row)), first)
    _refuse(path, np.isin(np.arange(len(row)), repeated), "index", index, "each row once")
    return row


def _refuse(
    path: Path, is_wrong: np.ndarray, name: str, values: np.ndarray, expected: str, right: np.ndarray | None = None
) -> None:
    if is_wrong.any():
        row = int(np.argmax(is_wrong))
        precise = "" if right is None else f" ({right[row]})"
        raise EpisodeError(
            f"{path}, row {row}: expected {name} to be {expected}{precise}, as meta/episodes says, got {values[row]} "
            f"({is_wrong.sum()} of {len(values)} rows); {FIX}"
        )


def _check_tasks(
    path: Path, table: pa.Table, episode: np.ndarray, task: np.ndarray, episodes: pd.DataFrame, tasks: dict[int, str]
) -> None:
    """A row's task must be among its episode's tasks."""
    pairs, first = np.unique(np.stack([episode, task]), axis=1, return_index=True)
    for (e, t), row in zip(pairs.T.tolist(), first.tolist(), strict=True):
        named = list(episodes["tasks"].iloc[e])
        if tasks[t] not in named:
            raise EpisodeError(
                f"{path}, row {row}: task_index {t} is {tasks[t]!r}, while the episodes table says {named} of episode {e}; {FIX}"
            )


def check_complete(files: dict[Path, np.ndarray], episodes: pd.DataFrame) -> None:
    """Raise `EpisodeError` unless the files hold every row of the dataset exactly once."""
    paths, rows = list(files), np.concatenate(list(files.values()))
    count = np.bincount(rows, minlength=int(episodes["length"].to_numpy().sum()))
    if (count == 1).all():
        return
    row = int(np.argmax(count != 1))
    episode = int(np.searchsorted(episodes["dataset_to_index"].to_numpy(), row, "right"))
    have, frame = [path.name for path in paths if row in files[path]], row - episodes["dataset_from_index"].iloc[episode]
    raise EpisodeError(
        f"expected each row of episode {episode} (length {episodes['length'].iloc[episode]}) once in {paths[0].parents[1]}, got "
        f"row {frame} of it {count[row]} times ({have or [p.name for p in paths][:5]}); {FIX}"
    )
