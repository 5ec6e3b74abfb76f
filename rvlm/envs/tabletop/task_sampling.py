"""Sampling of tasks: which families are feasible in a scene, and a task with its objects and instruction."""

import numpy as np

from rvlm.envs.tabletop.scene import N_OBJECTS, UNSEEN_COLORS
from rvlm.envs.tabletop.success_conditions import Task, is_in_zone
from rvlm.envs.tabletop.tasks import ALL_FAMILIES
from rvlm.envs.tabletop.world import World


def is_on_table(world: World, i: int) -> bool:
    """Whether object `i` lies within reach: not on another, not fallen, not in or under the drawer."""
    (x, y, z), workspace = world.pos_object(i), world.arm.workspace
    behind, aside, _ = world.pos_object(i) - world.pos_handle
    is_within = all(np.less(workspace.low[:2], (x, y)) & np.less((x, y), workspace.high[:2])) and 0 < z < 2 * world.half
    return is_within and not (-0.26 < behind < 0.03 and abs(aside) < 0.10)


def _targets(world: World, family: str) -> list[int]:
    """Objects that can be the target of a task of `family`."""
    targets = [i for i in range(N_OBJECTS) if is_on_table(world, i)]
    if family.startswith("rotate"):
        targets = [i for i in targets if world.objects[i][1] == "cube"]
    if family == "place_in_zone":
        targets = [i for i in targets if not is_in_zone(world, Task(family, i, None, ""))]
    if world.setting.target:
        targets = [i for i in targets if world.objects[i][0] in UNSEEN_COLORS]
    return targets


def _carriers(world: World, family: str) -> list[int | None]:
    """Objects that the target can be stacked on; [None] where the family has no second object."""
    if ALL_FAMILIES[family].n_objects < 2:
        return [None]
    targets = _targets(world, family)
    cubes = [i for i in range(N_OBJECTS) if is_on_table(world, i) and world.objects[i][1] == "cube"]
    return [i for i in cubes if set(targets) - {i}]


def is_feasible(world: World, family: str) -> bool:
    """Whether a task of `family` can be done in the present state, and is not done already."""
    in_reach = world.arm.workspace.families or ALL_FAMILIES
    if family not in in_reach or not ALL_FAMILIES[family].can_start(world):
        return False
    return ALL_FAMILIES[family].n_objects == 0 or bool(_targets(world, family) and _carriers(world, family))


def _choose_objects(world: World, family: str, rng: np.random.Generator) -> tuple[int | None, int | None]:
    if ALL_FAMILIES[family].n_objects == 0:
        return None, None
    carriers = _carriers(world, family)
    other = None if carriers == [None] else int(rng.choice(np.array(carriers, int)))
    return int(rng.choice([i for i in _targets(world, family) if i != other])), other


def sample_task(world: World, family: str, rng: np.random.Generator) -> Task:
    """Sample a task of `family` in the present scene: its objects and its instruction.

    Args:
        world: A scene in which the family is feasible (`is_feasible`).
        family: Name in `ALL_FAMILIES`.
        rng: Samples the objects and the template.
    """
    target, other = _choose_objects(world, family, rng)
    templates = ALL_FAMILIES[family].held_out if world.setting.paraphrase else ALL_FAMILIES[family].templates
    names = {k: " ".join(world.objects[i]) for k, i in (("a", target), ("b", other)) if i is not None}
    start = (*map(float, world.pos_object(target)), world.yaw_object(target)) if target is not None else (0.0,) * 4
    return Task(family, target, other, str(rng.choice(templates)).format(**names), start, world.is_light_on)
