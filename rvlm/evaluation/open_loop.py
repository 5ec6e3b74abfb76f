"""Open-loop error: how far a policy's actions are from recorded ones when the recording alone decides what it sees.

Cheap, and blind to what the policy's own mistakes would lead to: it stands beside closed-loop success, never in its place.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from rvlm.data.windows import Windows
from rvlm.evaluation.rollouts import INPUT_ABLATIONS, InputAblation, others_instructions, tell
from rvlm.policy.collation import RobotCollator
from rvlm.policy.policy import Policy, load_policy
from rvlm.statistics import mean_interval


def predict_chunks(
    policy: Any, windows: Any, control: str | InputAblation = "none", batch_size: int = 64
) -> dict[str, np.ndarray]:
    """Action chunks predicted at every frame of recorded episodes, in their order, beside the recorded ones.

    Args:
        policy: A `Policy`.
        windows: As `policy_windows` cuts them.
        control: What is taken from the policy, a name in `INPUT_ABLATIONS`, or what else is done to a batch of samples. Language
            is shuffled by episode: all frames of one are told what another one was told.
        batch_size: Frames per forward pass.

    Returns:
        `predicted`, `recorded` (n, k, a) raw, `mask` (n, k, a) false past an episode's end and in dimensions that the robot does
        not have, `episode_index`, `frame_index` (n,).
    """
    model, robot = policy.model, policy.robot
    change = _control(control, windows)
    collate, spec, stats = RobotCollator(policy.prompter), robot.spec, robot.stats["action"]
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, len(windows), batch_size):
        samples = windows.__getitems__(range(start, min(start + batch_size, len(windows))))
        policy.expected.check_size(samples[0]["images"].shape[-3:-1], "recorded images")
        batch = collate([model.conditioning(robot, sample) for sample in change(samples)])
        action, mask = (batch.pop(k)[:, -1].numpy() for k in ("action", "action_mask"))
        batch.pop("dataset_index")
        predicted = spec.unnormalize(model.predict(**batch).float().numpy(), stats)
        part = {"predicted": predicted, "recorded": spec.unnormalize(action, stats), "mask": mask}
        parts.append(part | {k: np.array([s[k] for s in samples]) for k in ("episode_index", "frame_index")})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _control(control: str | InputAblation, windows: Any) -> InputAblation:
    if not isinstance(control, str):
        return control
    if control != "shuffled_language":
        return INPUT_ABLATIONS[control]
    said = _others_instructions(windows.dataset, [int(episode) for episode in windows.episodes])
    return lambda samples: tell(samples, [said[int(sample["episode_index"])] for sample in samples])


def _others_instructions(dataset: Any, episodes: Sequence[int]) -> dict[int, str]:
    """For each of these episodes what another one was told: the next one of another family, or else with other words."""
    first = dataset.episodes["dataset_from_index"].to_numpy()
    instructions = [dataset.tasks[task] for task in dataset.column("task_index")[first]]
    tasks = list(dataset.episodes["family"]) if "family" in dataset.episodes else instructions

    def spare(i: int) -> str | None:
        return next((text for text, task in zip(instructions, tasks, strict=True) if task != tasks[episodes[i]]), None)

    asked, about = [instructions[e] for e in episodes], [tasks[e] for e in episodes]
    return dict(zip(map(int, episodes), others_instructions(asked, about, spare), strict=True))


def policy_windows(policy: Any, dataset: Any, episodes: Iterable[int] | None = None) -> Any:
    """Recorded episodes cut as this policy reads them, in the statistics of the robot that it acts for."""
    config = policy.model.config
    return Windows(dataset, config.n_obs_steps, config.chunk_size, episodes, policy.robot.stats, config.cameras)


def open_loop_errors(
    policy: Any, dataset: Any, episodes: Iterable[int] | None = None, control: str = "none", batch_size: int = 64
) -> pd.DataFrame:
    """How far a policy's actions are from recorded ones, frame by frame, when the recording alone decides what it sees.

    Args:
        policy: A `Policy`, or the folder of a trained model.
        dataset: `EpisodeDataset` of the robot that the policy acts for; of a folder's, one that it was trained on.
        episodes: Held-out ones; all if left out.
        control: What is taken from the policy, a name in `INPUT_ABLATIONS`.
        batch_size: Frames per forward pass.

    Returns:
        One row per frame and action dimension that the robot has: episode_index, frame_index, dimension, unit, `first` and
        `chunk`, the absolute error of the chunk's first action and the mean over the chunk within the episode, in the card's
        SI units; of the gripper, 1 for a wrong command and 0 for a right one.

    Raises:
        SpecMismatch: The demonstrations are of another robot.
    """
    asked = dataset.require_spec()
    policy = policy if isinstance(policy, Policy) else load_policy(policy, spec=asked)
    spec = policy.robot.spec
    spec.require_same(asked, "policy vs demonstrations")
    told = predict_chunks(policy, policy_windows(policy, dataset, episodes), control, batch_size)
    return _error_rows(spec, **told)


def constant_baseline(dataset: Any, train: Iterable[int], episodes: Iterable[int]) -> pd.DataFrame:
    """`open_loop_errors` a policy that always does the mean of the training actions and what the gripper mostly does."""
    spec, action, episode = dataset.require_spec(), dataset.column("action"), dataset.episode_of_frame
    seen, asked = np.isin(episode, list(train)), np.isin(episode, list(episodes))
    constant = spec.set_gripper(action[seen].mean(0), spec.is_open(action[seen]).mean() > 0.5)
    recorded = action[asked][:, None]
    frame = np.concatenate([np.arange(length) for length in dataset.episodes["length"]])
    mask = np.broadcast_to(spec.present, recorded.shape)
    return _error_rows(spec, np.broadcast_to(constant, recorded.shape), recorded, mask, episode[asked], frame[asked])


def _error_rows(
    spec: Any, predicted: np.ndarray, recorded: np.ndarray, mask: np.ndarray, episode_index: np.ndarray, frame_index: np.ndarray
) -> pd.DataFrame:
    error, mask = _action_error(spec, predicted, recorded)[..., spec.present], mask[..., spec.present]
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


def _action_error(spec: Any, predicted: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Absolute errors (n, k, a) in SI units; 1 or 0 for the gripper."""
    error = np.abs(spec.to_si(predicted - recorded))
    error[..., spec.gripper_index] = spec.is_open(predicted) != spec.is_open(recorded)
    return error


def position_error(errors: pd.DataFrame, column: str = "first") -> pd.Series:
    """Mean distance between predicted and recorded displacement of the hand, per episode [m], from `open_loop_errors`."""
    moves = errors[errors["dimension"].isin(("dx", "dy", "dz"))]
    squared: Any = moves.assign(squared=moves[column] ** 2).groupby(["episode_index", "frame_index"])["squared"].sum()
    return np.sqrt(squared).groupby("episode_index").mean()


def error_table(errors: dict[str, pd.DataFrame], column: str = "first") -> pd.DataFrame:
    """Open-loop error per dimension with a 95 % interval over episodes; NaN where all are equal.

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
