"""Loss curves of trainings: all losses of one, or one loss of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from rvlm.report.plots.style import COLUMN_IN, NEUTRAL, PALETTE, figure_title, legend_below, structure_color, styled


@styled
def loss_curves(log_history: Sequence[Mapping[str, Any]], title: str | None = None) -> Figure:
    """Every logged loss of one training over optimiser steps.

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
    legend_below(fig, names)
    first, last = table[names[0]].dropna().iloc[[0, -1]]
    moved = "falls" if last < first else "does not fall"
    figure_title(fig, title or f"{names[0].replace('_', ' ').capitalize()} {moved}: {first:.3g} to {last:.3g}")
    return fig


@styled
def compare_losses(logs: Mapping[str, Sequence[Mapping[str, Any]]], key: str = "arm_loss", title: str | None = None) -> Figure:
    """One loss of several trainings over the share of the training budget; faint as logged, bold smoothed (`smoothed`).

    Args:
        logs: name -> what the training logged, with ``step``, ``n_steps`` and ``key``.
        key: name of the loss.
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
    legend_below(fig, list(logs))
    figure_title(fig, title or f"{what[:1].upper()}{what[1:]} over the budget, one training each")
    return fig


def smoothed(values: Any, window: int = 9, shortest: int = 60) -> Any:
    """The centred running mean of a `pandas.Series`; a series of fewer than `shortest` points stays as it is."""
    return values if len(values) < shortest else values.rolling(window, center=True, min_periods=1).mean()


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
