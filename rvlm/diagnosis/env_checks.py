"""Checks of the environment against the recording: initial states, images, and the effect of the recorded actions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from rvlm.data.actions import ActionSpec
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.misreadings import ACTION_MISREADINGS, IMAGE_ERRORS
from rvlm.diagnosis.motion_faults import explain_motion, gain
from rvlm.diagnosis.results import CheckResult

UNLIKE = 8  # difference of a camera's images that no compression makes, which is about 1 [gray levels]
NO_ENV = "skipped: no environment was given"
NO_SEEDS = "skipped: seeds of the data's episodes, or the suite's tasks, were not recorded"


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
    candidates["cameras swapped"] = _assigned(recorded, shown)
    differences = {name: _difference(recorded, images) for name, images in candidates.items()}
    best, own = min(differences, key=differences.__getitem__), differences["as they are"]
    evidence = pd.DataFrame({"candidate": list(differences), "difference [gray levels]": list(differences.values())})
    if np.isinf(own):
        sizes = [f"{c} {recorded[c][0].shape[:2]} in the data, {shown[c][0].shape[:2]} in the environment" for c in cameras]
        return CheckResult("images", f"sizes differ: {'; '.join(sizes)}", "image size" if np.isinf(differences[best]) else best)
    measured = f"difference {own:.1f} gray levels as they are; least {differences[best]:.1f}, {best}"
    if differences[best] < 0.9 * own:
        return CheckResult("images", measured, best, evidence)
    of_camera = {camera: _difference({camera: recorded[camera]}, {camera: shown[camera]}) for camera in cameras}
    worst = max(of_camera, key=of_camera.__getitem__)
    if of_camera[worst] > UNLIKE:
        return CheckResult("images", f"{measured}; {worst}: {of_camera[worst]:.1f}", "image unlike the recording", evidence)
    return CheckResult("images", measured, evidence=evidence)


def _assigned(recorded: dict[str, list[np.ndarray]], shown: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """Shown images under the names of those cameras whose recorded images they are like."""
    cameras = list(recorded)
    off = [[_difference({"": recorded[camera]}, {"": shown[other]}) for other in cameras] for camera in cameras]
    best = linear_sum_assignment(np.minimum(off, 1e6))[1]
    return {camera: shown[cameras[i]] for camera, i in zip(cameras, best, strict=True)}


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
    if all(len(inputs.executed_actions(episode)) < 2 for episode in inputs.sampled_episodes()):
        return CheckResult("replay", "skipped: recorded episodes have a single step, which leads to no recorded state")
    if not inputs.dataset.require_spec().state_names:
        return CheckResult("replay", "skipped: the robot tells no state")
    distances, episodes, ends = _replay(inputs, lambda spec, actions: actions)
    error = float(np.sqrt(np.mean(np.square(distances))))
    column = "distance from the recorded states [spread of the state]"
    if error <= 0.01:
        evidence = pd.DataFrame({"candidate": ["as recorded"], column: [error]})
        measured = f"recorded actions lead to the recorded states (off by {error:.4f} of the state's spread) {ends.measured}"
        return CheckResult("replay", measured, "environment ends early" if ends.n_early else None, evidence)
    if not np.isfinite(error):
        return CheckResult("replay", "the environment's state is NaN or infinite", "numbers that are not finite")
    found = explain_motion(inputs.dataset.require_spec(), episodes)
    if found is not None and found.fault:
        measured = f"off by {error:.2f} of the state's spread; {found.measured}"
        return CheckResult("replay", measured, found.fault, found.evidence)
    ratio = gain(inputs.dataset.require_spec(), episodes) / gain(inputs.dataset.require_spec(), _recorded(inputs))
    if not 2 / 3 < ratio < 3 / 2 and np.isfinite(ratio):
        evidence = pd.DataFrame({"candidate": ["recorded", "environment"], "displacement [of the recorded one]": [1.0, ratio]})
        measured = f"off by {error:.2f} of the state's spread; an action moves {ratio:.2f} times as far as in the recording"
        return CheckResult("replay", measured, "control rate", evidence)
    means = {"as recorded": distances.mean()} | {name: _replay(inputs, c)[0].mean() for name, c in ACTION_MISREADINGS.items()}
    evidence = pd.DataFrame({"candidate": list(means), f"mean {column}": list(means.values())})  # one slip at a contact is a step
    best = min(means, key=means.__getitem__)
    is_explained = best != "as recorded" and means[best] < 0.7 * means["as recorded"]
    off = f"off by {means['as recorded']:.3f} of the state's spread on average {ends.measured}"
    measured = f"{off}; {best}: {means[best]:.3f}"
    unexplained = "environment ends early" if ends.n_early else "environment unlike the recording"
    return CheckResult("replay", measured, best.split(":")[0] if is_explained else unexplained, evidence)


class Ends(NamedTuple):
    """Ends of replayed episodes: recorded steps, those of them that were replayed, episodes that ended early without success."""

    n_recorded: int
    n_replayed: int
    n_early: int

    @property
    def measured(self) -> str:
        """In words."""
        early = f", {self.n_early} episodes ended early by themselves" if self.n_early else ""
        return f"in {self.n_replayed} of {self.n_recorded} recorded steps{early}"


def _recorded(inputs: DiagnosisInputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """Actions (n, a) and states (n + 1, s) of the examined episodes."""
    state = inputs.dataset.column("observation.state")
    return [(inputs.executed_actions(i)[:-1], state[inputs.frame_slice(i)]) for i in inputs.sampled_episodes()]


def _replay(
    inputs: DiagnosisInputs, change: Callable[[ActionSpec, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]], Ends]:
    """Replay recorded actions, changed.

    Returns:
        Distance (steps,) of each replayed from its recorded state, root mean square over dimensions in units of their spread in
        the data; for each episode the recorded actions (n, a), unchanged, and the states (n + 1, s) in the environment; and how
        they ended.
    """
    spec, state = inputs.dataset.require_spec(), inputs.dataset.column("observation.state")
    spread, errors, episodes, ends = np.maximum(state.std(0), 1e-6), [], [], []
    for episode in inputs.sampled_episodes():
        observation = inputs.reset_to_recorded(episode) or {}
        actions, recorded = inputs.executed_actions(episode), state[inputs.frame_slice(episode)]
        states = [observation["state"]]
        is_over, is_success = False, False
        for action, next_state in zip(np.clip(change(spec, actions), spec.low, spec.high)[:-1], recorded[1:], strict=True):
            observation, is_over, is_success = inputs.step(action.astype(actions.dtype))
            states.append(observation["state"])
            errors.append((states[-1] - next_state) / spread)
            if is_over:
                break
        episodes.append((actions[: len(states) - 1], np.array(states)))
        ends.append((len(actions) - 1, len(states) - 1, len(states) < len(actions) and not is_success))
    distances = np.sqrt(np.mean(np.square(errors), axis=1))
    return distances, episodes, Ends(*(int(sum(values)) for values in zip(*ends, strict=True)))
