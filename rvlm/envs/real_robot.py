"""A real robot as an environment: LeRobot's `Robot` behind the tabletop's interface, with limits, a stop and a judge.

What drives the tabletop (`rvlm.policy.policy.Policy`, `rvlm.evaluation.rollouts.rollout`) drives a robot unchanged, so the
protocol of real-robot evaluation (settings x tasks x rollouts) is the simulator's. LeRobot itself is never imported.

Source: RoboVLMs (arXiv 2412.14058), real-robot experiments; huggingface/lerobot, src/lerobot/robots/robot.py.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from scipy.spatial.transform import Rotation

from rvlm.data.actions import ARM_DIMS, ActionSpec, SpecMismatch
from rvlm.data.cards import IMAGE_KEYS

ROTATION_CODECS: dict[str, tuple[Callable, Callable]] = {  # of a rotation [rad] -> what reads three numbers, and what writes them
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


class HardwareEnv(gymnasium.Env):
    """A robot with LeRobot's interface, watched by an operator.

    The robot speaks the card's convention, and a pose key means the same read or sent: position [m] and rotation [rad, in the
    card's `state_rotation`] of the hand in the card's frame. The gripper's key is sent the card's `gripper_open` or
    `gripper_close`, and reads as the last number of the card's state.

    Observation: `image` and `wrist_image` (h, w, 3) uint8 RGB, those that the card has; `state` (7,) float32; `instruction`.
    Action: (7,) in the card's units. A displacement starts from the pose that was last observed; its rotation, Euler angles too,
    is one rotation about the axes of the card's frame (CALVIN adds Euler angles instead). Rotations are sent with angles in
    [-pi, pi]. A step is limited by the card's range alone: where that is wide, steps may be long. An absolute target
    may lie across the workspace.
    Reward 1.0 if the operator calls the episode a success. It ends at the time limit or where the operator stops it.

    Args:
        robot: Has `connect`, `disconnect`, `is_connected`, `get_observation`, `send_action`, `observation_features` and
            `action_features`, as `lerobot.robots.Robot`.
        spec: The robot's card.
        pose_keys: The robot's names of x, y, z [m] and of the three numbers of the rotation [rad].
        gripper_key: The robot's name of the gripper.
        cameras: The robot's names of `spec.cameras`, in their order.
        instructions: Task family -> what the robot is told.
        workspace_low, workspace_high: Box (3,) [m, the card's frame] that no target leaves.
        max_steps: Time limit [control steps].
        confirm: Asks the operator once, when an episode is over, whether it succeeded.
        is_stopped: Whether the operator wants the episode to end now; asked before each action is sent.
        is_dry_run: Whether actions are only computed, and none sent.
        sleep: Waits a duration [s].
        clock: Time [s].

    Raises:
        SpecMismatch: The card has a convention that can't be carried out here, with those that can.
        KeyError: The robot has no such key or camera, with those that it has.
        ValueError: Not a workspace, a time limit or an instruction, or cameras of different sizes.
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
        self._cameras = dict(zip((IMAGE_KEYS[c] for c in spec.cameras), cameras, strict=True))
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
        self._halt = "reset() was not called; call it, and it connects the robot"

    def _make_spaces(self) -> None:
        shapes = {camera: tuple(self.robot.observation_features[camera]) for camera in self._cameras.values()}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"expected cameras of one size, as a policy stacks their images; got {shapes}; set them up alike")
        self.image_shape, texts = next(iter(shapes.values())), self.instructions.values()
        spaces: dict[str, gymnasium.Space] = {
            **dict.fromkeys(self._cameras, gymnasium.spaces.Box(0, 255, self.image_shape, np.uint8)),
            "state": gymnasium.spaces.Box(-np.inf, np.inf, (len(self.keys),), np.float32),
            "instruction": gymnasium.spaces.Text(max(map(len, texts)), charset=frozenset("".join(texts))),
        }
        self.observation_space = gymnasium.spaces.Dict(spaces)
        low, high = (np.asarray(v, np.float32) for v in (self.action_spec.low, self.action_spec.high))
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start an episode where the arm and the scene are; nothing is sent. Connects the robot if it is not connected.

        Args:
            seed: Fixes which family is drawn where none is asked for; a real scene is the operator's to arrange.
            options: `family` chooses the task family; `keep_state` may be told, a real scene is kept in any case.

        Raises:
            KeyError: Unknown option or family, with those that exist.
        """
        super().reset(seed=seed)
        self._halt = "reset() did not finish; mend what it complained of, then call it again"
        options = dict(options or {})
        options.pop("keep_state", None)
        family = options.pop("family", None) or str(self.np_random.choice(list(self.instructions)))
        if options or family not in self.instructions:
            raise KeyError(
                f"expected options family, one of {', '.join(self.instructions)}, and keep_state; got {family!r} and "
                f"{sorted(options)}; add an instruction for it, or leave the option out"
            )
        if not self.robot.is_connected:
            self.robot.connect()
        self.family, self.n_steps = family, 0
        self._observation = self._observe()
        self._halt = ""
        return self._observation, {"family": family, "is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Carry out one action, or end the episode if the operator stopped it; lasts ``1 / rate_hz`` [s].

        The time that a policy takes comes on top; meanwhile the robot goes to, or stays at, its last target.

        Returns:
            As `Tabletop.step`. `info` also has "sent": key -> value, as the robot reports it or as it would have been sent,
            empty if the operator stopped; "was_clipped": the action lay outside the card's range; "was_limited": its target
            lay outside the workspace.

        Raises:
            RuntimeError: No episode runs.
            SpecMismatch: Not (7,) finite numbers. Nothing is sent, and the episode may go on.
        """
        if self._halt:
            raise RuntimeError(f"expected a running episode, got a step in none: {self._halt}")
        within = self._within_range(action)
        info = {"sent": {}, "was_clipped": not np.allclose(within, action), "was_limited": False}
        try:
            is_over = bool(self.is_stopped())
            if not is_over:
                info |= self._execute(within)
                is_over = self.n_steps >= self.max_steps
            if is_over:
                self._halt = "the episode is over; arrange the scene, then call reset()"
            is_success = is_over and bool(self.confirm(f"Did it succeed? {self.instructions[self.family]}"))
        except BaseException as error:  # a keyboard interrupt too
            self._halt = f"{error!r} stopped it; see to the robot and mend the cause, then call reset()"
            raise
        info |= {"family": self.family, "is_success": is_success}
        return self._observation, float(is_success), is_success, is_over, info

    def _within_range(self, action: np.ndarray) -> np.ndarray:
        spec, got = self.action_spec, np.asarray(action, np.float64)
        if got.shape != (spec.n_dims,) or not np.isfinite(got).all():
            raise SpecMismatch(
                f"expected {spec.n_dims} finite numbers {list(spec.names)} ({spec.dataset}), got {got.tolist()}; "
                "nothing was sent; see what the policy predicts before it goes on"
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
        """What to send for an action within range, and whether the workspace limited it."""
        spec, (low, high) = self.action_spec, self.workspace
        si = spec.to_si(action, *spec.names[:ARM_DIMS])
        pos, turn = si[:3], ROTATION_CODECS[spec.rotation][0](si[3:])
        read, write = ROTATION_CODECS[spec.state_rotation]
        if spec.is_delta:
            self._check_within_reach()
            pos, turn = self._pose[:3] + pos, turn * read(self._pose[3:ARM_DIMS])
        inside = np.clip(pos, low, high)
        gripper = spec.set_gripper(action, spec.is_open(action))[spec.gripper_index]
        values = map(float, (*inside, *write(turn), gripper))
        return dict(zip(self.keys, values, strict=True)), bool((inside != pos).any())

    def _check_within_reach(self) -> None:
        """So that no more than a step is ever needed to come back into the workspace."""
        spec, pos = self.action_spec, self._pose[:3]
        reach = spec.to_si(np.abs([spec.low, spec.high]).max(0), *spec.names[:3])
        if ((pos < self.workspace[0] - reach) | (pos > self.workspace[1] + reach)).any():
            raise RuntimeError(
                f"expected the hand in the workspace {self.workspace.tolist()} [m] or within a step of it, got {pos.tolist()}; "
                "nothing was sent; move the arm there by hand"
            )

    def _observe(self) -> dict[str, Any]:
        seen = self.robot.get_observation()
        self._pose = np.array([seen[key] for key in self.keys], np.float64)
        images = {name: np.array(seen[camera]) for name, camera in self._cameras.items()}
        kinds = {name: (image.shape, str(image.dtype)) for name, image in images.items()}
        if not np.isfinite(self._pose).all() or set(kinds.values()) != {(self.image_shape, "uint8")}:
            raise ValueError(
                f"expected finite numbers for {list(self.keys)} and images {self.image_shape} uint8; got {self._pose.tolist()} "
                f"and {kinds}; check the robot's sensors and cameras"
            )
        return {**images, "state": self._pose.astype(np.float32), "instruction": self.instructions[self.family]}

    def close(self) -> None:
        """Disconnect the robot; `reset` connects it again."""
        self._halt = "it was closed; call reset(), and it connects the robot"
        if self.robot.is_connected:
            self.robot.disconnect()


def _require_conventions(spec: ActionSpec) -> None:
    got = {name: getattr(spec, name) for name in SUPPORTED}
    wrong = [f"{name} {value!r} (works: {SUPPORTED[name]})" for name, value in got.items() if value not in SUPPORTED[name]]
    wrong += [f"camera {camera!r} (works: {tuple(IMAGE_KEYS)})" for camera in spec.cameras if camera not in IMAGE_KEYS]
    for name in ("units", "state_units"):
        units = getattr(spec, name)
        if units[:ARM_DIMS] != POSE_UNITS or len(units) != ARM_DIMS + 1:
            wrong.append(f"{name} {units} (works: {POSE_UNITS} and the gripper's)")
    if wrong:
        raise SpecMismatch(f"{spec.dataset} can't drive hardware: {'; '.join(wrong)}; convert data and card to what works")


def _require_keys(robot: Any, spec: ActionSpec, keys: tuple[str, ...], cameras: Sequence[str]) -> None:
    seen, taken = robot.observation_features, robot.action_features
    if not len(keys) == len(set(keys)) == spec.n_dims or not len(cameras) == len(set(cameras)) == len(spec.cameras):
        raise KeyError(
            f"expected {ARM_DIMS} pose keys, the gripper's, and a camera for each of {list(spec.cameras)}, none twice; got "
            f"{list(keys)} and {list(cameras)}; the robot has {list(seen)}"
        )
    numbers = [key for key, feature in seen.items() if key in taken and not isinstance(feature, tuple)]
    images = [key for key, feature in seen.items() if isinstance(feature, tuple) and len(feature) == 3]
    for kind, wanted, have in (("number that is read and sent", keys, numbers), ("camera", cameras, images)):
        missing = [key for key in wanted if key not in have]
        if missing:
            raise KeyError(f"the robot has no {kind} called {missing}; it has {have}; name one of these, or add it to the robot")
