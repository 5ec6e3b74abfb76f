"""The entry point of ``rvlm``: the parser, the commands that only read or report, and error handling."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import rvlm
from rvlm.cli import add_command, cache, diagnose, evaluate, lab, run, ship
from rvlm.files import RESULTS
from rvlm.report.findings import load_findings, provenance_line
from rvlm.report.notebooks import GIT_PROFILE, InvalidRun

EXAMPLES = """examples:
  rvlm reproduce --profile smoke         every notebook at smoke-test size, in minutes
  rvlm reproduce --only 02 evaluate      two notebooks at the default size
  rvlm run 00 -p seed 11                 one notebook with values of your own
  rvlm lab                               JupyterLab on copies of the notebooks
  rvlm evaluate FOLDER tabletop/franka7  a policy's success, per task
  rvlm diagnose FOLDER                   what is wrong with these demonstrations

environment:
  RVLM_HOME      datasets, checkpoints, caches, results of `rvlm run` (default: artifacts/ of the clone)
  RVLM_RESULTS   where reproduce writes and report and findings read (default: results/ for profile cpu, else
                 artifacts/PROFILE/results)
  MUJOCO_GL      egl, osmesa or glfw; if not set, the first that works"""

REPRODUCE = """Finished notebooks are skipped, so a stopped run resumes. Profile cpu writes results/ and the README's table;
another profile writes artifacts/PROFILE/results. RVLM_RESULTS moves either.

examples:
  rvlm reproduce --profile smoke
  rvlm reproduce --profile gpu --dry-run
  rvlm reproduce --only notebooks/02_episodes_and_actions.ipynb
  RVLM_RESULTS=results/full rvlm reproduce --profile full --only 08"""


def _reproduce(arguments: argparse.Namespace) -> int:
    from rvlm.cli.execution import RunPaths

    paths = RunPaths.of_profile(arguments.profile)
    if arguments.dry_run:
        from rvlm.cli.dry_run import dry_run

        for line in dry_run(paths, arguments.profile, arguments.only, arguments.force):
            print(line)
        return 0
    from rvlm.cli.reproduce import plan_jobs, reproduce
    from rvlm.envs.gl import choose_gl
    from rvlm.report.readme import update_readme

    plan_jobs(paths, arguments.profile, arguments.only)  # invalid arguments are refused before OpenGL is tried
    choose_gl()  # kernels inherit MUJOCO_GL
    status = reproduce(paths, arguments.profile, arguments.only, arguments.force)
    if status == 0 and paths.results == RESULTS and arguments.profile == GIT_PROFILE:
        print(f"README: {update_readme()}")
    return status


def _results() -> Path:
    return Path(os.environ.get("RVLM_RESULTS") or RESULTS).resolve()


def _report(_: argparse.Namespace) -> int:
    from rvlm.report.page import html_report
    from rvlm.report.readme import update_readme

    print(f"report: {html_report(_results())}")
    if _results() == RESULTS:
        print(f"README: {update_readme()}")
    return 0


def _findings(arguments: argparse.Namespace) -> int:
    folder = arguments.results.resolve() if arguments.results else _results()
    found = load_findings(folder)
    if arguments.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    for record in found:
        print(f"{record['name']}: {record['sentence']}\n    {provenance_line(record).replace('**', '')}")
    if not found:
        print(f"no findings in {folder}; 'rvlm reproduce' makes them")
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser with every command; a new command is a module with a function `add_...`, which sets ``run``."""
    about = "Robot policies from vision-language models: train, evaluate, compare."
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="rvlm", description=about, epilog=EXAMPLES, formatter_class=raw)
    top.add_argument("--version", action="version", version=f"rvlm {rvlm.__version__}")
    top.set_defaults(run=lambda _: top.print_help() or 0)
    commands = top.add_subparsers(metavar="command")

    about = "run the notebooks in order, skip those that are finished, write the report"
    command = add_command(commands, "reproduce", about, REPRODUCE)
    command.add_argument("--profile", default=GIT_PROFILE, help="smoke, cpu (default), gpu or full: sizes, nothing else")
    command.add_argument("--only", nargs="+", default=[], metavar="NN", help="these notebooks only: numbers, names or paths")
    command.add_argument("--force", action="store_true", help="run finished notebooks too")
    about = "print what would run, be downloaded, and be needed in memory and time by the plan; do nothing"
    command.add_argument("--dry-run", action="store_true", help=about)
    command.set_defaults(run=_reproduce)

    run.add_run(commands)
    lab.add_lab(commands)
    evaluate.add_evaluate(commands)
    diagnose.add_diagnose(commands)

    about = "write the HTML report, and the README's table for the results in git"
    add_command(commands, "report", about).set_defaults(run=_report)

    command = add_command(commands, "findings", "print the findings")
    command.add_argument("--results", type=Path, help="folder that holds findings/, e.g. results/full")
    command.add_argument("--json", action="store_true", help="all fields of each finding, for scripts")
    command.set_defaults(run=_findings)

    cache.add_cache(commands)
    ship.add_models(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``rvlm``; returns the exit status."""
    from rvlm.envs.gl import NoHeadlessOpenGL

    try:
        made = parser()
        arguments, arguments.rest = made.parse_known_args(argv)
        if arguments.rest and not getattr(arguments, "passes_on", False):
            made.error(f"unrecognized arguments: {' '.join(arguments.rest)}")
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except (InvalidRun, NoHeadlessOpenGL) as error:
        print(f"rvlm: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader closed the pipe, as in `rvlm findings | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("rvlm: stopped; the same command resumes", file=sys.stderr)
        return 130
