"""Figures of why a policy fails: results of `rvlm.diagnosis.checklist`, the evidence of its checks, and failures by kind."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rvlm.report.plots.style import FAILURE, NEUTRAL, PAGE_IN, PALETTE, SUCCESS, figure_title, styled


@styled
def diagnosis(table: pd.DataFrame, checks: list[str], title: str) -> Figure:
    """Results of the checks per diagnosis: green where a check passes, red where it fails, empty where it did not run.

    Args:
        table: a row per diagnosis: ``name``, the ``check`` that failed (missing if none did) and the ``fault`` it names.
        checks: names of all checks, in the order in which they run.
        title: a sentence.
    """
    fig, ax = plt.subplots(figsize=(PAGE_IN, 0.19 * len(table) + 0.9), layout="constrained")
    for y, (failed, fault) in enumerate(zip(table["check"], table["fault"], strict=True)):
        last = checks.index(failed) if failed in checks else len(checks)
        for x in range(min(last + 1, len(checks))):
            color, mark = (FAILURE, "fails") if x == last else (SUCCESS, "passes")
            ax.add_patch(Rectangle((x + 0.04, y - 0.42), 0.92, 0.84, color=color, alpha=0.75, linewidth=0))
            ax.text(x + 0.5, y, mark, ha="center", va="center", fontsize=6, color="white")
        ax.text(len(checks) + 0.15, y, fault if pd.notna(fault) else "no fault", va="center", fontsize=6.5)
    ax.set(xlim=(0, len(checks) + 3.6), ylim=(len(table) - 0.5, -0.5), yticks=range(len(table)), yticklabels=table["name"])
    ax.set_xticks([x + 0.5 for x in range(len(checks))], checks)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelsize=6.5)
    ax.tick_params(axis="x", labelsize=6)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
    figure_title(fig, title)
    return fig


@styled
def evidence(panels: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Evidence of checks: one panel each, one bar per way of reading the same numbers.

    Args:
        panels: name of a panel -> table with ``candidate`` and one column of numbers, named with its unit in brackets.
        title: a sentence.
    """
    n_rows = max(len(table) for table in panels.values())
    fig, axes = plt.subplots(1, len(panels), figsize=(PAGE_IN, 0.21 * n_rows + 1.0), squeeze=False, layout="constrained")
    for ax, (name, table) in zip(axes.flat, panels.items(), strict=True):
        column = next(c for c in table.columns if c != "candidate")
        values = table[column].to_numpy(float)
        colors = [PALETTE[0] if i == 0 else NEUTRAL for i in range(len(values))]
        ax.barh(range(len(values)), values, color=colors, alpha=0.8, height=0.66)
        for y, value in enumerate(values):
            ax.text(max(value, 0), y, f" {value:.2g}", va="center", fontsize=6)
        ax.set(yticks=range(len(values)), yticklabels=table["candidate"], ylim=(n_rows - 0.5, -0.5), xlabel=column, title=name)
        ax.set_xlim(min(0, 1.1 * values.min()), 1.18 * max(values.max(), 1e-9))
        ax.title.set_fontsize(7.5)
        ax.xaxis.label.set_fontsize(6.5)
        ax.tick_params(axis="y", labelsize=6.5)
        ax.grid(False, axis="y")
    figure_title(fig, title)
    return fig


@styled
def failures(table: pd.DataFrame, kinds: list[str], title: str) -> Figure:
    """Shares of episodes that failed, by kind, one bar per group.

    Args:
        table: a row per group and kind: ``group``, ``failure``, ``share`` of the group's episodes in [0, 1].
        kinds: of failure, in the order in which they are stacked.
        title: a sentence.
    """
    shares = table.pivot(index="group", columns="failure", values="share").reindex(columns=kinds).fillna(0)
    shares = shares.loc[shares.sum(axis=1).sort_values(ascending=False).index]
    fig, ax = plt.subplots(figsize=(PAGE_IN, 0.22 * len(shares) + 1.0), layout="constrained")
    left = pd.Series(0.0, index=shares.index)
    for color, kind in zip(PALETTE, kinds, strict=False):
        ax.barh(range(len(shares)), 100 * shares[kind], left=100 * left, color=color, height=0.7, label=kind)
        left += shares[kind]
    ax.set(yticks=range(len(shares)), yticklabels=shares.index, ylim=(len(shares) - 0.5, -0.5), xlabel="episodes that failed [%]")
    ax.set_xlim(left=0)
    ax.grid(False, axis="y")
    fig.legend(loc="outside lower left", ncols=len(kinds))
    figure_title(fig, title)
    return fig
