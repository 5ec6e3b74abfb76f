"""Real sizes on one card, offline: planned and measured memory, step time against the bare model, control rate.

    python3 benchmarks/gpu.py [--device cuda|cpu] [--size true|tiny] [--minutes 8] [--results FOLDER] [--only REGEX]

Models have their real configurations and random weights. A row is one JSON file, written as the row ends, most valuable rows
first; the time ends the run before the next row, and the next run goes on with the rows that have no file. A row that fails is
recorded with its reason: delete its file to try again. One process measures, and is started anew if it dies or leaves the card
in doubt; others compute the plans meanwhile. It needs torch, transformers, peft, numpy, pandas, safetensors and pillow; rows of
4 bits also bitsandbytes, installed or as a wheel in `benchmarks/wheels/`.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from rvlm.files import RESULTS, artifacts_dir, atomic_write
from rvlm.processes import exit_when_process_ends
from rvlm.provenance import provenance

MODELS = ("SmolVLM2-500M", "SmolVLM2-2.2B", "PaliGemma-3B", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B")
FAMILY_MODELS = ("SmolVLM2-500M", "PaliGemma-3B", "Qwen2.5-VL-3B")  # one a family: the tiny ones of a family are the same
FINETUNING = ("lora", "qlora", "full", "head")
POLICIES = ("one step", "policy head", "interleaved", "chunked")


def rows(size):
    """All rows, in the order in which they are measured."""
    models = MODELS if size == "true" else FAMILY_MODELS
    first, *others = [[*_training(model), *_acting(model, False)] for model in models]
    wrappers = [{"kind": "sharded", "model": models[0], "wrapper": wrapper} for wrapper in ("DDP", "FSDP2")]
    compiled = [row for model in (models if size == "true" else models[:1]) for row in _acting(model, True)]
    ordered = [*first, *wrappers, {"kind": "small", "model": "shipped"}, *(row for part in others for row in part), *compiled]
    return [{"name": _name(row), **row} for row in ordered]


def _training(model):
    return [
        {"kind": "training", "model": model, "finetuning": finetuning, "gradient_checkpointing": is_checkpointed}
        for finetuning in FINETUNING
        for is_checkpointed in (False, True)
    ]


def _acting(model, is_compiled):
    return [{"kind": "acting", "model": model, "policy": policy, "compile": is_compiled} for policy in POLICIES]


def _name(row):
    words = [key if value is True else str(value) for key, value in row.items() if value is not False]
    return "-".join(words).replace(" ", "_").lower()


# -- processes ----------------------------------------------------------------------------------------------------------
def serve(connection, run):
    """Measure rows that come over a connection, until it closes."""
    exit_when_process_ends(os.getppid())
    import gpu_rows

    connection.send(gpu_rows.about(run))
    with contextlib.suppress(EOFError):
        while True:
            connection.send(gpu_rows.measure(connection.recv(), run))


class Measuring:
    """The process that measures, started when it is needed.

    Args:
        run: As of `gpu_rows.measure`.
        work: What the process does.
    """

    def __init__(self, run, work=serve):
        self.run, self.work, self.process = run, work, None

    def start(self, seconds):
        """Start it, unless it runs; what it says about the device.

        Raises:
            EOFError: It died.
            TimeoutError: It takes longer.
        """
        if self.process is not None:
            return None
        self.connection, theirs = get_context("spawn").Pipe()
        self.process = get_context("spawn").Process(target=self.work, args=(theirs, self.run), daemon=True)
        self.process.start()
        theirs.close()
        return self._receive(seconds)

    def measure(self, row, seconds):
        """The numbers of a row; as a failure if the process dies.

        Raises:
            TimeoutError: It takes longer.
        """
        try:
            self.start(seconds)
            self.connection.send(row)
            result = self._receive(seconds)
        except (EOFError, BrokenPipeError, ConnectionError):
            result = {"failed": f"its process died, with exit code {self._exit_code()}", "restart": True}
        if result.pop("restart"):
            self.stop()
        return result

    def _exit_code(self):
        self.process.join(10)
        return self.process.exitcode

    def _receive(self, seconds):
        if not self.connection.poll(max(seconds, 0)):
            self.stop()
            raise TimeoutError
        return self.connection.recv()

    def stop(self):
        """End it."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _hide_cards(pid):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a context would take the card's memory
    exit_when_process_ends(pid)


def plan(model, finetuning, run):
    """As `gpu_rows.plan`."""
    import gpu_rows

    return gpu_rows.plan(model, finetuning, run)


