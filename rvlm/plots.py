"""The house look and the signature figures.

Every function takes plain arrays and returns a matplotlib ``Figure`` that is already as wide as a paper's column
(`COLUMN_IN`) or page (`PAGE_IN`). A title is a sentence, axes carry units, colour never speaks alone, and the same action
dimension or policy structure has the same colour everywhere (`dimension_color`, `structure_color`).
"""

from __future__ import annotations

import base64
import functools
import io
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Num, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, NullFormatter

from rvlm.statistics import wilson

COLUMN_IN, PAGE_IN = 3.5, 7.16  # widths of one column and of a two-column page [inch]
PALETTE = sns.color_palette("colorblind").as_hex()  # ten colours, safe for the common colour-vision deficiencies
DIMENSIONS = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
STRUCTURES = ("one-step discrete", "one-step continuous", "interleaved continuous", "policy-head continuous")
TOKEN_COLORS: dict[str, str] = dict(
    zip(("image", "instruction", "state", "action", "other"), [*PALETTE[:4], "#b0b0b0"], strict=True)
)
Frames = Sequence[np.ndarray] | UInt8[np.ndarray, "_ _ _ 3"]  # a list of images (h, w, 3), or one array
SUCCESS, FAILURE, NEUTRAL = PALETTE[2], PALETTE[3], "#606060"
_RC: Any = {
    **sns.axes_style("ticks", {"axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6}),
    **sns.plotting_context("paper", rc={"font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "legend.fontsize": 7}),
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.titlelocation": "left",
    "figure.titlesize": 8.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,
    "svg.hashsalt": "rvlm",
}


def style() -> None:
    """Give a notebook's own plots the house look; the figures below have it anyway."""
    plt.rcParams.update(_RC)


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        with plt.rc_context(_RC):
            fig = draw(*args, **kwargs)
            plt.close(fig)  # else a notebook shows it twice: once flushed by pyplot, once as the cell's value
        return fig

    return drawn


def dimension_color(name: str) -> str:
    """The colour of an action dimension, by its name; a name outside `DIMENSIONS` gets a fixed one of the palette."""
    index = DIMENSIONS.index(name) if name in DIMENSIONS else zlib.crc32(name.encode())
    return PALETTE[index % len(PALETTE)]


def structure_color(name: str) -> str:
    """The colour of a policy structure ("policy-head continuous" or "policy_head_continuous"); others are grey."""
    words = name.lower().replace("-", " ").replace("_", " ")
    match = [s for s in STRUCTURES if s.replace("-", " ") in words]
    return PALETTE[STRUCTURES.index(match[0])] if match else NEUTRAL


def _headline(fig: Figure, text: str) -> None:
    fig.suptitle(text, x=0.01, ha="left")


def _bare(ax: Axes, color: str | None = None) -> None:
    """An image axis: no ticks, and a border only if a colour is given."""
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=color is not None, color=color, linewidth=1.8)


@_styled
def filmstrip(
    frames: Frames,
    instruction: str,
    success: bool | np.bool_ | None,
    n: int = 8,
    wrist: Frames | None = None,
) -> Figure:
    """An episode as evenly spaced frames, bordered by its outcome.

    Args:
        frames: static camera, ``(t, h, w, 3)`` uint8, or a list of such images.
        instruction: what the robot was told; becomes the title.
        success: outcome; None for an episode without one (grey border).
        n: frames to show.
        wrist: wrist camera, as many frames; becomes a second row.
    """
    if len(frames) == 0 or (wrist is not None and len(wrist) != len(frames)):
        raise ValueError(f"filmstrip: expected at least one frame and as many wrist frames, got {len(frames)} and {_len(wrist)}")
    steps = np.unique(np.linspace(0, len(frames) - 1, min(n, len(frames))).round().astype(int))
    rows = [frames] if wrist is None else [frames, wrist]
    fig, axes = _strip_axes(len(rows), max(len(steps), 4), np.shape(frames[0])[0] / np.shape(frames[0])[1])
    color = NEUTRAL if success is None else SUCCESS if success else FAILURE
    for row, images in zip(axes, rows, strict=True):
        for ax, step in zip(row, steps, strict=False):
            ax.imshow(images[step], interpolation="nearest")
            _bare(ax, color)
    for ax, step in zip(axes[-1], steps, strict=False):
        ax.set_xlabel(f"step {step}", labelpad=2)
    for ax, camera in zip(axes[:, 0], ("static", "wrist") if wrist is not None else ("",), strict=True):
        ax.set_ylabel(camera)
    for ax in axes[:, len(steps) :].flat:
        ax.set_axis_off()
    outcome = "" if success is None else ": done" if success else ": not done"
    _headline(fig, f"“{instruction}”{outcome} in {len(frames)} steps" if outcome else f"“{instruction}”, {len(frames)} steps")
    return fig


@_styled
def gallery(rows: Mapping[str, Frames], labels: Sequence[str], title: str) -> Figure:
    """Images that are not one episode, side by side: a row per camera.

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
            _bare(ax, NEUTRAL)
    for ax, label in zip(axes[-1], labels, strict=False):
        ax.set_xlabel(label, labelpad=2)
    for ax in axes[:, len(labels) :].flat:
        ax.set_axis_off()
    _headline(fig, title)
    return fig


def _strip_axes(n_rows: int, n_columns: int, aspect: float) -> tuple[Figure, np.ndarray]:
    """Close-set image axes across a page; ``aspect`` is an image's height by its width."""
    label = 0.2 if n_rows > 1 else 0.03
    size = (PAGE_IN - label) / n_columns - 0.05
    fig, axes = plt.subplots(n_rows, n_columns, figsize=(PAGE_IN, (size * aspect + 0.05) * n_rows + 0.45), squeeze=False)
    height = fig.get_figheight()
    fig.subplots_adjust(label / PAGE_IN, 0.2 / height, 1 - 0.03 / PAGE_IN, 1 - 0.25 / height, 0.05 / size, 0.05 / size)
    return fig, axes


def _len(x: Any) -> int | None:
    return None if x is None else len(x)


@_styled
def action_curves(
    actions: Num[np.ndarray, "n a"],
    spec: Any,
    chunks: Num[np.ndarray, "n k a"] | Mapping[int, np.ndarray] | None = None,
    title: str | None = None,
) -> Figure:
    """Each action dimension over an episode, in SI units; predicted chunks fan out from where they were predicted.

    Args:
        actions: raw actions ``(n, a)`` of the episode.
        spec: an `ActionSpec`: ``names``, ``units``, ``to_si``.
        chunks: raw predicted chunks: ``(n, k, a)``, one per step, or ``{step: (k, a)}``.
        title: a sentence; by default one made from the numbers drawn.
    """
    values = spec.to_si(np.asarray(actions))
    fans = {} if chunks is None else dict(chunks) if isinstance(chunks, Mapping) else dict(enumerate(chunks))
    n_rows = len(spec.names) // 2 + 1  # translation left, rotation right, below them the gripper and the key
    fig, axes = plt.subplots(n_rows, 2, figsize=(PAGE_IN, 0.95 * n_rows + 0.5), sharex=True, layout="constrained")
    panels = [*axes[:-1].T.flat, *axes[-1]]
    for dim, (ax, name, unit) in enumerate(zip(panels, spec.names, spec.units, strict=False)):
        for step, chunk in fans.items():
            fan = spec.to_si(np.asarray(chunk))[:, dim]
            ax.plot(step + np.arange(len(fan)), fan, color=NEUTRAL, alpha=0.4, linewidth=0.8)
        ax.plot(values[:, dim], color=dimension_color(name), drawstyle="steps-mid" if name == "gripper" else "default")
        ax.set_ylabel(f"{name} [{unit}]")
    _key(panels[len(spec.names) :], bool(fans))
    for ax in axes[-1]:
        ax.set_xlabel("control step")
    fig.align_ylabels()
    predicted = f", {len(fans)} chunks predicted on the way" if fans else ""
    _headline(fig, title or f"The hand moves for {len(values)} steps{predicted}")
    return fig


def _key(panels: Sequence[Axes], has_chunks: bool) -> None:
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


@_styled
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
    n_columns = -(-len(names) // 2)
    fig, axes = plt.subplots(2, n_columns, figsize=(PAGE_IN, 2.9), sharey=True, layout="constrained")
    for ax in axes.flat:
        ax.set_visible(False)
    for dim, (ax, name, unit) in enumerate(zip(axes.flat, names, units, strict=False)):
        ax.set_visible(True)
        ax.hist(values[:, dim], bins=40, color=dimension_color(name), alpha=0.75)
        for mark in marks[:, dim]:
            ax.axvline(mark, color="black", linestyle="--", linewidth=0.8)
        ax.set(xlabel=f"{name} [{unit}]", yscale="log")
    for ax in axes[:, 0]:
        ax.set_ylabel("frames")
    _headline(fig, title)
    return fig


@_styled
def hand_path(state: Num[np.ndarray, "n s"], arrows: Mapping[str, np.ndarray], title: str) -> Figure:
    """The hand's way across the table, seen from above, with displacements that start where the hand was.

    Args:
        state: ``(n, s)``; the first two columns are x and y [m], world frame, x towards the static camera.
        arrows: name -> displacements ``(n, 2)`` along x and y [m], in a colour each.
        title: a sentence.
    """
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 3.1), layout="constrained")
    x, y = 100 * state[:, 0], 100 * state[:, 1]  # [cm]
    ax.plot(y, x, ".-", color="#b0b0b0", markersize=3, label="hand", zorder=1)
    for i, (name, moved) in enumerate(arrows.items()):
        moved = 100 * np.asarray(moved)
        scale: Any = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006}
        ax.quiver(y, x, moved[:, 1], moved[:, 0], color=PALETTE[i], label=name, zorder=2 + i, **scale)
    ax.plot(y[0], x[0], "o", mfc="white", mec="black", ms=5, zorder=9)
    ax.annotate("start", (y[0], x[0]), (5, 5), textcoords="offset points")
    ends = [100 * (state[:, :2] + np.asarray(moved)) for moved in arrows.values()]
    reach = np.concatenate([100 * state[:, :2], *ends])
    (x_low, y_low), (x_high, y_high) = reach.min(0) - 1, reach.max(0) + 1
    ax.set(xlabel="y [cm], world frame", ylabel="x [cm], world frame", xlim=(y_low, y_high), ylim=(x_high, x_low), aspect="equal")
    fig.legend(loc="outside lower left", ncols=3)
    _headline(fig, title)
    return fig


@_styled
def error_by_bins(table: pd.DataFrame, title: str, needed: float | None = None) -> Figure:
    """Round-trip error over the number of bins, both logarithmic: translations in mm on the left, rotations in mrad on the right.

    Args:
        table: columns ``bins``, ``dimension``, ``unit`` ("m" or "rad"; others are left out) and ``error`` in that unit.
        title: a sentence.
        needed: precision that a task needs [m]; a dashed line.
    """
    fig, axes = plt.subplots(1, 2, figsize=(PAGE_IN, 2.4), layout="constrained")
    for ax, unit in zip(axes, ("m", "rad"), strict=True):
        for i, (name, rows) in enumerate(table[table["unit"] == unit].groupby("dimension", sort=False)):
            line = {"linewidth": 4 - 1.4 * i, "ms": 6 - 1.5 * i}  # equal curves stay visible under one another
            ax.plot(rows["bins"], 1000 * rows["error"], "o-", color=dimension_color(str(name)), label=name, **line)
        ax.set(xlabel="bins per dimension", ylabel=f"largest round-trip error [m{unit}]", xscale="log", yscale="log")
        ax.set_xticks(sorted(set(table["bins"])), [str(b) for b in sorted(set(table["bins"]))])
        ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.legend(ncols=3)
    if needed is not None:
        axes[0].axhline(1000 * needed, color="black", linestyle="--", linewidth=0.8)
        axes[0].annotate("needed", (table["bins"].max(), 1000 * needed), (0, 2), textcoords="offset points", ha="right")
    _headline(fig, title)
    return fig


@_styled
def rates_by_group(table: pd.DataFrame, title: str, label: str = "right [%], bars: 95 % interval") -> Figure:
    """Rates with 95 % Wilson intervals, several names side by side in each group.

    Args:
        table: columns ``group`` (a row of the figure), ``name`` (colour and marker), ``successes``, ``n``.
        title: a sentence.
        label: of the axis, with its unit.
    """
    groups, names = (list(dict.fromkeys(table[column])) for column in ("group", "name"))
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 0.25 * len(groups) + 0.95), layout="constrained")
    for i, name in enumerate(names):
        rows = table[table["name"] == name]
        rates = [wilson(int(s), int(n)) for s, n in zip(rows["successes"], rows["n"], strict=True)]
        at = np.array([100 * r.rate for r in rates])
        spread = [at - [100 * r.low for r in rates], [100 * r.high for r in rates] - at]
        y = [groups.index(g) + 0.5 * (i - (len(names) - 1) / 2) / len(names) for g in rows["group"]]
        ax.errorbar(at, y, xerr=spread, fmt="osD^vP"[i % 6], ms=3.2, color=PALETTE[i % len(PALETTE)], elinewidth=0.9, label=name)
    ax.set(yticks=range(len(groups)), yticklabels=groups, ylim=(len(groups) - 0.5, -0.5), xlim=(-3, 103), xlabel=label)
    ax.grid(False, axis="y")
    fig.legend(loc="outside lower left", ncols=3)
    _headline(fig, title)
    return fig


