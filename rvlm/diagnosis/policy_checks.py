"""Checks of the policy: its statistics, its conventions, and its predictions on frames that it was trained on."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from torch.utils.data import Subset

from rvlm.data.actions import NormStats, StatsAccumulator
from rvlm.data.errors import SpecMismatch
from rvlm.data.pooled_statistics import training_values
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.misreadings import IMAGE_ERRORS
from rvlm.diagnosis.motion_faults import explain_predictions
from rvlm.diagnosis.results import CheckResult
from rvlm.evaluation.open_loop import policy_windows, predict_chunks

NO_POLICY = "skipped: no policy was given"
NO_MODEL = "skipped: the policy does not show its statistics"


def check_statistics(inputs: DiagnosisInputs) -> CheckResult:
    """Are the policy's statistics those of the training episodes of this dataset?"""
    if inputs.trained is None:
        return CheckResult("statistics", NO_MODEL if inputs.policy is not None else NO_POLICY)
    used = inputs.trained.robot.stats["action"]
    expected, of_all = (
        StatsAccumulator().update(_normalized_actions(inputs, episodes)).finish(used.kind, used.passthrough, used.floor)
        for episodes in (inputs.training_episodes(), np.arange(inputs.dataset.n_episodes))
    )
    distance, to_widest = _distance(used, expected), _distance(used, widest_quantiles(expected, inputs))
    columns = {"candidate": ["training episodes", "envelopes"], "difference in scale [1]": [distance, to_widest]}
    evidence = pd.DataFrame(columns)
    if used.count == of_all.count and _distance(used, of_all) < 1e-6 < distance:
        return CheckResult("statistics", f"made of all {used.count} frames", "statistics of all episodes", evidence)
    if to_widest < 0.1 * distance:
        measured = "quantiles are the widest of single episodes"
        return CheckResult("statistics", measured, "quantiles merged as envelopes", evidence)
    if distance > (0.4 if used.count != expected.count else 1e-3):
        measured = f"scales differ by {distance:.0%} from those of this dataset's training episodes"
        return CheckResult("statistics", measured, "statistics of another dataset", evidence)
    return CheckResult("statistics", f"scales within {distance:.0%} of this dataset's", evidence=evidence)


def widest_quantiles(stats: NormStats, inputs: DiagnosisInputs) -> NormStats:
    """Statistics whose q01 is the lowest, and q99 the highest, of any training episode: the result of a careless merge."""
    episodes = [_normalized_actions(inputs, np.array([episode])) for episode in inputs.training_episodes()]
    quantiles = np.array([np.quantile(values, (0.01, 0.99), axis=0) for values in episodes])
    return dataclasses.replace(stats, q01=quantiles[:, 0].min(0), q99=quantiles[:, 1].max(0))


def _normalized_actions(inputs: DiagnosisInputs, episodes: np.ndarray) -> np.ndarray:
    """Raw actions (n, a) of episodes as the policy predicts them: as recorded, or its chunks relative to the state."""
    return training_values(inputs.dataset, "action", episodes, inputs.trained and inputs.trained.model.config.relative_chunk)


def _distance(a: NormStats, b: NormStats) -> float:
    """Largest relative difference of scale, or of offset per scale, as kind "q01_q99"; the kind in use is checked elsewhere."""
    (offset_a, scale_a), (offset_b, scale_b) = (dataclasses.replace(s, kind="q01_q99").offset_and_scale() for s in (a, b))
    return float((np.maximum(np.abs(scale_a - scale_b), np.abs(offset_a - offset_b) / 2) / np.maximum(scale_a, scale_b)).max())


def check_interface(inputs: DiagnosisInputs) -> CheckResult:
    """Do policy, data and environment use the same conventions, and does the policy run with its own configuration?"""
    data = inputs.dataset.require_spec()
    policy = inputs.trained.robot.spec if inputs.trained else getattr(inputs.policy, "action_spec", None)
    env = inputs.env.unwrapped.action_spec if inputs.env is not None else None
    for one, other, what in ((policy, data, "policy vs data"), (policy or data, env, "policy or data vs environment")):
        try:
            if one is not None and other is not None:
                one.require_same(other, what)
        except SpecMismatch as error:
            return CheckResult("interface", str(error), "conventions differ")
    if inputs.trained and inputs.trained.n_action_steps != (config := inputs.trained.model.config).n_action_steps:
        steps = inputs.trained.n_action_steps
        measured = f"executes {steps} of {config.chunk_size} actions, made to execute {config.n_action_steps}"
        return CheckResult("interface", measured, "chunk execution")
    return _check_time_limit(inputs)


def _check_time_limit(inputs: DiagnosisInputs) -> CheckResult:
    episodes, suite = inputs.dataset.episodes, getattr(inputs.env, "suite", None)
    limits = pd.Series(getattr(inputs.env, "max_steps", None), index=episodes.index, dtype=float)
    if suite is not None and "task" in episodes:
        limits = episodes["task"].map(lambda task: suite.limit(task))
    length = episodes["length"].to_numpy()
    longest = f"demonstrations took up to {np.quantile(length, 0.95):.0f}"
    if bool(limits.isna().any()):
        return CheckResult("interface", f"conventions agree; no time limit is known, 95 % of {longest} steps")
    if np.mean(length > limits.to_numpy()) > 0.05:
        return CheckResult("interface", f"{limits.min():.0f} steps allowed, 95 % of {longest}", "time limit")
    return CheckResult("interface", f"conventions agree; {limits.min():.0f} steps allowed, 95 % of {longest}")


