"""The sweep's driver, with learners that need no training: what is logged, kept, resumed and chosen."""

import io
import re
import signal
import threading
import time
import unittest.mock

import jax
import numpy as np
import pytest
import rich.console

from experiments.harness import runs, tune
from experiments.harness.runs import Run, open_run, read_rows
from experiments.harness.scores import score_of
from experiments.harness.settings import RunSettings
from experiments.harness.tune import average_accuracies, choose_strengths, sweep_strengths
from lifelong_jax import Batch, SweepRun, permuted_tasks, plotting
from lifelong_jax.objectives import regression
from lifelong_jax.sweep import SweepAccuracies

STRENGTHS, SEEDS = (1.0, 10.0, 100.0), (0, 3)
BATCH = jax.device_put(Batch(np.eye(4), np.arange(4) % 2, np.ones(4)))
INPUTS = BATCH.inputs


def make_tasks(key):
    return permuted_tasks(BATCH, BATCH, 2, key)


def init_params(key, x):
    return jax.random.normal(key, x.shape)


class Learner:
    """What it measures depends on all that a run has, and diverges at strength 100; it keeps a list of its runs."""

    def __init__(self):
        self.learned = []

    def __call__(self, runs):
        matrices = []
        for run in runs:
            self.learned.append((float(run.params[0]), run.strength))
            seed = [jax.random.key_data(run.key)[0], run.tasks[1].permutation[0], run.params[0] > 0]
            rng = np.random.default_rng([int(number) for number in seed] + [int(run.strength)])
            accuracies = rng.uniform(size=(3, 2)).astype(np.float32).astype(np.float64)
            matrices.append(np.full((3, 2), np.nan) if run.strength == 100 else accuracies)
        return SweepAccuracies(np.stack(matrices)[:, :2], np.stack(matrices)[:, 2])


def sweep(learners, run, console=None):
    console = console or rich.console.Console(file=io.StringIO(), width=200)
    return sweep_strengths(learners, STRENGTHS, make_tasks, init_params, SEEDS, run, console, split="validation")


