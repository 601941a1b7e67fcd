"""A run that was stopped anywhere goes on to the numbers of one that was not."""

import dataclasses
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import unittest.mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
import safetensors.numpy

from experiments import permuted
from experiments.harness import experiment, runs, sequences
from experiments.harness.runs import Run, open_run, read_rows
from experiments.harness.sequences import ResumableSequence, learn_resumably, start_of_seed
from experiments.harness.settings import RunSettings, parse_settings
from lifelong_jax import (
    Batch,
    Progress,
    Recipe,
    Task,
    add_quadratic_penalty,
    consolidate,
    init_consolidation,
    init_sequence,
    methods,
    permuted_tasks,
    plotting,
)
from lifelong_jax.checkpoint import load_consolidation, read_metadata
from lifelong_jax.continual import go_on_after
from lifelong_jax.models import CNN, MLP

NUM_TASKS, NUM_EPOCHS = 3, 2
INPUTS = np.random.default_rng(0).normal(size=(20, 6))
BATCH = jax.device_put(Batch(INPUTS, np.argmax(INPUTS[:, :3], axis=-1), np.ones(20)))
TASKS = permuted_tasks(BATCH, BATCH, NUM_TASKS, jax.random.key(1))
PARAMS = jax.device_put({"w": np.random.default_rng(2).normal(size=(6, 3)), "b": np.zeros(3)})
SMALL = ["--num-tasks", "2", "--hidden-sizes", "8", "--num-epochs", "2", "--methods", "ewc", "--seeds", "0"]
CONSOLE = rich.console.Console()


def task_of(num_train, num_test=1):
    train, test = (Batch(np.ones((size, 2)), np.zeros(size, int), np.ones(size)) for size in (num_train, num_test))
    return Task(train, test)


def test_tasks_are_padded_where_that_takes_at_most_twice_the_memory():
    def padded(*tasks, **options):
        start = start_of_seed(lambda key: tasks, lambda key, x: x, 0, **options)
        return [(len(task.train.labels), len(task.test.labels)) for task in start.tasks]

    assert padded(task_of(20), task_of(30)) == [(30, 1)] * 2
    assert padded(task_of(29, 1), task_of(1, 1), task_of(1, 29)) == [(29, 1), (1, 1), (1, 29)]  # 174 of 62
    assert padded(task_of(30, 10), task_of(10, 10), task_of(5, 10), task_of(5, 2)) == [(30, 10)] * 4  # 160 of 82
    assert padded(task_of(30), task_of(1), task_of(1)) == [(30, 1), (1, 1), (1, 1)]
    assert padded(task_of(30), task_of(1), task_of(1), max_padding=math.inf) == [(30, 1)] * 3


def test_tasks_of_one_size_go_on_sharing_their_arrays():
    start = start_of_seed(lambda key: TASKS, lambda key, x: x, 0, max_padding=math.inf)
    assert all(task.train is BATCH for task in start.tasks)


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"]) + params["b"]


def optimizer_fn(strength):
    return optax.chain(add_quadratic_penalty(strength), optax.sgd(0.1, momentum=0.9))


RECIPE = Recipe(apply_fn, optimizer_fn, NUM_EPOCHS, batch_size=7)
METHODS = {  # rwalk carries its state; kfac has Kronecker factors
    "ewc": methods.ewc("sampled"),
    "kfac": methods.kfac(),
    "rwalk": methods.rwalk(interval=2),
    "joint": None,
}


def learn(name, sequence, report=lambda progress: None, **options):
    return learn_resumably(METHODS[name], RECIPE, 3.0, PARAMS, TASKS, jax.random.key(3), sequence, report, **options)