@_styled
def observation(seen: Mapping[str, Any], spec: Any, title: str | None = None) -> Figure:
    """All that a policy gets at one step: both images at their true resolution, and what the robot feels.

    Args:
        seen: "image" and "wrist_image" ``(h, w, 3)`` uint8, "state" ``(s,)``, "instruction".
        spec: an `ActionSpec`: ``state_names``, ``state_units``.
        title: a sentence; by default the instruction and the size of the images.
    """
    fig, axes = plt.subplots(1, 3, figsize=(PAGE_IN, 2.5), layout="constrained")
    for ax, key in zip(axes, ("image", "wrist_image"), strict=False):
        ax.imshow(seen[key], interpolation="nearest")
        _bare(ax, NEUTRAL)
        ax.set_xlabel(f"{key.replace('_', ' ')}, {seen[key].shape[1]} × {seen[key].shape[0]} px")
    values = zip(spec.state_names, seen["state"], spec.state_units, strict=True)
    axes[2].set_axis_off()
    axes[2].text(0.0, 0.97, "state", fontweight="bold", va="top", transform=axes[2].transAxes)
    for i, (name, value, unit) in enumerate(values):
        line, font = f"{name:<16}{value:+.3f} {unit}", {"family": "monospace", "fontsize": 7.5}
        axes[2].text(0.0, 0.85 - 0.11 * i, line, va="top", transform=axes[2].transAxes, **font)
    _headline(fig, title or f"“{seen['instruction']}”: two small images, {len(spec.state_names)} numbers and a sentence")
    return fig


