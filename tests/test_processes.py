"""Processes that end with the process that started them."""

import subprocess
import sys

WORKER = """
import sys, time
from rvlm.processes import exit_when_process_ends
exit_when_process_ends(int(sys.argv[1]))
print("here", flush=True)
time.sleep(600)
"""


def test_a_worker_ends_with_its_asker_also_where_nobody_takes_note_of_that():
    """A killed process whose parent has not asked for its status answers signals still."""
    asker = subprocess.Popen(["sleep", "600"])
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(asker.pid)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "here\n" and worker.poll() is None
    asker.kill()
    assert worker.wait(timeout=120) == 1
    asker.wait()
    late = subprocess.run([sys.executable, "-c", WORKER, str(asker.pid)], stdout=subprocess.PIPE, timeout=120, check=False)
    assert late.returncode == 1, "whose asker is gone before it begins"


def test_what_is_imported_before_torch_keeps_threads_from_spinning():
    code = "import os, sys, rvlm.openmp; sys.exit(os.environ['OMP_WAIT_POLICY'] != 'PASSIVE' or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PATH": ""} | path(), check=False).returncode == 0


def path():
    """Where this package is, for a process with an environment of its own."""
    import rvlm

    return {"PYTHONPATH": rvlm.__path__[0].rpartition("/")[0]}
