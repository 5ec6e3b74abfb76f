"""Observation and action space of an environment, from its robot's spec."""

from collections.abc import Iterable, Mapping

import gymnasium
import numpy as np

from rvlm.data.actions import ActionSpec

_PRINTABLE, _MAX_LENGTH = "".join(map(chr, range(32, 127))), 120  # of instructions that are not listed


def observation_space(
    spec: ActionSpec, shapes: Mapping[str, tuple[int, ...]], instructions: Iterable[str] = ()
) -> gymnasium.spaces.Dict:
    """Images, state and instruction.

    Args:
        spec: The robot's.
        shapes: Camera -> (h, w, 3).
        instructions: All that there are; any short text if left out.
    """
    texts = list(instructions)
    length, letters = (max(map(len, texts)), frozenset("".join(texts))) if texts else (_MAX_LENGTH, frozenset(_PRINTABLE))
    images: dict[str, gymnasium.Space] = {
        camera: gymnasium.spaces.Box(0, 255, shape, np.uint8) for camera, shape in shapes.items()
    }
    return gymnasium.spaces.Dict(
        images=gymnasium.spaces.Dict(images),
        state=gymnasium.spaces.Box(-np.inf, np.inf, (len(spec.state_names),), np.float32),
        instruction=gymnasium.spaces.Text(length, charset=letters),
    )


def action_space(spec: ActionSpec) -> gymnasium.spaces.Box:
    """Raw actions (a,) float32 within the card's range."""
    low, high = (np.asarray(values, np.float32) for values in (spec.low, spec.high))
    return gymnasium.spaces.Box(low, high, dtype=np.float32)
