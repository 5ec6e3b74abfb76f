"""Estimates and measured curves with their intervals and units."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from rvlm.report.plots.style import COLUMN_IN, PAGE_IN, PALETTE, dimension_color, figure_title, structure_color, styled

MAX_TICKS = 14


@styled
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
    width = COLUMN_IN if max(map(len, names)) < 40 else PAGE_IN
    size = (PAGE_IN if n_columns > 1 else width, n_rows * (0.19 * len(names) + 0.5) + 0.35)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, panel in zip(axes.flat, panels, strict=False):
        _estimates_panel(ax, table.loc[table["panel"] == panel], names)
        ax.set_xlabel(panel)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_axis_off()
    figure_title(fig, title)
    return fig


def _estimates_panel(ax: Axes, rows: pd.DataFrame, names: Sequence[str]) -> None:
    for name, value, low, high in rows[["name", "value", "low", "high"]].itertuples(index=False):
        y = names.index(name)
        color = structure_color(name)  # grey unless the row names a policy structure
        if pd.isna(low):
            ax.plot(value, y, "D", mfc="none", mec="black", ms=4.5, mew=0.9)
        else:
            spread = [[max(value - low, 0)], [max(high - value, 0)]]
            ax.errorbar(value, y, xerr=spread, color=color, fmt="o", ms=3.5, capsize=2)
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    ax.margins(x=0.12)
    lowest, largest = np.nanmin(rows[["value", "low"]].to_numpy(float)), np.nanmax(rows[["value", "high"]].to_numpy(float))
    if lowest >= 0 and largest > 0:
        ax.set_xlim(0, 1.12 * largest)
    if lowest < 0:
        ax.axvline(0, color="black", linewidth=0.8, zorder=1)
    ax.grid(False, axis="y")


@styled
def lines(table: pd.DataFrame, title: str) -> Figure:
    """Measured curves with their intervals as bands.

    Args:
        table: columns ``name`` (colour and marker), then the quantity on the horizontal axis and the one on the vertical, each
            named with its unit in brackets, then ``low`` and ``high`` of the latter.
        title: a sentence.
    """
    x, y = [column for column in table.columns if column not in ("name", "low", "high")]
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 2.4), layout="constrained")
    for i, (name, rows) in enumerate(table.groupby("name", sort=False)):
        color = PALETTE[i % len(PALETTE)]
        ax.plot(rows[x], rows[y], "-", marker="osD^vP"[i % 6], ms=3.5, color=color, label=name)
        ax.fill_between(rows[x], rows["low"], rows["high"], color=color, alpha=0.15, linewidth=0)
    ticks = sorted(set(table[x]))
    ax.set(xlabel=x, ylabel=y, xticks=ticks[:: -(-len(ticks) // MAX_TICKS)])
    if table[y].to_numpy().min() >= 0:
        ax.set_ylim(bottom=0)
    fig.legend(loc="outside lower left", ncols=2)
    figure_title(fig, title)
    return fig


@styled
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
    figure_title(fig, title)
    return fig
