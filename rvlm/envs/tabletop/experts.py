"""Scripted experts: the next command, from the present true state alone.

Experts are stateless: a command depends on the true state and the task alone, so that an expert recovers from any perturbation,
and, outside the memory families, every command is a correct label for a policy of a single observation.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rvlm.envs.tabletop.success_conditions import DIRECTIONS, LOOSE, HandAndObjects, Task, cued_side, is_held
from rvlm.envs.tabletop.world import World

CLEAR = 0.085  # height above the table that clears all objects [m]
CARRY = 0.115  # height of the tool centre point when carrying [m]
RISE = 0.02  # of a held object in one control step [m]; wide fingers roll a cylinder out when they rise faster


class Command(NamedTuple):
    """Target of the hand: position (3,) [m] world frame, yaw [rad], and whether the fingers are open."""

    pos: np.ndarray
    is_open: bool
    yaw: float = 0.0


def _reach(world: HandAndObjects, goal: np.ndarray, is_open: bool, clear: float = CLEAR, near: float = 0.016) -> Command:
    """Go to `goal` from above: up to a clear height, across, then down."""
    tcp, over = world.pos_tcp_world, max(clear, goal[2] + 0.05)
    distance = float(np.linalg.norm(goal[:2] - tcp[:2]))
    if distance < near or (distance < 2.5 * near and tcp[2] < goal[2] + 0.02):
        return Command(goal, is_open)
    if tcp[2] < over - 0.035:
        return Command(np.array([*tcp[:2], over]), is_open)
    return Command(np.array([*goal[:2], over]), is_open)


def grasp(world: HandAndObjects, i: int) -> Command:
    """Close the fingers around object `i`, reached from above."""
    goal = np.add(world.pos_object(i), (0, 0, -0.002))
    offset = np.abs(goal - world.pos_tcp_world)
    if offset[:2].max() < 0.011 and offset[2] < 0.011:
        return Command(goal, False)
    return _reach(world, goal, True)


def lift(world: World, task: Task) -> Command:
    """Grasp the target, then go straight up."""
    return raise_object(world, task.target_object)


def raise_object(world: HandAndObjects, i: int) -> Command:
    """Grasp object `i`, then go straight up."""
    return Command(np.add(world.pos_tcp_world, (0, 0, 0.1)), False) if is_held(world, i) else grasp(world, i)


def _press_along(
    world: World, at: np.ndarray, direction: np.ndarray, reach: float, height: float, clear: float = CLEAR
) -> Command:
    """Move behind `at` (2,) with closed fingers and push along `direction`, both in the world's xy plane [m]."""
    tcp = world.pos_tcp_world
    along = float((tcp[:2] - at) @ direction)
    aside = float((tcp[:2] - at) @ (-direction[1], direction[0]))
    if tcp[2] < height + 0.022 and along < 0.25 * -reach and abs(aside) < 0.016:
        return Command(np.array([*(at + 0.06 * direction), height]), False)
    return _reach(world, np.array([*(at - reach * direction), height]), False, clear)


def _push(direction: str) -> Callable[[World, Task], Command]:
    def push(world: World, task: Task) -> Command:
        vector = np.array(DIRECTIONS[direction])
        return _press_along(world, world.pos_object(task.target_object)[:2], vector, reach=world.half + 0.032, height=0.022)

    return push


def _carry(world: World, i: int, goal: np.ndarray, near: float = 0.012) -> Command:
    """Carry object `i` to `goal` (3,) [m] and release it; once it lies there, move up."""
    pos, tcp = world.pos_object(i), world.pos_tcp_world
    offset = goal - pos
    if np.abs(offset[:2]).max() < 1.5 * near and abs(offset[2]) < 0.008:
        return Command(np.add(tcp, (0, 0, 0.05 if world.opening > LOOSE * world.half else 0.0)), True)
    if not is_held(world, i):
        return grasp(world, i)
    over = max(CARRY, goal[2] + 0.05)
    if np.linalg.norm(offset[:2]) < near:
        return Command(tcp + offset, False)
    if pos[2] < over - 0.03:
        return Command(np.array([*tcp[:2], min(over + 0.02, tcp[2] + RISE)]), False)
    return Command(np.array([*(tcp + offset)[:2], over]), False)


def place_in_zone(world: World, task: Task) -> Command:
    """Carry the target to the middle of the zone."""
    return _carry(world, task.target_object, np.array([*world.pos_fixture("zone")[:2], world.half]), near=0.02)