def check_open_loop(inputs: DiagnosisInputs) -> CheckResult:
    """Does the policy predict the recorded actions of its training frames, and would it with other images or statistics?"""
    if inputs.policy is None:
        return CheckResult("open loop", NO_POLICY)
    predict = _from_model(inputs) if inputs.trained else _from_observations(inputs)
    errors, (predicted, recorded) = _open_loop_errors(inputs, predict)
    column = "error of the first action [spread of the actions]"
    evidence = pd.DataFrame({"candidate": list(errors), column: list(errors.values())})
    mean_action, current = errors.pop("always the mean action"), errors["as it is"]
    best = min(errors, key=errors.__getitem__)
    measured = f"first action off by {current:.2f} of the actions' spread, always the mean action by {mean_action:.2f}"
    if current > 0.5 * mean_action and (found := explain_predictions(inputs.dataset.require_spec(), predicted, recorded)):
        return CheckResult("open loop", f"{measured}; {found.measured}", found.fault, found.evidence)
    if best != "as it is" and errors[best] < 0.9 * current:
        return CheckResult("open loop", f"{measured}; {best}: {errors[best]:.2f}", best.split(":")[0], evidence)
    return CheckResult("open loop", measured, None if current < 0.9 * mean_action else "not learned", evidence)


ChangeImages = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]  # camera -> images (..., h, w, 3)
Predict = Callable[[ChangeImages, str | None], tuple[np.ndarray, np.ndarray]]  # first actions (n, a): predicted, recorded


def _open_loop_errors(inputs: DiagnosisInputs, predict: Predict) -> tuple[dict[str, float], tuple[np.ndarray, np.ndarray]]:
    """Mean error of the first action, in spreads of the actions, for each way to read images and statistics; and the actions."""
    spec = inputs.dataset.require_spec()
    spread = np.maximum(inputs.dataset.column("action").std(0), 1e-6)
    is_continuous = spec.present & ~np.asarray(spec.is_binary)

    def error(predicted: np.ndarray, recorded: np.ndarray) -> float:
        return float((np.abs(predicted - recorded)[:, is_continuous] / spread[is_continuous]).mean())

    plain = predict(dict, None)
    errors = {"as it is": error(*plain)}
    if inputs.trained:
        used = inputs.trained.robot.stats["action"].kind
        kinds = [kind for kind in ("q01_q99", "min_max", "mean_std") if kind != used]
        errors |= {f"statistics kind: {kind}": error(*predict(dict, kind)) for kind in kinds}
    errors |= {name: error(*predict(_each_image(change), None)) for name, change in IMAGE_ERRORS.items()}
    if len(inputs.cameras) > 1:
        errors["cameras swapped"] = error(*predict(_swap_images, None))
    recorded = plain[1]
    return errors | {"always the mean action": error(np.broadcast_to(recorded.mean(0), recorded.shape), recorded)}, plain


def _each_image(change: Callable[[np.ndarray], np.ndarray]) -> ChangeImages:
    return lambda images: {camera: np.ascontiguousarray(change(image)) for camera, image in images.items()}


def _swap_images(images: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Images of the first camera under the name of the last, and so on."""
    return dict(zip(images, reversed(list(images.values())), strict=True))


def _from_model(inputs: DiagnosisInputs) -> Predict:
    """First actions of chunks that the policy's model predicts for recorded windows."""
    policy, cameras = inputs.trained, inputs.cameras
    assert policy is not None
    stats = policy.robot.stats["action"]
    windows = policy_windows(policy, inputs.dataset, inputs.sampled_episodes())
    windows, cache = Subset(windows, range(min(len(windows), inputs.n_frames))), {}

    def predict(change: ChangeImages, kind: str | None) -> tuple[np.ndarray, np.ndarray]:
        def with_images(samples: Sequence[dict]) -> list[dict]:
            return [sample | {"images": _stacked(change, sample["images"], cameras)} for sample in samples]

        if change not in cache:
            chunks = predict_chunks(policy, windows, with_images)
            cache[change] = stats.normalize(chunks["predicted"][:, 0]), chunks["recorded"][:, 0]
        normalized, recorded = cache[change]
        return dataclasses.replace(stats, kind=kind or stats.kind).unnormalize(normalized), recorded

    return predict


def _stacked(change: ChangeImages, images: np.ndarray, cameras: Sequence[str]) -> np.ndarray:
    """Images (t, cameras, h, w, 3) of a sample, changed by camera."""
    changed = change({camera: images[:, i] for i, camera in enumerate(cameras)})
    return np.stack([changed[camera] for camera in cameras], axis=1)


def _from_observations(inputs: DiagnosisInputs) -> Predict:
    """First actions that a policy selects, reset before each recorded observation."""
    dataset, frames, policy = inputs.dataset, inputs.dataset.frames_cache(inputs.cameras), inputs.policy
    assert policy is not None
    rows = np.concatenate([np.arange(*inputs.frame_slice(i).indices(dataset.n_frames)) for i in inputs.sampled_episodes()])
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, inputs.n_frames).astype(int))]
    state, recorded, episode = dataset.column("observation.state"), dataset.column("action")[rows], dataset.episode_of_frame

    def predict(change: ChangeImages, kind: str | None) -> tuple[np.ndarray, np.ndarray]:
        actions = []
        for row in rows:
            images = change({camera: np.asarray(frames[camera][row]) for camera in inputs.cameras})
            observation = {"images": images, "state": state[row], "instruction": dataset.instruction(int(episode[row]))}
            policy.reset(n_robots=1)
            actions.append(np.asarray(policy.select_action([observation]))[0])
        return np.array(actions), recorded

    return predict
