"""Processes that end with the one that asked for them, whatever ends it, and whose threads do not spin while they wait."""

import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # read when OpenMP is loaded, with torch


def in_parallel(work: Callable, jobs: Sequence[tuple], n_workers: int) -> Iterator[Any]:
    """Do jobs in processes of their own, which end with this one; where one worker is enough, in this process.

    Args:
        work: What is done with each job's arguments; importable in a fresh process.
        jobs: Arguments of each.
        n_workers: Processes at most; a process needs seconds to begin.

    Yields:
        What `work` returns, as the jobs end.
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
    """End this process as soon as process `pid` ends: a worker of a killed parent must not work, or wait, on.

    A worker of torchrun or of a fork server is no child of the process that asked for it.
    """

    def watch() -> None:
        try:
            _wait_for(pid)
        finally:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _wait_for(pid: int) -> None:
    """Until a process has ended; where the system can say so, also one whose end nobody has taken note of yet."""
    if hasattr(os, "pidfd_open"):
        select.select([os.pidfd_open(pid)], [], [])
        return
    while True:
        os.kill(pid, 0)  # raises when it is gone
        time.sleep(0.5)
