"""What was found: findings, tables, pages, plots, widgets. What notebooks call stands here, the rest in the modules."""

from rvlm.report.findings import (
    Finding,
    UncomputedNumber,
    export,
    finding,
    fine_print,
    load_findings,
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
    "fine_print",
    "load_findings",
    "published",
    "save_episodes",
    "save_table",
    "show_source",
]