@pytest.fixture(params=["one by one", "three at once", "four a program"])
def backend(request, monkeypatch):
    monkeypatch.setattr(tune, "num_at_once", lambda: {"three at once": 3}.get(request.param, 1))
    if request.param == "four a program":
        monkeypatch.setattr(tune.jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(tune, "RUNS_PER_PROGRAM", 4)
    return request.param


def reopened(folder):
    run = Run(folder)
    runs._read_log(run)
    return run


def by_place(rows):
    return sorted(rows, key=lambda row: (row["method"], row["seed"]))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Each run by itself, in a loop."""
    run = Run(tmp_path_factory.mktemp("expected"))
    matrices = {name: np.empty((3, 2, 2, 2)) for name in ("ewc", "mas")}
    for name, of_learner in matrices.items():
        for column, seed in enumerate(SEEDS):
            for row, strength in enumerate(STRENGTHS):
                keys = jax.random.split(jax.random.key(seed), 3)
                one = SweepRun(init_params(keys[1], INPUTS[0]), make_tasks(keys[0]), keys[2], strength)
                accuracies = Learner()([one])
                of_learner[row, column] = accuracies.accuracy_matrix[0]
                arrays = {key: array[0] for key, array in accuracies._asdict().items()}
                run.log(event="sequence", method=f"{name} {strength:.3g}", seed=seed, split="validation", **arrays)
    return matrices, by_place(read_rows(run.folder))


def assert_expected(matrices, folder, expected):
    assert list(matrices) == list(expected[0])
    for name, of_learner in matrices.items():
        np.testing.assert_array_equal(of_learner, expected[0][name])
        assert of_learner.dtype == np.float64
    assert by_place(read_rows(folder)) == expected[1]


def test_sweeps_are_the_runs_one_by_one(tmp_path, backend, expected):
    learners = {"ewc": Learner(), "mas": Learner()}
    screen = io.StringIO()
    matrices = sweep(learners, Run(tmp_path), rich.console.Console(file=screen, width=200))
    assert_expected(matrices, tmp_path, expected)
    assert len(learners["ewc"].learned) == len(set(learners["ewc"].learned)) == 6
    best = max(average_accuracies(matrices["ewc"])[:2]).mean
    assert f"ewc: average accuracy {100 * best:.1f}±" in screen.getvalue()
    assert "12/12" in screen.getvalue()


class Killed(Exception):
    pass


@pytest.mark.parametrize("num_rows", [1, 4, 8])
def test_a_sweep_that_is_killed_goes_on_to_the_same_numbers(tmp_path, backend, expected, monkeypatch, num_rows):
    log = Run.log

    def log_or_die(run, **row):
        log(run, **row)
        if len(read_rows(run.folder)) == num_rows:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Run, "log", log_or_die)
        sweep({"ewc": Learner(), "mas": Learner()}, Run(tmp_path))
    assert len(read_rows(tmp_path)) == num_rows

    again = {"ewc": Learner(), "mas": Learner()}
    assert_expected(sweep(again, reopened(tmp_path)), tmp_path, expected)
    learned = [len(learner.learned) for learner in again.values()]
    if backend != "four a program":  # where the program, and its rounding, stay the same
        assert sum(learned) == 12 - num_rows

    nothing = {"ewc": Learner(), "mas": Learner()}
    assert_expected(sweep(nothing, reopened(tmp_path)), tmp_path, expected)
    assert not any(learner.learned for learner in nothing.values())


def test_a_sweep_that_is_asked_to_stop_keeps_what_has_begun(tmp_path, backend, expected):
    run = Run(tmp_path)
    begun = []
    both = threading.Barrier(3 if backend == "three at once" else 1)

    def stopping(runs):
        begun.extend(runs)
        both.wait(10)
        run.stopping.set()
        return Learner()(runs)

    with pytest.raises(KeyboardInterrupt):
        sweep({"ewc": stopping, "mas": Learner()}, run)
    assert len(begun) == {"one by one": 1, "three at once": 3, "four a program": 4}[backend]
    assert len(read_rows(tmp_path)) == len(begun)
    again = {"ewc": Learner(), "mas": Learner()}
    assert_expected(sweep(again, reopened(tmp_path)), tmp_path, expected)


def test_a_second_signal_does_not_wait_for_what_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "num_at_once", lambda: 1)
    console = rich.console.Console(file=io.StringIO(), width=200)
    released = threading.Event()

    def stuck(runs):
        for _ in range(2):
            time.sleep(0.2)  # until the main thread waits, where a signal wakes it up
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert run.stopping.wait(10)
        released.wait(10)
        return Learner()(runs)

    with (
        pytest.raises(SystemExit, match="130"),
        open_run(RunSettings(output_dir=str(tmp_path)), "permuted", console, []) as run,
    ):
        sweep({"ewc": stuck}, run)
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    released.set()
    assert "to go on: python -m experiments.permuted --resume" in console.file.getvalue()
    assert not read_rows(run.folder)


def test_each_seed_s_tasks_are_made_once_and_shared(tmp_path, backend):
    seen = []

    def learner(runs):
        seen.extend(runs)
        return Learner()(runs)

    sweep({"ewc": learner}, Run(tmp_path))
    assert len({id(run.tasks) for run in seen}) == len(SEEDS)


def test_an_error_in_a_run_is_raised(tmp_path, backend):
    def broken(runs):
        raise ValueError("tasks is empty")

    with pytest.raises(ValueError, match="tasks is empty"):
        sweep({"ewc": broken}, Run(tmp_path))


@pytest.mark.parametrize(("strengths", "seeds"), [((), (0,)), ((1.0, 1.0001), (0,)), ((1.0,), ()), ((1.0,), (0, 0))])
def test_strengths_and_seeds_are_told_apart_by_the_log(tmp_path, strengths, seeds):
    learner = Learner()
    with pytest.raises(ValueError, match=r"(strengths|seeds) must have at least one entry, and no entry twice"):
        sweep_strengths({"ewc": learner}, strengths, make_tasks, init_params, seeds, Run(tmp_path), None)
    assert not learner.learned


def choose(matrices, folder, **options):
    screen = io.StringIO()
    console = rich.console.Console(file=screen, width=200)
    best = choose_strengths(matrices, STRENGTHS, Run(folder), console, **options)
    return best, screen.getvalue()


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(plotting, "plot_strength_sweep", lambda *arguments, **options: unittest.mock.Mock())


def constant(accuracies):
    """`[num_strengths, num_seeds]` -> `[num_strengths, num_seeds, 2, 2]`; the tasks' mean is the accuracy."""
    last = np.stack([np.array(accuracies) - 0.05, np.array(accuracies) + 0.05], axis=-1)
    return np.stack([np.ones_like(last), last], axis=-2)


def test_the_best_strength_is_chosen(tmp_path, no_picture):
    diverged = constant([[0.5, 0.5], [0.6, 0.6], [0.9, np.nan]])
    best, printed = choose({"ewc": constant([[0.5, 0.9], [0.8, 0.8], [0.1, 0.2]]), "mas": diverged}, tmp_path)
    assert best == {"ewc": 10.0, "mas": 10.0}
    table = re.sub(" +", " ", (tmp_path / "tuning.md").read_text())
    assert "| 10 | 80.0±0.0 | 60.0±0.0 |" in table
    assert "| 100 | 15.0±5.0 | – |" in table
    assert "–: diverged" in printed


def test_of_errors_the_lowest_is_chosen(tmp_path):
    errors = {"ewc": constant([[3.0, 5.0], [0.5, 0.9], [8.0, 2.0]]), "mas": constant([[5, 5], [6, 6], [1, np.nan]])}
    best, printed = choose(errors, tmp_path, score=score_of(regression()))
    assert best == {"ewc": 10.0, "mas": 1.0}
    assert "Average squared error on validation data (–: diverged)" in printed
    assert "| 10 | 0.700±0.200 | 6.000±0.000 |" in re.sub(" +", " ", (tmp_path / "tuning.md").read_text())
    assert (tmp_path / "tuning.png").exists()


def test_of_errors_the_lowest_is_told_while_strengths_are_compared(tmp_path):
    screen = io.StringIO()
    errors = {0.1: 3.0, 1.0: 0.5, 10.0: 2.0}

    def learner(runs):
        matrices = np.array([np.full((2, 2), errors[run.strength]) for run in runs])
        return SweepAccuracies(matrices, matrices[:, 0])

    console = rich.console.Console(file=screen, width=200)
    arguments = ({"ewc": learner}, list(errors), make_tasks, init_params, (0, 1), Run(tmp_path), console)
    sweep_strengths(*arguments, score=score_of(regression()))
    assert "ewc: average squared error 0.500±0.000 at strength 1, in" in screen.getvalue()
    assert {row["score"] for row in read_rows(tmp_path)} == {"squared error"}


@pytest.mark.parametrize(
    ("accuracies", "warning"),
    [
        ([[0.9], [0.8], [0.7]], "warning: ewc: 1 is the lowest strength that was compared; a lower one may be better"),
        ([[0.7], [0.8], [0.9]], "warning: ewc: 100 is the highest strength that was compared; a higher one may be"),
        ([[0.7], [0.9], [0.8]], None),
    ],
)
def test_a_strength_at_the_edge_of_its_grid_is_said(tmp_path, no_picture, accuracies, warning):
    _, printed = choose({"ewc": constant(accuracies)}, tmp_path)
    assert (warning or "warning") in printed if warning else "warning" not in printed


def test_a_method_that_always_diverges_has_no_strength(tmp_path, no_picture):
    matrices = {"ewc": constant([[0.5], [0.6], [0.7]]), "mas": constant([[np.nan]] * 3)}
    with pytest.raises(SystemExit, match="mas diverged at every strength"):
        choose(matrices, tmp_path)
    assert (tmp_path / "tuning.md").exists()
