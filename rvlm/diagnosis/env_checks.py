"""Checks of the environment against the recording: initial states, images, and the effect of the recorded actions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from rvlm.data.actions import ActionSpec
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.misreadings import ACTION_MISREADINGS, IMAGE_ERRORS
from rvlm.diagnosis.motion_faults import explain_motion, gain
from rvlm.diagnosis.results import CheckResult

NO_ENV = "skipped: no environment was given"
NO_SEEDS = "skipped: seeds of the data's episodes were not recorded"


def check_resets(inputs: DiagnosisInputs) -> CheckResult:
    """Do episodes with different seeds start differently, and are instructions those of the data?"""
    if inputs.env is None:
        return CheckResult("resets", NO_ENV)
    first, *others = inputs.reset_three_times()
    if others and all(_looks_equal(first, other) for other in others):
        return CheckResult("resets", f"{len(others) + 1} seeds gave the same initial state", "same start")
    for episode in inputs.sampled_episodes():
        observation, recorded = inputs.reset_to_recorded(episode), inputs.dataset.instruction(episode)
        if observation is None:
            return CheckResult("resets", "seeds give different initial states; those of the data's episodes were not recorded")
        if observation["instruction"] != recorded:
            measured = f"instruction {recorded!r} in the data, {observation['instruction']!r} in the environment"
            return CheckResult("resets", measured, "prompt")
    measured = f"seeds give different initial states; {inputs.n_episodes} instructions are the data's, word for word"
    return CheckResult("resets", measured)


def _looks_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    images = (np.array_equal(image, b["images"][camera]) for camera, image in a["images"].items())
    return np.array_equal(a["state"], b["state"]) and all(images)


def check_images(inputs: DiagnosisInputs) -> CheckResult:
    """Does the environment show what was recorded? Without one: do the cameras of the data show something?"""
    cameras, frames = inputs.cameras, inputs.dataset.frames_cache(inputs.cameras)
    recorded = {camera: [] for camera in cameras}
    shown = {camera: [] for camera in cameras}
    for episode in inputs.sampled_episodes():
        observation = inputs.reset_to_recorded(episode)
        for camera in cameras:
            recorded[camera].append(np.asarray(frames[camera][inputs.frame_slice(episode).start], np.float32))
            if observation is not None:
                shown[camera].append(np.asarray(observation["images"][camera], np.float32))
    for where, images in (("the data", recorded), ("the environment", shown)):
        if blank := [camera for camera in cameras if images[camera] and np.std(images[camera]) < 1]:
            return CheckResult("images", f"{', '.join(blank)} of {where} shows one colour", "image missing")
    if not shown[cameras[0]]:
        return CheckResult("images", NO_ENV if inputs.env is None else NO_SEEDS)
    return _compare_images(recorded, shown)


def _compare_images(recorded: dict[str, list[np.ndarray]], shown: dict[str, list[np.ndarray]]) -> CheckResult:
    """Difference of the shown from the recorded images, as they are and with each common error undone."""
    cameras = list(recorded)
    candidates = {"as they are": shown}
    candidates |= {name: {c: [change(i) for i in shown[c]] for c in cameras} for name, change in IMAGE_ERRORS.items()}
    if len(cameras) > 1:
        candidates["cameras swapped"] = dict(zip(cameras, reversed(list(shown.values())), strict=True))
    differences = {name: _difference(recorded, images) for name, images in candidates.items()}
    best, own = min(differences, key=differences.__getitem__), differences["as they are"]
    evidence = pd.DataFrame({"candidate": list(differences), "difference [gray levels]": list(differences.values())})
    if np.isinf(own):
        sizes = [f"{c} {recorded[c][0].shape[:2]} in the data, {shown[c][0].shape[:2]} in the environment" for c in cameras]
        return CheckResult("images", f"sizes differ: {'; '.join(sizes)}", "image size" if np.isinf(differences[best]) else best)
    measured = f"difference {own:.1f} gray levels as they are; least {differences[best]:.1f}, {best}"
    return CheckResult("images", measured, None if best == "as they are" else best, evidence)


def _difference(recorded: dict[str, list[np.ndarray]], images: dict[str, list[np.ndarray]]) -> float:
    """Mean absolute difference [gray levels]; infinite where sizes differ."""
    pairs = [pair for camera in recorded for pair in zip(recorded[camera], images[camera], strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return np.inf
    return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))


def check_replay(inputs: DiagnosisInputs) -> CheckResult:
    """Do the recorded actions lead to the recorded states?"""
    if inputs.reset_to_recorded(inputs.sampled_episodes()[0]) is None:
        return CheckResult("replay", NO_ENV if inputs.env is None else NO_SEEDS)
    error, episodes = _replay(inputs, lambda spec, actions: actions)
    column = "distance from the recorded states [spread of the state]"
    if error <= 0.01:
        evidence = pd.DataFrame({"candidate": ["as recorded"], column: [error]})
        measured = f"recorded actions lead to the recorded states (off by {error:.4f} of the state's spread)"
        return CheckResult("replay", measured, evidence=evidence)
    found = explain_motion(inputs.dataset.require_spec(), episodes)
    if found is not None and found.fault:
        measured = f"off by {error:.2f} of the state's spread; {found.measured}"
        return CheckResult("replay", measured, found.fault, found.evidence)
    ratio = gain(inputs.dataset.require_spec(), episodes) / gain(inputs.dataset.require_spec(), _recorded(inputs))
    if not 2 / 3 < ratio < 3 / 2 and np.isfinite(ratio):
        evidence = pd.DataFrame({"candidate": ["recorded", "environment"], "displacement [of the recorded one]": [1.0, ratio]})
        measured = f"off by {error:.2f} of the state's spread; an action moves {ratio:.2f} times as far as in the recording"
        return CheckResult("replay", measured, "control rate", evidence)
    errors = {"as recorded": error} | {name: _replay(inputs, change)[0] for name, change in ACTION_MISREADINGS.items()}
    evidence = pd.DataFrame({"candidate": list(errors), column: list(errors.values())})
    best = min(errors, key=errors.__getitem__)
    is_explained = best != "as recorded" and errors[best] < 0.7 * error
    measured = f"off by {error:.2f} of the state's spread; {best}: {errors[best]:.2f}"
    return CheckResult("replay", measured, best.split(":")[0] if is_explained else "environment unlike the recording", evidence)


def _recorded(inputs: DiagnosisInputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """Actions (n, a) and states (n + 1, s) of the examined episodes."""
    state = inputs.dataset.column("observation.state")
    return [(inputs.executed_actions(i)[:-1], state[inputs.frame_slice(i)]) for i in inputs.sampled_episodes()]


def _replay(
    inputs: DiagnosisInputs, change: Callable[[ActionSpec, np.ndarray], np.ndarray]
) -> tuple[float, list[tuple[np.ndarray, np.ndarray]]]:
    """Replay recorded actions, changed.

    Returns:
        Root mean square distance of replayed from recorded states, in units of each dimension's spread in the data; and for each
        episode the recorded actions (n, a), unchanged, and the states (n + 1, s) in the environment.
    """
    spec, state = inputs.dataset.require_spec(), inputs.dataset.column("observation.state")
    spread, errors, episodes = np.maximum(state.std(0), 1e-6), [], []
    for episode in inputs.sampled_episodes():
        observation = inputs.reset_to_recorded(episode) or {}
        actions, recorded = inputs.executed_actions(episode), state[inputs.frame_slice(episode)]
        states = [observation["state"]]
        for action, next_state in zip(np.clip(change(spec, actions), spec.low, spec.high)[:-1], recorded[1:], strict=True):
            observation, _, is_terminated, is_truncated, _ = inputs.env.step(action.astype(actions.dtype))
            states.append(observation["state"])
            errors.append((states[-1] - next_state) / spread)
            if is_terminated or is_truncated:
                break
        episodes.append((actions[: len(states) - 1], np.array(states)))
    return float(np.sqrt(np.mean(np.square(errors)))), episodes
