"""Data sets: the bundled one, TFDS's where there is one, and what goes wrong."""

import os
import pathlib

import chex
import jax
import numpy as np
import pytest

from lifelong_jax import datasets


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    return tmp_path / "cache"


def test_digits():
    digits = datasets.load_dataset("digits")
    assert digits.train.inputs.shape == (1437, 8, 8, 1)
    assert digits.test.inputs.shape == (360, 8, 8, 1)
    assert digits.num_classes == 10
    for batch in (digits.train, digits.test):
        assert batch.inputs.dtype == np.float32
        assert batch.inputs.min() == 0
        assert batch.inputs.max() == 1
        assert set(batch.labels.tolist()) == set(range(10))
        assert batch.weights.sum() == len(batch.labels)
    images = {image.tobytes() for image in np.asarray(digits.train.inputs)}
    assert not any(image.tobytes() in images for image in np.asarray(digits.test.inputs))


def test_hold_out_validation_splits_the_training_data_and_drops_the_test_data():
    digits = datasets.load_digits()
    held = datasets.hold_out_validation(digits, 0.25, jax.random.key(0))
    assert held.test.inputs.shape[0] == 359
    assert held.train.inputs.shape[0] == 1437 - 359

    def rows(*batches):
        return sorted(image.tobytes() for batch in batches for image in np.asarray(batch.inputs))

    assert rows(held.train, held.test) == rows(digits.train)
    with pytest.raises(ValueError, match=r"fraction 0.0 of 1437 examples"):
        datasets.hold_out_validation(digits, 0.0, jax.random.key(0))


def test_unsigned_bytes_are_scaled():
    batch = datasets.make_batch(np.array([[0, 51, 255]], np.uint8), np.array([2]), 3)
    chex.assert_trees_all_close(np.asarray(batch.inputs), np.array([[0, 0.2, 1]], np.float32))


@pytest.mark.parametrize(
    ("inputs", "labels", "error", "message"),
    [
        (np.zeros((2, 3), int), np.zeros(2, int), TypeError, "inputs have dtype int64"),
        (np.zeros((2, 3)), np.zeros(2), TypeError, "labels have dtype float64"),
        (np.zeros((2, 3)), np.zeros(3, int), ValueError, r"inputs \(2, 3\) and labels \(3,\)"),
        (np.zeros((0, 3)), np.zeros(0, int), ValueError, r"\[num_examples\] > 0"),
        (np.array([[np.nan]]), np.zeros(1, int), ValueError, "inputs have entries that are NaN"),
        (np.zeros((2, 3)), np.array([0, 4]), ValueError, "labels reach from 0 to 4, but num_classes is 4"),
        (np.zeros((2, 3)), np.array([-1, 0]), ValueError, "labels reach from -1"),
    ],
)
def test_bad_batches(inputs, labels, error, message):
    with pytest.raises(error, match=message):
        datasets.make_batch(inputs, labels, 4)


def test_a_data_set_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=rf"no data set 'mnist' .* in {tmp_path}(.|\n)*pip install"):
        datasets.load_dataset("mnist", tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/elsewhere"):
        datasets.load_dataset("mnist")
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/home/tensorflow_datasets"):
        datasets.load_dataset("mnist")


class FakeBuilder:
    """Stands for TFDS's builder of a prepared data set."""

    def __init__(self, examples, features=("image", "label"), splits=("train", "test")):
        label = type("ClassLabel", (), {"num_classes": 3})
        self.info = type("Info", (), {"features": dict.fromkeys(features, label), "splits": dict.fromkeys(splits)})
        self.examples = examples
        self.reads = 0

    def as_data_source(self, split):
        self.reads += 1
        return self.examples[split]


def fake_tfds(monkeypatch, folder, builder):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: builder)
    prepared = folder / "fake" / "1.0.0"
    prepared.mkdir(parents=True, exist_ok=True)
    (prepared / "fake-train.array_record-00000-of-00001").write_bytes(b"prepared")


def images(*shapes):
    return [{"image": np.full(shape, 255, np.uint8), "label": index} for index, shape in enumerate(shapes)]


def test_decoded_arrays_are_cached_until_the_prepared_files_change(tmp_path, monkeypatch, own_cache):
    square = (2, 2, 1)
    builder = FakeBuilder({"train": images(square, square, square), "test": images(square)})
    fake_tfds(monkeypatch, tmp_path, builder)
    first = datasets.load_tfds("fake", tmp_path)
    assert first.train.inputs.shape == (3, 2, 2, 1)
    assert first.train.labels.tolist() == [0, 1, 2]
    assert first.num_classes == 3
    assert builder.reads == 2
    second = datasets.load_tfds("fake", tmp_path)
    assert builder.reads == 2
    chex.assert_trees_all_equal(first, second)
    assert not list(own_cache.glob("*.partial"))
    (tmp_path / "fake" / "1.0.0" / "fake-train.array_record-00000-of-00001").write_bytes(b"prepared anew")
    datasets.load_tfds("fake", tmp_path)
    assert builder.reads == 4


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (FakeBuilder({}, features=("text", "label")), r"features \['label', 'text'\], but 'image' and 'label'"),
        (FakeBuilder({}, splits=("train",)), r"splits \['train'\], but 'train' and 'test'"),
        (FakeBuilder({"train": images((2, 2, 1), (3, 2, 1)), "test": []}), "images of 2 shapes"),
    ],
)
def test_data_sets_of_another_kind(tmp_path, monkeypatch, builder, message):
    fake_tfds(monkeypatch, tmp_path, builder)
    with pytest.raises(ValueError, match=message):
        datasets.load_tfds("fake", tmp_path)


def test_mnist_as_tfds_prepares_it():
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no MNIST in {folder}: set TFDS_DATA_DIR to where TFDS has prepared it")
    mnist = datasets.load_dataset("mnist")
    assert mnist.train.inputs.shape == (60_000, 28, 28, 1)
    assert mnist.test.inputs.shape == (10_000, 28, 28, 1)
    assert np.bincount(mnist.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
