"""Processes that end with the one that asked for them, whatever ends it, and whose threads do not spin while they wait."""

import os
import select
import threading
import time

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # read when OpenMP is loaded, with torch


def exit_with(pid: int) -> None:
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
