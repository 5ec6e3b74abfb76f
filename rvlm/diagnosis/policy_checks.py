"""Checks of the policy: its statistics, its conventions, and its predictions on frames that it was trained on."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from torch.utils.data import Subset

from rvlm.data.actions import ActionSpec, NormStats, StatsAccumulator
from rvlm.data.errors import SpecMismatch
from rvlm.data.normalization import as_one_half_sphere, mean_quaternions, on_half_sphere
from rvlm.data.pooled_statistics import training_values
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.misreadings import IMAGE_ERRORS
from rvlm.diagnosis.motion import held_targets
from rvlm.diagnosis.motion_faults import explain_predictions
from rvlm.diagnosis.results import CheckResult
from rvlm.evaluation.open_loop import action_errors, policy_windows, predict_chunks
from rvlm.evaluation.rollouts import begin_episodes
from rvlm.policy.embodiments import Embodiment

NO_POLICY = "skipped: no policy was given"
NO_MODEL = "skipped: the policy does not show its statistics"
NO_IMAGES = "staying, or the mean action,"
STATISTICS_KINDS = ("q01_q99", "min_max", "mean_std")


def check_statistics(inputs: DiagnosisInputs) -> CheckResult:
    """Are the policy's statistics those of the training episodes of this dataset?"""
    if inputs.trained is None:
        return CheckResult("statistics", NO_MODEL if inputs.policy is not None else NO_POLICY)
    if difference := _difference(inputs.trained.robot.spec, inputs.dataset.require_spec(), "policy vs data"):
        return CheckResult("statistics", difference, "conventions differ")
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
    policy, spec = inputs.trained, inputs.dataset.require_spec()
    assert policy is not None
    values = training_values(inputs.dataset, "action", episodes, policy.model.config.relative_chunk)
    return on_half_sphere(values, spec.placed_action, policy.robot.stats["action"].reference)


def _distance(a: NormStats, b: NormStats) -> float:
    """Largest relative difference of scale, or of offset per scale, as kind "q01_q99"; the kind in use is checked elsewhere."""
    (offset_a, scale_a), (offset_b, scale_b) = (dataclasses.replace(s, kind="q01_q99").offset_and_scale() for s in (a, b))
    return float((np.maximum(np.abs(scale_a - scale_b), np.abs(offset_a - offset_b) / 2) / np.maximum(scale_a, scale_b)).max())


def check_interface(inputs: DiagnosisInputs) -> CheckResult:
    """Do policy, data and environment use the same conventions, and does the policy run with its own configuration?"""
    data = inputs.dataset.require_spec()
    policy = getattr(inputs.policy, "action_spec", None)
    env = inputs.env.unwrapped.action_spec if inputs.env is not None else None
    for one, other, what in ((policy, data, "policy vs data"), (policy or data, env, "policy or data vs environment")):
        if difference := one and other and _difference(one, other, what):
            return CheckResult("interface", difference, "conventions differ")
    if inputs.trained and inputs.trained.n_action_steps != (config := inputs.trained.model.config).n_action_steps:
        steps = inputs.trained.n_action_steps
        measured = f"executes {steps} of {config.chunk_size} actions, made to execute {config.n_action_steps}"
        return CheckResult("interface", measured, "chunk execution")
    return _check_time_limit(inputs)


def _difference(one: ActionSpec, other: ActionSpec, what: str) -> str:
    """Conventions that differ, in words; empty if none do."""
    try:
        one.require_same(other, what)
    except SpecMismatch as error:
        return str(error)
    return ""


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
    chosen = _on_one_half_sphere(inputs, predict(dict, None))
    errors = _open_loop_errors(inputs, predict, chosen)
    evidence = pd.DataFrame({"candidate": list(errors), "error of the first action [spread of the actions]": errors.values()})
    without_images, current = errors.pop(NO_IMAGES), errors["as it is"]
    best = min(errors, key=errors.__getitem__)
    measured = f"first action off by {current:.2f} of the actions' spread, {NO_IMAGES} by {without_images:.2f}"
    is_explained = _fitted_error(inputs, chosen) < 0.5 * without_images < current
    if is_explained and (found := explain_predictions(inputs.dataset.require_spec(), chosen.predicted, chosen.recorded)):
        return CheckResult("open loop", f"{measured}; {found.measured}", found.fault, found.evidence)
    if best != "as it is" and errors[best] < min(0.9 * current, without_images):
        return CheckResult("open loop", f"{measured}; {best}: {errors[best]:.2f}", best.split(":")[0], evidence)
    return CheckResult("open loop", measured, None if current < 0.9 * without_images else "not learned", evidence)


class FirstActions(NamedTuple):
    """First actions of predicted chunks, at `n` recorded frames.

    Attributes:
        predicted: (n, a) Raw.
        recorded: (n, a) Raw.
        rows: (n,) Of the dataset.
    """

    predicted: np.ndarray
    recorded: np.ndarray
    rows: np.ndarray


def _on_one_half_sphere(inputs: DiagnosisInputs, actions: FirstActions) -> FirstActions:
    """The same with quaternions on the half sphere of the mean recorded one."""
    placed = inputs.dataset.require_spec().placed_action
    reference = mean_quaternions(actions.recorded, placed)
    predicted, recorded = (on_half_sphere(values, placed, reference) for values in actions[:2])
    return actions._replace(predicted=predicted, recorded=recorded)


ChangeImages = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]  # camera -> images (..., h, w, 3)
Predict = Callable[[ChangeImages, str | None], FirstActions]  # by images that are changed, and by statistics of another kind


