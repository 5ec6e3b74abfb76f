"""Faults to plant, one at a time, in data, policy or environment: what the ladder of `rvlm.diagnosis.ladder` must name.

Each was reported by users of a real system. Nothing on disk is changed: a planted case is a changed copy of a sound one.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from rvlm.data.actions import NormStats
from rvlm.data.windows import EpisodeDataset
from rvlm.diagnosis.cases import DiagnosisInputs
from rvlm.diagnosis.ladder import IMAGE_ERRORS, widest_quantiles
from rvlm.policy.policy import Policy


class PerturbedDataset(EpisodeDataset):
    """Demonstrations of which something was changed on the way.

    Args:
        dataset: The sound ones.
        columns: Name of a column -> what it becomes.
        frames: What images (n, h, w, 3) become.
        rate_hz: What it claims to be recorded at.
        attributes: Anything else, by name.
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
        self._changes, self._turn, self._rate_hz = columns or {}, frames, rate_hz or dataset.fps

    @property
    def fps(self) -> float:
        """As of `EpisodeDataset`, or what was put in its place."""
        return self._rate_hz

    def column(self, name: str) -> np.ndarray:
        """As of `EpisodeDataset`, changed."""
        return self._changes.get(name, np.asarray)(super().column(name))

    def frames_cache(self, cameras: Any = None) -> dict[str, np.ndarray]:
        """As of `EpisodeDataset`, changed."""
        return {camera: self._turn(images) for camera, images in super().frames_cache(cameras).items()}


class PerturbedEnv:
    """An environment that shows or does something else than it should.

    Args:
        env: The sound one.
        observe: What an observation becomes.
        act: What a raw action (a,) becomes.
        seed: What a seed becomes.
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
        """What the conventions are read from."""
        return self._env.unwrapped

    def reset(self, *, seed: int, options: dict | None = None) -> tuple[dict, dict]:
        """As of the sound one, changed."""
        observation, info = self._env.reset(seed=self._seed(seed), options=options)
        return self._observe(observation), info

    def step(self, action: np.ndarray) -> tuple:
        """As of the sound one, changed."""
        observation, *rest = self._env.step(self._act(np.asarray(action)))
        return self._observe(observation), *rest


def _data(case: DiagnosisInputs, **changes: Any) -> DiagnosisInputs:
    return dataclasses.replace(case, dataset=PerturbedDataset(case.dataset, **changes))


def _actions(case: DiagnosisInputs, change: Callable[[np.ndarray], np.ndarray]) -> DiagnosisInputs:
    return _data(case, columns={"action": change, "action_executed": change})


def _env(case: DiagnosisInputs, **changes: Any) -> DiagnosisInputs:
    return dataclasses.replace(case, env=PerturbedEnv(case.env, **changes))


def _images(turn: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict], dict]:
    return lambda observation: {k: turn(v) if "image" in k else v for k, v in observation.items()}


def _stats(case: DiagnosisInputs, change: Callable[[NormStats], NormStats]) -> DiagnosisInputs:
    model = copy.copy(case.policy.model)
    model.stats = {**model.stats, "action": change(model.stats["action"])}
    return dataclasses.replace(case, policy=Policy(model, case.policy.prompter.processor))


def _turned(actions: np.ndarray, scale: float, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    out = actions.copy()
    out[:, 3:6] = change(actions[:, 3:6] * scale) / scale
    return out


def _arm(actions: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([change(actions[..., :6]), actions[..., 6:]], axis=-1).astype(actions.dtype)


def _flipped_gripper(actions: np.ndarray) -> np.ndarray:
    return np.concatenate([actions[..., :6], -actions[..., 6:]], axis=-1)


def _twice(case: DiagnosisInputs) -> DiagnosisInputs:
    """Differences of displacements, episode by episode."""
    firsts = case.dataset.episodes["dataset_from_index"].to_numpy()

    def change(arm: np.ndarray) -> np.ndarray:
        out = np.diff(arm, axis=0, prepend=0.0)
        out[firsts] = arm[firsts]
        return np.clip(out, -1, 1)

    return _actions(case, lambda actions: _arm(actions, change))


def _absolute(case: DiagnosisInputs) -> DiagnosisInputs:
    """Target positions, squeezed into the card's range."""
    spec, state = case.dataset.require_spec(), case.dataset.column("observation.state")

    def change(actions: np.ndarray) -> np.ndarray:
        target = state[:, :3] + spec.to_si(actions, "dx", "dy", "dz")
        return np.concatenate([np.clip(target / 0.5, -1, 1), actions[:, 3:]], axis=1).astype(actions.dtype)

    return _actions(case, change)


def _euler(case: DiagnosisInputs) -> DiagnosisInputs:
    """Turns stored as Euler angles where the card says axis angle."""
    scale = case.dataset.require_spec().scale[3]
    to_euler = lambda vector: np.clip(Rotation.from_rotvec(vector).as_euler("xyz"), -scale, scale)  # noqa: E731
    return _actions(case, lambda actions: _turned(actions, scale, to_euler))


