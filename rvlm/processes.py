"""Worker processes that end with their parent, and whose idle OpenMP threads do not spin."""

import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # read when torch loads OpenMP


def in_parallel(work: Callable, jobs: Sequence[tuple], n_workers: int) -> Iterator[Any]:
    """Call a function in worker processes, which end with this one; in this process if one worker is enough.

    Args:
        work: Called with each job's arguments; importable in a new process.
        jobs: Arguments of each call.
        n_workers: Largest number of processes; each needs seconds to start.

    Yields:
        Return values, in the order in which the jobs end.
    """
    if n_workers <= 1 or len(jobs) <= 1:
        yield from (work(*job) for job in jobs)
        return
    with ProcessPoolExecutor(min(n_workers, len(jobs)), get_context("spawn"), exit_when_process_ends, (os.getpid(),)) as pool:
        futures = [pool.submit(work, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def exit_when_process_ends(pid: int) -> None:
    """End this process as soon as process `pid` ends, so that no worker outlives a killed parent.

    By id, as workers of torchrun or of a fork server are no children of the process that started them.
    """

    def watch() -> None:
        try:
            _wait_for(pid)
        finally:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _wait_for(pid: int) -> None:
    """Wait until a process has ended; on Linux this includes zombies."""
    if hasattr(os, "pidfd_open"):
        select.select([os.pidfd_open(pid)], [], [])
        return
    while True:
        os.kill(pid, 0)  # raises when it is gone
        time.sleep(0.5)
