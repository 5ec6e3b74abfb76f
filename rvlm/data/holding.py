"""The action that holds a robot still."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch

MOTIONS = ("pose_delta", "joint_delta", "base_velocity")  # kinds of which 0 is no motion


def hold_action(spec: ActionSpec, last: np.ndarray | None, states: Sequence[np.ndarray]) -> np.ndarray:
    """Raw actions ``(n, a)`` that hold n robots: displacements and velocities 0, all else as it was sent last.

    Args:
        spec: Of the robots.
        last: Actions ``(n, a)`` that were sent before; None at an episode's start, where targets are taken from the
            state of the same names and units, and grippers that it does not tell so are opened.
        states: State ``(s,)`` of each robot.

    Raises:
        SpecMismatch: Nothing was sent yet, and the state lacks a target's dimension.
    """
    held = spec.set_grippers(np.zeros((len(states), spec.n_dims), np.float32), True) if last is None else np.array(last)
    units = dict(zip(spec.state_names, spec.state_units, strict=True))
    for at, group in spec.placed_action:
        is_told = [units.get(name) == unit for name, unit in zip(group.names, group.units, strict=True)]
        if group.kind in MOTIONS:
            held[:, at] = 0
        elif last is None and all(is_told) and not group.is_binary:
            present = np.stack(states)[:, [spec.state_names.index(name) for name in group.names]]
            held[:, at] = present / np.asarray(group.scale)
        elif last is None and group.kind != "gripper":
            missing = [name for name, told in zip(group.names, is_told, strict=True) if not told]
            raise SpecMismatch(
                f"{spec.dataset}: expected the present value of {missing} in the state to hold before the first action, got a "
                f"state of {list(spec.state_names)} in {list(spec.state_units)}; name the state's dimensions like the action's, "
                "or begin without delay"
            )
    return held
