"""Acting in real time on a robot: chunks are computed in a thread while the previous one is executed."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float

from rvlm.policy.delayed_policy import DelayedPolicy, Inference
from rvlm.policy.policy import Policy

N_DELAYS = 10  # last ones, whose longest is expected next


class RealTimePolicy(DelayedPolicy):
    """One robot's policy whose `select_action` never waits for the network.

    As `DelayedPolicy`, with delays as they are: predictions run in a thread of their own, and the longest of the last
    `N_DELAYS` is expected of the next. Call `select_action` once each control period; `n_held` counts those without an action.

    Args:
        policy: That predicts; only this object may use it. Policies of several robots may share a model; their predictions wait
            for each other.
        execution: One of `EXECUTIONS`. The default is no advice: in notebook 12, whose scene stands still, "synchronous" did
            better; measure on your robot.

    Raises:
        ValueError: As `DelayedPolicy`.

    Source: Black et al. 2025 (arXiv 2506.07339), algorithm 1.
    """

    def __init__(self, policy: Policy, execution: str = "asynchronous") -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._is_closed = False
        self.delays: deque[int] = deque(maxlen=N_DELAYS)  # of the last predictions [control steps]
        super().__init__(policy, execution)

    def reset(self, n_robots: int = 1) -> None:
        """Begin a new episode; a prediction under way is waited for and dropped.

        Raises:
            ValueError: More than one robot, whose clocks differ.
            RuntimeError: It was closed.
        """
        self._require_open()
        if n_robots != 1:
            raise ValueError(f"expected one robot, got {n_robots}; robots in real time have a policy each")
        self._thread.submit(lambda: None).result()  # behind the prediction under way
        super().reset()

    def keep(self, rows: Sequence[int] | np.ndarray) -> None:
        """As `Policy.keep`: of one robot there is none to drop.

        Raises:
            ValueError: Other places than [0].
        """
        places = np.asarray(rows)
        if places.dtype.kind not in "iu" or places.tolist() != [0]:
            raise ValueError(f"expected [0], the place of the one robot, to keep, got {rows}; end its episode by reset()")

    def select_action(self, observations: Sequence[dict]) -> Float[np.ndarray, "n a"]:
        """As `DelayedPolicy.select_action`; never waits.

        Raises:
            RuntimeError: It was closed.
        """
        self._require_open()
        return super().select_action(observations)

    def _require_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("expected a policy whose thread runs, got one that was closed; make another RealTimePolicy of it")

    def _compute(self, unseen: list[Sequence[dict]], previous: np.ndarray | None) -> Future:
        return self._thread.submit(super()._compute, unseen, previous)

    def _expected_delay(self) -> int:
        return max(self.delays, default=0)

    def _is_finished(self, inference: Inference) -> bool:
        return inference.result.done()

    def _result(self, inference: Inference) -> Any:
        chunk = inference.result.result()
        self.delays.append(inference.n_steps)
        return chunk

    def close(self) -> None:
        """End the thread; the policy that predicts may be used again."""
        self._is_closed = True
        self._thread.shutdown()
