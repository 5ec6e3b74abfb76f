"""Camera images: film strips, galleries, overlays, and players for a notebook."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Num, UInt8
from matplotlib.figure import Figure

from rvlm.report.plots.style import (
    COLUMN_IN,
    FAILURE,
    NEUTRAL,
    PAGE_IN,
    PALETTE,
    SUCCESS,
    figure_title,
    hide_axes,
    styled,
)

Frames = Sequence[np.ndarray] | UInt8[np.ndarray, "_ _ _ 3"]  # a list of images (h, w, 3), or one array


@styled
def filmstrip(
    frames: Mapping[str, Frames],
    instruction: str,
    success: bool | np.bool_ | None,
    n: int = 8,
) -> Figure:
    """An episode as evenly spaced frames, a row for each camera, bordered by its outcome.

    Args:
        frames: camera -> ``(t, h, w, 3)`` uint8, or a list of such images.
        instruction: becomes the title.
        success: outcome; None for an episode without one (grey border).
        n: frames to show.
    """
    lengths = {camera: len(images) for camera, images in frames.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"filmstrip: expected as many frames of each camera, at least one; got {lengths}")
    n_steps, first = lengths[next(iter(frames))], next(iter(frames.values()))[0]
    steps = np.unique(np.linspace(0, n_steps - 1, min(n, n_steps)).round().astype(int))
    fig, axes = _strip_axes(len(frames), max(len(steps), 4), np.shape(first)[0] / np.shape(first)[1])
    color = NEUTRAL if success is None else SUCCESS if success else FAILURE
    for row, images in zip(axes, frames.values(), strict=True):
        for ax, step in zip(row, steps, strict=False):
            ax.imshow(images[step], interpolation="nearest")
            hide_axes(ax, color)
    for ax, step in zip(axes[-1], steps, strict=False):
        ax.set_xlabel(f"step {step}", labelpad=2)
    for ax, camera in zip(axes[:, 0], frames, strict=True):
        ax.set_ylabel(camera)
    for ax in axes[:, len(steps) :].flat:
        ax.set_axis_off()
    outcome = "" if success is None else ": done" if success else ": not done"
    figure_title(fig, f"“{instruction}”{outcome} in {n_steps} steps" if outcome else f"“{instruction}”, {n_steps} steps")
    return fig


@styled
def gallery(rows: Mapping[str, Frames], labels: Sequence[str], title: str) -> Figure:
    """Separate images side by side, a row per camera.

    Args:
        rows: name of a row -> its images ``(n, h, w, 3)`` uint8.
        labels: n captions, below the last row.
        title: a sentence.
    """
    first = next(iter(rows.values()))[0]
    fig, axes = _strip_axes(max(len(rows), 1), max(len(labels), 4), first.shape[0] / first.shape[1])
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name)
        for ax, image in zip(row, images, strict=False):
            ax.imshow(image, interpolation="nearest")
            hide_axes(ax, NEUTRAL)
    for ax, label in zip(axes[-1], labels, strict=False):
        ax.set_xlabel(label, labelpad=2)
    for ax in axes[:, len(labels) :].flat:
        ax.set_axis_off()
    figure_title(fig, title)
    return fig


def _strip_axes(n_rows: int, n_columns: int, aspect: float) -> tuple[Figure, np.ndarray]:
    """Close-set image axes across a page; ``aspect`` is an image's height by its width."""
    label = 0.2 if n_rows > 1 else 0.03
    size = (PAGE_IN - label) / n_columns - 0.05
    fig, axes = plt.subplots(n_rows, n_columns, figsize=(PAGE_IN, (size * aspect + 0.05) * n_rows + 0.45), squeeze=False)
    height = fig.get_figheight()
    fig.subplots_adjust(label / PAGE_IN, 0.2 / height, 1 - 0.03 / PAGE_IN, 1 - 0.25 / height, 0.05 / size, 0.05 / size)
    return fig, axes


def _count(things: Any, kind: str) -> str:
    return f"{len(things)} {kind}" + "s" * (len(things) != 1)


