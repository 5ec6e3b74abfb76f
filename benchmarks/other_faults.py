"""Faults that `rvlm.diagnosis.faults` does not hold, to count what the checks of `rvlm.diagnosis` name of them.

`OTHER`: some checks were mended since these were first counted, and the counts rose; they are not a test set. `FRESH`: written
when the checks stood as they are, by someone who had read them, with the names that count as right, before any was diagnosed.

Some faults have a name among the fixes; of the others, which have none, it counts alone whether any check fails.
"""

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.diagnosis.faults import (
    DISPLACEMENTS,
    TARGETS,
    by_episode,
    first_two,
    in_data,
    in_env,
    with_actions,
    with_data,
    with_env,
)
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.misreadings import change_displacements, change_groups
from rvlm.diagnosis.perturbed import PerturbedDataset, PerturbedEnv


@dataclasses.dataclass(frozen=True)
class OtherFault:
    """A fault to inject.

    Attributes:
        where: "data", "environment" or "policy".
        description: In words.
        names: Keys of `rvlm.diagnosis.results.FIXES` that count as right; empty where there is no name for it.
        inject: Inputs without a fault -> the same with it.
        applies: Whether a robot can have it.
    """

    where: str
    description: str
    names: tuple[str, ...]
    inject: Callable[[DiagnosisInputs], DiagnosisInputs]
    applies: Callable[[ActionSpec], bool] = lambda spec: True


class LateEnv(PerturbedEnv):
    """Executes each action one step late; the first is repeated."""

    def reset(self, **options: Any) -> tuple[dict, dict]:
        """As of the unchanged environment."""
        self._waiting = deque()
        return super().reset(**options)

    def step(self, action: np.ndarray) -> tuple:
        """As of the unchanged environment, with the action before."""
        self._waiting.append(np.asarray(action))
        return super().step(self._waiting.popleft() if len(self._waiting) > 1 else self._waiting[0])


class ChangedPolicy:
    """A policy whose actions are changed on the way out, or whose observations on the way in."""

    def __init__(self, policy, actions=np.asarray, observation=dict):
        self._policy, self._actions, self._observation = policy, actions, observation
        self.action_spec = getattr(policy, "action_spec", None) or policy.robot.spec

    def reset(self, n_robots=1):
        """As of the unchanged policy."""
        self._policy.reset(n_robots=n_robots)

    def select_action(self, observations):
        """As of the unchanged policy, changed."""
        return self._actions(np.asarray(self._policy.select_action([self._observation(o) for o in observations])))


def changed_policy(change):
    """The policy's actions changed by a function of spec and actions (n, a)."""

    def inject(inputs):
        spec = inputs.dataset.require_spec()
        return dataclasses.replace(inputs, policy=ChangedPolicy(inputs.policy, lambda actions: change(spec, actions)))

    return inject


def seen_by_policy(change):
    """What the policy sees changed by a function of an observation."""
    return lambda inputs: dataclasses.replace(inputs, policy=ChangedPolicy(inputs.policy, observation=change))


def blind_policy(inputs):
    """The policy sees grey images."""

    def grey(observation):
        return observation | {"images": {name: np.full_like(image, 128) for name, image in observation["images"].items()}}

    return seen_by_policy(grey)(inputs)


def states(change):
    """The recorded state changed by a function of spec and states (n, s)."""
    return lambda inputs: with_data(
        inputs, columns={"observation.state": lambda state: change(inputs.dataset.require_spec(), state).astype(state.dtype)}
    )


def swap_two_states(spec, state):
    """The first two dimensions of the state swapped."""
    return np.concatenate([state[:, [1, 0]], state[:, 2:]], axis=1)


def negate_a_state(spec, state):
    """The second dimension of the state counted backwards."""
    return np.concatenate([state[:, :1], -state[:, 1:2], state[:, 2:]], axis=1)


def open_grippers(spec, actions):
    """Grippers that always open."""
    return change_groups(spec, actions, ("gripper",), lambda values, group: np.full_like(values, group.open))


