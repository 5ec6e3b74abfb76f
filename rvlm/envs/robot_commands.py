"""Actions of a card as commands of a robot: for each of its names a target, within limits; and where it is held.

Targets are absolute, so a robot holds still where it is sent where it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.data.groups import Group
from rvlm.data.pairing import gripper_command, gripper_in_state, same_places, unit_ratios
from rvlm.envs.group_commands import TARGET_KINDS, GroupCommand, GroupLimits, displacement_shares, require_limits

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
    if len(limits) != len(spec.placed_action) or not all(isinstance(own, GroupLimits) for own in limits):
        kinds = [f"{group.kind} {list(group.names)}" for _, group in spec.placed_action]
        types = [type(own).__name__ for own in limits]
        raise SpecMismatch(
            f"expected limits of each action group, {'; '.join(kinds)}; got {len(limits)}, {types}; give a GroupLimits for each"
        )
    commands = []
    for (at, group), own in zip(spec.placed_action, limits, strict=True):
        if set(group.absent) >= set(group.names):
            continue
        target = moved_group(spec, group) if group.kind in TARGET_KINDS else group
        require_limits(group, target, own)
        present = [name for name in target.names if name not in group.absent]
        found = dict(zip(present, robot_names(present, keys, robot_keys), strict=True))
        commands.append(GroupCommand(group, at, target, tuple(found.get(name, "") for name in target.names), own))
    return commands


def moved_group(spec: ActionSpec, group: Group) -> Group:
    """The group of the state that a displacement moves, which is named like it.

    Raises:
        SpecMismatch: There is none of its kind, or none that it can be added to.
    """
    kind = TARGET_KINDS[group.kind]
    targets = [target for _, target in spec.state_groups(kind)]
    if not targets:
        raise SpecMismatch(
            f"{spec.dataset}: expected a {kind} group in the state for {list(group.names)} to be added to, got "
            f"{[other.kind for other in spec.state]}; add the robot's {kind} to the card's state"
        )
    target = max(targets, key=lambda target: len(same_places(group, target)))
    displacement_shares(group, target)
    return target


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
        sent = [key for command in self.groups for key in command.keys if key]
        told = [key for key, feature in robot.observation_features.items() if not isinstance(feature, tuple)]
        untold = [key for command in self.groups if command.is_position for key in command.keys if key and key not in told]
        if untold or len(set(sent)) < len(sent):
            raise KeyError(
                f"expected one dimension for each of the robot's numbers, and positions that it also tells, got {sent}; of these "
                f"it does not tell {untold}; it tells {told}"
            )
        unknown = sorted(set(keys) - {*spec.names, *spec.state_names})
        if unknown:
            raise KeyError(f"keys names {unknown}, which the card does not have; it has {[*spec.names, *spec.state_names]}")
        self._ratios = self._read_ratios(dict(zip(robot_names(spec.state_names, keys, told), spec.state_units, strict=True)))
        self._told = [key for key in sent if key in told]
        self._grippers = [
            (command, shown[1], robot_names(shown[1].names, keys, told)[0])
            for command in self.groups
            if (shown := gripper_in_state(spec, command.group)) and command.group.kind == "gripper"
        ]
        self.present: Values = {}
        self.last: Values = {}

    @property
    def told(self) -> tuple[str, ...]:
        """The robot's names of the numbers that `observe` reads."""
        return (*self._told, *(key for *_, key in self._grippers))

    def _read_ratios(self, units: Mapping[str, str]) -> Values:
        """Key of a position -> what a told number is multiplied by to be in the unit of the target."""
        ratios: Values = {}
        for command in self.groups:
            names = [(key, unit) for key, unit in zip(command.keys, command.target.units, strict=True) if key in units]
            if command.is_position and names:
                own, taken = [key for key, _ in names], [unit for _, unit in names]
                ratios |= dict(zip(own, unit_ratios([units[key] for key in own], taken, own).tolist(), strict=True))
        return ratios

    def start(self) -> None:
        """Begin an episode: grippers are as they were sent last, all else is where it is."""
        grippers = [command.keys[0] for command in self.groups if command.group.kind == "gripper"]
        self.last = {key: self.last[key] for key in grippers if key in self.last}

    def observe(self, observation: Mapping[str, Any]) -> None:
        """Take note of where the robot is.

        Raises:
            ValueError: It tells a number that is not finite; where it was before is kept.
        """
        present = {key: float(observation[key]) * self._ratios.get(key, 1.0) for key in self._told}
        for command, shown, key in self._grippers:
            present.pop(command.keys[0], None)
            raw = gripper_command(command.group, shown, float(observation[key]))
            present |= {} if raw is None else {command.keys[0]: raw * command.group.scale[0]}
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
            wanted = command.values(action[command.at], present, last)
            is_known = command.group.kind != "gripper" or command.keys[0] in {*self.present, *self.last}
            limited = command.limited(wanted, last if is_known else wanted)
            was_limited |= not np.allclose(limited, wanted, rtol=0, atol=1e-12)
            values |= driven(command, limited)
        return values, was_limited

    def hold(self) -> Values:
        """What holds the robot: positions where they are, velocities 0, grippers as sent last, else as told, else opened."""
        values: Values = {}
        for command in self.groups:
            if command.group.kind == "base_velocity":
                held = np.zeros(len(command.keys))
            elif command.is_position:
                held = np.array([self.present.get(key, np.nan) for key in command.keys])
            else:
                opened = np.multiply(command.group.gripper_ends[1], command.group.scale)
                known = {command.keys[0]: float(np.clip(opened, command.low, command.high)[0]), **self.present, **self.last}
                held = np.array([known[command.keys[0]]])
            values |= {key: value for key, value in driven(command, held).items() if not np.isnan(value)}
        return values


def driven(command: GroupCommand, target: Float[np.ndarray, " s"]) -> Values:
    """The robot's names and values of a target, without absent dimensions."""
    return {key: float(value) for key, value, sent in zip(command.keys, target, command.is_driven, strict=True) if sent and key}
