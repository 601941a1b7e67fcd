"""Estimates over seeds, and tables."""

import io
import math

import pytest
import rich.console

from experiments.harness.report import estimate, format_estimate, print_table


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


def test_tables():
    header, rows = ["method", "accuracy"], [["ewc", "0.9"]]
    screen = io.StringIO()
    print_table(rich.console.Console(file=screen, width=80), "title", header, rows)
    assert "ewc" in screen.getvalue()
