"""Checks an observation before the policy acts on it: of the kind that the policy was trained on, or refused.

Unchecked, images in [0, 1] look black, channels first look like noise, a state in millimetres like a distant hand, and each of
them still yields an action.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rvlm.data.instruction_checks import instruction_error
from rvlm.data.normalization import on_half_sphere
from rvlm.policy.embodiments import Embodiment

FAR = 10.0  # ranges of the training data beyond which a state is warned of
MIN_RANGE = 0.1  # of a dimension that hardly moved in training [m, or the card's unit]
FULL_TURN = 2 * np.pi  # the largest difference of two angles [rad]


class ObservationError(ValueError):
    """An observation differs in kind from those that the policy was trained on."""


@dataclass(frozen=True)
class Expected:
    """The observations that a policy takes.

    Attributes:
        sizes: The policy's cameras, in its order, and height and width of their training images [px]; None if unknown.
        robot: Of the state.
        words: Special tokens of the prompt, which an instruction must not contain.
    """

    sizes: dict[str, tuple[int, int] | None]
    robot: Embodiment
    words: tuple[str, ...]

    def check(self, observations: Any, n_robots: int) -> dict[str, tuple[int, int]]:
        """Size (h, w) of each camera's images [px], if the observations are valid.

        Raises:
            ObservationError: What was expected, of which robot, and what came.
        """
        if not isinstance(observations, (list, tuple)):
            hint = "; put it in a list" * isinstance(observations, Mapping)
            raise ObservationError(f"expected a list with an observation of each robot, got {type(observations).__name__}{hint}")
        if len(observations) != n_robots:
            raise ObservationError(
                f"expected an observation of each of {n_robots} robots, got {len(observations)}; "
                f"begin with reset(n_robots={len(observations)})"
            )
        got = {}
        for i, observation in enumerate(observations):
            self._check_keys(observation, i)
            images = observation["images"]
            got |= {(i, camera): _image_size(images[camera], camera, i, size) for camera, size in self.sizes.items()}
            self._check_state(observation["state"], i)
            self._check_instruction(observation["instruction"], i)
        if None in self.sizes.values() and len(set(got.values())) > 1:
            named = {f"{camera} of robot {i}": size for (i, camera), size in got.items()}
            raise ObservationError(f"expected images of one size (h, w), as in training; got {named}; resize them alike")
        return {camera: got[0, camera] for camera in self.sizes}

    def check_sizes(self, sizes: Mapping[str, tuple[int, int]], what: str) -> None:
        """Refuse images of other sizes, camera -> (h, w) [px], than those of training.

        Raises:
            ObservationError: Both sizes.
        """
        for camera, expected in self.sizes.items():
            if expected not in (None, tuple(sizes[camera])):
                raise ObservationError(
                    f"{what} of {camera!r}: expected {expected} (h, w), as in training, got {tuple(sizes[camera])}; "
                    f"{_size_fix(expected)}"
                )

    def _check_keys(self, observation: Any, i: int) -> None:
        if not isinstance(observation, Mapping):
            raise ObservationError(f"robot {i}: expected an observation as a dict, got {type(observation).__name__}")
        missing = sorted({"images", "state", "instruction"} - set(observation))
        if missing:
            raise ObservationError(
                f"robot {i}: expected images, state and instruction in an observation; got {sorted(map(str, observation))}; "
                f"add {missing}"
            )
        images = observation["images"]
        if not isinstance(images, Mapping):
            raise ObservationError(f"robot {i}: expected images as a dict, camera -> image; got {type(images).__name__}")
        missing = [camera for camera in self.sizes if camera not in images]
        if missing:
            raise ObservationError(
                f"robot {i}: expected images of cameras {list(self.sizes)}, as in training; got {sorted(map(str, images))}; "
                f"add {missing}"
            )

    def _check_state(self, state: Any, i: int) -> None:
        spec, numbers = self.robot.spec, _array(state, "state", i)
        if numbers.shape != (len(spec.state_names),) or numbers.dtype.kind not in "fiu":
            raise ObservationError(
                f"robot {i}: expected a state of {len(spec.state_names)} numbers {list(spec.state_names)} ({spec.dataset}), got "
                f"shape {numbers.shape} of {numbers.dtype}; give the card's state, in its order"
            )
        if not np.isfinite(numbers).all():
            wrong = [name for name, is_finite in zip(spec.state_names, np.isfinite(numbers), strict=True) if not is_finite]
            raise ObservationError(
                f"robot {i}: expected a state of finite numbers, got {numbers.tolist()}; check the sensors of {', '.join(wrong)}"
            )

    def _check_instruction(self, instruction: Any, i: int) -> None:
        if not isinstance(instruction, str):
            raise ObservationError(
                f"robot {i}: expected an instruction as one text, got {type(instruction).__name__} {instruction!r}; give a str"
            )
        if instruction and (error := instruction_error(instruction)):
            raise ObservationError(f"robot {i}: expected an instruction in words, got {error}; '' stands for none at all")
        inside = [word for word in self.words if word in instruction]
        if inside:
            raise ObservationError(
                f"robot {i}: expected an instruction in words, got {instruction!r}; {inside} are special tokens of the "
                "prompt; leave them out"
            )

    def range_warning(self, observations: Sequence[Mapping[str, Any]]) -> str:
        """A warning about a state far outside the training range; empty if there is none."""
        stats, spec = self.robot.stats["observation.state"], self.robot.spec
        margin = FAR * np.maximum(stats.max - stats.min, MIN_RANGE)
        margin = np.where(np.array(spec.state_units) == "rad", FULL_TURN, margin)
        for i, observation in enumerate(observations):
            state = on_half_sphere(np.asarray(observation["state"], np.float64), spec.placed_state, stats.reference)
            beyond = np.flatnonzero((state < stats.min - margin) | (state > stats.max + margin))
            if len(beyond):
                at = int(beyond[0])
                return (
                    f"robot {i}: state {spec.state_names[at]!r} is {state[at]:.6g} [{spec.state_units[at]}], in training it was "
                    f"between {stats.min[at]:.6g} and {stats.max[at]:.6g}: is it in the card's unit?"
                )
        return ""


def _array(value: Any, key: str, i: int) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged rows; a tensor on a GPU, or with gradient
        raise ObservationError(f"robot {i}: expected {key!r} as a numpy array, got {type(value).__name__} ({error})") from error


def _image_size(value: Any, key: str, i: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width [px] of an image, refused unless it is (h, w, 3) uint8, of the size that was trained on."""
    image = _array(value, key, i)
    height, width = size or ("h", "w")
    is_right = image.ndim == 3 and image.shape[-1] == 3 and image.dtype == np.uint8 and image.size > 0
    if not is_right or (size is not None and image.shape[:2] != tuple(size)):
        raise ObservationError(
            f"robot {i}: expected {key!r} as ({height}, {width}, 3) uint8 RGB, as in training; got {image.shape} {image.dtype}; "
            f"{_image_fix(image, size)}"
        )
    return image.shape[0], image.shape[1]


def _image_fix(image: np.ndarray, size: tuple[int, int] | None) -> str:
    """The fix for an image of another kind."""
    if image.size == 0:
        return "check the camera: the image holds no pixel"
    if image.ndim == 4:
        return "give one image a camera, without an axis for batch or time"
    if image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[-1] not in (1, 3, 4):
        return "put channels last: image.transpose(1, 2, 0)"
    if image.ndim != 3 or image.shape[-1] == 1:
        return "give a colour image, as the policy saw in training"
    if image.shape[-1] != 3:
        return "keep the three colours alone: image[..., :3]"
    if image.dtype.kind == "f":
        top = float(image.max())
        if not math.isfinite(top) or top > 1:
            return "convert it where it is read: image.round().astype(np.uint8), if it runs from 0 to 255"
        return "images in [0, 1] are (255 * image).round().astype(np.uint8)"
    if image.dtype != np.uint8:
        return "give 8 bits a colour, from 0 to 255, as uint8"
    return _size_fix(size)


def _size_fix(size: tuple[int, int] | None) -> str:
    return f"resize or crop to {size}, as the recordings of training were made, or train at this size"
