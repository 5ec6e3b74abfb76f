"""The anatomy of a notebook, checked on the files: question first, one parameters cell, short cells, a finding last."""

import ast
import io
import re
import tokenize
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
MAX_LINES, MAX_CODE_CELLS = 15, 30
OUTSIDE_PATH = re.compile(r"""(?<![\w.)\]])(?:\.\./|/(?:[\w.-]+/)+|~/|[A-Z]:\\)""")


def tags(cell):
    return cell.metadata.get("tags", [])


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def strings(source):
    """The text of a cell's string literals, docstrings and the fixed parts of f-strings included."""
    return [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def faults_of_opening(notebook, number):
    first = notebook.cells[0] if notebook.cells else new_code_cell()
    wanted = [
        (rf"^# {number} \S", f"`# {number} Title`"),
        (r"\*\*Question\.\*\*", "**Question.**"),
        (r"\*\*You will see\*\*", "**You will see**"),
    ]
    if first.cell_type != "markdown":
        return ["the first cell is not markdown"]
    return [f"the first cell lacks {name}" for pattern, name in wanted if not re.search(pattern, first.source, re.MULTILINE)]


def faults_of_parameters(notebook):
    cells = [cell for cell in notebook.cells if "parameters" in tags(cell)]
    if len(cells) != 1 or cells[0].cell_type != "code":
        return [f"expected one code cell tagged parameters, got {len(cells)}"]
    return [fault for statement in statements(cells[0].source) for fault in faults_of_parameter(*statement)]


def statements(source):
    """Each statement of a cell with the comment on its last line, "" where there is none."""
    comments = {
        t.start[0]: t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT
    }
    return [(node, comments.get(node.end_lineno, "")) for node in ast.parse(source).body]


def faults_of_parameter(node, comment):
    shown = ast.unparse(node)
    if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
        return [f"parameters cell: `{shown}` is not `name = literal`"]
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return [f"parameters cell: `{shown}` is derived; put it in the next cell"]
    return [] if comment else [f"parameters cell: `{shown}` has no comment with meaning and unit"]


def faults_of_code(index, cell):
    found = []
    if cell.outputs or cell.execution_count is not None:
        found.append(f"cell {index} is not stripped (nbstripout --keep-id)")
    if re.search(r"^\s*(?:!|%%(?:bash|sh|script|system)|%(?:pip|conda|sx|system)\b)", cell.source, re.MULTILINE):
        return [*found, f"cell {index} runs a shell command"]
    lines = [line for line in cell.source.splitlines() if line.strip()]
    if len(lines) > MAX_LINES:
        found.append(f"cell {index} has {len(lines)} lines, at most {MAX_LINES}")
    python = re.sub(r"^\s*%.*$", "pass", cell.source, flags=re.MULTILINE)
    if any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(python))):
        found.append(f"cell {index} defines a class; it belongs in rvlm/")
    outside = [text for text in strings(python) if OUTSIDE_PATH.search(text) and "://" not in text]
    return found + [f"cell {index} leaves the notebook's folder: {text!r}" for text in outside]


def faults(notebook, number):
    """Everything in a notebook that breaks the anatomy, as sentences."""
    code = code_cells(notebook)
    found = faults_of_opening(notebook, number) + faults_of_parameters(notebook)
    found += [
        fault for index, cell in enumerate(notebook.cells) if cell.cell_type == "code" for fault in faults_of_code(index, cell)
    ]
    if len(code) > MAX_CODE_CELLS:
        found.append(f"{len(code)} code cells, at most {MAX_CODE_CELLS}")
    if not notebook.cells or "finding" not in tags(notebook.cells[-1]):
        found.append("the last cell is not tagged finding")
    if sum("finding" in tags(cell) for cell in notebook.cells) > 1:
        found.append("more than one cell is tagged finding")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_the_anatomy(path):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem), "name it NN_what_it_asks.ipynb"
    assert faults(nbformat.read(path, as_version=4), path.stem[:2]) == []


def tagged(cell, tag):
    cell.metadata["tags"] = [tag]
    return cell


def a_good_notebook():
    return new_notebook(
        cells=[
            new_markdown_cell("# 03 Heads\n\n**Question.** How?\n\n**You will see**\n- a curve"),
            new_code_cell("import rvlm"),
            tagged(new_code_cell("n_steps = 100  # optimiser steps\nseed = 0  # of the episodes"), "parameters"),
            new_code_cell("n_half = n_steps // 2"),
            tagged(new_code_cell("n_half"), "finding"),
        ]
    )


def test_a_good_notebook_has_no_faults():
    assert faults(a_good_notebook(), "03") == []


FAULTS = {
    "the first cell lacks `# 04 Title`": lambda nb: nb.cells[0].update(source=nb.cells[0].source.replace("04", "03")),
    "the first cell lacks **Question.**": lambda nb: nb.cells[0].update(source="# 04 Heads\n**You will see**"),
    "the first cell is not markdown": lambda nb: nb.cells.pop(0),
    "expected one code cell tagged parameters, got 0": lambda nb: nb.cells[2].metadata.clear(),
    "is derived; put it in the next cell": lambda nb: nb.cells[2].update(source="n = 2 * 3  # steps"),
    "is not `name = literal`": lambda nb: nb.cells[2].update(source="import os  # files"),
    "has no comment with meaning and unit": lambda nb: nb.cells[2].update(source="n = 2"),
    "is not stripped": lambda nb: nb.cells[3].update(execution_count=1),
    "runs a shell command": lambda nb: nb.cells[3].update(source="!ls"),
    "has 16 lines, at most 15": lambda nb: nb.cells[3].update(source="x = 1\n\n" * 16),
    "defines a class": lambda nb: nb.cells[3].update(source="class Head:\n    pass"),
    "leaves the notebook's folder: '../data'": lambda nb: nb.cells[3].update(source="open('../data')"),
    "leaves the notebook's folder: '/data/x.png'": lambda nb: nb.cells[3].update(source="open('/data/x.png')"),
    "31 code cells, at most 30": lambda nb: nb.cells.__setitem__(slice(3, 3), [new_code_cell("pass") for _ in range(27)]),
    "the last cell is not tagged finding": lambda nb: nb.cells.append(new_markdown_cell("The end.")),
    "more than one cell is tagged finding": lambda nb: tagged(nb.cells[3], "finding"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault):
    notebook = a_good_notebook()
    notebook.cells[0].source = notebook.cells[0].source.replace("03", "04")
    FAULTS[fault](notebook)
    assert any(fault in found for found in faults(notebook, "04")), faults(notebook, "04")