def _open_loop_errors(inputs: DiagnosisInputs, predict: Predict, plain: FirstActions) -> dict[str, float]:
    """Mean error of the first action, in spreads of the actions: `plain`, and by each other reading of images or statistics."""
    errors = {"as it is": _mean_error(inputs, plain.predicted, plain.recorded)}
    readings: dict[str, tuple[ChangeImages, str | None]] = {}
    if inputs.trained:
        used = inputs.trained.robot.stats["action"].kind
        readings |= {f"statistics kind: {kind}": (dict, kind) for kind in STATISTICS_KINDS if kind != used}
    readings |= {name: (_each_image(change), None) for name, change in IMAGE_ERRORS.items()}
    for one, other in itertools.combinations(inputs.cameras, 2):
        readings[f"cameras swapped: {one} and {other}"] = _swapped_images(one, other), None
    errors |= {name: _mean_error(inputs, *predict(*reading)[:2]) for name, reading in readings.items()}
    return errors | {NO_IMAGES: _error_without_images(inputs, plain)}


def _errors(inputs: DiagnosisInputs, predicted: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Mean error of each dimension that is neither absent nor binary, in spreads of the actions."""
    spec = inputs.dataset.require_spec()
    chosen = spec.present & ~np.asarray(spec.is_binary)
    spread = spec.to_si(np.maximum(as_one_half_sphere(inputs.dataset.column("action"), spec.placed_action).std(0), 1e-6))
    return (action_errors(spec, predicted, recorded).mean(0) / spread)[chosen]


def _mean_error(inputs: DiagnosisInputs, predicted: np.ndarray, recorded: np.ndarray) -> float:
    return float(_errors(inputs, predicted, recorded).mean())


def _error_without_images(inputs: DiagnosisInputs, actions: FirstActions) -> float:
    """Error of who stays where it is, or always takes the mean action, whichever is nearer in a dimension.

    Quaternions of the actions are on one half sphere.
    """
    spec, state = inputs.dataset.require_spec(), inputs.dataset.column("observation.state")[actions.rows]
    mean = np.broadcast_to(actions.recorded.mean(0), actions.recorded.shape)
    stay = held_targets(spec, state)
    stay = np.where(np.isfinite(stay), stay, mean)
    return float(np.minimum(*(_errors(inputs, values, actions.recorded) for values in (mean, stay))).mean())


def _fitted_error(inputs: DiagnosisInputs, actions: FirstActions) -> float:
    """Error of predictions whose dimensions are swapped, turned and scaled as it fits the recorded ones best."""
    x, y = (values - values.mean(0) for values in actions[:2])
    covariance = x.T @ y
    squares = np.maximum((x**2).sum(0), 1e-12)
    likeness = np.abs(covariance) / np.sqrt(squares[:, None] * np.maximum((y**2).sum(0), 1e-12))
    rows, columns = linear_sum_assignment(-likeness)
    fitted = np.zeros_like(y)
    fitted[:, columns] = x[:, rows] * (covariance / squares[:, None])[rows, columns]
    return _mean_error(inputs, fitted + actions.recorded.mean(0), actions.recorded)


def _each_image(change: Callable[[np.ndarray], np.ndarray]) -> ChangeImages:
    return lambda images: {camera: np.ascontiguousarray(change(image)) for camera, image in images.items()}


def _swapped_images(one: str, other: str) -> ChangeImages:
    """Images of each of two cameras under the name of the other."""
    return lambda images: {**images, one: images[other], other: images[one]}


def _from_model(inputs: DiagnosisInputs) -> Predict:
    """First actions of chunks that the policy's model predicts for recorded windows."""
    policy, cameras, dataset = inputs.trained, inputs.cameras, inputs.dataset
    assert policy is not None
    conditioning, robot = policy.model.conditioning, policy.robot
    windows = policy_windows(policy, dataset, inputs.sampled_episodes())
    windows, cache = Subset(windows, range(min(len(windows), inputs.n_frames))), {}
    first = dataset.episodes["dataset_from_index"].to_numpy()

    def predict(change: ChangeImages, kind: str | None) -> FirstActions:
        def with_images(samples: Sequence[dict]) -> list[dict]:
            return [sample | {"images": _stacked(change, sample["images"], cameras)} for sample in samples]

        if change not in cache:
            chunks = predict_chunks(policy, windows, with_images)
            rows = first[chunks["episode_index"]] + chunks["frame_index"]
            cache[change] = FirstActions(chunks["predicted"][:, 0], chunks["recorded"][:, 0], rows)
        found = cache[change]
        if kind is None:
            return found
        state, stats = dataset.column("observation.state")[found.rows], robot.stats
        normalized = conditioning.normalized_actions(robot, found.predicted[:, None], state)
        read = Embodiment(robot.spec, {**stats, "action": dataclasses.replace(stats["action"], kind=kind)})
        return found._replace(predicted=conditioning.raw_actions(read, normalized, state)[:, 0])

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

    def predict(change: ChangeImages, kind: str | None) -> FirstActions:
        actions = []
        for row in rows:
            images = change({camera: np.asarray(frames[camera][row]) for camera in inputs.cameras})
            observation = {"images": images, "state": state[row], "instruction": dataset.instruction(int(episode[row]))}
            begin_episodes(policy, [int(row)])  # each frame is an episode of its own
            actions.append(np.asarray(policy.select_action([observation]))[0])
        return FirstActions(np.array(actions), recorded, rows)

    return predict
