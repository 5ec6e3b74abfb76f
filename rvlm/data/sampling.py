"""Fixed budgets of samples, and weighted mixtures of datasets; deterministic in the sample position, so training can resume.

Source: weighted mixtures as in Open X-Embodiment (arXiv 2310.08864), section IV.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset


class FixedBudgetDataset(Dataset):
    """Exactly `n_samples` samples in a fixed order: shuffled epochs, each sample with its own seed.

    Deterministic in the sample's position, so a stage that was killed resumes with the same data.

    Args:
        items: The data, a sequence; a batch is read at once if it has `__getitems__`.
        n_samples: Budget.
        seed: Of the order and of every sample.
        transform: (item, generator) -> sample.
    """

    def __init__(self, items: Any, n_samples: int, seed: int, transform: Any) -> None:
        self.items, self.n_samples, self.seed, self.transform = items, n_samples, seed, transform
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.n_samples

    def index_at(self, position: int) -> int:
        """Index of the item at a position of the order."""
        epoch, offset = divmod(position, len(self.items))
        if epoch not in self._epochs:
            self._epochs = {epoch: np.random.default_rng((self.seed, epoch)).permutation(len(self.items))}
        return int(self._epochs[epoch][offset])

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        indices = [self.index_at(i) for i in positions]
        together = getattr(self.items, "__getitems__", None)
        items = together(indices) if together else [self.items[index] for index in indices]
        return [self.transform(item, np.random.default_rng((self.seed, 1, i))) for item, i in zip(items, positions, strict=True)]


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
        self.position = np.zeros(n_samples, int)  # of each sample among those of its part
        for i in range(len(parts)):
            self.position[self.part == i] = np.arange((self.part == i).sum())

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        rows, samples = np.asarray(positions), [None] * len(positions)
        for part in np.unique(self.part[rows]):
            own = np.flatnonzero(self.part[rows] == part)
            for i, sample in zip(own, self.parts[part].__getitems__(self.position[rows[own]].tolist()), strict=True):
                samples[i] = sample
        return samples
