"""Common errors in reading images and actions: the candidates that a failing check tries, and faults to inject."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

IMAGE_ERRORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # fault -> images (..., h, w, 3) with it
    "image rotated by 180 degrees": lambda images: images[..., ::-1, ::-1, :],
    "image upside down": lambda images: images[..., ::-1, :, :],
    "image mirrored": lambda images: images[..., ::-1, :],
    "channels reversed": lambda images: images[..., ::-1],
}


def _convert_rotation(spec: Any, actions: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    scale, out = np.asarray(spec.scale[3:6]), actions.copy()
    out[:, 3:6] = convert(actions[:, 3:6] * scale) / scale
    return out


def _change_arm(spec: Any, actions: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([change(actions[:, spec.arm_slice]), actions[:, spec.arm_slice.stop :]], axis=1)


ACTION_MISREADINGS: dict[str, Callable[[Any, np.ndarray], np.ndarray]] = {  # "fault: how" -> actions (n, a), corrected
    "gripper sign": lambda spec, a: spec.set_grippers(a, ~spec.is_open(a)),
    "rotation layout: stored as euler angles": lambda spec, a: _convert_rotation(
        spec, a, lambda euler: Rotation.from_euler("xyz", euler).as_rotvec()
    ),
    "rotation layout: stored as axis angle": lambda spec, a: _convert_rotation(
        spec, a, lambda vector: Rotation.from_rotvec(vector).as_euler("xyz")
    ),
    "control rate: too slow": lambda spec, a: _change_arm(spec, a, lambda arm: 0.5 * arm),
    "control rate: too fast": lambda spec, a: _change_arm(spec, a, lambda arm: 2 * arm),
    "delta taken twice": lambda spec, a: _change_arm(spec, a, lambda arm: np.cumsum(arm, axis=0)),
}