@_styled
def token_map(tokens: Sequence[str], kinds: Sequence[str], title: str | None = None) -> Figure:
    """What the model reads, as a ribbon of coloured tokens; runs of image tokens are folded to "64 x image".

    Args:
        tokens: the token's texts, in order.
        kinds: for each, one of "image", "instruction", "state", "action", "other".
        title: a sentence; by default one made from the numbers drawn.
    """
    unknown = sorted(set(kinds) - set(TOKEN_COLORS))
    if len(tokens) != len(kinds) or unknown:
        raise ValueError(
            f"token_map: expected one kind of {list(TOKEN_COLORS)} per token; "
            f"got {len(tokens)} tokens and {len(kinds)} kinds, of them unknown: {unknown}"
        )
    boxes, counts = _fold(tokens, kinds), Counter(kinds)
    rows = _wrap([0.075 * max(len(text), 1) + 0.07 for text, _ in boxes], PAGE_IN - 0.1)
    fig = plt.figure(figsize=(PAGE_IN, 0.27 * (rows[-1][0] + 1) + 0.62))
    height = fig.get_figheight()
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, PAGE_IN), ylim=(0, height))
    ax.set_axis_off()
    for (text, kind), (row, left, width) in zip(boxes, rows, strict=True):
        _box(ax, left + 0.05, height - 0.55 - 0.27 * row, width, text, TOKEN_COLORS[kind])
    seen = [kind for kind in TOKEN_COLORS if counts[kind]]
    _legend_row(ax, [(f"{counts[kind]} {kind}", TOKEN_COLORS[kind]) for kind in seen])
    listed = ", ".join(f"{counts[kind]} {kind}" for kind in seen)
    ax.text(0.06, height - 0.2, title or f"The model reads {len(tokens)} tokens: {listed}", fontsize=8.5)
    return fig


