"""The experiments end to end on the bundled digits, small; their files are read back."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import typing

import jax
import numpy as np
import platformdirs
import pytest
import tyro
from PIL import Image

from experiments import (
    add_digit,
    dataset_sequence,
    permuted,
    reconsolidate,
    rotated,
    split,
    strength_sweep,
    strength_transfer,
)
from experiments.harness import sequences
from experiments.harness.experiment import make_method
from experiments.harness.settings import parse_settings
from lifelong_jax.continual import learn_tasks
from lifelong_jax.datasets import load_dataset
from tests.experiments.files import read_table

pytestmark = pytest.mark.usefixtures("standard_promotion")


def run(script, output_dir, *arguments):
    small = ["--hidden-sizes", "16", "--num-epochs", "2", "--seeds", "0", "1"]
    script.main(tyro.cli(script.Config, args=[*small, "--output-dir", str(output_dir), *arguments]))
    (folder,) = (output_dir / script.__name__.split(".")[-1]).iterdir()
    return folder


def run_permuted(output_dir, *arguments):
    return run(permuted, output_dir, "--num-tasks", "2", *arguments)


def test_permuted(tmp_path, capsys):
    folder = run_permuted(tmp_path)
    names = ["finetune", "l2", "ewc", "mas", "kfac", "joint"]

    config = json.loads((folder / "config.json").read_text())
    assert config["num_tasks"] == 2
    assert config["seeds"] == [0, 1]

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if row["event"] == "epoch"]
    assert [row["epochs"] for row in epochs if row["method"] == "ewc" and row["seed"] == 1] == [1, 2, 3, 4]
    sequences = [row for row in rows if row["event"] == "sequence"]
    sequences.sort(key=lambda row: (names.index(row["method"]), row["seed"]))  # seeds are learned at once
    assert [(row["method"], row["seed"]) for row in sequences] == [(name, seed) for name in names for seed in (0, 1)]

    summary = json.loads((folder / "summary.json").read_text())["methods"]
    assert list(summary) == names
    for name in names:
        matrices = [row["accuracy_matrix"] for row in sequences if row["method"] == name]
        values = [np.mean(matrix[-1]) for matrix in matrices]
        estimate = summary[name]["average_accuracy"]
        np.testing.assert_allclose(estimate["values"], values)
        np.testing.assert_allclose(estimate["mean"], np.mean(values))
        np.testing.assert_allclose(estimate["stderr"], np.std(values, ddof=1) / np.sqrt(2))
    assert summary["joint"]["forgetting"]["mean"] is None
    joint_accuracy = np.array(sequences[10]["accuracy_matrix"][-1])
    learned = np.diag(sequences[4]["accuracy_matrix"])
    np.testing.assert_allclose(summary["ewc"]["intransigence"]["values"][0], np.mean(joint_accuracy - learned))
    gain = sequences[4]["accuracy_matrix"][0][1] - sequences[4]["initial_accuracies"][1]
    np.testing.assert_allclose(summary["ewc"]["forward_transfer"]["values"][0], gain)
    margin = summary["ewc"]["margin_over"]["finetune"]["values"]
    ewc, finetune = (summary[name]["average_accuracy"]["values"] for name in ("ewc", "finetune"))
    np.testing.assert_allclose(margin, np.subtract(ewc, finetune))

    for picture in ("accuracy.png", "average_accuracy.png", "accuracy_matrices.png"):
        with Image.open(folder / picture) as image:
            assert image.width > 800
            assert len(image.convert("RGB").getcolors(image.width * image.height)) > 10
    assert "| ewc |" in read_table(folder / "table.md")
    printed = capsys.readouterr().out
    assert "average" in printed
    assert str(folder) in printed


def test_permuted_chooses_strengths_on_validation_data(tmp_path, capsys):
    arguments = ["--methods", "finetune", "ewc", "--strength", "0.1,100,1e30"]
    folder = run_permuted(tmp_path, "--penalty", "coupled", *arguments)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    swept = [row for row in rows if row.get("split") == "validation"]
    assert {(row["method"], row["seed"]) for row in swept} == {
        (f"ewc {strength}", seed) for strength in ("0.1", "100", "1e+30") for seed in (0, 1)
    }
    assert len(swept) == 6
    assert all(row["event"] == "sequence" for row in swept)
    printed = capsys.readouterr().out
    chosen = json.loads((folder / "strength.json").read_text())["ewc"]
    assert chosen in (0.1, 100)
    best = np.mean([row["accuracy_matrix"][-1] for row in swept if row["method"] == f"ewc {chosen:.3g}"])
    assert f"ewc: average accuracy {100 * best:.1f}±" in printed
    assert f"chosen: --strength.ewc {chosen:.3g}" in printed
    table = read_table(folder / "tuning.md")
    assert "| 0.1 |" in table
    assert "| 1e+30 | – |" in table  # diverged
    with Image.open(folder / "tuning.png") as image:
        assert image.width > 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "1,-10"], "strength must be finite and at least 0"),
        (["--strength", "1,1"], "strength must have at least one entry, and no entry twice"),
        (["--strength", "1,10", "--tune"], "leave out either --tune or --strength"),
        (["--strength", "1,ten"], "give numbers, such as 1,10,100"),
        (["--seeds", "3-1"], "give integers and ranges, such as 0-4 or 0,2,4"),
    ],
)
def test_invalid_strengths_and_seeds(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        tyro.cli(permuted.Config, args=arguments)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("option", ["--consolidation latest --decay 0.9", "--fisher sampled --optimizer adam"])
def test_permuted_options(tmp_path, option):
    folder = run_permuted(tmp_path, "--methods", "ewc", *option.split())
    assert list(json.loads((folder / "summary.json").read_text())["methods"]) == ["ewc"]


def summary_of(folder):
    assert {path.name for path in folder.iterdir()} >= {"accuracy.png", "accuracy_matrices.png", "table.md"}
    return json.loads((folder / "summary.json").read_text())["methods"]


@pytest.mark.slow
def test_rotated(tmp_path):
    arguments = ["--num-tasks", "3", "--max-angle", "20", "--methods", "mas", "--num-epochs", "10", "--seeds", "0"]
    summary = summary_of(run(rotated, tmp_path, *arguments, "--hidden-sizes", "64"))
    assert summary["mas"]["forward_transfer"]["mean"] > 0.3  # ten degrees are nearly the same task
    assert summary["mas"]["average_accuracy"]["mean"] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("script", [permuted, rotated, split])
def test_methods_of_the_path_and_of_layers(tmp_path, script):
    names = ["local_mas", "si", "rwalk"]
    summary = summary_of(run(script, tmp_path, "--methods", *names, "--seeds", "0"))
    assert list(summary) == names
    assert all(metrics["average_accuracy"]["mean"] > 0.2 for metrics in summary.values())


def test_every_method_has_a_strength():
    config = permuted.Config()
    (names, _) = typing.get_args(typing.get_type_hints(type(config))["methods"])
    for name in typing.get_args(names):
        method = make_method(config, name)
        assert method is None if name == "joint" else method.name == name
    penalised = set(typing.get_args(names)) - {"finetune", "joint"}
    assert penalised == {field.name for field in dataclasses.fields(config.strength)}


@pytest.mark.parametrize(
    "scenario", ["class", pytest.param("task", marks=pytest.mark.slow), pytest.param("domain", marks=pytest.mark.slow)]
)
def test_split(tmp_path, scenario):
    names = ["ewc"] if scenario == "class" else ["ewc", "joint"]
    arguments = ["--scenario", scenario, "--classes-per-task", "4", "--methods", *names, "--seeds", "0"]
    summary = summary_of(run(split, tmp_path, *arguments))
    assert np.array(summary["ewc"]["accuracy_matrix"]).shape == (3, 3)  # 4 + 4 + 2 classes
    assert (summary["ewc"]["forward_transfer"]["mean"] is None) == (scenario == "class")
    if scenario != "class":
        assert summary["joint"]["average_accuracy"]["mean"] > 0.5  # chance is a third


def test_split_takes_classes_in_any_order():
    config = split.Config(classes_per_task=3)
    groups = [split.class_groups(config, 10, jax.random.key(seed)) for seed in range(2)]
    assert groups[0] != groups[1]
    assert [len(group) for group in groups[0]] == [3, 3, 3, 1]
    assert sorted(label for group in groups[0] for label in group) == list(range(10))
    by_number = split.class_groups(dataclasses.replace(config, class_order="sorted"), 10, jax.random.key(0))
    assert by_number == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_add_digit(tmp_path):
    dataset = load_dataset("digits")
    first, second = (add_digit.make_task(dataset, (1, 2), addend) for addend in (1, 2))
    np.testing.assert_array_equal(second.train.labels, first.train.labels + 1)
    np.testing.assert_array_equal(first.train.inputs[:, :64], second.train.inputs[:, :64])
    norms = np.linalg.norm(first.train.inputs[:, :64], axis=1)
    np.testing.assert_allclose(first.train.inputs[:, 64], np.sqrt(np.mean(norms**2)), rtol=1e-5)
    np.testing.assert_array_equal(first.train.inputs[:, 65], 0)

    summary = summary_of(run(add_digit, tmp_path, "--methods", "finetune", "--num-epochs", "10", "--seeds", "0"))
    assert summary["finetune"]["last_task_accuracy"]["mean"] > 0.8
    assert summary["finetune"]["first_task_accuracy"]["mean"] < 0.5


@pytest.mark.slow
def test_dataset_sequence(tmp_path):
    arguments = ["--methods", "finetune", "mas", "--network", "cnn", "--image-size", "10", "--seeds", "0"]
    summary = summary_of(run(dataset_sequence, tmp_path, *arguments))
    assert summary["mas"]["last_task_accuracy"]["mean"] > 0.2  # of 26 letters
    with pytest.raises(ValueError, match="pretrained parameters are for network alexnet, not mlp"):
        dataset_sequence.Config(pretrained="alexnet.safetensors")


def test_dataset_sequence_of_scenes_and_birds(tmp_path, mocked_birds, monkeypatch):
    # Scenes in their own layout; birds from TFDS, mocked.
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    rng = np.random.default_rng(0)
    names = [f"{scene}/{index}.jpg" for scene in ("bakery", "library") for index in range(4)]
    for name in names:
        (tmp_path / "Images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "Images" / name)
    (tmp_path / "TrainImages.txt").write_text("\n".join(names[::2]))
    (tmp_path / "TestImages.txt").write_text("\n".join(names[1::2]))
    scenes = f"mit_scenes:{tmp_path}"
    arguments = ["--datasets", scenes, "caltech_birds2011", "--image-size", "8", "--channels", "3", "--seeds", "0"]
    arguments += ["--data-dir", str(mocked_birds), "--methods", "mas"]
    summary = summary_of(run(dataset_sequence, tmp_path, *arguments))
    assert np.array(summary["mas"]["accuracy_matrix"]).shape == (2, 2)


@pytest.mark.parametrize("scenario", ["domain", pytest.param("task", marks=pytest.mark.slow)])
def test_dataset_sequence_of_very_different_sizes(tmp_path, monkeypatch, scenario):
    """Padding would take more than twice the memory; sweeps need it."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    rng = np.random.default_rng(0)
    names = [f"folder:{tmp_path / name}" for name in ("many", "few", "other")]
    for name, num_images in zip(names, (20, 3, 3), strict=True):
        for part, label, index in itertools.product(("train", "test"), ("circle", "square"), range(num_images)):
            file = pathlib.Path(name.removeprefix("folder:")) / part / label / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(file)
    sizes = []
    monkeypatch.setattr(sequences, "learn_tasks", lambda *arguments, **options: learned(sizes, *arguments, **options))
    arguments = ["--datasets", *names, "--scenario", scenario, "--methods", "finetune", "kfac", "--num-epochs", "1"]
    if scenario == "domain":
        arguments += ["--strength", "1,10"]
    summary = summary_of(run(dataset_sequence, tmp_path, *arguments, "--seeds", "0", "--hidden-sizes", "4"))
    assert np.array(summary["kfac"]["accuracy_matrix"]).shape == (3, 3)
    assert sizes == [[40, 6, 6]] * 2


