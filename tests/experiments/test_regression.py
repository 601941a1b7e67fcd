"""The script on regressions: its tasks, its table in squared errors, the choice of the lowest, and how it goes on."""

import json

import jax
import numpy as np
import pytest

from experiments import regression
from experiments.harness.runs import read_rows
from experiments.harness.settings import parse_settings
from lifelong_jax.datasets import load_dataset
from lifelong_jax.models import MLP
from tests.experiments.files import read_table

pytestmark = pytest.mark.usefixtures("standard_promotion")

SMALL = ["--classes", "2", "7", "--turns", "1", "--hidden-sizes", "8", "--num-epochs", "1"]


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls the script, and returns the run's folder."""
    network = MLP((8,), 1)  # the same object in every call, so that what is compiled is used again
    monkeypatch.setattr(regression, "make_network", lambda settings, num_outputs: network)

    def call(*arguments):
        where = ["--output-dir", str(tmp_path)]
        regression.main(parse_settings(regression.Config, "regression", [*arguments, *where]))
        return max((tmp_path / "regression").iterdir())

    return call


def test_a_run_reports_squared_errors_and_takes_another_seed(call):
    begun = call(*SMALL, "--seeds", "0")
    before = read_rows(begun)
    folder = call("--resume", str(begun), "--seeds", "1")
    assert folder == begun
    rows = read_rows(folder)
    assert rows[: len(before)] == before
    assert {row["seed"] for row in rows[len(before) :]} == {1}
    assert {row["score"] for row in rows} == {"squared error"}
    summary = json.loads((folder / "summary.json").read_text())["methods"]
    assert list(summary) == ["finetune", "l2", "ewc", "mas", "kfac", "joint"]
    for name, of_method in summary.items():
        matrices = [row["accuracy_matrix"] for row in rows if row["event"] == "sequence" and row["method"] == name]
        np.testing.assert_allclose(of_method["average_squared_error"]["values"], [np.mean(m[-1]) for m in matrices])
        if name != "joint":
            grown = [matrix[1][0] - matrix[0][0] for matrix in matrices]
            np.testing.assert_allclose(of_method["forgetting"]["values"], grown)
    assert "| method | average squared error |" in read_table(folder / "table.md")
    pictures = {"squared_error.png", "average_squared_error.png", "squared_error_matrices.png"}
    assert {path.name for path in folder.glob("*.png")} == pictures


@pytest.mark.slow
def test_the_strength_of_the_lowest_error_is_chosen(call):
    folder = call(*SMALL, "--methods", "ewc", "--seeds", "0", "--num-epochs", "8", "--strength", "0.1,1e6")
    swept = {row["method"]: row["accuracy_matrix"] for row in read_rows(folder) if row.get("split") == "validation"}
    errors = {name: np.mean(matrix[-1]) for name, matrix in swept.items()}
    assert errors["ewc 0.1"] < errors["ewc 1e+06"]  # at which the second task is not learned
    assert json.loads((folder / "strength.json").read_text())["ewc"] == 0.1
    assert f"| 0.1 | {errors['ewc 0.1']:.3f} |" in read_table(folder / "tuning.md")


def test_each_task_has_the_turned_images_of_a_class():
    dataset, config = load_dataset("digits"), regression.Config(classes=(3, 7), turns=2)
    tasks = regression.make_tasks(config, dataset, jax.random.key(0))
    again, other = (regression.make_tasks(config, dataset, jax.random.key(seed)) for seed in (0, 1))
    for number, task, same, different in zip((3, 7), tasks, again, other, strict=True):
        for batch, images in ((task.train, dataset.train), (task.test, dataset.test)):
            assert batch.inputs.shape == (2 * np.sum(images.labels == number), 8, 8, 1)
            assert batch.labels.shape == (len(batch.inputs), 1)
        np.testing.assert_array_equal(task.train.inputs, same.train.inputs)
        np.testing.assert_array_equal(task.train.labels, same.train.labels)
        assert not np.array_equal(task.train.labels, different.train.labels)
        assert 0.8 < np.var(task.train.labels) < 1.2


def test_a_label_is_the_angle_of_its_image():
    class Largest:
        def uniform(self, low, high, size):
            return np.full(size, high)

    images = np.random.default_rng(0).uniform(size=(2, 5, 5, 3)).astype(np.float32)
    batch = regression.turn(images, 90.0, Largest())
    np.testing.assert_allclose(batch.inputs, np.rot90(images, axes=(1, 2)), atol=1e-6)
    np.testing.assert_allclose(batch.labels, 3**0.5)
    np.testing.assert_allclose(regression.turn(images, 1e-9, Largest()).inputs, images, atol=1e-6)
