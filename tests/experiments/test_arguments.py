"""Arguments that no script can do anything with are refused in one line, before anything is computed."""

import json

import numpy as np
import pytest
import safetensors.numpy

from experiments import add_digit, dataset_sequence, permuted, reproduce, rotated, split
from experiments.harness.settings import parse_settings
from tests.experiments.files import read_table

pytestmark = pytest.mark.usefixtures("standard_promotion")


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
        (rotated, "--num-tasks 2000000000", "num_tasks = 2000000000 takes at least"),
        (add_digit, "--addends 1000000", "whose last layer would take 5.1 GB or more"),
        (add_digit, "--addends 99999999999999999999", "addends must be at most 2147483647"),
        (dataset_sequence, "--network alexnet", "alexnet needs --image-size 63 or more"),
        (dataset_sequence, "--network alexnet --image-size 64", "--channels 3, not 64 and 1"),
        (dataset_sequence, "--network alexnet --pretrained /nowhere", "there is no file /nowhere"),
        (reproduce, "--entries nothing", "entries must be among"),
        (permuted, "--network cnn --features 4 4 4 4", "need one image [height, width, channels] of at least 16 by 16"),
        (dataset_sequence, "--network cnn --image-size 2", "of at least 4 by 4 pixels, not (2, 2, 1)"),
        (permuted, "--hidden-sizes 1000000 1000000", "a network of 1,000,076,000,010 parameters takes at least"),
        (permuted, "--strength 1,10 --methods finetune joint", "none of the methods finetune, joint has a strength"),
        (split, "--classes-per-task 11", "classes_per_task must be below 10, the number of classes of digits"),
        (split, "--classes-per-task 10", "so that there are several tasks, not 10"),
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
    with pytest.raises(SystemExit, match="error: every method diverged: lower the learning rate"):
        call(permuted, tmp_path, *f"{small} --methods finetune ewc --learning-rate 1e30".split())
    (folder,) = (tmp_path / "permuted").iterdir()
    assert "| ewc | – |" in read_table(folder / "table.md")
    printed = capsys.readouterr().out
    assert "lower the learning rate" in printed
    assert "proximal" not in printed  # it is on already
    assert len(json.loads((folder / "record.json").read_text())["data"]) == 1
