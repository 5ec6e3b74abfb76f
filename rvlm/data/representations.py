"""Chunks relative to the present state, as a representation of raw actions for training.

Source: chunks relative to the state, as pi0 trains joints: Black et al. 2024 (arXiv 2410.24164), appendix; for poses, Chi et al.
2024 (UMI, arXiv 2402.10329), section IV.
"""

from __future__ import annotations

import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.data.groups import LAYOUTS, Group
from rvlm.data.rotations import from_rotation, nearest_encoding, to_rotation

REPRESENTATIONS = ("recorded", "relative")


def relative_groups(spec: ActionSpec) -> list[tuple[slice, slice, Group]]:
    """Place in the action, place in the state, and group of what "relative" subtracts: targets of poses and of joints.

    Raises:
        SpecMismatch: There is none, or the state does not hold one of them, as the same kind, by the same names, in the same
            units (so the action has no scale), frame and layout.
    """
    of_names = {group.names: (place, group) for place, group in spec.placed_state}
    out = []
    for place, group in spec.action_groups("pose", "joint"):
        at, held = of_names.get(group.names, (None, None))
        if at is None or held is None or _conventions(held) != _conventions(group) or set(group.scale) != {1.0}:
            has = [f"{list(names)} as {_conventions(g)}" for names, (_, g) in of_names.items()]
            raise SpecMismatch(
                f"{spec.dataset}: relative actions need the state to hold {list(group.names)} as a group, in the action's frame, "
                f"rotation layout and raw units, {_conventions(group)} at scale 1, got scale {list(group.scale)} and a state "
                f"of {', '.join(has)}; take action_representation='recorded'"
            )
        out.append((place, at, group))
    if not out:
        raise SpecMismatch(
            f"{spec.dataset}: expected targets of a pose or joints to make relative, got {[g.kind for g in spec.action]}, which "
            "are displacements already; take action_representation='recorded'"
        )
    return out


def relative_actions(spec: ActionSpec, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Raw actions ``(..., a)`` -> the same relative to raw states ``(..., s)`` that broadcast against them."""
    return _converted(spec, actions, state, -1)


def absolute_actions(spec: ActionSpec, relative: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Inverse of `relative_actions`, with quaternions on the half sphere of the state's."""
    return _converted(spec, relative, state, 1)


def _conventions(group: Group) -> str:
    return " ".join(filter(None, (group.kind, *group.units, group.frame, group.rotation)))


def _converted(spec: ActionSpec, actions: np.ndarray, state: np.ndarray, sign: int) -> np.ndarray:
    out = np.array(actions)
    for place, at, group in relative_groups(spec):
        n = len(group.names) - LAYOUTS[group.rotation]
        out[..., place.start : place.start + n] += sign * state[..., at.start : at.start + n]
        if n < len(group.names):
            rotations = slice(place.start + n, place.stop)
            present = np.broadcast_to(state[..., at.start + n : at.stop], out[..., rotations].shape)
            out[..., rotations] = _rotated(out[..., rotations], present, group, sign)
        out[..., [place.start + i for i, name in enumerate(group.names) if name in group.absent]] = 0
    return out


def _rotated(rotation: np.ndarray, present: np.ndarray, group: Group, sign: int) -> np.ndarray:
    turned, start = (to_rotation(numbers * group.radians, group.rotation) for numbers in (rotation, present))
    out = from_rotation(turned * (start.inv() if sign < 0 else start), group.rotation).reshape(rotation.shape) / group.radians
    return out if sign < 0 else nearest_encoding(out, present, group)
