"""Tables of the README from what benchmarks measured: success of each kind of robot, and of each action head."""

import json
from pathlib import Path
from typing import Any

from rvlm.data.actions import ActionSpec

SHOWN_CONTROLS = ("trained", "shuffled language", "black images", "random actions", "expert")  # columns, in this order


def robots_rows(results: Path) -> tuple[list[str], list[list[str]], str]:
    """Head, rows and note of the table of robots (`benchmarks/robots.py`); no rows where it was not measured."""
    record = _record(results / "robots.json")
    of_robot: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record.get("rows", ()):
        of_robot.setdefault(row["robot"], {})[row["control"]] = row
    rows = [
        [
            robot.removeprefix("tabletop/"),
            _actions(robot),
            *(_rate(cells[control]) for control in SHOWN_CONTROLS),
            _above(robot, record),
        ]
        for robot, cells in of_robot.items()
    ]
    note = " A policy is above a control where the paired difference is, adjusted for all controls of its robot (Holm)."
    return ["Robot", "Actions", *(name.capitalize() for name in SHOWN_CONTROLS), "Above"], rows, _note(record) + note


def robot_tasks_rows(results: Path) -> tuple[list[str], list[list[str]], str]:
    """Head, rows and note of the table of robots' tasks (`benchmarks/robots.py`); no rows where it was not measured."""
    of_task: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in _record(results / "robots.json").get("tasks", ()):
        of_task.setdefault((row["robot"], row["task"]), {})[row["control"]] = row
    shown = ("trained", "black images", "random actions")
    rows = [
        [robot.removeprefix("tabletop/"), f"`{task}`", *(f"{cells[c]['successes']}/{cells[c]['n']}" for c in shown)]
        for (robot, task), cells in of_task.items()
    ]
    return ["Robot", "Task", *(name.capitalize() for name in shown)], rows, "Successes of episodes, task by task."


def heads_rows(results: Path) -> tuple[list[str], list[list[str]], str]:
    """Head, rows and note of the table of action heads (`benchmarks/heads.py`); no rows where it was not measured."""
    record = _record(results / "heads.json")
    rows = [_head_row(row, record) for row in record.get("rows", ())]
    budget = (
        "{samples:,} samples in batches of {batch} of {demonstrations} demonstrations, chunks of {chunk} of which {executed} are "
        "executed. Above chance: the paired difference from random actions in the same scenes, adjusted for all heads (Holm). No "
        "contrast between heads was stated. "
    )
    head = ["Action head", "Its weights", "Success", "Above chance"]
    return head, rows, (budget.format(**record) if record else "") + _note(record)


def _head_row(row: dict[str, Any], record: dict[str, Any]) -> list[str]:
    if row["head"] == "random actions":
        return [row["head"], "–", _rate(row), "–"]
    verdicts = {gain["head"]: gain["verdict"] for gain in record.get("gains", ())}
    return [row["head"], f"{row['head weights']:,}", _rate(row), verdicts.get(row["head"], "not tested")]


def _record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _actions(robot: str) -> str:
    spec = ActionSpec.from_card(robot.replace("/", "_"))
    kinds = dict.fromkeys(group.kind.replace("_", " ") for group in spec.action)
    return f"{spec.n_dims}: {', '.join(kinds)}"


def _above(robot: str, record: dict[str, Any]) -> str:
    verdicts = {gain["control"]: gain["verdict"] for gain in record.get("gains", ()) if gain["robot"] == robot}
    unclear = [f"{control}: {verdict}" for control, verdict in verdicts.items() if verdict != "supported"]
    return "; ".join(unclear) or ("all controls" if verdicts else "not tested")


def _rate(row: dict[str, Any]) -> str:
    return f"{100 * row['rate']:.0f} % ({100 * row['low']:.0f} to {100 * row['high']:.0f})"


def _note(record: dict[str, Any]) -> str:
    if not record:
        return ""
    hardware = record["hardware"]
    return (
        f"{record['trainings']} trainings of each policy, {record['episodes']} episodes in new scenes of each training; 95 % "
        f"intervals over trainings and episodes (commit {record['commit'][:7]}, {hardware['cores']} cores of {hardware['cpu']})."
    )
