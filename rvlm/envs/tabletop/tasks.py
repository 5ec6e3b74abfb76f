"""Task families of the tabletop: what is asked, when it can be asked, and when it is done.

Directions are those that the static camera sees: left and right in its image, towards and away from the camera.
Source: the families grow from CALVIN's 34 tasks (Mees et al. 2022, "CALVIN", table of tasks).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rvlm.envs.tabletop.scene import HALF, N_OBJECTS, ZONE_HALF
from rvlm.envs.tabletop.world import World

DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "near": (1.0, 0.0), "far": (-1.0, 0.0)}  # unit vectors, world xy
PUSH_DISTANCE, LIFT_HEIGHT, TURN_ANGLE = 0.05, 0.06, 0.5  # [m], [m], [rad]
DRAWER_OPEN, DRAWER_SHUT, SLIDER_SIDE = 0.08, 0.02, 0.05  # joint positions [m]


@dataclass(frozen=True)
class Task:
    """One thing to do in one scene.

    Attributes:
        family: Name of the family.
        target: Index of the object meant, or None where a fixture is meant.
        other: Index of the second object (stacking), or None.
        instruction: What the policy is told.
        start: Position (3,) and yaw of the target when the task began [m, rad].
    """

    family: str
    target: int | None
    other: int | None
    instruction: str
    start: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Family:
    """A kind of task.

    Attributes:
        templates: Wordings used in training; `{a}` is the target, `{b}` the second object.
        held_out: Wordings never used in training.
        is_done: Whether a task is done, from the true state.
        can_start: Whether it can be asked in this state.
        prepare: Changes a fresh scene so that it can be asked.
        n_objects: How many objects the instruction names.
    """

    templates: tuple[str, ...]
    held_out: tuple[str, ...]
    is_done: Callable[[World, Task], bool]
    can_start: Callable[[World], bool] = lambda world: True
    prepare: Callable[[World], None] = lambda world: None
    n_objects: int = 0


def is_held(world: World, i: int) -> bool:
    """Whether object `i` is between fingers that have closed on it."""
    offset = np.abs(world.pos_object(i) - world.pos_tcp_world)
    return bool(offset[:2].max() < 0.024 and offset[2] < 0.026 and 0.02 < world.opening < 2 * HALF + 0.014)


def is_released(world: World, i: int) -> bool:
    """Whether the fingers are open or away from object `i`."""
    return world.opening > 2 * HALF + 0.018 or float(np.linalg.norm(world.pos_object(i) - world.pos_tcp_world)) > 0.06


def is_lifted(world: World, task: Task) -> bool:
    return bool(world.pos_object(task.target)[2] - task.start[2] > LIFT_HEIGHT) and is_held(world, task.target)


def _pushed(direction: str) -> Callable[[World, Task], bool]:
    def done(world: World, task: Task) -> bool:
        moved = world.pos_object(task.target)[:2] - task.start[:2]
        return bool(moved @ DIRECTIONS[direction] > PUSH_DISTANCE) and world.pos_object(task.target)[2] < 2 * HALF

    return done


def is_in_zone(world: World, task: Task) -> bool:
    offset = world.pos_object(task.target) - world.pos_fixture("zone")
    return bool(np.abs(offset[:2]).max() < ZONE_HALF and offset[2] < 1.6 * HALF) and is_released(world, task.target)


def is_in_drawer(world: World, task: Task) -> bool:
    x, y, z = world.pos_object(task.target) - world.pos_handle
    return bool(-0.14 < x < -0.02 and abs(y) < 0.06 and z < 0.01) and is_released(world, task.target)


def is_stacked(world: World, task: Task) -> bool:
    offset = world.pos_object(task.target) - world.pos_object(task.other)
    return bool(np.linalg.norm(offset[:2]) < 1.2 * HALF and abs(offset[2] - 2 * HALF) < 0.01) and is_released(world, task.target)


def _turned(sign: int) -> Callable[[World, Task], bool]:
    def done(world: World, task: Task) -> bool:
        turn = (world.yaw_object(task.target) - task.start[3] + np.pi) % (2 * np.pi) - np.pi
        return bool(sign * turn > TURN_ANGLE) and world.pos_object(task.target)[2] < 2 * HALF

    return done


def _has(shape: str | None, n: int) -> Callable[[World], bool]:
    return lambda world: sum(shape is None or s == shape for _, s in world.objects) >= n


def _push(direction: str, words: tuple[str, ...], held_out: tuple[str, ...]) -> Family:
    return Family(words, held_out, _pushed(direction), n_objects=1)


def _slide(sign: int, side: str) -> Family:
    return Family(
        (f"move the slider to the {side}", f"slide the handle {side}", f"push the slider {side}"),
        (f"shift the teal handle to the {side} side",),
        lambda world, task: sign * world.travel("slider") < -SLIDER_SIDE,
        lambda world: sign * world.travel("slider") > -0.02,
        lambda world: world.set_travel("slider", sign * abs(world.travel("slider"))),
    )


def _light(is_on: bool, word: str) -> Family:
    return Family(
        (f"turn {word} the light", f"press the button to turn {word} the light", f"switch {word} the lamp"),
        (f"use the button so that the lamp goes {word}",),
        lambda world, task: world.is_light_on == is_on,
        lambda world: world.is_light_on != is_on,
        lambda world: world.set_light(not is_on),
    )


def _stand_apart(world: World) -> None:
    """Make room for a stack: the first object becomes a cube, so that something flat can carry."""
    world.objects[1] = (world.objects[1][0], "cube")
    world._dress(1, *world.objects[1])


FAMILIES: dict[str, Family] = {
    "lift": Family(
        ("lift the {a}", "pick up the {a}", "grasp the {a} and lift it"),
        ("take the {a} off the table", "raise the {a} into the air"),
        is_lifted,
        n_objects=1,
    ),
    "push_left": _push("left", ("push the {a} left", "push the {a} to the left"), ("slide the {a} towards the left side",)),
    "push_right": _push("right", ("push the {a} right", "push the {a} to the right"), ("slide the {a} towards the right side",)),
    "push_near": _push("near", ("push the {a} closer", "push the {a} towards the camera"), ("slide the {a} nearer to the camera",)),
    "push_far": _push("far", ("push the {a} away", "push the {a} away from the camera"), ("slide the {a} farther from the camera",)),
    "place_in_zone": Family(
        ("place the {a} in the zone", "put the {a} on the white square"),
        ("set the {a} down inside the white zone",),
        is_in_zone,
        n_objects=1,
    ),
    "place_in_drawer": Family(
        ("place the {a} in the drawer", "put the {a} into the drawer"),
        ("drop the {a} in the open drawer",),
        is_in_drawer,
        lambda world: world.travel("drawer") > DRAWER_OPEN,
        lambda world: world.set_travel("drawer", 0.11),
        n_objects=1,
    ),
    "stack": Family(
        ("stack the {a} on the {b}", "put the {a} on top of the {b}"),
        ("set the {a} down upon the {b}",),
        is_stacked,
        _has("cube", 1),
        _stand_apart,
        n_objects=2,
    ),
    "rotate_left": Family(
        ("rotate the {a} left", "turn the {a} counterclockwise"),
        ("twist the {a} to the left",),
        _turned(1),
        _has("cube", 1),
        _stand_apart,
        n_objects=1,
    ),
    "rotate_right": Family(
        ("rotate the {a} right", "turn the {a} clockwise"),
        ("twist the {a} to the right",),
        _turned(-1),
        _has("cube", 1),
        _stand_apart,
        n_objects=1,
    ),
    "open_drawer": Family(
        ("open the drawer", "pull the drawer open", "pull the handle to open the drawer"),
        ("slide the drawer out",),
        lambda world, task: world.travel("drawer") > DRAWER_OPEN,
        lambda world: world.travel("drawer") < DRAWER_SHUT,
        lambda world: world.set_travel("drawer", 0.0),
    ),
    "close_drawer": Family(
        ("close the drawer", "push the drawer shut", "shut the drawer"),
        ("slide the drawer back in",),
        lambda world, task: world.travel("drawer") < DRAWER_SHUT,
        lambda world: world.travel("drawer") > DRAWER_OPEN,
        lambda world: world.set_travel("drawer", 0.105),
    ),
    "turn_on_light": _light(True, "on"),
    "turn_off_light": _light(False, "off"),
    "move_slider_left": _slide(1, "left"),
    "move_slider_right": _slide(-1, "right"),
}

# The default mix: language decides the object, the direction or the fixture.
MIX = (
    "lift",
    "push_left",
    "push_right",
    "push_near",
    "push_far",
    "open_drawer",
    "close_drawer",
    "turn_on_light",
    "move_slider_left",
    "move_slider_right",
)


def _choose_objects(world: World, family: str, rng: np.random.Generator) -> tuple[int | None, int | None]:
    n = FAMILIES[family].n_objects
    if n == 0:
        return None, None
    free = [i for i in range(N_OBJECTS) if world.pos_object(i)[2] < 2 * HALF]
    cubes = [i for i in free if world.objects[i][1] == "cube"]
    if family.startswith("rotate"):
        return int(rng.choice(cubes)), None
    if n == 1:
        return int(rng.choice(free)), None
    other = int(rng.choice(cubes))
    return int(rng.choice([i for i in free if i != other])), other


def ask(world: World, family: str, rng: np.random.Generator) -> Task:
    """Draw a task of `family` in the present scene: its objects and its wording."""
    target, other = _choose_objects(world, family, rng)
    words = FAMILIES[family].held_out if world.setting.paraphrase else FAMILIES[family].templates
    names = {k: " ".join(world.objects[i]) for k, i in (("a", target), ("b", other)) if i is not None}
    start = (*map(float, world.pos_object(target)), world.yaw_object(target)) if target is not None else (0.0,) * 4
    return Task(family, target, other, str(rng.choice(words)).format(**names), start)
