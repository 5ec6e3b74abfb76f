"""Faults to inject into data, policy or environment, one at a time: what `rvlm.diagnosis.checklist` must name.

Each was reported by users of a real system. Nothing on disk is changed: an injected fault is in a changed copy of the inputs.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from rvlm.data.actions import ActionSpec, NormStats
from rvlm.data.groups import LAYOUTS, Group
from rvlm.data.rotations import from_rotation, to_rotation
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.misreadings import IMAGE_ERRORS, change_displacements, change_groups, flip_grippers, relayout
from rvlm.diagnosis.motion import SHOWN_BY, paired_groups, raw_to_units
from rvlm.diagnosis.motion_faults import OTHER_LAYOUT
from rvlm.diagnosis.perturbed import PerturbedDataset, PerturbedEnv
from rvlm.diagnosis.policy_checks import widest_quantiles
from rvlm.policy.policy import Policy

MOTION = tuple(kind for kind in SHOWN_BY if kind != "gripper")
DISPLACEMENTS, TARGETS = ("pose_delta", "joint_delta"), ("pose", "joint")
Inject = Callable[[DiagnosisInputs], DiagnosisInputs]


def with_data(inputs: DiagnosisInputs, **changes: Any) -> DiagnosisInputs:
    """Demonstrations with changes, which `PerturbedDataset` takes."""
    return dataclasses.replace(inputs, dataset=PerturbedDataset(inputs.dataset, **changes))


def with_actions(inputs: DiagnosisInputs, change: Callable[[np.ndarray], np.ndarray]) -> DiagnosisInputs:
    """Recorded actions with a change, kept in the card's range."""
    spec = inputs.dataset.require_spec()

    def changed(actions: np.ndarray) -> np.ndarray:
        return np.clip(change(actions), spec.low, spec.high).astype(actions.dtype)

    return with_data(inputs, columns={"action": changed, "action_executed": changed})


def with_env(inputs: DiagnosisInputs, **changes: Any) -> DiagnosisInputs:
    """An environment with changes, which `PerturbedEnv` takes."""
    return dataclasses.replace(inputs, env=PerturbedEnv(inputs.env, **changes))


def acting(inputs: DiagnosisInputs, change: Callable[[ActionSpec, np.ndarray], np.ndarray]) -> DiagnosisInputs:
    """Actions with a change on their way to the robot, kept in the card's range."""
    spec = inputs.env.unwrapped.action_spec
    return with_env(inputs, act=lambda action: np.clip(change(spec, action[None])[0], spec.low, spec.high).astype(action.dtype))


def _images(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict], dict]:
    return lambda observation: observation | {"images": {name: change(v) for name, v in observation["images"].items()}}


def _stats(inputs: DiagnosisInputs, change: Callable[[NormStats], NormStats]) -> DiagnosisInputs:
    assert inputs.trained is not None
    model = copy.copy(inputs.trained.model)
    model.stats = {**model.stats, "action": change(model.stats["action"])}
    return dataclasses.replace(inputs, policy=Policy(model, inputs.trained.prompt_builder.processor))


