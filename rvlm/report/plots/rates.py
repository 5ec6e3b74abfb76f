"""Success rates with their intervals, and titles that name a winner only where the intervals show one."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rvlm.report.plots.style import COLUMN_IN, NEUTRAL, PALETTE, figure_title, legend_below, structure_color, styled
from rvlm.statistics import wilson


@styled
def success_bars(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Success rates with 95 % intervals; a published value is a hollow marker.

    Args:
        table: columns ``name``, ``successes``, ``n``; where the interval is not Wilson's, ``rate``, ``low``, ``high``; where
            there are several, ``trainings``; and, where known, ``published`` (rate in [0, 1]) and ``source``.
        title: a sentence; by default one made from the numbers drawn.
    """
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 0.26 * len(table) + 0.85), layout="constrained")
    for y, (name, counts, at, low, high) in enumerate(zip(table["name"], _counts(table), *_rates(table), strict=True)):
        color = structure_color(name)
        ax.barh(y, at, color=color, alpha=0.25, height=0.66)
        ax.errorbar(at, y, xerr=[[at - low], [high - at]], color=color, fmt="o", ms=3.5, capsize=2)
        ax.text(103, y, counts.replace(" % of ", " %, ").replace(" of ", "/"), va="center", fontsize=6.5, color=NEUTRAL)
    _published(ax, table)
    ax.set(yticks=range(len(table)), yticklabels=table["name"], xlim=(0, 102), ylim=(len(table) - 0.5, -0.5))
    ax.set_xlabel("success rate [%], whiskers: 95 % interval")
    ax.grid(False, axis="y")
    figure_title(fig, title or verdict_title(table))
    return fig


@styled
def rates_by_group(table: pd.DataFrame, title: str, label: str = "right [%], whiskers: 95 % interval") -> Figure:
    """Rates with 95 % intervals, several names side by side in each group.

    Args:
        table: columns ``group`` (a row of the figure), ``name`` (colour and marker), ``successes``, ``n``, and where the
            interval is not Wilson's, ``rate``, ``low``, ``high``.
        title: a sentence.
        label: of the axis, with its unit.
    """
    groups, names = (list(dict.fromkeys(table[column])) for column in ("group", "name"))
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 0.25 * len(groups) + 0.95), layout="constrained")
    for i, name in enumerate(names):
        rows = table.loc[table["name"] == name]
        at, low, high = _rates(rows)
        spread = [at - low, high - at]
        y = [groups.index(g) + 0.5 * (i - (len(names) - 1) / 2) / len(names) for g in rows["group"]]
        ax.errorbar(at, y, xerr=spread, fmt="osD^vP"[i % 6], ms=3.2, color=PALETTE[i % len(PALETTE)], elinewidth=0.9, label=name)
    ax.set(yticks=range(len(groups)), yticklabels=groups, ylim=(len(groups) - 0.5, -0.5), xlim=(-3, 103), xlabel=label)
    ax.grid(False, axis="y")
    legend_below(fig, names)
    figure_title(fig, title)
    return fig


@styled
def error_against_success(table: pd.DataFrame, title: str) -> Figure:
    """Success rate over open-loop error: does a lower error mean more success?

    Args:
        table: columns ``name`` (becomes colour and marker), ``error_m`` [m], ``successes``, ``n``.
        title: a sentence.
    """
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 2.4), layout="constrained")
    for i, (name, rows) in enumerate(table.groupby("name", sort=False)):
        at, low, high = _rates(rows)
        spread = [at - low, high - at]
        style = {"fmt": "osD^vP"[i % 6], "ms": 3.5, "color": PALETTE[i % len(PALETTE)], "elinewidth": 0.6, "alpha": 0.85}
        ax.errorbar(1000 * rows["error_m"], at, yerr=spread, label=name, **style)
    ax.set(xlabel="open-loop position error of the first action [mm]", ylabel="success rate [%]", ylim=(-4, 104))
    ax.set_xlim(left=0)
    fig.legend(loc="outside lower left", ncols=2)
    figure_title(fig, title)
    return fig


def verdict_title(table: pd.DataFrame) -> str:
    """A title that names a winner only where its whole interval lies above that of every other.

    Args:
        table: a row per policy, as `success_bars` takes it.
    """
    at, low, high = _rates(table)
    first = int(np.argmax(at))
    name, counts = str(table["name"].iloc[first]), f"{_counts(table)[first]} episodes"
    name = name[:1].upper() + name[1:]
    if len(table) == 1:
        return f"{name} solves {counts}"
    if low[first] > np.delete(high, first).max():
        return f"{name} solves most: {counts}"
    ends, sizes = sorted({round(float(at.min())), round(float(at.max()))}), sorted(set(table["n"]))
    listed, n = " to ".join(f"{end}" for end in ends), " to ".join(f"{size}" for size in (sizes[0], sizes[-1])[: len(sizes)])
    return f"No winner shown: {listed} % (n = {n})"


def _counts(table: pd.DataFrame) -> list[str]:
    """What each rate counts: "169 of 200"; episodes that several trainings share are counted once: "84 % of 5 × 200"."""
    trainings = table["trainings"] if "trainings" in table else [1] * len(table)
    return [
        f"{s} of {n}" if not t > 1 else f"{100 * s / n:.0f} % of {t:.0f} × {n / t:.0f}"
        for s, n, t in zip(table["successes"], table["n"], trainings, strict=True)
    ]


def _rates(table: pd.DataFrame) -> np.ndarray:
    """Rates and the ends of their intervals [%], (3, n): the table's own, or Wilson's of what it counts."""
    if "low" in table:
        return 100 * table[["rate", "low", "high"]].to_numpy(float).T
    rates = [wilson(int(s), int(n)) for s, n in zip(table["successes"], table["n"], strict=True)]
    return 100 * np.array([(rate.rate, rate.low, rate.high) for rate in rates]).T


def _published(ax: Axes, table: pd.DataFrame) -> None:
    known = table["published"].notna().to_numpy() if "published" in table else np.zeros(len(table), bool)
    if not known.any():
        return
    source = table["source"][known].dropna().unique() if "source" in table else []
    label = "published" + (f" ({', '.join(source)})" if len(source) else "")
    at = 100 * table["published"][known].astype(float)
    ax.plot(at, np.flatnonzero(known), "D", mfc="none", mec="black", ms=4.5, mew=0.9, label=label, zorder=4)
    ax.figure.legend(loc="outside lower right")
