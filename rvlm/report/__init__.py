"""Results: findings, tables, pages, plots, widgets. The functions that notebooks call are here, the rest in the modules.

Modules:
    findings: findings, export of figures and tables, provenance.
    withdrawn: withdrawn statements, out of findings and executed notebooks.
    copies: executed notebooks, made small.
    notebooks: parameters of notebooks: cells, profiles, validation.
    page: the HTML report.
    gpu_rows: rows of `make gpu` as a table.
    measured_tables: success by robot and by action head, as their benchmarks measured it.
    readme: the computed parts of the README.
    plots: the figures, all in one style.
    widgets: teleoperation in a notebook.
"""

from rvlm.report.findings import (
    Finding,
    UncomputedNumber,
    export,
    finding,
    load_findings,
    provenance_line,
    published,
    save_episodes,
    save_table,
    show_source,
)

__all__ = [
    "Finding",
    "UncomputedNumber",
    "export",
    "finding",
    "load_findings",
    "provenance_line",
    "published",
    "save_episodes",
    "save_table",
    "show_source",
]
