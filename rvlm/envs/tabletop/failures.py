"""Classification of failed episodes, from the simulator's true state."""

import numpy as np

from rvlm.envs.tabletop.scene import N_OBJECTS
from rvlm.envs.tabletop.success_conditions import Task, is_held
from rvlm.envs.tabletop.world import World

GRASPED = ("lift", "place", "stack", "rotate")  # first words of families whose object must be grasped
FIXTURE = {"open": "drawer", "close": "drawer", "drawer": "drawer", "turn": "light", "move": "slider", "slider": "slider"}
MOVED, NEAR = 0.03, 0.05  # [m]
FAILURES = ("wrong object", "wrong way", "missed grasp", "dropped", "timed out")


class FailureClassifier:
    """Classify the failure of an episode from the states that `update` was given.

    Args:
        world: At the start of the episode.
        task: Of the episode.
    """

    def __init__(self, world: World, task: Task) -> None:
        self.task = task
        self._objects = self._positions(world)
        self._fixtures = self._fixture_positions(world)
        self.was_held = self.was_tried = False  # the target between closed fingers; fingers closed beside it

    @staticmethod
    def _positions(world: World) -> np.ndarray:
        return np.array([world.pos_object(i) for i in range(N_OBJECTS)])

    @staticmethod
    def _fixture_positions(world: World) -> dict[str, float]:
        return {
            "drawer": world.joint_position("drawer"),
            "slider": world.joint_position("slider"),
            "light": MOVED * 2 * world.is_light_on,
        }

    def update(self, world: World) -> None:
        """Add the state after a control step."""
        if self.task.target is None:
            return
        self.was_held |= is_held(world, self.task.target)
        is_near = np.linalg.norm(world.pos_object(self.task.target) - world.pos_tcp_world) < NEAR
        self.was_tried |= bool(is_near and world.opening < world.arm.opening - 0.01)

    def failure(self, world: World) -> str:
        """The kind of failure, of `FAILURES`, if the episode ended now without success."""
        moved = np.linalg.norm(self._positions(world) - self._objects, axis=1)
        fixture_moved = {name: abs(value - self._fixtures[name]) for name, value in self._fixture_positions(world).items()}
        family, target = self.task.family.split("_")[0], self.task.target
        own = moved[target] if target is not None else fixture_moved.pop(FIXTURE[family], 0.0)
        others = max([*np.delete(moved, [i for i in (target, self.task.other) if i is not None]), *fixture_moved.values()])
        if family in GRASPED and self.was_held:
            return "timed out" if is_held(world, self.task.target_object) else "dropped"
        if own < MOVED < others:
            return "wrong object"
        if family in GRASPED and self.was_tried:
            return "missed grasp"
        return "wrong way" if own > MOVED else "timed out"
