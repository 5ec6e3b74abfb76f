"""The README's parts that are computed: what was found, what is withdrawn, the notebooks and what they cost."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rvlm.files import PACKAGE, ROOT, atomic_write
from rvlm.report.findings import as_markdown, load_findings, published
from rvlm.report.gpu_rows import measured_steps
from rvlm.report.measured_tables import heads_rows, robot_tasks_rows, robots_rows
from rvlm.report.page import FULL, list_notebooks
from rvlm.report.withdrawn import trainings_of
from rvlm.statistics.verdicts import VERDICT_PATTERN


class Row(NamedTuple):
    """One line of the board.

    Attributes:
        finding: its name.
        claim: as the finding states it (regular expression: later runs may state it in other words).
        text: what is claimed, short, in the field's terms.
        paper: what was published of it: benchmark, split, and its two settings in `published`; or none.
        times: episodes of each training, in multiples of the finding's n.
    """

    finding: str
    claim: str
    text: str
    paper: tuple[str, ...] = ()
    times: int = 1


BOARD = (
    Row(
        "09_ablations",
        "ten times the data helps",
        "ten times the demonstrations",
        ("calvin", "ABCD->D", "vl_pretrained", "data_0.1x"),
    ),
    Row("09_ablations", "learning more than the head helps", "training the language model too, not the head alone"),
    Row("09_ablations", "pre-training helps one step", "VL pre-training¹, one-step policy"),
    Row(
        "09_ablations",
        "pre-training helps a policy head",
        "VL pre-training¹, policy head with memory",
        ("calvin", "ABCD->D", "vl_pretrained", "no_vl_pretraining"),
    ),
    Row(
        "09_ablations",
        "With (new words, having heard any wording|novel instructions, after training on paraphrases)",
        "training on paraphrases, evaluated on novel instructions",
    ),
    Row("09_ablations", "a chunk of 4 beats single actions", "predicting 4 actions, not 1 (the first is executed)"),
    Row(
        "08_cross_embodiment",
        "others first, then own, beats own",
        "other robots' data first, then own²",
        ("simpler", "google_robot 4 tasks", "post_train", "in_domain_finetune"),
    ),
    Row("08_cross_embodiment", "co-training beats own", "co-training on all robots and questions, over own data²"),
    Row(
        "07_few_shot",
        "cross-embodiment beats vision-language",
        "new tasks, 50 demonstrations each: from a policy of three robots³, over the VLM",
    ),
    Row(
        "07_few_shot",
        "Corrections of its own mistakes",
        "corrections (DAgger) beside 60 demonstrations, at equal samples³",
        times=2,
    ),
)


UNADJUSTED = (
    "Intervals are unadjusted, verdicts are adjusted: an interval is that of the bootstrap over trainings and episodes that was "
    "recorded in the run, whose episodes were not kept. Verdicts are recomputed from the intervals by Student's t over "
    "trainings, adjusted for all contrasts of the notebook (Holm); so a contrast whose interval excludes zero may be undecided."
)
ADJUSTED = (
    "Intervals are over trainings and episodes; they and the verdicts are adjusted for all contrasts of the notebook (Holm)."
)


def board(results: Path) -> str:
    """The findings with enough trainings for a verdict: a Markdown table of short cells, from profile full only."""
    found = {record["name"]: record for record in load_findings(results / FULL)}
    rows = [_board_row(row, found[row.finding]) for row in BOARD if row.finding in found]
    is_old = any("said" in found[row.finding] for row in BOARD if row.finding in found)
    interval = "95 % interval, unadjusted" if is_old else "95 % interval"
    head = ["Claim", "Paper", f"Here: points ({interval})", "Trainings x episodes", "Verdict"]
    notes = [_pretraining(found), UNADJUSTED if is_old else ADJUSTED] if rows else []
    return _table(head, rows) + "".join(f"\n{_wrapped(note)}\n" for note in notes)


def _board_row(row: Row, record: dict[str, Any]) -> list[str]:
    stated = re.search(rf"{row.claim}[^.;]*", record["sentence"])
    text = stated.group() if stated else ""
    at, low, high = (int(x) for x in re.findall(r"[+-]\d+", text)[:3]) if len(re.findall(r"[+-]\d+", text)) >= 3 else (0, 0, 0)
    word = next(iter(re.findall(rf"{VERDICT_PATTERN.pattern}|no verdict", text)), "–")
    size = f"{trainings_of(record)} x {row.times * record['n']}"
    return [row.text, _theirs(row.paper), f"{at:+d} ({low:+d} to {high:+d})" if text else "–", size, word]


def _theirs(paper: tuple[str, ...]) -> str:
    if not paper:
        return "–"
    table = published(*paper[:2]).query("method == 'KosMos' and structure == 'policy-head continuous'").set_index("setting")
    values, is_rate = table["value"].loc[list(paper[2:])].tolist(), "success" in set(table["metric"])
    return " / ".join(f"{100 * v:.0f}" if is_rate else f"{v:g}" for v in values) + (" %" if is_rate else " tasks")


def _pretraining(found: dict[str, dict[str, Any]]) -> str:
    """The footnotes: what pre-training means here, with its sizes, and what else the rows need."""
    made = json.loads((PACKAGE / "assets" / "small-vlm" / "made.json").read_text())["stages"]
    samples = sum(stage["n_samples"] for stage in made)
    frames = found["09_ablations"]["numbers"]["frames"] if "09_ablations" in found else None
    times = f", {samples / frames:.0f} times the {frames:,} frames of a robot training" if frames else ""
    return (
        f"¹ Pre-training in domain: {samples:,} samples of questions about rendered scenes of this same simulator, labelled by "
        f"the renderer{times}; the paper's is web data. ² The budget is many epochs of the few own demonstrations, so part of "
        "the gain may be less overfitting; co-training differs in two things. ³ Trained on this robot's other tasks too; one "
        "such policy as the start of all trainings. Corrections come with those 60 demonstrations; the baseline has them alone. "
        "Paper: with / without; CALVIN's mean number of tasks in a row, or success in SimplerEnv."
    )


def notebooks_table(results: Path, notebooks: Path | None = None) -> str:
    """The notebooks: number, question, minutes of the last run, the executed copy to read and the source to run."""
    rows = []
    for chapter in list_notebooks(notebooks):
        copy, full = (folder / "notebooks" / f"{chapter.stem}.ipynb" for folder in (results, results / FULL))
        read = [f"[read](results/notebooks/{copy.name})"] if copy.exists() else []
        read += [f"[full](results/{FULL}/notebooks/{full.name})"] if full.exists() else []
        title = f"{chapter.stem[:2]} {chapter.title}".replace("|", "\\|")
        run = f"[run](notebooks/{chapter.stem}.ipynb)"
        rows.append([title, chapter.question.replace("|", "\\|"), _minutes(copy), ", ".join(read) or "–", run])
    return _table(["Notebook", "Question", "Minutes", "Read", "Run"], rows)


def seconds_of_copy(copy: Path) -> float | None:
    """How long an executed copy took to run [s]; None if there is none."""
    return json.loads(copy.read_text())["metadata"].get("rvlm", {}).get("seconds") if copy.exists() else None


def _minutes(copy: Path) -> str:
    seconds = seconds_of_copy(copy)
    return "–" if seconds is None else f"{seconds / 60:.0f}" if seconds >= 30 else "<1"


def cost(results: Path, notebooks: Path | None = None) -> str:
    """How long all notebooks took in the last run, in a sentence."""
    took = [seconds_of_copy(results / "notebooks" / f"{chapter.stem}.ipynb") for chapter in list_notebooks(notebooks)]
    known = [seconds for seconds in took if seconds is not None]
    return f"All {len(known)} notebooks took {sum(known) / 60:.0f} minutes on two CPU cores.\n" if known else ""


def success(results: Path, notebooks: Path | None = None) -> str:
    """The shipped policy's success with its interval, in a sentence."""
    record = next((r for r in load_findings(results) if r["name"] == "06_success"), None)
    if record is None:
        return ""
    rate = record["interval"]["shipped policy"]
    sentence = (
        f"The policy that ships solves **{100 * rate['rate']:.0f} %** of {rate['n']} episodes in unseen scenes (95 % interval "
        f"{100 * rate['low']:.0f} to {100 * rate['high']:.0f} %); without language or with black images, next to none."
    )
    return f"{_wrapped(sentence)}\n"


