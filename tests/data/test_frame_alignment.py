"""Frames beside their rows, by their timestamps: each row its own, or an error."""

from pathlib import Path

import numpy as np
import pytest

from rvlm.data.errors import EpisodeError
from rvlm.data.frame_alignment import align_frames

HERE = Path("static.mp4")


def no_stamps(n):
    return lambda: np.full(n, np.nan)


def placed(times, lengths, fps=30.0, starts=None, stamps=None):
    lengths = np.array(lengths)
    starts = (np.cumsum(lengths) - lengths) / fps if starts is None else np.array(starts)
    return align_frames(HERE, np.array(times), starts, lengths, fps, stamps or no_stamps(lengths.sum()))


@pytest.mark.parametrize(
    ("video", "recording"), [(30, 30), (29.97, 30), (30, 29.97), (30000 / 1001, 30), (60000 / 1001, 60), (9.95, 10)]
)
@pytest.mark.parametrize("lengths", [(1300,), (400, 1, 500, 399)])
def test_a_clock_that_is_a_little_off_moves_no_frame(video, recording, lengths):
    """After 500 frames a video at 29.97 Hz is half a frame late beside rows at 30; the frame beside row i is still frame i."""
    assert (placed(np.arange(1300) / video, lengths, recording) == np.arange(1300)).all()


def test_a_clock_that_is_off_in_the_table_too():
    """Episodes whose starts were measured in the video, which runs at 29.97 Hz."""
    lengths = np.array([400, 500, 400])
    starts = (np.cumsum(lengths) - lengths) / 29.97
    assert (placed(np.arange(1300) / 29.97, lengths, 30, starts) == np.arange(1300)).all()


def test_a_variable_rate_is_followed_by_the_rows_own_timestamps():
    times = np.cumsum(np.random.default_rng(0).uniform(0.02, 0.2, 60)) - 0.02
    own = np.r_[times[:40] - times[0], times[40:] - times[40]]
    starts = [times[0], times[40]]
    assert (placed(times, [40, 20], 10, starts, lambda: own) == np.arange(60)).all()
    with pytest.raises(EpisodeError, match=r"expected 60 frames in static\.mp4, got 60: .*no frame is near row \d+"):
        placed(times, [40, 20], 10, starts)


def test_frames_that_no_row_wants_are_passed_over():
    assert (placed(np.arange(59) / 60, [30]) == np.arange(0, 60, 2)).all()
    gap = [(0.0, 10), (20 / 30, 10)]  # an episode between them was deleted
    found = placed(np.arange(30) / 30, [n for _, n in gap], starts=[s for s, _ in gap])
    assert found.tolist() == [*range(10), *range(20, 30)]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (np.arange(29) / 30, "no frame is near row 29"),
        (np.arange(31) / 30, "got 31"),
        (np.r_[np.arange(10), np.arange(11, 31)] / 30, "no frame is near row 10"),
        (np.arange(1, 31) / 30, "no frame is near row 0"),
        (np.arange(30) / 15, "run at 15 Hz"),
        (np.arange(30) / 28, "run at 28 Hz"),
        (np.zeros(30), "no frame is near row 1"),
        (np.arange(1) / 30, "got 1"),
    ],
)
def test_a_row_that_no_frame_reaches_is_refused(times, message):
    with pytest.raises(EpisodeError, match=rf"expected 30 frames in static\.mp4, .*{message}"):
        placed(times, [30])


def test_two_episodes_that_share_frames_are_refused():
    with pytest.raises(EpisodeError, match="expected 20 frames"):
        placed(np.arange(20) / 30, [10, 10], starts=[0, 0])
