"""SIGKILL at random times while notebooks are reproduced and episodes recorded, until each is finished.

    python benchmarks/kill_loop.py [--kills 7] [--seed 0] [--only 01 05 recording]

Each is first run without interruption, in its own artifacts folder. The interrupted run must give the same result, weight by
weight and file by file, and must not write again what was finished at any kill. The killed process is drawn at random: the
command, the notebook's kernel, a trainer, a worker.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

N_EPISODES = 40
FINISHED = ("home/stages/*/model", "home/datasets/*", "home/scenes/*", "home/reproduce/*/*.json", "home/evaluations/*", "demos")


def record(root: Path) -> None:
    """A user's recording: random images, one episode after another."""
    from rvlm.data.actions import ActionSpec
    from rvlm.data.windows import EpisodeWriter

    spec = ActionSpec.from_card("tabletop_franka7")
    with EpisodeWriter(root, spec, episodes_per_file=15) as writer:
        for seed in range(writer.n_resumed, N_EPISODES):
            rng, n = np.random.default_rng(seed), 20 + seed % 7
            frames = {f"observation.images.{c}": rng.integers(0, 255, (n, 48, 48, 3), np.uint8) for c in spec.cameras}
            action = spec.set_grippers(rng.uniform(-1, 1, (n, 7)).astype(np.float32), rng.random((n, 1)) > 0.5)
            state = rng.normal(size=(n, 7)).astype(np.float32)
            writer.add_episode({**frames, "observation.state": state, "action": action}, "lift it", {"seed": seed})


def start(what: str, folder: Path) -> subprocess.Popen:
    """Start or resume a notebook or a recording in a folder."""
    notebook = [str(Path(sys.executable).with_name("rvlm")), "reproduce", "--profile", "smoke", "--only", what]
    command = [sys.executable, __file__, "--record", str(folder / "demos")] if what == "recording" else notebook
    folders = {"RVLM_HOME": str(folder / "home"), "RVLM_RESULTS": str(folder / "results")}
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(command, env={**os.environ, **folders}, stdout=output, stderr=output, start_new_session=True)


def finished(folder: Path) -> dict[Path, tuple[int, int]]:
    """Finished files so far: inode and modification time by path."""
    found = [path for pattern in FINISHED for path in folder.glob(pattern) if "." not in path.name.removesuffix(".json")]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def content(folder: Path) -> Counter:
    """Weights and recorded files, counted by name of the stage or dataset without its key, file, and hash."""
    files = [*folder.glob("home/stages/*/model/**/*.safetensors"), *folder.glob("home/datasets/*/[dv]*/**/*.*")]
    files += folder.glob("demos/[dv]*/**/*.*")
    named = [(path, path.relative_to(folder).parts) for path in files if path.is_file()]
    return Counter(
        (*parts[:2], *(part.rsplit("-", 1)[0] for part in parts[2:3]), *parts[3:], hashlib.sha256(path.read_bytes()).hexdigest())
        for path, parts in named
    )


def victim_of(process: subprocess.Popen, rng: np.random.Generator) -> psutil.Process:
    """The command or one of its child processes, at random."""
    top = psutil.Process(process.pid)
    return rng.choice(np.array([top, *top.children(recursive=True)], dtype=object))


def loop(what: str, n_kills: int, rng: np.random.Generator, base: Path) -> dict:
    """Run once without interruption, and once with this many kills."""
    reference, interrupted = base / what / "reference", base / what / "interrupted"
    for folder in (reference, interrupted):
        folder.mkdir(parents=True)
    started = time.monotonic()
    if start(what, reference).wait():
        raise RuntimeError(f"{what}: {(reference / 'output.txt').read_text()[-2000:]}")
    seconds, kills, before = time.monotonic() - started, [], {}
    while len(kills) < n_kills:
        process = start(what, interrupted)
        try:
            process.wait(rng.uniform(0, seconds / 3))
        except subprocess.TimeoutExpired:
            victim = victim_of(process, rng)
            kills.append(" ".join(victim.cmdline())[-40:] if victim.pid != process.pid else "the command")
            victim.send_signal(signal.SIGKILL)
            process.wait()
        changed = [path for path, stamp in before.items() if finished(interrupted).get(path) != stamp]
        if changed:
            raise AssertionError(f"{what}: written twice, or lost: {changed}")
        before = finished(interrupted)
        if process.returncode == 0:
            break
    for _ in range(3):  # a kill of a worker alone ends the command with an error
        if not (process.returncode == 0 or start(what, interrupted).wait()):
            break
    changed = [path for path, stamp in before.items() if finished(interrupted).get(path) != stamp]
    is_equal = content(reference) == content(interrupted)
    counts = {"what": what, "reference_seconds": round(seconds, 1), "n_kills": len(kills), "killed": Counter(kills)}
    return {
        **counts,
        "n_files": content(reference).total(),
        "is_equal": is_equal,
        "written_again": [str(path) for path in changed],
    }


def main() -> int:
    """Print one line of JSON for each; the exit status is 0 if all results are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=["01", "05", "recording"])
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.record)
        return 0
    rng, is_good = np.random.default_rng(arguments.seed), True
    with tempfile.TemporaryDirectory() as folder:
        for what in arguments.only:
            outcome = loop(what, arguments.kills, rng, Path(folder))
            is_good &= outcome["is_equal"] and not outcome["written_again"]
            print(json.dumps(outcome), flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
