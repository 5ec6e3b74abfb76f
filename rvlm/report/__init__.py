"""Results: findings, tables, pages, plots, widgets. The functions that notebooks call are here, the rest in the modules."""

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
