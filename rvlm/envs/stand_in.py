"""A stand-in of any card's robot: no physics, but its conventions. It records, drives and diagnoses before the robot is there.

The state follows the actions as the card says: displacements and targets, frames, rotation layouts, grippers. Cameras show, as
red blocks, the point to go to next; each camera some of its coordinates. An episode has three points of nine steps each. It is a
success if, when the steps of each are over, the robot is as near to it as the expert comes, within `TOLERANCE`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from rvlm.data.actions import ActionSpec
from rvlm.data.groups import LAYOUTS, Group
from rvlm.data.observations import stack_images
from rvlm.data.rotations import from_rotation, to_rotation
from rvlm.data.writer import EpisodeWriter
from rvlm.envs.spaces import action_space
from rvlm.envs.stand_in_expert import MOVING, REACH, action_towards, draw, n_coordinates, of_units
from rvlm.envs.suites import Suite

TASKS = {"near": 0.5, "far": 1.0}  # task -> how far the points are, as a share of `REACH`
START_M = (0.4, 0.0, 0.3)
N_POINTS, STEPS_PER_POINT = 3, 9
TOLERANCE = 0.25  # in each coordinate of a point, as a share of how far the task's points are from the start
FINGER_M = 0.04  # of a finger whose state has no open and closed value


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
        self.action_space = action_space(spec)

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
        self._n_steps, self._at, self._is_near = 0, 0, True
        self._nearest = self._expert_distances()
        return self._observation(), {"task": self.task, "is_success": False}

    def step(self, action: Float[np.ndarray, " a"]) -> tuple[dict, float, bool, bool, dict]:
        """Move by one raw action."""
        self.action_spec.check(np.asarray(action)[None])
        self._move_all(action)
        self._n_steps += 1
        if self._n_steps % STEPS_PER_POINT == 0 and self._at < N_POINTS:
            limit = self._nearest[self._at] + TOLERANCE * TASKS[self.task]
            self._is_near &= bool((np.abs(self._way()) <= limit).all())
        self._at = self._n_steps // STEPS_PER_POINT
        is_over = self._at >= N_POINTS
        is_success = is_over and self._is_near
        info = {"is_success": is_success, **({"failure": "missed a point"} if is_over and not is_success else {})}
        return self._observation(), float(is_success), is_over, self._n_steps >= self.max_steps, info

    def expert_action(self) -> Float[np.ndarray, " a"]:
        """The raw action towards the point."""
        return action_towards(self.action_spec, self._state(), self._coordinates())

    def _start(self, group: Group) -> Part:
        n, noise = group.n_position, self.np_random.uniform(-1, 1, group.n_position)
        if group.kind not in MOVING:
            return Part(np.zeros(0))
        middle = np.array(START_M[:n]) if group.kind == "pose_delta" or not group.low else _middle(group)
        middle = np.zeros(n) if group.kind == "joint_delta" else middle
        rotation = Rotation.from_euler("xyz", (np.pi, 0, self.np_random.uniform(-1, 1)))
        return Part(middle + 0.2 * noise * of_units(REACH, group)[:n], rotation if LAYOUTS[group.rotation] else None)

    def _expert_distances(self) -> list[np.ndarray]:
        """From each point, when its steps are over, of the expert: not all are within its steps' reach. Ends at the start.

        No distance is near enough where the state does not show all that moves, as the expert leaves that where it is.
        """
        shown, distances = {group.kind for group in self.action_spec.state}, []
        if not {group.kind.split("_")[0] for group in self.action_spec.action if group.kind in MOVING} <= shown:
            return [np.array(-np.inf)] * N_POINTS
        for self._at in range(N_POINTS):
            for _ in range(STEPS_PER_POINT):
                self._move_all(self.expert_action())
            distances.append(np.abs(self._way()))
        self._parts, self._at = [dataclasses.replace(part) for part in self._origins], 0
        return distances

    def _move_all(self, action: np.ndarray) -> None:
        for part, (dims, group) in zip(self._parts, self.action_spec.placed_action, strict=True):
            self._move(part, group, np.asarray(action, float)[dims])

    def _move(self, part: Part, group: Group, action: np.ndarray) -> None:
        if group.kind == "gripper":
            closed, opened = group.gripper_ends
            part.opening += 0.6 * (np.clip((action[0] - closed) / (opened - closed), 0, 1) - part.opening)
        if group.kind not in MOVING:
            return
        command, n, rotation = action * np.array(group.scale), group.n_position, part.rotation
        turn = to_rotation(command[n:] * group.radians, group.rotation)[0] if rotation is not None else Rotation.identity()
        if "delta" not in group.kind:
            part.position = part.position + (1 - self.lag) * (command[:n] - part.position)
            if rotation is not None:
                part.rotation = Rotation.from_rotvec((1 - self.lag) * (turn * rotation.inv()).as_rotvec()) * rotation
        elif rotation is not None and group.frame == "ee":
            part.position = part.position + (rotation.apply(command[:n]) if n == 3 else command[:n])
            part.rotation = rotation * turn
        else:
            part.position = part.position + command[:n]
            part.rotation = None if rotation is None else turn * rotation

    def _coordinates(self) -> np.ndarray:
        """Where the next point lies: way to go as a share of `REACH`, openings -1 (closed) or 1 (open); clipped to [-1, 1]."""
        kinds = [group.kind for group in self.action_spec.action for _ in range(n_coordinates(group))]
        point = self._points[min(self._at, N_POINTS - 1)]
        return np.clip(np.where(np.array(kinds) == "gripper", np.sign(point), self._way()), -1, 1)

    def _way(self) -> np.ndarray:
        """Way to the next point as a share of `REACH`; of openings, from -1 (closed) or 1 (open)."""
        ways, at = [], 0
        point = self._points[min(self._at, N_POINTS - 1)]
        for part, origin, group in zip(self._parts, self._origins, self.action_spec.action, strict=True):
            share = point[at : at + n_coordinates(group)]
            at += len(share)
            ways.append(np.sign(share) + 1 - 2 * part.opening if group.kind == "gripper" else TASKS[self.task] * share)
            if group.kind in MOVING:
                n, reach = group.n_position, of_units(REACH, group)
                ways[-1][:n] += (origin.position - part.position) / reach[:n]
            if part.rotation is not None and origin.rotation is not None:
                goal = Rotation.from_rotvec(REACH["rad"] * ways[-1][-3:]) * origin.rotation
                ways[-1][-3:] = (goal * part.rotation.inv()).as_rotvec() / REACH["rad"]
        return np.concatenate(ways)

    def _state(self) -> np.ndarray:
        kinds, values = {}, []
        for group in self.action_spec.state:
            kind_of = [g.kind.split("_")[0] for g in self.action_spec.action]
            movers = [i for i, kind in enumerate(kind_of) if kind == group.kind]
            index = kinds.get(group.kind, 0)
            kinds[group.kind] = index + 1
            mover = movers[index % len(movers)] if movers else None
            shown = _shown(group, None if mover is None else self._parts[mover], self._parts[0].position)
            if mover is not None and "quat" in group.rotation:  # on the half sphere of the start
                start = _shown(group, self._origins[mover], self._parts[0].position)
                shown[group.n_position :] *= np.sign(shown[group.n_position :] @ start[group.n_position :]) or 1
            values.append(shown)
        return np.concatenate(values).astype(np.float32)

    def _observation(self) -> dict[str, Any]:
        shares, cameras = self._coordinates(), self.action_spec.cameras
        images = {c: draw(shares[i :: len(cameras)], self.sizes[c], i) for i, c in enumerate(cameras)}
        return {"images": images, "state": self._state(), "instruction": f"go to the {self.task} points"}


def _middle(group: Group) -> np.ndarray:
    n = group.n_position
    return (np.array(group.low[:n]) + np.array(group.high[:n])) / 2 * np.array(group.scale[:n])


def _shown(group: Group, part: Part | None, hand: np.ndarray) -> np.ndarray:
    """Raw values of a group of the state; joints that no action moves follow the hand."""
    n = len(group.names)
    if group.kind == "gripper" and part is not None:
        if group.open is not None:
            closed, opened = group.gripper_ends
            return np.full(n, closed + part.opening * (opened - closed))
        return np.where(np.arange(n) % 2, -1, 1) * FINGER_M * part.opening  # fingers move against each other
    if group.kind == "joint" and part is None:
        return np.resize(hand, n) * np.linspace(1, -1, n)
    if part is None or group.kind not in MOVING:
        return np.zeros(n)
    rotation = from_rotation(part.rotation, group.rotation) / group.radians if part.rotation is not None else np.zeros(0)
    return np.concatenate([part.position, rotation])


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


def stand_in_suite(spec: ActionSpec) -> Suite:
    """The stand-in of a robot as a suite of two tasks."""
    return Suite(f"stand_in/{spec.dataset}", spec, tuple(TASKS), functools.partial(StandIn, spec), max_steps=40)
