"""Result of a diagnostic check, and the fix for each fault that a check can name."""

import dataclasses

import pandas as pd

FIXES = {  # fault -> how to fix it
    "actions outside of the card": "give actions in the card's raw units, or correct the card",
    "control rate": "resample the data, or set rate_hz of card and environment to the data's",
    "dimensions swapped": "bring the columns into the card's order, or list their order in the card",
    "sign of a dimension": "turn this dimension's sign where it is recorded or sent: is a motor mounted the other way round?",
    "zero of a dimension": "the targets have another zero than the state: subtract the offset, or calibrate again",
    "units": "convert the actions to the card's raw units (degrees and radians, metres and millimetres), or correct the card",
    "actions shifted by a step": "pair each observation with the action that follows it: drop the first or the last row",
    "delta read as absolute": "the actions are displacements: make the group's kind pose_delta or joint_delta, or store targets",
    "quaternion order": "reorder the quaternion to the rotation that the card's group names, or correct the card",
    "quaternion sign": "flip each quaternion to the half sphere of the previous one (q and -q are one rotation)",
    "delta taken twice": "the actions are differences of displacements: store the displacements themselves",
    "absolute read as delta": "the actions are targets: make the group's kind pose or joint, or store displacements",
    "gripper sign": "swap open and close of the card's gripper group, or flip the gripper where actions are read or sent",
    "statistics of all episodes": "compute statistics on the training episodes alone, and train again",
    "quantiles merged as envelopes": "compute quantiles on all frames together, not from quantiles of parts, and train again",
    "statistics of another dataset": "give the policy the statistics of the data that it was trained on",
    "conventions differ": "use the environment that the policy was trained for, or convert between the two",
    "chunk execution": "execute as many actions of a chunk as the policy was made for (n_action_steps of its configuration)",
    "time limit": "allow at least as many steps as the longest demonstrations took",
    "same start": "pass the seed on to the simulator: every episode needs its own initial state",
    "prompt": "give the policy the instructions of the data, word for word",
    "image rotated by 180 degrees": "rotate the images where they are read, as image_rotation_deg of the card says",
    "image upside down": "flip the images' rows where they are read",
    "image mirrored": "flip the images' columns where they are read",
    "channels reversed": "read images as RGB, not BGR",
    "cameras swapped": "pass the images in the card's order of cameras",
    "image size": "render or record at the same height and width",
    "image unlike the recording": "look at this camera's images beside the recorded ones: do scene, view, light and focus agree?",
    "image missing": "find out why this camera's image is constant",
    "rotation layout": "read rotations in the layout in which they were stored (rotation of the card)",
    "statistics kind": "un-normalise by the kind of statistics that the policy was trained with",
    "not learned": "train longer or on more data: the loss has not converged on these demonstrations",
    "numbers that are not finite": "drop or repair the frames, or mend the environment, in which the state is NaN or infinite",
    "state does not move": "read the encoders at every step: these numbers of the state are the same in all frames",
    "environment ends early": "let the environment run as long as the recording: its own time limit, or what ends an episode",
    "environment unlike the recording": "the same actions have another effect in this environment: compare simulator versions",
}


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """Result of one diagnostic check.

    Attributes:
        name: Of the check, a key of `rvlm.diagnosis.checklist.CHECKS`.
        measured: What was measured, in words.
        fault: Key of `FIXES`, or None where the check passes.
        evidence: Table to plot: `candidate` (a way to read the data) and a column with the number that decided.
    """

    name: str
    measured: str
    fault: str | None = None
    evidence: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)

    @property
    def fix(self) -> str:
        """How to fix the fault; empty where the check passes."""
        return FIXES[self.fault] if self.fault else ""
