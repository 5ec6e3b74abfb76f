"""Findings, figures and tables, with their provenance.

A finding is a sentence whose numbers were computed: `finding` refuses a sentence with a number that is not among its arguments.
Names start with the number of their notebook (``05_loss``), by which the report sorts them.
Files are written under a temporary name and renamed when complete, so that a killed run leaves no partial file.
"""

from __future__ import annotations

import inspect
import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvlm.caches import used_artifacts
from rvlm.files import CARDS, ROOT, atomic_write, results_dir
from rvlm.provenance import provenance
from rvlm.report.notebooks import InvalidRun
from rvlm.statistics import check_verdict

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STATED_NUMBER = re.compile(r"(?<![\w.,])[-−+]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s?%)?")


class UncomputedNumber(ValueError):
    """A finding's sentence has a number that is not among its arguments."""


def _checked(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"expected a name of a-z, 0-9 and _, led by its notebook's number, e.g. '05_loss'; got {name!r}")
    return name


# --- findings -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A finding as it is stored; a notebook shows it as Markdown."""

    record: dict[str, Any]

    def _repr_markdown_(self) -> str:
        return f"> **Finding.** {as_markdown(self.record['sentence'])}\n>\n> <sub>{provenance_line(self.record)}</sub>"


def as_markdown(text: str) -> str:
    """Plain text escaped as one line of Markdown, also for a table's cell: ``<act>`` is a token, not a tag."""
    return re.sub(r"[\\`*_\[<|~$&]", r"\\\g<0>", " ".join(text.split()))


def finding(
    name: str,
    sentence: str,
    numbers: Mapping[str, Any],
    n: int,
    interval: Any,
    seeds: Sequence[int],
    seconds: float | int | None = None,
    verdict: str | Mapping[str, str] | None = None,
) -> Finding:
    """Write a finding to ``results/findings/{name}.json`` and show it.

    It lists the artifacts that this process has used (`rvlm.caches.used_artifacts`), and marks those made by other code.

    Args:
        name: starts with the notebook's number, e.g. "06_success".
        sentence: the result; each number in it must be among the arguments below, rounded as in the sentence.
            ``47 %`` matches a number 0.468, or 46.8 if its key ends in "percent" or "points".
        numbers: computed numbers by name, or lists or dicts of them.
        n: number of episodes (or samples).
        interval: 95 % interval: ``(low, high)``, a `Rate` or `Difference`, a dict of them, or None.
        seeds: of the computation.
        seconds: duration [s].
        verdict: a word of `rvlm.statistics.verdict`, or one by contrast.

    Raises:
        ValueError: an unknown verdict.
        UncomputedNumber: the sentence has a number that is not among the arguments.
    """
    record = {"name": _checked(name), "sentence": sentence, "numbers": _plain(numbers), "n": int(n), "interval": _plain(interval)}
    record |= {"seeds": _plain(list(seeds)), "seconds": seconds, "verdict": _checked_verdict(verdict)}
    _check_sentence(record)
    record |= {**provenance(), "artefacts": used_artifacts()}
    atomic_write(results_dir() / "findings" / f"{name}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return Finding(record)


def _checked_verdict(verdict: str | Mapping[str, str] | None) -> str | dict[str, str] | None:
    if isinstance(verdict, Mapping):
        return {contrast: check_verdict(word) for contrast, word in verdict.items()}
    return verdict if verdict is None else check_verdict(verdict)


def _plain(value: Any) -> Any:
    """Convert numpy, dataclasses and tuples to JSON values; a `Rate` includes its rate, NaN and infinity become null."""
    if is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: getattr(value, f.name) for f in fields(value) if f.repr}
        value = plain | ({"rate": value.rate} if hasattr(value, "rate") else {})
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers_in(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested lists and dicts, with its key."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, float(value)
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _numbers_in(v, k)
    elif isinstance(value, list):
        for v in value:
            yield from _numbers_in(v, key)


def _matches(text: str, key: str, value: float) -> bool:
    """Whether ``text`` ("1,234", "-0.25", "47 %") is this value, rounded to the digits of the text."""
    digits = text.rstrip(" %").replace(",", "").replace("−", "-")
    is_percent = text.endswith("%") and not key.endswith(("percent", "points"))
    mantissa, _, exponent = digits.lower().partition("e")
    step = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(digits) - value * (100 if is_percent else 1)) <= step * (0.5 + 1e-6)