# -- the run ------------------------------------------------------------------------------------------------------------
def run_rows(todo, folder, run, ends, measuring):
    """Measure the rows that have no file yet, until the time is over [s of `time.monotonic`]; the number of those left."""
    missing = [row for row in todo if not (folder / f"{row['name']}.json").exists()]
    if not missing or time.monotonic() >= ends:
        return len(missing)
    try:
        run |= measuring.start(ends - time.monotonic())
    except EOFError:
        sys.exit("the process that measures did not start, for the reason above")
    if others := _devices(folder) - {run["about"]["name"]}:
        measuring.stop()
        got = ", ".join(sorted(others))
        sys.exit(f"expected rows of {run['about']['name']} in {folder}, got rows of {got}; give another folder by --results")
    context, n_planners = get_context("spawn"), max(1, min(4, (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(n_planners, context, _hide_cards, (os.getpid(),)) as pool:
        planned = dict.fromkeys((row["model"], row["finetuning"]) for row in missing if row["kind"] == "training")
        plans = {key: pool.submit(plan, *key, run) for key in planned}
        try:
            while missing and time.monotonic() < ends:
                row, started = missing[0], time.monotonic()
                measured = measuring.measure(row, ends - started)
                seconds = time.monotonic() - started
                write(folder, row, run, measured, _planned(plans, row, ends), seconds)
                missing.pop(0)
        except TimeoutError:
            pass
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            measuring.stop()
    return len(missing)


def _devices(folder):
    """Names of the devices whose rows are in a folder."""
    return {json.loads(path.read_text())["device"]["name"] for path in folder.glob("*.json")}


def _planned(plans, row, ends):
    """The plan of a training row, or why there is none; waits for it as long as there is time."""
    if row["kind"] != "training":
        return {}
    future = plans[row["model"], row["finetuning"]]
    try:
        return {"planned": future.result(max(0, ends - time.monotonic()))[row["gradient_checkpointing"]]}
    except TimeoutError:
        raise
    except Exception as error:
        return {"planned": {"failed": f"{type(error).__name__}: {error}"}}


def write(folder, row, run, measured, planned, seconds):
    """Write a row's file, and a line of it."""
    of = measured.pop("provenance", None) or provenance()
    of["commit"] = of["commit"] or run["commit"]
    entry = {**row, "size": run["size"], "device": run["about"], **planned, "measured": measured, "seed": run["seed"]}
    atomic_write(folder / f"{row['name']}.json", json.dumps({**entry, "row_s": round(seconds, 1), **of}, indent=1) + "\n")
    print(f"{seconds:6.1f} s  {row['name']:58s} {summary(measured, planned.get('planned', {}))}", flush=True)


def summary(measured, planned):
    """A row in a line."""
    if "failed" in measured:
        return f"failed: {measured['failed'][:90]}"
    if "hz" in measured:
        milliseconds = f"{measured['prediction_ms']:.1f} ms a prediction, slowest step {measured['slowest_ms']:.1f} ms"
        return f"{milliseconds}, {measured['hz']:.1f} Hz"
    text = f"{measured['peak'] / 1e9:.2f} GB, {1000 * measured['seconds']:.0f} ms a step"
    return (
        f"{text}, planned {planned['peak'] / 1e9:.2f} GB, bare x {measured['ratio_to_bare']:.2f}" if "peak" in planned else text
    )


def unpack_wheels(folder):
    """Put wheels that lie beside this file on the path."""
    for wheel in sorted((HERE / "wheels").glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(folder)
        sys.path.insert(0, folder)


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("true", "tiny"), default="true")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--results", type=Path, help="default: results/gpu of a card's real sizes, else artifacts/gpu")
    parser.add_argument("--only", default="", help="rows whose names have this regular expression")
    parser.add_argument("--commit", help="of the code, where git is missing")
    return parser.parse_args(given)


def main(given=None):
    options = arguments(given)
    ends = time.monotonic() + 60 * options.minutes
    is_result = (options.device, options.size) == ("cuda", "true")
    folder = options.results or (RESULTS / "gpu" if is_result else artifacts_dir() / "gpu")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as home:
        unpack_wheels(f"{home}/wheels")
        run = {"device": options.device, "size": options.size, "home": home, "commit": options.commit, "seed": 0}
        chosen = [row for row in rows(options.size) if re.search(options.only, row["name"])]
        n_left = run_rows(chosen, folder, run, ends, Measuring(run))
    print(f"{len(chosen) - n_left} of {len(chosen)} rows are in {folder}" + "; run it again for the others" * bool(n_left))


if __name__ == "__main__":
    main()
