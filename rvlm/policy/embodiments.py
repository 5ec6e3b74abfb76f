"""The robots that a policy was trained on: conventions, statistics, and how the policy is conditioned on which one acts.

Source: per-dataset statistics as in Open X-Embodiment (arXiv 2310.08864), section IV.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Num, Shaped

from rvlm.data.actions import ActionSpec, Group, NormStats
from rvlm.data.normalization import require_reference
from rvlm.data.representations import absolute_actions, relative_actions
from rvlm.data.rotations import in_turn
from rvlm.files import config_hash


@dataclasses.dataclass(frozen=True)
class Embodiment:
    """A robot that a policy was trained on.

    Attributes:
        spec: What its actions mean.
        stats: Of "action" and "observation.state" over its training episodes.

    Raises:
        SpecMismatch: Statistics of quaternions without their reference.
    """

    spec: ActionSpec
    stats: dict[str, NormStats]

    def __post_init__(self) -> None:
        for column, placed in (("action", self.spec.placed_action), ("observation.state", self.spec.placed_state)):
            if column in self.stats:
                require_reference(placed, self.stats[column].reference)

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


def slots_of(specs: Sequence[ActionSpec]) -> tuple[list[list[Any]], list[str]]:
    """Dimensions of a policy of these robots: action slots (kind, name, is binary) and state names, in order of appearance."""
    actions = [slot for spec in specs for slot in _action_slots(spec.action)]
    states = [name for spec in specs for name in spec.state_names]
    return [list(slot) for slot in dict.fromkeys(actions)], list(dict.fromkeys(states))


def _action_slots(groups: tuple[Group, ...]) -> list[tuple[str, str, bool]]:
    return [(group.kind, name, group.is_binary) for group in groups for name in group.names]


def with_signs_of(robot: Embodiment, others: Sequence[Embodiment]) -> Embodiment:
    """The robot with, of q and -q, the mean rotation nearer to that of the first other one in the same slots and state names."""
    stats = {}
    for column, own in robot.stats.items():
        slots_in = (lambda spec: _action_slots(spec.action)) if column == "action" else (lambda spec: spec.state_names)
        first: dict[Any, float] = {}
        for other in others:
            if column in other.stats and (reference := other.stats[column].reference) is not None:
                first = {**dict(zip(slots_in(other.spec), reference, strict=True)), **first}
        placed = robot.spec.placed_action if column == "action" else robot.spec.placed_state
        stats[column] = own.nearer_to(np.array([first.get(slot, 0.0) for slot in slots_in(robot.spec)]), placed)
    return dataclasses.replace(robot, stats=stats)


@functools.lru_cache(maxsize=256)
def _places(groups: tuple[Group, ...], slots: tuple[tuple[str, str, bool], ...]) -> list[int]:
    """The slot of each action dimension."""
    return [slots.index(slot) for slot in _action_slots(groups)]


def _directions(groups: tuple[Group, ...]) -> list[int]:
    """-1 for each action dimension (a) that is a continuous gripper which closes towards larger numbers, else 1."""
    is_reversed = [not group.is_binary and group.gripper_ends[1] < group.gripper_ends[0] for group in groups]
    return [-1 if flip else 1 for flip, group in zip(is_reversed, groups, strict=True) for _ in group.names]


def slot_directions(specs: Sequence[ActionSpec], slots: Sequence[tuple[str, str, bool]]) -> tuple[int, ...]:
    """1 or, of a gripper that closes towards larger numbers, -1 for each slot (A,), by the first robot that has it."""
    first: dict[int, int] = {}
    for spec in specs:
        for place, sign in zip(_places(spec.action, tuple(slots)), _directions(spec.action), strict=True):
            first.setdefault(place, sign)
    return tuple(first.get(i, 1) for i in range(len(slots)))


def refuse_opposite_grippers(specs: Sequence[ActionSpec], slots: Sequence[tuple[str, str, bool]]) -> None:
    """Refuse continuous grippers of opposite directions in one slot, of a policy that does not say that it was trained in one.

    Raises:
        ValueError: With the robots that count otherwise than the first.
    """
    signs = np.array(slot_directions(specs, slots))
    others = [s.dataset for s in specs if (signs[_places(s.action, tuple(slots))] != _directions(s.action)).any()]
    if others:
        raise ValueError(
            "expected a policy whose configuration stores the 'directions' of its slots, as continuous grippers of its robots "
            f"count in opposite ones, got one of before, in which open and closed of {others} may be exchanged; "
            "train it again"
        )


@dataclasses.dataclass(frozen=True)
class EmbodimentConditioning:
    """Converts samples and actions of any robot for one policy; depends on its configuration, not on its network.

    Attributes:
        kind: None, "name" (the robot's name before the instruction) or "token" (its index appended to the state).
        state_names: State dimensions that the policy takes.
        ids: Datasets of all robots that it was trained on; the position is the index of a robot's token.
        action_slots: Kind, name and whether it is binary, of each action dimension that the policy predicts.
        is_relative: Whether it predicts targets relative to the state (`rvlm.data.representations`).
        directions: Of each action slot, as `slot_directions`: a gripper that counts the other way has its sign changed.
    """

    kind: str | None
    state_names: tuple[str, ...]
    ids: tuple[str, ...]
    action_slots: tuple[tuple[str, str, bool], ...]
    is_relative: bool = False
    directions: tuple[int, ...] = ()

    def __call__(self, embodiment: Embodiment, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with its state and actions aligned and, by "name", the robot before its instruction."""
        instruction = self.instruction(embodiment, sample["instruction"])
        aligned = {name: self.align_action(embodiment, sample[name]) for name in ("action", "action_mask") if name in sample}
        return {**sample, **aligned, "state": self.align_state(embodiment, sample["state"]), "instruction": instruction}

    def align_action(self, embodiment: Embodiment, values: Shaped[np.ndarray, "*n a"]) -> Shaped[np.ndarray, "*n A"]:
        """Values of the robot's dimensions (..., a) in the policy's slots (..., A); 0 or false where the robot has none."""
        places = _places(embodiment.spec.action, self.action_slots)
        values = self._oriented(embodiment, values)
        if places == list(range(len(self.action_slots))):
            return values
        out = np.zeros((*values.shape[:-1], len(self.action_slots)), values.dtype)
        out[..., places] = values
        return out

    def present_slots(self, embodiment: Embodiment) -> Bool[np.ndarray, " A"]:
        """Which of the policy's slots (A,) the robot has, as masks in training: not those that its card calls absent."""
        return self.align_action(embodiment, embodiment.spec.present)

    def _oriented(self, embodiment: Embodiment, values: np.ndarray) -> np.ndarray:
        """Values (..., a) of the robot's dimensions with the sign that their slots have, or back; a mask as it is."""
        if not self.directions or values.dtype == bool:
            return values
        groups = embodiment.spec.action
        signs = np.array(_directions(groups)) * np.array(self.directions)[_places(groups, self.action_slots)]
        return values if (signs == 1).all() else values * signs.astype(values.dtype)

    def robot_dims(self, embodiment: Embodiment, values: Shaped[np.ndarray, "*n A"]) -> Shaped[np.ndarray, "*n a"]:
        """Inverse of `align_action`."""
        return self._oriented(embodiment, values[..., _places(embodiment.spec.action, self.action_slots)])

    def raw_actions(
        self, embodiment: Embodiment, chunks: Num[np.ndarray, "*n k A"], state: Num[np.ndarray, "*n s"]
    ) -> Num[np.ndarray, "*n k a"]:
        """Raw actions (..., k, a) of predicted chunks (..., k, A), from raw states (..., s) at their beginning.

        Of q and -q the one that lies within the card's range.
        """
        spec = embodiment.spec
        raw = spec.unnormalize(self.robot_dims(embodiment, chunks), embodiment.stats["action"])
        raw = absolute_actions(spec, raw, state[..., None, :]) if self.is_relative else raw
        for at, group in spec.placed_action:
            if group.rotation.startswith("quat"):
                turned = slice(at.start + group.n_position, at.stop)
                raw[..., turned] = in_turn(raw[..., turned], group)
        return raw

    def normalized_actions(
        self, embodiment: Embodiment, raw: Num[np.ndarray, "*n k a"], state: Num[np.ndarray, "*n s"]
    ) -> Num[np.ndarray, "*n k A"]:
        """Inverse of `raw_actions`, 0 in slots that the robot does not have."""
        spec = embodiment.spec
        raw = relative_actions(spec, raw, state[..., None, :]) if self.is_relative else raw
        return self.align_action(embodiment, spec.normalize(raw, embodiment.stats["action"]))

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
