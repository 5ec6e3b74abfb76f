"""Control periods end on one grid of deadlines, whatever was done in them; a fake clock counts the time."""

import pytest

from rvlm.envs.deadline_clock import DeadlineClock


class Time:
    def __init__(self):
        self.now, self.slept = 100.0, []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def clock(self):
        return self.now


def ends(work_s, rate_hz=10.0):
    """When each period ended [s after the start], and the clock."""
    fake = Time()
    deadlines = DeadlineClock(rate_hz, fake.sleep, fake.clock)
    ended = []
    for seconds in work_s:
        fake.now += seconds
        deadlines.wait()
        ended.append(fake.now - 100.0)
    return ended, deadlines


def test_work_is_part_of_the_period():
    ended, deadlines = ends([0.03, 0.0, 0.09, 0.05])
    assert ended == pytest.approx([0.1, 0.2, 0.3, 0.4]) and deadlines.n_missed == 0


def test_lost_time_does_not_add_up():
    """Late work waits for the next deadline of the same grid: a step after it is not cut short, nor are later ones shifted."""
    ended, deadlines = ends([0.05, 0.12, 0.05, 0.35, 0.0])
    assert ended == pytest.approx([0.1, 0.3, 0.4, 0.8, 0.9])
    assert deadlines.n_missed == 2 and deadlines.n_missed_in_a_row == 0 and deadlines.latest_s == pytest.approx(0.25)


def test_misses_are_counted_in_a_row_and_begin_anew():
    _, deadlines = ends([0.05, 0.15, 0.15, 0.15])
    assert deadlines.n_missed == deadlines.n_missed_in_a_row == 3
    deadlines.start()
    assert deadlines.n_missed == deadlines.n_missed_in_a_row == 0 and deadlines.latest_s == 0
