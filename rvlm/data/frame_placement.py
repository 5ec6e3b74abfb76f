"""Which frame of a video belongs to which row of the tables.

A row is shown at the start of its episode in the file plus its own time, and the frame that stands there belongs to it. Three
ways to know a row's time are tried, and the first that explains the whole file is taken:

1. its number in the episode over the recording's rate: timestamps may be those of a clock on the wall;
2. its number, where there are exactly as many frames as rows and no gap between them, on a clock that goes up to one per cent
   fast or slow: a video at 29.97 Hz beside rows at 30;
3. the timestamp in the row: a video of variable rate, or with frames that no row wants.

A row that no frame reaches, and a frame left over at the end, are errors: a file that belongs to other rows looks like that.

Source: huggingface/lerobot, where a video is asked for at ``from_timestamp + timestamp``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from rvlm.data.video import EpisodeError

DRIFT = 0.01  # of a video's clock against the recording's, as a share of the time


def place(
    path: Path, times: np.ndarray, starts: np.ndarray, lengths: np.ndarray, fps: float, stamps: Callable[[], np.ndarray]
) -> np.ndarray:
    """For each row of a file's episodes, one after the other: number of its frame ``(n,)``.

    Args:
        path: named in errors.
        times: of the frames, sorted [s].
        starts: of each episode in the file, in ascending order [s].
        lengths: rows of each episode.
        fps: of the recording [Hz].
        stamps: gives the own timestamp of each row ``(n,)`` [s], asked for where the other two ways fail.
    """
    number = np.concatenate([np.arange(n) for n in lengths])
    counted = np.repeat(starts, lengths) + number / fps
    found = _nearest(times, counted, fps)
    found = _in_order(times, counted, number, fps) if found is None else found
    found = _nearest(times, np.repeat(starts, lengths) + stamps(), fps) if found is None else found
    if found is None:
        raise EpisodeError(_why(path, times, counted, fps))
    return found


def _nearest(times: np.ndarray, wanted: np.ndarray, fps: float) -> np.ndarray | None:
    """The frame next to each time, unless it is further than half a period, two rows share one, or some are left at the end."""
    if not np.isfinite(wanted).all():
        return None
    right = np.clip(np.searchsorted(times, wanted), 1, max(len(times) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(times) - 1)
    frame = np.where(wanted - times[left] <= times[right] - wanted, left, right)
    is_near = np.abs(times[frame] - wanted) < 0.5 / fps
    fits = is_near.all() and (np.diff(frame) > 0).all() and frame[-1] == len(times) - 1
    return frame if fits else None


def _in_order(times: np.ndarray, wanted: np.ndarray, number: np.ndarray, fps: float) -> np.ndarray | None:
    """Frame after frame, where the numbers agree and every step in time is about one period."""
    if len(times) != len(wanted):
        return None
    steps = np.diff(times) * fps
    has_no_gap = (np.abs(steps[number[1:] > 0] - 1) < 0.5).all() and (steps > 0).all()
    is_near = np.abs(times - wanted) <= 0.5 / fps + DRIFT * wanted
    return np.arange(len(times)) if has_no_gap and is_near.all() else None


def _why(path: Path, times: np.ndarray, wanted: np.ndarray, fps: float) -> str:
    distance = np.abs(times[:, None] - wanted[None, :4096]).min(0) if len(times) < 4096 else np.zeros(0)
    far = np.flatnonzero(distance >= 0.5 / fps)
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else float("nan")
    row = f"; no frame is near row {far[0]} of the file, at {wanted[far[0]]:.3f} s" if len(far) else ""
    return (
        f"expected {len(wanted)} frames in {path}, got {len(times)}: one for each row at {fps:g} Hz (fps of info.json); these "
        f"run at {rate:.4g} Hz from {times[0]:.3f} s on{row}; the video and the parquet tables disagree: fetch the file again, "
        "record the episode again, or mend 'fps'"
    )
