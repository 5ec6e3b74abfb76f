"""A trained model in the loop: observations in, raw robot actions out, any number of robots side by side.

The verbs are LeRobot's: `reset`, `select_action`, `predict_action_chunk`. All robots move in step.
"""

import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rvlm.data.actions import ActionSpec
from rvlm.data.cards import IMAGE_KEYS
from rvlm.policy.checkpoints import load_vla
from rvlm.policy.model import VLA
from rvlm.policy.observation_history import FeatureHistory, KVCachedSequence, SingleObservation, UncachedSequence
from rvlm.policy.observations import Expected, ObservationError
from rvlm.vlm.templates import mark_of, special_words

Observation = dict[str, Any]
Observations = Sequence[Observation] | Any  # whatever comes is looked at, so that the refusal is in words


class Policy:
    """Closed loop over `VLA`.

    Args:
        model: As `load_vla` gives it.
        processor: Likewise.
        n_action_steps: Actions executed of each predicted chunk before predicting anew: 1 re-plans at every step, the chunk's
            size executes chunks whole. As the policy was made for, if left out.
        ensemble: Execute the mean of what all chunks say that reach a step, weighted by exp(-ensemble * i), i counted from
            the oldest chunk on; None executes the newest chunk alone. Source: temporal ensembling of ACT (Zhao et al. 2023,
            arXiv 2304.13705), section IV-B.
        spec: The environment's, by which the robot is chosen of those that the policy knows; refused where it disagrees. The
            robot that the policy is for, if left out.

    Raises:
        ValueError: More actions than are predicted, an ensemble of chunks that do not overlap, an unknown camera.
    """

    def __init__(
        self,
        model: VLA,
        processor: Any,
        n_action_steps: int | None = None,
        ensemble: float | None = None,
        spec: ActionSpec | None = None,
    ) -> None:
        self.robot = model.embodiment(model.spec if spec is None else spec)
        n_action_steps = model.config.n_action_steps if n_action_steps is None else n_action_steps
        if not isinstance(n_action_steps, int | np.integer) or not 1 <= n_action_steps <= model.config.chunk_size:
            raise ValueError(
                f"n_action_steps is expected between 1 and the chunk of {model.config.chunk_size} predicted actions; "
                f"got {n_action_steps}"
            )
        if ensemble is not None and (n_action_steps != 1 or not 0 <= ensemble < float("inf")):
            raise ValueError(
                f"an ensemble joins the chunks of every step: expected n_action_steps=1 and ensemble of at least 0; "
                f"got n_action_steps={n_action_steps}, ensemble={ensemble}"
            )
        unknown = [c for c in model.config.cameras if c not in IMAGE_KEYS]
        if unknown:
            raise ValueError(f"no observation holds the cameras {unknown}; there are {', '.join(IMAGE_KEYS)}")
        self.model, self.ensemble = model.eval(), ensemble
        self.n_action_steps = int(n_action_steps)
        self.prompter = model.prompt_builder(processor)
        size: Any = model.config.image_size
        words = tuple({mark_of(processor), *special_words(processor.tokenizer)})
        self.expected = Expected(tuple(IMAGE_KEYS[c] for c in model.config.cameras), size and tuple(size), self.robot, words)
        self._history_cls: Any = {"one_step": SingleObservation, "policy_head": FeatureHistory, "interleaved": KVCachedSequence}[
            model.config.structure
        ]
        if self._history_cls is KVCachedSequence and not KVCachedSequence.matches_uncached(model, self.prompter):
            self._history_cls = UncachedSequence
        self.reset()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images to show it [px]: as in training or, where that is not known, as its backbone takes."""
        return self.expected.image_size or (self.prompter.image_size, self.prompter.image_size)

    def reset(self, n_robots: int = 1) -> None:
        """Forget everything: queued actions, chunks of an ensemble, and what is remembered of past observations.

        Raises:
            ValueError: No number of robots from 1 on.
        """
        if n_robots < 1:
            raise ValueError(f"expected n_robots of at least 1, got {n_robots}")
        self.n_robots, self.memory = n_robots, self._history_cls(self.model, self.prompter)
        self._size: tuple[int, int] | None = None  # of the images since then
        self._has_warned = False
        self._queue: deque[np.ndarray] = deque()  # raw actions (n, a) to come
        self._chunks: deque[torch.Tensor] = deque(maxlen=self.model.config.chunk_size)

    def select_action(self, observations: Observations) -> np.ndarray:
        """The next raw action (n, a) of each robot; predicts a new chunk where the old one is used up.

        Args:
            observations: One per robot, in the order of the last calls: `image`, `wrist_image` (h, w, 3) uint8 RGB; `state`
                (s,) in the card's units; `instruction`.

        Raises:
            ObservationError: An observation differs in kind from those of training: number, images, state, instruction.
            ValueError: The model's action is not finite.
        """
        self._check(observations)
        if not self._queue or self.model.config.n_obs_steps > 1:
            self._observe(observations)
        if not self._queue:
            chunk = self._unnormalized(self._next_chunk())
            self._queue.extend(chunk[:, i] for i in range(self.n_action_steps))
        return self._queue.popleft()

    def keep(self, rows: Sequence[int] | np.ndarray) -> None:
        """Go on with the robots at these places alone, in this order; their actions are what they would have been.

        Raises:
            ValueError: No robots, or one that there is not.
        """
        given, rows = rows, np.asarray(rows).tolist()
        kind = np.asarray(given).dtype.kind
        if kind not in "iu" or not isinstance(rows, list) or any(row not in range(self.n_robots) for row in rows) or not rows:
            hint = "; of a mask give np.flatnonzero(mask)" * (kind == "b")
            raise ValueError(f"expected places of some of {self.n_robots} robots to keep, got {given}{hint}")
        self.n_robots = len(rows)
        self.memory.keep(rows)
        self._queue = deque(actions[rows] for actions in self._queue)
        self._chunks = deque((chunk[rows] for chunk in self._chunks), self._chunks.maxlen)

    def predict_action_chunk(self, observations: Observations) -> np.ndarray:
        """Raw action chunks (n, k, a) for these observations, which join the robots' histories."""
        self._check(observations)
        self._observe(observations)
        return self._unnormalized(self._predict())

    def _check(self, observations: Observations) -> None:
        size = self.expected.check(observations, self.n_robots)
        if self._size not in (None, size):
            raise ObservationError(
                f"expected images of {self._size} (h, w), as in this episode's first observation, got {size}; resize them alike, "
                "or begin with reset()"
            )
        self._size = size
        if not self._has_warned and (doubt := self.expected.far(observations)):
            self._has_warned = True
            warnings.warn(doubt, stacklevel=3)

    @torch.inference_mode()
    def _observe(self, observations: Observations) -> None:
        """The newest observations join what is remembered."""
        images = np.stack([[o[IMAGE_KEYS[c]] for c in self.model.config.cameras] for o in observations])
        state = self.robot.stats["observation.state"].normalize(np.stack([o["state"] for o in observations]))
        told = [
            self.model.conditioning(self.robot, {"state": felt, "instruction": o["instruction"]})
            for felt, o in zip(state, observations, strict=True)
        ]
        felt = torch.as_tensor(np.stack([t["state"] for t in told]), dtype=torch.float32, device=self.model.device)
        self.memory.add(images, felt, [t["instruction"] for t in told])

    @torch.inference_mode()
    def _predict(self) -> torch.Tensor:
        """Normalised chunks (n, k, a) from all that is remembered."""
        return self.memory.predict()

    def _next_chunk(self) -> torch.Tensor:
        """The normalised chunk to execute: the newest one, or what the ensemble of chunks says for this one step (n, 1, a)."""
        newest = self._predict()
        if self.ensemble is None:
            return newest
        self._chunks.append(newest)
        n = len(self._chunks)
        said = torch.stack([chunk[:, n - 1 - i] for i, chunk in enumerate(self._chunks)])  # about this step, oldest first
        weights = torch.exp(-self.ensemble * torch.arange(n, device=said.device))[:, None, None]
        return ((weights * said).sum(0) / weights.sum())[:, None]

    def _unnormalized(self, chunk: torch.Tensor) -> np.ndarray:
        if not chunk.isfinite().all():
            wrong = (~chunk.isfinite()).any(1).nonzero().tolist()
            names = [f"{self.robot.spec.names[dim]} of robot {i}" for i, dim in wrong]
            raise ValueError(
                f"expected finite actions of the model, got others for {', '.join(names)}; its weights overflow or are no "
                "numbers: load them anew, in float32, or train again"
            )
        return self.robot.spec.unnormalize(chunk.float().cpu().numpy(), self.robot.stats["action"])


def record_rollout(policy: Policy, env: Any, seed: int, family: str | None = None) -> dict[str, Any]:
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


def load_policy(
    name: str | Path,
    *,
    revision: str | None = None,
    base_model: str | Path | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Policy:
    """A trained policy, ready to act.

    Args:
        name: A saved model's folder, or its name on the Hub.
        revision: Commit, branch or tag of a name on the Hub.
        base_model: Folder of the backbone, of a policy that was saved without it.
        device: Where it computes; where its weights were loaded to if left out.
        options: Of `Policy`: `n_action_steps`, `ensemble`, `spec`.

    Raises:
        ValueError: As `VLA.from_pretrained` and `Policy`.
    """
    return Policy(*load_vla(name, revision=revision, base_model=base_model, device=device), **options)