class Killed(Exception):
    pass


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(sequences, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(sequences, "CHECKPOINT_SHARE", np.inf)


def reopened(folder):
    run = Run(folder)
    runs._read_log(run)
    return run


def timeless(rows):
    return [{name: value for name, value in row.items() if not name.endswith("_seconds")} for row in rows]


def in_order(rows):
    """Runs that are learned at once log in any order; a sweep's rows come first."""
    swept = [row for row in rows if row.get("split") == "validation"]
    assert rows[: len(swept)] == swept
    compared = rows[len(swept) :]
    return [
        *sorted(swept, key=lambda row: (row["method"], row["seed"])),
        *sorted(compared, key=lambda row: (row["method"], row["seed"], row["event"], row.get("epochs"))),
    ]


def logged(progress):
    return progress._replace(learned=None)


def without_times(learned):
    return learned._replace(training_seconds=0, importance_seconds=0)


@pytest.mark.parametrize("learner", ["ewc", "kfac", pytest.param("rwalk", marks=pytest.mark.slow), "joint"])
def test_a_sequence_goes_on_to_the_same_numbers_from_any_epoch(tmp_path, often, learner):
    reports = []
    whole = ResumableSequence(Run(tmp_path), method="whole", seed=0)
    uninterrupted = learn(learner, whole, lambda progress: reports.append(logged(progress)))
    for stop in {0, 1, len(reports) // 2, len(reports) - 1}:
        last = reports[stop]
        folder = tmp_path / str(stop)
        folder.mkdir()

        sequence = ResumableSequence(Run(folder), method=learner, seed=0)

        def report(progress, last=last, sequence=sequence):
            sequence.log_epoch(progress)
            if progress.epochs == last.epochs:
                raise Killed

        with pytest.raises(Killed):  # after the epoch is logged, before its checkpoint
            learn(learner, sequence, report)
        sequence = ResumableSequence(reopened(folder), method=learner, seed=0)
        resumed = []
        learned = learn(learner, sequence, lambda progress, resumed=resumed: resumed.append(logged(progress)))
        assert sequence.earlier_epochs() + resumed == reports
        assert len(sequence.earlier_epochs()) == stop
        chex.assert_trees_all_equal(without_times(learned), without_times(uninterrupted))


def test_without_a_checkpoint_a_sequence_starts_anew(tmp_path, often):
    run = Run(tmp_path)
    sequence = ResumableSequence(run, method="ewc", seed=0)
    for epochs in range(1, 4):
        sequence.log_epoch(Progress(task=(epochs - 1) // NUM_EPOCHS, epochs=epochs, loss=1.0, accuracies=[0.5]))
    run.log(event="epoch", method="other", seed=0, task=1, epochs=3, loss=1.0, accuracies=[0.5])
    sequence = ResumableSequence(reopened(tmp_path), method="ewc", seed=0)
    learn("ewc", sequence, sequence.log_epoch)
    rows = read_rows(tmp_path)
    assert rows.pop(0)["method"] == "other"
    assert [row["epochs"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_log_that_ends_before_the_checkpoint_is_not_gone_on_from(tmp_path, often):
    learn("ewc", ResumableSequence(Run(tmp_path), method="ewc", seed=0))  # checkpoints, and no rows
    reports = []
    sequence = ResumableSequence(reopened(tmp_path), method="ewc", seed=0)
    with pytest.warns(UserWarning, match="starts anew: its log ends before its checkpoint"):
        learn("ewc", sequence, reports.append)
    assert len(reports) == 6


def test_checkpoints_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    saved = []

    def save_checkpoint(folder, epochs, state):
        saved.append(epochs)
        clock[0] += 0.1 if len(saved) == 1 else 1.0

    monkeypatch.setattr(sequences.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sequences, "save_checkpoint", save_checkpoint)
    sequence = ResumableSequence(Run(tmp_path), method="ewc", seed=0)
    state = init_sequence(None, RECIPE, PARAMS, TASKS, jax.random.key(0))
    for epochs in range(1, 301):
        clock[0] += 1.0
        sequence.save(state._replace(epochs=epochs))
    assert saved == [10, 30, 230]  # 10 s, then 20 s = 0.1 s / 0.005, then 200 s


def test_each_task_s_own_parameters_and_importance_are_kept(tmp_path):
    sequence = ResumableSequence(Run(tmp_path), method="ewc", seed=0, keep_tasks=True)
    learned = learn("ewc", sequence)
    none = init_consolidation(PARAMS)
    kept = [load_consolidation(sequence.task_file(task), like=none) for task in range(NUM_TASKS)]
    chex.assert_trees_all_equal(kept[-1].anchor, learned.params)
    consolidation = none
    for task in kept:
        consolidation = consolidate(consolidation, task.anchor, task.importance)
    chex.assert_trees_all_equal(consolidation, learned.consolidation)
    metadata = read_metadata(sequence.task_file(0))
    assert (metadata["estimator"], metadata["num_examples"]) == ("ewc", "20")


def test_the_last_task_is_learned_again_from_what_was_kept(tmp_path, often):
    sequence = ResumableSequence(Run(tmp_path), method="ewc", seed=0, keep_tasks=True)
    learned = learn("ewc", sequence)
    none = init_consolidation(PARAMS)
    kept = [load_consolidation(sequence.task_file(task), like=none) for task in range(NUM_TASKS - 1)]

    def with_last_task(start, sequence):
        return go_on_after(kept, methods.ewc(), RECIPE, start)

    def stop(progress):
        sequence.log_epoch(progress)
        if progress.epochs == NUM_TASKS * NUM_EPOCHS:
            raise Killed

    sequence = ResumableSequence(Run(tmp_path), method="again", seed=0)
    with pytest.raises(Killed):
        learn("ewc", sequence, stop, prepare=with_last_task)
    sequence = ResumableSequence(reopened(tmp_path), method="again", seed=0)
    resumed = learn("ewc", sequence, prepare=with_last_task)
    chex.assert_trees_all_equal(resumed.params, learned.params)
    chex.assert_trees_all_equal(resumed.consolidation, learned.consolidation)
    np.testing.assert_array_equal(resumed.accuracy_matrix[-1], learned.accuracy_matrix[-1])
    assert np.isnan(resumed.accuracy_matrix[:-1]).all()


@pytest.mark.parametrize(
    ("network", "flags"),
    [
        (MLP((8,), 10), []),
        pytest.param(MLP((8,), 10, dropout=0.5), ["--dropout", "0.5"], marks=pytest.mark.slow),
        (CNN((2,), 10, batch_norm=True), ["--network", "cnn", "--features", "2", "--batch-norm"]),
    ],
    ids=["mlp", "dropout", "batch_norm"],
)
@pytest.mark.usefixtures("standard_promotion")
def test_a_script_goes_on_to_the_same_numbers(tmp_path, monkeypatch, capsys, network, flags):
    # The same objects in every call, so that what is compiled is used again.
    monkeypatch.setattr(permuted, "make_network", lambda settings, num_outputs: network)
    monkeypatch.setattr(experiment, "make_optimizer_fn", lambda *arguments: optimizer_fn)
    picture = unittest.mock.Mock()
    for plot in ("plot_accuracy_curves", "plot_average_accuracy", "plot_accuracy_matrices", "plot_strength_sweep"):
        monkeypatch.setattr(plotting, plot, lambda *arguments, **options: picture)
    log = Run.log

    def run_until(num_rows, *arguments):
        def log_or_die(run, **row):
            log(run, **row)
            if len(read_rows(run.folder)) == num_rows:
                raise Killed

        monkeypatch.setattr(Run, "log", log_or_die)
        arguments = [*SMALL, *flags, "--output-dir", str(tmp_path), *arguments]
        permuted.main(parse_settings(permuted.Config, "permuted", arguments))

    sweep = ["--strength", "1,10"]
    run_until(-1, *sweep)
    monkeypatch.setattr(sequences, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(sequences, "CHECKPOINT_SHARE", np.inf)
    with pytest.raises(Killed):
        run_until(1, *sweep)  # of the two strengths' rows
    (first, second) = sorted((tmp_path / "permuted").iterdir())
    with pytest.raises(Killed):  # in the second task of ewc
        run_until(5, *sweep, "--resume")
    run_until(-1, "--resume", str(second))
    assert in_order(timeless(read_rows(first))) == in_order(timeless(read_rows(second)))
    for name in ("config.json", "strength.json", "tuning.md", "summary.json", "table.md"):
        assert (first / name).read_text() == (second / name).read_text()
    assert not list(second.rglob("checkpoints"))  # what is finished needs none
    assert len(list(second.rglob("task-*.safetensors"))) == 2
    capsys.readouterr()
    rows = (second / "metrics.jsonl").read_text()
    run_until(-1, "--resume", str(second))  # nothing is left to do
    assert (second / "metrics.jsonl").read_text() == rows


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_with_a_checkpoint(tmp_path, capsys, number, status):
    before = signal.getsignal(number)
    settings = RunSettings(output_dir=str(tmp_path))
    console = rich.console.Console(width=200)
    with pytest.raises(SystemExit) as stopped, open_run(settings, "permuted", console, []) as run:
        sequence = ResumableSequence(run, method="ewc", seed=0)

        def report(progress):
            sequence.log_epoch(progress)
            if progress.epochs == 3:
                os.kill(os.getpid(), number)

        learn("ewc", sequence, report)
    assert stopped.value.code == status
    assert signal.getsignal(number) is before
    printed = capsys.readouterr().out
    assert "stopping at the next checkpoint" in printed
    assert f"to go on: python -m experiments.permuted --resume {run.folder}" in printed
    with open_run(dataclasses.replace(settings, resume=str(run.folder)), "permuted", console, []) as run:
        sequence = ResumableSequence(run, method="ewc", seed=0)
        reports = []
        learn("ewc", sequence, reports.append)
    assert [progress.epochs for progress in reports] == [4, 5, 6]


PROGRAM = """
import sys
import numpy as np
from experiments import permuted
from experiments.harness import sequences
from experiments.harness.settings import parse_settings
sequences.CHECKPOINT_SECONDS, sequences.CHECKPOINT_SHARE = 0.0, np.inf
permuted.main(parse_settings(permuted.Config, "permuted", sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_numbers(tmp_path):
    settings = ["--num-tasks", "3", "--hidden-sizes", "64", "--num-epochs", "40", "--seeds", "0", "1"]
    settings += ["--methods", "ewc", "joint", "--strength", "1,10"]
    environment = {**os.environ, "XLA_FLAGS": ""}  # without the tests' four devices
    root = pathlib.Path(permuted.__file__).parent.parent

    def start(*arguments):
        command = [sys.executable, "-c", PROGRAM, *settings, "--output-dir", str(tmp_path), *arguments]
        return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL)

    def folders():
        return sorted((tmp_path / "permuted").glob("*"))

    assert start().wait() == 0
    (first,) = folders()
    draw = random.Random(0)
    kills = 0
    process = start()
    while len(folders()) < 2:
        time.sleep(0.1)
    second = folders()[1]
    while kills < 20 and process.poll() is None:
        size = (second / "metrics.jsonl").stat().st_size if (second / "metrics.jsonl").exists() else 0
        while process.poll() is None and (
            not (second / "metrics.jsonl").exists() or (second / "metrics.jsonl").stat().st_size <= size
        ):
            time.sleep(0.01)  # until it has gone on
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        if process.wait() == 0:
            break  # it was faster than twenty kills
        kills += 1
        process = start("--resume", str(second))
    assert process.wait() == 0
    assert kills == 20
    assert in_order(timeless(read_rows(first))) == in_order(timeless(read_rows(second)))
    ours, theirs = (json.loads((folder / "summary.json").read_text())["methods"] for folder in (first, second))
    assert all(timeless([ours[name]]) == timeless([theirs[name]]) for name in ("ewc", "joint"))
    files = list(first.rglob("task-*.safetensors"))
    assert len(files) == 6
    for file in files:
        chex.assert_trees_all_equal(
            *(safetensors.numpy.load_file(folder / file.relative_to(first)) for folder in (first, second))
        )
