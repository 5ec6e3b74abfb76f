"""Things to hold in the hand: drive a robot with buttons. Each has a static twin, since paper and GitHub strip widgets.

Taught in: 00_look_first.
"""

from __future__ import annotations

import functools
import html
import inspect
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

MOVES = {  # word -> (dimension, sign), as the static camera sees the tabletop's world frame
    "left": ("dy", -1.0),
    "right": ("dy", 1.0),
    "away": ("dx", -1.0),
    "closer": ("dx", 1.0),
    "up": ("dz", 1.0),
    "down": ("dz", -1.0),
    "turn left": ("dyaw", 1.0),
    "turn right": ("dyaw", -1.0),
}


def move(spec: Any, word: str, is_open: bool, amount: float | int = 1.0) -> np.ndarray:
    """The raw action ``(a,)`` float32 of one word.

    Args:
        spec: `ActionSpec` of the robot, with deltas in the world frame.
        word: one of `MOVES`, or "stay".
        is_open: whether the fingers are to be open.
        amount: share of the largest step, in [0, 1].
    """
    if word != "stay" and word not in MOVES:
        raise KeyError(f"no move {word!r}; there are stay, {', '.join(MOVES)}")
    action = np.zeros(spec.n_dims, np.float32)
    if word in MOVES:
        dimension, sign = MOVES[word]
        index = spec.names.index(dimension)
        action[index] = amount * (spec.high[index] if sign > 0 else spec.low[index])
    return spec.set_gripper(action, is_open)


def scripted_teleop(env: Any, words: Iterable[str], seed: int, is_open: bool = True) -> dict[str, Any]:
    """Drive through a list of `MOVES`; the static twin of `teleoperate`.

    Returns:
        What the robot saw and felt before each move and after the last one: "image" and "wrist_image" ``(n, h, w, 3)``,
        "state" ``(n, s)``, and "action" ``(n - 1, a)``.
    """
    observations, actions = [env.reset(seed=seed)[0]], []
    for word in words:
        actions.append(move(env.unwrapped.action_spec, word, is_open))
        observations.append(env.step(actions[-1])[0])
    return {key: np.stack([o[key] for o in observations]) for key in ("image", "wrist_image", "state")} | {
        "action": np.stack(actions)
    }


class OnOneThread:
    """An environment of its own whose every call runs on one thread, for OpenGL draws in the thread that began it alone.

    JupyterLab hands buttons to one thread of the kernel and toggles to another, so what a widget renders needs a third.

    Args:
        make: makes the environment, on that thread.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="widget")
        self._env = self._pool.submit(make).result()

    def do(self, work: Callable[[Any], Any]) -> Any:
        """What `work` returns or raises when it is given the environment, on its thread."""
        return self._pool.submit(work, self._env).result()


def own_copy(env: Any) -> Callable[[], Any]:
    """What makes an environment like another one, which is left alone: same robot, image size, families, setting and limit.

    Raises:
        TypeError: an environment that does not say how it was made.
    """
    bare = env.unwrapped
    if getattr(env, "spec", None) is not None:  # made by `gymnasium.make`
        import gymnasium

        return functools.partial(gymnasium.make, env.spec)
    names = [name for name in inspect.signature(type(bare)).parameters if name != "self"]
    missing = [name for name in names if not hasattr(bare, name)]
    if missing:
        raise TypeError(f"expected an environment that keeps what it was made with; {type(bare).__name__} lacks {missing}")
    return functools.partial(type(bare), **{name: getattr(bare, name) for name in names})


def teleoperate(env: Any, seed: int = 0, size: int = 256, family: str | None = None) -> Any:
    """Buttons that move the robot, what its cameras see, its state, and whether it has done what it was asked.

    Args:
        env: the tabletop; the widget drives one like it, so this one stays as it is.
        seed: of the first scene; "new scene" counts up.
        size: side of the pictures [pixel].
        family: kind of task; drawn by the seed where it is left out.

    Returns:
        An ``ipywidgets.VBox``. What goes wrong in it is written into it.
    """
    import ipywidgets as widgets

    spec, limit, scene = env.unwrapped.action_spec, getattr(env.unwrapped, "max_steps", None), {"seed": seed, "step": 0}
    own = OnOneThread(own_copy(env))
    screens = {c: widgets.Image(format="png", layout={"width": f"{size}px"}) for c in spec.cameras}
    instruction, state, trouble = widgets.HTML(), widgets.HTML(), widgets.HTML()
    is_open = widgets.ToggleButton(value=True, description="fingers open")
    amount = widgets.FloatSlider(value=1.0, min=0.1, max=1.0, step=0.1, description="step size")

    def show(observation: dict, pictures: Mapping[str, bytes], is_success: bool = False) -> None:
        for camera, screen in screens.items():
            screen.value = pictures[camera]
        count = f"step {scene['step']}" + (f" of {limit}" if limit else "")
        done = " <b style='color:#029e73'>done</b>" if is_success else ""
        instruction.value = f"“{html.escape(observation['instruction'])}” · {count}{done}"
        values = zip(spec.state_names, observation["state"], spec.state_units, strict=True)
        numbers = ", ".join(f"{name} {value:+.3f} {unit}" for name, value, unit in values)
        state.value = f"<span style='font-variant-numeric:tabular-nums'>{html.escape(numbers)}</span>"

    def pictured(robot: Any) -> dict[str, bytes]:
        return {camera: _png(robot.unwrapped.image(camera, size)) for camera in screens}

    def act(word: str) -> None:
        action = move(spec, word, is_open.value, amount.value)
        (observation, _, is_success, _, _), pictures = own.do(lambda robot: (robot.step(action), pictured(robot)))
        scene["step"] += 1
        show(observation, pictures, is_success)

    def start() -> None:
        options = {"family": family} if family else None
        (observation, _), pictures = own.do(lambda robot: (robot.reset(seed=scene["seed"], options=options), pictured(robot)))
        scene.update(seed=scene["seed"] + 1, step=0)
        show(observation, pictures)

    def told(work: Callable[[], None]) -> Callable[[Any], None]:
        def carry_out(_: Any) -> None:
            try:
                work()
                trouble.value = ""
            except Exception as error:  # a callback's exception reaches nobody: the page would just stand still
                trouble.value = f"<b style='color:#d55e00'>{html.escape(f'{type(error).__name__}: {error}')}</b>"

        return carry_out

    buttons = {word: widgets.Button(description=word) for word in MOVES}
    for word, button in buttons.items():
        button.on_click(told(functools.partial(act, word)))
    is_open.observe(told(functools.partial(act, "stay")), names="value")
    anew = widgets.Button(description="new scene")
    anew.on_click(told(start))
    start()
    keys = widgets.GridBox(list(buttons.values()), layout={"grid_template_columns": "repeat(4, 150px)"})
    last = widgets.HBox([is_open, amount, anew, widgets.HTML("click a button; Enter repeats it")])
    return widgets.VBox([instruction, widgets.HBox(list(screens.values())), state, keys, last, trouble])


def _png(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()
