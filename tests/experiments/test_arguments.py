"""Arguments that no script can do anything with are refused in one line, before anything is computed."""

import json
import unittest.mock

import numpy as np
import pytest
import safetensors.numpy

from experiments import (
    add_digit,
    dataset_sequence,
    permuted,
    reconsolidate,
    regression,
    reproduce,
    rotated,
    split,
    strength_sweep,
    strength_transfer,
    text,
)
from experiments.harness.settings import parse_settings
from tests.experiments.files import read_table

pytestmark = pytest.mark.usefixtures("standard_promotion")

DIVERGED = "^error: no result, because training diverged: lower the learning rate or the strengths"


def call(script, output_dir, *arguments):
    name = script.__name__.split(".")[-1]
    script.main(parse_settings(script.Config, name, [*arguments, "--output-dir", str(output_dir)]))


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (permuted, "--seeds 99999999999999999999", "give seeds below 2^32"),
        (permuted, "--strength.ewc 1e300", "strength.ewc must be at most 3.4e38"),
        (permuted, "--num-epochs 99999999999999999999", "num_epochs must be at most 2147483647"),
        (permuted, "--num-tasks 2000000000", "num_tasks = 2000000000 takes at least"),
        *(
            (script, "--num-tasks 2000000000", "num_tasks = 2000000000 takes at least")
            for script in (rotated, reconsolidate, strength_sweep, strength_transfer)
        ),
        (add_digit, "--addends 1000000", "whose last layer would take 5.1 GB or more"),
        (add_digit, "--addends 99999999999999999999", "addends must be at most 2147483647"),
        (dataset_sequence, "--network alexnet", "alexnet needs --image-size 63 or more"),
        (dataset_sequence, "--network alexnet --image-size 64", "--channels 3, not 64 and 1"),
        (dataset_sequence, "--network alexnet --pretrained /nowhere", "there is no file /nowhere"),
        (dataset_sequence, "--scenario domain", "needs data sets of the same classes, not of 10, 26 classes"),
        (reproduce, "--entries nothing", "entries must be among"),
        (permuted, "--network cnn --features 4 4 4 4", "need one image [height, width, channels] of at least 16 by 16"),
        (dataset_sequence, "--network cnn --image-size 2", "of at least 4 by 4 pixels, not (2, 2, 1)"),
        (permuted, "--dropout 1", "dropout must be at least 0 and below 1, not 1.0"),
        (permuted, "--dropout nan", "dropout must be at least 0 and below 1, not nan"),
        (split, "--network cnn --dropout 0.1", "--dropout is for network mlp, not cnn"),
        (dataset_sequence, "--batch-norm", "--batch-norm is for network cnn, not mlp"),
        (permuted, "--hidden-sizes 1000000 1000000", "a network of 1,000,076,000,010 parameters takes at least"),
        (permuted, "--strength 1,10 --methods finetune joint", "none of the methods finetune, joint has a strength"),
        (split, "--classes-per-task 11", "classes_per_task must be below 10, the number of classes of digits"),
        (split, "--classes-per-task 10", "so that there are several tasks, not 10"),
        (regression, "--classes 2 10", "classes must be below 10, as digits has them, not (2, 10)"),
        (regression, "--turns 0", "turns must be finite and above 0"),
        (text, "--width 6", "width must be a multiple of 4, the number of heads, not 6"),
        (text, "--num-examples 1000000", "for prose, not 1000000"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(tmp_path, capsys, script, arguments, message):
    with pytest.raises(SystemExit) as ended:
        call(script, tmp_path / "results", *arguments.split())
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert message in " ".join(printed.replace("│", " ").split())
    assert "Traceback" not in printed
    assert not (tmp_path / "results").exists()


def test_pretrained_parameters_that_do_not_fit_are_one_line(tmp_path, capsys):
    file = tmp_path / "weights.safetensors"
    arguments = ["--network", "alexnet", "--image-size", "64", "--channels", "3", "--pretrained", str(file)]
    for content, message in (
        (b"no tensors", "is not a safetensors file"),
        (safetensors.numpy.save({"features.0.weight": np.zeros(3)}), "does not fit the network: features.0.weight has"),
    ):
        file.write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            call(dataset_sequence, tmp_path / "results", *arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("dataset", ["x" * 300, "folder:" + "x" * 300, "", "folder:", "mit_scenes:/nowhere", "a\0b"])
def test_a_data_set_that_cannot_be_there_is_one_line(tmp_path, dataset):
    with pytest.raises(SystemExit, match=r"^error: "):
        call(permuted, tmp_path, "--dataset", dataset, "--data-dir", str(tmp_path))


def test_where_every_method_diverged_the_run_fails(tmp_path, capsys):
    small = "--num-tasks 2 --hidden-sizes 4 --num-epochs 1 --seeds 0"
    with pytest.raises(SystemExit, match=DIVERGED):
        call(permuted, tmp_path, *f"{small} --methods finetune ewc --learning-rate 1e30".split())
    (folder,) = (tmp_path / "permuted").iterdir()
    assert "| ewc | – |" in read_table(folder / "table.md")
    printed = capsys.readouterr().out
    assert "lower the learning rate" in printed
    assert "proximal" not in printed  # it is on already
    assert len(json.loads((folder / "record.json").read_text())["data"]) == 1


SMALL = ["--num-tasks", "2", "--hidden-sizes", "4", "--num-epochs", "1", "--seeds", "0", "1"]


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def test_where_every_strength_diverged_the_sweep_fails(tmp_path, monkeypatch):
    def diverging(learners, strengths, make_tasks, init_params, seeds, run, console):
        accuracies = np.full((len(strengths), len(seeds), 2, 2), 0.5)
        accuracies[: 2 if all_of_them else 1, 1] = np.nan  # for one of the seeds
        return dict.fromkeys(learners, accuracies)

    monkeypatch.setattr(strength_sweep, "sweep_strengths", diverging)
    all_of_them = False
    call(strength_sweep, tmp_path / "some", *SMALL, "--strength", "1,2")
    all_of_them = True
    with pytest.raises(SystemExit, match=DIVERGED):
        call(strength_sweep, tmp_path, *SMALL, "--strength", "1,2")
    (folder,) = (tmp_path / "strength_sweep").iterdir()
    assert "| 2e+00 | – | – |" in read_table(folder / "table.md")
    assert len(record_of(folder)["data"]) == 1


def test_a_network_that_diverged_at_every_strength_has_no_best_one(tmp_path, monkeypatch):
    def diverging(learners, strengths, make_tasks, init_params, seeds, run, console):
        value = np.nan if any("(128, 128, 128)" in name for name in learners) else 0.5
        return dict.fromkeys(learners, np.full((len(strengths), len(seeds), 2, 2), value))

    monkeypatch.setattr(strength_transfer, "sweep_strengths", diverging)
    with pytest.raises(SystemExit, match=r"^error: none \(128, 128, 128\) diverged at every strength: lower the"):
        call(strength_transfer, tmp_path)
    (folder,) = (tmp_path / "strength_transfer").iterdir()
    assert len(record_of(folder)["data"]) == 1


@pytest.mark.parametrize("num_finished", [0, 1])
def test_where_the_first_or_every_other_sequence_diverged_reconsolidation_fails(tmp_path, monkeypatch, num_finished):
    called = []

    def diverging(learners, **arguments):
        called.append(list(learners))
        matrices = np.full((2, 2, 2), 0.5 if len(called) <= num_finished else np.nan)
        return {name: unittest.mock.Mock(accuracy_matrix=matrices) for name in learners}

    monkeypatch.setattr(reconsolidate, "compare", diverging)
    with pytest.raises(SystemExit, match=DIVERGED):
        call(reconsolidate, tmp_path, *SMALL, "--strengths", "1", "2")
    assert called == [["first"], ["separate 1", "separate 2", "latest 1", "latest 2"]][: num_finished + 1]
    (folder,) = (tmp_path / "reconsolidate").iterdir()
    assert (folder / "table.md").exists() == bool(num_finished)
    assert len(record_of(folder)["data"]) == 1


def test_where_every_method_of_every_row_diverged_the_reproduction_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "load_or_exit", lambda name, data_dir: np.zeros(1))
    monkeypatch.setattr(reproduce, "write_docs", lambda *arguments: None)
    accuracies = {1: [np.nan, 90.0], 2: [90.0, 91.0]}

    def run_row(row, *arguments):
        name = reproduce.ROWS[row].entries[0].name
        return [{"name": name, "strength": 1.0, "accuracies": accuracies[row], "validation": {}}]

    monkeypatch.setattr(reproduce, "run_row", run_row)
    call(reproduce, tmp_path, "--rows", "1,2")
    with pytest.raises(SystemExit, match=DIVERGED):
        call(reproduce, tmp_path, "--rows", "1")
