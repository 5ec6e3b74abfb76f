"""Long-horizon evaluation: chains of subtasks in one scene, as in CALVIN.

A chain is sampled by CALVIN's rule: subtasks of different categories in a random order, each feasible in the state that those
before it lead to. The scene is kept between subtasks; the first failure ends the chain. Reported are the success rates of 1 to
5 subtasks in a row, and the mean number of subtasks in a row.

Source: Mees et al. 2022 (CALVIN, arXiv 2112.03227), section III-D on long-horizon evaluation.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from gymnasium.utils.seeding import np_random

from rvlm.caches import Code
from rvlm.envs.tabletop.scene import DRAWER_RANGE, N_OBJECTS, SETTINGS, SLIDER_RANGE, Setting
from rvlm.envs.tabletop.tasks import ALL_FAMILIES, DEFAULT_TASKS
from rvlm.envs.tabletop.world import World
from rvlm.evaluation.closed_loop import EPISODES_PER_BATCH, Evaluation, policy_and_envs
from rvlm.evaluation.rollouts import rollout
from rvlm.evaluation.success import success_table
from rvlm.statistics import Mean, mean_interval

LENGTH = 5
N_DRAWS = 1000  # of chains to test, before a search subtask by subtask
SEED_STRIDE = 1_000_000  # between the seeds of a chain's subtasks
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


def sample_chains(
    seeds: Sequence[int], families: Sequence[str], robot: str, setting: Setting, length: int = LENGTH
) -> list[tuple]:
    """One chain per seed: a tuple of task families. Scenes are sampled, nothing is simulated.

    Args:
        seeds: Of the scenes, as `Tabletop.reset` takes them.
        families: Task families to sample from.
        robot: Of the tabletop.
        setting: Of the tabletop.
        length: Subtasks per chain.

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


def rollout_chains(
    policy: Any, envs: Sequence[Any], seeds: Sequence[int], chains: Sequence[tuple], ablation: str = "none"
) -> list[dict]:
    """Run one chain in each environment, subtask by subtask; failed chains stop.

    Returns:
        Rows of `rollout` with `subtask`, counted from 0; failure "infeasible" where the state does not allow the next subtask.
    """
    rows, running = [], list(range(len(envs)))
    for subtask in range(len(chains[0])):
        if subtask:
            infeasible = [i for i in running if chains[i][subtask] not in envs[i].unwrapped.feasible()]
            failed = {"subtask": subtask, "instruction": "", "is_success": False, "failure": "infeasible", "n_steps": 0}
            rows += [{"seed": seeds[i], "family": chains[i][subtask], **failed} for i in infeasible]
            running = [i for i in running if i not in infeasible]
        if not running:
            break
        episodes = [(seeds[i] + subtask * SEED_STRIDE, chains[i][subtask]) for i in running]
        part = rollout(policy, [envs[i] for i in running], episodes, ablation, keep_state=subtask > 0)
        rows += [{**row, "seed": seeds[i], "subtask": subtask} for i, row in zip(running, part, strict=True)]
        running = [i for i, row in zip(running, part, strict=True) if row["is_success"]]
    return rows


@dataclasses.dataclass(frozen=True)
class ChainEvaluation(Evaluation):
    """A policy and the chains to evaluate it on; `n_episodes` counts chains.

    Attributes:
        length: Subtasks per chain.
    """

    length: int = LENGTH

    @property
    def code(self) -> Code:
        """The code that computes its chains."""
        episode_code = super().code
        unused = ("rvlm.evaluation.closed_loop", "rvlm.evaluation.success", "rvlm.statistics")
        return Code((*episode_code.roots, "rvlm.evaluation.chains"), without=(*episode_code.without, *unused))

    def run(self, batch: int) -> list[dict]:
        """Run one of its batches in this process; rows as `rollout_chains` gives them."""
        first = self.first_seed + batch * EPISODES_PER_BATCH
        seeds = range(first, first + self.batch_size(batch))
        policy, envs = policy_and_envs(self)
        chains = sample_chains(seeds, self.families or DEFAULT_TASKS, self.robot, SETTINGS[self.setting], self.length)
        return rollout_chains(policy, envs[: len(seeds)], seeds, chains, self.ablation)


def chain_lengths(episodes: pd.DataFrame) -> pd.Series:
    """Number of subtasks solved in a row per chain (indexed by its seed), from the rows of one policy."""
    solved: Any = episodes.groupby("seed")["is_success"].sum()
    return solved.astype(int)


def success_at_k(episodes: pd.DataFrame, length: int = LENGTH) -> pd.DataFrame:
    """Success rates of the first k subtasks, with 95 % Wilson intervals over chains.

    Args:
        episodes: Rows of `rollout_chains`, with `name`.
        length: Subtasks per chain.

    Returns:
        One row per name and k (1 to length): name, k, successes, n, rate, low, high.
    """
    solved = [(name, n) for name, group in episodes.groupby("name", sort=False) for n in chain_lengths(group)]
    rows = [{"name": name, "k": k, "is_success": n >= k} for name, n in solved for k in range(1, length + 1)]
    return success_table(pd.DataFrame(rows), ("name", "k"))


def avg_len(episodes: pd.DataFrame, length: int = LENGTH) -> dict[str, Mean]:
    """CALVIN's mean number of subtasks solved in a row (0 to `length`) by name, with a 95 % interval over chains."""
    solved = {str(name): chain_lengths(group) for name, group in episodes.groupby("name", sort=False)}
    return {name: mean_interval(n, bounds=(0, length)) for name, n in solved.items()}
