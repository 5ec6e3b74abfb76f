"""Task families of the tabletop: what is asked, when it can be asked, and when it is done.

Directions are those that the static camera sees: left and right in its image, towards and away from the camera.
Source: the families grow from CALVIN's 34 tasks (Mees et al. 2022, "CALVIN", table of tasks).
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rvlm.envs.tabletop.scene import HALF, N_OBJECTS, UNSEEN_COLORS, ZONE_HALF
from rvlm.envs.tabletop.world import WORKSPACE_HIGH, WORKSPACE_LOW, World

DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "near": (1.0, 0.0), "far": (-1.0, 0.0)}  # unit vectors, world xy
PUSH_DISTANCE, LIFT_HEIGHT, TURN_ANGLE = 0.05, 0.06, 0.5  # [m], [m], [rad]
CUE_STEPS = 2  # observations in which a cue can be seen
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
        """Index of the object meant.

        Raises:
            ValueError: A fixture is meant, not an object.
        """
        return self._index("target")

    @property
    def other_object(self) -> int:
        """Index of the second object.

        Raises:
            ValueError: The task has only one object, or none.
        """
        return self._index("other")

    def _index(self, name: str) -> int:
        index = getattr(self, name)
        if index is None:
            raise ValueError(f"{self.family!r} has no {name} object; its instruction is {self.instruction!r}")
        return index


@dataclass(frozen=True)
class Family:
    """A kind of task.

    Attributes:
        templates: Wordings used in training; `{a}` is the target, `{b}` the second object.
        held_out: Wordings never used in training.
        is_done: Whether a task is done, from the true state.
        can_start: Whether the fixtures' state lets it be asked; `is_feasible` looks at the objects too.
        prepare: Changes a fresh scene so that it can be asked.
        n_objects: How many objects the instruction names.
        tick: What the scene does by itself after so many control steps.
    """

    templates: tuple[str, ...]
    held_out: tuple[str, ...]
    is_done: Callable[[World, Task], bool]
    can_start: Callable[[World], bool] = lambda world: True
    prepare: Callable[[World], None] = lambda world: None
    n_objects: int = 0
    tick: Callable[[World, int], None] = lambda world, n_steps: None


def is_held(world: World, i: int) -> bool:
    """Whether object `i` is between fingers that have closed on it."""
    offset = np.abs(world.pos_object(i) - world.pos_tcp_world)
    return bool(offset[:2].max() < 0.024 and offset[2] < 0.026 and 0.02 < world.opening < 2 * HALF + 0.014)


def is_released(world: World, i: int) -> bool:
    """Whether the fingers are open or away from object `i`."""
    return world.opening > 2 * HALF + 0.018 or float(np.linalg.norm(world.pos_object(i) - world.pos_tcp_world)) > 0.06


def is_lifted(world: World, task: Task) -> bool:
    """Whether the target is held well above where it was."""
    return bool(world.pos_object(task.target_object)[2] - task.start[2] > LIFT_HEIGHT) and is_held(world, task.target_object)


def _pushed(direction: str) -> Callable[[World, Task], bool]:
    def done(world: World, task: Task) -> bool:
        moved = world.pos_object(task.target_object)[:2] - task.start[:2]
        return bool(moved @ DIRECTIONS[direction] > PUSH_DISTANCE and world.pos_object(task.target_object)[2] < 2 * HALF)

    return done


def is_in_zone(world: World, task: Task) -> bool:
    """Whether the target lies in the zone, let go."""
    offset = world.pos_object(task.target_object) - world.pos_fixture("zone")
    return bool(np.abs(offset[:2]).max() < ZONE_HALF and offset[2] < 1.6 * HALF) and is_released(world, task.target_object)


def is_in_drawer(world: World, task: Task) -> bool:
    """Whether the target lies in the drawer, let go."""
    x, y, z = world.pos_object(task.target_object) - world.pos_handle
    return bool(-0.14 < x < -0.02 and abs(y) < 0.06 and z < 0.01) and is_released(world, task.target_object)


def is_stacked(world: World, task: Task) -> bool:
    """Whether the target lies on the second object, let go."""
    offset = world.pos_object(task.target_object) - world.pos_object(task.other_object)
    return bool(np.linalg.norm(offset[:2]) < 1.2 * HALF and abs(offset[2] - 2 * HALF) < 0.01) and is_released(
        world, task.target_object
    )


def _turned(sign: int) -> Callable[[World, Task], bool]:
    def done(world: World, task: Task) -> bool:
        turn = (world.yaw_object(task.target_object) - task.start[3] + np.pi) % (2 * np.pi) - np.pi
        return bool(sign * turn > TURN_ANGLE and world.pos_object(task.target_object)[2] < 2 * HALF)

    return done


def _push(direction: str, words: tuple[str, ...], held_out: tuple[str, ...]) -> Family:
    return Family(words, held_out, _pushed(direction), n_objects=1)


def _slide(sign: int, side: str) -> Family:
    return Family(
        (f"move the slider to the {side}", f"slide the handle {side}", f"push the slider {side}"),
        (f"shift the teal handle to the {side} side",),
        lambda world, task: sign * world.joint_position("slider") < -SLIDER_SIDE,
        lambda world: sign * world.joint_position("slider") > -0.02,
        lambda world: world.set_travel("slider", sign * abs(world.joint_position("slider"))),
    )


def _light(is_on: bool, word: str) -> Family:
    return Family(
        (f"turn {word} the light", f"press the button to turn {word} the light", f"switch {word} the lamp"),
        (f"use the button so that the lamp goes {word}",),
        lambda world, task: world.is_light_on == is_on,
        lambda world: world.is_light_on != is_on,
        lambda world: world.set_light(not is_on),
    )


def _one_cube(world: Any) -> None:
    """Make the second object of a world (or of what stands for one, as in chains) a cube: it can carry and be turned."""
    world.objects[1] = (world.objects[1][0], "cube")
    world.set_appearance(1, *world.objects[1])


FAMILIES: dict[str, Family] = {
    "lift": Family(
        ("lift the {a}", "pick up the {a}", "grasp the {a} and lift it"),
        ("take the {a} off the table", "raise the {a} into the air"),
        is_lifted,
        n_objects=1,
    ),
    "push_left": _push("left", ("push the {a} left", "push the {a} to the left"), ("slide the {a} towards the left side",)),
    "push_right": _push("right", ("push the {a} right", "push the {a} to the right"), ("slide the {a} towards the right side",)),
    "push_near": _push(
        "near", ("push the {a} closer", "push the {a} towards the camera"), ("slide the {a} nearer to the camera",)
    ),
    "push_far": _push(
        "far", ("push the {a} away", "push the {a} away from the camera"), ("slide the {a} farther from the camera",)
    ),
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
        lambda world: world.joint_position("drawer") > DRAWER_OPEN,
        lambda world: world.set_travel("drawer", 0.11),
        n_objects=1,
    ),
    "stack": Family(
        ("stack the {a} on the {b}", "put the {a} on top of the {b}"),
        ("set the {a} down upon the {b}",),
        is_stacked,
        prepare=_one_cube,
        n_objects=2,
    ),
    "rotate_left": Family(
        ("rotate the {a} left", "turn the {a} counterclockwise"),
        ("twist the {a} to the left",),
        _turned(1),
        prepare=_one_cube,
        n_objects=1,
    ),
    "rotate_right": Family(
        ("rotate the {a} right", "turn the {a} clockwise"),
        ("twist the {a} to the right",),
        _turned(-1),
        prepare=_one_cube,
        n_objects=1,
    ),
    "open_drawer": Family(
        ("open the drawer", "pull the drawer open", "pull the handle to open the drawer"),
        ("slide the drawer out",),
        lambda world, task: world.joint_position("drawer") > DRAWER_OPEN,
        lambda world: world.joint_position("drawer") < DRAWER_SHUT,
        lambda world: world.set_travel("drawer", 0.0),
    ),
    "close_drawer": Family(
        ("close the drawer", "push the drawer shut", "shut the drawer"),
        ("slide the drawer back in",),
        lambda world, task: world.joint_position("drawer") < DRAWER_SHUT,
        lambda world: world.joint_position("drawer") > DRAWER_OPEN,
        lambda world: world.set_travel("drawer", 0.105),
    ),
    "turn_on_light": _light(True, "on"),
    "turn_off_light": _light(False, "off"),
    "move_slider_left": _slide(1, "left"),
    "move_slider_right": _slide(-1, "right"),
}


def cued_side(task: Task) -> int:
    """Side that the light has told: 1 for left, if it was on, and -1 for right."""
    return 1 if task.was_light_on else -1


def _cue_once(world: World, n_steps: int) -> None:
    """The light goes off once the cue has been seen; the side that the slider reaches first is noted."""
    if n_steps == CUE_STEPS:
        world.set_light(False)
        world.is_cue_shown = False
    if not world.first_side and abs(world.joint_position("slider")) > SLIDER_SIDE:
        world.first_side = 1 if world.joint_position("slider") > 0 else -1


# Here one picture asks for different actions: which side is meant has been seen in the first observations only. The environment
# moves neither arm nor gripper while the cue is shown (`Tabletop.step`): a policy of the present could write the side into its
# pose and read it there. And the side that is reached first counts, for trying one and then the other would need no memory. So
# when the cue ends the state is the same for both sides, whatever was done. Kept apart from the other families.
MEMORY_FAMILIES: dict[str, Family] = {
    "slider_by_light": Family(
        ("move the slider as the light says",),  # on for left, off for right
        ("push the slider to the side that the lamp tells",),
        lambda world, task: world.first_side == -cued_side(task),
        prepare=lambda world: world.set_travel("slider", 0.1 * world.joint_position("slider")),
        tick=_cue_once,
    ),
}
ALL_FAMILIES = FAMILIES | MEMORY_FAMILIES

# The default mix: language decides the object, the direction or the fixture.
DEFAULT_TASKS = (
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


def is_on_table(world: World, i: int) -> bool:
    """Whether object `i` lies where the arm can get at it: not on another, not fallen, not in or under the drawer."""
    x, y, z = world.pos_object(i)
    behind, aside, _ = world.pos_object(i) - world.pos_handle
    is_within = bool((WORKSPACE_LOW[:2] < (x, y)).all() and ((x, y) < WORKSPACE_HIGH[:2]).all() and 0 < z < 2 * HALF)
    return is_within and not (-0.26 < behind < 0.03 and abs(aside) < 0.10)


def _targets(world: World, family: str) -> list[int]:
    """Objects that a task of `family` can mean."""
    targets = [i for i in range(N_OBJECTS) if is_on_table(world, i)]
    if family.startswith("rotate"):
        targets = [i for i in targets if world.objects[i][1] == "cube"]
    if family == "place_in_zone":
        targets = [i for i in targets if not is_in_zone(world, Task(family, i, None, ""))]
    if world.setting.target:
        targets = [i for i in targets if world.objects[i][0] in UNSEEN_COLORS]
    return targets


def _carriers(world: World, family: str) -> list[int | None]:
    """Objects that something can be stacked on; None alone where the family has no second object."""
    if ALL_FAMILIES[family].n_objects < 2:
        return [None]
    targets = _targets(world, family)
    cubes = [i for i in range(N_OBJECTS) if is_on_table(world, i) and world.objects[i][1] == "cube"]
    return [i for i in cubes if set(targets) - {i}]


def is_feasible(world: World, family: str) -> bool:
    """Whether a task of `family` can be asked in the present state, and is not done already."""
    if not ALL_FAMILIES[family].can_start(world):
        return False
    return ALL_FAMILIES[family].n_objects == 0 or bool(_targets(world, family) and _carriers(world, family))


def _choose_objects(world: World, family: str, rng: np.random.Generator) -> tuple[int | None, int | None]:
    if ALL_FAMILIES[family].n_objects == 0:
        return None, None
    carriers = _carriers(world, family)
    other = None if carriers == [None] else int(rng.choice(np.array(carriers, int)))
    return int(rng.choice([i for i in _targets(world, family) if i != other])), other


def sample_task(world: World, family: str, rng: np.random.Generator) -> Task:
    """Draw a task of `family` in the present scene: its objects and its wording.

    Args:
        world: A scene in which it can be asked (`is_feasible`).
        family: Name in `ALL_FAMILIES`.
        rng: Draws the objects and the wording.
    """
    target, other = _choose_objects(world, family, rng)
    words = ALL_FAMILIES[family].held_out if world.setting.paraphrase else ALL_FAMILIES[family].templates
    names = {k: " ".join(world.objects[i]) for k, i in (("a", target), ("b", other)) if i is not None}
    start = (*map(float, world.pos_object(target)), world.yaw_object(target)) if target is not None else (0.0,) * 4
    return Task(family, target, other, str(rng.choice(words)).format(**names), start, world.is_light_on)


@functools.cache
def paraphrases(instruction: str) -> tuple[str, ...]:
    """An instruction of the tabletop in every training wording of its family, the family's first wording first.

    Raises:
        ValueError: No family says it so.
    """
    readings = []
    for family in ALL_FAMILIES.values():
        for wording in family.templates:
            pattern = re.escape(wording).replace(r"\{a\}", "(?P<a>.+)").replace(r"\{b\}", "(?P<b>.+)")
            if found := re.fullmatch(pattern, instruction):
                readings.append((sum(map(len, found.groups())), [t.format(**found.groupdict()) for t in family.templates]))
    if not readings:
        raise ValueError(f"expected an instruction of the tabletop's families, got {instruction!r}; take instructions='original'")
    return tuple(min(readings)[1])  # the shortest names: "the red cube", not "the red cube to the"
