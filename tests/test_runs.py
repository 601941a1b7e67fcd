"""Run folders, estimates, tables."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import rich.console

from lifelong_jax import runs


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = ("ewc",)
    strength: float = 2.0


def test_a_run_writes_as_it_goes(tmp_path):
    run = runs.start_run(tmp_path, "study", Config())
    assert run.folder.parent == tmp_path / "study"
    assert json.loads((run.folder / "config.json").read_text()) == {"methods": ["ewc"], "strength": 2.0}
    run.log(epoch=1, accuracies=np.array([0.5, np.nan]))
    run.log(epoch=2, loss=math.inf)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"epoch": 1, "accuracies": [0.5, None]}, {"epoch": 2, "loss": None}]
    run.write_summary({"ewc": runs.estimate([1.0, 3.0])})
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary == {"ewc": {"mean": 2.0, "stderr": 1.0, "values": [1.0, 3.0]}}


def test_two_runs_at_once_get_two_folders(tmp_path):
    folders = {runs.start_run(tmp_path, "study", Config()).folder for _ in range(3)}
    assert len(folders) == 3


def test_estimate():
    assert runs.estimate([2.0, 4.0, 6.0]).mean == 4.0
    assert runs.estimate([2.0, 4.0, 6.0]).stderr == pytest.approx(2.0 / math.sqrt(3))
    single = runs.estimate([2.0])
    assert single.mean == 2.0
    assert math.isnan(single.stderr)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positive": {"num_epochs": 0}}, "num_epochs must be finite and above 0, not 0"),
        ({"positive": {"hidden_sizes": (3, -1)}}, r"hidden_sizes must be finite and above 0, not \(3, -1\)"),
        ({"not_negative": {"strength": math.nan}}, "strength must be finite and at least 0, not nan"),
        ({"distinct": {"seeds": (0, 0)}}, r"seeds must have at least one entry, and none twice, not \(0, 0\)"),
        ({"distinct": {"methods": ()}}, "methods must have at least one entry"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        runs.check_settings(**settings)


def test_format_estimate():
    assert runs.format_estimate(runs.estimate([0.5, 0.7]), 100) == "60.0±10.0"
    assert runs.format_estimate(runs.estimate([0.5]), 1, 2) == "0.50"
    assert runs.format_estimate(runs.estimate([math.nan, math.nan])) == "–"


def test_tables():
    header, rows = ["method", "accuracy"], [["ewc", "0.9"]]
    assert runs.markdown_table(header, rows).splitlines()[1] == "| --- | ---: |"
    screen = io.StringIO()
    runs.print_table(rich.console.Console(file=screen, width=80), "title", header, rows)
    assert "ewc" in screen.getvalue()
