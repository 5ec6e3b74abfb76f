"""What was found: findings, tables, pages, plots, widgets. What notebooks call stands here, the rest in the modules."""

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
