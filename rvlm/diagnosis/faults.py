"""Faults to inject into data, policy or environment, one at a time: what `rvlm.diagnosis.checklist` must name.

Each was reported by users of a real system. Nothing on disk is changed: an injected fault is in a changed copy of the inputs.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from rvlm.data.actions import NormStats
from rvlm.data.windows import EpisodeDataset
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.misreadings import IMAGE_ERRORS
from rvlm.diagnosis.policy_checks import widest_quantiles
from rvlm.policy.policy import Policy


class PerturbedDataset(EpisodeDataset):
    """Demonstrations with some of their content changed as it is read.

    Args:
        dataset: The unchanged demonstrations.
        columns: Name of a column -> change of its values.
        frames: Change of images (n, h, w, 3).
        rate_hz: Rate to claim.
        attributes: Other attributes of `EpisodeDataset` to set.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        columns: dict[str, Callable[[np.ndarray], np.ndarray]] | None = None,
        frames: Callable[[np.ndarray], np.ndarray] = np.asarray,
        rate_hz: float | None = None,
        **attributes: Any,
    ) -> None:
        self.__dict__.update({**dataset.__dict__, **attributes})
        self._column_changes, self._frame_change, self._rate_hz = columns or {}, frames, rate_hz or dataset.fps

    @property
    def fps(self) -> float:
        """As of `EpisodeDataset`, or the claimed rate."""
        return self._rate_hz

    def column(self, name: str) -> np.ndarray:
        """As of `EpisodeDataset`, changed."""
        return self._column_changes.get(name, np.asarray)(super().column(name))

    def frames_cache(self, cameras: Any = None) -> dict[str, np.ndarray]:
        """As of `EpisodeDataset`, changed."""
        return {camera: self._frame_change(images) for camera, images in super().frames_cache(cameras).items()}


class PerturbedEnv:
    """An environment with changed observations, actions or seeds.

    Args:
        env: The unchanged environment.
        observe: Change of an observation.
        act: Change of a raw action (a,).
        seed: Change of a seed.
    """

    def __init__(
        self,
        env: Any,
        observe: Callable[[dict], dict] = dict,
        act: Callable[[np.ndarray], np.ndarray] = np.asarray,
        seed: Callable[[int], int] = int,
    ) -> None:
        self._env, self._observe, self._act, self._seed = env, observe, act, seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    @property
    def unwrapped(self) -> Any:
        """The unchanged environment, which the conventions are read from."""
        return self._env.unwrapped

    def reset(self, *, seed: int, options: dict | None = None) -> tuple[dict, dict]:
        """As of the unchanged environment, with the changes."""
        observation, info = self._env.reset(seed=self._seed(seed), options=options)
        return self._observe(observation), info

    def step(self, action: np.ndarray) -> tuple:
        """As of the unchanged environment, with the changes."""
        observation, *rest = self._env.step(self._act(np.asarray(action)))
        return self._observe(observation), *rest


def _data(inputs: DiagnosisInputs, **changes: Any) -> DiagnosisInputs:
    return dataclasses.replace(inputs, dataset=PerturbedDataset(inputs.dataset, **changes))


def _actions(inputs: DiagnosisInputs, change: Callable[[np.ndarray], np.ndarray]) -> DiagnosisInputs:
    return _data(inputs, columns={"action": change, "action_executed": change})


def _env(inputs: DiagnosisInputs, **changes: Any) -> DiagnosisInputs:
    return dataclasses.replace(inputs, env=PerturbedEnv(inputs.env, **changes))


def _images(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict], dict]:
    return lambda observation: observation | {"images": {name: change(v) for name, v in observation["images"].items()}}


def _stats(inputs: DiagnosisInputs, change: Callable[[NormStats], NormStats]) -> DiagnosisInputs:
    model = copy.copy(inputs.policy.model)
    model.stats = {**model.stats, "action": change(model.stats["action"])}
    return dataclasses.replace(inputs, policy=Policy(model, inputs.policy.prompt_builder.processor))