@styled
def observation(observed: Mapping[str, Any], spec: Any, title: str | None = None) -> Figure:
    """A policy's observation at one step: its images at their true resolution, and the proprioceptive state.

    Args:
        observed: "images", camera -> ``(h, w, 3)`` uint8, "state" ``(s,)``, "instruction".
        spec: an `ActionSpec`: ``state_names``, ``state_units``.
        title: a sentence; by default the instruction and the size of the images.
    """
    images = observed["images"]
    fig, axes = plt.subplots(1, len(images) + 1, figsize=(PAGE_IN, 2.5), layout="constrained")
    for ax, (camera, image) in zip(axes, images.items(), strict=False):
        ax.imshow(image, interpolation="nearest")
        hide_axes(ax, NEUTRAL)
        ax.set_xlabel(f"{camera}, {image.shape[1]} × {image.shape[0]} px")
    values = zip(spec.state_names, observed["state"], spec.state_units, strict=True)
    axes[-1].set_axis_off()
    axes[-1].text(0.0, 0.97, "state", fontweight="bold", va="top", transform=axes[-1].transAxes)
    for i, (name, value, unit) in enumerate(values):
        line, font = f"{name:<16}{value:+.3f} {unit}", {"family": "monospace", "fontsize": 7.5}
        axes[-1].text(0.0, 0.85 - 0.11 * i, line, va="top", transform=axes[-1].transAxes, **font)
    figure_title(
        fig, title or f"“{observed['instruction']}”: {_count(images, 'image')}, {len(spec.state_names)} numbers and a sentence"
    )
    return fig


@styled
def grounding_overlay(
    image: UInt8[np.ndarray, "h w 3"],
    points: Num[np.ndarray, "m 2"] | Sequence[Sequence[float | int]],
    labels: Sequence[str],
    title: str | None = None,
) -> Figure:
    """Predicted locations as labelled rings on the image.

    Args:
        image: ``(h, w, 3)`` uint8.
        points: ``(m, 2)``, x to the right and y downwards [pixel], in [0, w) and [0, h).
        labels: one per point.
        title: a sentence; by default one made from the numbers drawn.
    """
    points = np.asarray(points, dtype=float).reshape(-1, 2)
    if len(points) != len(labels):
        raise ValueError(f"grounding_overlay: expected one label per point, got {len(points)} points and {len(labels)} labels")
    height, width = image.shape[:2]
    fig, ax = plt.subplots(figsize=(COLUMN_IN, (COLUMN_IN - 0.2) * height / width + 0.35), layout="constrained")
    ax.imshow(image, interpolation="nearest")
    halo, ring = ([effects.withStroke(linewidth=w, foreground="white")] for w in (2.2, 3.6))
    for i, ((x, y), label) in enumerate(zip(points, labels, strict=True)):
        color, (shift, align) = PALETTE[i % len(PALETTE)], (-8, "right") if x > 0.6 * width else (8, "left")
        ax.plot(x, y, "o", ms=11, mfc="none", mec=color, mew=1.8, path_effects=ring)
        text = ax.annotate(label, (x, y), (shift, 0), textcoords="offset points", ha=align, va="center", path_effects=halo)
        text.set(color=color, fontweight="bold")
    hide_axes(ax)
    figure_title(fig, title or f"The model points at {len(points)} thing{'s' if len(points) != 1 else ''}")
    return fig


