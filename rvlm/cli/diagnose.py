"""`rvlm diagnose`: which fault of data, policy or environment explains a robot that fails, and how to mend it."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any

from rvlm.cli import add_command
from rvlm.report.notebooks import InvalidRun

DIAGNOSE_ABOUT = "find the first fault in demonstrations, policy and environment, and its fix"
DIAGNOSE_MORE = """DEMONSTRATIONS is the folder of a LeRobot dataset, or its name on the Hub; --card says what its numbers mean
where it does not say so itself. Without --policy and --suite the data alone are checked; each of them adds checks. A check relies
on those before it, so the first that fails ends the diagnosis. The status is 0 if no fault was found, 1 if one was, and 2 if
the diagnosis could not be made.

examples:
  rvlm diagnose my_demonstrations
  rvlm diagnose lerobot/pusht --card pusht
  rvlm diagnose my_demonstrations --policy my_policy --suite my_lab.kitchen:suite"""


def add_diagnose(commands: Any) -> None:
    """Add the command to the parser."""
    command = add_command(commands, "diagnose", DIAGNOSE_ABOUT, DIAGNOSE_MORE)
    command.add_argument(
        "demonstrations", metavar="DEMONSTRATIONS", help="that the policy was trained on: folder, or name on the Hub"
    )
    command.add_argument("--card", default="", help="data card of data that store none: its name, or the path of your own")
    command.add_argument("--policy", help="trained on them: folder, or name on the Hub")
    command.add_argument("--suite", help="environment in which it acts, as of rvlm evaluate")
    command.add_argument("--episodes", type=int, default=6, metavar="N", help="that are examined (default: %(default)s)")
    command.add_argument("--frames", type=int, default=200, metavar="N", help="for open loop (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="which episodes and frames (default: %(default)s)")
    command.set_defaults(run=_diagnose)


def _diagnose(arguments: argparse.Namespace) -> int:
    from rvlm.diagnosis.checklist import diagnose, first_fault
    from rvlm.envs.gl import NoHeadlessOpenGL

    sys.path.insert(0, str(Path.cwd()))  # where "my_module:suite" is looked up
    try:
        results = diagnose(_inputs(arguments))
    except (ValueError, FileNotFoundError, NoHeadlessOpenGL) as error:  # data, cards, suites, policies: refused in words
        raise InvalidRun(str(error)) from error
    except Exception:  # not of this package: status 1 says that a fault was found
        traceback.print_exc()
        return 2
    width = max(len(result.name) for result in results)
    for result in results:
        print(f"{result.name:<{width}}  {result.measured}")
    fault = first_fault(results)
    print(f"\nfault: {fault}\nfix: {results[-1].fix}" if fault else "\nno fault found")
    return int(fault is not None)


def _inputs(arguments: argparse.Namespace) -> Any:
    from rvlm.data.dataset import EpisodeDataset
    from rvlm.data.hub_datasets import fetch_dataset
    from rvlm.diagnosis.inputs import DiagnosisInputs

    for name in ("episodes", "frames"):
        if getattr(arguments, name) < 1:
            raise InvalidRun(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    if arguments.seed < 0:
        raise InvalidRun(f"--seed: expected a whole number from 0 on, got {arguments.seed}")
    data, policy, env = EpisodeDataset(fetch_dataset(arguments.demonstrations, arguments.card)), None, None
    if arguments.policy:
        policy = _policy_of(arguments.policy, data.require_spec())
    if arguments.suite:
        from rvlm.envs.suites import load_suite

        env = load_suite(arguments.suite).make(policy and policy.image_size)
    return DiagnosisInputs(policy, data, env, arguments.episodes, arguments.frames, arguments.seed)


def _policy_of(name: str, spec: Any) -> Any:
    """A policy as it acts for a robot; as it is if it is of others, which the diagnosis then names."""
    from rvlm.data.errors import SpecMismatch
    from rvlm.policy.policy import load_policy

    try:
        return load_policy(name, spec=spec)
    except SpecMismatch:
        return load_policy(name)
