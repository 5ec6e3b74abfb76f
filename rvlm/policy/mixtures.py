"""Several robots in one training: each by its own conventions and statistics, in one order that depends on the place alone.

A policy knows every robot that it was trained on: what its actions mean (`ActionSpec`) and the statistics of its own training
episodes. Source: per-dataset statistics and weighted mixtures as in Open X-Embodiment (arXiv 2310.08864), section IV.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from rvlm.data.actions import ActionSpec, NormStats
from rvlm.files import config_hash


@dataclasses.dataclass(frozen=True)
class Embodiment:
    """A robot as a policy knows it.

    Attributes:
        spec: What its actions mean.
        stats: Of "action" and "observation.state" over its training episodes.
    """

    spec: ActionSpec
    stats: dict[str, NormStats]

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint, with a checksum: spec and statistics that were not saved together are refused when they are read."""
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
    """The robot that a policy is for, and the others that it was trained on, by dataset, from its `VLAConfig`.

    Raises:
        ValueError: There is none, a robot's parts do not belong together, or the cameras are not those of its card.
    """
    if config.backbone is None or config.spec is None or config.stats is None:
        raise ValueError("expected a configuration with backbone, spec and stats, got one without; build it by make_policy")
    spec = ActionSpec.from_dict(config.spec)
    stats = {name: NormStats.from_dict(values) for name, values in config.stats.items()}
    missing = [column for column in ("action", "observation.state") if column not in stats]
    if missing and stats:  # with none at all it is a model of shapes alone, as a plan and a probe make it
        raise ValueError(f"expected statistics of 'action' and 'observation.state', got {sorted(stats)}; add {missing}")
    unknown = [c for c in config.cameras if c not in spec.cameras]
    if unknown or not config.cameras:
        raise ValueError(f"expected cameras of card {spec.dataset!r}, {', '.join(spec.cameras)}; got {list(config.cameras)}")
    return Embodiment(spec, stats), {
        name: Embodiment.from_dict(values, name) for name, values in (config.embodiments or {}).items()
    }


def with_embodiment_name(spec: ActionSpec, instruction: str) -> str:
    """The instruction with the robot's name before it."""
    return f"{spec.robot}: {instruction}"


def reorder_state(state: np.ndarray, names: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """A state (..., s) of one robot in the order of another's: by name, zero where the robot has no such quantity."""
    if tuple(names) == tuple(wanted):
        return state
    out = np.zeros((*state.shape[:-1], len(wanted)), state.dtype)
    for i, name in enumerate(wanted):
        if name in names:
            out[..., i] = state[..., tuple(names).index(name)]
    return out


class FixedBudgetDataset(Dataset):
    """Exactly `n_samples` samples in a fixed order: epoch after epoch of shuffled data, each with a seed of its own.

    What a sample is depends on its place in the order alone, so a stage that was killed goes on with the same data.

    Args:
        n_items: Items of the data.
        n_samples: Budget.
        seed: Of the order and of every sample.
        make: (index of an item, generator) -> sample.
    """

    def __init__(self, n_items: int, n_samples: int, seed: int, make: Any) -> None:
        self.n_items, self.n_samples, self.seed, self.make = n_items, n_samples, seed, make
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.n_samples

    def item(self, i: int) -> int:
        """Which item of the data stands at place `i`."""
        epoch, place = divmod(i, self.n_items)
        if epoch not in self._epochs:
            self._epochs = {epoch: np.random.default_rng((self.seed, epoch)).permutation(self.n_items)}
        return int(self._epochs[epoch][place])

    def __getitem__(self, i: int) -> Any:
        return self.make(self.item(i), np.random.default_rng((self.seed, 1, i)))


class Mixture(Dataset):
    """A budget over several parts of the data, drawn by weight; each part has epochs of its own.

    Args:
        parts: One `FixedBudgetDataset` a part, over its own items and as long as this one.
        weights: Share of each part, above 0; equal if left out. They need not sum to 1.
        n_samples: Budget.
        seed: Of the order of parts.
        block: As many samples in a row are of one part.
    """

    def __init__(
        self, parts: Sequence[FixedBudgetDataset], weights: Sequence[float], n_samples: int, seed: int, block: int = 1
    ) -> None:
        share = np.array(weights or [1.0] * len(parts), float)
        if len(share) != len(parts) or share.min() <= 0:
            raise ValueError(f"expected a weight above 0 for each of {len(parts)} parts of the data, got {list(weights)}")
        blocks = np.random.default_rng((seed, 2)).choice(len(parts), -(-n_samples // block), p=share / share.sum())
        self.parts, self.part = list(parts), np.repeat(blocks, block)[:n_samples]
        self.place = np.zeros(n_samples, int)  # of each sample among those of its part
        for i in range(len(parts)):
            self.place[self.part == i] = np.arange((self.part == i).sum())

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, i: int) -> Any:
        return self.parts[self.part[i]][int(self.place[i])]
