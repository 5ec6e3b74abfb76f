"""Faults that were written after the checks of `rvlm.diagnosis`, and are not used to develop them.

Some have a name among the fixes; of the others, which have none, it counts alone whether any check fails.
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
from rvlm.diagnosis.perturbed import PerturbedEnv


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A fault to inject.

    Attributes:
        where: "data", "environment" or "policy".
        description: In words.
        names: Faults that name it; empty where there is no name for it.
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


def blind_policy(inputs):
    """The policy sees grey images."""

    def grey(observation):
        return observation | {"images": {name: np.full_like(image, 128) for name, image in observation["images"].items()}}

    return dataclasses.replace(inputs, policy=ChangedPolicy(inputs.policy, observation=grey))


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
    """The first three positions or joints in a circle (the first two swapped where there are two)."""
    at = next(at for at, group in spec.action_groups(*DISPLACEMENTS, *TARGETS))
    n = min(3, at.stop - at.start)
    out, low, high = np.array(actions), np.array(spec.low)[at][:n], np.array(spec.high)[at][:n]
    share = (out[..., at][..., :n] - low) / (high - low)
    out[..., at.start : at.start + n] = low + np.roll(share, 1, axis=-1) * (high - low)
    return out


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


def noisy(observation):
    """A state with noise of 0.05."""
    noise = np.random.default_rng(0).normal(size=len(observation["state"]))
    return observation | {"state": (observation["state"] + 0.05 * noise).astype(np.float32)}


def dark_first_camera(images):
    """Frames without light."""
    return np.zeros_like(images)


HELD_OUT = (
    HeldOut("data", "two dimensions of the state swapped", ("dimensions swapped",), states(swap_two_states)),
    HeldOut("data", "a dimension of the state counted backwards", ("sign of a dimension",), states(negate_a_state)),
    HeldOut("data", "three dimensions in a circle", ("dimensions swapped",), in_data(rotate_three)),
    HeldOut("data", "left and right arm swapped", ("dimensions swapped",), in_data(swap_arms), is_two_armed),
    HeldOut("data", "a joint half as far and backwards", ("sign of a dimension",), in_data(scale_last)),
    HeldOut("data", "displacements half as large", ("control rate", "units"),
            in_data(lambda spec, a: change_displacements(spec, a, lambda values: 0.5 * values)), has(*DISPLACEMENTS)),
    HeldOut("data", "every second action repeated", ("control rate", "actions shifted by a step"),
            lambda inputs: with_actions(inputs, by_episode(inputs, every_second))),
    HeldOut("data", "actions two steps late", ("actions shifted by a step",),
            lambda inputs: with_actions(inputs, by_episode(inputs, lambda v: np.concatenate([v[:1], v[:1], v[:-2]])))),
    HeldOut("data", "all cameras dark", ("image missing",), lambda inputs: with_data(inputs, frames=dark_first_camera)),
    HeldOut("data", "grippers always open", (), in_data(open_grippers), has("gripper")),
    HeldOut("environment", "actions a step late", ("actions shifted by a step",),
            lambda inputs: dataclasses.replace(inputs, env=LateEnv(inputs.env))),
    HeldOut("environment", "three dimensions in a circle", ("dimensions swapped",), in_env(rotate_three)),
    HeldOut("environment", "a joint half as far and backwards", ("sign of a dimension",), in_env(scale_last)),
    HeldOut("environment", "displacements doubled", ("control rate", "units"),
            in_env(lambda spec, a: change_displacements(spec, a, lambda values: 2 * values)), has(*DISPLACEMENTS)),
    HeldOut("environment", "grippers always open", (), in_env(open_grippers), has("gripper")),
    HeldOut("environment", "images zoomed", (), lambda inputs: with_env(inputs, observe=zoomed)),
    HeldOut("environment", "noise on the state", (), lambda inputs: with_env(inputs, observe=noisy)),
    HeldOut("policy", "three dimensions in a circle", ("dimensions swapped",), changed_policy(rotate_three)),
    HeldOut("policy", "a joint half as far and backwards", ("sign of a dimension",), changed_policy(scale_last)),
    HeldOut("policy", "actions divided by fifty", ("units",), changed_policy(lambda spec, a: a / 50)),
    HeldOut("policy", "sees grey images", ("not learned",), blind_policy),
)  # fmt: skip
