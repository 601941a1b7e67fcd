"""Comparisons that are added to: the numbers of one that had all its seeds and methods from the start."""

import json
import unittest.mock

import optax
import pytest

from experiments import permuted
from experiments.harness import experiment, networks
from experiments.harness.runs import Run, read_rows
from experiments.harness.settings import DataSettings, parse_settings
from lifelong_jax import add_quadratic_penalty, plotting
from lifelong_jax.models import CNN, MLP, train_functions
from tests.pictures import break_image, write_image

pytestmark = pytest.mark.usefixtures("standard_promotion")

SMALL = ["--num-tasks", "2", "--hidden-sizes", "8", "--num-epochs", "1"]
RESULTS = ("summary.json", "table.md", "table.csv")


def optimizer_fn(strength):
    return optax.chain(add_quadratic_penalty(strength), optax.sgd(0.1))


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls the script; returns the run's folder, and the rows that this call has logged."""
    network, logged = MLP((8,), 10), []  # the same objects in every call, so that what is compiled is used again
    monkeypatch.setattr(permuted, "make_network", lambda settings, num_outputs: network)
    monkeypatch.setattr(experiment, "make_optimizer_fn", lambda *arguments: optimizer_fn)
    for plot in ("plot_accuracy_curves", "plot_average_accuracy", "plot_accuracy_matrices", "plot_strength_sweep"):
        monkeypatch.setattr(plotting, plot, lambda *arguments, **options: unittest.mock.Mock())
    log = Run.log
    monkeypatch.setattr(Run, "log", lambda run, **row: (logged.append((run.folder, row)), log(run, **row)))

    def call(*arguments):
        logged.clear()
        permuted.main(parse_settings(permuted.Config, "permuted", [*arguments, "--output-dir", str(tmp_path)]))
        return logged[0][0], [row for _, row in logged]

    return call


def places(rows):
    return sorted({(row["method"], row["seed"]) for row in rows})


def texts(folder):
    return [(folder / name).read_text() for name in RESULTS]


def test_seeds_and_methods_are_added_and_nothing_is_learned_again(call, capsys):
    whole, _ = call(*SMALL, "--seeds", "0-2", "--methods", "ewc", "joint", "finetune")
    begun, _ = call(*SMALL, "--seeds", "0,1", "--methods", "ewc", "joint")
    before = read_rows(begun)
    capsys.readouterr()
    grown, added = call("--resume", str(begun), "--seeds", "1,2", "--methods", "finetune", "ewc")
    assert grown == begun
    assert read_rows(begun)[: len(before)] == before
    assert places(added) == [("ewc", 2), ("finetune", 0), ("finetune", 1), ("finetune", 2), ("joint", 2)]
    assert texts(begun) == texts(whole)
    config, other = (json.loads((folder / "config.json").read_text()) for folder in (begun, whole))
    assert config == other
    assert {name: config[name] for name in ("seeds", "methods")} == {
        "seeds": [0, 1, 2],
        "methods": ["ewc", "joint", "finetune"],
    }
    assert (begun / "record.json").read_text() == (whole / "record.json").read_text()
    printed = capsys.readouterr().out
    assert "adding methods finetune\nadding seeds 2\n" in printed
    parse_settings(permuted.Config, "permuted", ["--resume", str(begun)])  # its files agree


def test_what_is_added_after_a_choice_of_strengths_leaves_the_choice_as_it_was(call):
    begun, _ = call(*SMALL, "--seeds", "0,1", "--methods", "ewc", "--strength", "1,100")
    chosen = json.loads((begun / "strength.json").read_text())
    _, added = call("--resume", str(begun), "--seeds", "2", "--methods", "mas", "joint")
    swept = [row for row in added if row.get("split") == "validation"]
    assert places(swept) == [("mas 1", 0), ("mas 1", 1), ("mas 100", 0), ("mas 100", 1)]  # from the same seeds as ewc
    compared = [row for row in added if row.get("split") is None]
    assert places(compared) == [("ewc", 2), *((name, seed) for name in ("joint", "mas") for seed in range(3))]
    strength = json.loads((begun / "strength.json").read_text())
    assert strength == chosen | {"mas": strength["mas"]}
    assert strength["mas"] in (1, 100)
    assert "| 100 " in (begun / "tuning.md").read_text()
    whole, _ = call(
        *SMALL,
        "--seeds",
        "0-2",
        "--methods",
        "ewc",
        "mas",
        "joint",
        *(f"--strength.{m}={strength[m]}" for m in ("ewc", "mas")),
    )
    assert texts(begun) == texts(whole)


def test_until_strengths_are_chosen_added_seeds_have_a_say(call, monkeypatch):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(experiment, "choose_strengths", killed)
        call(*SMALL, "--seeds", "0", "--methods", "ewc", "--strength", "1,100")
    _, added = call("--resume", "--seeds", "1")
    assert places(row for row in added if row.get("split") == "validation") == [("ewc 1", 1), ("ewc 100", 1)]


def test_a_network_is_trained_otherwise_than_it_predicts_only_if_it_is_asked_to():
    for arguments, expected, is_trained_otherwise in (
        ((), MLP((256, 256), 10), False),
        (("--network", "cnn"), CNN((16, 32), 10), False),
        (("--dropout", "0.2"), MLP((256, 256), 10, dropout=0.2), True),
        (("--network", "cnn", "--batch-norm"), CNN((16, 32), 10, batch_norm=True), True),
    ):
        settings = parse_settings(permuted.Config, "permuted", arguments)
        network = networks.make_network(settings, 10)
        functions = networks.network_functions(settings, network)
        assert network == expected
        assert functions == (train_functions(expected) if is_trained_otherwise else (network.apply, None))


def test_images_of_folders_become_what_the_settings_say(tmp_path, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache")
    for number, split in enumerate(("train", "test")):
        write_image(tmp_path / split / "a" / "image.png", (6, 7 + number), 51)
    name = f"folder:{tmp_path}"
    with pytest.raises(SystemExit, match=r"^error: .* all must have the same shape: set image_size"):
        experiment.load_or_exit(name, DataSettings())
    break_image(tmp_path / "train" / "a" / "broken.png")
    with pytest.raises(SystemExit, match=r"^error: 1 of 3 images cannot be read:\n.*a/broken\.png"):
        experiment.load_or_exit(name, DataSettings(image_size=4))
    with pytest.warns(UserWarning, match="1 of 3 images are left out"):
        dataset = experiment.load_or_exit(name, DataSettings(image_size=4, channels=1, skip_unreadable=True))
    assert dataset.train.inputs.shape == (1, 4, 4, 1)
    with pytest.raises(ValueError, match="image_size must be finite and above 0, not 0"):
        DataSettings(image_size=0)
