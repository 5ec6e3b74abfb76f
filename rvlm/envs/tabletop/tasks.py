"""Task families of the tabletop: instruction templates, success condition, and the start that a task needs.

Source: the families extend CALVIN's 34 tasks (Mees et al. 2022, "CALVIN", table of tasks).
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rvlm.envs.tabletop.success_conditions import (
    DRAWER_OPEN,
    DRAWER_SHUT,
    SLIDER_SIDE,
    Task,
    cued_side,
    has_pushed,
    has_turned,
    is_in_drawer,
    is_in_zone,
    is_lifted,
    is_stacked,
)
from rvlm.envs.tabletop.world import World

CUE_STEPS = 2  # observations that show the cue


@dataclass(frozen=True)
class TaskFamily:
    """A kind of task: what its tasks share.

    Attributes:
        templates: Instruction templates for training; `{a}` is the target, `{b}` the second object.
        held_out: Instruction templates never used in training.
        is_done: Success condition, from the true state.
        can_start: Precondition on the fixtures; `rvlm.envs.tabletop.task_sampling.is_feasible` checks the objects too.
        prepare: Changes a new scene so that the precondition holds.
        n_objects: Number of objects that the instruction names.
        step_scene: Changes the scene after each control step, given the number of steps so far.
    """

    templates: tuple[str, ...]
    held_out: tuple[str, ...]
    is_done: Callable[[World, Task], bool]
    can_start: Callable[[World], bool] = lambda world: True
    prepare: Callable[[World], None] = lambda world: None
    n_objects: int = 0
    step_scene: Callable[[World, int], None] = lambda world, n_steps: None


def _push(direction: str, templates: tuple[str, ...], held_out: tuple[str, ...]) -> TaskFamily:
    return TaskFamily(templates, held_out, has_pushed(direction), n_objects=1)


def _slide(sign: int, side: str) -> TaskFamily:
    return TaskFamily(
        (f"move the slider to the {side}", f"slide the handle {side}", f"push the slider {side}"),
        (f"shift the teal handle to the {side} side",),
        lambda world, task: sign * world.joint_position("slider") < -SLIDER_SIDE,
        lambda world: sign * world.joint_position("slider") > -0.02,
        lambda world: world.set_joint_position("slider", sign * abs(world.joint_position("slider"))),
    )


def _light(is_on: bool, word: str) -> TaskFamily:
    return TaskFamily(
        (f"turn {word} the light", f"press the button to turn {word} the light", f"switch {word} the lamp"),
        (f"use the button so that the lamp goes {word}",),
        lambda world, task: world.is_light_on == is_on,
        lambda world: world.is_light_on != is_on,
        lambda world: world.set_light(not is_on),
    )


def _one_cube(world: Any) -> None:
    """Make the second object a cube, which can be stacked on and rotated; `world` is a `World` or a chain's symbolic state."""
    world.objects[1] = (world.objects[1][0], "cube")
    world.set_appearance(1, *world.objects[1])


TASK_FAMILIES: dict[str, TaskFamily] = {
    "lift": TaskFamily(
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
    "place_in_zone": TaskFamily(
        ("place the {a} in the zone", "put the {a} on the white square"),
        ("set the {a} down inside the white zone",),
        is_in_zone,
        n_objects=1,
    ),
    "place_in_drawer": TaskFamily(
        ("place the {a} in the drawer", "put the {a} into the drawer"),
        ("drop the {a} in the open drawer",),
        is_in_drawer,
        lambda world: world.joint_position("drawer") > DRAWER_OPEN,
        lambda world: world.set_joint_position("drawer", 0.11),
        n_objects=1,
    ),
    "stack": TaskFamily(
        ("stack the {a} on the {b}", "put the {a} on top of the {b}"),
        ("set the {a} down upon the {b}",),
        is_stacked,
        prepare=_one_cube,
        n_objects=2,
    ),
    "rotate_left": TaskFamily(
        ("rotate the {a} left", "turn the {a} counterclockwise"),
        ("twist the {a} to the left",),
        has_turned(1),
        prepare=_one_cube,
        n_objects=1,
    ),
    "rotate_right": TaskFamily(
        ("rotate the {a} right", "turn the {a} clockwise"),
        ("twist the {a} to the right",),
        has_turned(-1),
        prepare=_one_cube,
        n_objects=1,
    ),
    "open_drawer": TaskFamily(
        ("open the drawer", "pull the drawer open", "pull the handle to open the drawer"),
        ("slide the drawer out",),
        lambda world, task: world.joint_position("drawer") > DRAWER_OPEN,
        lambda world: world.joint_position("drawer") < DRAWER_SHUT,
        lambda world: world.set_joint_position("drawer", 0.0),
    ),
    "close_drawer": TaskFamily(
        ("close the drawer", "push the drawer shut", "shut the drawer"),
        ("slide the drawer back in",),
        lambda world, task: world.joint_position("drawer") < DRAWER_SHUT,
        lambda world: world.joint_position("drawer") > DRAWER_OPEN,
        lambda world: world.set_joint_position("drawer", 0.105),
    ),
    "turn_on_light": _light(True, "on"),
    "turn_off_light": _light(False, "off"),
    "move_slider_left": _slide(1, "left"),
    "move_slider_right": _slide(-1, "right"),
}


def _end_cue(world: World, n_steps: int) -> None:
    """Switch the light off after the cue; remember the side that the slider reaches first."""
    if n_steps == CUE_STEPS:
        world.set_light(False)
        world.is_cue_shown = False
    if not world.first_side and abs(world.joint_position("slider")) > SLIDER_SIDE:
        world.first_side = 1 if world.joint_position("slider") > 0 else -1


# Tasks that need a history of observations: the same image asks for different actions, as only the first observations show the
# side. The environment holds arm and gripper still while the cue is shown (`Tabletop.step`), or a policy without history could
# encode the side in its pose. Only the side reached first counts, or trying both would succeed without a history.
MEMORY_FAMILIES: dict[str, TaskFamily] = {
    "slider_by_light": TaskFamily(
        ("move the slider as the light says",),  # on for left, off for right
        ("push the slider to the side that the lamp tells",),
        lambda world, task: world.first_side == -cued_side(task),
        prepare=lambda world: world.set_joint_position("slider", 0.1 * world.joint_position("slider")),
        step_scene=_end_cue,
    ),
}
ALL_FAMILIES = TASK_FAMILIES | MEMORY_FAMILIES

# The default task mix: the instruction decides the object, the direction or the fixture.
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


@functools.cache
def paraphrases(instruction: str) -> tuple[str, ...]:
    """An instruction in all training templates of its family, in their order.

    Raises:
        ValueError: The instruction follows no training template.
    """
    matches = []
    for family in ALL_FAMILIES.values():
        for template in family.templates:
            pattern = re.escape(template).replace(r"\{a\}", "(?P<a>.+)").replace(r"\{b\}", "(?P<b>.+)")
            if found := re.fullmatch(pattern, instruction):
                matches.append((sum(map(len, found.groups())), [t.format(**found.groupdict()) for t in family.templates]))
    if not matches:
        raise ValueError(f"expected an instruction of the tabletop's families, got {instruction!r}; take instructions='original'")
    return tuple(min(matches)[1])  # the shortest names: "the red cube", not "the red cube to the"