def _check_sentence(record: Mapping[str, Any]) -> None:
    given = [*_numbers_in(record["numbers"]), *_numbers_in(record["interval"]), ("n", float(record["n"]))]
    given += [("seeds", float(len(record["seeds"]))), *_numbers_in(record["seconds"], "seconds")]
    given += [("level", 0.95)] if record["interval"] is not None else []
    for match in STATED_NUMBER.finditer(record["sentence"]):
        if not any(_matches(match.group(), key, value) for key, value in given):
            listed = ", ".join(f"{key} = {value:.6g}" for key, value in given)
            raise UncomputedNumber(
                f"finding {record['name']!r}: expected only computed numbers in {record['sentence']!r}; {match.group()!r} "
                f"is none of those given ({listed}); compute it, add it to numbers=, and format it into the sentence"
            )


def load_findings(results: Path | None = None) -> list[dict[str, Any]]:
    """Every finding of a results folder, by name."""
    return [_read_finding(path) for path in sorted(((results or results_dir()) / "findings").glob("*.json"))]


def _read_finding(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        number = path.name[:2]
        raise InvalidRun(
            f"{path}: expected a finding as JSON, got a file that is cut or changed ({error}); delete it and run notebook "
            f"{number} again, with the profile of this folder and --force"
        ) from error


def provenance_line(record: Mapping[str, Any]) -> str:
    """n, interval, seeds, seconds, profile, commit and verdict in one line."""
    parts = [f"n = {record['n']:,}"]
    if record["interval"] is not None:
        joint = " (of all contrasts together)" if "p_value" in dict(_numbers_in(record["interval"])) else ""
        parts.append(f"95 % interval{joint} {_interval(record['interval'], record['n'])}")
    parts.append(f"seeds {', '.join(map(str, record['seeds'])) or 'none'}")
    parts += [f"{record['seconds']:,.0f} s"] if record.get("seconds") is not None else []
    parts += [f"profile {record['profile']}" if record.get("profile") else "parameters of no profile"]
    parts += [f"commit {record['commit'][:8]}{' with changes' if record.get('is_dirty') else ''}"] if record.get("commit") else []
    parts += [_other_code(record["artefacts"])] if any(not a["is_current"] for a in record.get("artefacts", ())) else []
    parts += [f"**{_verdict_line(record['verdict'])}**"] if record.get("verdict") else []
    return " · ".join(parts)


def _verdict_line(verdict: str | Mapping[str, str]) -> str:
    return verdict if isinstance(verdict, str) else "; ".join(f"{contrast}: {word}" for contrast, word in verdict.items())


def _other_code(artefacts: Sequence[Mapping[str, Any]]) -> str:
    """The artifacts of a finding that were made by other code than the finding."""
    old = [a for a in artefacts if not a["is_current"]]
    listed = ", ".join(f"{a['n']} of {a['kind']} (commit {', '.join(c[:8] for c in a['commits'])})" for a in old)
    return f"**mixed code**: {listed} made by other code than this finding's"


def _interval(value: Any, n: int) -> str:
    """An interval, or several by name; with its own count where that is not the finding's."""
    if isinstance(value, list):
        return "[" + ", ".join(f"{v:.3g}" for v in value) + "]"
    if {"low", "high"} <= set(value):
        if value["low"] is None or value["high"] is None:
            return "[none]"
        own = f" (n = {value['n']:,})" if value.get("n", n) != n else ""
        return f"[{value['low']:.3g}, {value['high']:.3g}]{own}"
    return "; ".join(f"{k} {_interval(v, n)}" for k, v in value.items())


# --- figures, tables, source --------------------------------------------------------------------------------------------


def export(fig: Figure, name: str) -> Figure:
    """Write ``results/figures/{name}.pdf`` and ``.png`` at column or page width, byte for byte reproducible.

    The figure's title is the files' title, which the report uses as alternative text. The PDF embeds TrueType fonts, as
    publishers require; the PNG has 300 dpi and a palette (`small_png`).

    Returns:
        The figure, so that a cell can end in ``export(plots.filmstrip(...), "06_failures")``.
    """
    import matplotlib.pyplot as plt

    from rvlm.report.plots.style import COLUMN_IN, PAGE_IN, RC

    width, height = fig.get_size_inches()
    target = min((COLUMN_IN, PAGE_IN), key=lambda w: abs(w - width))
    fig.set_size_inches(target, height * target / width)
    title = {"Title": fig.get_suptitle() or None}
    for suffix, metadata in (("pdf", {"CreationDate": None, "Producer": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        with plt.rc_context(RC):  # fonts are resolved when saving
            fig.savefig(buffer, format=suffix, dpi=300, metadata=metadata | title)
        data = small_png(buffer.getvalue()) if suffix == "png" else buffer.getvalue()
        atomic_write(results_dir() / "figures" / f"{_checked(name)}.{suffix}", data)
    return fig


def small_png(data: bytes, n_colors: int = 256) -> bytes:
    """A PNG quantised to a palette, with its title and resolution, or as it is if that is smaller."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    with Image.open(io.BytesIO(data)) as image:
        kept, buffer = PngInfo(), io.BytesIO()
        if title := image.info.get("Title"):
            kept.add_itxt("Title", title)
        white = Image.new("RGBA", image.size, "white")
        flat = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        flat.quantize(n_colors).save(buffer, "png", optimize=True, pnginfo=kept, dpi=image.info.get("dpi"))
    small = buffer.getvalue()
    return small if len(small) < len(data) else data


def save_table(table: pd.DataFrame, name: str, float_format: str = "%.3g") -> pd.DataFrame:
    """Write ``results/tables/{name}.csv`` (full precision) and ``.tex`` (booktabs, rounded); returns the table."""
    folder = results_dir() / "tables"
    atomic_write(folder / f"{_checked(name)}.csv", table.to_csv(index=False))
    atomic_write(folder / f"{name}.tex", table.to_latex(index=False, escape=True, float_format=float_format))
    return table


def save_episodes(episodes: pd.DataFrame, name: str) -> pd.DataFrame:
    """Write ``results/episodes/{name}.parquet``: one row per episode, with commit and versions; returns it.

    ``pandas.read_parquet`` reads it back; every table and figure of a notebook is drawn from such a table.
    """
    made = provenance()
    whole = episodes.assign(commit=made["commit"], versions=json.dumps(made["versions"]))
    buffer = io.BytesIO()
    whole.to_parquet(buffer, index=False)
    atomic_write(results_dir() / "episodes" / f"{_checked(name)}.parquet", buffer.getvalue())
    return whole


def show_source(function: Callable[..., Any] | type) -> Any:
    """The source of a function or class, as a notebook shows code; GitHub, Jupyter and nbconvert all colour it."""
    from IPython.display import Markdown

    plain = inspect.unwrap(function)
    path = Path(inspect.getsourcefile(plain) or "").resolve()
    where = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return Markdown(f"`{where}`\n```python\n{textwrap.dedent(inspect.getsource(plain)).rstrip()}\n```")


def published(benchmark: str, split: str | None = None) -> pd.DataFrame:
    """Results from the literature with their sources, from ``data_cards/published.csv``.

    Args:
        benchmark: e.g. "calvin".
        split: e.g. "ABCD->D"; all of the benchmark's if left out.
    """
    import pandas as pd

    table = pd.read_csv(CARDS / "published.csv")
    chosen = table.loc[(table["benchmark"] == benchmark) & (True if split is None else table["split"] == split)]
    if chosen.empty:
        have = ", ".join(sorted({f"{b} {s}" for b, s in zip(table["benchmark"], table["split"], strict=True)}))
        raise ValueError(f"no published results of {benchmark!r}, split {split!r}; there are {have}")
    return chosen.reset_index(drop=True)
