"""Actions of a card as commands of a robot: for each of its names a target, within limits; and where it is held.

Targets are absolute, so a robot holds still where it is sent where it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.envs.group_commands import TARGET_KINDS, GroupCommand, GroupLimits, require_layout, require_limits

Values = dict[str, float]  # the robot's name -> value


def group_commands(
    spec: ActionSpec, keys: Mapping[str, str], limits: Sequence[GroupLimits], robot_keys: Sequence[str]
) -> list[GroupCommand]:
    """How each action group of a card is sent.

    Args:
        spec: The card.
        keys: Dimension -> the robot's name; those left out are called `NAME` or `NAME.pos` there.
        limits: Of each action group, in the card's order.
        robot_keys: Names of what the robot takes.

    Raises:
        SpecMismatch: A displacement without a pose or joints in the state to add it to, or a limit that safety needs is missing.
        KeyError: The robot takes no value of a dimension.
    """
    if len(limits) != len(spec.placed_action):
        kinds = [f"{group.kind} {list(group.names)}" for _, group in spec.placed_action]
        raise SpecMismatch(f"expected limits of each action group, {'; '.join(kinds)}; got {len(limits)}")
    targets = {kind: iter([group for _, group in spec.state_groups(kind)]) for kind in TARGET_KINDS.values()}
    commands = []
    for (at, group), own in zip(spec.placed_action, limits, strict=True):
        kind = TARGET_KINDS.get(group.kind)
        target = next(targets[kind], None) if kind else group
        if target is None:
            raise SpecMismatch(
                f"{spec.dataset}: expected a {kind} group in the state for {list(group.names)} to be added to, got "
                f"{[other.kind for other in spec.state]}; add the robot's {kind} to the card's state"
            )
        require_layout(group, target)
        require_limits(group, target, own)
        commands.append(GroupCommand(group, at, target, robot_names(target.names, keys, robot_keys), own))
    return commands


def robot_names(names: Sequence[str], keys: Mapping[str, str], robot_keys: Sequence[str]) -> tuple[str, ...]:
    """The robot's names of dimensions.

    Raises:
        KeyError: It has none for some, with those that exist.
    """
    found = [
        next((k for k in ([keys[name]] if name in keys else [name, f"{name}.pos"]) if k in robot_keys), None) for name in names
    ]
    missing = [keys.get(name, name) for name, key in zip(names, found, strict=True) if key is None]
    if missing:
        raise KeyError(
            f"the robot has no number called {missing}; it has {list(robot_keys)}; name one of these for each by "
            "keys={dimension: name}, or add it to the robot"
        )
    return tuple(key for key in found if key is not None)


class RobotCommands:
    """The commands of a robot: targets of actions, and where it is held.

    Args:
        spec: The card.
        keys, limits: As `group_commands` takes them.
        robot: With `action_features` and `observation_features`, as `lerobot.robots.Robot`.

    Attributes:
        present: What the robot told last of all that it is sent targets of.
        last: What it was sent last in this episode.

    Raises:
        SpecMismatch, KeyError: As `group_commands`; or the robot does not tell where it is.
    """

    def __init__(self, spec: ActionSpec, keys: Mapping[str, str], limits: Sequence[GroupLimits], robot: Any) -> None:
        self.groups = group_commands(spec, keys, limits, list(robot.action_features))
        sent = [key for command in self.groups for key in command.keys]
        told = [key for key, feature in robot.observation_features.items() if not isinstance(feature, tuple)]
        untold = [key for command in self.groups if command.is_position for key in command.keys if key not in told]
        if untold or len(set(sent)) < len(sent):
            raise KeyError(
                f"expected one dimension for each of the robot's numbers, and positions that it also tells, got {sent}; of these "
                f"it does not tell {untold}; it tells {told}"
            )
        self._told = [key for key in sent if key in told]
        self.present: Values = {}
        self.last: Values = {}

    def start(self) -> None:
        """Begin an episode."""
        self.last = {}

    def observe(self, observation: Mapping[str, Any]) -> None:
        """Take note of where the robot is.

        Raises:
            ValueError: It tells a number that is not finite; where it was before is kept.
        """
        present = {key: float(observation[key]) for key in self._told}
        if not np.isfinite(list(present.values())).all():
            raise ValueError(f"expected finite numbers of the robot, got {present}; check its sensors")
        self.present = present

    def target(self, action: Float[np.ndarray, " a"]) -> tuple[Values, bool]:
        """What is sent for a raw action (a,) within the card's range, and whether a limit changed it.

        Raises:
            RuntimeError: The robot is more than a step outside its limits.
        """
        values, was_limited = {}, False
        for command in self.groups:
            present = np.array([self.present.get(key, 0.0) for key in command.keys])
            if command.is_position and not command.is_within_reach(present):
                n = command.target.n_position
                raise RuntimeError(
                    f"expected {list(command.target.names[:n])} from {command.low.tolist()} to {command.high.tolist()}, or "
                    f"within a step of it, got {present[:n].tolist()}; nothing was sent; move the robot there by hand"
                )
            last = np.array([self.last.get(key, at) for key, at in zip(command.keys, present, strict=True)])
            wanted = command.values(action[command.at], present)
            limited = command.limited(wanted, last)
            was_limited |= not np.allclose(limited, wanted, rtol=0, atol=1e-12)
            values |= dict(zip(command.keys, map(float, limited), strict=True))
        return values, was_limited

    def hold(self) -> Values:
        """What holds the robot: positions where they are, grippers as they were sent, velocities 0."""
        values: Values = {}
        for command in self.groups:
            if command.target.kind == "base_velocity":
                values |= dict.fromkeys(command.keys, 0.0)
                continue
            known = self.present if command.is_position else {**self.present, **self.last}
            values |= {key: known[key] for key in command.keys if key in known}
        return values
