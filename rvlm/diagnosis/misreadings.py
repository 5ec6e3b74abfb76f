"""Common errors in reading images and actions: the candidates that a failing check tries, and faults to inject."""

from collections.abc import Callable

import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.data.groups import LAYOUTS, Group
from rvlm.data.rotations import from_rotation, to_rotation

IMAGE_ERRORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # fault -> images (..., h, w, 3) with it
    "image rotated by 180 degrees": lambda images: images[..., ::-1, ::-1, :],
    "image upside down": lambda images: images[..., ::-1, :, :],
    "image mirrored": lambda images: images[..., ::-1, :],
    "channels reversed": lambda images: images[..., ::-1],
}


def change_groups(
    spec: ActionSpec, actions: np.ndarray, kinds: tuple[str, ...], change: Callable[[np.ndarray, Group], np.ndarray]
) -> np.ndarray:
    """Raw actions (..., a) with the columns of all groups of some kinds changed."""
    out = np.array(actions)
    for at, group in spec.action_groups(*kinds):
        out[..., at] = change(out[..., at], group)
    return out


def change_displacements(spec: ActionSpec, actions: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Raw actions (..., a) with all displacements of hand and joints changed; targets stay."""
    return change_groups(spec, actions, ("pose_delta", "joint_delta"), lambda values, group: change(values))


def flip_grippers(spec: ActionSpec, actions: np.ndarray) -> np.ndarray:
    """Raw actions (..., a) that close where they opened."""
    return change_groups(spec, actions, ("gripper",), lambda values, group: sum(group.gripper_ends) - values)


def relayout(spec: ActionSpec, actions: np.ndarray, source: str, target: str) -> np.ndarray:
    """Raw actions (n, a) with rotations of `target`'s number of values read in layout `source` and written in `target`."""

    def change(values: np.ndarray, group: Group) -> np.ndarray:
        if LAYOUTS[group.rotation] != LAYOUTS[target]:
            return values
        n, scale = group.n_position, np.array(group.scale)
        turned = from_rotation(to_rotation(values[:, n:] * scale[n:], source), target) / scale[n:]
        return np.concatenate([values[:, :n], turned], axis=1)

    return change_groups(spec, actions, ("pose", "pose_delta"), change)


ACTION_MISREADINGS: dict[str, Callable[[ActionSpec, np.ndarray], np.ndarray]] = {  # "fault: how" -> actions (n, a), corrected
    "gripper sign": flip_grippers,
    "rotation layout: stored as euler angles": lambda spec, a: relayout(spec, a, "euler_xyz", "axis_angle"),
    "rotation layout: stored as axis angle": lambda spec, a: relayout(spec, a, "axis_angle", "euler_xyz"),
    "delta taken twice": lambda spec, a: change_displacements(spec, a, lambda values: np.cumsum(values, axis=0)),
}
