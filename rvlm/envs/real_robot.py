"""A real robot as an environment: LeRobot's `Robot` with the tabletop's interface, safety limits, a stop and a success label.

Policies and rollouts (`rvlm.policy.policy.Policy`, `rvlm.evaluation.rollouts.rollout`) run on it unchanged, so the protocol of
real-robot evaluation (settings x tasks x rollouts) is the simulator's. LeRobot itself is never imported.

Source: RoboVLMs (arXiv 2412.14058), real-robot experiments; huggingface/lerobot, src/lerobot/robots/robot.py.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from scipy.spatial.transform import Rotation

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch

ARM_DIMS = 6
ROTATION_CODECS: dict[str, tuple[Callable, Callable]] = {  # layout [rad] -> (decoder, encoder)
    "axis_angle": (Rotation.from_rotvec, Rotation.as_rotvec),
    "euler_xyz": (partial(Rotation.from_euler, "xyz"), partial(Rotation.as_euler, seq="xyz")),  # about fixed axes, x first
}
SUPPORTED: dict[str, tuple] = {
    "frame": ("world", "base"),
    "rotation": tuple(ROTATION_CODECS),
    "state_rotation": tuple(ROTATION_CODECS),
    "image_rotation_deg": (0.0,),
}
POSE_UNITS = ("m", "m", "m", "rad", "rad", "rad")


class RealRobotEnv(gymnasium.Env):
    """A robot with LeRobot's interface, supervised by an operator.

    The robot interface uses the data card's convention, for reading and sending alike: pose keys hold position [m] and rotation
    [rad, in the card's `state_rotation`] of the hand in the card's frame. The gripper's key is sent the card's `gripper_open` or
    `gripper_close`, and read as the last number of the card's state.

    Observation: `images`, (h, w, 3) uint8 RGB of each camera in the card; `state` (7,) float32; `instruction`.
    Action: (7,) in the card's units. A displacement is relative to the last observed pose; its rotation, also from Euler angles,
    is one rotation about the axes of the card's frame (CALVIN adds Euler angles instead). Rotations are sent with angles in
    [-pi, pi]. Only the card's range limits a step: with a wide range steps may be long, and an absolute target may be anywhere in
    the workspace.
    Reward 1.0 if the operator confirms success. The episode ends at the time limit or when the operator stops it.

    Args:
        robot: Has `connect`, `disconnect`, `is_connected`, `get_observation`, `send_action`, `observation_features` and
            `action_features`, as `lerobot.robots.Robot`.
        spec: The robot's card.
        pose_keys: The robot's names of x, y, z [m] and of the three numbers of the rotation [rad].
        gripper_key: The robot's name of the gripper.
        cameras: The robot's names of `spec.cameras`, in their order.
        instructions: Task -> instruction.
        workspace_low, workspace_high: Box (3,) [m, the card's frame] to which targets are clipped.
        max_steps: Time limit [control steps].
        confirm: Asks the operator at the end of an episode whether it succeeded.
        is_stopped: Whether the operator stops the episode; called before each action is sent.
        is_dry_run: Whether to compute actions without sending them.
        sleep: Waits a duration [s].
        clock: Time [s].

    Raises:
        SpecMismatch: The card has an unsupported convention.
        KeyError: The robot has no such key or camera.
        ValueError: Invalid workspace, time limit or instructions, or cameras of different sizes.
    """

    def __init__(
        self,
        robot: Any,
        spec: ActionSpec,
        pose_keys: Sequence[str],
        gripper_key: str,
        cameras: Sequence[str],
        instructions: dict[str, str],
        workspace_low: np.ndarray | Sequence[float],
        workspace_high: np.ndarray | Sequence[float],
        max_steps: int,
        confirm: Callable[[str], bool],
        is_stopped: Callable[[], bool],
        is_dry_run: bool = True,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        _require_conventions(spec)
        self.robot, self.action_spec, self.keys = robot, spec, (*pose_keys, gripper_key)
        _require_keys(robot, spec, self.keys, cameras)
        self._cameras = dict(zip(spec.cameras, cameras, strict=True))
        self.instructions, self.max_steps, self.is_dry_run = dict(instructions), max_steps, is_dry_run
        self.confirm, self.is_stopped, self.sleep, self.clock = confirm, is_stopped, sleep, clock
        low, high = (np.asarray(v, np.float64) for v in (workspace_low, workspace_high))
        is_box = low.shape == high.shape == (3,) and np.isfinite([low, high]).all() and (low < high).all()
        if not is_box or max_steps < 1 or not instructions:
            raise ValueError(
                "expected a finite workspace (3,) with low below high [m], max_steps of at least 1, and an instruction; "
                f"got {workspace_low} to {workspace_high}, {max_steps}, and {len(instructions)} instructions"
            )
        self.workspace = np.stack([low, high])
        self._make_spaces()
        self._stop_reason = "reset() was not called; call it, and it connects the robot"

    def _make_spaces(self) -> None:
        shapes = {camera: tuple(self.robot.observation_features[camera]) for camera in self._cameras.values()}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"expected cameras of one size, as a policy stacks their images; got {shapes}; set them up alike")
        self.image_shape, texts = next(iter(shapes.values())), self.instructions.values()
        spaces: dict[str, gymnasium.Space] = {
            "images": gymnasium.spaces.Dict(
                dict.fromkeys(self._cameras, gymnasium.spaces.Box(0, 255, self.image_shape, np.uint8))
            ),
            "state": gymnasium.spaces.Box(-np.inf, np.inf, (len(self.keys),), np.float32),
            "instruction": gymnasium.spaces.Text(max(map(len, texts)), charset=frozenset("".join(texts))),
        }
        self.observation_space = gymnasium.spaces.Dict(spaces)
        low, high = (np.asarray(v, np.float32) for v in (self.action_spec.low, self.action_spec.high))
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start an episode from the present arm pose and scene; nothing is sent. Connects the robot if necessary.

        Args:
            seed: Samples the task if none is given; the operator arranges the scene.
            options: `task` chooses the task; `keep_state` is accepted and ignored.

        Raises:
            KeyError: Unknown option or task, with those that exist.
        """
        super().reset(seed=seed)
        self._stop_reason = "reset() did not finish; fix the error, then call it again"
        options = dict(options or {})
        options.pop("keep_state", None)
        task = options.pop("task", None) or str(self.np_random.choice(list(self.instructions)))
        if options or task not in self.instructions:
            raise KeyError(
                f"expected options task, one of {', '.join(self.instructions)}, and keep_state; got {task!r} and "
                f"{sorted(options)}; add an instruction for it, or leave the option out"
            )
        if not self.robot.is_connected:
            self.robot.connect()
        self.task, self.n_steps = task, 0
        self._observation = self._observe()
        self._stop_reason = ""
        return self._observation, {"task": task, "is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Execute one action, or end the episode if the operator stopped it; lasts ``1 / rate_hz`` [s].

        The policy's inference time is added; meanwhile the robot moves to, or holds, its last target.

        Returns:
            As `Tabletop.step`. `info` also has "sent": key -> value, as reported by the robot or as it would have been sent,
            empty if the operator stopped; "was_clipped": the action was outside the card's range; "was_limited": its target
            was outside the workspace.

        Raises:
            RuntimeError: No episode is running.
            SpecMismatch: Not (7,) finite numbers. Nothing is sent, and the episode may continue.
        """
        if self._stop_reason:
            raise RuntimeError(f"expected a running episode, got a step in none: {self._stop_reason}")
        within = self._within_range(action)
        info = {"sent": {}, "was_clipped": not np.allclose(within, action), "was_limited": False}
        try:
            is_over = bool(self.is_stopped())
            if not is_over:
                info |= self._execute(within)
                is_over = self.n_steps >= self.max_steps
            if is_over:
                self._stop_reason = "the episode is over; arrange the scene, then call reset()"
            is_success = is_over and bool(self.confirm(f"Did it succeed? {self.instructions[self.task]}"))
        except BaseException as error:  # a keyboard interrupt too
            self._stop_reason = f"{error!r} stopped it; check the robot and fix the cause, then call reset()"
            raise
        info |= {"task": self.task, "is_success": is_success}
        return self._observation, float(is_success), is_success, is_over, info

    def _within_range(self, action: np.ndarray) -> np.ndarray:
        spec, got = self.action_spec, np.asarray(action, np.float64)
        if got.shape != (spec.n_dims,) or not np.isfinite(got).all():
            raise SpecMismatch(
                f"expected {spec.n_dims} finite numbers {list(spec.names)} ({spec.dataset}), got {got.tolist()}; "
                "nothing was sent; check what the policy predicts"
            )
        return np.clip(got, spec.low, spec.high)

    def _execute(self, action: np.ndarray) -> dict[str, Any]:
        started = self.clock()
        if not self.robot.is_connected:
            raise ConnectionError("expected a connected robot, got one that is not; check power and cables")
        target, was_limited = self._target(action)
        sent = target if self.is_dry_run else self.robot.send_action(target)
        self.sleep(max(0.0, started + 1 / self.action_spec.rate_hz - self.clock()))
        self._observation = self._observe()
        self.n_steps += 1
        return {"sent": sent, "was_limited": was_limited}

    def _target(self, action: np.ndarray) -> tuple[dict[str, float], bool]:
        """Robot command of an action within range, and whether the workspace limited it."""
        spec, (low, high) = self.action_spec, self.workspace
        si = spec.to_si(action, *spec.names[:ARM_DIMS])
        pos, rotation = si[:3], ROTATION_CODECS[spec.rotation][0](si[3:])
        decode, encode = ROTATION_CODECS[spec.state_rotation]
        if spec.is_delta:
            self._check_within_reach()
            pos, rotation = self._pose[:3] + pos, rotation * decode(self._pose[3:ARM_DIMS])
        clipped = np.clip(pos, low, high)
        gripper = spec.set_grippers(action, spec.is_open(action))[spec.gripper_index]
        values = map(float, (*clipped, *encode(rotation), gripper))
        return dict(zip(self.keys, values, strict=True)), bool((clipped != pos).any())

    def _check_within_reach(self) -> None:
        """Raise if the hand is more than one step outside the workspace."""
        spec, pos = self.action_spec, self._pose[:3]
        reach = spec.to_si(np.abs([spec.low, spec.high]).max(0), *spec.names[:3])
        if ((pos < self.workspace[0] - reach) | (pos > self.workspace[1] + reach)).any():
            raise RuntimeError(
                f"expected the hand in the workspace {self.workspace.tolist()} [m] or within a step of it, got {pos.tolist()}; "
                "nothing was sent; move the arm there by hand"
            )

    def _observe(self) -> dict[str, Any]:
        observation = self.robot.get_observation()
        self._pose = np.array([observation[key] for key in self.keys], np.float64)
        images = {name: np.array(observation[camera]) for name, camera in self._cameras.items()}
        formats = {name: (image.shape, str(image.dtype)) for name, image in images.items()}
        if not np.isfinite(self._pose).all() or set(formats.values()) != {(self.image_shape, "uint8")}:
            raise ValueError(
                f"expected finite numbers for {list(self.keys)} and images {self.image_shape} uint8; got {self._pose.tolist()} "
                f"and {formats}; check the robot's sensors and cameras"
            )
        return {"images": images, "state": self._pose.astype(np.float32), "instruction": self.instructions[self.task]}

    def close(self) -> None:
        """Disconnect the robot; `reset` connects it again."""
        self._stop_reason = "it was closed; call reset(), and it connects the robot"
        if self.robot.is_connected:
            self.robot.disconnect()


def _require_conventions(spec: ActionSpec) -> None:
    got = {name: getattr(spec, name) for name in SUPPORTED}
    wrong = [f"{name} {value!r} (works: {SUPPORTED[name]})" for name, value in got.items() if value not in SUPPORTED[name]]
    for name in ("units", "state_units"):
        units = getattr(spec, name)
        if units[:ARM_DIMS] != POSE_UNITS or len(units) != ARM_DIMS + 1:
            wrong.append(f"{name} {units} (works: {POSE_UNITS} and the gripper's)")
    if wrong:
        raise SpecMismatch(f"{spec.dataset} can't drive hardware: {'; '.join(wrong)}; convert data and card to what works")


def _require_keys(robot: Any, spec: ActionSpec, keys: tuple[str, ...], cameras: Sequence[str]) -> None:
    observed, commanded = robot.observation_features, robot.action_features
    if not len(keys) == len(set(keys)) == spec.n_dims or not len(cameras) == len(set(cameras)) == len(spec.cameras):
        raise KeyError(
            f"expected {ARM_DIMS} pose keys, the gripper's, and a camera for each of {list(spec.cameras)}, none twice; got "
            f"{list(keys)} and {list(cameras)}; the robot has {list(observed)}"
        )
    numbers = [key for key, feature in observed.items() if key in commanded and not isinstance(feature, tuple)]
    images = [key for key, feature in observed.items() if isinstance(feature, tuple) and len(feature) == 3]
    for kind, required, available in (("number that is read and sent", keys, numbers), ("camera", cameras, images)):
        missing = [key for key in required if key not in available]
        if missing:
            raise KeyError(
                f"the robot has no {kind} called {missing}; it has {available}; name one of these, or add it to the robot"
            )
