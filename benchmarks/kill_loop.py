"""SIGKILL at random times while notebooks are reproduced and episodes recorded, until each is done all the same.

    python benchmarks/kill_loop.py [--kills 7] [--seed 0] [--only 01 05 recording]

Each is first done without a break, in an artifacts folder of its own. What comes out of the broken run must be the same, weight
by weight and file by file, and what was finished at any kill must not have been touched again. The process that is killed is
drawn too: the command, the notebook's kernel, a trainer, a worker.
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
    """What a recording of one's own looks like: random frames, an episode after the other."""
    from rvlm.data.actions import ActionSpec
    from rvlm.data.windows import EpisodeWriter

    spec = ActionSpec.from_card("tabletop_franka7")
    with EpisodeWriter(root, spec, episodes_per_file=15) as writer:
        for seed in range(writer.n_kept, N_EPISODES):
            rng, n = np.random.default_rng(seed), 20 + seed % 7
            frames = {f"observation.images.{c}": rng.integers(0, 255, (n, 48, 48, 3), np.uint8) for c in spec.cameras}
            action = spec.set_gripper(rng.uniform(-1, 1, (n, 7)).astype(np.float32), rng.random(n) > 0.5)
            state = rng.normal(size=(n, 7)).astype(np.float32)
            writer.add_episode({**frames, "observation.state": state, "action": action}, "lift it", {"seed": seed})


def start(what: str, folder: Path) -> subprocess.Popen:
    """Begin, or go on with, a notebook or a recording in a folder."""
    notebook = [str(Path(sys.executable).with_name("rvlm")), "reproduce", "--profile", "smoke", "--only", what]
    command = [sys.executable, __file__, "--record", str(folder / "demos")] if what == "recording" else notebook
    places = {"RVLM_HOME": str(folder / "home"), "RVLM_RESULTS": str(folder / "results")}
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(command, env={**os.environ, **places}, stdout=output, stderr=output, start_new_session=True)


def finished(folder: Path) -> dict[Path, tuple[int, int]]:
    """What is finished so far: inode and time of writing by path."""
    found = [path for pattern in FINISHED for path in folder.glob(pattern) if "." not in path.name.removesuffix(".json")]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def content(folder: Path) -> Counter:
    """Weights and recorded files: name of the stage or dataset without its key, file, hash."""
    files = [*folder.glob("home/stages/*/model/**/*.safetensors"), *folder.glob("home/datasets/*/[dv]*/**/*.*")]
    files += folder.glob("demos/[dv]*/**/*.*")
    named = [(path, path.relative_to(folder).parts) for path in files if path.is_file()]
    return Counter(
        (*parts[:2], *(part.rsplit("-", 1)[0] for part in parts[2:3]), *parts[3:], hashlib.sha256(path.read_bytes()).hexdigest())
        for path, parts in named
    )


def victim_of(process: subprocess.Popen, rng: np.random.Generator) -> psutil.Process:
    """One of the processes that work together, drawn."""
    top = psutil.Process(process.pid)
    return rng.choice(np.array([top, *top.children(recursive=True)], dtype=object))


def loop(what: str, n_kills: int, rng: np.random.Generator, base: Path) -> dict:
    """Do it once without a break, and once with so many kills."""
    unbroken, broken = base / what / "unbroken", base / what / "broken"
    for folder in (unbroken, broken):
        folder.mkdir(parents=True)
    started = time.monotonic()
    if start(what, unbroken).wait():
        raise RuntimeError(f"{what}: {(unbroken / 'output.txt').read_text()[-2000:]}")
    seconds, kills, before = time.monotonic() - started, [], {}
    while len(kills) < n_kills:
        process = start(what, broken)
        try:
            process.wait(rng.uniform(0, seconds / 3))
        except subprocess.TimeoutExpired:
            victim = victim_of(process, rng)
            kills.append(" ".join(victim.cmdline())[-40:] if victim.pid != process.pid else "the command")
            victim.send_signal(signal.SIGKILL)
            process.wait()
        changed = [path for path, stamp in before.items() if finished(broken).get(path) != stamp]
        if changed:
            raise AssertionError(f"{what}: done twice, or lost: {changed}")
        before = finished(broken)
        if process.returncode == 0:
            break
    for _ in range(3):  # a kill of a worker alone ends the command with an error
        if not (process.returncode == 0 or start(what, broken).wait()):
            break
    changed = [path for path, stamp in before.items() if finished(broken).get(path) != stamp]
    is_equal = content(unbroken) == content(broken)
    told = {"what": what, "seconds_unbroken": round(seconds, 1), "n_kills": len(kills), "killed": Counter(kills)}
    return {**told, "n_files": content(unbroken).total(), "is_equal": is_equal, "touched_again": [str(path) for path in changed]}


def main() -> int:
    """Print one line of JSON for each; the exit status says whether all are equal."""
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
            told = loop(what, arguments.kills, rng, Path(folder))
            is_good &= told["is_equal"] and not told["touched_again"]
            print(json.dumps(told), flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