def place_in_drawer(world: World, task: Task) -> Command:
    """Release the target over the middle of the open drawer."""
    goal = np.add(world.pos_handle, (-0.076, 0, 0.065))
    offset = np.abs(goal - world.pos_object(task.target_object))
    if offset[:2].max() < 0.016 and is_held(world, task.target_object):
        return Command(world.pos_tcp_world, True)
    if offset[:2].max() < 0.05 and not is_held(world, task.target_object):
        return Command(np.add(world.pos_tcp_world, (0, 0, 0.05)), True)
    return _carry(world, task.target_object, goal)


def stack(world: World, task: Task) -> Command:
    """Carry the target onto the second object."""
    return _carry(
        world, task.target_object, np.add(world.pos_object(task.other_object), (0, 0, 2 * world.half + 0.002)), near=0.007
    )


def _rotate(sign: int) -> Callable[[World, Task], Command]:
    def rotate(world: World, task: Task) -> Command:
        if not is_held(world, task.target_object):
            return grasp(world, task.target_object)
        return Command(world.pos_tcp_world, False, yaw=float(world.tilt[2]) + sign * 0.3)

    return rotate


def _drawer(shift: float) -> Callable[[World, Task], Command]:
    """Grasp the handle and move it along x by `shift` [m]."""

    def move(world: World, task: Task) -> Command:
        goal = world.pos_handle
        offset = np.abs(goal - world.pos_tcp_world)
        if offset.max() > 0.022:
            return _reach(world, goal, True, clear=0.12)
        if world.opening > 0.03:
            return Command(goal, False)
        return Command(np.add(goal, (shift, 0, 0)), False)

    return move


def press_button(world: World, task: Task) -> Command:
    """Press the button from above with closed fingers."""
    top = np.add(world.pos_fixture("button"), (0, 0, 0.014))
    return _reach(world, np.add(top, (0, 0, -0.025)), False, clear=0.10, near=0.012)


def _slide(sign: int) -> Callable[[World, Task], Command]:
    def slide(world: World, task: Task) -> Command:
        return _press_along(world, world.pos_fixture("slider")[:2], np.array([0.0, sign]), reach=0.052, height=0.040, clear=0.11)

    return slide


def slider_by_light(world: World, task: Task) -> Command:
    """Hold still while the cue is shown, move over the middle of the slider, and choose the side only there.

    The environment ignores motion during the cue; otherwise the hand's pose could encode the side.
    """
    if world.is_cue_shown:
        return Command(world.pos_tcp_world, False)
    over = np.array([*world.pos_fixture("slider")[:2], 0.11])
    if np.linalg.norm(world.pos_tcp_world[:2] - over[:2]) > 0.075:
        return Command(over, False)
    return _slide(-cued_side(task))(world, task)


EXPERTS: dict[str, Callable[[World, Task], Command]] = {
    "lift": lift,
    **{f"push_{name}": _push(name) for name in DIRECTIONS},
    "place_in_zone": place_in_zone,
    "place_in_drawer": place_in_drawer,
    "stack": stack,
    "rotate_left": _rotate(1),
    "rotate_right": _rotate(-1),
    "open_drawer": _drawer(0.1),
    "close_drawer": _drawer(-0.1),
    "turn_on_light": press_button,
    "turn_off_light": press_button,
    "move_slider_left": _slide(-1),
    "move_slider_right": _slide(1),
    "slider_by_light": slider_by_light,
}


def _holds_handle(world: World) -> bool:
    """Whether the fingers are still closed around the drawer's handle, from the previous task."""
    return bool(np.linalg.norm(world.pos_tcp_world - world.pos_handle) < 0.03 and 0.006 < world.opening < 0.03)


def _release(world: World) -> Command:
    return Command(np.add(world.pos_tcp_world, (0.01, 0, 0)), True)


def expert_delta(world: World, task: Task) -> tuple[np.ndarray, np.ndarray, bool]:
    """The expert's command in the present state.

    Returns:
        Translation (3,) [m] and rotation (3,) as axis-angle [rad], which also levels the hand, to the target pose, and whether
        the fingers should be open; in the world frame, not limited to the range of one action.
    """
    command = _release(world) if _holds_handle(world) and "drawer" not in task.family else EXPERTS[task.family](world, task)
    return delta_to(command, world.pos_tcp_world, world.tilt)


def delta_to(command: Command, pos: np.ndarray, tilt: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """As of `expert_delta`, from the hand's position (3,) [m] and tilt (3,) [rad] to the command's pose."""
    return command.pos - pos, np.array([-tilt[0], -tilt[1], command.yaw - tilt[2]]), command.is_open
