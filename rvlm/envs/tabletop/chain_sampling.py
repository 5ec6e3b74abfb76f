"""Sampling of chains: feasible sequences of tasks in one scene, as in CALVIN.

Subtasks are of different categories, in a random order, each feasible in the state that those before it lead to.

Source: Mees et al. 2022 (CALVIN, arXiv 2112.03227), section III-D on long-horizon evaluation.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from gymnasium.utils.seeding import np_random

from rvlm.envs.tabletop.scene import DRAWER_RANGE, N_OBJECTS, SLIDER_RANGE, Setting
from rvlm.envs.tabletop.tasks import ALL_FAMILIES
from rvlm.envs.tabletop.world import World

N_DRAWS = 1000  # of chains to test, before a search subtask by subtask
_CATEGORY = {"open": "drawer", "close": "drawer", "turn": "light", "move": "slider"}


class SymbolicState:
    """Symbolic scene state, with the part of `World` that task families need; nothing is simulated."""

    def __init__(self, world: World) -> None:
        self._joint_positions = {name: world.joint_position(name) for name in ("drawer", "slider")}
        self.is_light_on, self.objects, self.n_occupied = world.is_light_on, list(world.objects), 0

    def joint_position(self, name: str) -> float:
        """Joint position of "drawer" or "slider" [m]."""
        return self._joint_positions[name]

    def set_joint_position(self, name: str, value: float) -> None:
        """Set the joint position of "drawer" or "slider" [m]."""
        self._joint_positions[name] = value

    def set_light(self, is_on: bool) -> None:
        """Switch the light."""
        self.is_light_on = is_on

    def set_appearance(self, i: int, color: str, shape: str) -> None:
        """Symbolic objects keep their appearance."""

    def occupy(self, n: int) -> None:
        """Count `n` more objects as no longer free to manipulate."""
        self.n_occupied += n

    def state(self) -> tuple:
        """All that `is_feasible` depends on."""
        return (*self._joint_positions.values(), self.is_light_on, self.n_occupied, tuple(self.objects))

    def is_feasible(self, family: str) -> bool:
        """Whether a task of `family` is feasible: its precondition on the fixtures holds, and enough objects are free."""
        kind, scene = ALL_FAMILIES[family], cast(Any, self)
        n_cubes = sum(shape == "cube" for _, shape in self.objects)
        needs_cube = family.split("_")[0] in ("rotate", "stack")
        has_objects = self.n_occupied + kind.n_objects <= N_OBJECTS and (not needs_cube or n_cubes > self.n_occupied)
        return kind.can_start(scene) and (kind.n_objects == 0 or has_objects)


EFFECTS: dict[str, Callable[[SymbolicState], None]] = {
    "open_drawer": lambda scene: scene.set_joint_position("drawer", DRAWER_RANGE),
    "close_drawer": lambda scene: scene.set_joint_position("drawer", 0.0),
    "turn_on_light": lambda scene: scene.set_light(True),
    "turn_off_light": lambda scene: scene.set_light(False),
    "move_slider_left": lambda scene: scene.set_joint_position("slider", -SLIDER_RANGE),
    "move_slider_right": lambda scene: scene.set_joint_position("slider", SLIDER_RANGE),
    "lift": lambda scene: scene.occupy(1),
    "place_in_drawer": lambda scene: scene.occupy(1),
    "stack": lambda scene: scene.occupy(2),
}


def category(family: str) -> str:
    """Category of a task family; a chain has at most one subtask of each."""
    verb = family.split("_")[0]
    return _CATEGORY.get(verb, verb)


def sample_chains(seeds: Sequence[int], families: Sequence[str], length: int, robot: str, setting: Setting) -> list[tuple]:
    """One chain per seed: a tuple of task families. Scenes are sampled, nothing is simulated.

    Args:
        seeds: Of the scenes, as `Tabletop.reset` takes them.
        families: Task families to sample from.
        length: Subtasks per chain.
        robot: Of the world.
        setting: Of the world.

    Raises:
        ValueError: Fewer categories than subtasks, or no feasible chain in a scene.
    """
    categories = {category(family) for family in families}
    if len(categories) < length:
        raise ValueError(
            f"a chain of {length} subtasks needs as many categories; these families have {len(categories)}: "
            f"{', '.join(sorted(categories))}; add families or shorten the chain"
        )
    world, chains = World(robot, setting), []
    for seed in seeds:
        world.randomize(np_random(seed)[0])
        rng = np.random.default_rng((seed, 5))
        candidates = (tuple(map(str, rng.choice(list(families), length, replace=False))) for _ in range(N_DRAWS))
        chain = next((chain for chain in candidates if _is_feasible(world, chain, length)), None)
        chain = chain or _search(SymbolicState(world), list(families), length, (), rng, set())
        if chain is None:
            raise ValueError(
                f"no feasible chain of {length} subtasks of {', '.join(families)} in the scene of seed {seed}: too few objects, "
                "or no subtask allows the next one; add families or shorten the chain"
            )
        chains.append(chain)
    return chains


def _search(scene: SymbolicState, families: list[str], length: int, prefix: tuple, rng: Any, dead_ends: set) -> tuple | None:
    """A feasible chain that begins with `prefix`, by depth-first search in random order; None if there is none."""
    if len(prefix) == length:
        return prefix
    used = frozenset(category(family) for family in prefix)
    state = (used, *scene.state())
    candidates = [str(family) for family in rng.permutation(families) if category(family) not in used]
    for family in candidates if state not in dead_ends else ():
        after: Any = copy.deepcopy(scene)
        if not prefix:
            ALL_FAMILIES[family].prepare(after)
        if after.is_feasible(family):
            EFFECTS.get(family, lambda scene: None)(after)
            if found := _search(after, families, length, (*prefix, family), rng, dead_ends):
                return found
    dead_ends.add(state)
    return None


def _is_feasible(world: World, chain: tuple, length: int) -> bool:
    if len({category(family) for family in chain}) < length:
        return False
    scene: Any = SymbolicState(world)
    ALL_FAMILIES[chain[0]].prepare(scene)
    for family in chain:
        if not scene.is_feasible(family):
            return False
        EFFECTS.get(family, lambda scene: None)(scene)
    return True
