"""What is diagnosed, what an answer of the ladder looks like, and what to do about each fault that it can name."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pandas as pd

from rvlm.data.windows import EpisodeDataset, split
from rvlm.policy.policy import Policy

FIXES = {  # fault -> what to do about it
    "actions outside of the card": "give actions in the card's raw units, or mend the card",
    "control rate": "resample the data, or set rate_hz of card and environment to the data's",
    "quaternion order": "reorder the state's quaternion to what the card says (state_rotation), or mend the card",
    "quaternion sign": "flip quaternions to the half sphere of the one before (q and -q are one rotation)",
    "delta taken twice": "the actions are differences of displacements: store the displacements themselves",
    "absolute read as delta": "the actions are target poses: set is_delta to false, or store displacements",
    "gripper sign": "swap gripper_open and gripper_close in the card, or flip the gripper where actions are read or sent",
    "statistics of all episodes": "compute statistics on the training episodes alone, and train again",
    "quantiles merged as envelopes": "compute quantiles on all frames together, not from quantiles of parts, and train again",
    "statistics of another dataset": "give the policy the statistics of the data that it was trained on",
    "conventions differ": "use the environment that the policy was trained for, or convert between the two",
    "chunk execution": "execute as many actions of a chunk as the policy was made for (n_action_steps of its configuration)",
    "time limit": "allow at least as many steps as the longest demonstrations took",
    "same start": "hand the seed on to the simulator: every episode needs a start of its own",
    "prompt": "give the policy the instructions of the data, word for word",
    "image rotated by 180 degrees": "rotate the images where they are read, as image_rotation_deg of the card says",
    "image upside down": "flip the images' rows where they are read",
    "image mirrored": "flip the images' columns where they are read",
    "channels reversed": "read images as RGB, not BGR",
    "cameras swapped": "hand over the images in the card's order of cameras",
    "image missing": "find out why this camera shows nothing",
    "rotation layout": "read rotations in the layout that they were stored in (rotation of the card)",
    "statistics kind": "un-normalise by the kind of statistics that the policy was trained with",
    "not learned": "train longer or on more: the loss has not converged on this data",
    "environment unlike the recording": "the environment does something else with the same actions: compare simulator versions",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One question of the ladder and its answer.

    Attributes:
        name: Of the rung.
        measured: What was found, in words.
        fault: Key of `FIXES`, or None where the rung holds.
        evidence: What the answer rests on, as a table to draw: `candidate` or other columns, and the number that decided.
    """

    name: str
    measured: str
    fault: str | None = None
    evidence: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)

    @property
    def mend(self) -> str:
        """What to do, or nothing where the rung holds."""
        return FIXES[self.fault] if self.fault else ""


@dataclasses.dataclass(frozen=True)
class DiagnosisInputs:
    """What is diagnosed: a policy, the demonstrations that it was trained on, and the environment that it fails in.

    Attributes:
        policy: As `load_policy` gives it.
        dataset: With columns `seed` and `family` per episode where the environment can be started as it was recorded;
            without them the rungs that need this say so and hold.
        env: A `gymnasium.Env` with an `action_spec`.
        n_episodes: Recorded episodes that are looked at.
        n_frames: Of them, at most, where the policy is asked.
        seed: Draws the episodes.
    """

    policy: Policy
    dataset: EpisodeDataset
    env: Any
    n_episodes: int = 6
    n_frames: int = 200
    seed: int = 0

    def train(self) -> np.ndarray:
        """Training episodes, as `episodes.split` keeps them."""
        return split(self.dataset)[0]

    def episodes(self) -> list[int]:
        """The episodes that are looked at: drawn among the training ones."""
        train = self.train()
        order = np.random.default_rng(self.seed).permutation(len(train))
        return [int(train[i]) for i in order[: self.n_episodes]]

    def rows(self, episode: int) -> slice:
        """Frames of an episode in the dataset's columns."""
        row = self.dataset.episodes.iloc[episode]
        return slice(int(row["dataset_from_index"]), int(row["dataset_to_index"]))

    @functools.cached_property
    def executed(self) -> np.ndarray:
        """Raw actions (n_frames, a) that were executed, read once: `action_executed` where it was kept, else `action`."""
        kept = "action_executed" in self.dataset.features
        return self.dataset.column("action_executed" if kept else "action")

    def commands(self, episode: int) -> np.ndarray:
        """Raw actions (n, a) that were executed in an episode."""
        return self.executed[self.rows(episode)]

    def start(self, episode: int) -> dict | None:
        """The environment's first observation of a recorded episode, or None where its start was not recorded."""
        if "seed" not in self.dataset.episodes:
            return None
        row = self.dataset.episodes.iloc[episode]
        options = {"family": str(row["family"])} if "family" in row else None
        return self.env.reset(seed=int(row["seed"]), options=options)[0]