def learned(sizes, method, recipe, params, tasks, key, **options):
    """Learns tasks, and adds their sizes to a list."""
    sizes.append([len(task.train.labels) for task in tasks])
    return learn_tasks(method, recipe, params, tasks, key, **options)


def test_permuted_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_settings(permuted.Config, "permuted", ["--help"])
    printed = capsys.readouterr().out
    for flag in ("--dataset", "--methods", "--num-tasks", "--hidden-sizes", "--strength.ewc", "--seeds", "--tune"):
        assert flag in printed
    assert "--strength 1,10,100" in printed


def test_permuted_names_a_data_set_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "experiments.permuted", "--dataset", "mnist", "--data-dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"no data set 'mnist' prepared in array_record format in {tmp_path}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_strength_sweep(tmp_path, capsys):
    small = ["--num-tasks", "2", "--hidden-sizes", "16", "--num-epochs", "2", "--seeds", "0"]
    arguments = [*small, "--strength", "1,1e12", "--output-dir", str(tmp_path)]
    strength_sweep.main(tyro.cli(strength_sweep.Config, args=arguments))
    (folder,) = (tmp_path / "strength_sweep").iterdir()

    accuracy = json.loads((folder / "summary.json").read_text())["average_accuracy"]
    assert len(accuracy) == 3 + 4
    assert all(list(by_strength) == ["1", "1e+12"] for by_strength in accuracy.values())
    assert accuracy["sgd coupled"]["1"]["values"] == accuracy["sgd decoupled"]["1"]["values"]
    assert not any(by_strength["1"]["mean"] is None for by_strength in accuracy.values())
    diverged = [name for name, by_strength in accuracy.items() if by_strength["1e+12"]["mean"] is None]
    assert diverged == ["sgd coupled", "sgd decoupled", "adam decoupled"]
    with Image.open(folder / "strength_sweep.png") as image:
        assert image.width > 800
    assert "| 1e+12 | – |" in read_table(folder / "table.md")
    assert str(folder) in capsys.readouterr().out


