"""Success conditions of tasks, computed from the true state of the world.

Directions are those of the static camera's image: left and right in it, far and near to the camera.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rvlm.envs.tabletop.scene import ZONE_HALF
from rvlm.envs.tabletop.world import World

DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "near": (1.0, 0.0), "far": (-1.0, 0.0)}  # unit vectors, world xy
PUSH_DISTANCE, LIFT_HEIGHT, TURN_ANGLE = 0.05, 0.06, 0.5  # [m], [m], [rad]
LOOSE, RELEASED = 2 + 7 / 12, 2.75  # openings of the fingers: at most of a grasp, at least of a release [half sizes of an object]
DRAWER_OPEN, DRAWER_SHUT, SLIDER_SIDE = 0.08, 0.02, 0.05  # joint positions [m]


@dataclass(frozen=True)
class Task:
    """One task in one scene.

    Attributes:
        family: Name of the family.
        target: Index of the target object, or None where the target is a fixture.
        other: Index of the second object (stacking), or None.
        instruction: In words, for the policy.
        start: Position (3,) and yaw of the target object when the task began [m, rad].
        was_light_on: Whether the light was on when the task began.
    """

    family: str
    target: int | None
    other: int | None
    instruction: str
    start: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    was_light_on: bool = False

    @property
    def target_object(self) -> int:
        """Index of the target object.

        Raises:
            ValueError: The target is a fixture.
        """
        return self._index("target")

    @property
    def other_object(self) -> int:
        """Index of the second object.

        Raises:
            ValueError: The task has fewer than two objects.
        """
        return self._index("other")

    def _index(self, name: str) -> int:
        index = getattr(self, name)
        if index is None:
            raise ValueError(f"{self.family!r} has no {name} object; its instruction is {self.instruction!r}")
        return index


def cued_side(task: Task) -> int:
    """Side that the light cued: 1 for left, if it was on, and -1 for right."""
    return 1 if task.was_light_on else -1


class HandAndObjects(Protocol):
    """What grasping needs to know: a `World`, or one arm of several with its objects.

    Attributes:
        half: Half the size of every object [m].
    """

    half: float

    @property
    def pos_tcp_world(self) -> np.ndarray:
        """Tool centre point between the fingertips (3,) [m]."""
        ...

    @property
    def opening(self) -> float:
        """Distance between the fingers [m]."""
        ...

    def pos_object(self, i: int) -> np.ndarray:
        """Position (3,) of object `i` [m], world frame."""
        ...


def is_held(world: HandAndObjects, i: int) -> bool:
    """Whether object `i` is between the closed fingers."""
    offset, half = np.abs(world.pos_object(i) - world.pos_tcp_world), world.half
    is_between = bool(offset[:2].max() < half and offset[2] < half + 0.002)
    return is_between and half * 5 / 6 < world.opening < LOOSE * half


def is_released(world: World, i: int) -> bool:
    """Whether the fingers are open or away from object `i`."""
    return world.opening > RELEASED * world.half or float(np.linalg.norm(world.pos_object(i) - world.pos_tcp_world)) > 0.06


def is_lifted(world: World, task: Task) -> bool:
    """Whether the target is held more than `LIFT_HEIGHT` above its start."""
    return bool(world.pos_object(task.target_object)[2] - task.start[2] > LIFT_HEIGHT) and is_held(world, task.target_object)


def has_pushed(direction: str) -> Callable[[World, Task], bool]:
    """Condition: the target has moved `PUSH_DISTANCE` in a direction, on the table."""

    def done(world: World, task: Task) -> bool:
        moved = world.pos_object(task.target_object)[:2] - task.start[:2]
        return bool(moved @ DIRECTIONS[direction] > PUSH_DISTANCE and world.pos_object(task.target_object)[2] < 2 * world.half)

    return done


def is_in_zone(world: World, task: Task) -> bool:
    """Whether the target lies in the zone, released."""
    offset = world.pos_object(task.target_object) - world.pos_fixture("zone")
    return bool(np.abs(offset[:2]).max() < ZONE_HALF and offset[2] < 1.6 * world.half) and is_released(world, task.target_object)


def is_in_drawer(world: World, task: Task) -> bool:
    """Whether the target lies in the drawer, released."""
    x, y, z = world.pos_object(task.target_object) - world.pos_handle
    return bool(-0.14 < x < -0.02 and abs(y) < 0.06 and z < 0.01) and is_released(world, task.target_object)


def is_stacked(world: World, task: Task) -> bool:
    """Whether the target lies on the second object, released."""
    offset = world.pos_object(task.target_object) - world.pos_object(task.other_object)
    return bool(np.linalg.norm(offset[:2]) < 1.2 * world.half and abs(offset[2] - 2 * world.half) < 0.01) and is_released(
        world, task.target_object
    )


def has_turned(sign: int) -> Callable[[World, Task], bool]:
    """Condition: the target has turned by `TURN_ANGLE`, on the table; sign 1 is counterclockwise."""

    def done(world: World, task: Task) -> bool:
        turn = (world.yaw_object(task.target_object) - task.start[3] + np.pi) % (2 * np.pi) - np.pi
        return bool(sign * turn > TURN_ANGLE and world.pos_object(task.target_object)[2] < 2 * world.half)

    return done
