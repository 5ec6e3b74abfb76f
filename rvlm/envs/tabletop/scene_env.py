"""A scene with a language instruction as a `gymnasium.Env`; subclasses define its model, control, tasks and expert."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import mujoco
import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.envs.spaces import action_space, observation_space
from rvlm.envs.tabletop.rendering import CameraRenderer, height_and_width


@dataclass(frozen=True)
class Wordings:
    """Instructions of a task: in training, and held out for evaluation."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


class SceneEnv(gymnasium.Env, abc.ABC):
    """A language-conditioned scene.

    Observation: `images`, (h, w, 3) uint8 RGB of each camera of the card; `state` (s,) float32; `instruction`.
    Action: (a,) in the card's units, frames and ranges (`action_spec`). Reward 1.0 at success, which terminates the episode.

    Class attributes:
        card: Name of the data card.
        wordings: Task -> its instructions.
        noise_scale: (a,) As of `Suite`.
        time_limit: Of its suite [control steps]; the environment itself never truncates an episode.

    Args:
        xml: The scene as MJCF text, with the card's cameras.
        image_size: Height and width of all images, or the side of square ones [px]; None for 96.
        paraphrase: Instructions in held-out wordings.
    """

    card: ClassVar[str]
    wordings: ClassVar[Mapping[str, Wordings]]
    noise_scale: ClassVar[tuple[float, ...]]
    time_limit: ClassVar[int]
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(self, xml: str, image_size: int | Sequence[int] | None, paraphrase: bool) -> None:
        self.render_mode, self.image_size, self.paraphrase = "rgb_array", 96 if image_size is None else image_size, paraphrase
        self.action_spec = spec = ActionSpec.from_card(self.card)
        self.metadata = {**self.metadata, "render_fps": spec.rate_hz}
        self.model = mujoco.MjModel.from_xml_string(xml)
        self.data = mujoco.MjData(self.model)
        self._renderer = CameraRenderer(self.model, self.data, spec.cameras)
        shape = (*height_and_width(self.image_size), 3)
        self.observation_space = observation_space(spec, dict.fromkeys(spec.cameras, shape))
        self.action_space = action_space(spec)
        self.task = self.instruction = ""

    @abc.abstractmethod
    def randomize(self, rng: np.random.Generator) -> None:
        """Sample the scene for `task`: objects, appearance and the robot's start."""

    @abc.abstractmethod
    def control(self, action: np.ndarray) -> None:
        """Execute a raw action (a,), within its range, for one control period."""

    @abc.abstractmethod
    def state(self) -> np.ndarray:
        """Proprioception (s,) float32 as in the card."""

    @abc.abstractmethod
    def is_done(self) -> bool:
        """Whether the task succeeded, from the true state."""

    @abc.abstractmethod
    def failure(self) -> str:
        """The kind of failure, if the episode ended now without success."""

    @abc.abstractmethod
    def expert_action(self) -> np.ndarray:
        """The scripted expert's raw action (a,) float32, from the true state alone."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start an episode.

        Args:
            seed: Fixes the scene, the task and the start.
            options: `task` chooses the task.

        Raises:
            KeyError: An unknown option or task, with those that exist.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        task = options.pop("task", None) or str(self.np_random.choice(list(self.wordings)))
        options.pop("reset_mask", None)  # gymnasium's vector environments pass it on
        if options:
            raise KeyError(f"unknown reset options {sorted(options)}; there is task")
        if task not in self.wordings:
            raise KeyError(f"no task {task!r}; there are {', '.join(self.wordings)}")
        wordings = self.wordings[task]
        self.task, self.n_steps = task, 0
        self.instruction = str(self.np_random.choice(wordings.held_out if self.paraphrase else wordings.training))
        mujoco.mj_resetData(self.model, self.data)
        self.randomize(self.np_random)
        return self._observe(), {"task": task, "is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Execute one action; values outside the card's range are clipped, as a robot's controller does."""
        self.control(np.clip(np.asarray(action, np.float64), self.action_space.low, self.action_space.high))
        self.n_steps += 1
        is_success = self.is_done()
        info = {"task": self.task, "is_success": is_success, "failure": "" if is_success else self.failure()}
        return self._observe(), float(is_success), is_success, False, info

    def other_instruction(self, task: str) -> str:
        """An instruction of another task, for an ablation of the instruction."""
        return next(wordings.training[0] for name, wordings in self.wordings.items() if name != task)

    def image(self, camera: str | None = None, size: int | Sequence[int] | None = None) -> np.ndarray:
        """RGB image (h, w, 3) uint8 from a camera, the card's first if none is named."""
        return self._renderer.image(camera or self.action_spec.cameras[0], size or self.image_size)

    def render(self) -> np.ndarray:
        """The first camera at 256 px."""
        return self.image(size=256)

    def _observe(self) -> dict[str, Any]:
        images = {camera: self.image(camera) for camera in self.action_spec.cameras}
        return {"images": images, "state": self.state(), "instruction": self.instruction}

    def close(self) -> None:
        """Free the renderers; the environment makes new ones if it is used again."""
        self._renderer.close()