def _fold(tokens: Sequence[str], kinds: Sequence[str], longest: int = 3) -> list[tuple[str, str]]:
    """Tokens as (text, kind); runs of more than ``longest`` image tokens become one box."""
    boxes: list[tuple[str, str]] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        if end < len(tokens) and kinds[end] == kinds[start] == "image":
            continue
        run = list(tokens[start:end])
        texts = [f"{len(run)} × image"] if len(run) > longest else [t.replace("\n", "⏎").strip(" Ġ▁") or "␣" for t in run]
        boxes += [(text, kinds[start]) for text in texts]
        start = end
    return boxes


def _wrap(widths: Sequence[float], room: float, gap: float = 0.03) -> list[tuple[int, float, float]]:
    """Lay boxes out like words: (row, left, width) of each, in the units of ``widths``."""
    placed, row, left = [], 0, 0.0
    for width in widths:
        if left and left + width > room:
            row, left = row + 1, 0.0
        placed.append((row, left, width))
        left += width + gap
    return placed


def _box(ax: Axes, left: float, bottom: float, width: float, text: str, color: str) -> None:
    shape = FancyBboxPatch((left, bottom), width, 0.2, boxstyle="round,pad=0,rounding_size=0.03", fc=color, ec="none", alpha=0.32)
    ax.add_patch(shape)
    ax.text(left + width / 2, bottom + 0.095, text, ha="center", va="center", fontsize=7, family="monospace")


