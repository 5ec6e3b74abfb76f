"""Losses, errors and rates, each with its interval and its unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from rvlm.report.plots.look import (
    COLUMN_IN,
    NEUTRAL,
    PAGE_IN,
    PALETTE,
    dimension_color,
    figure_title,
    structure_color,
    styled,
)
from rvlm.statistics import wilson


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
    _legend_below(fig, names)
    figure_title(fig, title)
    return fig


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


@styled
def loss_curves(log_history: Sequence[Mapping[str, Any]], title: str | None = None) -> Figure:
    """Every loss that a Trainer logged, over optimiser steps.

    Args:
        log_history: ``trainer.state.log_history``; keys that contain "loss" are drawn, "train_loss" (a run's mean) is not.
        title: a sentence; by default one made from the numbers drawn.
    """
    table = pd.DataFrame(list(log_history))
    names = [c for c in table.columns if "loss" in c and c != "train_loss"]
    if not names or "step" not in table:
        raise ValueError(f"loss_curves: expected records with 'step' and a loss, got the keys {sorted(table.columns)}")
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 2.4), layout="constrained")
    for color, name in zip(PALETTE, names, strict=False):
        known = table[["step", name]].dropna()
        held_out = name.startswith("eval")
        ax.plot(known["step"], known[name], "o--" if held_out else "-", ms=3, color=color, label=name.replace("_", " "))
    ax.set(xlabel="optimiser step", ylabel="loss")
    _scale_losses(ax)
    _legend_below(fig, names)
    first, last = table[names[0]].dropna().iloc[[0, -1]]
    moved = "falls" if last < first else "does not fall"
    figure_title(fig, title or f"{names[0].replace('_', ' ').capitalize()} {moved}: {first:.3g} to {last:.3g}")
    return fig


def _legend_below(fig: Figure, names: Sequence[str]) -> None:
    """A legend in as many columns as fit under one column of a page."""
    fig.legend(loc="outside lower left", ncols=min(3, max(1, 62 // (max(map(len, names)) + 5))))


def _scale_losses(ax: Axes) -> None:
    """A logarithmic vertical axis where the curves cross a decade, else a linear one from zero."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines])
    if values.min() > 0 and values.max() >= 10 * values.min():
        ax.set_yscale("log")
        _label_logarithmic(ax)
    else:
        ax.set_ylim(bottom=min(0.0, float(values.min())))


def _label_logarithmic(ax: Axes) -> None:
    """Plain numbers along a logarithmic vertical axis: 1, 2, 5, 10, or powers of ten alone where there are many."""
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=12))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


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
        color = structure_color(name)  # grey where the row's label tells what it is
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
    ax.set(xlabel=x, ylabel=y, xticks=sorted(set(table[x])))
    if table[y].to_numpy().min() >= 0:
        ax.set_ylim(bottom=0)
    fig.legend(loc="outside lower left", ncols=2)
    figure_title(fig, title)
    return fig


@styled
def compare_losses(logs: Mapping[str, Sequence[Mapping[str, Any]]], key: str = "arm_loss", title: str | None = None) -> Figure:
    """One loss of several trainings over the samples' share of the budget; faint as logged, bold smoothed (`smoothed`).

    Args:
        logs: name -> what the training logged, with ``step``, ``n_steps`` and ``key``.
        key: which loss.
        title: a sentence; by default one made from the numbers drawn.
    """
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 2.2 + 0.12 * len(logs)), layout="constrained")
    for i, (name, log) in enumerate(logs.items()):
        table = pd.DataFrame(list(log)).loc[:, ["step", "n_steps", key]].dropna().drop_duplicates("step")
        known = structure_color(name)
        color, share = (PALETTE[i] if known == NEUTRAL else known), 100 * table["step"] / table["n_steps"]
        ax.plot(share, table[key], color=color, alpha=0.25, linewidth=0.8)
        ax.plot(share, smoothed(table[key]), "-o" if len(table) == 1 else "-", color=color, label=name)
    what = key.replace("_", " ")
    ax.set(xlabel="share of the training budget [%]", ylabel=what)
    _scale_losses(ax)
    _legend_below(fig, list(logs))
    figure_title(fig, title or f"{what[:1].upper()}{what[1:]} over the budget, one training each")
    return fig


def smoothed(values: Any, window: int = 9, shortest: int = 60) -> Any:
    """The centred running mean of a `pandas.Series`, which does not lag; one of fewer than `shortest` points stays as it is."""
    return values if len(values) < shortest else values.rolling(window, center=True, min_periods=1).mean()


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
