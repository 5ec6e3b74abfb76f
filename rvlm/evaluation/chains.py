"""Chains: tasks one after another in the same scene, as far as the policy gets.

A chain is drawn by CALVIN's rule: tasks of different categories in a random order, each of which can be asked in the state
that those before it leave behind. The scene is kept between tasks; the first failure ends the chain. Reported are the shares
of chains with 1 to 5 tasks solved in a row, and their mean length.

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
N_DRAWS = 1000  # of whole chains, before one is put together task by task
SEED_STRIDE = 1_000_000  # seeds of two links of a chain are this far apart
_CATEGORY = {"open": "drawer", "close": "drawer", "turn": "light", "move": "slider"}


class SymbolicState:
    """What is known of a scene without simulating it; families ask it what they ask a `World`."""

    def __init__(self, world: World) -> None:
        self._joint_positions = {name: world.joint_position(name) for name in ("drawer", "slider")}
        self.is_light_on, self.objects, self.n_taken = world.is_light_on, list(world.objects), 0

    def joint_position(self, name: str) -> float:
        """Joint position of "drawer" or "slider" [m]."""
        return self._joint_positions[name]

    def set_joint_position(self, name: str, value: float) -> None:
        """Set it."""
        self._joint_positions[name] = value

    def set_light(self, is_on: bool) -> None:
        """Switch the light."""
        self.is_light_on = is_on

    def set_appearance(self, i: int, color: str, shape: str) -> None:
        """A world redraws its object here."""

    def take(self, n: int) -> None:
        """So many more objects may be out of reach."""
        self.n_taken += n

    def state(self) -> tuple:
        """All that `is_feasible` looks at."""
        return (*self._joint_positions.values(), self.is_light_on, self.n_taken, tuple(self.objects))

    def is_feasible(self, family: str) -> bool:
        """Whether a task of `family` can surely be asked: its fixtures are right, and objects that it needs are left."""
        kind, scene = ALL_FAMILIES[family], cast(Any, self)
        n_cubes = sum(shape == "cube" for _, shape in self.objects)
        needs_cube = family.split("_")[0] in ("rotate", "stack")
        is_left = self.n_taken + kind.n_objects <= N_OBJECTS and (not needs_cube or n_cubes > self.n_taken)
        return kind.can_start(scene) and (kind.n_objects == 0 or is_left)


EFFECTS: dict[str, Callable[[SymbolicState], None]] = {
    "open_drawer": lambda scene: scene.set_joint_position("drawer", DRAWER_RANGE),
    "close_drawer": lambda scene: scene.set_joint_position("drawer", 0.0),
    "turn_on_light": lambda scene: scene.set_light(True),
    "turn_off_light": lambda scene: scene.set_light(False),
    "move_slider_left": lambda scene: scene.set_joint_position("slider", -SLIDER_RANGE),
    "move_slider_right": lambda scene: scene.set_joint_position("slider", SLIDER_RANGE),
    "lift": lambda scene: scene.take(1),
    "place_in_drawer": lambda scene: scene.take(1),
    "stack": lambda scene: scene.take(2),
}


def category(family: str) -> str:
    """What a family is about; a chain asks about everything once."""
    word = family.split("_")[0]
    return _CATEGORY.get(word, word)


def sample_chains(
    seeds: Sequence[int], families: Sequence[str], robot: str, setting: Setting, length: int = LENGTH
) -> list[tuple]:
    """The tasks of one chain per seed, as tuples of families; a scene is drawn, nothing is simulated.

    Args:
        seeds: Of the scenes, as `Tabletop.reset` takes them.
        families: To draw from.
        robot: Of the tabletop.
        setting: Likewise.
        length: Tasks of a chain.

    Raises:
        ValueError: The families have fewer categories than a chain has tasks, or in a scene no order in which each can be asked.
    """
    categories = {category(family) for family in families}
    if len(categories) < length:
        raise ValueError(
            f"a chain of {length} tasks needs as many categories; these families have {len(categories)}: "
            f"{', '.join(sorted(categories))}; add families or shorten the chain"
        )
    world, chains = World(robot, setting), []
    for seed in seeds:
        world.randomize(np_random(seed)[0])
        rng = np.random.default_rng((seed, 5))
        drawn = (tuple(map(str, rng.choice(list(families), length, replace=False))) for _ in range(N_DRAWS))
        chain = next((chain for chain in drawn if _is_feasible(world, chain, length)), None)
        chain = chain or _find(SymbolicState(world), list(families), length, (), rng, set())
        if chain is None:
            raise ValueError(
                f"no chain of {length} tasks can be made of {', '.join(families)} in the scene of seed {seed}: objects are used "
                "up, or no task leaves what the next one needs; add families or shorten the chain"
            )
        chains.append(chain)
    return chains


def _find(scene: SymbolicState, families: list[str], length: int, so_far: tuple, rng: Any, dead: set) -> tuple | None:
    """A chain that goes on from here, in a random order of search; None if there is none."""
    if len(so_far) == length:
        return so_far
    asked = frozenset(category(family) for family in so_far)
    state = (asked, *scene.state())
    candidates = [str(family) for family in rng.permutation(families) if category(family) not in asked]
    for family in candidates if state not in dead else ():
        after: Any = copy.deepcopy(scene)
        if not so_far:
            ALL_FAMILIES[family].prepare(after)
        if after.is_feasible(family):
            EFFECTS.get(family, lambda scene: None)(after)
            if found := _find(after, families, length, (*so_far, family), rng, dead):
                return found
    dead.add(state)
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
    """Run one chain in each environment, link by link; those that failed stand still.

    Returns:
        Rows of `rollout` with `link`, counted from 0; "cannot be asked" where success did not leave what the next task needs.
    """
    rows, running = [], list(range(len(envs)))
    for link in range(len(chains[0])):
        if link:
            impossible = [i for i in running if chains[i][link] not in envs[i].unwrapped.feasible()]
            told = {"instruction": "", "is_success": False, "failure": "cannot be asked", "n_steps": 0}
            rows += [{"seed": seeds[i], "family": chains[i][link], "link": link, **told} for i in impossible]
            running = [i for i in running if i not in impossible]
        if not running:
            break
        episodes = [(seeds[i] + link * SEED_STRIDE, chains[i][link]) for i in running]
        part = rollout(policy, [envs[i] for i in running], episodes, ablation, keep_state=link > 0)
        rows += [{**row, "seed": seeds[i], "link": link} for i, row in zip(running, part, strict=True)]
        running = [i for i, row in zip(running, part, strict=True) if row["is_success"]]
    return rows


@dataclasses.dataclass(frozen=True)
class ChainEvaluation(Evaluation):
    """A policy and the chains that it is to be judged on; `n_episodes` counts chains.

    Attributes:
        length: Tasks of a chain.
    """

    length: int = LENGTH

    @property
    def code(self) -> Code:
        """The code that its chains depend on."""
        alone = super().code
        unused = ("rvlm.evaluation.closed_loop", "rvlm.evaluation.success", "rvlm.statistics")
        return Code((*alone.roots, "rvlm.evaluation.chains"), without=(*alone.without, *unused))

    def run(self, batch: int) -> list[dict]:
        """Roll out one of its batches in this process; rows as `rollout_chains` gives them."""
        first = self.first_seed + batch * EPISODES_PER_BATCH
        seeds = range(first, first + self.batch_size(batch))
        policy, envs = policy_and_envs(self)
        chains = sample_chains(seeds, self.families or DEFAULT_TASKS, self.robot, SETTINGS[self.setting], self.length)
        return rollout_chains(policy, envs[: len(seeds)], seeds, chains, self.ablation)


def chain_lengths(episodes: pd.DataFrame) -> pd.Series:
    """Tasks solved in a row, by chain (its seed); of the rows of one policy."""
    solved: Any = episodes.groupby("seed")["is_success"].sum()
    return solved.astype(int)


def success_at_k(episodes: pd.DataFrame, length: int = LENGTH) -> pd.DataFrame:
    """Shares of chains with at least k tasks solved in a row, with 95 % Wilson intervals.

    Args:
        episodes: Rows of `rollout_chains`, with `name`.
        length: Tasks of a chain.

    Returns:
        One row per name and k (1 to length): name, in_a_row, successes, n, rate, low, high.
    """
    solved = [(name, n) for name, group in episodes.groupby("name", sort=False) for n in chain_lengths(group)]
    rows = [{"name": name, "in_a_row": k, "is_success": n >= k} for name, n in solved for k in range(1, length + 1)]
    return success_table(pd.DataFrame(rows), ("name", "in_a_row"))


def avg_len(episodes: pd.DataFrame, length: int = LENGTH) -> dict[str, Mean]:
    """CALVIN's mean number of tasks solved in a row (0 to `length`), by name, with a 95 % interval over chains."""
    solved = {str(name): chain_lengths(group) for name, group in episodes.groupby("name", sort=False)}
    return {name: mean_interval(n, bounds=(0, length)) for name, n in solved.items()}
