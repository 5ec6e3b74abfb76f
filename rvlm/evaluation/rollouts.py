"""Rollouts: episodes in step, input ablations of the policy, and a uniform random baseline."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rvlm.data.observations import stack_images
from rvlm.envs.suite_checks import success_of

InputAblation = Callable[[Sequence[dict]], list[dict]]  # observations of a batch -> the same with an input removed


class EpisodeStart(NamedTuple):
    """An episode to run.

    Attributes:
        seed: Of the environment's and the policy's random choices.
        task: The reset option "task".
        start: The reset option "start": index of a fixed initial state; None where the seed decides.
    """

    seed: int
    task: str
    start: int | None = None


def no_language(observations: Sequence[dict]) -> list[dict]:
    """Empty instructions.

    Raises:
        ValueError: An instruction is empty already.
    """
    return replace_instructions(observations, [""] * len(observations))


def shuffled_language(observations: Sequence[dict]) -> list[dict]:
    """Instructions permuted across the batch: each observation gets the next one's that differs.

    Raises:
        ValueError: All instructions are equal.
    """
    instructions = [observation["instruction"] for observation in observations]
    return replace_instructions(observations, permute_instructions(instructions, instructions))


def replace_instructions(observations: Sequence[dict], instructions: Sequence[str]) -> list[dict]:
    """The same observations with other instructions.

    Raises:
        ValueError: An instruction stays as it is, so the ablation would measure nothing.
    """
    pairs = list(zip(observations, instructions, strict=True))
    same = [new for observation, new in pairs if observation["instruction"] == new]
    if same:
        raise ValueError(
            f"an ablation of language must change every instruction; {len(same)} of {len(pairs)} stay {same[0]!r}: leave the "
            "ablation out, or take episodes with other instructions"
        )
    return [{**observation, "instruction": new} for observation, new in pairs]


def permute_instructions(
    instructions: Sequence[str], tasks: Sequence[str], fallback: Callable[[int], str | None] = lambda i: None
) -> list[str]:
    """For each episode the instruction of the next one of another task; the first follows the last.

    Args:
        instructions: Of each episode.
        tasks: Of each episode, any names.
        fallback: Index of an episode -> an instruction of another task, for batches of one task; None if there is none.

    Raises:
        ValueError: All episodes have the same task, and there is no fallback.
    """
    n, permuted = len(instructions), []
    for i, task in enumerate(tasks):
        others = (instructions[(i + step) % n] for step in range(1, n) if tasks[(i + step) % n] != task)
        other = next(others, None)
        other = fallback(i) if other is None else other  # '' is one
        if other is None:
            raise ValueError(
                f"shuffled_language: expected episodes of several tasks, all of {n} have {task!r}; add episodes of another one"
            )
        permuted.append(other)
    return permuted


def blank_image(observations: Sequence[dict]) -> list[dict]:
    """Black images of all cameras."""

    def blank(images: Any) -> Any:
        return {k: np.zeros_like(v) for k, v in images.items()} if isinstance(images, dict) else np.zeros_like(images)

    return [observation | {"images": blank(observation["images"])} for observation in observations]


INPUT_ABLATIONS: dict[str, InputAblation] = {
    "none": list,
    "no_language": no_language,
    "shuffled_language": shuffled_language,
    "blank_image": blank_image,
}


class RandomPolicy:
    """Uniformly random actions in the card's range, seeded by the episode."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def reset(self, n_robots: int = 1) -> None:
        """Begin new episodes."""
        self.seed_episodes(range(n_robots))

    def seed_episodes(self, seeds: Iterable[int]) -> None:
        """Seed the actions of each robot's episode."""
        self._rngs = [np.random.default_rng((seed, 1)) for seed in seeds]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the robots of these indices alone."""
        self._rngs = [self._rngs[row] for row in rows]

    def select_action(self, observations: Sequence[dict]) -> np.ndarray:
        """A raw action (n, a) for each robot.

        Raises:
            ValueError: More or fewer observations than robots.
        """
        if len(observations) != len(self._rngs):
            raise ValueError(f"expected an observation of each of {len(self._rngs)} robots, got {len(observations)}")
        return np.stack([rng.uniform(self.spec.low, self.spec.high) for rng in self._rngs]).astype(np.float32)


def rollout(
    policy: Any,
    envs: Sequence[Any],
    episodes: Sequence[EpisodeStart | tuple[int, str]],
    ablation: str = "none",
    keep_frames: bool = False,
    keep_state: bool = False,
) -> list[dict]:
    """Run one episode in each environment, in step; finished environments are no longer stepped.

    Args:
        policy: Has `reset` and `select_action`, and `keep` if it can go on with fewer robots (else it also gets the last
            observations of finished episodes); if it has an `action_spec`, it is compared with the environments'. None for the
            environment's expert.
        envs: One per episode.
        episodes: One each, as `EpisodeStart` or (seed, task).
        ablation: Input ablation, a name in `INPUT_ABLATIONS`.
        keep_frames: Also return each episode's `frames`, camera -> (n, h, w, 3), and `actions` (n, a).
        keep_state: Start from the scene's current state instead of a new one.

    Returns:
        Per episode: seed, task, start (where given), instruction, is_success, failure (as the environment calls it, else "timed
        out"), n_steps, and its share of the time of policy and simulator [s]: policy_s, simulator_s.

    Raises:
        SpecMismatch: The policy acts by other conventions than an environment; nothing is reset.
    """
    require_same_specs(policy, envs)
    observations, rows = _reset(policy, envs, episodes, keep_state)
    ablate, recorded = _input_ablation(ablation, envs, rows), [[] for _ in rows]
    running, policy_s, started = list(range(len(envs))), 0.0, time.perf_counter()
    with _held_on_error(envs):
        while running:
            before = time.perf_counter()
            actions = _actions(policy, envs, ablate(observations), running)
            policy_s += time.perf_counter() - before
            unfinished = []
            for position, (i, action) in enumerate(zip(running, actions, strict=True)):
                if keep_frames:
                    recorded[i].append((observations[i]["images"], action))
                observations[i], is_done = _step(envs[i], action, rows[i])
                unfinished += [] if is_done else [position]
            if hasattr(policy, "keep") and 0 < len(unfinished) < len(running):
                policy.keep(unfinished)
            running = [running[position] for position in unfinished]
    simulator_s = time.perf_counter() - started - policy_s
    for row, steps in zip(rows, recorded, strict=True):
        times = {"policy_s": policy_s / len(rows), "simulator_s": simulator_s / len(rows)}
        row |= {**times, **(_frames_and_actions(steps) if keep_frames else {})}
    return rows


def require_same_specs(policy: Any, envs: Sequence[Any]) -> None:
    """Raise `SpecMismatch` where a policy's `action_spec` differs from an environment's, also in rate; each may have none."""
    own = getattr(policy, "action_spec", None)
    for env in envs:
        other = getattr(env.unwrapped, "action_spec", None)
        if own is not None and other is not None:
            own.require_same(other)


def begin_episodes(policy: Any, seeds: Sequence[int]) -> None:
    """Reset a policy for an episode of each seed, which also seeds what it draws itself, if it draws anything."""
    policy.reset(len(seeds))
    if hasattr(policy, "seed_episodes"):
        policy.seed_episodes(seeds)


def _frames_and_actions(steps: Sequence[tuple[dict, np.ndarray]]) -> dict[str, Any]:
    images, actions = zip(*steps, strict=True)
    return {"frames": stack_images(images), "actions": np.stack(actions)}


@contextlib.contextmanager
def _held_on_error(envs: Sequence[Any]) -> Iterator[None]:
    """Hold the robots of environments that have `hold`, if the policy or one of them fails."""
    try:
        yield
    except BaseException:
        for env in envs:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                env.unwrapped.hold()
        raise


def _reset(policy: Any, envs: Sequence[Any], episodes: Sequence[tuple], keep_state: bool) -> tuple[list, list[dict]]:
    """Reset environments and policy: first observations, and the episodes' rows before the first step."""
    observations, rows = [], []
    for env, episode in zip(envs, (EpisodeStart(*episode) for episode in episodes), strict=True):
        start = {} if episode.start is None else {"start": episode.start}
        options = {"task": episode.task, **start, **({"keep_state": True} if keep_state else {})}
        observations.append(env.reset(seed=episode.seed, options=options)[0])
        row = {"seed": episode.seed, "task": episode.task, **start, "instruction": observations[-1]["instruction"]}
        rows.append({**row, "is_success": False, "failure": "", "n_steps": 0})
    if policy is not None:
        begin_episodes(policy, [row["seed"] for row in rows])
    return observations, rows


def _step(env: Any, action: np.ndarray, row: dict) -> tuple[dict, bool]:
    """Execute an action and update the episode's row: the next observation, and whether the episode has ended."""
    observation, _, is_terminated, is_truncated, info = env.step(action)
    row |= {"n_steps": row["n_steps"] + 1, "is_success": success_of(env, info)}
    row["failure"] = "" if row["is_success"] else info.get("failure", "timed out")
    return observation, is_terminated or is_truncated


def _input_ablation(ablation: str, envs: Sequence[Any], rows: Sequence[dict]) -> InputAblation:
    """The ablation of a batch; the permutation of shuffled language is fixed at its start, over all of its episodes."""
    if ablation != "shuffled_language":
        return INPUT_ABLATIONS[ablation]

    def fallback(i: int) -> str | None:
        other = getattr(envs[i].unwrapped, "other_instruction", None)
        return None if other is None else other(rows[i]["task"])

    permuted = permute_instructions([row["instruction"] for row in rows], [row["task"] for row in rows], fallback)
    return lambda observations: replace_instructions(observations, permuted)


def _actions(policy: Any, envs: Sequence[Any], observations: Sequence[dict], running: Sequence[int]) -> np.ndarray:
    """A raw action (n, a) for each running episode."""
    if policy is None:
        return np.stack([envs[i].unwrapped.expert_action() for i in running])
    if not hasattr(policy, "keep"):
        return policy.select_action(observations)[list(running)]
    return policy.select_action([observations[i] for i in running])
