"""The tabletop as a `gymnasium.Env`: camera images, proprioception and an instruction in, actions out."""

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import mujoco
import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.envs.spaces import action_space, observation_space
from rvlm.envs.tabletop.experts import expert_delta
from rvlm.envs.tabletop.failures import FailureClassifier
from rvlm.envs.tabletop.joint_control import expert_joint_action, is_joint_space, joint_state, move_joints
from rvlm.envs.tabletop.rendering import CameraRenderer, height_and_width
from rvlm.envs.tabletop.robosuite_arms import ROBOTS
from rvlm.envs.tabletop.scene import SETTINGS, Setting
from rvlm.envs.tabletop.success_conditions import Task
from rvlm.envs.tabletop.task_sampling import is_feasible, sample_task
from rvlm.envs.tabletop.tasks import ALL_FAMILIES, DEFAULT_TASKS, MEMORY_FAMILIES, TASK_FAMILIES
from rvlm.envs.tabletop.world import World

CAMERAS = ("static", "wrist")


class Tabletop(gymnasium.Env):
    """A language-conditioned tabletop with a simulated arm.

    Observation: `images`, (h, w, 3) uint8 RGB of each of `CAMERAS`; `state` (s,) float32 as in the data card; `instruction`.
    Action: (a,) in the data card's units, frame, range and gripper sign (`action_spec`): a step of the hand, or joint targets.
    Reward 1.0 at success, which terminates the episode; truncation after `max_steps`.

    Args:
        robot: One of `ROBOTS`.
        image_size: Height and width of both images, or the side of square ones [px]; 96 if left out.
        families: Task families to sample from; those of `DEFAULT_TASKS` within the arm's reach if left out.
        setting: Name in `SETTINGS`, or a `Setting`.
        max_steps: Time limit [control steps]; None for none.

    Raises:
        KeyError: Unknown robot, family or setting, with those that exist.

    Example:
        >>> env = rvlm.Tabletop("ur6")
        >>> observation, info = env.reset(seed=900_000, options={"task": "lift"})
        >>> observation["images"]["static"].shape, info["is_success"]
        ((96, 96, 3), False)
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        robot: str = "franka7",
        image_size: int | Sequence[int] | None = None,
        families: tuple[str, ...] = (),
        setting: str | Setting = "simple",
        max_steps: int | None = 60,
        render_mode: str = "rgb_array",
    ) -> None:
        self.render_mode, self.robot, self.max_steps = render_mode, robot, max_steps
        self.setting = setting if isinstance(setting, Setting) else SETTINGS[_known(setting, SETTINGS, "setting")]
        self.action_spec = ActionSpec.from_card(f"tabletop_{_known(robot, ROBOTS, 'robot')}")
        self.world = World(robot, self.setting)
        self.in_reach = self.world.arm.workspace.families or tuple(ALL_FAMILIES)
        families = tuple(families) or tuple(name for name in DEFAULT_TASKS if name in self.in_reach)
        self.families = tuple(_known(f, self.in_reach, "task family") for f in families)
        self._renderer = CameraRenderer(self.world.model, self.world.data, CAMERAS)
        self.image_size = 96 if image_size is None else image_size
        self.metadata = {**self.metadata, "render_fps": self.action_spec.rate_hz}
        shape = (*height_and_width(self.image_size), 3)
        self.observation_space = observation_space(self.action_spec, dict.fromkeys(CAMERAS, shape))
        self.action_space = action_space(self.action_spec)
        self.task: Task

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start an episode.

        Args:
            seed: Fixes the scene, the task and the start pose.
            options: `task` chooses the task family; `keep_state` keeps the present scene (chains).
        """
        super().reset(seed=seed)
        options = dict(options or {})
        family, keep_state = options.pop("task", None), options.pop("keep_state", False)
        options.pop("reset_mask", None)  # gymnasium's vector environments pass it on
        if options:
            raise KeyError(f"unknown reset options {sorted(options)}; there are task, keep_state")
        family = _known(family or str(self.np_random.choice(self.families)), self.in_reach, "task family")
        if keep_state and not self.world.objects:
            raise ValueError("expected a scene to keep, got a new environment; reset it once without keep_state")
        if keep_state and not is_feasible(self.world, family):
            raise ValueError(f"{family!r} is not feasible in this state; feasible are: {', '.join(self.feasible())}")
        if not keep_state:
            self.world.randomize(self.np_random)
            ALL_FAMILIES[family].prepare(self.world)
            mujoco.mj_forward(self.world.model, self.world.data)
        self.world.begin_task(has_cue=family in MEMORY_FAMILIES)
        self.task, self.n_steps = sample_task(self.world, family, self.np_random), 0
        self._failure_classifier = FailureClassifier(self.world, self.task)
        return self._observe(), {"task": family, "is_success": False}

    def feasible(self) -> list[str]:
        """Task families that are feasible in the present state, without the memory families."""
        return [name for name in TASK_FAMILIES if is_feasible(self.world, name)]

    def other_instruction(self, family: str) -> str:
        """An instruction of another family that is wrong in every scene, for an ablation of the instruction."""
        words = set(family.split("_"))
        other = next(other for name, other in TASK_FAMILIES.items() if other.n_objects == 0 and not words & set(name.split("_")))
        return other.templates[0]

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Execute one action; values outside the card's range are clipped, as a robot's controller does.

        While a memory task shows its cue, arm and gripper are held still, so that a policy cannot encode the cue in its pose.
        """
        spec = self.action_spec
        action = np.clip(np.asarray(action, np.float64), spec.low, spec.high)
        if self.world.is_cue_shown:
            self.world.hold(1 / spec.rate_hz)
        elif is_joint_space(spec):
            move_joints(self.world, spec, action)
        else:
            si = spec.to_si(action, *spec.names[:6])
            self.world.move(si[:3], si[3:], bool(spec.is_open(action)[0]), 1 / spec.rate_hz)
        self.n_steps += 1
        ALL_FAMILIES[self.task.family].step_scene(self.world, self.n_steps)
        is_success = ALL_FAMILIES[self.task.family].is_done(self.world, self.task)
        self._failure_classifier.update(self.world)
        failure = "" if is_success else self._failure_classifier.failure(self.world)  # if the episode ended here
        info = {"task": self.task.family, "is_success": is_success, "failure": failure}
        return self._observe(), float(is_success), is_success, self.max_steps is not None and self.n_steps >= self.max_steps, info

    def expert_action(self) -> np.ndarray:
        """The scripted expert's raw action (a,) float32 in the present state."""
        if is_joint_space(self.action_spec):
            return expert_joint_action(self.world, self.task, self.action_spec)
        shift, turn, is_open = expert_delta(self.world, self.task)
        spec = self.action_spec
        arm = np.concatenate([shift, turn]) / np.asarray(spec.scale[:6])
        action = np.clip(np.concatenate([arm, [0.0]]), spec.low, spec.high)
        return spec.set_grippers(action, is_open).astype(np.float32)

    def image(self, camera: str = "static", size: int | Sequence[int] | None = None) -> np.ndarray:
        """RGB image (h, w, 3) uint8 from a camera."""
        return self._renderer.image(camera, size or self.image_size)

    def render(self) -> np.ndarray:
        """The static camera at 256 px."""
        return self.image("static", 256)

    def _observe(self) -> dict[str, Any]:
        images = {camera: self.image(camera) for camera in CAMERAS}
        return {"images": images, "state": self._state(), "instruction": self.task.instruction}

    def _state(self) -> np.ndarray:
        spec = self.action_spec
        return joint_state(self.world.controller, spec) if is_joint_space(spec) else self.world.state()

    def close(self) -> None:
        """Free the renderers; the environment makes new ones if it is used again."""
        self._renderer.close()


def _known(name: str, table: Any, kind: str) -> str:
    if name not in table:
        raise KeyError(f"no {kind} {name!r}; there are {', '.join(table)}")
    return name