@pytest.mark.slow
def test_strength_transfer(tmp_path, monkeypatch):
    monkeypatch.setattr(strength_transfer, "HALF_DECADES", {"none": [0, 4], "mean": [-4, 0], "max": [0, 4]})
    config = tyro.cli(strength_transfer.Config, args=["--num-tasks", "2", "--num-epochs", "1", "--seeds", "0"])
    config = dataclasses.replace(config, networks=((4,), (8,)), output_dir=str(tmp_path))
    strength_transfer.main(config)
    (folder,) = (tmp_path / "strength_transfer").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["best"]) == list(summary["cost"]) == ["none", "mean", "max"]
    assert all(cost >= 0 for costs in summary["cost"].values() for cost in costs)
    assert "| 8 |" in read_table(folder / "table.md")


@pytest.mark.slow
def test_reconsolidate(tmp_path, capsys):
    small = "--num-tasks 2 --hidden-sizes 8 --num-epochs 1 --seeds 0 --strengths 100 1e4"
    arguments = [*small.split(), "--output-dir", str(tmp_path)]
    reconsolidate.main(tyro.cli(reconsolidate.Config, args=arguments))
    (folder,) = (tmp_path / "reconsolidate").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    matrices = {row["method"]: row["accuracy_matrix"] for row in rows if row["event"] == "sequence"}
    assert matrices["separate 100"] == [[None, None], matrices["first"][-1]]  # as the first time
    accuracy = json.loads((folder / "summary.json").read_text())["accuracy"]
    mean = np.mean(matrices["latest 1e+04"][-1])
    np.testing.assert_allclose(accuracy["all tasks"]["latest"][1]["mean"], mean)
    with Image.open(folder / "reconsolidate.png") as image:
        assert image.width > 800
    assert "| 1e+04 |" in read_table(folder / "table.md")
    assert "4 runs of 1 epochs per seed, instead of 2" in capsys.readouterr().out
