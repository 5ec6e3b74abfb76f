"""`Suite`: an environment with its tasks, time limits and initial states; anybody's, by name.

Evaluation, chains, diagnosis, DAgger and recording take a suite. The environment is a `gymnasium.Env` that has:

- `action_spec`, an `ActionSpec`, on `env.unwrapped`;
- `reset(seed=, options={"task": name})`, which refuses unknown tasks; with fixed initial states also the option "start";
- observations `{"images": {camera: (h, w, 3) uint8}, "state": (s,) float32, "instruction": str}`; images as the recording
  stores them, since the policy takes them as they come: where the spec has an `image_rotation_deg`, an environment that renders
  upright is wrapped (`rvlm.envs.stored_images.StoredImages(env)`), and one that turns them itself is not;
- `info["is_success"]` after each step; `info["failure"]`, a word or two, where it is known why an episode failed.

Some users need more, and ask for it by name: `expert_action()`, `other_instruction(task)`, `feasible()`.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import gymnasium

from rvlm.data.actions import ActionSpec
from rvlm.envs.suite_checks import SuiteError, check_suite
from rvlm.files import config_hash
from rvlm.importing import describe, import_by_name, require_importable

SUITES = {"tabletop": "rvlm.envs.tabletop.suite:tabletop_suite"}  # first part of a name -> what makes it of the other parts
_CHECKED: set[str] = set()  # content of the suites that this process has checked


@dataclass(frozen=True, eq=False)
class Suite:
    """An environment, its tasks, and what an evaluation needs to know of it.

    Attributes:
        name: In tables and folders.
        spec: The environment's actions, state and cameras.
        tasks: Every task, as the reset option "task" takes it.
        make_env: Makes an environment: an importable function or class, or a `functools.partial` of one. Called with
            `image_size`, the height and width of its images [px]; None for the environment's own.
        max_steps: Time limit [control steps], of all tasks or task -> limit.
        n_starts: Fixed initial states of each task, which the reset option "start" takes from 0 on; None where seeds decide.
        default_tasks: Those that are evaluated unless others are named; all if left out.
        setting: What differs from the environment as it is in training, in a word.
        settings: Setting -> name of the suite that has it.
        held_out: What training data must not have: "first_seed", "wordings" of instructions, "words".
        noise_scale: (a,) Unit of the noise that demonstrations are recorded with, for each action dimension [raw]; none if empty.
        demonstration_steps: Time limit of demonstrations [control steps], where it isn't that of evaluations.
        sample_chains: (seeds, tasks, length) -> for each seed a tuple of tasks to do in sequence; see `rvlm.evaluation.chains`.

    Example:
        >>> suite = rvlm.load_suite("tabletop/franka7")
        >>> suite.spec.robot, suite.limit("lift"), suite.default_tasks[:2]
        ('franka7', 50, ('lift', 'push_left'))
    """

    name: str
    spec: ActionSpec
    tasks: tuple[str, ...]
    make_env: Callable[..., gymnasium.Env]
    max_steps: int | Mapping[str, int]
    n_starts: int | None = None
    default_tasks: tuple[str, ...] = ()
    setting: str = "simple"
    settings: Mapping[str, str] = field(default_factory=dict)
    held_out: Mapping[str, Any] = field(default_factory=dict)
    noise_scale: tuple[float, ...] = ()
    demonstration_steps: int | None = None
    sample_chains: Callable[[Sequence[int], Sequence[str], int], list[tuple[str, ...]]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", self._as_names("tasks"))
        object.__setattr__(self, "default_tasks", self._as_names("default_tasks") or self.tasks)
        self.known(self.default_tasks)
        limits = self.max_steps.values() if isinstance(self.max_steps, Mapping) else (self.max_steps,)
        if isinstance(self.max_steps, Mapping) and set(self.max_steps) != set(self.tasks):
            raise SuiteError(f"{self.name}: expected max_steps of each task {list(self.tasks)}, got {list(self.max_steps)}")
        if not all(type(limit) is int and limit > 0 for limit in limits):
            raise SuiteError(f"{self.name}: expected max_steps as whole numbers above 0 [control steps], got {self.max_steps!r}")
        if self.n_starts is not None and (type(self.n_starts) is not int or self.n_starts < 1):
            raise SuiteError(f"{self.name}: expected n_starts as a whole number above 0, or None; got {self.n_starts!r}")
        is_finite = all(math.isfinite(scale) and scale >= 0 for scale in self.noise_scale)
        if self.noise_scale and (len(self.noise_scale) != self.spec.n_dims or not is_finite):
            raise SuiteError(
                f"{self.name}: expected noise_scale as {self.spec.n_dims} finite numbers from 0 on, got {self.noise_scale}"
            )
        require_importable(self.make_env, f"{self.name}: make_env")
        try:
            inspect.signature(self.make_env).bind(image_size=None)
        except TypeError as error:
            raise SuiteError(
                f"{self.name}: expected make_env(image_size=...), got one that refuses it ({error}); give it this parameter, and "
                "values for its others by functools.partial"
            ) from error

    def _as_names(self, attribute: str) -> tuple[str, ...]:
        names = getattr(self, attribute)
        is_named = not isinstance(names, str) and all(isinstance(name, str) and name for name in names)
        if not is_named or len(set(names)) < len(names) or (attribute == "tasks" and not names):
            raise SuiteError(f"{self.name}: expected {attribute} as a tuple of different names, got {names!r}")
        return tuple(names)

    def known(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """The tasks, if the suite has them all.

        Raises:
            SuiteError: Those that it lacks, and those that it has.
        """
        if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks):
            raise SuiteError(f"expected tasks as a tuple of names, got {tasks!r}; write ({tasks!r},)")
        if unknown := [task for task in tasks if task not in self.tasks]:
            raise SuiteError(f"{self.name} has no task {', '.join(map(repr, unknown))}; there are {', '.join(self.tasks)}")
        return tuple(tasks)

    def limit(self, task: str) -> int:
        """Time limit of a task [control steps]."""
        return self.max_steps[task] if isinstance(self.max_steps, Mapping) else self.max_steps

    def make(self, image_size: Any = None) -> gymnasium.Env:
        """An environment that ends episodes at the task's time limit.

        The first one in a process is checked, with a few resets and a step, by `check_suite`.

        Raises:
            SuiteError: The environment is not as the suite says.
        """
        env = self.make_env(image_size=image_size)
        if (key := config_hash(self.content)) not in _CHECKED:
            check_suite(self, env)
            _CHECKED.add(key)
        return TaskTimeLimit(env, self)

    @functools.cached_property
    def content(self) -> dict[str, Any]:
        """All that decides how its episodes go, as JSON values, except code of this package (`rvlm.importing.code_roots`)."""
        return {
            "name": self.name,
            "spec": asdict(self.spec),
            "limits": {task: self.limit(task) for task in self.tasks},
            "n_starts": self.n_starts,
            "setting": self.setting,
            "make_env": describe(self.make_env),
            "sample_chains": self.sample_chains and describe(self.sample_chains),
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Suite) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.name)


class TaskTimeLimit(gymnasium.Wrapper):
    """Truncates episodes at the time limit of their task."""

    def __init__(self, env: gymnasium.Env, suite: Suite) -> None:
        super().__init__(env)
        self.suite, self.n_steps = suite, 0
        self.max_steps = max(map(suite.limit, suite.tasks))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """As the environment's; a task that the environment chooses itself is taken from `info["task"]`.

        Raises:
            SuiteError: It does not say which one it chose, and time limits of the suite's tasks differ.
        """
        observation, info = self.env.reset(seed=seed, options=options)
        task, limits = (options or {}).get("task") or info.get("task"), {self.suite.limit(task) for task in self.suite.tasks}
        if task is None and len(limits) > 1:
            raise SuiteError(
                f"{self.suite.name}: expected the task that reset() chose as info['task'], got {sorted(info)}; add it, or "
                f"give the option 'task', one of {', '.join(self.suite.tasks)}"
            )
        self.n_steps, self.max_steps = 0, limits.pop() if task is None else self.suite.limit(task)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        """As the environment's, truncated at the limit."""
        observation, reward, is_terminated, is_truncated, info = self.env.step(action)
        self.n_steps += 1
        return observation, reward, is_terminated, is_truncated or self.n_steps >= self.max_steps, info


