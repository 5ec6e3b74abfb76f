"""A trained model in closed loop: observations in, raw robot actions out, for a batch of robots.

The verbs are LeRobot's: `reset`, `select_action`, `predict_action_chunk`.
"""

import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from rvlm.data.actions import ActionSpec
from rvlm.data.resizing import resize
from rvlm.data.rotations import average_rotations
from rvlm.policy.continuation_checks import check_previous, require_flow
from rvlm.policy.factory import load_vla
from rvlm.policy.flow_matching import decoding_from, draw_noise
from rvlm.policy.model import VLA, Decode
from rvlm.policy.model_lock import one_at_a_time
from rvlm.policy.observation_checks import Expected, ObservationError
from rvlm.policy.observation_history import FeatureHistory, KVCachedSequence, SingleObservation, UncachedSequence
from rvlm.policy.real_time_chunking import continue_chunk
from rvlm.vlm.backbones import set_attention
from rvlm.vlm.quantization import compute_device
from rvlm.vlm.templates import image_token, special_tokens

Observation = dict[str, Any]
Observations = Sequence[Observation] | Any  # anything is checked, and refused with a message


class Policy:
    """Closed loop over `VLA`.

    Args:
        model: As `load_vla` gives it.
        processor: Likewise.
        n_action_steps: Actions executed of each predicted chunk before the next prediction: 1 re-plans at every step,
            `chunk_size` executes whole chunks. Default: the policy's own.
        temporal_ensemble_coeff: Execute the mean over all chunks that cover a step, weighted by exp(-coeff * i), i counted
            from the oldest chunk; None executes the newest chunk only. Rotations that are targets are averaged as rotations.
            Source: ACT (Zhao et al. 2023, arXiv 2304.13705), section IV-B.
        spec: The environment's, which selects the embodiment; conventions that differ are refused. Default: the target robot.

    Raises:
        ValueError: `n_action_steps` beyond the chunk, an ensemble of chunks that do not overlap, an unknown camera.

    Example:
        >>> policy = rvlm.load_policy(rvlm.recipes.POLICY, n_action_steps=4)
        >>> env = rvlm.Tabletop()
        >>> observations = [env.reset(seed=900_000 + i)[0] for i in range(2)]
        >>> policy.reset(n_robots=2)
        >>> policy.predict_action_chunk(observations).shape
        (2, 4, 7)
    """

    def __init__(
        self,
        model: VLA,
        processor: Any,
        n_action_steps: int | None = None,
        temporal_ensemble_coeff: float | None = None,
        spec: ActionSpec | None = None,
    ) -> None:
        self.robot = model.embodiment(model.spec if spec is None else spec)
        n_action_steps = model.config.n_action_steps if n_action_steps is None else n_action_steps
        if not isinstance(n_action_steps, int | np.integer) or not 1 <= n_action_steps <= model.config.chunk_size:
            raise ValueError(
                f"n_action_steps is expected between 1 and the chunk of {model.config.chunk_size} predicted actions; "
                f"got {n_action_steps}"
            )
        if temporal_ensemble_coeff is not None and (n_action_steps != 1 or not 0 <= temporal_ensemble_coeff < float("inf")):
            raise ValueError(
                "a temporal ensemble predicts at each step: expected n_action_steps=1 and temporal_ensemble_coeff of at least 0; "
                f"got n_action_steps={n_action_steps}, temporal_ensemble_coeff={temporal_ensemble_coeff}"
            )
        if temporal_ensemble_coeff is not None and model.config.action_representation != "recorded":
            raise ValueError(
                "expected actions as recorded for a temporal ensemble, got a policy of relative ones, whose chunks have "
                "different origins; leave temporal_ensemble_coeff out"
            )
        self.model, self.temporal_ensemble_coeff = model.eval(), temporal_ensemble_coeff
        self.n_action_steps = int(n_action_steps)
        self._try_model(processor)
        self._cameras = tuple(model.config.cameras)
        unknown = dict.fromkeys(self._cameras, model.config.image_size)
        sizes: Any = (model.config.camera_sizes or {}).get(self.robot.spec.dataset) or unknown
        words = tuple({image_token(processor), *special_tokens(processor.tokenizer)})
        self.expected = Expected({camera: sizes[camera] and tuple(sizes[camera]) for camera in self._cameras}, self.robot, words)
        self.reset()

    @one_at_a_time
    def _try_model(self, processor: Any) -> None:
        """How prompts are built and histories are kept with this model, found by trying."""
        model = self.model
        self.prompt_builder = model.prompt_builder(processor)
        single = partial(SingleObservation, is_present=model.conditioning.present_slots(self.robot))
        self._history_cls: Any = {"one_step": single, "policy_head": FeatureHistory, "interleaved": KVCachedSequence}[
            model.config.structure
        ]
        can_append = not model.is_expert and self._history_cls is KVCachedSequence  # an expert reads all tokens, cached or not
        if self._history_cls is KVCachedSequence and not (
            can_append and KVCachedSequence.matches_uncached(model, self.prompt_builder)
        ):
            self._history_cls = UncachedSequence

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of all its images [px], as in training, or the backbone's own if unknown; None if cameras differ."""
        first, *others = self.expected.sizes.values()
        if any(size != first for size in others):
            return None
        return first or (self.prompt_builder.image_size, self.prompt_builder.image_size)

    @property
    def action_spec(self) -> ActionSpec:
        """Conventions of the robot that it acts for."""
        return self.robot.spec

    def reset(self, n_robots: int = 1) -> None:
        """Clear queued actions, chunks of the ensemble and the observation history.

        Raises:
            ValueError: Fewer than one robot.
        """
        if n_robots < 1:
            raise ValueError(f"expected n_robots of at least 1, got {n_robots}")
        self.n_robots, self.history = n_robots, self._history_cls(self.model, self.prompt_builder)
        self._sizes: dict[str, tuple[int, int]] | None = None  # of the images since the reset
        self._has_warned, self._n_chunks, self._seeds = False, 0, list(range(n_robots))
        self._state = np.zeros((n_robots, len(self.robot.spec.state_names)))  # raw, of the last observation
        self._queue: deque[np.ndarray] = deque()  # raw actions (n, a) to come
        self._chunks: deque[torch.Tensor] = deque(maxlen=self.model.config.chunk_size)

    def seed_episodes(self, seeds: Iterable[int]) -> None:
        """Seed the noise that a flow's chunks begin with, of each robot's episode; after a reset it is that of 0, 1, ...

        Raises:
            ValueError: More or fewer seeds than robots.
        """
        seeds = list(seeds)
        if len(seeds) != self.n_robots or any(not isinstance(seed, int | np.integer) or seed < 0 for seed in seeds):
            raise ValueError(f"expected a seed from 0 on of each of {self.n_robots} robots, got {seeds}")
        self._seeds = seeds

    def select_action(self, observations: Observations) -> Float[np.ndarray, "n a"]:
        """The next raw action (n, a) of each robot; predicts a new chunk when the queue is empty.

        Args:
            observations: One per robot, always in the same order: `images`, (h, w, 3) uint8 RGB of each camera by its name in
                the card; `state` (s,) in the card's units; `instruction`.

        Raises:
            ObservationError: Number, images, state or instruction differ in kind from training.
            ValueError: The model's action is not finite.
        """
        self.check(observations)
        if not self._queue or self.model.config.n_obs_steps > 1:
            self._observe(observations)
        if not self._queue:
            chunk = self._next_chunk()
            self._queue.extend(chunk[:, i] for i in range(self.n_action_steps))
        return self._queue.popleft()

    def keep(self, rows: Sequence[int] | np.ndarray) -> None:
        """Continue with the robots at these indices, in this order; their actions do not change.

        Raises:
            ValueError: No index, or one out of range.
        """
        given, rows = rows, np.asarray(rows).tolist()
        kind = np.asarray(given).dtype.kind
        if kind not in "iu" or not isinstance(rows, list) or any(row not in range(self.n_robots) for row in rows) or not rows:
            hint = "; of a mask give np.flatnonzero(mask)" * (kind == "b")
            raise ValueError(f"expected places of some of {self.n_robots} robots to keep, got {given}{hint}")
        self.n_robots = len(rows)
        self.history.keep(rows)
        self._state, self._seeds = self._state[rows], [self._seeds[row] for row in rows]
        self._queue = deque(actions[rows] for actions in self._queue)
        self._chunks = deque((chunk[rows] for chunk in self._chunks), self._chunks.maxlen)

    def observe(self, observations: Observations) -> None:
        """Add observations to the histories, without a prediction.

        Raises:
            ObservationError: As `select_action`.
        """
        self.check(observations)
        self._observe(observations)

    def predict_action_chunk(
        self, observations: Observations, previous: Float[np.ndarray, "n m a"] | None = None, n_frozen: int = 0
    ) -> Float[np.ndarray, "n k a"]:
        """Raw action chunks (n, k, a) for these observations, which are added to the histories.

        Args:
            observations: One per robot, as `select_action` takes them.
            previous: Raw actions (n, m, a) of the chunk in execution, from this step on, which the new one is to continue
                (`rvlm.policy.real_time_chunking`); for flow heads.
            n_frozen: How many of these are executed while the new chunk is computed.

        Raises:
            ObservationError: As `select_action`.
            ValueError: A chunk to continue whose head is not a flow, or that is none.
        """
        if previous is not None:
            require_flow(self.model)
            check_previous(previous, n_frozen, self.n_robots, self.model.config.chunk_size, self.robot.spec.n_dims)
        self.observe(observations)
        if previous is None:
            return self._unnormalized(self._predict())
        head, device = self.model.head, self.model.device
        normalized = self.model.conditioning.normalized_actions(self.robot, previous, self._state)
        left = torch.as_tensor(normalized, dtype=torch.float32, device=device)
        noise = draw_noise(head.shape, self._noise_seeds())
        return self._unnormalized(self._predict(partial(continue_chunk, head, previous=left, n_frozen=n_frozen, noise=noise)))

    def _noise_seeds(self) -> list[tuple[int, int]]:
        """Episode and chunk, of each robot."""
        return [(seed, self._n_chunks) for seed in self._seeds]

    def check(self, observations: Observations) -> None:
        """Refuse observations that differ in kind from training; warn once of a state far outside its range.

        Raises:
            ObservationError: As `select_action`.
        """
        sizes = self.expected.check(observations, self.n_robots)
        if self._sizes not in (None, sizes):
            raise ObservationError(
                f"expected images of {self._sizes} (h, w), as in this episode's first observation, got {sizes}; resize them "
                "alike, or begin with reset()"
            )
        self._sizes = sizes
        if not self._has_warned and (warning := self.expected.range_warning(observations)):
            self._has_warned = True
            warnings.warn(warning, stacklevel=3)

    @one_at_a_time
    @torch.inference_mode()
    def _observe(self, observations: Observations) -> None:
        """Add the newest observations to the history."""
        size = self.model.config.image_size
        images = np.stack([[resize(o["images"][camera], size) for camera in self._cameras] for o in observations])
        conditioning, spec = self.model.conditioning, self.robot.spec
        self._state = np.stack([o["state"] for o in observations])
        state = spec.normalize_state(self._state, self.robot.stats["observation.state"])
        samples = [
            conditioning(self.robot, {"state": s, "instruction": o["instruction"]})
            for s, o in zip(state, observations, strict=True)
        ]
        aligned = torch.as_tensor(np.stack([s["state"] for s in samples]), dtype=torch.float32, device=self.model.device)
        self.history.add(images, aligned, [s["instruction"] for s in samples])

    @one_at_a_time
    @torch.inference_mode()
    def _predict(self, decode: Decode | None = None) -> torch.Tensor:
        """Normalised chunks (n, k, a) from the history; a flow begins each with noise of its own."""
        decode = decode or decoding_from(self.model.head, self._noise_seeds())
        self._n_chunks += 1
        return self.history.predict(decode)

    def _next_chunk(self) -> np.ndarray:
        """The raw chunk to execute: the newest one, or the ensemble's action for this step (n, 1, a)."""
        newest = self._predict()
        if self.temporal_ensemble_coeff is None:
            return self._unnormalized(newest)
        self._chunks.append(newest)
        n = len(self._chunks)
        candidates = torch.stack([chunk[:, n - 1 - i] for i, chunk in enumerate(self._chunks)])  # for this step, oldest first
        weights = torch.exp(-self.temporal_ensemble_coeff * torch.arange(n, device=candidates.device))
        mean = self._unnormalized(((weights[:, None, None] * candidates).sum(0) / weights.sum())[:, None])
        each, placed = self._unnormalized(candidates.transpose(0, 1)), self.robot.spec.placed_action
        averaged = average_rotations(placed, mean[:, 0], each, weights.cpu().numpy())
        return (averaged * self.robot.spec.present)[:, None]

    def _unnormalized(self, chunk: torch.Tensor) -> np.ndarray:
        if not chunk.isfinite().all():
            wrong = (~chunk.isfinite()).any(1).nonzero().tolist()
            names = [f"{self.robot.spec.names[dim]} of robot {i}" for i, dim in wrong]
            raise ValueError(
                f"expected finite actions of the model, got others for {', '.join(names)}; its weights or activations "
                "overflow: load it in float32, or train it again"
            )
        return self.model.conditioning.raw_actions(self.robot, chunk.float().cpu().numpy(), self._state)


def load_policy(
    name: str | Path,
    *,
    revision: str | None = None,
    base_model: str | Path | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    **options: Any,
) -> Policy:
    """A trained policy, ready to act.

    Args:
        name: A saved model's folder, or its name on the Hub.
        revision: Commit, branch or tag of a name on the Hub.
        base_model: Folder of the backbone, of a policy that was saved without it.
        device: Of the computation; this machine's GPU if it has one, else its CPU.
        attn_implementation: How attention is computed, as `make_policy` takes it.
        options: Of `Policy`: `n_action_steps`, `temporal_ensemble_coeff`, `spec`.

    Raises:
        ValueError: As `VLA.from_pretrained` and `Policy`.

    Example:
        >>> policy, env = rvlm.load_policy(rvlm.recipes.POLICY), rvlm.Tabletop()
        >>> observation, _ = env.reset(seed=900_000)
        >>> action = policy.select_action([observation])[0]
        >>> observation, *_ = env.step(action)
    """
    device = compute_device(device)
    model, processor = load_vla(name, revision=revision, base_model=base_model, device=device)
    set_attention(model.backbone, attn_implementation)
    return Policy(model, processor, **options)
