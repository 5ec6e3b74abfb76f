"""Notebook teleoperation: drive a robot with buttons, or by a scripted list of commands where widgets are not shown.

Taught in: 00_look_first.
"""

from __future__ import annotations

import functools
import html
import inspect
import io
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rvlm.data.holding import hold_action
from rvlm.data.observations import stack_images

SEEN_DIRECTIONS = {  # displacement in the world frame -> commands down and up its axis, as the static camera sees them
    "dx": ("away", "closer"),
    "dy": ("left", "right"),
    "dz": ("down", "up"),
    "dyaw": ("turn right", "turn left"),
}
TARGET_STEP = 0.05  # largest step of an absolute target, of its range


def moves(spec: Any) -> dict[str, tuple[int, int]]:
    """Command -> (dimension, sign): two for each dimension that the robot has, but its grippers.

    Displacements in the world frame are named by their direction in the image, others as "joint_1 -" and "joint_1 +".
    """
    commands: dict[str, tuple[int, int]] = {}
    for place, group in spec.placed_action:
        for index, name in zip(range(place.start, place.stop), group.names, strict=True):
            is_seen = group.kind == "pose_delta" and group.frame == "world" and name in SEEN_DIRECTIONS
            down, up = SEEN_DIRECTIONS[name] if is_seen else (f"{name} -", f"{name} +")
            if group.kind != "gripper" and name not in group.absent:
                commands |= {down: (index, -1), up: (index, 1)}
    return commands


def move(spec: Any, command: str, is_open: Any, amount: float | int = 1.0, held: np.ndarray | None = None) -> np.ndarray:
    """The raw action ``(a,)`` float32 of one command.

    Args:
        spec: `ActionSpec` of the robot.
        command: one of `moves`, or "stay".
        is_open: whether to open the grippers: one for all, or one each.
        amount: fraction of the largest step, in [0, 1]: of a displacement or velocity the range's end, of a target `TARGET_STEP`.
        held: the action ``(a,)`` that holds the robot; zeros if left out.
    """
    if command != "stay" and command not in (commands := moves(spec)):
        raise KeyError(f"no move {command!r}; there are stay, {', '.join(commands)}")
    action = np.zeros(spec.n_dims, np.float32) if held is None else np.array(held, np.float32)
    if command != "stay":
        index, sign = moves(spec)[command]
        low, high = spec.low[index], spec.high[index]
        targets = [place for place, _ in spec.action_groups("pose", "joint", "other")]
        is_target = any(place.start <= index < place.stop for place in targets)
        step = amount * (sign * TARGET_STEP * (high - low) if is_target else high if sign > 0 else low)
        action[index] = np.clip(action[index] + step, low, high) if is_target else step
    return spec.set_grippers(action, np.asarray(is_open))


def scripted_teleop(env: Any, commands: Iterable[str], seed: int, is_open: bool = True) -> dict[str, Any]:
    """Execute a list of `moves`; the non-interactive version of `teleoperate`.

    Returns:
        Observations before each command and after the last: "images", camera -> ``(n, h, w, 3)``,
        "state" ``(n, s)``, and "action" ``(n - 1, a)``.
    """
    spec, observations, actions = env.unwrapped.action_spec, [env.reset(seed=seed)[0]], []
    for command in commands:
        last = actions[-1][None] if actions else None
        (held,) = hold_action(spec, last, [observations[-1]["state"]])
        actions.append(move(spec, command, is_open, held=held))
        observations.append(env.step(actions[-1])[0])
    images, state = stack_images([o["images"] for o in observations]), np.stack([o["state"] for o in observations])
    return {"images": images, "state": state, "action": np.stack(actions)}


