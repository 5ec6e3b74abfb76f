"""Rolling a policy out: episodes side by side, the controls that take something from the policy, and one that sees nothing."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

InputAblation = Callable[[Sequence[dict]], list[dict]]  # what a batch of observations becomes


def no_language(observations: Sequence[dict]) -> list[dict]:
    """The control in which the instruction says nothing.

    Raises:
        ValueError: An instruction says nothing already.
    """
    return tell(observations, [""] * len(observations))


def shuffled_language(observations: Sequence[dict]) -> list[dict]:
    """The control in which everyone is told what the next one with another instruction should do.

    Raises:
        ValueError: All are told the same.
    """
    instructions = [observation["instruction"] for observation in observations]
    return tell(observations, others_instructions(instructions, instructions))


def tell(observations: Sequence[dict], instructions: Sequence[str]) -> list[dict]:
    """The same observations with other instructions.

    Raises:
        ValueError: One is told what it was told anyway, so that nothing would be learned from it.
    """
    same = [i for i, (o, said) in enumerate(zip(observations, instructions, strict=True)) if o["instruction"] == said]
    if same:
        raise ValueError(
            f"a control of language must change every instruction; {len(same)} of {len(observations)} stay "
            f"{instructions[same[0]]!r}: leave the control out, or take episodes with other instructions"
        )
    return [{**o, "instruction": said} for o, said in zip(observations, instructions, strict=True)]


def others_instructions(
    instructions: Sequence[str], tasks: Sequence[str], spare: Callable[[int], str | None] = lambda i: None
) -> list[str]:
    """For each the instruction of the next one (the first comes after the last) whose task is another.

    Args:
        instructions: Of each.
        tasks: Of each, what it is about, in whatever words.
        spare: An instruction of another task for the one at a place, where nobody here has another; None if there is none.

    Raises:
        ValueError: All have the same task, and there is no spare instruction.
    """
    n, told = len(instructions), []
    for i, task in enumerate(tasks):
        others = (instructions[(i + step) % n] for step in range(1, n) if tasks[(i + step) % n] != task)
        if (said := next(others, None) or spare(i)) is None:
            raise ValueError(
                f"shuffled_language: all of {n} have the task {task!r}, so nobody would be told anything else; add episodes of "
                "another one"
            )
        told.append(said)
    return told


def blank_image(observations: Sequence[dict]) -> list[dict]:
    """The control in which all cameras see black."""
    return [{k: np.zeros_like(v) if "image" in k else v for k, v in o.items()} for o in observations]


INPUT_ABLATIONS: dict[str, InputAblation] = {
    "none": list,
    "no_language": no_language,
    "shuffled_language": shuffled_language,
    "blank_image": blank_image,
}


class RandomPolicy:
    """Uniformly random actions in the card's range: others in every episode, the same for the same episode."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def reset(self, n_robots: int = 1) -> None:
        """Begin anew."""
        self.seed_episodes(range(n_robots))

    def seed_episodes(self, seeds: Iterable[int]) -> None:
        """Begin the actions that belong to these episodes, one for each robot."""
        self._rngs = [np.random.default_rng((seed, 1)) for seed in seeds]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the robots at these places alone."""
        self._rngs = [self._rngs[row] for row in rows]

    def select_action(self, observations: Sequence[dict]) -> np.ndarray:
        """A raw action (n, a) for each robot, whatever it sees.

        Raises:
            ValueError: More or fewer observations than robots.
        """
        if len(observations) != len(self._rngs):
            raise ValueError(f"expected an observation of each of {len(self._rngs)} robots, got {len(observations)}")
        return np.stack([rng.uniform(self.spec.low, self.spec.high) for rng in self._rngs]).astype(np.float32)


def rollout(
    policy: Any,
    envs: Sequence[Any],
    episodes: Sequence[tuple[int, str]],
    control: str = "none",
    keep_frames: bool = False,
    keep_state: bool = False,
) -> list[dict]:
    """Run one episode in each environment, all in step; one that has ended costs nothing more.

    Args:
        policy: Has `reset` and `select_action`, and `keep` if it can go on with fewer robots (else it is shown the last
            observation of ended episodes until all have ended); None lets the scripted expert act.
        envs: One per episode.
        episodes: (seed, family) of each.
        control: What is taken from the policy, a name in `INPUT_ABLATIONS`.
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
    change = _control(control, envs, rows)
    running, policy_s, started = list(range(len(envs))), 0.0, time.perf_counter()
    _begin(policy, rows)
    while running:
        asked = time.perf_counter()
        actions = _actions(policy, envs, change(observations), running)
        policy_s += time.perf_counter() - asked
        left = []
        for place, (i, action) in enumerate(zip(running, actions, strict=True)):
            if keep_frames:
                films[i].append((observations[i]["image"], observations[i]["wrist_image"], action))
            observations[i], _, done, truncated, info = envs[i].step(action)
            rows[i] |= {"n_steps": rows[i]["n_steps"] + 1, "is_success": bool(info["is_success"])}
            rows[i]["failure"] = "" if info["is_success"] else info.get("failure", "timed out")
            left += [] if done or truncated else [place]
        if hasattr(policy, "keep") and 0 < len(left) < len(running):
            policy.keep(left)
        running = [running[place] for place in left]
    spent = {"policy_s": policy_s, "simulator_s": time.perf_counter() - started - policy_s}
    for row, film in zip(rows, films, strict=True):
        row |= {name: seconds / len(rows) for name, seconds in spent.items()}
        if keep_frames:
            row |= dict(zip(("frames", "wrist_frames", "actions"), map(np.stack, zip(*film, strict=True)), strict=True))
    return rows


def _begin(policy: Any, rows: Sequence[dict]) -> None:
    if policy is not None:
        policy.reset(len(rows))
        if hasattr(policy, "seed_episodes"):
            policy.seed_episodes([row["seed"] for row in rows])


def _control(control: str, envs: Sequence[Any], rows: Sequence[dict]) -> InputAblation:
    """The control of this batch, over all of its episodes; who tells whom is settled at their beginning."""
    if control != "shuffled_language":
        return INPUT_ABLATIONS[control]

    def spare(i: int) -> str | None:
        other = getattr(envs[i].unwrapped, "other_instruction", None)
        return None if other is None else other(rows[i]["family"])

    said = others_instructions([row["instruction"] for row in rows], [row["family"] for row in rows], spare)
    return lambda observations: tell(observations, said)


def _actions(policy: Any, envs: Sequence[Any], observations: Sequence[dict], running: Sequence[int]) -> np.ndarray:
    """An action for each episode that runs."""
    if policy is None:
        return np.stack([envs[i].unwrapped.expert_action() for i in running])
    if not hasattr(policy, "keep"):
        return policy.select_action(observations)[list(running)]
    return policy.select_action([observations[i] for i in running])
