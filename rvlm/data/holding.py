"""The action that holds a robot still."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch


def hold_action(spec: ActionSpec, last: np.ndarray | None, states: Sequence[np.ndarray]) -> np.ndarray:
    """Raw actions ``(n, a)`` that hold n robots: no displacement, absolute dimensions and grippers as last sent.

    Args:
        spec: Of the robots.
        last: Actions ``(n, a)`` that were sent before; None at an episode's start, where absolute dimensions are taken from the
            state of the same names, and grippers are opened.
        states: State ``(s,)`` of each robot.

    Raises:
        SpecMismatch: Nothing was sent yet, and the state lacks an absolute dimension of the action.
    """
    held = np.zeros((len(states), spec.n_dims), np.float32) if last is None else np.array(last)
    for place, _ in spec.action_groups("pose_delta", "joint_delta", "base_velocity"):
        held[:, place] = 0
    if last is None and (groups := spec.action_groups("pose", "joint", "other")):
        names = [name for _, group in groups for name in group.names]
        missing = [name for name in names if name not in spec.state_names]
        if missing:
            raise SpecMismatch(
                f"{spec.dataset}: expected the present value of {missing} in the state to hold before the first action, "
                f"got a state of {list(spec.state_names)}; name the state's dimensions like the action's, or begin without delay"
            )
        at = [spec.names.index(name) for name in names]
        held[:, at] = np.stack(states)[:, [spec.state_names.index(name) for name in names]]
    return held if last is not None else spec.set_grippers(held, True)
