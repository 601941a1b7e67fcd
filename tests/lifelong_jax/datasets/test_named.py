"""Data sets: bundled, prepared by TFDS, in folders; sizes and colours; errors."""

import os
import pathlib

import chex
import jax
import numpy as np
import pytest

from lifelong_jax import datasets
from lifelong_jax.datasets import named
from lifelong_jax.streaming import stream_batches
from tests.obstacles import OBSTACLES
from tests.pictures import break_image, write_image


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


def test_digits_at_another_size_and_in_colour():
    digits = datasets.load_dataset("digits")
    large = datasets.load_dataset("digits", image_size=16, channels=3)
    assert large.test.inputs.shape == (360, 16, 16, 3)
    chex.assert_trees_all_equal(large.test.labels, digits.test.labels)
    images = np.asarray(large.test.inputs)
    np.testing.assert_array_equal(images[..., 0], images[..., 2])
    halved = images[..., 0].reshape(360, 8, 2, 8, 2).mean((2, 4))
    assert np.corrcoef(halved.ravel(), np.asarray(digits.test.inputs).ravel())[0, 1] > 0.95


@pytest.fixture(scope="module")
def letters():
    return datasets.load_dataset("letters")


def test_letters_are_the_same_drawings_at_every_size(letters):
    large = datasets.load_dataset("letters", image_size=16)
    assert letters.num_classes == 26
    assert letters.train.inputs.shape == (3328, 8, 8, 1)
    assert letters.test.inputs.shape == (1248, 8, 8, 1)
    for small, double in ((letters.train, large.train), (letters.test, large.test)):
        assert set(np.bincount(small.labels).tolist()) == {len(small.labels) // 26}
        np.testing.assert_array_equal(small.inputs.max((1, 2, 3)), 1)
        np.testing.assert_array_equal(small.labels, double.labels)
        halved = np.asarray(double.inputs).reshape(-1, 8, 2, 8, 2).mean((2, 4))
        pairs = zip(np.asarray(small.inputs), halved, strict=True)
        similar = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]
        assert min(similar) > 0.95


def test_letters_of_unseen_typefaces_can_be_read(letters):
    train, test = (np.asarray(batch.inputs).reshape(-1, 64) for batch in (letters.train, letters.test))
    distances = (train**2).sum(1) - 2 * test @ train.T
    nearest = np.asarray(letters.train.labels)[distances.argmin(1)]
    assert 0.9 < (nearest == np.asarray(letters.test.labels)).mean() < 0.99  # neither hard nor learned by heart


def test_hold_out_validation_splits_the_training_data_and_drops_the_test_data():
    digits = datasets.load_dataset("digits")
    held = datasets.hold_out_validation(digits, 0.25, jax.random.key(0))
    assert held.test.inputs.shape[0] == 359
    assert held.train.inputs.shape[0] == 1437 - 359

    def rows(*batches):
        return sorted(image.tobytes() for batch in batches for image in np.asarray(batch.inputs))

    assert rows(held.train, held.test) == rows(digits.train)
    opened = datasets.hold_out_validation(datasets.open_dataset("digits"), 0.25, jax.random.key(0))
    np.testing.assert_array_equal([opened.test[index].labels for index in range(359)], held.test.labels)
    np.testing.assert_array_equal(opened.train[7].inputs, held.train.inputs[7])
    with pytest.raises(ValueError, match=r"fraction 0.0 of 1437 examples leaves one"):
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
        (np.zeros((0, 3)), np.zeros(0, int), ValueError, "the same number of examples, at least 1"),
        (np.array([[np.nan]]), np.zeros(1, int), ValueError, "inputs have entries that are NaN"),
        (np.zeros((2, 3)), np.array([0, 4]), ValueError, "labels range from 0 to 4, but num_classes is 4"),
        (np.zeros((2, 3)), np.array([-1, 0]), ValueError, "labels range from -1"),
    ],
)
def test_bad_batches(inputs, labels, error, message):
    with pytest.raises(error, match=message):
        datasets.make_batch(inputs, labels, 4)


@pytest.mark.parametrize(("settings", "message"), [({"image_size": 0}, "image_size"), ({"channels": 2}, "channels")])
def test_bad_shapes(settings, message):
    for door in (datasets.load_dataset, datasets.open_dataset):
        with pytest.raises(ValueError, match=f"{message} must be"):
            door("digits", **settings)