def scale_last(spec, actions):
    """The second position or joint moves backwards around its middle at half its size: a gear of the wrong ratio, and sign."""
    out, j = np.array(actions), first_two(spec)[1]
    middle = (spec.low[j] + spec.high[j]) / 2
    out[..., j] = middle - 0.5 * (out[..., j] - middle)
    return out


def rotate_three(spec, actions):
    """The first three positions or joints in a circle."""
    at = next(at for at, group in spec.action_groups(*DISPLACEMENTS, *TARGETS))
    at = slice(at.start, at.start + 3)
    out, low, high = np.array(actions), np.array(spec.low)[at], np.array(spec.high)[at]
    out[..., at] = low + np.roll((out[..., at] - low) / (high - low), 1, axis=-1) * (high - low)
    return out


def has_three(spec):
    """Three positions or joints to turn in a circle; of two, that would be a swap, which is a known fault."""
    return next(group for _, group in spec.action_groups(*DISPLACEMENTS, *TARGETS)).n_position > 2


def swap_arms(spec, actions):
    """The halves of the action swapped: left arm and right arm."""
    return np.roll(actions, spec.n_dims // 2, axis=-1)


def is_two_armed(spec):
    """Two grippers."""
    return len(spec.gripper_indices) == 2


def has(*kinds):
    """Whether a robot has groups of such kinds."""
    return lambda spec: bool(spec.action_groups(*kinds))


def every_second(values):
    """Every second action repeated: recorded at half the rate."""
    return values[np.arange(len(values)) // 2 * 2]


def zoomed(observation):
    """Images of which the middle is shown, twice as large."""

    def zoom(image):
        h, w = image.shape[:2]
        return image[h // 4 : h // 4 + h // 2, w // 4 : w // 4 + w // 2].repeat(2, 0).repeat(2, 1)[:h, :w]

    images = observation["images"].items()
    return observation | {"images": {name: np.resize(zoom(image), image.shape) for name, image in images}}


def offset(observation):
    """A state that is off by numbers of about 0.05, the same at every step."""
    off = np.random.default_rng(0).normal(size=len(observation["state"]))
    return observation | {"state": (observation["state"] + 0.05 * off).astype(np.float32)}


def dark(images):
    """Frames without light."""
    return np.zeros_like(images)


OTHER = (
    OtherFault("data", "two dimensions of the state swapped", ("dimensions swapped",), states(swap_two_states)),
    OtherFault("data", "a dimension of the state counted backwards", ("sign of a dimension",), states(negate_a_state)),
    OtherFault("data", "three dimensions in a circle", ("dimensions swapped",), in_data(rotate_three), has_three),
    OtherFault("data", "left and right arm swapped", ("dimensions swapped",), in_data(swap_arms), is_two_armed),
    OtherFault("data", "a joint half as far and backwards", ("sign of a dimension",), in_data(scale_last)),
    OtherFault("data", "displacements half as large", ("control rate", "units"),
               in_data(lambda spec, a: change_displacements(spec, a, lambda values: 0.5 * values)), has(*DISPLACEMENTS)),
    OtherFault("data", "every second action repeated", ("control rate", "actions shifted by a step"),
               lambda inputs: with_actions(inputs, by_episode(inputs, every_second))),
    OtherFault("data", "actions two steps late", ("actions shifted by a step",),
               lambda inputs: with_actions(inputs, by_episode(inputs, lambda v: np.concatenate([v[:1], v[:1], v[:-2]])))),
    OtherFault("data", "all cameras dark", ("image missing",), lambda inputs: with_data(inputs, frames=dark)),
    OtherFault("data", "grippers always open", (), in_data(open_grippers), has("gripper")),
    OtherFault("environment", "actions a step late", ("actions shifted by a step",),
               lambda inputs: dataclasses.replace(inputs, env=LateEnv(inputs.env))),
    OtherFault("environment", "three dimensions in a circle", ("dimensions swapped",), in_env(rotate_three), has_three),
    OtherFault("environment", "a joint half as far and backwards", ("sign of a dimension",), in_env(scale_last)),
    OtherFault("environment", "displacements doubled", ("control rate", "units"),
               in_env(lambda spec, a: change_displacements(spec, a, lambda values: 2 * values)), has(*DISPLACEMENTS)),
    OtherFault("environment", "grippers always open", (), in_env(open_grippers), has("gripper")),
    OtherFault("environment", "images zoomed", (), lambda inputs: with_env(inputs, observe=zoomed)),
    OtherFault("environment", "a constant offset of the state", (), lambda inputs: with_env(inputs, observe=offset)),
    OtherFault("policy", "three dimensions in a circle", ("dimensions swapped",), changed_policy(rotate_three), has_three),
    OtherFault("policy", "a joint half as far and backwards", ("sign of a dimension",), changed_policy(scale_last)),
    OtherFault("policy", "actions divided by fifty", ("units",), changed_policy(lambda spec, a: a / 50)),
    OtherFault("policy", "sees grey images", ("not learned",), blind_policy),
)  # fmt: skip


# --- fresh faults -------------------------------------------------------------------------------------------------------


def is_odd(inputs):
    """(n,) bool: frames of every second episode."""
    return inputs.dataset.episode_of_frame % 2 == 1


def late(n, chosen):
    """Some dimensions of the actions n steps late, the first value repeated."""

    def change(values):
        out = np.array(values)
        out[:, chosen] = np.concatenate([np.repeat(values[:1, chosen], n, axis=0), values[:-n, chosen]])
        return out

    return lambda inputs: with_actions(inputs, by_episode(inputs, change))


def late_grippers(inputs):
    """Grippers three steps late."""
    return late(3, list(inputs.dataset.require_spec().gripper_indices))(inputs)


def weak_end(inputs):
    """Actions half as large in the last quarter of each episode."""

    def change(values):
        is_last = np.arange(len(values)) >= 3 * len(values) // 4
        return np.where(is_last[:, None], 0.5 * values, values)

    return with_actions(inputs, by_episode(inputs, change))


def degrees_at_times(inputs):
    """The first number of the state 57.3 times smaller in every second episode."""

    def change(state):
        out = np.array(state)
        out[is_odd(inputs), 0] *= np.pi / 180
        return out

    return with_data(inputs, columns={"observation.state": change})


def swap_instructions(inputs):
    """The instructions of the first two training episodes that have different ones."""
    dataset, (one, *rest) = inputs.dataset, map(int, inputs.training_episodes())
    other = next(i for i in rest if dataset.instruction(i) != dataset.instruction(one))
    tasks = dataset.episodes["tasks"].tolist()
    tasks[one], tasks[other] = tasks[other], tasks[one]
    return with_data(inputs, episodes=dataset.episodes.assign(tasks=tasks))


class ChangedCameras(PerturbedDataset):
    """Demonstrations with the attribute `change`: a change of all cameras' frames, camera -> (n, h, w, 3)."""

    def frames_cache(self, cameras=None, size=None):
        """As of `EpisodeDataset`, changed."""
        return self.change(super().frames_cache(cameras, size))


def changed_cameras(inputs, change):
    """Frames of all cameras changed together."""
    return dataclasses.replace(inputs, dataset=ChangedCameras(inputs.dataset, change=change))


def slow_camera(inputs):
    """Each third frame of the first camera is shown three times."""
    rows = by_episode(inputs, lambda rows: rows[np.arange(len(rows)) // 3 * 3])(np.arange(inputs.dataset.n_frames))
    return changed_cameras(inputs, lambda frames: {c: v if i else np.asarray(v)[rows] for i, (c, v) in enumerate(frames.items())})


def swap_cameras_at_times(inputs):
    """The first two cameras swapped in every second episode."""
    chosen = is_odd(inputs)[:, None, None, None]

    def change(frames):
        one, other = list(frames)[:2]
        swapped = {one: np.where(chosen, frames[other], frames[one]), other: np.where(chosen, frames[one], frames[other])}
        return {**frames, **swapped}

    return changed_cameras(inputs, change)


def first_camera(change):
    """The image of the environment's first camera changed."""

    def observe(observation):
        camera = next(iter(observation["images"]))
        return observation | {"images": observation["images"] | {camera: change(observation["images"][camera])}}

    return lambda inputs: with_env(inputs, observe=observe)


def brighter(image):
    """40 gray levels more."""
    return np.clip(image.astype(int) + 40, 0, 255).astype(np.uint8)


class LateImages(PerturbedEnv):
    """Shows the images of the step before."""

    def reset(self, **options):
        """As of the unchanged environment."""
        observation, info = super().reset(**options)
        self._images = observation["images"]
        return observation, info

    def step(self, action):
        """As of the unchanged environment, but for the images."""
        observation, *rest = super().step(action)
        self._images, images = observation["images"], self._images
        return observation | {"images": images}, *rest


class Unplugged(PerturbedEnv):
    """The motor of the first dimension stays where it is."""

    def reset(self, **options):
        """As of the unchanged environment."""
        observation, info = super().reset(**options)
        self._stays_at = float(observation["state"][0])
        return observation, info

    def step(self, action):
        """As of the unchanged environment, with a displacement of 0 or the first state as target."""
        action = np.array(action)
        action[0] = 0 if self.unwrapped.action_spec.action[0].kind in DISPLACEMENTS else self._stays_at
        return super().step(action)


def swapped_state(observation):
    """The first two numbers of the state swapped."""
    return observation | {"state": swap_two_states(None, np.asarray(observation["state"])[None])[0]}


def half_as_bright(observation):
    """Images half as bright."""
    return observation | {"images": {camera: image // 2 for camera, image in observation["images"].items()}}


FRESH = (
    OtherFault("data", "one dimension of the actions a step late", ("actions shifted by a step",), late(1, [0])),
    OtherFault("data", "grippers three steps late", ("actions shifted by a step",), late_grippers, has("gripper")),
    OtherFault("data", "actions half as large in the last quarter of each episode", ("control rate", "units"), weak_end),
    OtherFault("data", "state read at half the rate", ("control rate", "actions shifted by a step"),
               lambda inputs: with_data(inputs, columns={"observation.state": by_episode(inputs, every_second)})),
    OtherFault("data", "a dimension of the state in other units in every second episode", ("units",), degrees_at_times),
    OtherFault("data", "instructions of two episodes swapped", ("prompt",), swap_instructions),
    OtherFault("data", "two cameras swapped in every second episode", ("cameras swapped",), swap_cameras_at_times,
               lambda spec: len(spec.cameras) > 1),
    OtherFault("data", "each third frame of a camera shown three times", (), slow_camera),
    OtherFault("environment", "a motor does not move", ("state does not move",),
               lambda inputs: dataclasses.replace(inputs, env=Unplugged(inputs.env))),
    OtherFault("environment", "seeds shifted by one", ("image unlike the recording", "environment unlike the recording"),
               lambda inputs: with_env(inputs, seed=lambda seed: seed + 1)),
    OtherFault("environment", "a camera shifted by six pixels", ("image unlike the recording",),
               first_camera(lambda image: np.roll(image, 6, axis=1))),
    OtherFault("environment", "a camera brighter by 40 gray levels", ("image unlike the recording",), first_camera(brighter)),
    OtherFault("environment", "images a step late", (), lambda inputs: dataclasses.replace(inputs, env=LateImages(inputs.env))),
    OtherFault("policy", "two dimensions of the state swapped", ("dimensions swapped",), seen_by_policy(swapped_state),
               has(*TARGETS)),  # of displacements the stand-in's policy does not read these numbers
    OtherFault("policy", "sees images half as bright", (), seen_by_policy(half_as_bright)),
)  # fmt: skip
