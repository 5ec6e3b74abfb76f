"""Open-loop error: distance between predicted and recorded actions on recorded observations.

Cheap, but it does not measure how the policy's own errors add up: a complement of closed-loop success, no substitute.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

from rvlm.data.dimensions import place_of
from rvlm.data.normalization import as_one_half_sphere
from rvlm.data.windows import Windows
from rvlm.evaluation.rollouts import INPUT_ABLATIONS, InputAblation, permute_instructions, replace_instructions
from rvlm.policy.collation import RobotCollator
from rvlm.policy.flow_matching import decoding_from
from rvlm.policy.policy import Policy, load_policy
from rvlm.statistics import mean_interval


def predict_chunks(
    policy: Any, windows: Any, ablation: str | InputAblation = "none", batch_size: int = 64
) -> dict[str, np.ndarray]:
    """Predicted and recorded action chunks at every frame of recorded episodes, in order.

    Args:
        policy: A `Policy`.
        windows: As `policy_windows` makes them.
        ablation: A name in `INPUT_ABLATIONS`, or a function of a batch of samples. Shuffled language permutes instructions
            between episodes, the same for all frames of one.
        batch_size: Frames per forward pass.

    Returns:
        `predicted`, `recorded` (n, k, a) raw, `mask` (n, k, a), false past an episode's end and in dimensions that the robot
        does not have, `episode_index` and `frame_index` (n,).
    """
    model, robot, conditioning = policy.model, policy.robot, policy.model.conditioning
    ablate = _input_ablation(ablation, windows)
    collate, stats = RobotCollator(policy.prompt_builder), robot.stats
    is_present = torch.from_numpy(conditioning.present_slots(robot))
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, len(windows), batch_size):
        samples = windows.__getitems__(range(start, min(start + batch_size, len(windows))))
        batch = {**collate([conditioning(robot, sample) for sample in ablate(samples)]), "is_present": is_present}
        action, mask = (batch.pop(k)[:, -1].numpy() for k in ("action", "action_mask"))
        batch.pop("dataset_index")
        decode = decoding_from(model.head, [(int(s["episode_index"]), int(s["frame_index"])) for s in samples])
        chunks = model.predict(decode=decode, **{name: value.to(model.device) for name, value in batch.items()})
        present = stats["observation.state"].unnormalize(np.stack([sample["state"][-1] for sample in samples]))
        raw = [conditioning.raw_actions(robot, values, present) for values in (chunks.float().cpu().numpy(), action)]
        mask = conditioning.robot_dims(robot, mask)
        part = {"predicted": raw[0], "recorded": raw[1], "mask": mask}
        parts.append(part | {k: np.array([s[k] for s in samples]) for k in ("episode_index", "frame_index")})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _input_ablation(ablation: str | InputAblation, windows: Any) -> InputAblation:
    if not isinstance(ablation, str):
        return ablation
    if ablation != "shuffled_language":
        return INPUT_ABLATIONS[ablation]
    permuted = _permuted_instructions(windows.dataset, [int(episode) for episode in windows.episodes])
    return lambda samples: replace_instructions(samples, [permuted[int(sample["episode_index"])] for sample in samples])


def _permuted_instructions(dataset: Any, episodes: Sequence[int]) -> dict[int, str]:
    """Episode -> the instruction of the next one of another task (of another instruction, where tasks are unknown)."""
    first = dataset.episodes["dataset_from_index"].to_numpy()
    instructions = [dataset.tasks[task] for task in dataset.column("task_index")[first]]
    tasks = list(dataset.episodes["task"]) if "task" in dataset.episodes else instructions

    def fallback(i: int) -> str | None:
        return next((text for text, task in zip(instructions, tasks, strict=True) if task != tasks[episodes[i]]), None)

    own, own_tasks = [instructions[e] for e in episodes], [tasks[e] for e in episodes]
    return dict(zip(map(int, episodes), permute_instructions(own, own_tasks, fallback), strict=True))


def policy_windows(policy: Any, dataset: Any, episodes: Iterable[int] | None = None) -> Any:
    """Windows of recorded episodes as this policy reads them, normalised with the statistics of its robot."""
    config, stats = policy.model.config, policy.robot.stats
    policy.expected.check_sizes(dataset.image_sizes(config.cameras), "recorded images")
    return Windows(
        dataset,
        *(config.n_obs_steps, config.chunk_size, episodes, stats, config.cameras, config.image_size),
        is_relative=config.relative_chunk is not None,
    )


def open_loop_errors(
    policy: Any, dataset: Any, episodes: Iterable[int] | None = None, ablation: str = "none", batch_size: int = 64
) -> pd.DataFrame:
    """Open-loop error of a policy, frame by frame.

    Args:
        policy: A `Policy`, or the folder of a trained model.
        dataset: `EpisodeDataset` of the policy's robot; for the folder of a model, a robot that it was trained on.
        episodes: Held-out ones; all if left out.
        ablation: Input ablation, a name in `INPUT_ABLATIONS`.
        batch_size: Frames per forward pass.

    Returns:
        One row per frame and action dimension that the robot has: episode_index, frame_index, dimension, unit, `first` (the
        absolute error of the chunk's first action) and `chunk` (its mean over the chunk, within the episode), in the card's
        units; for a binary gripper, 1 for a wrong command and 0 for a right one.

    Raises:
        SpecMismatch: The demonstrations are of another robot.
    """
    recorded_spec = dataset.require_spec()
    policy = policy if isinstance(policy, Policy) else load_policy(policy, spec=recorded_spec)
    spec = policy.robot.spec
    spec.require_same(recorded_spec, "policy vs demonstrations")
    return _error_rows(spec, **predict_chunks(policy, policy_windows(policy, dataset, episodes), ablation, batch_size))


def constant_baseline(dataset: Any, train: Iterable[int], episodes: Iterable[int]) -> pd.DataFrame:
    """`open_loop_errors` of the mean training action, with the binary gripper commands that are more frequent in training."""
    spec, action, episode = dataset.require_spec(), dataset.column("action"), dataset.episode_of_frame
    is_train, is_test = np.isin(episode, list(train)), np.isin(episode, list(episodes))
    mean = as_one_half_sphere(action[is_train], spec.placed_action).mean(0)
    is_open = spec.is_open(action[is_train]).mean(0) > 0.5
    constant = np.where(spec.is_binary, spec.set_grippers(mean, is_open), mean)
    recorded = action[is_test][:, None]
    frame = np.concatenate([np.arange(length) for length in dataset.episodes["length"]])
    mask = np.broadcast_to(spec.present, recorded.shape)
    return _error_rows(spec, np.broadcast_to(constant, recorded.shape), recorded, mask, episode[is_test], frame[is_test])


def _error_rows(
    spec: Any, predicted: np.ndarray, recorded: np.ndarray, mask: np.ndarray, episode_index: np.ndarray, frame_index: np.ndarray
) -> pd.DataFrame:
    error, mask = action_errors(spec, predicted, recorded)[..., spec.present], mask[..., spec.present]
    names, units = np.array(spec.names)[spec.present], np.array(spec.units)[spec.present]
    n, _, a = error.shape
    return pd.DataFrame(
        {
            "episode_index": np.repeat(episode_index, a),
            "frame_index": np.repeat(frame_index, a),
            "dimension": pd.Categorical(np.tile(names, n), spec.names),
            "unit": np.tile(units, n),
            "first": error[:, 0].ravel(),
            "chunk": ((error * mask).sum(1) / mask.sum(1)).ravel(),
        }
    )


def action_errors(spec: Any, predicted: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Absolute errors (..., a) of raw actions (..., a) in the card's units; 1 or 0 for a binary gripper.

    Euler angles differ by half a turn at most, and a quaternion is compared with the nearer of q and -q.
    """
    error = np.abs(spec.to_si(predicted - recorded))
    for at, group in spec.placed_action:
        turned = slice(at.start + group.n_position, at.stop)
        if group.rotation == "euler_xyz":
            half = np.pi / group.radians
            error[..., turned] = np.abs((error[..., turned] + half) % (2 * half) - half)
        elif group.rotation.startswith("quat"):
            is_far = (predicted[..., turned] * recorded[..., turned]).sum(-1, keepdims=True) < 0
            opposite = np.abs(spec.to_si(predicted + recorded))[..., turned]
            error[..., turned] = np.where(is_far, opposite, error[..., turned])
    wrong = spec.is_open(predicted) != spec.is_open(recorded)
    for k, i in enumerate(spec.gripper_indices):
        if spec.is_binary[i]:
            error[..., i] = wrong[..., k]
    return error


def position_error(errors: pd.DataFrame, column: str = "first") -> pd.Series:
    """Mean distance between predicted and recorded position or displacement of a hand, per episode [m], of `open_loop_errors`.

    Of two arms the mean; empty for a robot whose actions hold no position.
    """
    place = errors["dimension"].astype(str).map(place_of).str.rpartition("_")
    rows = errors.assign(hand=place[0], squared=errors[column] ** 2)[place[2].isin(list("xyz"))]
    of_hand: Any = rows.groupby(["episode_index", "frame_index", "hand"])["squared"].sum()
    return np.sqrt(of_hand).groupby("episode_index").mean()


def error_table(errors: dict[str, pd.DataFrame], column: str = "first") -> pd.DataFrame:
    """Open-loop error per dimension with a 95 % interval over episodes, NaN where all are equal.

    Args:
        errors: Name in tables and figures -> a table from `open_loop_errors`.
        column: "first" or "chunk".

    Returns:
        Columns name, dimension, unit, value, low, high, n (episodes).
    """
    rows = []
    for name, table in errors.items():
        for key, group in table.groupby(["dimension", "unit"], observed=True, sort=False):
            dimension, unit = cast(tuple, key)
            per_episode: Any = group.groupby("episode_index")[column].mean()
            mean = mean_interval(per_episode)
            row = {"name": name, "dimension": dimension, "unit": unit, "value": mean.mean}
            rows.append({**row, "low": mean.low, "high": mean.high, "n": mean.n})
    return pd.DataFrame(rows)
