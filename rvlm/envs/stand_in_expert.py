"""Pictures of where to go, and the action that goes there, of any card's robot: the expert of `rvlm.envs.stand_in`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from scipy.spatial.transform import Rotation

from rvlm.data.actions import ActionSpec
from rvlm.data.groups import LAYOUTS, Group
from rvlm.data.rotations import from_rotation, to_rotation

REACH = {"m": 0.12, "rad": 0.5, "deg": 40.0, "px": 120.0}  # furthest point from the start [unit]
STEP = {"m": 0.02, "rad": 0.08, "deg": 6.0, "px": 20.0}  # the expert's largest displacement in a step [unit]
MOVING = ("pose", "pose_delta", "joint", "joint_delta")


def n_coordinates(group: Group) -> int:
    """Coordinates of a point to go to: positions, three of a rotation, one of a gripper."""
    if group.kind not in MOVING:
        return int(group.kind == "gripper")
    return group.n_position + 3 * (LAYOUTS[group.rotation] > 0)


def of_units(table: Mapping[str, float], group: Group) -> Float[np.ndarray, " d"]:
    """A number for each dimension by its unit; 0.1 for other units."""
    return np.array([table.get(unit, 0.1) for unit in group.units])


def draw(shares: Float[np.ndarray, " m"], size: tuple[int, int], camera: int) -> UInt8[np.ndarray, "h w 3"]:
    """An image that shows numbers in [-1, 1] as red blocks, over a gradient by which orientation and camera can be told."""
    (h, w), n = size, int(np.ceil(np.sqrt(max(len(shares), 1))))
    rows, columns = np.mgrid[0:h, 0:w]
    image = np.stack([np.full((h, w), 30.0), 40 + 160 * rows / h, (60 + 40 * camera) * (1 - columns / w)], axis=-1)
    for i, share in enumerate(shares):
        image[_block(i, n, size)] = [127.5 * (share + 1), 20, 20]
    return image.round().astype(np.uint8)


def read_shares(image: UInt8[np.ndarray, "h w 3"], m: int) -> Float[np.ndarray, " m"]:
    """The numbers that `draw` shows."""
    n = int(np.ceil(np.sqrt(max(m, 1))))
    return np.array([image[_block(i, n, image.shape[:2])][..., 0].mean() / 127.5 - 1 for i in range(m)])


def _block(i: int, n: int, size: Sequence[int]) -> tuple[slice, slice]:
    """Rows and columns of block `i` of `n` x `n`, without the block's border."""
    at = [slice(int((k + 0.2) * length / n), max(int((k + 0.8) * length / n), int((k + 0.2) * length / n) + 1))
          for k, length in zip(divmod(i, n), size, strict=True)]  # fmt: skip
    return at[0], at[1]


def action_towards(spec: ActionSpec, state: Float[np.ndarray, " s"], shares: Float[np.ndarray, " m"]) -> Float[np.ndarray, " a"]:
    """The raw action that moves by at most `STEP` of the way that `shares` say, as the card's groups command it."""
    action, at, kinds = np.zeros(spec.n_dims), 0, {}
    for dims, group in spec.placed_action:
        share = shares[at : at + n_coordinates(group)]
        at += len(share)
        kind = group.kind.split("_")[0]
        index = kinds[kind] = kinds.get(kind, -1) + 1
        shown = [placed for placed in spec.placed_state if placed[1].kind == kind]
        if group.kind == "gripper" and group.open is not None and group.close is not None:
            action[dims] = (
                group.close + (0.1 + 0.8 * (share[0] > 0)) * (group.open - group.close)
                if not group.is_binary
                else (group.open if share[0] > 0 else group.close)
            )
        elif group.kind in MOVING and shown:
            action[dims] = _move_towards(group, shown[index % len(shown)], state, share)
    return np.where(spec.present, action, 0).astype(np.float32)


def _move_towards(group: Group, shown: tuple[slice, Group], state: np.ndarray, share: np.ndarray) -> np.ndarray:
    (dims, other), n = shown, group.n_position
    now, scale = state[dims], np.array(group.scale)
    step = np.clip(share[:n] * of_units(REACH, group)[:n], -of_units(STEP, group)[:n], of_units(STEP, group)[:n])
    is_delta, has_rotation = "delta" in group.kind, LAYOUTS[group.rotation] > 0
    turned = to_rotation(now[other.n_position :] * other.radians, other.rotation)[0] if has_rotation else Rotation.identity()
    turn = Rotation.from_rotvec(np.clip(share[-3:] * REACH["rad"], -STEP["rad"], STEP["rad"])) if has_rotation else None
    if is_delta and group.frame == "ee":
        step, turn = (turned.inv().apply(step) if n == 3 else step), turn and turned.inv() * turn * turned
    if not is_delta:
        step, turn = now[:n] + step, turn and turn * turned
    rotation = from_rotation(turn, group.rotation) / group.radians if turn is not None else np.zeros(0)
    raw = np.concatenate([step, rotation]) / scale
    return np.clip(raw, group.low, group.high) if group.low else raw


class StandInExpert:
    """Acts from the images alone, as `StandIn` draws them; the verbs are those of `rvlm.policy.policy.Policy`."""

    def __init__(self, spec: ActionSpec) -> None:
        self.action_spec = spec

    def reset(self, n_robots: int = 1) -> None:
        """Nothing to forget."""

    def select_action(self, observations: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "n a"]:
        """One raw action for each observation."""
        return np.stack([self._action(observation) for observation in observations])

    def _action(self, observation: Mapping[str, Any]) -> np.ndarray:
        cameras = self.action_spec.cameras
        shares = np.zeros(sum(n_coordinates(group) for group in self.action_spec.action))
        for i, camera in enumerate(cameras):
            shares[i :: len(cameras)] = read_shares(observation["images"][camera], len(shares[i :: len(cameras)]))
        return action_towards(self.action_spec, np.asarray(observation["state"], float), shares)
