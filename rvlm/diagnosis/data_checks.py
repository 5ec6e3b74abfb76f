"""Checks of the demonstrations alone: do they follow their data card, and does the hand move as commanded?"""

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.results import CheckResult

MAX_EPISODES = 100  # training episodes to read where only numbers are needed, no images


def check_demonstrations(inputs: DiagnosisInputs) -> CheckResult:
    """Do the demonstrations follow their data card: range, rate, rotations?"""
    dataset, spec = inputs.dataset, inputs.dataset.require_spec()
    try:
        spec.check(dataset.column("action"))
    except SpecMismatch as error:
        return CheckResult("data card", str(error), "actions outside of the card")
    if abs(dataset.fps - spec.rate_hz) > 0.01 * spec.rate_hz:
        return CheckResult("data card", f"data at {dataset.fps:g} Hz, card at {spec.rate_hz:g} Hz", "control rate")
    measured = f"{dataset.n_frames} frames at {dataset.fps:g} Hz follow card {spec.dataset!r}"
    if spec.state_rotation.startswith("quat"):
        return _check_quaternions(inputs, measured)
    return CheckResult("data card", measured)


def _check_quaternions(inputs: DiagnosisInputs, measured: str) -> CheckResult:
    """Sign and order of the state's quaternions; rotations between two steps are small."""
    spec = inputs.dataset.require_spec()
    first = next(i for i, name in enumerate(spec.state_names) if name.startswith("q"))
    is_scalar_last = spec.state_rotation == "quat_xyzw"
    state, dots, errors = inputs.dataset.column("observation.state"), [], []
    for episode in map(int, inputs.training_episodes()[:MAX_EPISODES]):
        q, actions = state[inputs.frame_slice(episode)][:, first : first + 4], inputs.executed_actions(episode)
        dots.append((q[1:] * q[:-1]).sum(1))
        errors.append([_rotation_error(q, spec, actions, is_last) for is_last in (is_scalar_last, not is_scalar_last)])
    n_jumps = int((np.concatenate(dots) < 0).sum())
    if n_jumps:
        return CheckResult("data card", f"the quaternion's sign jumps {n_jumps} times", "quaternion sign")
    as_in_card, other = np.mean(errors, axis=0)
    evidence = pd.DataFrame({"candidate": ["as in the card", "the other order"], "rotation error [rad]": [as_in_card, other]})
    if other < 0.8 * as_in_card:
        measured = f"commanded rotations agree better with the other order ({other:.3f} rad against {as_in_card:.3f})"
        return CheckResult("data card", measured, "quaternion order", evidence)
    return CheckResult("data card", measured, evidence=evidence)


def _rotation_error(q: np.ndarray, spec: ActionSpec, actions: np.ndarray, is_scalar_last: bool) -> float:
    """Mean angle between commanded and observed rotation of each step [rad]; `q` (n, 4) are the observed orientations."""
    commanded = Rotation.from_rotvec(spec.to_si(actions[:-1], *spec.names[3:6]))
    observed = Rotation.from_quat(q, scalar_first=not is_scalar_last)
    return float((observed[1:] * observed[:-1].inv() * commanded.inv()).magnitude().mean())


def check_motion(inputs: DiagnosisInputs) -> CheckResult:
    """Does the hand move as commanded, by the recorded states alone?"""
    spec = inputs.dataset.require_spec()
    if spec.names[:3] != ("dx", "dy", "dz") or not {"x", "y", "z"} <= set(spec.state_names):
        return CheckResult("motion", "skipped: the state does not hold the hand's position")
    motion = _hand_motion(inputs)
    commanded, opening = motion["commanded"], motion["opening"]
    as_displacement = _cosine_similarity(commanded, motion["displacement"])
    candidates = {
        "as displacement": as_displacement,
        "absolute read as delta": _cosine_similarity(commanded - commanded.mean(0), motion["position"]),
        "delta taken twice": _cosine_similarity(motion["next_commanded"], motion["displacement_change"]),
    }
    evidence = pd.DataFrame({"candidate": list(candidates), "correlation with the hand's motion [1]": list(candidates.values())})
    best = max(candidates, key=candidates.__getitem__)
    if spec.is_delta and best != "as displacement" and candidates[best] > as_displacement + 0.1:
        measured = f"correlation of actions and motion {as_displacement:.2f} as displacements, {candidates[best]:.2f}: {best}"
        return CheckResult("motion", measured, best, evidence)
    fingers = _cosine_similarity(motion["is_open"] - 0.5, opening - opening.mean())
    if fingers < -0.1:
        measured = f"fingers close where the card says open (correlation {fingers:.2f})"
        return CheckResult("motion", measured, "gripper sign", evidence)
    measured = f"the hand follows the actions (correlation {as_displacement:.2f}), the fingers too ({fingers:.2f})"
    return CheckResult("motion", measured, evidence=evidence)


def _hand_motion(inputs: DiagnosisInputs) -> dict[str, np.ndarray]:
    """Commanded and observed motion of the hand in the training episodes, one row per step.

    Returns:
        `commanded` and observed `displacement` (n, 3) [m], `position` (n, 3) after the step, relative to the episode's mean
        [m]; `next_commanded` and `displacement_change` (m, 3) [m], from the second step of an episode on; `is_open` (n, 1)
        as commanded, and `opening` (n, 1) of the fingers after the step.
    """
    spec, state = inputs.dataset.require_spec(), inputs.dataset.column("observation.state")
    xyz, parts = [spec.state_names.index(name) for name in "xyz"], []
    for episode in map(int, inputs.training_episodes()[:MAX_EPISODES]):
        observed, actions = state[inputs.frame_slice(episode)], inputs.executed_actions(episode)[:-1]
        position, commanded = observed[:, xyz], spec.to_si(actions, "dx", "dy", "dz")
        parts.append(
            {
                "commanded": commanded,
                "displacement": np.diff(position, axis=0),
                "position": position[1:] - position.mean(0),
                "next_commanded": commanded[1:],
                "displacement_change": np.diff(position, n=2, axis=0),
                "is_open": spec.is_open(actions),
                "opening": observed[1:, -1:],
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _cosine_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine between two arrays (n, m), each flattened to one vector: 1 where all rows point the same way."""
    return float((a * b).sum() / max(np.sqrt((a**2).sum() * (b**2).sum()), 1e-12))
