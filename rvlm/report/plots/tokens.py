"""Token sequences: what a model reads, coloured by role, and which token attends to which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Num
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

from rvlm.report.plots.style import (
    PAGE_IN,
    PALETTE,
    figure_title,
    styled,
)

TOKEN_COLORS: dict[str, str] = dict(
    zip(("image", "instruction", "state", "action", "other"), [*PALETTE[:4], "#b0b0b0"], strict=True)
)


@styled
def token_map(tokens: Sequence[str], kinds: Sequence[str], title: str | None = None) -> Figure:
    """The input sequence as coloured tokens; runs of image tokens are folded to "64 x image".

    Args:
        tokens: the tokens' texts, in order.
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
    present = [kind for kind in TOKEN_COLORS if counts[kind]]
    _legend_row(ax, [(f"{counts[kind]} {kind}", TOKEN_COLORS[kind]) for kind in present])
    listed = ", ".join(f"{counts[kind]} {kind}" for kind in present)
    ax.text(0.06, height - 0.2, title or f"The model reads {len(tokens)} tokens: {listed}", fontsize=8.5)
    return fig


@styled
def attention_masks(weights: Mapping[str, Num[np.ndarray, "l_q l_k"]], kinds: Mapping[str, Sequence[str]], title: str) -> Figure:
    """Attention masks, a panel per structure: a row for each query token, coloured where it attends.

    Args:
        weights: name -> attention of each query token (row) to each key token (column); all above zero is drawn alike.
        kinds: name -> kind of each token, as `token_map` takes them; rows of action tokens are drawn in full colour.
        title: a sentence.
    """
    fig, axes = plt.subplots(1, len(weights), figsize=(PAGE_IN, 0.45 + 3.1 * 2 / max(2, len(weights))), layout="constrained")
    for ax, (name, attention) in zip(np.atleast_1d(axes), weights.items(), strict=True):
        color = np.array([to_rgb(TOKEN_COLORS[kind]) for kind in kinds[name]])
        strength = np.where([kind == "action" for kind in kinds[name]], 0.95, 0.3)[:, None] * (attention > 0)
        ax.imshow(1 - strength[..., None] * (1 - color[None]), interpolation="nearest", aspect="equal")
        ax.set(xlabel="key: token position", ylabel="query: token position", title=name)
        ax.grid(False)
    handles = [Patch(color=TOKEN_COLORS[kind], label=kind) for kind in TOKEN_COLORS if any(kind in k for k in kinds.values())]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure_title(fig, title)
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
