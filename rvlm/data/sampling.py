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
        n_items: Items of the data.
        n_samples: Budget.
        seed: Of the order and of every sample.
        transform: (index of an item, generator) -> sample.
    """

    def __init__(self, n_items: int, n_samples: int, seed: int, transform: Any) -> None:
        self.n_items, self.n_samples, self.seed, self.transform = n_items, n_samples, seed, transform
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.n_samples

    def index_at(self, position: int) -> int:
        """Index of the item at a position of the order."""
        epoch, offset = divmod(position, self.n_items)
        if epoch not in self._epochs:
            self._epochs = {epoch: np.random.default_rng((self.seed, epoch)).permutation(self.n_items)}
        return int(self._epochs[epoch][offset])

    def __getitem__(self, i: int) -> Any:
        return self.transform(self.index_at(i), np.random.default_rng((self.seed, 1, i)))


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
        return self.parts[self.part[i]][int(self.position[i])]
