"""`rvlm vlm` and `rvlm policy`: train the shipped models again; ``--install`` replaces those in the package."""

from __future__ import annotations

import argparse
from typing import Any

from rvlm.cli import add_command
from rvlm.files import ROOT, artifacts_dir
from rvlm.report.notebooks import InvalidRun, parameters_in, read_profiles

SHIPPED = "full"  # profile of the shipped models
NOTEBOOKS = {"vlm": "01_load_a_vlm", "policy": "05_train_in_stages"}  # whose parameters are used
ASSETS = {"vlm": "rvlm/assets/small-vlm", "policy": "rvlm/assets/policy"}
WHAT = {"vlm": "vision-language model (stage 1)", "policy": "policy (stage 2)"}
WHERE = """The model is written to artifacts/shipped/{name} (RVLM_HOME moves artifacts/), with a model card.
--install replaces {asset}, which notebooks and tests use; only with profile full.
Profile full takes hours on a CPU; a stopped run resumes.

examples:
  rvlm {name} --profile smoke
  rvlm {name} --install"""


def add_models(commands: Any) -> None:
    """Add both commands to the parser."""
    for name, what in WHAT.items():
        where = WHERE.format(name=name, asset=ASSETS[name])
        command = add_command(commands, name, f"train the shipped {what} again", where)
        command.add_argument("--profile", default=SHIPPED, help="sizes, from notebooks/profiles.yaml (default: %(default)s)")
        command.add_argument("--install", action="store_true", help="replace the shipped one")
        command.set_defaults(run=_ship, name=name)


def _ship(arguments: argparse.Namespace) -> int:
    name, profile = arguments.name, arguments.profile
    sizes = _sizes(profile, NOTEBOOKS[name])
    if arguments.install and profile != SHIPPED:
        raise InvalidRun(
            f"--install replaces the {name} that ships, whose sizes are profile {SHIPPED}'s; got profile {profile!r}"
        )
    from rvlm.envs.demonstrations import Collection
    from rvlm.experiments import recipes
    from rvlm.experiments.release import release

    target = {"vlm": recipes.SMALL_VLM, "policy": recipes.POLICY}[name]
    if not arguments.install:
        target = artifacts_dir() / "shipped" / name
        print(f"writing {target}; the {name} that ships stays (--install replaces it)", flush=True)
    stages = {
        "vlm": lambda: recipes.vision_language(sizes["n_scenes"], sizes["n_samples"]),
        "policy": lambda: recipes.main_policy(Collection(n_episodes=sizes["n_episodes"]), sizes["n_samples"]),
    }
    print(release(stages[name](), target, f"rvlm {name} --profile {profile}"))
    return 0


def _sizes(profile: str, stem: str) -> dict[str, Any]:
    profiles = read_profiles(ROOT / "notebooks")
    if profile not in profiles:
        raise InvalidRun(f"no profile {profile!r}; those in notebooks/profiles.yaml: {', '.join(profiles)}")
    return parameters_in(profiles, profile, stem)
