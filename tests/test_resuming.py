"""A run that was stopped anywhere goes on to the numbers of one that was not."""

import dataclasses
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
import safetensors.numpy

from experiments import permuted
from lifelong_jax import (
    Batch,
    add_quadratic_penalty,
    comparison,
    consolidate,
    experiment,
    init_consolidation,
    learn_jointly,
    learn_tasks,
    methods,
    permuted_tasks,
    resuming,
    tuning,
)
from lifelong_jax.checkpoint import load_consolidation, read_metadata
from lifelong_jax.models import MLP
from lifelong_jax.resuming import KeptTasks, ResumableSequence, compute_once, open_run, parse_settings
from lifelong_jax.runs import Run, RunSettings, read_rows

NUM_TASKS, NUM_EPOCHS = 3, 2
INPUTS = jax.random.normal(jax.random.key(0), (20, 6))
BATCH = Batch(INPUTS, jnp.argmax(INPUTS[:, :3], axis=-1), jnp.ones(20))
TASKS = permuted_tasks(BATCH, BATCH, NUM_TASKS, jax.random.key(1))
PARAMS = {"w": jax.random.normal(jax.random.key(2), (6, 3)), "b": jnp.zeros(3)}
SMALL = ["--num-tasks", "2", "--hidden-sizes", "8", "--num-epochs", "2", "--methods", "ewc", "--seeds", "0"]
CONSOLE = rich.console.Console()


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"]) + params["b"]


def optimizer_fn(strength):
    return optax.chain(add_quadratic_penalty(strength), optax.sgd(0.1, momentum=0.9))


EWC = functools.partial(learn_tasks, methods.ewc("sampled"), strength=3.0)
RWALK = functools.partial(learn_tasks, methods.rwalk(interval=2), strength=3.0)  # carries its state from task to task
LEARNERS = {"ewc": EWC, "rwalk": RWALK, "joint": learn_jointly}


def learn(learner, **options):
    return LEARNERS[learner](
        apply_fn=apply_fn,
        optimizer_fn=optimizer_fn,
        params=PARAMS,
        tasks=TASKS,
        key=jax.random.key(3),
        num_epochs=NUM_EPOCHS,
        batch_size=7,
        **options,
    )