def _legend_row(ax: Axes, entries: Sequence[tuple[str, str]]) -> None:
    left = 0.06
    for text, color in entries:
        _box(ax, left, 0.06, 0.16, "", color)
        ax.text(left + 0.21, 0.15, text, va="center", fontsize=7)
        left += 0.38 + 0.062 * len(text)


@_styled
def success_bars(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Success rates with 95 % Wilson intervals; a published value is a hollow marker.

    Args:
        table: columns ``name``, ``successes``, ``n`` and, where known, ``published`` (rate in [0, 1]) and ``source``.
        title: a sentence; by default one made from the numbers drawn.
    """
    rates = [wilson(int(s), int(n)) for s, n in zip(table["successes"], table["n"], strict=True)]
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 0.26 * len(rates) + 0.85), layout="constrained")
    for y, (name, rate) in enumerate(zip(table["name"], rates, strict=True)):
        color, at = structure_color(name), 100 * rate.rate
        ax.barh(y, at, color=color, alpha=0.25, height=0.66)
        ax.errorbar(at, y, xerr=[[at - 100 * rate.low], [100 * rate.high - at]], color=color, fmt="o", ms=3.5, capsize=2)
        ax.text(101, y, f"{at:.0f} % of {rate.n}", va="center", fontsize=6.5, color=NEUTRAL)
    _published(ax, table)
    ax.set(yticks=range(len(rates)), yticklabels=table["name"], xlim=(0, 100), ylim=(len(rates) - 0.5, -0.5))
    ax.set_xlabel("success rate [%], bars: 95 % interval")
    ax.grid(False, axis="y")
    best = int(np.argmax([rate.rate for rate in rates]))
    name = str(table["name"].iloc[best])
    _headline(fig, title or f"{name[:1].upper()}{name[1:]} solves {rates[best].successes} of {rates[best].n} episodes")
    return fig


def _published(ax: Axes, table: pd.DataFrame) -> None:
    known = table["published"].notna().to_numpy() if "published" in table else np.zeros(len(table), bool)
    if not known.any():
        return
    source = table["source"][known].dropna().unique() if "source" in table else []
    label = "published" + (f" ({', '.join(source)})" if len(source) else "")
    at = 100 * table["published"][known].astype(float)
    ax.plot(at, np.flatnonzero(known), "D", mfc="none", mec="black", ms=4.5, mew=0.9, label=label, zorder=4)
    ax.figure.legend(loc="outside lower right")


@_styled
def loss_curves(log_history: Sequence[Mapping[str, Any]], title: str | None = None) -> Figure:
    """Every loss that a Trainer logged, over optimiser steps, on a logarithmic axis.

    Args:
        log_history: ``trainer.state.log_history``; keys that contain "loss" are drawn, "train_loss" (a run's mean) is not.
        title: a sentence; by default one made from the numbers drawn.
    """
    table = pd.DataFrame(list(log_history))
    names = [c for c in table.columns if "loss" in c and c != "train_loss"]
    if not names or "step" not in table:
        raise ValueError(f"loss_curves: expected records with 'step' and a loss, got the keys {sorted(table.columns)}")
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 2.2), layout="constrained")
    for color, name in zip(PALETTE, names, strict=False):
        known = table[["step", name]].dropna()
        held_out = name.startswith("eval")
        ax.plot(known["step"], known[name], "o--" if held_out else "-", ms=3, color=color, label=name.replace("_", " "))
    ax.set(xlabel="optimiser step", ylabel="loss [1]")
    if (table[names].min() > 0).all():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend()
    first, last = table[names[0]].dropna().iloc[[0, -1]]
    moved = "falls" if last < first else "does not fall"
    _headline(fig, title or f"{names[0].replace('_', ' ').capitalize()} {moved}: {first:.3g} to {last:.3g}")
    return fig


@_styled
def estimates(table: pd.DataFrame, title: str, n_columns: int = 4) -> Figure:
    """Estimates with their intervals, a panel per quantity; one without an interval (a published value) is a hollow marker.

    Args:
        table: columns ``name``, ``panel`` (the quantity with its unit in brackets; becomes the axis label), ``value``, and
            ``low`` and ``high``, missing where no interval is known.
        title: a sentence.
        n_columns: panels side by side.
    """
    names, panels = list(dict.fromkeys(table["name"])), list(dict.fromkeys(table["panel"]))
    n_columns = min(n_columns, len(panels))
    n_rows = -(-len(panels) // n_columns)
    size = (PAGE_IN if n_columns > 1 else COLUMN_IN, n_rows * (0.19 * len(names) + 0.5) + 0.35)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, panel in zip(axes.flat, panels, strict=False):
        _estimates_panel(ax, table[table["panel"] == panel], names)
        ax.set_xlabel(panel)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_axis_off()
    _headline(fig, title)
    return fig


def _estimates_panel(ax: Axes, rows: pd.DataFrame, names: Sequence[str]) -> None:
    for name, value, low, high in rows[["name", "value", "low", "high"]].itertuples(index=False):
        y = names.index(name)
        known = structure_color(name)
        color = known if known != NEUTRAL else PALETTE[y % len(PALETTE)]
        if pd.isna(low):
            ax.plot(value, y, "D", mfc="none", mec="black", ms=4.5, mew=0.9)
        else:
            spread = [[max(value - low, 0)], [max(high - value, 0)]]
            ax.errorbar(value, y, xerr=spread, color=color, fmt="o", ms=3.5, capsize=2)
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    ax.margins(x=0.12)
    largest = rows[["value", "high"]].max().max()
    if (rows["value"] >= 0).all() and not (rows["low"] < 0).any() and largest > 0:
        ax.set_xlim(0, 1.12 * largest)
    ax.grid(False, axis="y")


@_styled
def compare_losses(logs: Mapping[str, Sequence[Mapping[str, Any]]], key: str = "arm_loss", title: str | None = None) -> Figure:
    """One loss of several trainings over the samples' share of the budget, on a logarithmic axis.

    Args:
        logs: name -> what the training logged, with ``step``, ``n_steps`` and ``key``.
        key: which loss.
        title: a sentence; by default one made from the numbers drawn.
    """
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 2.2), layout="constrained")
    last: dict[str, float] = {}
    for i, (name, log) in enumerate(logs.items()):
        table = pd.DataFrame(list(log))[["step", "n_steps", key]].dropna().drop_duplicates("step")
        known = structure_color(name)
        color, share = (PALETTE[i] if known == NEUTRAL else known), 100 * table["step"] / table["n_steps"]
        ax.plot(share, table[key], color=color, alpha=0.25, linewidth=0.8)
        ax.plot(share, table[key].ewm(span=10).mean(), "-o" if len(table) == 1 else "-", color=color, label=name)
        last[name] = float(table[key].ewm(span=10).mean().iloc[-1])
    ax.set(xlabel="share of the training budget [%]", ylabel=f"{key.replace('_', ' ')} [1]", yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend()
    lowest = min(last, key=last.__getitem__)
    _headline(fig, title or f"Lowest {key.replace('_', ' ')} at the end: {lowest}, {last[lowest]:.3g}")
    return fig


@_styled
def error_against_success(table: pd.DataFrame, title: str) -> Figure:
    """Success rate over open-loop error: does a lower error mean more success?

    Args:
        table: columns ``name`` (becomes colour and marker), ``error_m`` [m], ``successes``, ``n``.
        title: a sentence.
    """
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 2.4), layout="constrained")
    for i, (name, rows) in enumerate(table.groupby("name", sort=False)):
        rates = [wilson(int(s), int(n)) for s, n in zip(rows["successes"], rows["n"], strict=True)]
        at = np.array([100 * r.rate for r in rates])
        spread = [at - [100 * r.low for r in rates], [100 * r.high for r in rates] - at]
        style = {"fmt": "osD^vP"[i % 6], "ms": 3.5, "color": PALETTE[i % len(PALETTE)], "elinewidth": 0.6, "alpha": 0.85}
        ax.errorbar(1000 * rows["error_m"], at, yerr=spread, label=name, **style)
    ax.set(xlabel="open-loop position error of the first action [mm]", ylabel="success rate [%]", ylim=(-4, 104))
    ax.set_xlim(left=0)
    fig.legend(loc="outside lower left", ncols=2)
    _headline(fig, title)
    return fig


@_styled
def grounding_overlay(
    image: UInt8[np.ndarray, "h w 3"],
    points: Num[np.ndarray, "m 2"] | Sequence[Sequence[float | int]],
    labels: Sequence[str],
    title: str | None = None,
) -> Figure:
    """Where the model says things are: labelled rings on the image.

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
    _bare(ax)
    _headline(fig, title or f"The model points at {len(points)} thing{'s' if len(points) != 1 else ''}")
    return fig


@_styled
def attention_overlay(image: UInt8[np.ndarray, "h w 3"], weights: Num[np.ndarray, "h_p w_p"], title: str | None = None) -> Figure:
    """The image beside where the action token looks.

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
        _bare(ax)
    bar = fig.colorbar(heat, ax=axes, location="bottom", aspect=40, pad=0.02)
    bar.set_label("attention per patch [%]")
    top = np.sort(share.ravel())[::-1][: max(1, share.size // 10)].sum()
    _headline(fig, title or f"A tenth of the patches holds {top:.0f} % of the attention")
    return fig


def explore(episode: Mapping[str, Any]) -> Any:
    """A slider through an episode; its static twin, for paper and GitHub, is `filmstrip`.

    Args:
        episode: "image" ``(t, h, w, 3)`` uint8, and where present "wrist_image" (the same) and "instruction".

    Returns:
        An ``ipywidgets.VBox``; its slider is ``.children[-1].children[-1]``.
    """
    import ipywidgets as widgets

    cameras = [name for name in ("image", "wrist_image") if episode.get(name) is not None]
    pngs = {name: [_png(frame) for frame in episode[name]] for name in cameras}
    screens = {name: widgets.Image(value=pngs[name][0], format="png", layout={"width": "256px"}) for name in cameras}
    last = len(pngs["image"]) - 1
    play, slider = widgets.Play(max=last, interval=100), widgets.IntSlider(max=last, description="step")
    widgets.jslink((play, "value"), (slider, "value"))

    def show(change: Mapping[str, Any]) -> None:
        for name in cameras:
            screens[name].value = pngs[name][change["new"]]

    slider.observe(show, names="value")
    told = widgets.Label(str(episode.get("instruction", "")))
    return widgets.VBox([told, widgets.HBox(list(screens.values())), widgets.HBox([play, slider])])


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


def mp4(frames: Frames, fps: float | int) -> bytes:
    """Frames ``(t, h, w, 3)`` uint8 as an H.264 file that every browser plays, enlarged to at least 256 pixels."""
    from fractions import Fraction

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
