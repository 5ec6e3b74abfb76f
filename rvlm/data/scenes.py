"""Stored scenes for vision-language training: the images of each, a record of its true state, and the words of the records."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class SceneWords:
    """What the records of scenes can name, as classes to learn.

    Attributes:
        colors, shapes: Of objects, which records name "COLOR SHAPE".
        fixtures: Names of all other things.
        states: Keys of a record that are true or false.
        cameras: Keys of a record with each thing's place (column, row in [0, 1]) in an image, in the order of the images.
    """

    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    fixtures: tuple[str, ...]
    states: tuple[str, ...]
    cameras: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write it beside the scenes."""
        (folder / "words.json").write_text(json.dumps(dataclasses.asdict(self)))


class Scenes:
    """Dataset of stored scenes: item i is its images (n, h, w, 3) uint8, and the record of its state.

    Args:
        folders: Each with `images.npy`, `scenes.jsonl` (a record a line) and `words.json`.

    Raises:
        ValueError: Folders of scenes with different words.
    """

    def __init__(self, folders: Iterable[str | Path]) -> None:
        folders = [Path(f) for f in folders]
        self.images = [np.load(f / "images.npy", mmap_mode="r") for f in folders]
        self.records = [json.loads(line) for f in folders for line in (f / "scenes.jsonl").read_text().splitlines()]
        self._ends = np.cumsum([len(i) for i in self.images])
        words = {str(folder): json.loads((folder / "words.json").read_text()) for folder in folders}
        first = next(iter(words.values()))
        if different := [folder for folder, named in words.items() if named != first]:
            raise ValueError(f"expected scenes with the same words.json, got others in {different} than in {next(iter(words))}")
        self.words = SceneWords(**{name: tuple(values) for name, values in first.items()})

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[np.ndarray, dict]:
        part = int(np.searchsorted(self._ends, i, side="right"))
        return np.array(self.images[part][i - self._ends[part]]), self.records[i]
