"""Checks of the policy: its statistics, its conventions, and its predictions on frames that it was trained on."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from torch.utils.data import Subset

from rvlm.data.actions import NormStats, StatsAccumulator
from rvlm.data.errors import SpecMismatch
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.diagnosis.misreadings import IMAGE_ERRORS
from rvlm.diagnosis.results import CheckResult
from rvlm.evaluation.open_loop import policy_windows, predict_chunks


def check_statistics(inputs: DiagnosisInputs) -> CheckResult:
    """Are the policy's statistics those of the training episodes of this dataset?"""
    used, action = inputs.policy.robot.stats["action"], inputs.dataset.column("action")
    is_training = np.isin(inputs.dataset.episode_of_frame, inputs.training_episodes())
    expected = StatsAccumulator().update(action[is_training]).finish(used.kind, used.passthrough, used.floor)
    of_all = StatsAccumulator().update(action).finish(used.kind, used.passthrough, used.floor)
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
    action = inputs.dataset.column("action")
    rows = [inputs.frame_slice(episode) for episode in map(int, inputs.training_episodes())]
    quantiles = np.array([np.quantile(action[part], (0.01, 0.99), axis=0) for part in rows])
    return dataclasses.replace(stats, q01=quantiles[:, 0].min(0), q99=quantiles[:, 1].max(0))


def _distance(a: NormStats, b: NormStats) -> float:
    """Largest relative difference of scale, or of offset per scale, as kind "q01_q99"; the kind in use is checked elsewhere."""
    (offset_a, scale_a), (offset_b, scale_b) = (dataclasses.replace(s, kind="q01_q99").offset_and_scale() for s in (a, b))
    return float((np.maximum(np.abs(scale_a - scale_b), np.abs(offset_a - offset_b) / 2) / np.maximum(scale_a, scale_b)).max())


def check_interface(inputs: DiagnosisInputs) -> CheckResult:
    """Do policy, data and environment use the same conventions, and does the policy run with its own configuration?"""
    policy, config, env = inputs.policy, inputs.policy.model.config, inputs.env.unwrapped
    for other, what in ((inputs.dataset.require_spec(), "policy vs data"), (env.action_spec, "policy vs environment")):
        try:
            policy.robot.spec.require_same(other, what)
        except SpecMismatch as error:
            return CheckResult("interface", str(error), "conventions differ")
    if policy.n_action_steps != config.n_action_steps:
        measured = f"executes {policy.n_action_steps} of {config.chunk_size} actions, made to execute {config.n_action_steps}"
        return CheckResult("interface", measured, "chunk execution")
    longest = float(np.quantile(inputs.dataset.episodes["length"].to_numpy(), 0.95))
    limit = getattr(env, "max_steps", None)
    if limit is not None and limit < longest:
        return CheckResult("interface", f"{limit} steps allowed, 95 % of demonstrations took up to {longest:.0f}", "time limit")
    return CheckResult("interface", f"conventions agree; {limit} steps allowed, demonstrations took up to {longest:.0f}")


def check_open_loop(inputs: DiagnosisInputs) -> CheckResult:
    """Does the policy predict the recorded actions of its training frames, and would it with other images or statistics?"""
    errors = _open_loop_errors(inputs)
    column = "error of the first action [spread of the actions]"
    evidence = pd.DataFrame({"candidate": list(errors), column: list(errors.values())})
    mean_action, current = errors.pop("always the mean action"), errors["as it is"]
    best = min(errors, key=errors.__getitem__)
    measured = f"first action off by {current:.2f} of the actions' spread, always the mean action by {mean_action:.2f}"
    if best != "as it is" and errors[best] < 0.9 * current:
        return CheckResult("open loop", f"{measured}; {best}: {errors[best]:.2f}", best.split(":")[0], evidence)
    return CheckResult("open loop", measured, None if current < 0.9 * mean_action else "not learned", evidence)


def _open_loop_errors(inputs: DiagnosisInputs) -> dict[str, float]:
    """Mean error of the first action, in spreads of the actions, for each way to read images and statistics."""
    spec, stats = inputs.policy.robot.spec, inputs.policy.robot.stats["action"]
    windows = policy_windows(inputs.policy, inputs.dataset, inputs.sampled_episodes())
    windows = Subset(windows, range(min(len(windows), inputs.n_frames)))
    spread = np.maximum(inputs.dataset.column("action").std(0), 1e-6)
    is_arm = spec.present & (np.arange(spec.n_dims) != spec.gripper_index)

    def error(chunks: dict[str, np.ndarray], kind: str = stats.kind) -> float:
        normalized, recorded = stats.normalize(chunks["predicted"][:, 0]), chunks["recorded"][:, 0]
        predicted = dataclasses.replace(stats, kind=kind).unnormalize(normalized)
        return float((np.abs(predicted - recorded)[:, is_arm] / spread[is_arm]).mean())

    def error_with_images(change: Callable[[np.ndarray], np.ndarray]) -> float:
        return error(predict_chunks(inputs.policy, windows, lambda samples: _with_images(samples, change)))

    chunks = predict_chunks(inputs.policy, windows)
    recorded = chunks["recorded"][:, 0]
    errors = {"as it is": error(chunks)}
    kinds = [kind for kind in ("q01_q99", "min_max", "mean_std") if kind != stats.kind]
    errors |= {f"statistics kind: {kind}": error(chunks, kind) for kind in kinds}
    errors |= {name: error_with_images(change) for name, change in IMAGE_ERRORS.items()}
    if len(inputs.policy.model.config.cameras) > 1:
        errors["cameras swapped"] = error_with_images(lambda images: images[:, ::-1])
    mean_action = (np.abs(recorded - recorded.mean(0))[:, is_arm] / spread[is_arm]).mean()
    return errors | {"always the mean action": float(mean_action)}


def _with_images(samples: Sequence[dict], change: Callable[[np.ndarray], np.ndarray]) -> list[dict]:
    return [{**sample, "images": np.ascontiguousarray(change(sample["images"]))} for sample in samples]
