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


UNGUARDED = """
import sys
from pathlib import Path
from rvlm.files import make_folder
from rvlm.processes import in_parallel
final = Path(sys.argv[1])
{guard}make_folder(final, lambda part: (part / "sum").write_text(str(sum(in_parallel(abs, [(-1,), (-2,)], 2)))))
"""


def test_a_script_whose_workers_would_wait_for_it_is_refused(tmp_path):
    """A worker imports the script, and with calls at its top level meets the lock that its parent holds."""
    script = tmp_path / "mine.py"
    for guard, folder in (("", "one"), ('if __name__ == "__main__": ', "two")):
        script.write_text(UNGUARDED.format(guard=guard))
        command = [sys.executable, str(script), str(tmp_path / folder)]
        ended = subprocess.run(command, env=path(), capture_output=True, text=True, timeout=120, check=False)
        if guard:
            assert ended.returncode == 0 and (tmp_path / folder / "sum").read_text() == "3"
        else:
            assert ended.returncode == 1 and 'expected calls under `if __name__ == "__main__":`' in ended.stderr
            assert not (tmp_path / folder).exists()


def test_what_is_imported_before_torch_keeps_threads_from_spinning():
    code = "import os, sys, rvlm.openmp; sys.exit(os.environ['OMP_WAIT_POLICY'] != 'PASSIVE' or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PATH": ""} | path(), check=False).returncode == 0


def path():
    """Where this package is, for a process with an environment of its own."""
    import rvlm

    return {"PYTHONPATH": rvlm.__path__[0].rpartition("/")[0]}