def _quaternions(case: DiagnosisInputs, scalar_first: bool = False, jumps: bool = False) -> DiagnosisInputs:
    """The state's turn as a quaternion, said by the card to be (x, y, z, w)."""
    spec, state = case.dataset.require_spec(), case.dataset.column("observation.state")
    q = Rotation.from_rotvec(state[:, 3:6]).as_quat(canonical=True, scalar_first=scalar_first)
    if jumps:
        q[::5] *= -1
    names, units = ("x", "y", "z", "qx", "qy", "qz", "qw", "gripper_opening"), ("m", "m", "m", "1", "1", "1", "1", "m")
    card = dataclasses.replace(spec, state_names=names, state_units=units, state_rotation="quat_xyzw")
    values = np.concatenate([state[:, :3], q, state[:, 6:]], axis=1)
    return _data(case, columns={"observation.state": lambda _: values}, spec=card)


def _all_episodes(case: DiagnosisInputs) -> DiagnosisInputs:
    every = case.dataset.stats(episodes=range(case.dataset.n_episodes))["action"]
    return _stats(case, lambda _: every)


def _envelopes(case: DiagnosisInputs) -> DiagnosisInputs:
    """Quantiles of the whole as the widest of the episodes' own."""
    return _stats(case, lambda stats: widest_quantiles(stats, case))


def _another_dataset(case: DiagnosisInputs) -> DiagnosisInputs:
    """Statistics as of a robot whose actions have another scale."""
    return _stats(case, lambda s: dataclasses.replace(s, q01=3 * s.q01, q99=3 * s.q99))


def _short(case: DiagnosisInputs) -> DiagnosisInputs:
    env = copy.copy(case.env)
    env.max_steps = 8
    return dataclasses.replace(case, env=env)


def _whole_chunks(case: DiagnosisInputs) -> DiagnosisInputs:
    model = case.policy.model
    policy = Policy(model, case.policy.prompter.processor, n_action_steps=model.config.chunk_size)
    return dataclasses.replace(case, policy=policy)


def _kind(case: DiagnosisInputs) -> DiagnosisInputs:
    return _stats(case, lambda stats: dataclasses.replace(stats, kind="min_max"))


def _swapped(observation: dict) -> dict:
    return {**observation, "image": observation["wrist_image"], "wrist_image": observation["image"]}


def _polite(observation: dict) -> dict:
    return {**observation, "instruction": f"What action should the robot take to {observation['instruction']}?"}


def _blind(observation: dict) -> dict:
    return {**observation, "wrist_image": np.zeros_like(observation["wrist_image"])}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault to plant.

    Attributes:
        where: "data", "policy" or "environment".
        how: In words.
        named: What the ladder must call it, a key of `rvlm.diagnosis.cases.FIXES`.
        plant: A sound case to one with the fault.
    """

    where: str
    how: str
    named: str
    plant: Callable[[DiagnosisInputs], DiagnosisInputs]


FAULTS: tuple[Fault, ...] = (
    Fault("policy", "min and max where q01 and q99 were trained", "statistics kind", _kind),
    Fault("data", "gripper: -1 opens", "gripper sign", lambda case: _actions(case, _flipped_gripper)),
    Fault("environment", "gripper: -1 opens", "gripper sign", lambda case: _env(case, act=_flipped_gripper)),
    Fault("data", "displacement of displacements", "delta taken twice", _twice),
    Fault("data", "targets as displacements", "absolute read as delta", _absolute),
    Fault("data", "Euler angles as axis angle", "rotation layout", _euler),
    Fault("data", "quaternion (w, x, y, z) as (x, y, z, w)", "quaternion order", lambda c: _quaternions(c, scalar_first=True)),
    Fault("data", "quaternions jump to the antipode", "quaternion sign", lambda case: _quaternions(case, jumps=True)),
    *(
        Fault(where, name, name, plant)
        for name, turn in IMAGE_ERRORS.items()
        for where, plant in (
            ("data", lambda case, turn=turn: _data(case, frames=turn)),
            ("environment", lambda case, turn=turn: _env(case, observe=_images(turn))),
        )
    ),
    Fault("environment", "static and wrist camera swapped", "cameras swapped", lambda case: _env(case, observe=_swapped)),
    Fault("environment", "wrist camera is black", "image missing", lambda case: _env(case, observe=_blind)),
    Fault("policy", "chunks executed whole", "chunk execution", _whole_chunks),
    Fault("environment", "the seed is ignored", "same start", lambda case: _env(case, seed=lambda seed: 0)),
    Fault("environment", "another wording around the instruction", "prompt", lambda case: _env(case, observe=_polite)),
    Fault("policy", "statistics of all episodes", "statistics of all episodes", _all_episodes),
    Fault("policy", "statistics of a robot with another scale", "statistics of another dataset", _another_dataset),
    Fault("policy", "quantiles as the widest of parts", "quantiles merged as envelopes", _envelopes),
    Fault("data", "twice as many frames a second as the card says", "control rate", lambda case: _data(case, rate_hz=20.0)),
    Fault(
        "environment", "an action lasts half as long", "control rate",
        lambda case: _env(case, act=lambda action: _arm(action, lambda arm: 0.5 * arm)),
    ),
    Fault("environment", "8 control steps allowed", "time limit", _short),
)  # fmt: skip
