"""Trackers get each epoch of a run once, while the run goes on and when it is finished."""

import contextlib
import json
import sys
import types
import unittest.mock

import pytest

from experiments import track
from experiments.harness.runs import Run


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "permuted" / "2026-01-31-120000"
    folder.mkdir(parents=True)
    run = Run(folder)
    run.write_json("config.json", {"num_tasks": 2})
    return run


def log_epoch(run, epochs, seed=0):
    accuracies = [0.5] * epochs
    run.log(event="epoch", method="ewc", seed=seed, task=epochs, epochs=epochs, loss=1 / epochs, accuracies=accuracies)


class Writer(contextlib.AbstractContextManager):
    """As `tensorboardX.SummaryWriter`."""

    written: dict

    def __init__(self, folder):
        self.folder = folder

    def add_scalar(self, name, number, step):
        assert (self.folder, name, step) not in self.written
        self.written[self.folder, name, step] = number

    def flush(self):
        pass

    def __exit__(self, *error):
        self.written[self.folder, "closed", 0] = True


def test_tensorboard_gets_the_epochs_of_a_run_that_goes_on(run, monkeypatch, capsys):
    monkeypatch.setattr(Writer, "written", {}, raising=False)
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    log_epoch(run, 1)

    def sleep(seconds):
        log_epoch(run, 2)
        log_epoch(run, 1, seed=1)
        run.write_summary({})

    monkeypatch.setattr(track.time, "sleep", sleep)
    track.main(track.Config("tensorboard", run.folder))
    first, second = (str(run.folder / "tensorboard" / f"ewc, seed {seed}") for seed in (0, 1))
    assert Writer.written == {
        (first, "loss", 1): 1.0,
        (first, "accuracy/task 1", 1): 0.5,
        (first, "loss", 2): 0.5,
        (first, "accuracy/task 1", 2): 0.5,
        (first, "accuracy/task 2", 2): 0.5,
        (second, "loss", 1): 1.0,
        (second, "accuracy/task 1", 1): 0.5,
        (first, "closed", 0): True,
        (second, "closed", 0): True,
    }
    assert "3 epochs sent" in capsys.readouterr().out


def test_a_score_has_its_own_name(run, monkeypatch):
    package = unittest.mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", package)
    run.log(event="epoch", method="ewc", seed=0, score="squared error", task=1, epochs=1, loss=0.5, accuracies=[2.5])
    run.write_summary({})
    track.main(track.Config("wandb", run.folder))
    (call,) = package.init.return_value.__enter__.return_value.log.call_args_list
    assert call.args == ({"ewc, seed 0/squared error/task 1": 2.5, "ewc, seed 0/loss": 0.5, "ewc, seed 0/epochs": 1},)


def test_weights_and_biases_have_one_run_with_the_settings(run, monkeypatch):
    package = unittest.mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", package)
    log_epoch(run, 2)
    run.log(event="epoch", method="mas", seed=0, task=1, epochs=1, loss=float("inf"), accuracies=[0.5])
    run.write_summary({})
    track.main(track.Config("wandb", run.folder))
    options = package.init.call_args.kwargs
    assert options["id"] == "permuted-2026-01-31-120000"
    assert options["config"] == json.loads((run.folder / "config.json").read_text())
    tracked = package.init.return_value.__enter__.return_value
    ewc = {"loss": 0.5, "accuracy/task 1": 0.5, "accuracy/task 2": 0.5, "epochs": 2}
    diverged = {"accuracy/task 1": 0.5, "epochs": 1}
    assert [call.args for call in tracked.log.call_args_list] == [
        ({f"ewc, seed 0/{name}": number for name, number in ewc.items()},),
        ({f"mas, seed 0/{name}": number for name, number in diverged.items()},),
    ]
    tracked.define_metric.assert_any_call("ewc, seed 0/*", step_metric="ewc, seed 0/epochs")


def test_what_is_missing_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        track.main(track.Config("wandb", run.folder))
    with pytest.raises(SystemExit, match="there is no run in"):
        track.main(track.Config("wandb", tmp_path))
