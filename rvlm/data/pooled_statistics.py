"""Statistics of "action" and "observation.state" for normalisation, over the training episodes of one robot's datasets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from rvlm.data.actions import NormStats, StatsAccumulator
from rvlm.data.errors import EpisodeError, SpecMismatch
from rvlm.data.representations import relative_actions

OUTLIER = 100  # warn of values beyond this [normalised units]


def pooled_stats(
    parts: Sequence[tuple[Any, np.ndarray]], kind: str = "q01_q99", relative_chunk: int | None = None
) -> dict[str, NormStats]:
    """Statistics of "action" and "observation.state" over episodes of one robot from several datasets.

    Warns of values beyond `OUTLIER` in normalised units.

    Args:
        parts: Datasets (`rvlm.data.dataset.EpisodeDataset`), and the episodes of each.
        kind: Of normalisation.
        relative_chunk: Size of chunks whose actions are relative to the state at their start; as recorded if left out.
    """
    spec = parts[0][0].require_spec()
    for data, _ in parts[1:]:
        spec.require_same(data.require_spec(), f"{parts[0][0].root} vs {data.root}")
    sides = {
        "action": (spec.names, spec.scale_floor, spec.placed_action),
        "observation.state": (spec.state_names, spec.state_scale_floor, spec.placed_state),
    }
    out = {}
    for key, (names, floor, placed) in sides.items():
        accumulator = StatsAccumulator()
        for data, episodes in parts:
            try:
                accumulator.update(training_values(data, key, episodes, relative_chunk))
            except SpecMismatch as error:
                raise EpisodeError(f"{data.root}, {key}: {error}") from error
        binary = tuple(np.flatnonzero(spec.is_binary).tolist()) if key == "action" else ()
        out[key] = accumulator.finish(kind, binary, floor, placed)
        _warn_of_outliers(f"{parts[0][0].root}, {key}", out[key], names)
    return out


def training_values(data: Any, key: str, episodes: np.ndarray, relative_chunk: int | None = None) -> np.ndarray:
    """Raw values ``(n, d)`` of a column over episodes, in the representation of training; arguments as of `pooled_stats`."""
    spec, rows = data.require_spec(), np.flatnonzero(np.isin(data.episode_of_frame, episodes))
    values = data.column(key)
    if key != "action" or relative_chunk is None:
        return values[rows]
    state = data.column("observation.state")
    episode, n = data.episode_of_frame, len(values)
    starts = [rows[(rows + i < n) & (episode[np.minimum(rows + i, n - 1)] == episode[rows])] for i in range(relative_chunk)]
    return np.concatenate([relative_actions(spec, values[at + i], state[at]) for i, at in enumerate(starts)])


def _warn_of_outliers(what: str, stats: NormStats, names: Sequence[str]) -> None:
    furthest = np.abs([stats.normalize(stats.min), stats.normalize(stats.max)]).max(0)
    for i in np.flatnonzero(furthest > OUTLIER).tolist() if stats.kind != "identity" else ():
        reach = f"{what}: {names[i]!r} reaches {furthest[i]:.0f} in normalised units, as it hardly ever moves "
        spread = f"(q01 {stats.q01[i]:.3g}, q99 {stats.q99[i]:.3g}, but {stats.min[i]:.3g} to {stats.max[i]:.3g}); "
        warnings.warn(f"{reach}{spread}are these outliers? repair the rows, or leave the dimension out", stacklevel=3)
