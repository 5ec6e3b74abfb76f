"""Checks of the demonstrations alone: do they follow their data card, and does the robot move as commanded?"""

import numpy as np

from rvlm.data.errors import EpisodeError, SpecMismatch
from rvlm.data.windows import check_finite_state
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.motion import invalid_rotations
from rvlm.diagnosis.motion_faults import explain_motion
from rvlm.diagnosis.results import CheckResult

MAX_EPISODES = 100  # training episodes to read where only numbers are needed, no images


def check_demonstrations(inputs: DiagnosisInputs) -> CheckResult:
    """Do the demonstrations follow their data card: range, rate, rotations?"""
    dataset, spec = inputs.dataset, inputs.dataset.require_spec()
    actions, states = dataset.column("action"), dataset.column("observation.state")
    try:
        check_finite_state(spec, states, "state")
    except EpisodeError as error:
        return CheckResult("data card", str(error), "numbers that are not finite")
    try:
        spec.check(actions)
    except SpecMismatch as error:
        return CheckResult("data card", str(error), "actions outside of the card")
    if abs(dataset.fps - spec.rate_hz) > 0.01 * spec.rate_hz:
        return CheckResult("data card", f"data at {dataset.fps:g} Hz, card at {spec.rate_hz:g} Hz", "control rate")
    if wrong := invalid_rotations(spec, actions, states):
        return CheckResult("data card", wrong, "rotation layout")
    if n_jumps := _quaternion_jumps(inputs):
        return CheckResult("data card", f"the quaternion's sign jumps {n_jumps} times", "quaternion sign")
    return CheckResult("data card", f"{dataset.n_frames} frames at {dataset.fps:g} Hz follow card {spec.dataset!r}")


def _quaternion_jumps(inputs: DiagnosisInputs) -> int:
    """How often a quaternion of the state, or of the actions' targets, is followed by one of the other half sphere."""
    spec, n = inputs.dataset.require_spec(), 0
    for action, state in _motions(inputs):
        for values, placed in ((state, spec.placed_state), (action, spec.placed_action)):
            for at, group in placed:
                if "quat" in (group.rotation) and group.kind == "pose":
                    q = values[:, at][:, group.n_position :]
                    n += int(((q[1:] * q[:-1]).sum(1) < 0).sum())
    return n


def check_motion(inputs: DiagnosisInputs) -> CheckResult:
    """Does the robot move as commanded, by the recorded states alone?"""
    found = explain_motion(inputs.dataset.require_spec(), _motions(inputs))
    if found is None:
        return CheckResult("motion", "skipped: the state does not show what the actions move, or episodes have a single step")
    return CheckResult("motion", found.measured, found.fault, found.evidence)


def _motions(inputs: DiagnosisInputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """Executed actions (n, a) and the states (n + 1, s) around them, of training episodes."""
    state, episodes = inputs.dataset.column("observation.state"), inputs.training_episodes()[:MAX_EPISODES]
    return [(inputs.executed_actions(i)[:-1], state[inputs.frame_slice(i)]) for i in map(int, episodes)]