def test_a_folder_of_images(folder, own_cache, monkeypatch):
    animals = datasets.load_dataset(f"folder:{folder}", image_size=4)
    assert animals.num_classes == 2
    assert animals.train.inputs.shape == (3, 4, 4, 3)
    np.testing.assert_allclose(255 * animals.train.inputs[:, 1, 2, 1], [100, 200, 250], atol=3)
    np.testing.assert_allclose(255 * animals.test.inputs[:, 1, 2, 1], [20, 51], atol=3)
    assert animals.train.labels.tolist() == [0, 1, 1]
    assert animals.test.labels.tolist() == [0, 1]

    grey = datasets.load_dataset(f"folder:{folder}", image_size=4, channels=1)  # another size, another cache
    assert grey.train.inputs.shape == (3, 4, 4, 1)
    assert len(list(own_cache.glob("folder-*.npz"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(named, "_open", None)  # what is cached is not opened
        chex.assert_trees_all_equal(datasets.load_dataset(f"folder:{folder}", image_size=4), animals)
    write_image(folder / "test" / "cat" / "f.png", (7, 7), 130)
    assert datasets.load_dataset(f"folder:{folder}", image_size=4).test.labels.tolist() == [0, 1, 1]

    opened = datasets.open_dataset(f"folder:{folder}", image_size=4)
    (batch,) = stream_batches(opened.train, 3)
    chex.assert_trees_all_equal(batch, animals.train)
    with pytest.raises(
        ValueError, match=r"\(5, 5, 3\) and \(9, 6, 3\), but all must have the same shape: set image_size"
    ):
        datasets.load_dataset(f"folder:{folder}")


def test_what_is_left_out_of_a_folder_is_said_once_also_of_what_is_cached(folder):
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    for load in (datasets.load_dataset, datasets.load_dataset, datasets.open_dataset):
        with pytest.warns(UserWarning, match=r"folder:.*: 1 of 6 files are left out .*: train/cat/notes\.txt\."):
            assert load(f"folder:{folder}", image_size=4).num_classes == 2


def test_all_images_that_cannot_be_read_are_named_at_once(folder, monkeypatch):
    for number in range(6):
        for split in ("train", "test"):
            break_image(folder / split / "cat" / f"broken{number}.png")
    name = f"folder:{folder}"
    for load in (datasets.load_dataset, datasets.open_dataset):
        with pytest.raises(ValueError, match=r"12 of 17 images cannot be read:\n(.|\n)*leave them out with") as error:
            load(name, image_size=4)
        assert str(error.value).count("cannot read the image") == 10
        assert "/train/cat/broken0.png: " in str(error.value)
        assert "\nand 2 more\n" in str(error.value)
    monkeypatch.setattr(named, "find_unreadable", None)  # what is cached is not read again
    for load in (datasets.load_dataset, datasets.load_dataset, datasets.open_dataset):
        with pytest.warns(UserWarning, match=r"12 of 17 images are left out:\n(.|\n)*/train/cat/broken0\.png"):
            animals = load(name, image_size=4, skip_unreadable=True)
        if load is datasets.open_dataset:
            (batch,) = stream_batches(animals.train, 3)
            labels = [animals.test[index].labels for index in range(len(animals.test))]
        else:
            batch, labels = animals.train, animals.test.labels.tolist()
        assert batch.labels.tolist() == [0, 1, 1]
        assert labels == [0, 1]
        np.testing.assert_allclose(255 * batch.inputs[:, 1, 2, 1], [100, 200, 250], atol=3)
    with pytest.raises(ValueError, match="12 of 17 images cannot be read"):  # what was skipped is not served
        datasets.load_dataset(name, image_size=4)


def test_a_class_without_readable_images_is_named(folder):
    break_image(folder / "test" / "ant" / "e.png")
    for load in (datasets.load_dataset, datasets.open_dataset):
        with pytest.raises(ValueError, match=r"no test image of the classes ant can be read:\n.*ant/e\.png"):
            load(f"folder:{folder}", image_size=4, skip_unreadable=True)


def test_a_data_set_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=rf"no data set 'mnist' .* in {tmp_path}(.|\n)*pip install"):
        datasets.load_dataset("mnist", tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/elsewhere"):
        datasets.load_dataset("mnist")
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/home/tensorflow_datasets"):
        datasets.open_dataset("mnist")


class FakeBuilder:
    """Stands for TFDS's builder of a prepared data set of three classes."""

    def __init__(self, examples, features=("image", "label"), dtype=np.uint8, num_classes=3):
        image = type("Image", (), {"np_dtype": dtype, "shape": (None, None, None)})
        label = type("Label", (), {"num_classes": num_classes, "shape": ()})
        features = dict(zip(features, (image, label), strict=True))
        self.info = type("Info", (), {"features": features, "splits": examples})
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
    return [{"image": np.full(shape, 255, np.uint8), "label": index % 3} for index, shape in enumerate(shapes)]


SQUARE = (2, 2, 1)


def test_decoded_arrays_are_cached_until_the_prepared_files_change(tmp_path, monkeypatch, own_cache):
    builder = FakeBuilder({"train": images(SQUARE, SQUARE, SQUARE), "test": images(SQUARE)})
    fake_tfds(monkeypatch, tmp_path, builder)
    first = datasets.load_dataset("fake", tmp_path)
    assert first.train.inputs.shape == (3, 2, 2, 1)
    assert first.train.labels.tolist() == [0, 1, 2]
    assert first.num_classes == 3
    assert builder.reads == 2
    second = datasets.load_dataset("fake", tmp_path)
    assert builder.reads == 2
    chex.assert_trees_all_equal(first, second)
    assert [file.suffix for file in own_cache.iterdir()] == [".npz"]
    (tmp_path / "fake" / "1.0.0" / "fake-train.array_record-00000-of-00001").write_bytes(b"prepared anew")
    datasets.load_dataset("fake", tmp_path)
    assert builder.reads == 4


def test_a_damaged_cache_is_decoded_again(tmp_path, monkeypatch, own_cache):
    builder = FakeBuilder({"train": images(*[SQUARE] * 6), "test": images(SQUARE)})
    fake_tfds(monkeypatch, tmp_path, builder)
    first = datasets.load_dataset("fake", tmp_path)
    (file,) = own_cache.iterdir()
    whole = file.read_bytes()
    pixels = whole.index(b"\xff" * 24)  # six images of four pixels
    flipped = whole[:pixels] + b"\xfe" + whole[pixels + 1 :]
    for damaged in (
        b"",
        whole[:40],
        whole[: len(whole) // 2],
        whole[:-1],
        flipped,
        whole.replace(b"test_labels", b"tost_labels"),
    ):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match=rf"{file.name} is damaged .*, and is decoded again"):
            again = datasets.load_dataset("fake", tmp_path)
        chex.assert_trees_all_equal(again, first)
        assert file.read_bytes() == whole  # so that it is said once


@pytest.mark.parametrize(("obstacle", "reason"), OBSTACLES)
def test_without_a_cache_a_data_set_is_loaded_all_the_same(tmp_path, monkeypatch, own_cache, obstacle, reason):
    builder = FakeBuilder({"train": images(*[SQUARE] * 6), "test": images(SQUARE)})
    fake_tfds(monkeypatch, tmp_path, builder)
    own_cache.mkdir()
    write_cache = named.write_cache

    def hindered(*arguments):
        with obstacle(own_cache, monkeypatch):
            write_cache(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(named, "write_cache", hindered)
        with pytest.warns(UserWarning, match=rf"what was decoded is not kept for the next time: .*{reason}"):
            first = datasets.load_dataset("fake", tmp_path)
    assert list(own_cache.iterdir()) == []
    chex.assert_trees_all_equal(datasets.load_dataset("fake", tmp_path), first)


def test_the_cache_may_be_a_file_or_lie_in_one(tmp_path, monkeypatch, own_cache):
    fake_tfds(monkeypatch, tmp_path, FakeBuilder({"train": images(SQUARE), "test": images(SQUARE)}))
    own_cache.write_text("")
    with pytest.warns(UserWarning, match="not kept for the next time|cannot be read"):
        assert datasets.load_dataset("fake", tmp_path).num_classes == 3


def test_what_is_tested_on_where_there_is_no_test_split(tmp_path, monkeypatch):
    fake_tfds(monkeypatch, tmp_path, FakeBuilder({"train": images(SQUARE), "validation": images(SQUARE, SQUARE)}))
    assert datasets.load_dataset("fake", tmp_path).test.labels.tolist() == [0, 1]
    fake_tfds(monkeypatch, tmp_path, FakeBuilder({"train": images(*[SQUARE] * 11)}))
    opened = datasets.open_dataset("fake", tmp_path)
    assert [opened.test[index].labels for index in range(len(opened.test))] == [1, 0]  # examples 4 and 9
    assert len(opened.train) == 9


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (FakeBuilder({}, features=("text", "label")), r"features \['label', 'text'\], but 'image' and 'label'"),
        (FakeBuilder({"test": images(SQUARE)}), r"splits \['test'\], but 'train' is needed"),
        (FakeBuilder({"train": images(SQUARE)}, num_classes=None), "labels that are not classes"),
        (FakeBuilder({"train": images(SQUARE)}, dtype=np.float32), "images of dtype .*float32.*, but uint8 is needed"),
        (FakeBuilder({"train": images((2, 2, 1), (3, 2, 1)), "test": images(SQUARE)}), "have the same shape"),
        (FakeBuilder({"train": images(SQUARE), "test": images((2, 2, 3))}), "or channels if only the channels differ"),
        (
            FakeBuilder({"train": images(SQUARE), "test": [{"image": np.zeros(SQUARE, np.uint8), "label": -1}]}),
            "example 0 of fake, split 'test' has label -1, but classes are 0 to 2",
        ),
    ],
)
def test_data_sets_of_another_kind(tmp_path, monkeypatch, builder, message):
    fake_tfds(monkeypatch, tmp_path, builder)
    with pytest.raises(ValueError, match=message):
        datasets.load_dataset("fake", tmp_path)


def test_mnist_as_tfds_prepares_it():
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no MNIST in {folder}: set TFDS_DATA_DIR to where TFDS has prepared it")
    mnist = datasets.load_dataset("mnist")
    assert mnist.train.inputs.shape == (60_000, 28, 28, 1)
    assert mnist.test.inputs.shape == (10_000, 28, 28, 1)
    assert np.bincount(mnist.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    batch = next(stream_batches(datasets.open_dataset("mnist", image_size=8, channels=3).test, 32))
    assert batch.inputs.shape == (32, 8, 8, 3)
    np.testing.assert_array_equal(batch.labels, mnist.test.labels[:32])
