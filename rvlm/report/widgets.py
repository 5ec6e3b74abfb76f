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

from rvlm.data.observations import stack_images

MOVES = {  # command -> (dimension, sign), with the directions of the static camera's image
    "left": ("dy", -1.0),
    "right": ("dy", 1.0),
    "away": ("dx", -1.0),
    "closer": ("dx", 1.0),
    "up": ("dz", 1.0),
    "down": ("dz", -1.0),
    "turn left": ("dyaw", 1.0),
    "turn right": ("dyaw", -1.0),
}


def move(spec: Any, command: str, is_open: bool, amount: float | int = 1.0) -> np.ndarray:
    """The raw action ``(a,)`` float32 of one command.

    Args:
        spec: `ActionSpec` of the robot, with deltas in the world frame.
        command: one of `MOVES`, or "stay".
        is_open: whether to open the fingers.
        amount: fraction of the largest step, in [0, 1].
    """
    if command != "stay" and command not in MOVES:
        raise KeyError(f"no move {command!r}; there are stay, {', '.join(MOVES)}")
    action = np.zeros(spec.n_dims, np.float32)
    if command in MOVES:
        dimension, sign = MOVES[command]
        index = spec.names.index(dimension)
        action[index] = amount * (spec.high[index] if sign > 0 else spec.low[index])
    return spec.set_grippers(action, is_open)


def scripted_teleop(env: Any, commands: Iterable[str], seed: int, is_open: bool = True) -> dict[str, Any]:
    """Execute a list of `MOVES`; the non-interactive version of `teleoperate`.

    Returns:
        Observations before each command and after the last: "images", camera -> ``(n, h, w, 3)``,
        "state" ``(n, s)``, and "action" ``(n - 1, a)``.
    """
    observations, actions = [env.reset(seed=seed)[0]], []
    for command in commands:
        actions.append(move(env.unwrapped.action_spec, command, is_open))
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
    """A function that makes an environment with the same arguments as `env`.

    Raises:
        TypeError: `env` does not store the arguments that it was made with.
    """
    unwrapped = env.unwrapped
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
        env: the tabletop; the widget drives a copy of it.
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

        self.spec, self.max_steps = env.unwrapped.action_spec, getattr(env.unwrapped, "max_steps", None)
        self.seed, self.size, self.task, self.n_steps = seed, size, task, 0
        self.env = OnOneThread(env_factory(env))
        self.screens = {c: widgets.Image(format="png", layout={"width": f"{size}px"}) for c in self.spec.cameras}
        self.instruction, self.state_label, self.error = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.is_open = widgets.ToggleButton(value=True, description="fingers open")
        self.amount = widgets.FloatSlider(value=1.0, min=0.1, max=1.0, step=0.1, description="step size")
        self.start()
        self.is_open.observe(self.reporting_errors(functools.partial(self.act, "stay")), names="value")
        settings = [self.is_open, self.amount, self.button("new scene", self.start)]
        moves = [self.button(command, functools.partial(self.act, command)) for command in MOVES]
        grid = widgets.GridBox(moves, layout={"grid_template_columns": "repeat(4, 150px)"})
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
        (observation, _), images = self.env.do(lambda env: (env.reset(seed=self.seed, options=options), self.render(env)))
        self.seed, self.n_steps = self.seed + 1, 0
        self.show(observation, images)

    def act(self, command: str) -> None:
        """Execute one command."""
        action = move(self.spec, command, self.is_open.value, self.amount.value)
        (observation, _, is_success, _, _), images = self.env.do(lambda env: (env.step(action), self.render(env)))
        self.n_steps += 1
        self.show(observation, images, is_success)

    def render(self, env: Any) -> dict[str, bytes]:
        """PNG of each camera."""
        return {camera: _png(env.unwrapped.image(camera, self.size)) for camera in self.screens}

    def show(self, observation: Mapping[str, Any], images: Mapping[str, bytes], is_success: bool = False) -> None:
        """Update images, instruction and state."""
        for camera, screen in self.screens.items():
            screen.value = images[camera]
        count = f"step {self.n_steps}" + (f" of {self.max_steps}" if self.max_steps else "")
        done = " <b style='color:#029e73'>done</b>" if is_success else ""
        self.instruction.value = f"“{html.escape(observation['instruction'])}” · {count}{done}"
        values = zip(self.spec.state_names, observation["state"], self.spec.state_units, strict=True)
        numbers = ", ".join(f"{name} {value:+.3f} {unit}" for name, value, unit in values)
        self.state_label.value = f"<span style='font-variant-numeric:tabular-nums'>{html.escape(numbers)}</span>"


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()
