"""Groups of an action beside the groups of the state that show the same: which dimension is which, in which units."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rvlm.data.dimensions import place_of
from rvlm.data.errors import SpecMismatch
from rvlm.data.groups import Group
from rvlm.data.spec_dimensions import Dimensions

SI = {"deg": ("rad", np.pi / 180), "cm": ("m", 0.01), "mm": ("m", 0.001)}  # unit -> SI unit, and how much of it; others are SI


def same_places(action: Group, state: Group) -> list[tuple[int, int]]:
    """Positions or joints of both groups whose names have the same place: their indices in either."""
    ours, theirs = ([place_of(name) for name in group.names[: group.n_position]] for group in (action, state))
    return [(i, theirs.index(place)) for i, place in enumerate(ours) if place in theirs]


def unit_ratios(units: Sequence[str], others: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """What numbers (d,) in `units` are multiplied by to be in `others`: degrees and radians, metres and parts of them.

    Raises:
        SpecMismatch: Units of different things, of the named dimensions.
    """
    pairs = [(SI.get(unit, (unit, 1.0)), SI.get(other, (other, 1.0))) for unit, other in zip(units, others, strict=True)]
    wrong = [name for name, (ours, theirs) in zip(names, pairs, strict=True) if ours[0] != theirs[0]]
    if wrong:
        raise SpecMismatch(
            f"expected units that can be converted, as {sorted(SI)} to rad and m, got {list(units)} for {list(others)} of "
            f"{list(names)}, which differ in {wrong}; write the units that the robot has into the card"
        )
    return np.array([ours[1] / theirs[1] for ours, theirs in pairs])


def gripper_command(action: Group, state: Group, value: float) -> float | None:
    """The raw action that keeps a gripper where the state's number says it is; None where the card does not tell.

    It does by `open` and `close` of the state, or by numbers of the action's unit.
    """
    closed, opened = action.gripper_ends
    if state.open is not None and state.close is not None:
        share = (value - state.close) / (state.open - state.close)
    elif state.units[0] == action.units[0] and len(state.names) == 1:
        share = (value / action.scale[0] - closed) / (opened - closed)
    else:
        return None
    if action.is_binary:
        return opened if share > 0.5 else closed
    return float(np.clip(closed + share * (opened - closed), action.low[0], action.high[0]))


def gripper_in_state(spec: Dimensions, action: Group) -> tuple[slice, Group] | None:
    """The gripper of the state with the action's name, or the only one of either; None where several numbers or none tell it."""
    grippers = [placed for placed in spec.state_groups("gripper") if len(placed[1].names) == 1]
    named = [placed for placed in grippers if same_places(action, placed[1])]
    is_only = len(grippers) == len(spec.state_groups("gripper")) == len(spec.action_groups("gripper")) == 1
    return (named or (grippers if is_only else [None]))[0]
