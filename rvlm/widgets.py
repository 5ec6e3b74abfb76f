"""Things to hold in the hand: drive a robot with buttons. Each has a static twin, since paper and GitHub strip widgets.

Taught in: 00_look_first.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def scripted_drive(env: Any, words: Iterable[str], seed: int, is_open: bool = True) -> dict[str, Any]:
    """Drive through a list of `MOVES`; the static twin of `drive`.

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


def drive(env: Any, seed: int = 0, size: int = 256) -> Any:
    """Buttons that move the robot, what its cameras see, what it feels, and whether it has done what it was told.

    Args:
        env: the tabletop; it is reset.
        seed: of the first scene; "new scene" counts up.
        size: side of the pictures [pixel].

    Returns:
        An ``ipywidgets.VBox``.
    """
    import ipywidgets as widgets

    robot, scene = env.unwrapped, {"seed": seed}
    spec = robot.action_spec
    screens = {c: widgets.Image(format="png", layout={"width": f"{size}px"}) for c in spec.cameras}
    told, felt = widgets.HTML(), widgets.HTML()
    is_open = widgets.ToggleButton(value=True, description="fingers open")
    amount = widgets.FloatSlider(value=1.0, min=0.1, max=1.0, step=0.1, description="step size")

    def show(observation: dict, is_success: bool = False) -> None:
        for camera, screen in screens.items():
            screen.value = _png(robot.image(camera, size))
        told.value = f"“{observation['instruction']}”" + (" <b>done</b>" if is_success else "")
        values = zip(spec.state_names, observation["state"], spec.state_units, strict=True)
        felt.value = ", ".join(f"{name} {value:+.3f} {unit}" for name, value, unit in values)

    def act(word: str) -> None:
        observation, _, is_success, _, _ = env.step(move(spec, word, is_open.value, amount.value))
        show(observation, is_success)

    def start(_: Any = None) -> None:
        show(env.reset(seed=scene["seed"])[0])
        scene["seed"] += 1

    buttons = {word: widgets.Button(description=word) for word in MOVES}
    for word, button in buttons.items():
        button.on_click(lambda _, word=word: act(word))
    is_open.observe(lambda _: act("stay"), names="value")
    anew = widgets.Button(description="new scene")
    anew.on_click(start)
    start()
    keys = widgets.GridBox(list(buttons.values()), layout={"grid_template_columns": "repeat(4, 150px)"})
    return widgets.VBox([told, widgets.HBox(list(screens.values())), felt, keys, widgets.HBox([is_open, amount, anew])])


def _png(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()
