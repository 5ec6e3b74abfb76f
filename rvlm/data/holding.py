"""The action that holds a robot still."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.data.groups import Group
from rvlm.data.pairing import gripper_command, gripper_in_state, unit_ratios
from rvlm.data.rotations import from_rotation, in_turn, to_rotation

MOTIONS = ("pose_delta", "joint_delta", "base_velocity")  # kinds of which 0 is no motion


def hold_action(spec: ActionSpec, last: np.ndarray | None, states: Sequence[np.ndarray]) -> np.ndarray:
    """Raw actions ``(n, a)`` that hold n robots: displacements and velocities 0, all else as it was sent last.

    Args:
        spec: Of the robots.
        last: Actions ``(n, a)`` that were sent before; None at an episode's start, where targets are taken from the
            state of the same kind and names, in the action's units, layout and range; grippers that it does not tell
            are opened.
        states: State ``(s,)`` of each robot.

    Raises:
        SpecMismatch: Nothing was sent yet, and the state lacks a target's dimension, or has it in another frame or unit.
    """
    held = spec.set_grippers(np.zeros((len(states), spec.n_dims), np.float32), True) if last is None else np.array(last)
    for at, group in spec.placed_action:
        if group.kind in MOTIONS:
            held[:, at] = 0
        elif last is None and group.kind == "gripper":
            held[:, at] = _gripper(spec, group, states, held[:, at])
        elif last is None and not set(group.absent) >= set(group.names):
            target = _present(spec, group, np.stack(states)) / np.asarray(group.scale)
            target[:, group.n_position :] = in_turn(target[:, group.n_position :], group)
            held[:, at] = np.where([name in group.absent for name in group.names], 0, np.clip(target, group.low, group.high))
    return held


def _gripper(spec: ActionSpec, group: Group, states: Sequence[np.ndarray], opened: np.ndarray) -> np.ndarray:
    """Raw values ``(n, 1)`` of a gripper that stays as the state tells."""
    shown = gripper_in_state(spec, group)
    if shown is None:
        return opened
    values = [gripper_command(group, shown[1], float(state[shown[0].start])) for state in states]
    return np.array([[own if value is None else value] for own, value in zip(opened[:, 0], values, strict=True)])


def _present(spec: ActionSpec, group: Group, states: np.ndarray) -> np.ndarray:
    """Where the state ``(n, s)`` says that a target is: ``(n, d)`` in the group's units, frame and layout."""
    n, found = group.n_position, [(place, shown) for place, shown in spec.state_groups(group.kind)]
    where = {name: (place.start + i, shown) for place, shown in found for i, name in enumerate(shown.names)}
    positions = [name for name in group.names[:n] if name not in group.absent]
    shown = where[positions[0]][1] if positions and positions[0] in where else group
    names = [*positions, *(group.names[n:] if shown.rotation == group.rotation and shown is not group else ())]
    missing = [name for name in names if name not in where and name not in group.absent]
    if missing or shown is group or (group.rotation != "none" and shown.rotation == "none") or (shown.frame != group.frame):
        frames = [f"{g.kind} {list(g.names)} {g.frame} {g.rotation}" for _, g in spec.placed_state]
        raise SpecMismatch(
            f"{spec.dataset}: expected the present value of {missing or list(group.names)} {group.frame} {group.rotation} in the "
            f"state to hold before the first action, got a state of {list(spec.state_names)} ({'; '.join(frames)}); name the "
            "state's dimensions like the action's, in the same frame, or begin without delay"
        )
    return _converted(group, shown, states, {name: where[name] for name in positions}, found)


def _converted(group: Group, shown: Group, states: np.ndarray, where: dict, found: Sequence) -> np.ndarray:
    out = np.zeros((len(states), len(group.names)))
    units = [own.units[own.names.index(name)] for name, (_, own) in where.items()]
    taken = [group.units[group.names.index(name)] for name in where]
    for (name, (column, _)), ratio in zip(where.items(), unit_ratios(units, taken, list(where)), strict=True):
        out[:, group.names.index(name)] = states[:, column] * ratio
    if group.rotation != "none":
        (place,) = (place for place, own in found if own is shown)
        numbers = states[:, place.start + shown.n_position : place.stop]
        if (group.rotation, group.radians) != (shown.rotation, shown.radians):
            turned = from_rotation(to_rotation(numbers * shown.radians, shown.rotation), group.rotation)
            numbers = turned.reshape(len(states), -1) / group.radians
        out[:, group.n_position :] = numbers
    return out