def method_of(env: gymnasium.Env, name: str, needed_for: str) -> Callable[..., Any]:
    """A method that not every environment has.

    Raises:
        SuiteError: This one has not.
    """
    method = getattr(env.unwrapped, name, None)
    if method is None:
        raise SuiteError(f"{needed_for} needs an environment with {name}(), which {type(env.unwrapped).__name__} lacks; add it")
    return method


def load_suite(suite: str | Suite) -> Suite:
    """A suite by its name, or the suite itself.

    Args:
        suite: "tabletop/ROBOT" or "tabletop/ROBOT/SETTING"; or "package.module:function", a function without arguments that
            returns a `Suite` (or the `Suite`).

    Raises:
        SuiteError: No such suite, with those that exist.

    Example:
        >>> rvlm.load_suite("tabletop/ur6/new_start").setting
        'new_start'
    """
    return suite if isinstance(suite, Suite) else _load(suite)


@functools.cache
def _load(name: str) -> Suite:
    first, *parts = str(name).split("/")
    if ":" not in name and first not in SUITES:
        raise SuiteError(
            f"no suite {name!r}; there are {', '.join(f'{known}/...' for known in SUITES)}, and your own as "
            "'package.module:function'"
        )
    made = import_by_name(name if ":" in name else SUITES[first])
    suite = _called(made, name, () if ":" in name else parts) if callable(made) else made
    if not isinstance(suite, Suite):
        raise SuiteError(f"{name}: expected a Suite, or a function that returns one; got {suite!r}")
    return suite


def _called(function: Callable[..., Any], name: str, arguments: Sequence[str]) -> Any:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        expected = "a function without arguments" if ":" in name else "tabletop/ROBOT or tabletop/ROBOT/SETTING"
        raise SuiteError(f"no suite {name!r}: expected {expected} ({error})") from error
    return function(*arguments)
