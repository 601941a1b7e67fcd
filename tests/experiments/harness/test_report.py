"""Estimates over seeds, tables on the screen and in files, and the report of a comparison."""

import csv
import io
import json
import math

import numpy as np
import pytest
import rich.console

from experiments.harness.report import (
    Outcome,
    estimate,
    format_estimate,
    print_table,
    progress_bar,
    report_comparison,
)
from experiments.harness.runs import Run

METRICS = (
    "average accuracy",
    "average incremental accuracy",
    "forgetting",
    "backward transfer",
    "forward transfer",
    "intransigence",
)


def test_estimate():
    assert estimate([2.0, 4.0, 6.0]).mean == 4.0
    assert estimate([2.0, 4.0, 6.0]).stderr == pytest.approx(2.0 / math.sqrt(3))
    single = estimate([2.0])
    assert single.mean == 2.0
    assert math.isnan(single.stderr)


def test_format_estimate():
    assert format_estimate(estimate([0.5, 0.7]), 100) == "60.0±10.0"
    assert format_estimate(estimate([0.5]), 1, 2) == "0.50"
    assert format_estimate(estimate([math.nan, math.nan])) == "–"
    assert format_estimate(estimate([-1e-9, 0.0]), 100) == "0.0±0.0"


def printed(width, header, rows):
    """The lines of a table, and the words of each column of its header."""
    screen = io.StringIO()
    print_table(rich.console.Console(file=screen, width=width), "title", header, rows)
    blank, title, *lines = screen.getvalue().splitlines()
    assert (blank, title) == ("", "title")
    return lines


@pytest.mark.parametrize(("width", "num_lines"), [(200, 1), (100, 2), (80, 3), (20, 3)])
def test_names_of_columns_take_as_many_lines_as_they_need_and_values_are_whole(width, num_lines):
    rows = [["finetune", "49.7±2.1", "68.6±1.6", "59.2±2.5", "-59.2±2.5", "-1.7±1.8", "-0.4±0.3"]]
    *header, values = printed(width, ["method", *METRICS], rows)
    assert len(header) == num_lines
    assert values.split() == rows[0]
    assert sorted(" ".join(header).split()) == sorted(" ".join(["method", *METRICS]).split())
    if width > 20:
        assert max(map(len, header)) <= width


def test_a_name_is_not_broken_where_its_values_are_as_wide():
    lines = printed(30, ["a", "two words", "a name of many words"], [["ewc", "12345678.0±0.1", "50.0"]])
    assert len(lines) > 2
    assert any("two words" in line for line in lines)


def test_the_progress_bar_cuts_off_only_the_status():
    screen = io.StringIO()
    with progress_bar(rich.console.Console(file=screen, width=60)) as bar:
        line = bar.add_task("adam proximal_adam", total=182, status="")
        bar.update(line, completed=182, status="strength 1e+09, seed 1: accuracy 0.233")
    (shown,) = filter(None, map(str.strip, screen.getvalue().splitlines()))
    assert "adam proximal_adam" in shown and "182/182 0:00:00" in shown
    assert shown.endswith("…")


def outcomes_of(seconds):
    finetune = np.array([[[0.9, 0.1], [0.5, 0.8]], [[0.7, 0.1], [0.5, 1.0]]])
    joint = np.full((2, 2, 2), np.nan)
    joint[:, -1] = 0.9
    of_both = {}
    for name, matrix in {"finetune": finetune, "ewc": finetune, "joint": joint}.items():
        initial, times = np.full((2, 2), np.nan), np.full(2, seconds)
        of_both[name] = Outcome(matrix, initial, matrix, times, times)
    return of_both


def report(folder, seconds):
    folder.mkdir()
    screen = io.StringIO()
    console = rich.console.Console(file=screen, width=80)
    report_comparison(outcomes_of(seconds), "2 tasks", ["1", "2"], 1, 10 * seconds, Run(folder), console)
    return screen.getvalue()


def test_the_table_is_there_for_spreadsheets(tmp_path):
    report(tmp_path / "run", seconds=1.0)
    finetune, _, joint = csv.DictReader((tmp_path / "run" / "table.csv").read_text().splitlines())
    assert list(finetune)[:3] == ["method", "average_accuracy", "average_accuracy_stderr"]
    assert finetune["method"] == "finetune"
    np.testing.assert_allclose(float(finetune["average_accuracy"]), 0.7)
    np.testing.assert_allclose(float(finetune["average_accuracy_stderr"]), 0.05)
    assert (joint["average_accuracy"], joint["forgetting"]) == ("0.9", "")


def test_seconds_are_said_to_leave_out_compilation_and_are_in_no_other_file(tmp_path):
    screen = report(tmp_path / "fast", seconds=1.0)
    assert "Compilation is left out: it took 10 s" in screen
    report(tmp_path / "slow", seconds=3.0)
    times = json.loads((tmp_path / "slow" / "times.json").read_text())
    assert times["compilation"] == 30
    assert times["methods"]["ewc"]["training"]["values"] == [3.0, 3.0]
    files = {path.name for path in (tmp_path / "fast").iterdir()}
    assert files >= {"summary.json", "table.md", "table.csv", "accuracy.png"}
    for name in files - {"times.json"}:
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "slow" / name).read_bytes()
