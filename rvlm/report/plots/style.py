"""The style of all figures: sizes, fonts, and one colour per action dimension or policy structure everywhere."""

from __future__ import annotations

import functools
import textwrap
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CHARACTERS_PER_IN = 15.5  # of a title
COLUMN_IN, PAGE_IN = 3.5, 7.16  # widths of one column and of a two-column page [inch]
PALETTE = sns.color_palette("colorblind").as_hex()  # ten colours, safe for the common colour-vision deficiencies
DIMENSIONS = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
STRUCTURE_NAMES = ("one-step discrete", "one-step continuous", "interleaved continuous", "policy-head continuous")
SUCCESS, FAILURE, NEUTRAL = PALETTE[2], PALETTE[3], "#606060"
RC: Any = {
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
    """Set matplotlib's defaults to this style, for a notebook's own plots; the package's figures have it anyway."""
    plt.rcParams.update(RC)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: draw a figure in this style, whatever a notebook has set, and close it in pyplot."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        with plt.rc_context(RC):
            fig = draw(*args, **kwargs)
            plt.close(fig)  # else a notebook shows it twice: once flushed by pyplot, once as the cell's value
        return fig

    return drawn


def dimension_color(name: str) -> str:
    """The colour of an action dimension; a name outside `DIMENSIONS` gets a colour by its hash, the same in every figure."""
    index = DIMENSIONS.index(name) if name in DIMENSIONS else zlib.crc32(name.encode())
    return PALETTE[index % len(PALETTE)]


def structure_color(name: str) -> str:
    """The colour of a policy structure ("policy-head continuous" or "policy_head_continuous"); others are grey."""
    words = name.lower().replace("-", " ").replace("_", " ")
    match = [s for s in STRUCTURE_NAMES if s.replace("-", " ") in words]
    return PALETTE[STRUCTURE_NAMES.index(match[0])] if match else NEUTRAL


def unit_in_brackets(name: str, unit: str) -> str:
    """An axis label: "dx [m]"; a number without a unit has no brackets."""
    return name if unit == "1" else f"{name} [{unit}]"


def figure_title(fig: Figure, text: str) -> None:
    """Set the title of a figure, wrapped to its width."""
    width = int(CHARACTERS_PER_IN * fig.get_figwidth())
    fig.suptitle("\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in text.split("\n")), x=0.01, ha="left")


def legend_below(fig: Figure, names: Sequence[str]) -> None:
    """A legend in as many columns as fit under one column of a page."""
    fig.legend(loc="outside lower left", ncols=min(3, max(1, 62 // (max(map(len, names)) + 5))))


def hide_axes(ax: Axes, color: str | None = None) -> None:
    """Axes of an image: no ticks, and a border only if a colour is given."""
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=color is not None, color=color, linewidth=1.8)
