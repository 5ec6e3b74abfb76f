"""A real robot as an environment: LeRobot's `Robot` behind limits, a deadline clock, a stop and a success label.

Policies and rollouts (`rvlm.policy.policy.Policy`, `rvlm.policy.real_time_policy.RealTimePolicy`,
`rvlm.evaluation.rollouts.rollout`) run on it unchanged, so the protocol of real-robot evaluation (settings x tasks x rollouts) is
the simulator's. LeRobot itself is never imported.

Source: RoboVLMs (arXiv 2412.14058), real-robot experiments; huggingface/lerobot, src/lerobot/robots/robot.py.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import gymnasium
import numpy as np

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.data.rotations import in_turn
from rvlm.envs.deadline_clock import DeadlineClock
from rvlm.envs.group_commands import GroupLimits
from rvlm.envs.robot_commands import RobotCommands, robot_names
from rvlm.envs.spaces import action_space, observation_space
from rvlm.envs.stored_images import require_half_turns, turned_as_stored

NEXT_EPISODE = "the episode is over; arrange the scene, then call reset()"


class HardwareEnv(gymnasium.Env):
    """A robot with LeRobot's interface, supervised by an operator: one arm or two, poses or joints, with grippers or without.

    The robot tells and takes values in the card's units, under the card's names or these with ".pos", as LeRobot's arms do:
    `shoulder_pan` of a card is `shoulder_pan.pos` of an SO-101, in degrees or from -100 to 100 as it was calibrated; `keys` names
    others. A displacement is added to the pose or the joints that were observed last; rotations add up as rotations. Everything
    that is sent is a target, within the limits of its group; to hold, the robot is sent where it is, and velocities 0.

    Observation: `images`, (h, w, 3) uint8 RGB of each camera in the card, of any sizes, turned as the recording's;
    `state` (s,) float32; `instruction`.
    Action: (a,) raw, in the card's range.
    Reward 1.0 if the operator confirms success. The episode ends at the time limit, when the operator stops it, or when more than
    `max_missed` deadlines in a row were missed. The robot is held at its end, before the operator is asked, and on every error.

    A control step lasts `1 / rate_hz` from one observation to the next, the policy's inference included (`DeadlineClock`).

    Args:
        robot: Has `connect`, `disconnect`, `is_connected`, `get_observation`, `send_action`, `observation_features` and
            `action_features`, as `lerobot.robots.Robot`.
        spec: The robot's card.
        instructions: Task -> instruction.
        limits: Of each action group of the card, in its order.
        max_steps: Time limit [control steps].
        confirm: Asks the operator at the end of an episode whether it succeeded.
        is_stopped: Whether the operator stops the episode; called before each action is sent.
        keys: Dimension of the card -> the robot's name; only those with other names.
        cameras: Camera of the card -> the robot's name; likewise.
        is_dry_run: Whether to compute actions without sending them.
        max_missed: Deadlines in a row.
        sleep: Waits a duration [s].
        clock: Time [s].

    Raises:
        SpecMismatch: The card has an unsupported convention, or a limit that safety needs is missing.
        KeyError: The robot has no such number or camera.
        ValueError: Invalid limits, time limit or instructions.
    """

    def __init__(
        self,
        robot: Any,
        spec: ActionSpec,
        instructions: Mapping[str, str],
        limits: Sequence[GroupLimits],
        max_steps: int,
        confirm: Callable[[str], bool],
        is_stopped: Callable[[], bool],
        *,
        keys: Mapping[str, str] | None = None,
        cameras: Mapping[str, str] | None = None,
        is_dry_run: bool = True,
        max_missed: int = 5,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not isinstance(max_steps, int | np.integer) or max_steps < 1 or not instructions:
            raise ValueError(
                f"expected max_steps of at least 1, a whole number, and an instruction, got {max_steps} and {dict(instructions)}"
            )
        self.robot, self.action_spec, self.instructions, self.max_steps = robot, spec, dict(instructions), max_steps
        self.commands = RobotCommands(spec, dict(keys or {}), limits, robot)
        observed = [key for key, feature in robot.observation_features.items() if not isinstance(feature, tuple)]
        self._state_keys = robot_names(spec.state_names, dict(keys or {}), observed)
        self._cameras = _camera_names(robot, spec, dict(cameras or {}))
        self.confirm, self.is_stopped, self.is_dry_run, self.max_missed = confirm, is_stopped, is_dry_run, max_missed
        self.deadlines, self._clock = DeadlineClock(spec.rate_hz, sleep, clock), clock
        self._make_spaces()
        self._is_moving = False  # whether an action was sent since it was held
        self._stop_reason = "reset() was not called; call it, and it connects the robot"

    def _make_spaces(self) -> None:
        shapes = _camera_shapes(self.robot, self._cameras)
        self.observation_space = observation_space(self.action_spec, shapes, self.instructions.values())
        self.action_space = action_space(self.action_spec)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start an episode from where the robot is; nothing is sent but the hold of an episode that runs. Connects the robot.

        Args:
            seed: Samples the task if none is given; the operator arranges the scene.
            options: `task` chooses the task.

        Raises:
            KeyError: Unknown option or task, with those that exist.
        """
        super().reset(seed=seed)
        self._stop_reason = "reset() did not finish; fix the error, then call it again"
        options = dict(options or {})
        task = options.pop("task", None) or str(self.np_random.choice(list(self.instructions)))
        if options or task not in self.instructions:
            raise KeyError(
                f"expected the option task, one of {', '.join(self.instructions)}; got {task!r} and {sorted(options)}; add an "
                "instruction for it, or leave the option out"
            )
        if not self.robot.is_connected:
            self.robot.connect()
        if self._is_moving:
            self._send_hold()
        self.task, self.n_steps = task, 0
        self._observation = self._observe()
        self.commands.start()
        self.deadlines.start()
        self._stop_reason = ""
        return self._observation, {"task": task, "is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Send one action and wait for the end of the control step, or hold the robot and end the episode.

        Returns:
            As every environment's. `info` also has "sent": the robot's name -> value, as it reports or as would have been sent;
            "was_clipped": the action was outside the card's range; "was_limited": its target was outside the limits;
            "n_missed": deadlines missed since the episode began; "failure", if the robot was held: why.

        Raises:
            RuntimeError: No episode is running, or the robot is more than a step outside the limits.
            SpecMismatch: Not (a,) finite numbers. Nothing is sent, and the episode may continue.
        """
        if self._stop_reason:
            raise RuntimeError(f"expected a running episode, got a step in none: {self._stop_reason}")
        within, was_clipped = self._within_range(action)
        info = {"sent": {}, "was_clipped": was_clipped, "was_limited": False}
        try:
            failure = self._reason_to_hold()
            info |= {**self._send_hold(), "failure": failure} if failure else self._execute(within)
            is_over = bool(failure) or self.n_steps >= self.max_steps
            if is_over:
                self._stop_reason = NEXT_EPISODE
                if self._is_moving:
                    self._send_hold()
            is_success = is_over and bool(self.confirm(f"Did it succeed? {self.instructions[self.task]}"))
        except BaseException as error:  # a keyboard interrupt too
            self._stop_reason = f"{error!r} stopped it; check the robot and fix the cause, then call reset()"
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._send_hold()
            raise
        info |= {"task": self.task, "is_success": is_success, "n_missed": self.deadlines.n_missed}
        return self._observation, float(is_success), is_success, is_over, info

    def _within_range(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        spec, got = self.action_spec, np.array(action, np.float64)
        if got.shape != (spec.n_dims,) or not np.isfinite(got).all():
            raise SpecMismatch(
                f"expected {spec.n_dims} finite numbers {list(spec.names)} ({spec.dataset}), got {got.tolist()}; "
                "nothing was sent; check what the policy predicts"
            )
        for at, group in spec.placed_action:
            turned = slice(at.start + group.n_position, at.stop)
            got[turned] = in_turn(got[turned], group)
        within = np.clip(got, spec.low, spec.high)
        return within, not np.allclose(within, got)

    def _reason_to_hold(self) -> str:
        if self.is_stopped():
            return "stopped by the operator"
        late = self.deadlines
        return f"missed {late.n_missed_in_a_row} deadlines in a row" if late.n_missed_in_a_row > self.max_missed else ""

    def _execute(self, action: np.ndarray) -> dict[str, Any]:
        if not self.robot.is_connected:
            raise ConnectionError("expected a connected robot, got one that is not; check power and cables")
        started = self._clock()
        target, was_limited = self.commands.target(action)
        self._is_moving = True
        sent = self._send(target)
        robot_s, n_missed = self._reading_s + self._clock() - started, self.deadlines.n_missed
        self.deadlines.wait()
        if n_missed == 0 < self.deadlines.n_missed:
            warnings.warn(self._too_late(robot_s), stacklevel=3)
        self._observation = self._observe()
        self.n_steps += 1
        return {"sent": sent, "was_limited": was_limited}

    def _too_late(self, robot_s: float) -> str:
        """The first missed deadline in words, where the robot alone, without a policy, took `robot_s` of the step [s]."""
        late = self.deadlines
        mend = "act with RealTimePolicy, which does not wait for the network"
        if robot_s > late.period_s:
            mend = (
                f"the robot alone took {robot_s:.3f} s, {self._reading_s:.3f} s of it get_observation, whatever the policy: give "
                f"its cameras {1 / late.period_s:g} frames a second and smaller images"
            )
        return (
            f"expected each control step within {late.period_s:.3f} s, got one that took {late.latest_s:.3f} s more; {mend}, or "
            "record and train at a lower rate"
        )

    def hold(self) -> None:
        """End the episode and hold the robot, if it was sent an action since it was held last."""
        self._stop_reason = self._stop_reason or "it was held; arrange the scene, then call reset()"
        if self._is_moving:
            self._send_hold()

    def _send_hold(self) -> dict[str, Any]:
        """Send the robot where it is, or was when it last told."""
        with contextlib.suppress(Exception):
            self.commands.observe(self.robot.get_observation())
        sent = self._send(self.commands.hold())
        self._is_moving = False
        return {"sent": sent}

    def _send(self, target: dict[str, float]) -> dict[str, float]:
        sent = target if self.is_dry_run else self.robot.send_action(target) or target  # some robots return nothing
        self.commands.last |= {key: sent.get(key, value) for key, value in target.items()}
        return sent

    def _read(self) -> dict[str, Any]:
        """What the robot tells: `KeyError` where a number or an image is absent, `ValueError` where it is none."""
        started = self._clock()
        observation = self.robot.get_observation()
        self._reading_s = self._clock() - started
        numbers = dict.fromkeys([*self._state_keys, *self.commands.told])
        wrong = {key: observation.get(key) for key in numbers if not _is_number(observation.get(key))}
        wrong |= {key: None for key in self._cameras.values() if observation.get(key) is None}
        if wrong:
            raise (ValueError if wrong.keys() <= observation.keys() else KeyError)(
                f"expected a number for each of {list(numbers)} and an image for each of {list(self._cameras.values())}, got "
                f"{wrong}; the robot's observation has {list(observation)}; check its sensors and cameras"
            )
        return observation

    def _observe(self) -> dict[str, Any]:
        observation = self._read()
        self.commands.observe(observation)
        state = np.array([observation[key] for key in self._state_keys], np.float64)
        images = {name: np.array(observation[key]) for name, key in self._cameras.items()}
        spaces = cast(Any, self.observation_space)["images"]
        formats = {name: (image.shape, str(image.dtype)) for name, image in images.items()}
        expected = {name: (space.shape, "uint8") for name, space in spaces.items()}
        if not np.isfinite(state).all() or formats != expected:
            raise ValueError(
                f"expected finite numbers for {list(self._state_keys)} and images {expected}; got {state.tolist()} and "
                f"{formats}; check the robot's sensors and cameras"
            )
        images = turned_as_stored(images, self.action_spec)
        return {"images": images, "state": state.astype(np.float32), "instruction": self.instructions[self.task]}

    def close(self) -> None:
        """Hold the robot if it may move, and disconnect it; `reset` connects it again."""
        is_running, self._stop_reason = not self._stop_reason, "it was closed; call reset(), and it connects the robot"
        if not self.robot.is_connected:
            return
        try:
            if is_running or self._is_moving:
                self._send_hold()
        finally:
            self.robot.disconnect()


def _is_number(value: Any) -> bool:
    return np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iufb"


def _camera_names(robot: Any, spec: ActionSpec, cameras: Mapping[str, str]) -> dict[str, str]:
    """Camera of the card -> the robot's name."""
    require_half_turns(spec)
    names = {camera: cameras.get(camera, camera) for camera in spec.cameras}
    available = [key for key, feature in robot.observation_features.items() if isinstance(feature, tuple) and len(feature) == 3]
    missing = [key for key in names.values() if key not in available]
    unknown = sorted(set(cameras) - set(names))
    if missing or unknown or len(set(names.values())) < len(names):
        raise KeyError(
            f"expected a camera of the robot for each of {list(spec.cameras)}, none twice; got {names} and {unknown}; the robot "
            f"has {available}; name them by cameras={{camera of the card: of the robot}}, or add them to the robot"
        )
    return names


def _camera_shapes(robot: Any, names: Mapping[str, str]) -> dict[str, tuple[int, int, int]]:
    """Camera of the card -> shape of its images, from the robot's names."""
    shapes = {key: tuple(robot.observation_features[key]) for key in names.values()}
    wrong = {key: shape for key, shape in shapes.items() if shape[2] != 3 or None in shape}
    if wrong:
        raise ValueError(
            f"expected (height, width, 3) of each camera in the robot's observation_features, got {wrong}; set height and width "
            f"of {', '.join(wrong)} in the robot's configuration"
        )
    return {camera: shapes[key] for camera, key in names.items()}
