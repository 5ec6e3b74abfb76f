"""The model card of a policy: conventions, statistics, training data, success rates and limits.

Everything that the policy holds is computed from it; success, licence and further limits are arguments.
"""

import functools
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

from rvlm.data.groups import Group
from rvlm.policy.embodiments import Embodiment
from rvlm.provenance import provenance
from rvlm.statistics import Rate

LIMITS = (
    "It was trained for the robot, cameras, image size and control rate below; anything else is refused, or untested.",
    "It was trained on the tasks and instructions of its demonstrations. Its behaviour under other instructions is not known.",
    "It does not avoid collisions or limit forces: the robot's controller must.",
)


def model_card(
    model: Any,
    success: Mapping[str, Rate] | None = None,
    license_name: str | None = None,
    limits: Sequence[str] = (),
) -> str:
    """Text of a policy's `README.md`, with the Hub's metadata first.

    Args:
        model: `VLA`.
        success: Name of a setting -> success rate with its interval, as `rvlm.statistics.wilson` gives it.
        license_name: As the Hub names it, such as "apache-2.0"; the licences of base model and data bind it.
        limits: Further limitations, one sentence each.
    """
    vlm = model.config.vlm or {}
    metadata: dict[str, Any] = {
        "library_name": "rvlm",
        "pipeline_tag": "robotics",
        "tags": ["robotics", "vision-language-action"],
    }
    metadata |= {"license": license_name} if license_name else {}
    metadata |= {"base_model": vlm["name"]} if vlm.get("revision") else {}
    robots = [Embodiment(model.spec, model.stats), *model.embodiments.values()]
    parts = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False) + "---",
        f"# A robot policy for {model.spec.robot}",
        "```python\nfrom rvlm import load_policy\n\npolicy = load_policy(folder_or_hub_name, revision=commit)\n```",
        "## Model\n" + _list(_architecture(model)),
        *(part for robot in robots for part in _robot(robot)),
        "## Success\n" + _success(success or {}),
        "## Limits\n" + _list([*LIMITS, *limits]),
        "## Licence\n" + (license_name or "Not stated. The licences of base model and data bind it."),
        "## Made by\n" + _made_by(),
    ]
    return "\n\n".join(parts) + "\n"


def _architecture(model: Any) -> list[str]:
    """Vision-language model, backbone, structure and inputs."""
    config, vlm = model.config, model.config.vlm or {}
    size = config.image_size and f"{config.image_size[0]} x {config.image_size[1]} px"
    return [
        f"Vision-language model: {vlm.get('name', 'not recorded')}, revision {vlm.get('revision') or 'none, a folder'}.",
        f"Backbone: {config.backbone['model_type']}; "
        + (
            f"referenced, not stored: {config.base_model['finetuning']} over weights {config.base_model['weights']}."
            if config.base_model
            else "stored."
        ),
        f"Structure {config.structure}, head {config.head}, history {config.history or 'none'}, {config.n_obs_steps} "
        f"observation(s); predicts {config.chunk_size} actions, executes {config.n_action_steps}.",
        f"Inputs: {', '.join(config.cameras)} ({size or 'size not recorded'}, uint8 RGB){' and the state' * config.has_state}.",
    ]


def _robot(robot: Embodiment) -> list[str]:
    """Conventions of a robot's actions and state, and their normalisation statistics."""
    spec, action, state = robot.spec, robot.stats["action"], robot.stats["observation.state"]
    absent = f" It has no {', '.join(spec.absent)}." if spec.absent else ""
    actions = [
        (name, unit, f"{_number(low)} to {_number(high)}", _number(scale), *_quantiles(action, i))
        for i, (name, unit, low, high, scale) in enumerate(
            zip(spec.names, spec.units, spec.low, spec.high, spec.scale, strict=True)
        )
    ]
    states = [
        (name, unit, f"{_number(state.min[i])} to {_number(state.max[i])}", *_quantiles(state, i))
        for i, (name, unit) in enumerate(zip(spec.state_names, spec.state_units, strict=True))
    ]
    return [
        f"## Data and conventions: {spec.dataset}\n{action.count} training frames of {spec.robot}. Statistics are of these "
        f"frames; normalisation: {action.kind}.",
        f"Actions at {spec.rate_hz:g} Hz:{absent}\n\n" + _list([_group(group) for group in spec.action]),
        _table(("action", "unit", "raw range", "units per raw 1", "q01", "median", "q99"), actions),
        "State:\n\n" + _list([_group(group) for group in spec.state]),
        _table(("state", "unit", "range in training", "q01", "median", "q99"), states),
    ]


_IN_WORDS = {
    "pose_delta": "displacement of the hand",
    "pose": "pose of the hand",
    "joint_delta": "displacements of joints",
    "joint": "positions of joints",
    "base_velocity": "velocity of the base",
    "other": "other numbers",
}


def _group(group: Group) -> str:
    """What a group of dimensions is, with its conventions."""
    names = ", ".join(group.names)
    if group.kind == "gripper":
        ends = "" if group.open is None or group.close is None else f", {_number(group.open)} open, {_number(group.close)} closed"
        return f"{names}: gripper{ends}{', either of the two' * group.is_binary}."
    frame = f" in frame {group.frame!r}" if group.frame else ""
    rotation = f", rotation as {group.rotation}" if group.rotation not in (None, "", "none") else ""
    return f"{names}: {_IN_WORDS[group.kind]}{frame}{rotation}."


def _quantiles(stats: Any, i: int) -> tuple[str, str, str]:
    return _number(stats.q01[i]), _number(stats.q50[i]), _number(stats.q99[i])


def _number(value: float) -> str:
    return f"{value:.4g}"


def _success(success: Mapping[str, Rate]) -> str:
    if not success:
        return "Not measured when this card was written."
    rows = [(name, f"{r.successes}/{r.n}", f"{r.rate:.0%}", f"{r.low:.0%} to {r.high:.0%}") for name, r in success.items()]
    return _table(("setting", "successes", "rate", "95 % interval"), rows)


@functools.cache
def _code() -> dict[str, Any]:
    return provenance()  # once a process, since it calls git


def _made_by() -> str:
    made, today = _code(), datetime.now(UTC).date().isoformat()
    commit = made["commit"] or "not recorded"
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return f"Commit {commit}{' with changes' * made['is_dirty']}, {today}; {versions}."


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
