"""Continual learning and hyperparameter search: success after each stage, and every trial's settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Num
from matplotlib.figure import Figure

from rvlm.report.plots.style import COLUMN_IN, PAGE_IN, figure_title, styled


@styled
def forgetting_matrices(
    rates: dict[str, Num[np.ndarray, "n_after n_tasks"]], after: Sequence[str], tasks: Sequence[str], title: str
) -> Figure:
    """Success at every task after every stage, a panel per method; entries left of the diagonal are tasks learned before.

    Args:
        rates: method -> success rates in [0, 1], a row after each stage, a column for each task.
        after: names of the rows.
        tasks: names of the columns.
        title: a sentence.
    """
    fig, axes = plt.subplots(1, len(rates), figsize=(PAGE_IN, 0.42 * len(after) + 1.5), layout="constrained", squeeze=False)
    for ax, (method, values) in zip(axes[0], rates.items(), strict=True):
        ax.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            ax.text(column, row, f"{100 * value:.0f} %", ha="center", va="center", color="white" if value < 0.6 else "black")
        ax.set(xticks=range(len(tasks)), yticks=range(len(after)), title=method, xlabel="success at")
        ax.set_xticklabels(tasks, rotation=20, ha="right")
        ax.set_yticklabels(after if ax is axes[0][0] else [])
        ax.grid(False)
    axes[0][0].set_ylabel("after learning")
    figure_title(fig, title)
    return fig


@styled
def parallel_coordinates(trials: pd.DataFrame, settings: Sequence[str], value: str, title: str) -> Figure:
    """Every trial of a search as a line through its settings, coloured by its final value; dashed where it was pruned.

    Args:
        trials: a column for each of `settings`, and `value`, missing where a trial was pruned.
        settings: names of columns, in the order of the axes.
        value: name of the column to minimise, with its unit in brackets.
        title: a sentence.
    """
    fig, ax = plt.subplots(figsize=(COLUMN_IN, 2.6), layout="constrained")
    levels = {name: sorted(trials[name].unique()) for name in settings}
    heights = {n: {v: i / max(1, len(values) - 1) for i, v in enumerate(values)} for n, values in levels.items()}
    ends = trials[value].to_numpy(float)
    norm = plt.Normalize(float(np.nanmin(ends)), float(np.nanmax(ends)))
    rng, colors = np.random.default_rng(0), plt.get_cmap("viridis_r")
    for _, trial in trials.sort_values(value, ascending=False, na_position="first").iterrows():
        y = [heights[name][trial[name]] + rng.uniform(-0.03, 0.03) for name in settings]
        is_pruned = bool(np.isnan(trial[value]))
        line: dict[str, Any] = {"color": "0.6", "linestyle": "--"} if is_pruned else {"color": colors(norm(trial[value]))}
        ax.plot(range(len(settings)), y, linewidth=1.0, **line)
    for x, name in enumerate(settings):
        for level, y in heights[name].items():
            ax.text(x, y, f" {level:g}", fontsize=6, va="center", bbox={"color": "white", "alpha": 0.6, "pad": 0.3})
    ax.set(xticks=range(len(settings)), yticks=[], ylim=(-0.1, 1.1), xlim=(-0.2, len(settings) - 0.6))
    ax.set_xticklabels([name.replace("_", "\n") for name in settings])
    fig.colorbar(plt.cm.ScalarMappable(norm, colors), ax=ax, label=value)
    figure_title(fig, title)
    return fig