def _change_arm(actions: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([change(actions[..., :6]), actions[..., 6:]], axis=-1).astype(actions.dtype)


def _flip_gripper(actions: np.ndarray) -> np.ndarray:
    return np.concatenate([actions[..., :6], -actions[..., 6:]], axis=-1)


def _delta_twice(inputs: DiagnosisInputs) -> DiagnosisInputs:
    """Differences of displacements, episode by episode."""
    firsts = inputs.dataset.episodes["dataset_from_index"].to_numpy()

    def change(arm: np.ndarray) -> np.ndarray:
        out = np.diff(arm, axis=0, prepend=0.0)
        out[firsts] = arm[firsts]
        return np.clip(out, -1, 1)

    return _actions(inputs, lambda actions: _change_arm(actions, change))


def _absolute(inputs: DiagnosisInputs) -> DiagnosisInputs:
    """Target positions, clipped to the card's range."""
    spec, state = inputs.dataset.require_spec(), inputs.dataset.column("observation.state")

    def change(actions: np.ndarray) -> np.ndarray:
        target = state[:, :3] + spec.to_si(actions, "dx", "dy", "dz")
        return np.concatenate([np.clip(target / 0.5, -1, 1), actions[:, 3:]], axis=1).astype(actions.dtype)

    return _actions(inputs, change)


def _euler(inputs: DiagnosisInputs) -> DiagnosisInputs:
    """Rotations stored as Euler angles where the card says axis angle."""
    scale = inputs.dataset.require_spec().scale[3]

    def change(actions: np.ndarray) -> np.ndarray:
        out, euler = actions.copy(), Rotation.from_rotvec(scale * actions[:, 3:6]).as_euler("xyz")
        out[:, 3:6] = np.clip(euler / scale, -1, 1)
        return out

    return _actions(inputs, change)


def _quaternions(inputs: DiagnosisInputs, scalar_first: bool = False, sign_jumps: bool = False) -> DiagnosisInputs:
    """The state's rotation as a quaternion; the card says (x, y, z, w)."""
    spec, state = inputs.dataset.require_spec(), inputs.dataset.column("observation.state")
    q = Rotation.from_rotvec(state[:, 3:6]).as_quat(canonical=True, scalar_first=scalar_first)
    if sign_jumps:
        q[::5] *= -1
    names, units = ("x", "y", "z", "qx", "qy", "qz", "qw"), ("m", "m", "m", "1", "1", "1", "1")
    card = spec.replace_group("state", 0, names=names, units=units, rotation="quat_xyzw")
    values = np.concatenate([state[:, :3], q, state[:, 6:]], axis=1)
    return _data(inputs, columns={"observation.state": lambda _: values}, spec=card)


def _scalar_first(inputs: DiagnosisInputs) -> DiagnosisInputs:
    return _quaternions(inputs, scalar_first=True)


def _all_episodes(inputs: DiagnosisInputs) -> DiagnosisInputs:
    of_all = inputs.dataset.stats(episodes=range(inputs.dataset.n_episodes))["action"]
    return _stats(inputs, lambda _: of_all)


def _widest_of_episodes(inputs: DiagnosisInputs) -> DiagnosisInputs:
    """Quantiles merged as the widest of single episodes."""
    return _stats(inputs, lambda stats: widest_quantiles(stats, inputs))


def _another_dataset(inputs: DiagnosisInputs) -> DiagnosisInputs:
    """Statistics of a robot whose actions have another scale."""
    return _stats(inputs, lambda s: dataclasses.replace(s, q01=3 * s.q01, q99=3 * s.q99))


def _short_time_limit(inputs: DiagnosisInputs) -> DiagnosisInputs:
    env = copy.copy(inputs.env)
    env.max_steps = 8
    return dataclasses.replace(inputs, env=env)


def _whole_chunks(inputs: DiagnosisInputs) -> DiagnosisInputs:
    model = inputs.policy.model
    policy = Policy(model, inputs.policy.prompt_builder.processor, n_action_steps=model.config.chunk_size)
    return dataclasses.replace(inputs, policy=policy)


def _other_kind(inputs: DiagnosisInputs) -> DiagnosisInputs:
    return _stats(inputs, lambda stats: dataclasses.replace(stats, kind="min_max"))


def _swap_cameras(observation: dict) -> dict:
    images = observation["images"]
    return observation | {"images": dict(zip(images, reversed(images.values()), strict=True))}


def _rephrase(observation: dict) -> dict:
    return {**observation, "instruction": f"What action should the robot take to {observation['instruction']}?"}


def _black_last_camera(observation: dict) -> dict:
    images = observation["images"]
    return observation | {"images": images | {list(images)[-1]: np.zeros_like(list(images.values())[-1])}}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault to inject.

    Attributes:
        where: "data", "policy" or "environment".
        description: In words.
        expected: Key of `rvlm.diagnosis.results.FIXES` that the diagnosis must name.
        inject: Inputs without a fault -> the same with it.
    """

    where: str
    description: str
    expected: str
    inject: Callable[[DiagnosisInputs], DiagnosisInputs]


FAULTS: tuple[Fault, ...] = (
    Fault("policy", "min and max where q01 and q99 were trained", "statistics kind", _other_kind),
    Fault("data", "gripper: -1 opens", "gripper sign", lambda inputs: _actions(inputs, _flip_gripper)),
    Fault("environment", "gripper: -1 opens", "gripper sign", lambda inputs: _env(inputs, act=_flip_gripper)),
    Fault("data", "displacement of displacements", "delta taken twice", _delta_twice),
    Fault("data", "targets as displacements", "absolute read as delta", _absolute),
    Fault("data", "Euler angles as axis angle", "rotation layout", _euler),
    Fault("data", "quaternion (w, x, y, z) as (x, y, z, w)", "quaternion order", _scalar_first),
    Fault("data", "quaternions jump to the antipode", "quaternion sign", lambda inputs: _quaternions(inputs, sign_jumps=True)),
    *(
        Fault(where, name, name, inject)
        for name, change in IMAGE_ERRORS.items()
        for where, inject in (
            ("data", lambda inputs, change=change: _data(inputs, frames=change)),
            ("environment", lambda inputs, change=change: _env(inputs, observe=_images(change))),
        )
    ),
    Fault(
        "environment", "static and wrist camera swapped", "cameras swapped",
        lambda inputs: _env(inputs, observe=_swap_cameras),
    ),
    Fault("environment", "wrist camera is black", "image missing", lambda inputs: _env(inputs, observe=_black_last_camera)),
    Fault("policy", "chunks executed whole", "chunk execution", _whole_chunks),
    Fault("environment", "the seed is ignored", "same start", lambda inputs: _env(inputs, seed=lambda seed: 0)),
    Fault(
        "environment", "another prompt template around the instruction", "prompt",
        lambda inputs: _env(inputs, observe=_rephrase),
    ),
    Fault("policy", "statistics of all episodes", "statistics of all episodes", _all_episodes),
    Fault("policy", "statistics of a robot with another scale", "statistics of another dataset", _another_dataset),
    Fault("policy", "quantiles as the widest of parts", "quantiles merged as envelopes", _widest_of_episodes),
    Fault("data", "twice as many frames a second as the card says", "control rate", lambda inputs: _data(inputs, rate_hz=20.0)),
    Fault(
        "environment", "an action lasts half as long", "control rate",
        lambda inputs: _env(inputs, act=lambda action: _change_arm(action, lambda arm: 0.5 * arm)),
    ),
    Fault("environment", "8 control steps allowed", "time limit", _short_time_limit),
)  # fmt: skip
