"""Alignment of video frames and table rows.

A row's frame is the one at the start of its episode in the video plus the row's time. Three definitions of a row's time are
tried, and the first that aligns the whole file is used:

1. its index in the episode divided by the recording's rate, as timestamps may be wall-clock times;
2. its index, if there are exactly as many frames as rows and no gaps, with a clock drift of up to one per cent: a video at
   29.97 Hz with rows at 30 Hz;
3. its timestamp: a video of variable rate, or with frames that belong to no row.

A row without a frame and frames left over at the end are errors, as the file may belong to other rows.

Source: huggingface/lerobot, where a video is asked for at ``from_timestamp + timestamp``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from rvlm.data.errors import EpisodeError

DRIFT = 0.01  # largest drift of a video's clock against the recording's, as a fraction of the time


def align_frames(
    path: Path, times: np.ndarray, starts: np.ndarray, lengths: np.ndarray, fps: float, timestamps: Callable[[], np.ndarray]
) -> np.ndarray:
    """Frame index of each row of a file's episodes ``(n,)``.

    Args:
        path: of the video, for errors.
        times: of the frames, sorted [s].
        starts: start of each episode in the file, sorted [s].
        lengths: number of rows of each episode.
        fps: rate of the recording [Hz].
        timestamps: returns the timestamp of each row ``(n,)`` [s]; called if the other definitions fail.
    """
    number = np.concatenate([np.arange(n) for n in lengths])
    expected = np.repeat(starts, lengths) + number / fps
    frames = _nearest(times, expected, fps)
    frames = _in_order(times, expected, number, fps) if frames is None else frames
    frames = _nearest(times, np.repeat(starts, lengths) + timestamps(), fps) if frames is None else frames
    if frames is None:
        raise EpisodeError(_message(path, times, expected, fps))
    return frames


def _nearest(times: np.ndarray, expected: np.ndarray, fps: float) -> np.ndarray | None:
    """The nearest frame of each time; None if one is over half a period away, rows share one, or frames are left at the end."""
    if not np.isfinite(expected).all():
        return None
    right = np.clip(np.searchsorted(times, expected), 1, max(len(times) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(times) - 1)
    frame = np.where(expected - times[left] <= times[right] - expected, left, right)
    is_near = np.abs(times[frame] - expected) < 0.5 / fps
    fits = is_near.all() and (np.diff(frame) > 0).all() and frame[-1] == len(times) - 1
    return frame if fits else None


def _in_order(times: np.ndarray, expected: np.ndarray, number: np.ndarray, fps: float) -> np.ndarray | None:
    """Frames in order, if there are as many as rows and all time steps are about one period; else None."""
    if len(times) != len(expected):
        return None
    steps = np.diff(times) * fps
    has_no_gap = (np.abs(steps[number[1:] > 0] - 1) < 0.5).all() and (steps > 0).all()
    is_near = np.abs(times - expected) <= 0.5 / fps + DRIFT * expected
    return np.arange(len(times)) if has_no_gap and is_near.all() else None


def _message(path: Path, times: np.ndarray, expected: np.ndarray, fps: float) -> str:
    distance = np.abs(times[:, None] - expected[None, :4096]).min(0) if len(times) < 4096 else np.zeros(0)
    far = np.flatnonzero(distance >= 0.5 / fps)
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else float("nan")
    row = f"; no frame is near row {far[0]} of the file, at {expected[far[0]]:.3f} s" if len(far) else ""
    return (
        f"expected {len(expected)} frames in {path}, got {len(times)}: one for each row at {fps:g} Hz (fps of info.json); these "
        f"run at {rate:.4g} Hz from {times[0]:.3f} s on{row}; the video and the parquet tables disagree: fetch the file again, "
        "record the episode again, or fix 'fps'"
    )