def by_episode(inputs: DiagnosisInputs, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """A change of the rows of one episode (n, d), applied to those of all."""
    ends = inputs.dataset.episodes["dataset_to_index"].to_numpy()[:-1]
    return lambda values: np.concatenate([change(part) for part in np.split(values, ends)])


def _delta_twice(inputs: DiagnosisInputs) -> DiagnosisInputs:
    """Differences of displacements."""
    spec = inputs.dataset.require_spec()
    differences = by_episode(inputs, lambda values: np.diff(values, axis=0, prepend=np.zeros_like(values[:1])))
    return with_actions(inputs, lambda actions: change_displacements(spec, actions, differences))


def _targets_as_displacements(inputs: DiagnosisInputs) -> DiagnosisInputs:
    """Target positions in the place of displacements, scaled into the card's range."""
    spec, state = inputs.dataset.require_spec(), inputs.dataset.column("observation.state")

    def change(actions: np.ndarray) -> np.ndarray:
        out = np.array(actions)
        for (at, group), (shown, other), same in paired_groups(spec):
            if "delta" in group.kind:
                columns = np.arange(at.start, at.stop)[[i for i, _ in same]]
                position = state[:, shown][:, [j for _, j in same]] * raw_to_units(other)[[j for _, j in same]]
                target = position + out[:, columns] * raw_to_units(group)[[i for i, _ in same]]
                out[:, columns] = target / np.abs(target).max() * np.array(group.high)[[i for i, _ in same]]
        return out

    return with_actions(inputs, change)


def _displacements_as_targets(inputs: DiagnosisInputs) -> DiagnosisInputs:
    """Displacements in the place of targets."""
    spec = inputs.dataset.require_spec()
    differences = by_episode(inputs, lambda values: np.diff(values, axis=0, append=values[-1:]))
    return with_actions(inputs, lambda a: change_groups(spec, a, TARGETS, lambda v, group: _of_positions(v, group, differences)))


def _of_positions(values: np.ndarray, group: Group, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Positions or joints of a group changed, its rotation not."""
    n = group.n_position
    return np.concatenate([change(values[..., :n]), values[..., n:]], axis=-1)


def _other_rotations(inputs: DiagnosisInputs) -> DiagnosisInputs:
    """Rotations of the actions stored in the layout for which they may be mistaken."""
    spec = inputs.dataset.require_spec()
    layout = next(group.rotation for group in spec.action if OTHER_LAYOUT.get(group.rotation))
    return with_actions(inputs, lambda actions: relayout(spec, actions, str(layout), OTHER_LAYOUT[str(layout)]))


def _quaternions(inputs: DiagnosisInputs, scalar_first: bool = False, sign_jumps: bool = False) -> DiagnosisInputs:
    """The state's rotation as a quaternion, which stays on its half sphere; the card says (x, y, z, w)."""
    spec, state = inputs.dataset.require_spec(), inputs.dataset.column("observation.state")
    index, (at, group) = next((i, p) for i, p in enumerate(spec.placed_state) if LAYOUTS[p[1].rotation] > 0)
    n = group.n_position
    q = from_rotation(to_rotation(state[:, at][:, n:], group.rotation), "quat_wxyz" if scalar_first else "quat_xyzw")
    q = by_episode(inputs, _continuous)(q)
    if sign_jumps:
        q[::5] *= -1
    names, units = (*group.names[:n], "qx", "qy", "qz", "qw"), (*group.units[:n], "1", "1", "1", "1")
    card = spec.replace_group("state", index, names=names, units=units, rotation="quat_xyzw")
    values = np.concatenate([state[:, : at.start + n], q, state[:, at.stop :]], axis=1)
    return with_data(inputs, columns={"observation.state": lambda _: values}, spec=card)


def _continuous(q: np.ndarray) -> np.ndarray:
    """Quaternions (n, 4), each on the half sphere of the one before."""
    turns = np.where((q[1:] * q[:-1]).sum(1) < 0, -1.0, 1.0)
    return q * np.cumprod(np.concatenate([[1.0], turns]))[:, None]


def first_two(spec: ActionSpec) -> tuple[int, int]:
    """Indices of the first two positions or joints of the actions."""
    at = next(at for at, group in spec.action_groups(*MOTION) if group.n_position > 1)
    return at.start, at.start + 1


def _swap_dimensions(spec: ActionSpec, actions: np.ndarray) -> np.ndarray:
    out, (i, j) = np.array(actions), first_two(spec)
    share = (np.array(actions) - spec.low) / np.subtract(spec.high, spec.low)  # the other's share of its range
    out[..., i] = spec.low[i] + share[..., j] * (spec.high[i] - spec.low[i])
    out[..., j] = spec.low[j] + share[..., i] * (spec.high[j] - spec.low[j])
    return out


def _turn_sign(spec: ActionSpec, actions: np.ndarray) -> np.ndarray:
    """The second position or joint counted the other way round."""
    out, j = np.array(actions), first_two(spec)[1]
    out[..., j] = spec.low[j] + spec.high[j] - out[..., j]
    return out


def _as_degrees(spec: ActionSpec, actions: np.ndarray) -> np.ndarray:
    """Numbers for another unit, 57.3 times larger."""
    return change_groups(spec, actions, MOTION, lambda v, group: _of_positions(v, group, lambda values: values * np.pi / 180))


def _shift_zero(spec: ActionSpec, actions: np.ndarray) -> np.ndarray:
    """The first target a quarter of its range lower, or higher where that is outside."""
    out, i = np.array(actions), spec.action_groups(*TARGETS)[0][0].start
    span = spec.high[i] - spec.low[i]
    out[..., i] += span / 4 * (-1 if out[..., i].mean() > (spec.high[i] + spec.low[i]) / 2 else 1)
    return out


def in_data(change: Callable[[ActionSpec, np.ndarray], np.ndarray]) -> Inject:
    """A change of raw actions (n, a), injected into the recording."""
    return lambda inputs: with_actions(inputs, lambda actions: change(inputs.dataset.require_spec(), actions))


def in_env(change: Callable[[ActionSpec, np.ndarray], np.ndarray]) -> Inject:
    """The same, injected on the way to the robot."""
    return lambda inputs: acting(inputs, change)


def _late(inputs: DiagnosisInputs) -> DiagnosisInputs:
    """Each action beside the observation after it."""
    return with_actions(inputs, by_episode(inputs, lambda values: np.concatenate([values[:1], values[:-1]])))


def _all_episodes(inputs: DiagnosisInputs) -> DiagnosisInputs:
    of_all = inputs.dataset.stats(episodes=range(inputs.dataset.n_episodes))["action"]
    return _stats(inputs, lambda _: of_all)


def _another_dataset(inputs: DiagnosisInputs) -> DiagnosisInputs:
    """Statistics of a robot whose actions have another scale."""
    return _stats(inputs, lambda s: dataclasses.replace(s, q01=3 * s.q01, q99=3 * s.q99))


def _short_time_limit(inputs: DiagnosisInputs) -> DiagnosisInputs:
    env = copy.copy(inputs.env)
    env.max_steps = 8
    return dataclasses.replace(inputs, env=env)


def _whole_chunks(inputs: DiagnosisInputs) -> DiagnosisInputs:
    assert inputs.trained is not None
    model = inputs.trained.model
    policy = Policy(model, inputs.trained.prompt_builder.processor, n_action_steps=model.config.chunk_size)
    return dataclasses.replace(inputs, policy=policy)


def _swap_cameras(observation: dict) -> dict:
    images = observation["images"]
    return observation | {"images": dict(zip(images, reversed(images.values()), strict=True))}


def _black_last_camera(observation: dict) -> dict:
    images = observation["images"]
    return observation | {"images": images | {list(images)[-1]: np.zeros_like(list(images.values())[-1])}}


def _has(*kinds: str) -> Callable[[ActionSpec], bool]:
    return lambda spec: bool(spec.action_groups(*kinds))


def _has_state_rotation(spec: ActionSpec) -> bool:
    return any(LAYOUTS[group.rotation] > 0 and "quat" not in group.rotation for group in spec.state)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault to inject.

    Attributes:
        where: "data", "policy" or "environment".
        description: In words.
        expected: Key of `rvlm.diagnosis.results.FIXES` that the diagnosis must name.
        inject: Inputs without a fault -> the same with it.
        applies: Whether a robot can have it.
    """

    where: str
    description: str
    expected: str
    inject: Inject
    applies: Callable[[ActionSpec], bool] = lambda spec: True


FAULTS: tuple[Fault, ...] = (
    Fault("policy", "min and max where q01 and q99 were trained", "statistics kind",
          lambda inputs: _stats(inputs, lambda stats: dataclasses.replace(stats, kind="min_max"))),
    Fault("data", "gripper flipped", "gripper sign", in_data(flip_grippers), _has("gripper")),
    Fault("environment", "gripper flipped", "gripper sign", in_env(flip_grippers), _has("gripper")),
    Fault("data", "displacement of displacements", "delta taken twice", _delta_twice, _has(*DISPLACEMENTS)),
    Fault("data", "targets as displacements", "absolute read as delta", _targets_as_displacements, _has(*DISPLACEMENTS)),
    Fault("data", "displacements as targets", "delta read as absolute", _displacements_as_targets, _has(*TARGETS)),
    Fault("data", "rotations in another layout", "rotation layout", _other_rotations,
          lambda spec: any(group.rotation in ("axis_angle", "euler_xyz") for group in spec.action)),
    Fault("data", "quaternion (w, x, y, z) as (x, y, z, w)", "quaternion order",
          lambda inputs: _quaternions(inputs, scalar_first=True), _has_state_rotation),
    Fault("data", "quaternions jump to the antipode", "quaternion sign",
          lambda inputs: _quaternions(inputs, sign_jumps=True), _has_state_rotation),
    Fault("data", "two dimensions swapped", "dimensions swapped", in_data(_swap_dimensions)),
    Fault("environment", "two dimensions swapped", "dimensions swapped", in_env(_swap_dimensions)),
    Fault("data", "a dimension counted backwards", "sign of a dimension", in_data(_turn_sign), _has(*DISPLACEMENTS, *TARGETS)),
    Fault("environment", "a dimension counted backwards", "sign of a dimension", in_env(_turn_sign)),
    Fault("data", "degrees as radians", "units", in_data(_as_degrees)),
    Fault("data", "another zero", "zero of a dimension", in_data(_shift_zero), _has(*TARGETS)),
    Fault("data", "actions a step late", "actions shifted by a step", _late),
    *(
        Fault(where, name, name, inject)
        for name, change in IMAGE_ERRORS.items()
        for where, inject in (
            ("data", lambda inputs, change=change: with_data(inputs, frames=change)),
            ("environment", lambda inputs, change=change: with_env(inputs, observe=_images(change))),
        )
    ),
    Fault("environment", "cameras swapped", "cameras swapped", lambda inputs: with_env(inputs, observe=_swap_cameras),
          lambda spec: len(spec.cameras) > 1),
    Fault("environment", "last camera is black", "image missing", lambda inputs: with_env(inputs, observe=_black_last_camera)),
    Fault("policy", "chunks executed whole", "chunk execution", _whole_chunks),
    Fault("environment", "the seed is ignored", "same start", lambda inputs: with_env(inputs, seed=lambda seed: 0)),
    Fault("environment", "another prompt template around the instruction", "prompt",
          lambda inputs: with_env(inputs, observe=lambda seen: seen | {"instruction": f"Robot, {seen['instruction']}!"})),
    Fault("policy", "statistics of all episodes", "statistics of all episodes", _all_episodes),
    Fault("policy", "statistics of a robot with another scale", "statistics of another dataset", _another_dataset),
    Fault("policy", "quantiles as the widest of parts", "quantiles merged as envelopes",
          lambda inputs: _stats(inputs, lambda stats: widest_quantiles(stats, inputs))),
    Fault("data", "twice as many frames a second as the card says", "control rate",
          lambda inputs: with_data(inputs, rate_hz=2 * inputs.dataset.fps)),
    Fault("environment", "an action lasts half as long", "control rate",
          in_env(lambda spec, action: change_displacements(spec, action, lambda values: 0.5 * values)), _has(*DISPLACEMENTS)),
    Fault("environment", "8 control steps allowed", "time limit", _short_time_limit),
)  # fmt: skip


def faults_of(inputs: DiagnosisInputs) -> tuple[Fault, ...]:
    """The faults that can be injected: those that the robot can have, of the policy and the environment that are there."""
    parts = {"data": inputs.dataset, "policy": inputs.trained, "environment": inputs.env}
    spec = inputs.dataset.require_spec()
    return tuple(fault for fault in FAULTS if parts[fault.where] is not None and fault.applies(spec))
