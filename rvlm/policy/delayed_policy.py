"""Acting while computing: a policy whose chunks arrive some control steps after their observations, as on a robot in real time.

The clock does not wait for the policy: while it computes, the robot holds still (*synchronous* inference), or goes on with its
previous chunk (*asynchronous* inference), of which the next one may be a continuation (*real-time chunking*). What waiting
costs depends on the scene: only time where it stands still meanwhile, more where it moves.

Source: Black et al. 2025 (arXiv 2506.07339), section 3.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from rvlm.data.actions import ActionSpec
from rvlm.data.holding import hold_action
from rvlm.policy.continuation_checks import check_continuation, require_flow

if TYPE_CHECKING:  # it loads PyTorch
    from rvlm.policy.policy import Policy

EXECUTIONS = ("synchronous", "asynchronous", "real_time_chunking")
NO_DELAY = ("synchronous", 0)  # execution and delay of `Policy` itself


def check_execution(execution: str, delay_steps: int = 0) -> None:
    """Refuse an unknown way of execution and a delay that is not a number of control steps.

    Raises:
        ValueError: With what there is.
    """
    if execution not in EXECUTIONS:
        raise ValueError(f"no execution {execution!r}; there are {', '.join(EXECUTIONS)}")
    if not isinstance(delay_steps, int | np.integer) or isinstance(delay_steps, bool) or delay_steps < 0:
        raise ValueError(f"expected delay_steps as a number of control steps from 0 on, got {delay_steps!r}")


@dataclass
class Inference:
    """A chunk that is being computed.

    Attributes:
        result: The chunk (n, k, a), or what it will be read from.
        n_steps: Control steps since its observation.
        n_executed: Actions of the previous chunk that were executed meanwhile.
    """

    result: Any
    n_steps: int = 0
    n_executed: int = 0


class DelayedPolicy:
    """A policy whose chunks arrive `delay_steps` control steps after their observation, in a simulator that itself waits.

    A prediction begins when `n_action_steps` actions of a chunk were executed and none is under way. Meanwhile, "synchronous"
    holds the robot (`rvlm.data.holding`); the others go on with the previous chunk, and hold the robot where it has ended, as
    chunks shorter than `max(delay_steps, n_action_steps) + delay_steps` do. The new chunk is entered behind as many actions as
    were executed meanwhile. Each episode begins with a held robot; on a robot a delay is at least one step.

    Without delay, "synchronous" and "asynchronous" are `Policy` itself.

    Args:
        policy: That predicts.
        execution: One of `EXECUTIONS`.
        delay_steps: From an observation to its chunk [control steps].

    Raises:
        ValueError: An unknown execution, a temporal ensemble, or real-time chunking of a head that is not a flow, or where
            whole chunks are executed.

    Example:
        >>> policy = rvlm.load_policy(rvlm.recipes.POLICY, n_action_steps=2)
        >>> delayed = DelayedPolicy(policy, "asynchronous", delay_steps=1)
    """

    def __init__(self, policy: "Policy", execution: str = "synchronous", delay_steps: int = 0) -> None:
        check_execution(execution, delay_steps)
        if policy.temporal_ensemble_coeff is not None:
            raise ValueError(
                "expected a policy that executes its newest chunk, got a temporal ensemble; leave the coefficient out"
            )
        if execution == "real_time_chunking":
            require_flow(policy.model)
            check_continuation(policy.model.config.chunk_size, policy.n_action_steps, delay_steps)
        self.policy, self.execution, self.delay_steps = policy, execution, int(delay_steps)
        self.reset()

    @property
    def image_size(self) -> tuple[int, int] | None:
        """As `Policy.image_size`."""
        return self.policy.image_size

    @property
    def action_spec(self) -> ActionSpec:
        """As `Policy.action_spec`."""
        return self.policy.action_spec

    def reset(self, n_robots: int = 1) -> None:
        """Begin new episodes."""
        self.policy.reset(n_robots)
        self._chunk: np.ndarray | None = None  # (n, k, a), in execution
        self._position = 0  # of its next action
        self._last: np.ndarray | None = None  # (n, a), sent
        self._inference: Inference | None = None
        self._unseen: list[Sequence[dict]] = []  # since the last prediction began
        self.n_held = 0  # control steps at which the robot was held

    def seed_episodes(self, seeds: Iterable[int]) -> None:
        """As `Policy.seed_episodes`."""
        self.policy.seed_episodes(seeds)

    def keep(self, rows: Sequence[int] | np.ndarray) -> None:
        """As `Policy.keep`."""
        self.policy.keep(rows)
        kept = list(rows)
        self._chunk, self._last = (values if values is None else values[kept] for values in (self._chunk, self._last))
        self._unseen = [[observations[row] for row in kept] for observations in self._unseen]
        if self._inference is not None:
            self._inference.result = self._inference.result[kept]

    def select_action(self, observations: Sequence[dict]) -> Float[np.ndarray, "n a"]:
        """The raw action (n, a) of each robot at this control step; arguments and errors as of `Policy.select_action`."""
        self.policy.check(observations)  # at each step, also where they begin no prediction
        seen = copy.deepcopy(list(observations))  # the caller may fill the same arrays again
        self._unseen = [*(self._unseen if self.policy.model.config.n_obs_steps > 1 else ()), seen]
        self._enter_finished()
        if self._inference is None and (self._chunk is None or self._position >= self.policy.n_action_steps):
            self._begin()
            self._enter_finished()
        self._last = self._next_action(observations)
        return self._last.copy()

    def _begin(self) -> None:
        """Begin a prediction from the observations so far."""
        if self.execution == "synchronous":
            self._chunk = None
        left = None if self._chunk is None else self._chunk[:, self._position :]
        is_continued = self.execution == "real_time_chunking" and left is not None and left.shape[1] > 0
        self._inference = Inference(self._compute(self._unseen, left if is_continued else None))
        self._unseen = []

    def _compute(self, unseen: list[Sequence[dict]], previous: np.ndarray | None) -> Any:
        """The chunk from these observations, oldest first; `previous` (n, m, a) is the one to continue."""
        for observations in unseen[:-1]:
            self.policy.observe(observations)
        return self.policy.predict_action_chunk(unseen[-1], previous, self._expected_delay())

    def _expected_delay(self) -> int:
        """Control steps that a prediction is expected to take."""
        return self.delay_steps

    def _is_finished(self, inference: Inference) -> bool:
        return inference.n_steps >= self.delay_steps

    def _enter_finished(self) -> None:
        """Go over to the chunk that was computed, if one is finished, behind the actions that were executed meanwhile."""
        inference = self._inference
        if inference is not None and self._is_finished(inference):
            self._inference = None  # also where the computation failed, which `_result` raises
            self._chunk, self._position = self._result(inference), inference.n_executed

    def _result(self, inference: Inference) -> np.ndarray:
        return inference.result

    def _next_action(self, observations: Sequence[dict]) -> np.ndarray:
        """The chunk's next action, or where there is none, one that holds the robot."""
        is_held = self._chunk is None or self._position >= self._chunk.shape[1]
        if self._inference is not None:
            self._inference.n_steps += 1
            self._inference.n_executed += not is_held
        if self._chunk is None or is_held:
            self.n_held += 1
            return hold_action(self.policy.robot.spec, self._last, [o["state"] for o in observations])
        self._position += 1
        return self._chunk[:, self._position - 1].copy()
