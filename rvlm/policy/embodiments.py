"""The robots that a policy was trained on: conventions, statistics, and how the policy is conditioned on which one acts.

Source: per-dataset statistics as in Open X-Embodiment (arXiv 2310.08864), section IV.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Num

from rvlm.data.actions import ActionSpec, NormStats
from rvlm.files import config_hash


@dataclasses.dataclass(frozen=True)
class Embodiment:
    """A robot that a policy was trained on.

    Attributes:
        spec: What its actions mean.
        stats: Of "action" and "observation.state" over its training episodes.
    """

    spec: ActionSpec
    stats: dict[str, NormStats]

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint, with a checksum over spec and statistics: `from_dict` refuses a mixture of two."""
        content = {"spec": self.spec.to_dict(), "stats": {name: s.to_dict() for name, s in self.stats.items()}}
        return {**content, "checksum": config_hash(content)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], dataset: str) -> Embodiment:
        """As `to_dict` gave it for `dataset`.

        Raises:
            ValueError: Spec and statistics do not belong together, or belong to another dataset.
        """
        spec = ActionSpec.from_dict(values["spec"])
        stats = {name: NormStats.from_dict(s) for name, s in values["stats"].items()}
        robot = cls(spec, stats)
        if robot.to_dict()["checksum"] != values["checksum"] or spec.dataset != dataset:
            raise ValueError(
                f"expected spec and statistics of {dataset!r} as they were saved together, got a spec of {spec.dataset!r} and "
                "statistics that were not saved with it; take both from one checkpoint, or train again"
            )
        return robot


def embodiments_of(config: Any) -> tuple[Embodiment, dict[str, Embodiment]]:
    """The target robot of a policy, and the others that it was trained on by dataset, from its `VLAConfig`.

    Raises:
        ValueError: There is none, a robot's parts do not belong together, or the cameras are not those of its card.
    """
    if config.backbone is None or config.spec is None or config.stats is None:
        raise ValueError("expected a configuration with backbone, spec and stats, got one without; build it by make_policy")
    spec = ActionSpec.from_dict(config.spec)
    stats = {name: NormStats.from_dict(values) for name, values in config.stats.items()}
    missing = [column for column in ("action", "observation.state") if column not in stats]
    if missing and stats:  # without any it is for shapes only, as in a memory plan
        raise ValueError(f"expected statistics of 'action' and 'observation.state', got {sorted(stats)}; add {missing}")
    unknown = [c for c in config.cameras if c not in spec.cameras]
    if unknown or not config.cameras:
        raise ValueError(f"expected cameras of card {spec.dataset!r}, {', '.join(spec.cameras)}; got {list(config.cameras)}")
    return Embodiment(spec, stats), {
        name: Embodiment.from_dict(values, name) for name, values in (config.embodiments or {}).items()
    }


@dataclasses.dataclass(frozen=True)
class EmbodimentConditioning:
    """Conditions samples of any robot for one policy; depends on the policy's configuration, not on its network.

    Attributes:
        kind: None, "name" (the robot's name before the instruction) or "token" (its index appended to the state).
        state_names: State dimensions that the policy takes: the target robot's.
        ids: Datasets of all robots that it was trained on; the position is the index of a robot's token.
    """

    kind: str | None
    state_names: tuple[str, ...]
    ids: tuple[str, ...]

    def __call__(self, embodiment: Embodiment, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with its state aligned and, by "name", the robot before its instruction."""
        instruction = self.instruction(embodiment, sample["instruction"])
        return {**sample, "state": self.align_state(embodiment, sample["state"]), "instruction": instruction}

    def instruction(self, embodiment: Embodiment, instruction: str) -> str:
        """The instruction, by "name" after the robot's name."""
        return with_embodiment_name(embodiment.spec, instruction) if self.kind == "name" else instruction

    def align_state(self, embodiment: Embodiment, state: Num[np.ndarray, "*n _"]) -> Num[np.ndarray, "*n _"]:
        """A normalised state (..., s) in the policy's order; by "token" (..., s + 1), with the robot's index last."""
        state = reorder_state(state, embodiment.spec.state_names, self.state_names)
        if self.kind != "token":
            return state
        index = self.ids.index(embodiment.spec.dataset)
        return np.concatenate([state, np.full((*state.shape[:-1], 1), index, state.dtype)], axis=-1)


def with_embodiment_name(spec: ActionSpec, instruction: str) -> str:
    """The instruction, prefixed by the robot's name."""
    return f"{spec.robot}: {instruction}"


def reorder_state(state: Num[np.ndarray, "*n _"], names: Sequence[str], wanted: Sequence[str]) -> Num[np.ndarray, "*n _"]:
    """A state (..., s) in another robot's order, matched by name; zero for dimensions that this robot does not have."""
    if tuple(names) == tuple(wanted):
        return state
    out = np.zeros((*state.shape[:-1], len(wanted)), state.dtype)
    for i, name in enumerate(wanted):
        if name in names:
            out[..., i] = state[..., tuple(names).index(name)]
    return out