def taken_back(results: Path, notebooks: Path | None = None) -> str:
    """The withdrawn statements, a line each, without their numbers."""
    found = [*load_findings(results), *load_findings(results / FULL)]
    lines: dict[str, set[str]] = {}
    for record in found:
        for taken in record.get("withdrawn", ()):
            reason = re.split(r"(?<=[.:;]) ", taken["why"])[0].rstrip(".:;")
            lines.setdefault(f"{taken['what']}. {reason}.", set()).add(record["name"][:2])
    return "".join(_wrapped(f"- **{', '.join(sorted(of))}**: {as_markdown(line)}", "  ") + "\n" for line, of in lines.items())


def on_gpu(results: Path, notebooks: Path | None = None) -> str:
    """Peak memory of steps of real models on a GPU, measured and planned: a table, or that there is none."""
    steps = measured_steps(results / "gpu")
    if steps.empty:
        return "Real models on a GPU: not measured. `make gpu` measures them on yours, offline, in at most 8 minutes.\n"
    rows = [
        [
            f"{row['model']}, {row['finetuning']}{', checkpointing' * row['gradient_checkpointing']}",
            *(
                _number(row[name], form)
                for name, form in {"batch size": ".0f", "planned [GB]": ".1f", "measured [GB]": ".1f"}.items()
            ),
            row["GPU"],
            row["failed"].partition(":")[0] or f"{1000 * row['step [s]']:.0f} ms, {row['to bare model']:.2f} x the bare model",
        ]
        for row in steps.to_dict("records")
    ]
    return _table(["A training step", "Frames", "Planned [GB]", "Measured [GB]", "GPU", "Time"], rows)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or value != value else format(value, form)