class OnOneThread:
    """An environment whose calls all run on one thread, as an OpenGL context belongs to the thread that made it.

    JupyterLab calls back buttons and toggles on two threads of the kernel, so rendering needs a third.

    Args:
        make: makes the environment; called on that thread.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="widget")
        self._env = self._pool.submit(make).result()

    def do(self, work: Callable[[Any], Any]) -> Any:
        """Call `work` with the environment on its thread; returns or raises what it does."""
        return self._pool.submit(work, self._env).result()


def env_factory(env: Any) -> Callable[[], Any]:
    """A function that makes an environment of the same suite, or with the same arguments as `env`.

    Raises:
        TypeError: `env` does not store the arguments that it was made with.
    """
    unwrapped = env.unwrapped
    if hasattr(env, "suite"):  # made by `Suite.make`
        return env.suite.make
    if getattr(env, "spec", None) is not None:  # made by `gymnasium.make`
        import gymnasium

        return functools.partial(gymnasium.make, env.spec)
    names = [name for name in inspect.signature(type(unwrapped)).parameters if name != "self"]
    missing = [name for name in names if not hasattr(unwrapped, name)]
    if missing:
        raise TypeError(f"expected an environment that keeps what it was made with; {type(unwrapped).__name__} lacks {missing}")
    return functools.partial(type(unwrapped), **{name: getattr(unwrapped, name) for name in names})


def teleoperate(env: Any, seed: int = 0, size: int = 256, task: str | None = None) -> Any:
    """Buttons that move the robot, with its camera images, its state and whether the task is done.

    Args:
        env: an environment of any suite; the widget drives a copy of it.
        seed: of the first scene; each "new scene" adds 1.
        size: side of the images [px].
        task: sampled by the seed if left out.

    Returns:
        An ``ipywidgets.VBox``, which also shows errors of its callbacks.
    """
    return _Teleoperation(env, seed, size, task).box


class _Teleoperation:
    """The widgets of `teleoperate` and their callbacks."""

    def __init__(self, env: Any, seed: int, size: int, task: str | None) -> None:
        import ipywidgets as widgets

        self.spec = env.unwrapped.action_spec
        self.seed, self.size, self.task, self.n_steps = seed, size, task, 0
        self.env = OnOneThread(env_factory(env))
        self.screens = {c: widgets.Image(format="png", layout={"width": f"{size}px"}) for c in self.spec.cameras}
        self.instruction, self.state_label, self.error = widgets.HTML(), widgets.HTML(), widgets.HTML()
        grippers = [self.spec.names[index] for index in self.spec.gripper_indices]
        self.is_open = [widgets.ToggleButton(value=True, description=f"{name} open") for name in grippers]
        self.amount = widgets.FloatSlider(value=1.0, min=0.1, max=1.0, step=0.1, description="step size")
        self.start()
        for toggle in self.is_open:
            toggle.observe(self.reporting_errors(functools.partial(self.act, "stay")), names="value")
        settings = [*self.is_open, self.amount, self.button("new scene", self.start)]
        buttons = [self.button(command, functools.partial(self.act, command)) for command in moves(self.spec)]
        grid = widgets.GridBox(buttons, layout={"grid_template_columns": "repeat(4, 150px)"})
        row = widgets.HBox([*settings, widgets.HTML("click a button; Enter repeats it")])
        images = widgets.HBox(list(self.screens.values()))
        self.box = widgets.VBox([self.instruction, images, self.state_label, grid, row, self.error])

    def button(self, description: str, callback: Callable[[], None]) -> Any:
        """A button that calls `callback`."""
        import ipywidgets as widgets

        button = widgets.Button(description=description)
        button.on_click(self.reporting_errors(callback))
        return button

    def reporting_errors(self, callback: Callable[[], None]) -> Callable[[Any], None]:
        """A widget callback that shows an error in the box, as Jupyter would drop it."""

        def call(_: Any) -> None:
            try:
                callback()
                self.error.value = ""
            except Exception as error:
                self.error.value = f"<b style='color:#d55e00'>{html.escape(f'{type(error).__name__}: {error}')}</b>"

        return call

    def start(self) -> None:
        """Reset to the next scene."""
        options = {"task": self.task} if self.task else None
        observation, self.max_steps = self.env.do(lambda env: (env.reset(seed=self.seed, options=options)[0], _limit(env)))
        self.seed, self.n_steps, self.last = self.seed + 1, 0, None
        self.show(observation)

    def act(self, command: str) -> None:
        """Execute one command."""
        held = hold_action(self.spec, self.last, [self.state])[0]
        action = move(self.spec, command, [toggle.value for toggle in self.is_open], self.amount.value, held)
        observation, *_, info = self.env.do(lambda env: env.step(action))
        self.n_steps, self.last = self.n_steps + 1, action[None]
        self.show(observation, info["is_success"])

    def render(self, env: Any, observation: Mapping[str, Any]) -> dict[str, bytes]:
        """PNG of each camera, rendered at the widget's size where the environment can (`image(camera, size)`)."""
        image = getattr(env.unwrapped, "image", None)
        seen = {c: image(c, self.size) if image else observation["images"][c] for c in self.screens}
        return {camera: _png(pixels) for camera, pixels in seen.items()}

    def show(self, observation: Mapping[str, Any], is_success: bool = False) -> None:
        """Update images, instruction and state."""
        self.state, images = observation["state"], self.env.do(lambda env: self.render(env, observation))
        for camera, screen in self.screens.items():
            screen.value = images[camera]
        count = f"step {self.n_steps}" + (f" of {self.max_steps}" if self.max_steps else "")
        done = " <b style='color:#029e73'>done</b>" if is_success else ""
        self.instruction.value = f"“{html.escape(observation['instruction'])}” · {count}{done}"
        values = zip(self.spec.state_names, observation["state"], self.spec.state_units, strict=True)
        numbers = ", ".join(f"{name} {value:+.3f} {unit}" for name, value, unit in values)
        self.state_label.value = f"<span style='font-variant-numeric:tabular-nums'>{html.escape(numbers)}</span>"


def _limit(env: Any) -> int | None:
    """Time limit of the present episode [control steps], if there is one."""
    return getattr(env, "max_steps", getattr(env.unwrapped, "max_steps", None))


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()
