"""A fixed control rate in real time: periods end at deadlines on one grid, so that time that is lost once does not add up."""

import math
import time
from collections.abc import Callable


class DeadlineClock:
    """Waits for the end of each control period, and counts those that ended before the work in them.

    A period lasts `1 / rate_hz` in all: observing, thinking and sending included. Work that ends late leaves out the deadlines
    that have passed: it is followed by a wait for the next one, so that every action has time to act.

    Args:
        rate_hz: Of control.
        sleep: Waits a duration [s].
        clock: Time [s].

    Attributes:
        n_missed: Deadlines that were missed since `start`.
        n_missed_in_a_row: Until now.
        latest_s: The longest that a deadline was missed by [s].
    """

    def __init__(self, rate_hz: float, sleep: Callable[[float], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self.period_s, self._sleep, self._clock = 1 / rate_hz, sleep, clock
        self.start()

    def start(self) -> None:
        """Begin the first period now."""
        self._deadline = self._clock() + self.period_s
        self.n_missed, self.n_missed_in_a_row, self.latest_s = 0, 0, 0.0

    def wait(self) -> None:
        """Wait for the end of this period, which begins the next one."""
        late_s = self._clock() - self._deadline
        if late_s > 0:
            self.n_missed, self.n_missed_in_a_row = self.n_missed + 1, self.n_missed_in_a_row + 1
            self.latest_s = max(self.latest_s, late_s)
            self._deadline += math.ceil(late_s / self.period_s) * self.period_s
        else:
            self.n_missed_in_a_row = 0
        self._sleep(max(0.0, self._deadline - self._clock()))
        self._deadline += self.period_s
