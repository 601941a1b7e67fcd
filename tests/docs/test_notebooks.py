"""The notebooks run cell by cell, with warnings as errors, and have their outputs stored."""

import ast
import json
import pathlib
import re

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent.parent / "notebooks").glob("*.ipynb"))

by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def run_cell(source, names):
    """Runs a cell; returns what a notebook would show: the value of its last expression."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


@pytest.mark.usefixtures("standard_promotion", "free_afterwards")
@by_notebook
def test_runs(path, capsys):
    names = {}
    for cell in code_cells(path):
        shown = run_cell("".join(cell["source"]), names)
        is_picture = hasattr(shown, "_repr_png_")
        if is_picture:
            assert shown._repr_png_().startswith(b"\x89PNG")
        stored = [name for output in cell["outputs"] for name in output.get("data", ())]
        assert is_picture == ("image/png" in stored)
        says_something = shown is not None or bool(capsys.readouterr().out)
        assert says_something == bool(cell["outputs"])


@by_notebook
def test_what_is_stored(path):
    text = path.read_text()
    assert path.stat().st_size < 300_000
    assert not re.search(r"/(home|tmp|root|work|Users|usr)/|site-packages|Warning|Traceback", text)
    assert not re.search(r"lifelong_jax[\w.]*\._", text)  # public names only
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["metadata"] == {} for cell in cells)  # no times


def test_the_first_look_has_ten_cells():
    assert len(code_cells(NOTEBOOKS[0])) == 10
