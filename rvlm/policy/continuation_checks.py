"""Validation of what real-time chunking continues: the head, the chunk, and how much of it is left when the next one begins."""

import warnings
from typing import Any

import numpy as np


def require_flow(model: Any) -> None:
    """Refuse a policy's model whose head is not a flow.

    Raises:
        ValueError: With the head that it has.
    """
    if not hasattr(model.head, "predict_clean_action"):
        raise ValueError(
            f"real-time chunking guides a flow: expected a head such as 'flow', got {model.config.head!r}; train one, "
            "or take execution='asynchronous'"
        )


def check_previous(previous: Any, n_frozen: Any, n_robots: int, chunk_size: int, n_dims: int) -> None:
    """Refuse what is no rest of a chunk (n, m, a) to continue, or no number of frozen actions.

    Raises:
        ValueError: With the shape that was expected.
    """
    values = np.asarray(previous)
    is_rest = values.ndim == 3 and values.shape[::2] == (n_robots, n_dims) and 1 <= values.shape[1] <= chunk_size
    if not is_rest or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        hint = "; it holds NaN or infinity" * (values.dtype.kind == "f" and not np.isfinite(values).all())
        raise ValueError(
            f"expected the rest of the previous chunk as finite raw actions ({n_robots}, 1 to {chunk_size}, {n_dims}), got "
            f"{values.dtype} of shape {values.shape}{hint}; without one leave `previous` out"
        )
    if not isinstance(n_frozen, int | np.integer) or isinstance(n_frozen, bool) or n_frozen < 0:
        raise ValueError(f"expected n_frozen as a number of control steps from 0 on, got {n_frozen!r}")


def check_continuation(chunk_size: int, n_action_steps: int, delay_steps: int) -> None:
    """Refuse real-time chunking that leaves nothing of a chunk to continue; warn where the next one comes after its end.

    The paper's condition is d <= s <= H - d: of chunks of H actions, s executed ones and a delay d [control steps].

    Raises:
        ValueError: As many executed actions as a chunk has.
    """
    d, s, h = delay_steps, n_action_steps, chunk_size
    if s >= h:
        raise ValueError(
            "real-time chunking continues what is left of a chunk: expected n_action_steps below the chunk_size, in the paper "
            f"d <= s <= H - d, got a delay d of {d}, s = n_action_steps = {s} and H = chunk_size = {h}; lower n_action_steps"
        )
    if max(d, s) > h - d:
        warnings.warn(
            f"expected d <= s <= H - d for real-time chunking, got a delay d of {d}, s = n_action_steps = {s} and H = chunk_size "
            f"= {h}: each chunk ends before the next one comes, and the robot is held meanwhile; take longer chunks",
            stacklevel=3,
        )
