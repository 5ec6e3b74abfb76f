"""Checks of the environment against the recording: initial states, images, and the effect of the recorded actions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.misreadings import ACTION_MISREADINGS, IMAGE_ERRORS
from rvlm.diagnosis.results import CheckResult

NO_SEEDS = "skipped: seeds of the data's episodes were not recorded"


def check_resets(inputs: DiagnosisInputs) -> CheckResult:
    """Do episodes with different seeds start differently, and are instructions those of the data?"""
    first, *others = [inputs.env.reset(seed=seed)[0] for seed in (1, 2, 3)]
    if all(_looks_equal(first, other) for other in others):
        return CheckResult("resets", "three seeds gave the same initial state", "same start")
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
    """Does the environment show what was recorded?"""
    cameras = inputs.policy.model.config.cameras
    cache, recorded, rendered = inputs.dataset.frames_cache(cameras), [], []
    for episode in inputs.sampled_episodes():
        observation = inputs.reset_to_recorded(episode)
        if observation is None:
            return CheckResult("images", NO_SEEDS)
        recorded.append([cache[camera][inputs.frame_slice(episode).start] for camera in cameras])
        rendered.append([observation["images"][camera] for camera in cameras])
    expected, images = np.array(recorded, np.float32), np.array(rendered, np.float32)  # (n, cameras, h, w, 3)
    for where, shown in (("the data", expected), ("the environment", images)):
        if shown.std(axis=(0, 2, 3, 4)).min() < 1:
            return CheckResult("images", f"a camera of {where} shows one colour", "image missing")
    candidates = {"as they are": images, **{name: change(images) for name, change in IMAGE_ERRORS.items()}}
    if len(cameras) > 1:
        candidates["cameras swapped"] = images[:, ::-1]
    differences = {name: float(np.abs(candidate - expected).mean()) for name, candidate in candidates.items()}
    best = min(differences, key=differences.__getitem__)
    evidence = pd.DataFrame({"candidate": list(differences), "difference [gray levels]": list(differences.values())})
    measured = f"difference {differences['as they are']:.1f} gray levels as they are; least {differences[best]:.1f}, {best}"
    return CheckResult("images", measured, None if best == "as they are" else best, evidence)


def check_replay(inputs: DiagnosisInputs) -> CheckResult:
    """Do the recorded actions lead to the recorded states?"""
    if inputs.reset_to_recorded(inputs.sampled_episodes()[0]) is None:
        return CheckResult("replay", NO_SEEDS)
    error = _replay_error(inputs, lambda spec, actions: actions)
    errors = {"as recorded": error}
    if error > 0.01:
        errors |= {name: _replay_error(inputs, change) for name, change in ACTION_MISREADINGS.items()}
    column = "distance from the recorded states [spread of the state]"
    evidence = pd.DataFrame({"candidate": list(errors), column: list(errors.values())})
    if error <= 0.01:
        measured = f"recorded actions lead to the recorded states (off by {error:.4f} of the state's spread)"
        return CheckResult("replay", measured, evidence=evidence)
    best = min(errors, key=errors.__getitem__)
    measured = f"off by {error:.2f} of the state's spread; {best}: {errors[best]:.2f}"
    is_explained = best != "as recorded" and errors[best] < 0.7 * error
    fault = best.split(":")[0] if is_explained else "environment unlike the recording"
    return CheckResult("replay", measured, fault, evidence)


def _replay_error(inputs: DiagnosisInputs, change: Callable[[Any, np.ndarray], np.ndarray]) -> float:
    """Root mean square distance of replayed from recorded states, in units of each dimension's spread in the data."""
    spec, state = inputs.dataset.require_spec(), inputs.dataset.column("observation.state")
    spread, errors = np.maximum(state.std(0), 1e-6), []
    for episode in inputs.sampled_episodes():
        inputs.reset_to_recorded(episode)
        actions, recorded = change(spec, inputs.executed_actions(episode)), state[inputs.frame_slice(episode)]
        for action, next_state in zip(actions[:-1], recorded[1:], strict=True):
            observation, _, is_terminated, is_truncated, _ = inputs.env.step(action)
            errors.append((observation["state"] - next_state) / spread)
            if is_terminated or is_truncated:
                break
    return float(np.sqrt(np.mean(np.square(errors))))
