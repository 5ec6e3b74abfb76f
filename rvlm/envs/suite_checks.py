"""Checks that an environment is as its suite says: what was expected, what came."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np
from scipy.spatial.transform import Rotation

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.data.holding import hold_action
from rvlm.data.rotations import from_rotation

SEEDS = (900_000, 900_001)  # held out
NO_TASK = "no such task"


class SuiteError(ValueError):
    """No such suite or task, or an environment that is not as its suite says."""


@contextlib.contextmanager
def in_words(refused: str, mend: str) -> Iterator[None]:
    """Any error of an environment as a `SuiteError`, as environments are others'."""
    try:
        yield
    except Exception as error:
        raise SuiteError(f"{refused}: {type(error).__name__}: {error}; {mend}") from error


def check_suite(suite: Any, env: gymnasium.Env) -> None:
    """Check an environment against its suite (`rvlm.envs.suites.Suite`), by its spaces, a few resets and one step.

    Raises:
        SuiteError: Another spec, action space, camera, image, state or instruction; reset() or step() refuse what they are given,
            or return something else than a `gymnasium.Env`'s, or no success; a task that does not exist is accepted; the same
            seed starts differently; all seeds, or all fixed initial states, start alike; or one of these starts otherwise with
            another seed.
    """
    _check_spec(suite, env)
    task = suite.default_tasks[0]
    begin, again = (_first_observation(suite, env, SEEDS[0], task, 0) for _ in range(2))
    if difference := _difference(begin, again):
        raise _error(
            suite, f"the same start after two resets with seed {SEEDS[0]}", f"others in {difference}", "seed all randomness"
        )
    last = _first_observation(suite, env, SEEDS[1], task, 0)
    if suite.n_starts is None:
        _require_other_start(suite, "seeds", begin, last)
    elif difference := _difference(begin, last):
        expected = f"the initial state 'start' 0 alike with seeds {SEEDS[0]} and {SEEDS[1]}"
        raise _error(suite, expected, f"others in {difference}", "read the option 'start' in reset(), or leave n_starts out")
    elif suite.n_starts > 1:
        last = _first_observation(suite, env, SEEDS[0], task, suite.n_starts - 1)
        _require_other_start(suite, "initial states 'start'", begin, last)
    _check_step(suite, env, last)
    _check_unknown_task_is_refused(suite, env)


