"""A script on a mesh that several processes share: one log, one end, and the numbers of one process."""

import signal

import chex
import numpy as np
import pytest

from experiments import permuted
from experiments.harness.runs import read_rows
from experiments.harness.settings import parse_settings
from lifelong_jax.checkpoint import load_consolidation
from tests.processes import lines_of, run_processes, start_processes

# A checkpoint after each epoch; after the fourth one, a process may send itself a signal.
PROGRAM = """
import os, sys
from experiments import permuted
from experiments.harness import sequences
from experiments.harness.settings import parse_settings

saved, save = [], sequences.save_checkpoint
sequences.CHECKPOINT_SECONDS, sequences.CHECKPOINT_SHARE = 0.0, float("inf")

def save_and_stop(*arguments):
    save(*arguments)
    saved.append(arguments)
    if len(saved) == 4 and os.environ.get("STOPPED") == os.environ["JAX_PROCESS_ID"]:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))

sequences.save_checkpoint = save_and_stop
permuted.main(parse_settings(permuted.Config, "permuted", sys.argv[1:]))
"""
OPTIONS = ("--num-tasks", 2, "--num-epochs", 3, "--seeds", 0, "--methods", "ewc", "--hidden-sizes", 8)


def arguments(folder, *options):
    return ("-c", PROGRAM, "--output-dir", folder, *OPTIONS, *options)


def run_of(folder):
    (run,) = (folder / "permuted").iterdir()
    return run


def check_equal(run, other):
    """Rounding differs with the order of sums."""
    ours, theirs = ({(row["event"], row.get("epochs")): row for row in read_rows(folder)} for folder in (run, other))
    assert len(read_rows(run)) == 7 and ours.keys() == theirs.keys()
    for key, row in ours.items():
        for name in row.keys() & {"loss", "accuracies", "accuracy_matrix", "initial_accuracies"}:
            values = [np.array(of_run[name], np.float64) for of_run in (row, theirs[key])]
            np.testing.assert_allclose(*values, rtol=1e-4, atol=0.005)
    kept = [load_consolidation(folder / "sequences" / "ewc, seed 0" / "task-2.safetensors") for folder in (run, other)]
    chex.assert_trees_all_close(*kept, rtol=1e-3, atol=1e-5)


@pytest.fixture
def of_one_process(tmp_path, standard_promotion):
    words = map(str, ("--output-dir", tmp_path / "one", *OPTIONS, "--mesh", "data=2"))
    permuted.main(parse_settings(permuted.Config, "permuted", list(words)))
    return run_of(tmp_path / "one")


def test_two_processes_learn_what_one_does(tmp_path, of_one_process):
    first, second = run_processes(2, 1, *arguments(tmp_path, "--mesh", "data=2"))
    assert first[0].startswith("writing in ") and first[-1].startswith("results in ") and second == []
    check_equal(run_of(tmp_path), of_one_process)
    assert {file.name for file in run_of(tmp_path).iterdir()} == {file.name for file in of_one_process.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_ends_ends_the_run_which_goes_on_elsewhere(tmp_path, of_one_process, sent, stopped):
    environment = {"STOPPED": str(stopped), "SIGNAL": str(int(sent))}
    started = start_processes(2, 1, *arguments(tmp_path, "--mesh", "data=2"), environment=environment)
    printed = [lines_of(process.communicate(timeout=120)[0]) for process in started]
    codes = [process.returncode for process in started]
    if sent == signal.SIGTERM:  # both stop after the next epoch
        assert codes == [143 if index == stopped else 130 for index in range(2)]
        assert f"to go on: python -m experiments.permuted --resume {run_of(tmp_path)}" in printed[0][-1]
    else:
        assert codes[stopped] == -signal.SIGKILL and codes[1 - stopped] not in (0, -signal.SIGKILL)
    assert printed[1] == [] and len(read_rows(run_of(tmp_path))) < 7
    first, *_ = run_processes(1, 4, *arguments(tmp_path, "--mesh", "data=4", "--resume", run_of(tmp_path)))
    assert first[0].startswith("going on in ")
    check_equal(run_of(tmp_path), of_one_process)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=9", "--mesh data=9: there are 4 devices"),
        ("model=2", "mesh must be data= and the number of devices, such as data=8, not 'model=2'"),
        ("data=0", "mesh must be data= and the number"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_learned(capsys, tmp_path, mesh, message):
    with pytest.raises(SystemExit) as end:
        parse_settings(permuted.Config, "permuted", ["--output-dir", str(tmp_path), "--mesh", mesh])
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_processes_without_a_mesh_are_refused(capsys, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(SystemExit):
        parse_settings(permuted.Config, "permuted", [])
    assert "processes share the work only on a mesh: give --mesh data=" in capsys.readouterr().err
