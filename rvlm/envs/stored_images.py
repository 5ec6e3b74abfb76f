"""Images as a recording stores them, of environments and cameras that show them upright."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import UInt8

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch


class StoredImages(gymnasium.ObservationWrapper):
    """An environment that renders upright, with images turned by `image_rotation_deg` of its spec: `StoredImages(MyEnv())`.

    Not for environments whose images are those of the recording already, as they would be turned twice.

    Raises:
        SpecMismatch: Images are stored neither upright nor turned by 180 degrees.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        require_half_turns(self.unwrapped.action_spec)

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The observation with its images turned."""
        return {**observation, "images": turned_as_stored(observation["images"], self.unwrapped.action_spec)}


def turned_as_stored(images: Mapping[str, UInt8[np.ndarray, "h w c"]], spec: ActionSpec) -> dict[str, UInt8[np.ndarray, "h w c"]]:
    """Images of each camera as they are shown -> as recordings of this spec store them."""
    return {name: np.rot90(image, int(spec.image_rotation_deg) // 90).copy() for name, image in images.items()}


def require_half_turns(spec: ActionSpec) -> None:
    """Refuse a spec whose images would change their shape.

    Raises:
        SpecMismatch: Images are stored neither upright nor turned by 180 degrees.
    """
    if spec.image_rotation_deg not in (0, 180):
        raise SpecMismatch(f"{spec.dataset}: expected images upright or turned by 180 degrees, got {spec.image_rotation_deg}")
