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
    summarize,
)
from experiments.harness.runs import Run
from experiments.harness.scores import score_of
from lifelong_jax import plotting
from lifelong_jax.objectives import regression
from tests.experiments.files import read_table

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


def report(folder, seconds, **options):
    folder.mkdir()
    screen = io.StringIO()
    console = rich.console.Console(file=screen, width=80)
    report_comparison(outcomes_of(seconds), "2 tasks", ["1", "2"], 1, 10 * seconds, Run(folder), console, **options)
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


def test_of_errors_the_metrics_and_the_margins_are_those_of_their_negatives():
    of_accuracies = summarize(outcomes_of(1.0))
    negated = {
        name: outcome._replace(accuracy_matrix=-outcome.accuracy_matrix, initial_accuracies=-outcome.initial_accuracies)
        for name, outcome in outcomes_of(1.0).items()
    }
    of_errors = summarize(negated, higher_is_better=False)
    for name, summary in of_accuracies.items():
        for metric in ("forgetting", "backward_transfer", "forward_transfer", "intransigence"):
            np.testing.assert_allclose(getattr(of_errors[name], metric).values, getattr(summary, metric).values)
        np.testing.assert_allclose(of_errors[name].average_accuracy.mean, -summary.average_accuracy.mean)
        assert of_errors[name].margin_over.keys() == summary.margin_over.keys()
    better = of_errors["joint"].margin_over["finetune"].mean
    np.testing.assert_allclose(better, of_accuracies["joint"].margin_over["finetune"].mean)
    assert better > 0


def test_another_score_is_reported_in_its_own_unit_and_by_its_own_name(tmp_path):
    folder = tmp_path / "run"
    screen = report(folder, seconds=1.0, score=score_of(regression()))
    assert "2 tasks: squared error, mean±standard error over 2 seeds" in screen
    assert "Differences in average squared error, mean" in screen
    assert "percent" not in screen and "accuracy" not in screen and "%" not in screen
    table = read_table(folder / "table.md")
    header = "| method | average squared error | average incremental squared error | forgetting | backward transfer |"
    assert header in table
    assert "| finetune | 0.700±0.050 | 0.750±0.025 | -0.300±0.100 | 0.300±0.100 |" in table  # it fell
    assert "Squared error on each task after the last, mean±standard error over 2 seeds" in screen
    assert "| method | 1 | 2 |" in table
    assert "| finetune | 0.500±0.000 | 0.900±0.100 |" in table
    assert "| method | below finetune |" in table
    assert "| joint | -0.200±0.050 |" in table  # above it
    finetune, *_ = csv.DictReader((folder / "table.csv").read_text().splitlines())
    np.testing.assert_allclose(float(finetune["average_squared_error"]), 0.7)
    assert not [name for name in finetune if "accuracy" in name]
    summary = json.loads((folder / "summary.json").read_text())["methods"]
    np.testing.assert_allclose(summary["finetune"]["average_squared_error"]["mean"], 0.7)
    assert "accuracy" not in (folder / "summary.json").read_text()
    pictures = {"squared_error.png", "average_squared_error.png", "squared_error_matrices.png"}
    assert {path.name for path in folder.glob("*.png")} == pictures


def test_the_titles_and_axes_of_pictures_name_the_score(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plotting.Figure, "savefig", lambda figure, path: drawn.append(figure))
    report(tmp_path / "run", seconds=1.0, score=score_of(regression()))
    titles = [figure.get_suptitle().replace("\N{NO-BREAK SPACE}", " ") for figure in drawn]
    assert titles == [
        "2 tasks: average squared error at the end: finetune 0.70±0.05, ewc 0.70±0.05, joint 0.90±0.00",
        "2 tasks",
        "2 tasks: test squared error, by the task learned last",
    ]
    labels = {axis.get_ylabel() for figure in drawn for axis in figure.axes}
    assert labels == {"test squared error", "average squared error on them", "after learning task", ""}
    assert drawn[2].axes[0].images[0].get_cmap().name == "cividis_r"  # bright is good
