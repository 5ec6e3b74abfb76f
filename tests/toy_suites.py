"""Stub environments and suites of any spec: images, states and outcomes are drawn by the seed, nothing is simulated."""

import dataclasses
import functools

import gymnasium
import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.envs.stand_in import StandIn
from rvlm.envs.suites import Suite, load_suite

TASKS = ("push the block", "open the box")  # of stub suites; each is its own instruction


class StubEnv(gymnasium.Env):
    """An environment of any spec.

    An episode succeeds at its third step unless seed (or start) and task number add up to a multiple of four. The expert's
    actions are drawn from the spec's range.

    Args:
        spec: Of actions, cameras and state.
        sizes: Camera -> height and width [px]; 48 x 48 where left out.
        image_size: The same of all cameras, instead of `sizes`.
        tasks: Names, which are the instructions.
    """

    def __init__(self, spec, sizes=None, image_size=None, tasks=TASKS):
        self.action_spec, self.tasks = spec, tasks
        all_equal = None if image_size is None else tuple(np.broadcast_to(image_size, 2).tolist())
        self.sizes = {camera: all_equal or (sizes or {}).get(camera, (48, 48)) for camera in spec.cameras}
        images = {camera: gymnasium.spaces.Box(0, 255, (*size, 3), np.uint8) for camera, size in self.sizes.items()}
        self.observation_space = gymnasium.spaces.Dict(
            images=gymnasium.spaces.Dict(images),
            state=gymnasium.spaces.Box(-np.inf, np.inf, (len(spec.state_names),), np.float32),
            instruction=gymnasium.spaces.Text(120, charset=frozenset("".join(tasks))),
        )
        low, high = (np.asarray(v, np.float32) for v in (spec.low, spec.high))
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.actions = []  # of the present episode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = dict(options or {})
        self.task = options.pop("task", None) or str(self.np_random.choice(self.tasks))
        start = options.pop("start", None)
        if options.pop("keep_state", False) or options or self.task not in self.tasks:
            raise KeyError(f"no task {self.task!r}, or no options {sorted(options)}")
        self.rng = np.random.default_rng((0, start) if start is not None else (1, seed or 0))
        number = (seed or 0 if start is None else start) + self.tasks.index(self.task)
        self.is_solvable, self.actions = number % 4 != 0, []
        return self._observe(), {"task": self.task, "is_success": False}

    def step(self, action):
        if np.shape(action) != (self.action_spec.n_dims,):
            raise ValueError(f"expected {self.action_spec.n_dims} numbers, got {np.shape(action)}")
        self.actions.append(np.asarray(action))
        is_success = self.is_solvable and len(self.actions) >= 3
        info = {"is_success": is_success, "failure": "" if is_success else "missed"}
        return self._observe(), float(is_success), is_success, False, info

    def expert_action(self):
        return self.rng.uniform(self.action_space.low, self.action_space.high).astype(np.float32)

    def other_instruction(self, task):
        return next(other for other in self.tasks if other != task)

    def _observe(self):
        images = {camera: self.rng.integers(0, 255, (*size, 3), dtype=np.uint8) for camera, size in self.sizes.items()}
        state = self.rng.normal(size=len(self.action_spec.state_names)).astype(np.float32)
        return {"images": images, "state": state, "instruction": self.task}


def stub_suite(spec, sizes=None, **changes):
    """A suite of a stub environment.

    Args:
        spec: An `ActionSpec`, or the name of a card.
        sizes: Camera -> height and width [px] of its images.
        changes: Fields of `Suite`.
    """
    spec = ActionSpec.from_card(spec) if isinstance(spec, str) else spec
    tasks = tuple(changes.get("tasks", TASKS))
    make_env = functools.partial(StubEnv, spec, sizes=sizes, tasks=tasks)
    return Suite(
        **{"name": f"stub/{spec.dataset}", "spec": spec, "tasks": tasks, "make_env": make_env, "max_steps": 6, **changes}
    )


def tabletop(max_steps, robot="franka7"):
    """The tabletop with another time limit [control steps]."""
    return dataclasses.replace(load_suite(f"tabletop/{robot}"), max_steps=max_steps)


def libero_stub():
    """A suite by name: `toy_suites:libero_stub`."""
    return stub_suite("libero")


class NeedsTask(StandIn):
    """PushT's stand-in, which must be told its task."""

    def reset(self, *, seed=None, options=None):
        if "task" not in (options or {}):
            raise KeyError("task")
        return super().reset(seed=seed, options=options)


class SaysNoTask(StandIn):
    """PushT's stand-in, whose info is empty at a reset."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed, options=options)[0], {}


class OtherTasks(StandIn):
    """PushT's stand-in, of which no recorded task is known."""

    def reset(self, *, seed=None, options=None):
        task = (options or {}).get("task") or "push"
        if task != "push":
            raise KeyError(f"no task {task!r}")
        return super().reset(seed=seed)[0], {"task": "push"}


class OldStep(StandIn):
    """PushT's stand-in, whose step returns four values."""

    def step(self, action):
        observation, reward, is_terminated, is_truncated, info = super().step(action)
        return observation, reward, is_terminated or is_truncated, info


class LosesItsState(StandIn):
    """PushT's stand-in, which has no state from an episode's second step on."""

    def step(self, action):
        observation, *others = super().step(action)
        return {name: value for name, value in observation.items() if name != "state" or self._n_steps < 2}, *others


def of_pusht(cls, tasks=("near", "far")):
    """A suite of a stand-in of PushT's robot, with images as its recordings have."""
    spec = ActionSpec.from_card("pusht")
    return Suite(f"pusht_{cls.__name__}", spec, tasks, functools.partial(of_size, cls), max_steps=40)


def of_size(cls, image_size=None):
    """An environment of PushT's image size."""
    return cls(ActionSpec.from_card("pusht"), sizes={"image": (96, 96)})


def needs_its_task():
    return of_pusht(NeedsTask)


def says_no_task():
    return of_pusht(SaysNoTask)


def other_tasks():
    return of_pusht(OtherTasks, ("push",))


def old_step():
    return of_pusht(OldStep)


def loses_its_state():
    return of_pusht(LosesItsState)
