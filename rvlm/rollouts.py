"""Rolling a policy out: episodes side by side, the controls that take something from the policy, and one that sees nothing."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Control = Callable[[Sequence[dict]], list[dict]]  # what a batch of observations becomes


def no_language(observations: Sequence[dict]) -> list[dict]:
    """The control in which the instruction says nothing."""
    return [{**observation, "instruction": ""} for observation in observations]


def shuffled_language(observations: Sequence[dict]) -> list[dict]:
    """The control in which everyone is told what the neighbour should do."""
    n = len(observations)
    return [{**o, "instruction": observations[(i + 1) % n]["instruction"]} for i, o in enumerate(observations)]


def blank_image(observations: Sequence[dict]) -> list[dict]:
    """The control in which all cameras see black."""
    return [{k: np.zeros_like(v) if "image" in k else v for k, v in o.items()} for o in observations]


CONTROLS: dict[str, Control] = {
    "none": list,
    "no_language": no_language,
    "shuffled_language": shuffled_language,
    "blank_image": blank_image,
}


class RandomPolicy:
    """Uniformly random actions in the card's range, the same for the same episodes."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def reset(self, n_robots: int = 1) -> None:
        """Begin the same actions again."""
        self.rng = np.random.default_rng(0)

    def select_action(self, observations: Sequence[dict]) -> np.ndarray:
        """A raw action (n, a) for each robot, whatever it sees."""
        return self.rng.uniform(self.spec.low, self.spec.high, (len(observations), len(self.spec.names))).astype(np.float32)


def rollout(
    policy: Any,
    envs: Sequence[Any],
    episodes: Sequence[tuple[int, str]],
    control: str = "none",
    keep_frames: bool = False,
    keep_state: bool = False,
) -> list[dict]:
    """Run one episode in each environment, all in step; what has ended stands still.

    Args:
        policy: Has `reset` and `select_action`; None lets the scripted expert act.
        envs: One per episode.
        episodes: (seed, family) of each.
        control: What is taken from the policy, a name in `CONTROLS`.
        keep_frames: Also return each episode's `frames` (n, h, w, 3), `wrist_frames` and `actions` (n, a).
        keep_state: Begin in the scene as it is, where the last task ended.

    Returns:
        Per episode: seed, family, instruction, is_success, failure (a word, from the simulator's state), n_steps, and its
        share of the time that policy and simulator took [s]: policy_s, simulator_s.
    """
    observations, rows, films = [], [], []
    for env, (seed, family) in zip(envs, episodes, strict=True):
        observations.append(env.reset(seed=seed, options={"family": family, "keep_state": keep_state})[0])
        told = {"seed": seed, "family": family, "instruction": observations[-1]["instruction"]}
        rows.append({**told, "is_success": False, "failure": "", "n_steps": 0})
        films.append([])
    running, policy_s, started = list(range(len(envs))), 0.0, time.perf_counter()
    if policy is not None:
        policy.reset(len(envs))
    while running:
        asked = time.perf_counter()
        actions = _actions(policy, envs, observations, control)
        policy_s += time.perf_counter() - asked
        for i in list(running):
            if keep_frames:
                films[i].append((observations[i]["image"], observations[i]["wrist_image"], actions[i]))
            observations[i], _, done, truncated, info = envs[i].step(actions[i])
            rows[i] |= {"n_steps": rows[i]["n_steps"] + 1, "is_success": bool(info["is_success"])}
            rows[i]["failure"] = "" if info["is_success"] else info.get("failure", "timed out")
            if done or truncated:
                running.remove(i)
    spent = {"policy_s": policy_s, "simulator_s": time.perf_counter() - started - policy_s}
    for row, film in zip(rows, films, strict=True):
        row |= {name: seconds / len(rows) for name, seconds in spent.items()}
        if keep_frames:
            row |= dict(zip(("frames", "wrist_frames", "actions"), map(np.stack, zip(*film, strict=True)), strict=True))
    return rows


def _actions(policy: Any, envs: Sequence[Any], observations: Sequence[dict], control: str) -> np.ndarray:
    if policy is None:
        return np.stack([env.unwrapped.expert_action() for env in envs])
    return policy.select_action(CONTROLS[control](observations))
