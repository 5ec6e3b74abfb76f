"""Memory of training: its parts against the memory of GPUs, and planned against measured values."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from rvlm.report.plots.style import COLUMN_IN, NEUTRAL, PAGE_IN, PALETTE, figure_title, styled


@styled
def memory_bars(table: pd.DataFrame, gpus: Mapping[str, float], title: str) -> Figure:
    """Peak memory of a training step as stacked bars of its parts; dashed lines are the memory of GPUs, as far as the bars.

    Args:
        table: column ``name`` (a row of the figure), and one column [GB] for each part.
        gpus: name -> memory [GB].
        title: a sentence.
    """
    parts = [column for column in table if column != "name"]
    fig, ax = plt.subplots(figsize=(PAGE_IN, 0.19 * len(table) + 1.1), layout="constrained")
    left = np.zeros(len(table))
    for part, color in zip(parts, PALETTE, strict=False):
        ax.barh(table["name"], table[part], left=left, height=0.7, color=color, alpha=0.75, label=part)
        left += table[part].to_numpy()
    for y, total in enumerate(left):
        ax.text(total, y, f" {total:.1f}", va="center", fontsize=6, color=NEUTRAL)
    for holds in sorted({holds for holds in gpus.values() if holds < 1.08 * left.max()}):
        names = ", ".join(name for name, memory in gpus.items() if memory == holds)
        ax.axvline(holds, color="black", linestyle="--", linewidth=0.7)
        ax.text(holds, -0.9, f"{names}\n{holds:g} GB", ha="center", va="bottom", fontsize=6)
    ax.set(xlabel="peak memory of a training step [GB]", ylim=(len(table) - 0.5, -0.6), xlim=(0, 1.08 * left.max()))
    ax.grid(False, axis="y")
    fig.legend(loc="outside lower left", ncols=len(parts))
    figure_title(fig, title)
    return fig


@styled
def planned_and_measured(table: pd.DataFrame, unit: str, title: str) -> Figure:
    """Planned against measured values; they are equal on the line and differ by at most 10 % in the band.

    Args:
        table: columns ``name`` (colour and marker), ``planned``, ``measured``.
        unit: of both.
        title: a sentence.
    """
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 2.5), layout="constrained")
    ends = np.array([0.8 * table[["planned", "measured"]].min().min(), 1.2 * table[["planned", "measured"]].max().max()])
    ax.plot(ends, ends, color="black", linewidth=0.8)
    ax.fill_between(ends, 0.9 * ends, 1.1 * ends, color=NEUTRAL, alpha=0.2, linewidth=0)
    for i, (name, rows) in enumerate(table.groupby("name", sort=False)):
        ax.plot(rows["measured"], rows["planned"], "osD^vP"[i % 6], color=PALETTE[i % len(PALETTE)], ms=4.5, label=name)
    ax.set(xlabel=f"measured [{unit}]", ylabel=f"planned [{unit}]", xscale="log", yscale="log", xlim=ends, ylim=ends)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.legend()
    figure_title(fig, title)
    return fig
