"""Robot motion: actions over time, their distributions, and the path of the hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Num
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rvlm.report.plots.style import (
    COLUMN_IN,
    NEUTRAL,
    PAGE_IN,
    PALETTE,
    dimension_color,
    figure_title,
    styled,
    unit_in_brackets,
)


@styled
def action_curves(
    actions: Num[np.ndarray, "n a"],
    spec: Any,
    chunks: Num[np.ndarray, "n k a"] | Mapping[int, np.ndarray] | None = None,
    title: str | None = None,
) -> Figure:
    """Each action dimension over an episode, in SI units; predicted chunks start at the step where they were predicted.

    Args:
        actions: raw actions ``(n, a)`` of the episode.
        spec: an `ActionSpec`: ``names``, ``units``, ``is_binary``, ``to_si``.
        chunks: raw predicted chunks: ``(n, k, a)``, one per step, or ``{step: (k, a)}``.
        title: a sentence; by default one made from the numbers drawn.
    """
    values = spec.to_si(np.asarray(actions))
    predicted = {} if chunks is None else dict(chunks) if isinstance(chunks, Mapping) else dict(enumerate(chunks))
    n_rows = len(spec.names) // 2 + 1  # translation left, rotation right, below them the gripper and the legend
    fig, axes = plt.subplots(n_rows, 2, figsize=(PAGE_IN, 0.95 * n_rows + 0.5), sharex=True, layout="constrained")
    panels = [*axes[:-1].T.flat, *axes[-1]]
    for dim, (ax, name, unit) in enumerate(zip(panels, spec.names, spec.units, strict=False)):
        for step, chunk in predicted.items():
            curve = spec.to_si(np.asarray(chunk))[:, dim]
            ax.plot(step + np.arange(len(curve)), curve, color=NEUTRAL, alpha=0.4, linewidth=0.8)
        ax.plot(values[:, dim], color=dimension_color(name), drawstyle="steps-mid" if spec.is_binary[dim] else "default")
        ax.set_ylabel(unit_in_brackets(name, unit))
    _legend(panels[len(spec.names) :], bool(predicted))
    for ax in axes[-1]:
        ax.set_xlabel("control step")
    fig.align_ylabels()
    listed = f", {len(predicted)} chunks predicted on the way" if predicted else ""
    figure_title(fig, title or f"The hand moves for {len(values)} steps{listed}")
    return fig


def _legend(panels: Sequence[Axes], has_chunks: bool) -> None:
    """Legend of `action_curves`, in the panel that no dimension needs."""
    for ax in panels:
        ax.spines["left"].set_visible(False)
        ax.grid(False)
        ax.tick_params(left=False, labelleft=False)
    if panels:
        panels[0].plot([], [], color="black", label="executed (colour: dimension)")
    if panels and has_chunks:
        panels[0].plot([], [], color=NEUTRAL, alpha=0.4, linewidth=0.8, label="predicted chunk, from where it was predicted")
    if panels:
        panels[0].legend(loc="center")


@styled
def histograms(
    values: Num[np.ndarray, "n a"], names: Sequence[str], units: Sequence[str], marks: Num[np.ndarray, "m a"], title: str
) -> Figure:
    """How often each value occurs, a panel per dimension, on a logarithmic axis so that rare values show too.

    Args:
        values: ``(n, a)``, in ``units``.
        names: of the dimensions.
        units: of the dimensions.
        marks: ``(m, a)`` values to mark by a dashed line, such as q01 and q99.
        title: a sentence.
    """
    n_rows = max(2, -(-len(names) // 4))
    n_columns = -(-len(names) // n_rows)
    shape: Any = {"figsize": (PAGE_IN, 1.45 * n_rows), "sharey": True, "squeeze": False, "layout": "constrained"}
    fig, axes = plt.subplots(n_rows, n_columns, **shape)
    for ax in axes.flat:
        ax.set_visible(False)
    for dim, (ax, name, unit) in enumerate(zip(axes.flat, names, units, strict=False)):
        ax.set_visible(True)
        ax.hist(values[:, dim], bins=40, color=dimension_color(name), alpha=0.75)
        for mark in marks[:, dim]:
            ax.axvline(mark, color="black", linestyle="--", linewidth=0.8)
        ax.set(xlabel=unit_in_brackets(name, unit), yscale="log")
    for ax in axes[:, 0]:
        ax.set_ylabel("frames")
    figure_title(fig, title)
    return fig


@styled
def hand_path(state: Num[np.ndarray, "n s"], arrows: Mapping[str, np.ndarray], title: str) -> Figure:
    """The hand's path across the table, seen from above, with displacement arrows that start on it.

    Args:
        state: ``(n, s)``; the first two columns are x and y [m], world frame, x towards the static camera.
        arrows: name -> displacements ``(n, 2)`` along x and y [m], in a colour each.
        title: a sentence.
    """
    ends = [100 * (state[:, :2] + np.asarray(moved)) for moved in arrows.values()]
    reach = np.concatenate([100 * state[:, :2], *ends])
    (x_low, y_low), (x_high, y_high) = reach.min(0) - 1, reach.max(0) + 1
    height_in = np.clip(0.75 * COLUMN_IN * (x_high - x_low) / (y_high - y_low) + 1.0, 1.8, 4.5)  # the axes fill the figure
    fig, ax = plt.subplots(figsize=(COLUMN_IN, height_in), layout="constrained")
    x, y = 100 * state[:, 0], 100 * state[:, 1]  # [cm]
    ax.plot(y, x, ".-", color="#b0b0b0", markersize=3, label="hand", zorder=1)
    for i, (name, moved) in enumerate(arrows.items()):
        moved = 100 * np.asarray(moved)
        scale: Any = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006}
        ax.quiver(y, x, moved[:, 1], moved[:, 0], color=PALETTE[i], label=name, zorder=2 + i, **scale)
    ax.plot(y[0], x[0], "o", mfc="white", mec="black", ms=5, zorder=9)
    ax.annotate("start", (y[0], x[0]), (5, 5), textcoords="offset points")
    ax.set(xlabel="y [cm], world frame", ylabel="x [cm], world frame", xlim=(y_low, y_high), ylim=(x_high, x_low), aspect="equal")
    fig.legend(loc="outside lower left", ncols=3)
    figure_title(fig, title)
    return fig