def _require_other_start(suite: Any, what: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    if not _difference(one, other):
        raise _error(suite, f"two {what} that start differently", "the same images and state", "read them in reset()")


def _error(suite: Any, expected: str, came: str, mend: str) -> SuiteError:
    return SuiteError(f"suite {suite.name}: expected {expected}, got {came}; {mend}")


def _check_spec(suite: Any, env: gymnasium.Env) -> None:
    unwrapped = getattr(env, "unwrapped", env)
    spec = getattr(unwrapped, "action_spec", None)
    if not isinstance(env, gymnasium.Env) or not isinstance(spec, ActionSpec):
        came = f"{type(unwrapped).__name__} with {spec!r}"
        raise _error(suite, "a gymnasium.Env with an ActionSpec as action_spec", came, "set it in __init__")
    try:
        suite.spec.require_same(spec, "suite vs environment")
    except SpecMismatch as error:
        raise SuiteError(f"suite {suite.name}: {error}") from error
    space = getattr(env, "action_space", None)
    if not isinstance(space, gymnasium.spaces.Box) or space.shape != (spec.n_dims,):
        dims = f"{spec.n_dims} dimensions {list(spec.names)}"
        raise _error(suite, f"an action space Box of {dims}", str(space), "make it of the spec's low and high")
    low, high = np.asarray(spec.low, float), np.asarray(spec.high, float)
    outside = (space.low > low + 1e-4 * np.abs(low)) | (space.high < high - 1e-4 * np.abs(high))
    if outside.any():
        names = [name for name, is_outside in zip(spec.names, outside, strict=True) if is_outside]
        came = f"{space.low[outside].tolist()} to {space.high[outside].tolist()}"
        raise _error(
            suite, f"the spec's range of {names}, {low[outside].tolist()} to {high[outside].tolist()}", came, "correct one"
        )


def _first_observation(suite: Any, env: gymnasium.Env, seed: int, task: str, start: int) -> dict[str, Any]:
    options = {"task": task} if suite.n_starts is None else {"task": task, "start": start}
    asked = f"reset(seed={seed}, options={options})"
    with in_words(
        f"suite {suite.name}: the environment refuses {asked}", "correct its reset(), or tasks or n_starts of the suite"
    ):
        came: Any = env.reset(seed=seed, options=options)
    observation, info = _returned(suite, asked, came, ("observation", "info"))
    if info.get("task", task) != task:
        raise _error(suite, f"task {task!r}, which reset() was asked for", f"info['task'] {info['task']!r}", "obey the option")
    check_observation(suite, observation)
    return observation


def _resting_action(spec: ActionSpec, observation: dict[str, Any]) -> np.ndarray:
    """An action ``(a,)`` that holds the robot; where its state does not tell the targets, 0 within range, without rotation."""
    try:
        return hold_action(spec, None, [np.asarray(observation["state"])])[0]
    except SpecMismatch:
        action = np.clip(np.zeros(spec.n_dims), spec.low, spec.high)
    for at, group in spec.placed_action:
        if group.rotation != "none":
            action[at.start + group.n_position : at.stop] = from_rotation(Rotation.identity(), group.rotation)
    return action.astype(np.float32)


def _check_step(suite: Any, env: gymnasium.Env, observation: dict[str, Any]) -> None:
    action = _resting_action(suite.spec, observation)
    asked = f"step({action.round(3).tolist()})"
    with in_words(f"suite {suite.name}: the environment refuses {asked}", "it must take the card's raw actions"):
        came: Any = env.step(action)
    observation, _, *ends, info = _returned(suite, asked, came, ("observation", "reward", "terminated", "truncated", "info"))
    if not all(np.shape(end) == () and end in (True, False) for end in ends):
        raise _error(suite, f"terminated and truncated of {asked} as True or False", str(ends), "say whether the episode is over")
    success_of(env, info)
    check_observation(suite, observation)


def _returned(suite: Any, asked: str, came: Any, names: tuple[str, ...]) -> tuple:
    """What an environment returned, if it is a tuple of these, the last a dict."""
    expected = f"{asked} to return ({', '.join(names)})"
    if not isinstance(came, tuple) or len(came) != len(names):
        got = f"{len(came)} values" if isinstance(came, tuple) else type(came).__name__
        raise _error(suite, expected, got, "return them as gymnasium does, since its version 0.26")
    if not isinstance(came[-1], Mapping):
        raise _error(suite, f"{expected}, info a dict", f"info {came[-1]!r}", "return one, if only {}")
    return came


def success_of(env: gymnasium.Env, info: Mapping[str, Any]) -> bool:
    """What the info of a step says about success.

    Raises:
        SuiteError: It does not say, or something else than yes or no.
    """
    name = type(env.unwrapped).__name__
    if "is_success" not in info:
        raise SuiteError(f"expected info['is_success'] of {name} after each step, got {sorted(info)}; add it")
    said = info["is_success"]
    if np.shape(said) != () or said not in (True, False):
        raise SuiteError(
            f"expected info['is_success'] of {name} as True or False, got {said!r}; an episode's success is that of its last step"
        )
    return bool(said)


def check_observation(suite: Any, observation: Any) -> None:
    """Check that an observation has the cameras, images, state and instruction that the suite's spec promises.

    Raises:
        SuiteError: What was expected, what came.
    """
    keys = {"images", "state", "instruction"}
    if not isinstance(observation, Mapping) or not keys <= set(observation) or not isinstance(observation["images"], Mapping):
        came = sorted(map(str, observation)) if isinstance(observation, Mapping) else type(observation).__name__
        raise _error(suite, f"observations with {sorted(keys)}, images by camera", str(came), "see rvlm.envs.suites")
    images, spec = observation["images"], suite.spec
    if set(images) != set(spec.cameras):
        raise _error(suite, f"images of the cameras {list(spec.cameras)}", str(list(images)), "name them as the spec does")
    for camera, image in images.items():
        shape, dtype = getattr(image, "shape", ()), getattr(image, "dtype", None)
        if dtype != np.uint8 or len(shape) != 3 or shape[-1] != 3:
            came = f"{type(image).__name__} of shape {shape} and {dtype}"
            raise _error(suite, f"images (h, w, 3) of uint8 from {camera!r}", came, "give RGB from 0 to 255, channels last")
    state = observation["state"]
    if np.shape(state) != (len(spec.state_names),) or np.asarray(state).dtype.kind != "f" or not np.isfinite(state).all():
        expected = f"a state of {len(spec.state_names)} finite floats {list(spec.state_names)}"
        came = f"shape {np.shape(state)} of {np.asarray(state).dtype}: {state!r}"
        raise _error(suite, expected, came, "give the spec's state, in its order")
    if not isinstance(observation["instruction"], str) or not observation["instruction"]:
        raise _error(suite, "an instruction in words", repr(observation["instruction"]), "say what the task is")


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What differs between two observations, in words; empty if nothing does."""
    cameras = [name for name, image in one["images"].items() if not np.array_equal(image, other["images"][name])]
    return ", ".join([*cameras, *(["state"] if not np.array_equal(one["state"], other["state"]) else [])])


def _check_unknown_task_is_refused(suite: Any, env: gymnasium.Env) -> None:
    try:
        env.reset(seed=SEEDS[0], options={"task": NO_TASK})
    except Exception:  # of any kind: environments are others'
        return
    raise _error(suite, f"a refusal of the unknown task {NO_TASK!r}", "a reset", "raise in reset() for tasks that do not exist")