def robots(results: Path, notebooks: Path | None = None) -> str:
    """Success of each kind of robot beside its controls, and task by task: two tables."""
    of_tasks = robot_tasks_rows(results)
    return _with_note(*robots_rows(results)) + ("\n" + _with_note(*of_tasks) if of_tasks[1] else "")


def heads(results: Path, notebooks: Path | None = None) -> str:
    """Success of each action head at one budget: a table."""
    return _with_note(*heads_rows(results))


def _with_note(head: list[str], rows: list[list[str]], note: str) -> str:
    return _table(head, rows) + f"\n{_wrapped(note)}\n" if rows else "Not measured.\n"


PARTS: dict[str, Callable[..., str]] = {
    "success": success,
    "cost": cost,
    "found": lambda results, notebooks=None: board(results),
    "notebooks": notebooks_table,
    "withdrawn": taken_back,
    "gpu": on_gpu,
    "robots": robots,
    "heads": heads,
}


def _wrapped(text: str, indent: str = "") -> str:
    """Prose in lines of at most 128 columns."""
    return textwrap.fill(text, 128, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    listed = list(rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *listed]) if listed else ""


def updated_readme(readme: Path, notebooks: Path | None = None, results: Path | None = None) -> str:
    """The README's text with its computed parts recomputed, each between its two markers.

    Raises:
        ValueError: the markers of a part are not there once each, in their order.
    """
    text = readme.read_text()
    for name, make in PARTS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(
                f"{readme}: expected the lines '{begin}' and '{end}' once each, in this order; add them where the part belongs"
            )
        made = make(results or ROOT / "results", notebooks)
        text = f"{text[: text.index(begin)]}{begin}\n{made}{text[text.index(end) :]}"
    return text


def update_readme(readme: Path | None = None, notebooks: Path | None = None, results: Path | None = None) -> Path:
    """Write the README's computed parts from first cells, findings and executed copies."""
    readme = readme or ROOT / "README.md"
    text = updated_readme(readme, notebooks, results)
    return readme if text == readme.read_text() else atomic_write(readme, text)
