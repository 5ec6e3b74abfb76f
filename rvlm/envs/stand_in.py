"""A stand-in of any card's robot: no physics, but its conventions. It records, drives and diagnoses before the robot is there.

The state follows the actions as the card says: displacements and targets, frames, rotation layouts, grippers. Cameras show, as
red blocks, the point to go to next; each camera some of its coordinates.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float, UInt8
from scipy.spatial.transform import Rotation

from rvlm.data.actions import ActionSpec
from rvlm.data.groups import Group
from rvlm.data.observations import stack_images
from rvlm.data.rotations import LAYOUTS, from_rotation, to_rotation
from rvlm.data.writer import EpisodeWriter

TASKS = {"near": 0.5, "far": 1.0}  # task -> how far the points are, as a share of `REACH`
REACH = {"m": 0.12, "rad": 0.5, "deg": 40.0, "px": 120.0}  # furthest point from the start [unit]
STEP = {"m": 0.02, "rad": 0.08, "deg": 6.0, "px": 20.0}  # the expert's largest displacement in a step [unit]
START_M = (0.4, 0.0, 0.3)
N_POINTS, STEPS_PER_POINT = 3, 9
FINGER_M = 0.04  # of a finger whose state has no open and closed value
MOVING = ("pose", "pose_delta", "joint", "joint_delta")


def _n_positions(group: Group) -> int:
    return len(group.names) - LAYOUTS[group.rotation or "none"]


@dataclasses.dataclass
class Part:
    """Position, rotation and opening of the part that a group of actions moves.

    Attributes:
        position: Of the hand or of the joints, in the group's units.
        rotation: Of the hand; None where the group has none.
        opening: Of the gripper, 0 (closed) to 1 (open).
    """

    position: np.ndarray
    rotation: Rotation | None = None
    opening: float = 1.0


def n_coordinates(group: Group) -> int:
    """Coordinates of a point to go to: positions, three of a rotation, one of a gripper."""
    if group.kind not in MOVING:
        return int(group.kind == "gripper")
    return _n_positions(group) + 3 * (LAYOUTS[group.rotation or "none"] > 0)


class StandIn(gymnasium.Env):
    """An environment of any card's robot, without physics.

    Args:
        spec: The robot's conventions.
        image_size: Of all cameras, or their height and width [px].
        sizes: Camera -> height and width [px], where cameras differ; 48 x 48 where left out.
        lag: Share of the way to an absolute target that is left after a step.
        max_steps: Time limit.
    """

    def __init__(
        self,
        spec: ActionSpec,
        image_size: int | tuple[int, int] | None = None,
        sizes: Mapping[str, tuple[int, int]] | None = None,
        lag: float = 0.3,
        max_steps: int = 40,
    ) -> None:
        self.action_spec, self.lag, self.max_steps = spec, lag, max_steps
        same = None if image_size is None else tuple(np.broadcast_to(image_size, 2).tolist())
        self.sizes = {camera: same or (sizes or {}).get(camera, (48, 48)) for camera in spec.cameras}
        low, high = (np.asarray(values, np.float32) for values in (spec.low, spec.high))
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """A start and points to go to, drawn by seed; the option "task" is one of `TASKS`.

        Raises:
            KeyError: No such task.
        """
        super().reset(seed=seed)
        drawn = str(self.np_random.choice(list(TASKS)))  # also where a task is given: the seed's start stays the same
        self.task = (options or {}).get("task") or drawn
        if self.task not in TASKS:
            raise KeyError(f"no task {self.task!r}; there are {', '.join(TASKS)}")
        self._parts = [self._start(group) for group in self.action_spec.action]
        self._origins = [dataclasses.replace(part) for part in self._parts]
        n = sum(n_coordinates(group) for group in self.action_spec.action)
        self._points = self.np_random.uniform(-1, 1, (N_POINTS, n))
        self._n_steps = self._at = 0
        return self._observation(), {"task": self.task, "is_success": False}

    def step(self, action: Float[np.ndarray, " a"]) -> tuple[dict, float, bool, bool, dict]:
        """Move by one raw action."""
        self.action_spec.check(np.asarray(action)[None])
        for part, (dims, group) in zip(self._parts, self.action_spec.placed_action, strict=True):
            self._move(part, group, np.asarray(action, float)[dims])
        self._n_steps += 1
        self._at = self._n_steps // STEPS_PER_POINT
        is_success = self._at >= N_POINTS
        return self._observation(), float(is_success), is_success, self._n_steps >= self.max_steps, {"is_success": is_success}

    def expert_action(self) -> Float[np.ndarray, " a"]:
        """The raw action towards the point."""
        return action_towards(self.action_spec, self._state(), self._coordinates())

    def _start(self, group: Group) -> Part:
        n, noise = _n_positions(group), self.np_random.uniform(-1, 1, _n_positions(group))
        if group.kind not in MOVING:
            return Part(np.zeros(0))
        middle = np.array(START_M[:n]) if group.kind == "pose_delta" or not group.low else _middle(group)
        middle = np.zeros(n) if group.kind == "joint_delta" else middle
        rotation = Rotation.from_euler("xyz", (np.pi, 0, self.np_random.uniform(-1, 1)))
        return Part(middle + 0.2 * noise * _of_units(REACH, group)[:n], rotation if LAYOUTS[group.rotation or "none"] else None)

    def _move(self, part: Part, group: Group, action: np.ndarray) -> None:
        if group.kind == "gripper":
            closed, opened = float(group.close or 0), float(group.open or 0)
            part.opening += 0.6 * (np.clip((action[0] - closed) / (opened - closed), 0, 1) - part.opening)
        if group.kind not in MOVING:
            return
        command, n = action * np.array(group.scale), _n_positions(group)
        turn = to_rotation(command[n:], group.rotation) if part.rotation is not None else None
        if "delta" not in group.kind:
            part.position = part.position + (1 - self.lag) * (command[:n] - part.position)
            if turn is not None:
                part.rotation = Rotation.from_rotvec((1 - self.lag) * (turn * part.rotation.inv()).as_rotvec()) * part.rotation
            return
        is_hand = group.frame == "ee" and part.rotation is not None
        part.position = part.position + (part.rotation.apply(command[:n]) if is_hand and n == 3 else command[:n])
        if turn is not None:
            part.rotation = part.rotation * turn if is_hand else turn * part.rotation

    def _coordinates(self) -> np.ndarray:
        """Where the next point lies: way to go as a share of `REACH`, openings -1 (closed) or 1 (open); clipped to [-1, 1]."""
        ways, at = [], 0
        point = self._points[min(self._at, N_POINTS - 1)]
        for part, origin, group in zip(self._parts, self._origins, self.action_spec.action, strict=True):
            share = point[at : at + n_coordinates(group)]
            at += len(share)
            ways.append(np.sign(share) if group.kind == "gripper" else TASKS[self.task] * share)
            if group.kind in MOVING:
                n, reach = _n_positions(group), _of_units(REACH, group)
                ways[-1][:n] += (origin.position - part.position) / reach[:n]
            if part.rotation is not None and origin.rotation is not None:
                goal = Rotation.from_rotvec(REACH["rad"] * ways[-1][-3:]) * origin.rotation
                ways[-1][-3:] = (goal * part.rotation.inv()).as_rotvec() / REACH["rad"]
        return np.clip(np.concatenate(ways), -1, 1)

    def _state(self) -> np.ndarray:
        kinds, values = {}, []
        for group in self.action_spec.state:
            movers = [p for p, g in zip(self._parts, self.action_spec.action, strict=True) if g.kind.split("_")[0] == group.kind]
            index = kinds.get(group.kind, 0)
            kinds[group.kind] = index + 1
            values.append(_shown(group, movers[index % len(movers)] if movers else None, self._parts[0].position))
        return np.concatenate(values).astype(np.float32)

    def _observation(self) -> dict[str, Any]:
        shares, cameras = self._coordinates(), self.action_spec.cameras
        images = {c: draw(shares[i :: len(cameras)], self.sizes[c], i) for i, c in enumerate(cameras)}
        return {"images": images, "state": self._state(), "instruction": f"go to the {self.task} points"}


def _middle(group: Group) -> np.ndarray:
    n = _n_positions(group)
    return (np.array(group.low[:n]) + np.array(group.high[:n])) / 2 * np.array(group.scale[:n])


def _of_units(table: Mapping[str, float], group: Group) -> np.ndarray:
    return np.array([table.get(unit, 0.1) for unit in group.units])


def _shown(group: Group, part: Part | None, hand: np.ndarray) -> np.ndarray:
    """Raw values of a group of the state; joints that no action moves follow the hand."""
    n, scale = len(group.names), np.array(group.scale)
    if group.kind == "gripper" and part is not None:
        if group.open is not None and group.close is not None:
            return np.full(n, group.close + part.opening * (group.open - group.close))
        return np.where(np.arange(n) % 2, -1, 1) * FINGER_M * part.opening / scale  # fingers move against each other
    if group.kind == "joint" and part is None:
        return np.resize(hand, n) * np.linspace(1, -1, n) / scale
    if part is None or group.kind not in MOVING:
        return np.zeros(n)
    rotation = from_rotation(part.rotation, group.rotation) if part.rotation is not None else np.zeros(0)
    return np.concatenate([part.position, rotation]) / scale


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


def _gripper_command(group: Group, is_open: bool) -> float:
    """A raw value: all the way where the gripper is binary, else a tenth less."""
    opened, closed = float(group.open or 0), float(group.close or 0)
    share = float(is_open) if group.is_binary else 0.1 + 0.8 * is_open
    return closed + share * (opened - closed)


def _move_towards(group: Group, shown: tuple[slice, Group], state: np.ndarray, share: np.ndarray) -> np.ndarray:
    (dims, other), n = shown, _n_positions(group)
    now, scale = state[dims] * np.array(other.scale), np.array(group.scale)
    step = np.clip(share[:n] * _of_units(REACH, group)[:n], -_of_units(STEP, group)[:n], _of_units(STEP, group)[:n])
    is_delta, has_rotation = "delta" in group.kind, LAYOUTS[group.rotation or "none"] > 0
    turned = to_rotation(now[_n_positions(other) :], other.rotation) if has_rotation else Rotation.identity()
    turn = Rotation.from_rotvec(np.clip(share[-3:] * REACH["rad"], -STEP["rad"], STEP["rad"])) if has_rotation else None
    if is_delta and group.frame == "ee":
        step, turn = (turned.inv().apply(step) if n == 3 else step), turn and turned.inv() * turn * turned
    if not is_delta:
        step, turn = now[:n] + step, turn and turn * turned
    raw = np.concatenate([step, from_rotation(turn, group.rotation) if turn is not None else np.zeros(0)]) / scale
    return np.clip(raw, group.low, group.high) if group.low else raw


def record_stand_in(env: StandIn, folder: Path, seeds: Iterable[int]) -> Path:
    """Record an episode of the expert for each seed, with the columns `seed` and `task`; returns the dataset's folder."""
    with EpisodeWriter(folder, env.action_spec) as writer:
        for seed in seeds:
            observation, info = env.reset(seed=seed)
            steps, is_over = [], False
            while not is_over:
                steps.append((observation, env.expert_action()))
                observation, _, is_terminated, is_truncated, _ = env.step(steps[-1][1])
                is_over = is_terminated or is_truncated
            images = stack_images([observed["images"] for observed, _ in steps])
            frames = {f"observation.images.{camera}": values for camera, values in images.items()}
            frames |= {"observation.state": np.stack([o["state"] for o, _ in steps]), "action": np.stack([a for _, a in steps])}
            writer.add_episode(frames, observation["instruction"], {"seed": seed, "task": info["task"]})
    return writer.finalize()


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
