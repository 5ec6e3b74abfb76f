"""A trained model in the loop: observations in, raw robot actions out, any number of robots side by side.

The verbs are LeRobot's: `reset`, `select_action`, `predict_action_chunk`.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rvlm.actions import ActionSpec
from rvlm.backbones import Prompter
from rvlm.vla import VLA, load_vla

Observation = dict[str, Any]
IMAGE_KEYS = {"static": "image", "wrist": "wrist_image"}  # camera of a card -> key of an observation


class Policy:
    """Closed loop over `VLA`.

    Args:
        model: As `load_vla` gives it.
        processor: Likewise.
        n_action_steps: Actions executed of each predicted chunk before predicting anew.
        spec: The environment's; refused where it disagrees with the one that the policy was trained on.
    """

    def __init__(self, model: VLA, processor: Any, n_action_steps: int = 1, spec: ActionSpec | None = None) -> None:
        if spec is not None:
            model.spec.require_same(spec)
        if not 1 <= n_action_steps <= model.config.chunk_size:
            raise ValueError(
                f"n_action_steps is expected between 1 and the chunk of {model.config.chunk_size} predicted actions; "
                f"got {n_action_steps}"
            )
        unknown = [c for c in model.config.cameras if c not in IMAGE_KEYS]
        if unknown:
            raise ValueError(f"no observation holds the cameras {unknown}; there are {', '.join(IMAGE_KEYS)}")
        self.model, self.n_action_steps = model.eval(), n_action_steps
        self.prompter = Prompter(processor, len(model.config.cameras))
        self.reset()

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> "Policy":
        """From a saved model's folder; `options` are the constructor's."""
        return cls(*load_vla(folder), **options)

    def reset(self, n_robots: int = 1) -> None:
        """Forget everything: queued actions and remembered features of all robots."""
        self._queues: list[deque[np.ndarray]] = [deque() for _ in range(n_robots)]
        self._features: list[deque[torch.Tensor]] = [deque(maxlen=self.model.config.n_obs_steps) for _ in range(n_robots)]

    def select_action(self, observations: Sequence[Observation]) -> np.ndarray:
        """The next raw action (n, a) of each robot; predicts a new chunk where the old one is used up.

        Args:
            observations: One per robot, in the order of the last calls: `image`, `wrist_image` (h, w, 3) uint8 RGB; `state`
                (s,) in the card's units; `instruction`.

        Raises:
            ValueError: More or fewer observations than robots.
        """
        self._check(observations)
        has_history = self.model.config.n_obs_steps > 1
        empty = [i for i, queue in enumerate(self._queues) if not queue]
        look = range(len(observations)) if has_history else empty
        if look:
            self._remember([observations[i] for i in look], look)
        if empty:
            for i, chunk in zip(empty, self._predict(empty), strict=True):
                self._queues[i].extend(chunk[: self.n_action_steps])
        return np.stack([queue.popleft() for queue in self._queues])

    def predict_action_chunk(self, observations: Sequence[Observation]) -> np.ndarray:
        """Raw action chunks (n, k, a) for these observations, which join the robots' histories."""
        self._check(observations)
        indices = range(len(observations))
        self._remember(observations, indices)
        return self._predict(indices)

    def _check(self, observations: Sequence[Observation]) -> None:
        if len(observations) != len(self._queues):
            raise ValueError(
                f"expected an observation of each of {len(self._queues)} robots, got {len(observations)}; "
                f"begin with reset(n_robots={len(observations)})"
            )
        needed = {"state", "instruction", *(IMAGE_KEYS[c] for c in self.model.config.cameras)}
        for observation in observations:
            if needed - set(observation):
                raise KeyError(
                    f"expected {sorted(needed)} in an observation, as in training; got {sorted(observation)}; "
                    f"add {sorted(needed - set(observation))}"
                )

    @torch.inference_mode()
    def _remember(self, observations: Sequence[Observation], indices: Sequence[int]) -> None:
        """One pass of the backbone over the newest observations; only their features are kept."""
        images = np.stack([[o[IMAGE_KEYS[c]] for c in self.model.config.cameras] for o in observations])
        state = self.model.stats["observation.state"].normalize(np.stack([o["state"] for o in observations]))
        prompts = self.prompter(images, [o["instruction"] for o in observations])
        inputs = {**prompts, "state": torch.as_tensor(state, dtype=torch.float32)}
        features = self.model.features(**{k: v.to(self.model.device) for k, v in inputs.items()})
        for i, feature in zip(indices, features, strict=True):
            self._features[i].append(feature)

    @torch.inference_mode()
    def _predict(self, indices: Sequence[int]) -> np.ndarray:
        """Raw chunks (n, k, a); a history that is not full yet is filled with its oldest observation, as in training."""
        n_steps = self.model.config.n_obs_steps
        rows = [list(self._features[i]) for i in indices]
        stacked = torch.stack([torch.stack([row[0]] * (n_steps - len(row)) + row) for row in rows])
        chunk = self.model.head.predict(self.model.history(stacked)[:, -1])
        return self.model.spec.unnormalize(chunk.float().cpu().numpy(), self.model.stats["action"])


def watch(policy: Policy, env: Any, seed: int, family: str | None = None) -> dict[str, Any]:
    """One episode of one robot, with all that it saw, felt, did and meant to do; a new chunk is predicted at every step.

    Returns:
        Per step "image" and "wrist_image" (n, h, w, 3), "state" (n, s), "action" (n, a) and "chunk" (n, k, a), both raw;
        and "instruction", "seed", "is_success".
    """
    observation, _ = env.reset(seed=seed, options={"family": family})
    policy.reset()
    steps: list[dict[str, np.ndarray]] = []
    is_success = is_over = False
    while not (is_success or is_over):
        chunk = policy.predict_action_chunk([observation])[0]
        seen = {k: observation[k] for k in ("image", "wrist_image", "state")}
        steps.append({**seen, "action": chunk[0], "chunk": chunk})
        observation, _, is_success, is_over, _ = env.step(chunk[0])
    columns = {k: np.stack([step[k] for step in steps]) for k in steps[0]}
    return {**columns, "instruction": observation["instruction"], "seed": seed, "is_success": is_success}
