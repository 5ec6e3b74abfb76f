"""Reading parquet and JSON files of a dataset; errors name the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rvlm.data.errors import EpisodeError
from rvlm.data.video import FETCH_AGAIN


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object."""
    value = _parse(path, _text(path), "")
    if not isinstance(value, dict):
        raise EpisodeError(f"{path}: expected a JSON object {{...}}, got a {type(value).__name__}; {FETCH_AGAIN}")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line; empty lines are skipped."""
    lines = [(n, line) for n, line in enumerate(_text(path).split("\n"), 1) if line.strip()]
    values = [_parse(path, line, f", line {n}") for n, line in lines]
    for (n, _), value in zip(lines, values, strict=True):
        if not isinstance(value, dict):
            raise EpisodeError(f"{path}, line {n}: expected a JSON object {{...}}, got a {type(value).__name__}; {FETCH_AGAIN}")
    return values


def _text(path: Path) -> str:
    if not path.is_file():
        have = ", ".join(sorted(p.name for p in path.parent.glob("*"))) or "nothing"
        raise EpisodeError(f"expected a file at {path}, got none; beside it: {have}; fetch the dataset again")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EpisodeError(f"expected readable UTF-8 text at {path}, got: {error}; {FETCH_AGAIN}") from error


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EpisodeError(f"expected whole JSON at {path}{where}, got: {error}; {FETCH_AGAIN}") from error


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a parquet file, or some of its columns."""
    with _parquet(path) as file:
        _require(path, file, columns)
        try:
            return file.read(columns=None if columns is None else list(columns))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _broken(path, error) from error


def column_names(path: Path) -> list[str]:
    """Names of a parquet file's columns."""
    with _parquet(path) as file:
        return list(file.schema_arrow.names)


def read_rows(path: Path, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """Read some rows of a parquet file, in the given order; only row groups that hold them are read."""
    with _parquet(path) as file:
        _require(path, file, columns)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        group = np.repeat(np.arange(len(sizes)), sizes)
        needed = np.unique(group[rows])
        try:
            table = file.read_row_groups(needed.tolist(), columns=list(columns))
            return table.take(np.searchsorted(np.flatnonzero(np.isin(group, needed)), rows))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _broken(path, error) from error


def _parquet(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        have = ", ".join(sorted(p.name for p in path.parent.glob("*.parquet"))) or "no parquet file"
        raise EpisodeError(f"expected a parquet file at {path}, got none; beside it: {have}; fetch or record it again")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _broken(path, error) from error


def _require(path: Path, file: pq.ParquetFile, columns: Sequence[str] | None) -> None:
    have = file.schema_arrow.names
    if repeated := sorted({name for name in columns or have if have.count(name) > 1}):
        raise EpisodeError(f"{path}: expected each column once, got {repeated} several times; convert the dataset again")
    missing = [name for name in columns or () if name not in have]
    if missing:
        raise EpisodeError(f"{path}: expected the columns {missing}, got {have}; fix info.json, or convert the dataset again")


def _broken(path: Path, error: Exception) -> EpisodeError:
    return EpisodeError(f"expected a whole parquet file at {path}, got: {error}; {FETCH_AGAIN}")


def stack_column(column: Any) -> np.ndarray:
    """A parquet column of scalars or (nested) lists -> array ``(n, d)`` of its dtype; strings give objects.

    Raises:
        EpisodeError: rows are null or of different lengths, or hold other values than numbers, booleans or text.
    """
    column, n = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column, len(column)
    if isinstance(column.type, pa.ExtensionType):
        column = column.storage
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        lengths = column.value_lengths() if not pa.types.is_fixed_size_list(column.type) else None
        if column.null_count:
            raise EpisodeError(f"row {_first_null(column)} is null; drop or repair it")
        if lengths is not None and len(lengths) and len(uneven := np.flatnonzero(lengths.to_numpy() != lengths[0].as_py())):
            row = int(uneven[0])
            raise EpisodeError(f"row {row} has {lengths[row]} entries, row 0 has {lengths[0]}; repair it")
        column = column.flatten()
    if column.null_count:
        raise EpisodeError(f"row {_first_null(column) * max(n, 1) // max(len(column), 1)} holds a null; drop or repair it")
    if not _is_plain(column.type):
        raise EpisodeError(f"its type is {column.type}; expected numbers, truth values or text, or lists of them")
    return column.to_numpy(zero_copy_only=False).reshape(n, -1 if n else 1)


def _first_null(column: Any) -> int:
    return int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])


def _is_plain(kind: pa.DataType) -> bool:
    of_numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return of_numbers or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def column_of(table: pa.Table, name: str, path: Path, feature: dict[str, Any] | None = None) -> np.ndarray:
    """A column as by `stack_column`, checked against its feature in info.json: width and type of values."""
    try:
        values = stack_column(table[name])
    except EpisodeError as error:
        raise EpisodeError(f"{path}, column {name!r}: {error}") from error
    if feature is None:
        return values
    width = int(np.prod(feature["shape"]))
    if len(values) and values.shape[1] != width:
        raise EpisodeError(
            f"{path}, column {name!r}: info.json promises shape {feature['shape']}, a row has {values.shape[1]} "
            "values; fix info.json, or convert the dataset again"
        )
    if values.dtype.kind == "O" and feature["dtype"] != "string":
        raise EpisodeError(
            f"{path}, column {name!r}: info.json promises {feature['dtype']}, the file holds text; convert it again"
        )
    return values


def episode_indices(episodes: Any) -> np.ndarray:
    """Episode indices as a sorted array ``(n,)`` without repetition; masks and non-integers are refused."""
    try:
        given = episodes.tolist() if isinstance(episodes, np.ndarray) else list(episodes)
        values = np.asarray(given if given else np.zeros(0, np.int64))
    except (TypeError, ValueError):
        given, values = [], np.asarray(None)
    if values.dtype.kind == "b" or any(isinstance(value, bool | np.bool_) for value in given):
        raise EpisodeError("expected numbers of episodes, got a mask of true and false; give np.flatnonzero(mask)")
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise EpisodeError(f"expected numbers of episodes, such as [0, 2, 5], got {type(episodes).__name__} {episodes!r:.80}")
    return np.unique(values.astype(np.int64))


def whole_numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A column of one integer per row, ``(n,)`` int64."""
    values = column_of(table, name, path)
    if values.shape[1] != 1 or values.dtype.kind not in "iuf" or not (values == np.floor(values.astype(float))).all():
        raise EpisodeError(f"{path}, column {name!r}: expected one whole number a row, got {table[name].type}; convert it again")
    return values[:, 0].astype(np.int64)