class Killed(Exception):
    pass


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(resuming, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(resuming, "CHECKPOINT_SHARE", np.inf)


def reopened(folder):
    run = Run(folder)
    resuming._read_log(run)
    return run


def timeless(rows):
    return [{name: value for name, value in row.items() if not name.endswith("_seconds")} for row in rows]


def in_order(rows):
    """A sweep's rows come first in the log, as its runs finish."""
    swept = [row for row in rows if row.get("split") == "validation"]
    assert rows[: len(swept)] == swept
    return sorted(swept, key=lambda row: (row["method"], row["seed"])) + rows[len(swept) :]


def without_times(learned):
    return learned._replace(training_seconds=0, importance_seconds=0)


@pytest.mark.parametrize("learner", ["ewc", pytest.param("rwalk", marks=pytest.mark.slow), "joint"])
def test_a_sequence_goes_on_to_the_same_numbers_from_any_epoch(tmp_path, often, learner):
    reports = []
    uninterrupted = learn(learner, report=reports.append)
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
            learn(learner, report=report, checkpoints=sequence)
        sequence = ResumableSequence(reopened(folder), method=learner, seed=0)
        resumed = []
        learned = learn(learner, report=resumed.append, checkpoints=sequence)
        assert sequence.earlier_epochs() + resumed == reports
        assert len(sequence.earlier_epochs()) == stop
        chex.assert_trees_all_equal(without_times(learned), without_times(uninterrupted))


def test_without_a_checkpoint_a_sequence_starts_anew(tmp_path, often):
    reports = []
    learn("ewc", report=reports.append)
    run = Run(tmp_path)
    sequence = ResumableSequence(run, method="ewc", seed=0)
    for progress in reports[:3]:
        sequence.log_epoch(progress)
    run.log(event="epoch", method="other", seed=0, epochs=3)
    sequence = ResumableSequence(reopened(tmp_path), method="ewc", seed=0)
    learn("ewc", report=sequence.log_epoch, checkpoints=sequence)
    rows = read_rows(tmp_path)
    assert rows.pop(0)["method"] == "other"
    assert [row["epochs"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_a_log_that_ends_before_the_checkpoint_is_not_gone_on_from(tmp_path, often):
    learn("ewc", checkpoints=ResumableSequence(Run(tmp_path), method="ewc", seed=0))  # checkpoints, and no rows
    reports = []
    sequence = ResumableSequence(reopened(tmp_path), method="ewc", seed=0)
    with pytest.warns(UserWarning, match="starts anew: its log ends before its checkpoint"):
        learn("ewc", report=reports.append, checkpoints=sequence)
    assert len(reports) == 6


def test_checkpoints_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    saved = []

    def save_checkpoint(folder, epochs, state):
        saved.append(epochs)
        clock[0] += 0.1 if len(saved) == 1 else 1.0

    monkeypatch.setattr(resuming.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(resuming, "save_checkpoint", save_checkpoint)
    sequence = ResumableSequence(Run(tmp_path), method="ewc", seed=0)
    for epochs in range(1, 301):
        clock[0] += 1.0
        sequence.save(epochs, None)
    assert saved == [10, 30, 230]  # 10 s, then 20 s = 0.1 s / 0.005, then 200 s


def test_each_task_s_own_parameters_and_importance_are_kept(tmp_path):
    sequence = ResumableSequence(Run(tmp_path), method="ewc", seed=0, keep_tasks=True)
    learned = learn("ewc", checkpoints=sequence)
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
    learned = learn("ewc", checkpoints=sequence)
    none = init_consolidation(PARAMS)
    kept = [load_consolidation(sequence.task_file(task), like=none) for task in range(NUM_TASKS - 1)]
    again = learn("ewc", checkpoints=KeptTasks(kept, methods.ewc(), NUM_EPOCHS))
    chex.assert_trees_all_equal(again.params, learned.params)
    chex.assert_trees_all_equal(again.consolidation, learned.consolidation)
    np.testing.assert_array_equal(again.accuracy_matrix[-1], learned.accuracy_matrix[-1])
    assert np.isnan(again.accuracy_matrix[:-1]).all()
    other = learn("ewc", checkpoints=KeptTasks(kept, methods.ewc(rule="latest", decay=0.5), NUM_EPOCHS))
    assert optax.tree.norm(optax.tree.sub(other.params, learned.params)) > 1e-4

    def stop(progress):
        sequence.log_epoch(progress)
        if progress.epochs == NUM_TASKS * NUM_EPOCHS:
            raise Killed

    sequence = ResumableSequence(Run(tmp_path), method="again", seed=0)
    with pytest.raises(Killed):
        learn("ewc", report=stop, checkpoints=KeptTasks(kept, methods.ewc(), NUM_EPOCHS, sequence))
    sequence = ResumableSequence(reopened(tmp_path), method="again", seed=0)
    resumed = learn("ewc", checkpoints=KeptTasks(kept, methods.ewc(), NUM_EPOCHS, sequence))
    chex.assert_trees_all_equal(resumed.params, learned.params)


def test_half_a_row_is_no_row(tmp_path):
    run = Run(tmp_path)
    run.log(event="epoch", method="ewc", seed=0, epochs=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "epoch", "method": "ew')
    assert len(read_rows(tmp_path)) == 1
    reopened(tmp_path).log(event="epoch", method="ewc", seed=0, epochs=2)
    assert [row["epochs"] for row in read_rows(tmp_path)] == [1, 2]


class NamedNumbers(NamedTuple):
    inexact: jax.Array
    boolean: np.ndarray
    number: float


def never():
    raise AssertionError("computed again")


def test_a_part_is_computed_once(tmp_path):
    run = Run(tmp_path)
    numbers = NamedNumbers(jnp.array([0.1, np.nan, -np.inf], jnp.float32), np.arange(6).reshape(2, 3) == 4, 1 / 3)
    expected = {
        "numbers": {name: np.asarray(leaf) for name, leaf in numbers._asdict().items()},
        "accuracy": np.float64(0.7),
    }
    for function in (lambda: {"numbers": numbers, "accuracy": 0.7}, never):
        part = compute_once(run, "two parameters, seed 0", function)
        jax.tree.map(np.testing.assert_array_equal, part, expected)
        assert jax.tree.map(lambda leaf: leaf.dtype, part) == jax.tree.map(lambda leaf: leaf.dtype, expected)

    (file,) = (tmp_path / "parts").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole.replace(np.float64(0.7).tobytes(), np.float64(0.8).tobytes())):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"seed 0\.npz is computed again, it is damaged"):
            assert compute_once(run, "two parameters, seed 0", lambda: {"accuracy": 0.9}) == {"accuracy": 0.9}

    def interrupted():
        run.stopping.set()
        return {"accuracy": 0.5}

    with pytest.raises(KeyboardInterrupt):
        compute_once(run, "two parameters, seed 1", interrupted)
    assert compute_once(run, "two parameters, seed 1", never) == {"accuracy": 0.5}


def test_a_script_goes_on_to_the_same_numbers(tmp_path, monkeypatch, capsys):
    # The same objects in every call, so that what is compiled is used again.
    network = MLP((8,), 10)
    monkeypatch.setattr(permuted, "make_network", lambda settings, num_outputs: network)
    monkeypatch.setattr(experiment, "make_optimizer_fn", lambda settings: optimizer_fn)
    for plot in ("plot_accuracy_curves", "plot_accuracy_matrices"):
        monkeypatch.setattr(comparison, plot, lambda *arguments: None)
    monkeypatch.setattr(tuning, "plot_strength_sweep", lambda *arguments: None)
    log = Run.log

    def run_until(num_rows, *arguments):
        def log_or_die(run, **row):
            log(run, **row)
            if len(read_rows(run.folder)) == num_rows:
                raise Killed

        monkeypatch.setattr(Run, "log", log_or_die)
        permuted.main(parse_settings(permuted.Config, "permuted", [*SMALL, "--output-dir", str(tmp_path), *arguments]))

    sweep = ["--strength", "1,10"]
    run_until(-1, *sweep)
    monkeypatch.setattr(resuming, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(resuming, "CHECKPOINT_SHARE", np.inf)
    with pytest.raises(Killed):
        run_until(1, *sweep)  # of the two strengths' rows
    (first, second) = sorted((tmp_path / "permuted").iterdir())
    with pytest.raises(Killed):  # in the second task of ewc
        run_until(5, *sweep, "--resume")
    run_until(-1, "--resume", str(second))
    assert in_order(timeless(read_rows(first))) == in_order(timeless(read_rows(second)))
    for name in ("config.json", "strength.json", "tuning.md"):
        assert (first / name).read_text() == (second / name).read_text()
    ours, theirs = (json.loads((folder / "summary.json").read_text())["methods"] for folder in (first, second))
    assert timeless([ours["ewc"]]) == timeless([theirs["ewc"]])
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
    with pytest.raises(SystemExit) as stopped, open_run(settings, "permuted", console) as run:
        sequence = ResumableSequence(run, method="ewc", seed=0)

        def report(progress):
            sequence.log_epoch(progress)
            if progress.epochs == 3:
                os.kill(os.getpid(), number)

        learn("ewc", report=report, checkpoints=sequence)
    assert stopped.value.code == status
    assert signal.getsignal(number) is before
    printed = capsys.readouterr().out
    assert "stopping at the next checkpoint" in printed
    assert f"to go on: python -m experiments.permuted --resume {run.folder}" in printed
    with open_run(dataclasses.replace(settings, resume=str(run.folder)), "permuted", console) as run:
        sequence = ResumableSequence(run, method="ewc", seed=0)
        reports = []
        learn("ewc", report=reports.append, checkpoints=sequence)
    assert [progress.epochs for progress in reports] == [4, 5, 6]


def test_a_second_signal_stops_at_once(tmp_path, capsys):
    with (
        pytest.raises(SystemExit, match="130"),
        open_run(RunSettings(output_dir=str(tmp_path)), "permuted", CONSOLE) as run,
    ):
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stopping.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("unreachable")
    assert "--resume" in capsys.readouterr().out.replace("\n", " ")


def test_one_process_at_a_time_writes_to_a_run(tmp_path):
    with open_run(RunSettings(output_dir=str(tmp_path)), "permuted", CONSOLE) as run:
        again = RunSettings(output_dir=str(tmp_path), resume=str(run.folder))
        with pytest.raises(SystemExit, match="another process is writing to"), open_run(again, "permuted", CONSOLE):
            pass
    with open_run(again, "permuted", CONSOLE):
        pass


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    settings = RunSettings(output_dir=str(tmp_path / "file"))
    with pytest.raises(SystemExit, match=r"error: .*file"), open_run(settings, "permuted", CONSOLE):
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    ewc: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    networks: tuple[tuple[int, ...], ...] = ((64,), (128, 128))
    strength: Inner = Inner()
    data_dir: str | None = None
    seeds: tuple[int, ...] = (0, 1)


def parse(*arguments):
    return parse_settings(Config, "permuted", arguments)


def test_the_settings_are_those_of_the_run(tmp_path):
    output = ["--output-dir", str(tmp_path)]
    given = parse(*output, "--seeds", "3", "--strength.ewc", "0.3")
    with open_run(parse(*output), "permuted", CONSOLE):
        pass
    with open_run(given, "permuted", CONSOLE) as run:
        pass
    expected = dataclasses.replace(given, resume=str(run.folder))
    assert parse(*output, "--resume") == expected
    assert parse("--resume", *output, "--seeds", "3") == expected
    assert parse("--resume", str(run.folder), *output) == expected
    elsewhere = parse("--resume", str(run.folder), *output, "--data-dir", "elsewhere")
    assert elsewhere == dataclasses.replace(expected, data_dir="elsewhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], r"has seeds = \(0, 1\), which the command line contradicts with \(0,\)"),
        (["--strength.ewc", "1"], r"has strength = Inner\(ewc=0.1\), which .* contradicts with Inner\(ewc=1.0\)"),
    ],
)
def test_contradictions_are_refused(tmp_path, arguments, message):
    with open_run(parse("--output-dir", str(tmp_path)), "permuted", CONSOLE):
        pass
    with pytest.raises(SystemExit, match=message):
        parse("--output-dir", str(tmp_path), "--resume", *arguments)


def test_runs_that_are_not_there_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"--resume: there is no run in .*permuted"):
        parse("--output-dir", str(tmp_path), "--resume")
    with pytest.raises(SystemExit, match=r"there is no run in .*: it has no config.json"):
        parse("--resume", str(tmp_path))
    for content in ('{"seeds": [0]}', "{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(SystemExit, match="is damaged, or of another version of this script"):
            parse("--resume", str(tmp_path))


PROGRAM = """
import sys
import numpy as np
from experiments import permuted
from lifelong_jax import resuming
resuming.CHECKPOINT_SECONDS, resuming.CHECKPOINT_SHARE = 0.0, np.inf
permuted.main(resuming.parse_settings(permuted.Config, "permuted", sys.argv[1:]))
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