@styled
def attention_overlay(image: UInt8[np.ndarray, "h w 3"], weights: Num[np.ndarray, "h_p w_p"], title: str | None = None) -> Figure:
    """The image, and beside it the attention of the action token to its patches.

    Args:
        image: ``(h, w, 3)`` uint8.
        weights: attention per patch ``(h_p, w_p)``, not negative; drawn as shares of their sum.
        title: a sentence; by default one made from the numbers drawn.
    """
    weights = np.asarray(weights, dtype=float)
    if weights.ndim != 2 or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"attention_overlay: expected weights (h_p, w_p) >= 0 with a positive sum, got shape {weights.shape}")
    share = 100 * weights / weights.sum()
    height, width = image.shape[:2]
    fig, axes = plt.subplots(1, 2, figsize=(COLUMN_IN, COLUMN_IN / 2 * height / width + 0.55), layout="constrained")
    axes[0].imshow(image, interpolation="nearest")
    axes[1].imshow(image.mean(-1), cmap="gray", vmin=-80, vmax=335, interpolation="nearest")
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    heat = axes[1].imshow(share, cmap="magma", alpha=0.65, extent=extent, interpolation="nearest", vmin=0)
    for ax in axes:
        hide_axes(ax)
    bar = fig.colorbar(heat, ax=axes, location="bottom", aspect=40, pad=0.02)
    bar.set_label("attention per patch [%]")
    top = np.sort(share.ravel())[::-1][: max(1, share.size // 10)].sum()
    figure_title(fig, title or f"A tenth of the patches holds {top:.0f} % of the attention")
    return fig


def explore(episode: Mapping[str, Any]) -> Any:
    """A slider through an episode; its static twin, for paper and GitHub, is `filmstrip`.

    Args:
        episode: "images", camera -> ``(t, h, w, 3)`` uint8, and where present "instruction".

    Returns:
        An ``ipywidgets.VBox``; its slider is ``.children[-1].children[-1]``.
    """
    import ipywidgets as widgets

    pngs = {camera: [_png(frame) for frame in frames] for camera, frames in episode["images"].items()}
    screens = {camera: widgets.Image(value=png[0], format="png", layout={"width": "256px"}) for camera, png in pngs.items()}
    last = min(map(len, pngs.values())) - 1
    play, slider = widgets.Play(max=last, interval=100), widgets.IntSlider(max=last, description="step")
    widgets.jslink((play, "value"), (slider, "value"))

    def show(change: Mapping[str, Any]) -> None:
        for camera, screen in screens.items():
            screen.value = pngs[camera][change["new"]]

    slider.observe(show, names="value")
    instruction = widgets.Label(str(episode.get("instruction", "")))
    return widgets.VBox([instruction, widgets.HBox(list(screens.values())), widgets.HBox([play, slider])])


def _magnify(frame: np.ndarray, at_least: int = 256) -> np.ndarray:
    """Enlarge ``(h, w, 3)`` by a whole factor without smoothing; sides become even, as H.264 wants them."""
    factor = max(1, -(-at_least // min(frame.shape[:2])))
    big = np.repeat(np.repeat(np.asarray(frame, dtype=np.uint8), factor, axis=0), factor, axis=1)
    return big[: big.shape[0] // 2 * 2, : big.shape[1] // 2 * 2]


def _png(frame: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(_magnify(frame)).save(buffer, format="png")
    return buffer.getvalue()


def side_by_side(frames: Mapping[str, np.ndarray]) -> np.ndarray:
    """Films of several cameras ``(t, h, w, 3)`` uint8 as one, of even size as videos need; black below lower ones."""
    height = -(-max(film.shape[1] for film in frames.values()) // 2) * 2
    padded = [np.pad(film, ((0, 0), (0, height - film.shape[1]), (0, film.shape[2] % 2), (0, 0))) for film in frames.values()]
    return np.concatenate(padded, axis=2)


def mp4(frames: Frames, fps: float | int) -> bytes:
    """Frames ``(t, h, w, 3)`` uint8 as an H.264 file that every browser plays, enlarged to at least 256 pixels."""
    import av

    buffer, images = io.BytesIO(), [_magnify(frame) for frame in frames]
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "20"}
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def player(frames: Frames, fps: float | int) -> Any:
    """An episode as a video inside the notebook; show a `filmstrip` before it, since GitHub strips videos.

    Args:
        frames: ``(t, h, w, 3)`` uint8.
        fps: frames per second [Hz], usually the spec's ``rate_hz``.
    """
    from IPython.display import HTML

    data = base64.b64encode(mp4(frames, fps)).decode()
    return HTML(f'<video controls loop muted playsinline width="256" src="data:video/mp4;base64,{data}"></video>')
