"""Data sets: bundled, prepared by TFDS, in folders; sizes and colours; errors."""

import os
import pathlib
import sys

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from lifelong_jax import datasets
from lifelong_jax.datasets import named
from lifelong_jax.datasets.images import fit_image, read_image
from lifelong_jax.streaming import stream_batches
from tests.obstacles import OBSTACLES


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(named.platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
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


def test_images_are_resized_with_antialiasing_and_change_colours():
    stripes = np.tile(np.array([[0], [0], [0], [240]], np.uint8), (4, 16))[..., None]
    # Every fourth row alone would be 0 or 240.
    np.testing.assert_allclose(fit_image(stripes, 4, None)[1:-1], 60, atol=12)
    wide = np.repeat(stripes, 3, axis=1)
    assert fit_image(wide, 16, 3).shape == (16, 16, 3)
    assert fit_image(wide, None, None) is wide
    assert fit_image(wide, None, 3).shape == (16, 48, 3)
    colour = np.zeros((2, 2, 3), np.uint8) + np.array([255, 0, 100], np.uint8)
    np.testing.assert_array_equal(fit_image(colour, None, 1), round(0.299 * 255 + 0.114 * 100))
    np.testing.assert_array_equal(fit_image(colour, 5, None), np.broadcast_to(colour[:1, :1], (5, 5, 3)))
    transparent = np.concatenate([colour, np.zeros((2, 2, 1), np.uint8)], axis=-1)
    np.testing.assert_array_equal(fit_image(transparent, None, 3), colour)
    with pytest.raises(ValueError, match="only images of 1, 3 or 4 channels can be resized or converted, not 2"):
        fit_image(colour[..., :2], 4, None)


def write_image(path, shape, value, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*shape, 3), value, np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, quality=95)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "animals"
    write_image(root / "train" / "cat" / "b.png", (6, 9), 250)
    write_image(root / "train" / "cat" / "a.jpg", (9, 6), 200, "L")
    write_image(root / "train" / "ant" / "c.JPEG", (5, 5), 100)
    write_image(root / "test" / "cat" / "d.png", (7, 7), 51, "P")
    write_image(root / "test" / "ant" / "e.png", (40, 3), 20, "RGBA")
    (root / "train" / "cat" / "._a.jpg").write_bytes(b"what another system left behind")
    (root / "train" / ".thumbnails").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    return root


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
        patch.setattr(named, "open_dataset", None)  # what is cached is not opened
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


def test_folders_that_cannot_be_read(folder):
    name = f"folder:{folder}"
    with pytest.raises(FileNotFoundError, match=r"no folder 'nowhere': a data set folder:PATH"):
        datasets.load_dataset("folder:nowhere")
    with pytest.raises(FileNotFoundError, match=r"a data set folder:PATH needs the path of a folder"):
        datasets.open_dataset("folder:")
    broken = folder / "train" / "cat" / "b.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(9, 9, 3), dtype=np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cannot read the image .*/train/cat/b\.png: .*\. Repair or remove"):
        datasets.load_dataset(name, image_size=4)
    deep = np.arange(4, dtype=np.uint16).reshape(2, 2) * 1000
    Image.fromarray(deep).save(broken)
    with pytest.raises(ValueError, match=r"b\.png: it has more than 8 bits per channel"):
        read_image(broken)
    pipe = broken.with_name("pipe.jpg")
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match=r"cannot read the image .*pipe\.jpg: it is not a regular file"):
        read_image(pipe)
    pipe.unlink()
    (folder / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"the folder of the class .*/train/dog has no images"):
        datasets.open_dataset(name)
    write_image(folder / "train" / "dog" / "a.png", (3, 3), 5)
    with pytest.raises(ValueError, match=r"/test is missing 1 classes of the other split: dog\."):
        datasets.open_dataset(name)
    (folder / "test").rename(folder / "tests")
    with pytest.raises(FileNotFoundError, match=r"no folder .*/test: images must be in"):
        datasets.open_dataset(name)
    (folder / "test").mkdir()
    with pytest.raises(ValueError, match=r"/test is missing 3 classes"):
        datasets.open_dataset(name)


def test_mit_scenes(tmp_path):
    root = tmp_path / "scenes"
    files = ("mall/shopping mall.jpg", "bar/bar_0026.jpg", "mall/m.jpg", "bar/b.jpg", "bar/unlisted.jpg")
    for number, file in enumerate(files):
        write_image(root / "Images" / file, (8, 6 + number), 10 * number)
    (root / "TrainImages.txt").write_text("mall/shopping mall.jpg\r\nbar/bar_0026.jpg\r\n")
    (root / "TestImages.txt").write_text("bar/b.jpg\nmall/m.jpg")
    scenes = datasets.load_dataset(f"mit_scenes:{root}", image_size=5)
    assert scenes.num_classes == 2
    assert scenes.train.labels.tolist() == [1, 0]
    assert scenes.test.labels.tolist() == [0, 1]
    np.testing.assert_allclose(255 * scenes.train.inputs[:, 2, 2, 0], [0, 10], atol=2)
    np.testing.assert_allclose(255 * scenes.test.inputs[:, 2, 2, 0], [30, 20], atol=2)

    for lines, error, message in (
        ("bar/b.jpg\nbar/x.jpg", FileNotFoundError, r"1 of the 2 images listed .* the first is bar/x\.jpg"),
        ("bar.jpg", ValueError, r"the line 'bar\.jpg', but each line must be <class>/<file>"),
        ("bar/b.jpg", ValueError, r"TestImages\.txt is missing 1 classes of the other split: mall"),
    ):
        (root / "TestImages.txt").write_text(lines)
        with pytest.raises(error, match=message):
            datasets.open_dataset(f"mit_scenes:{root}")
    (root / "TrainImages.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*TrainImages\.txt"):
        datasets.open_dataset(f"mit_scenes:{root}")


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


def test_birds_as_tfds_mocks_them(mocked_birds):
    tensorflow_was_there = "tensorflow" in sys.modules
    birds = datasets.load_dataset("caltech_birds2011", mocked_birds, image_size=12)
    opened = datasets.open_dataset("caltech_birds2011", mocked_birds, image_size=12)
    batches = list(stream_batches(opened.test, 2))
    first = opened.train.source.records[0]
    with pytest.raises(ValueError, match="all must have the same shape: set image_size"):
        datasets.load_dataset("caltech_birds2011", mocked_birds)
    assert birds.num_classes == 200
    assert birds.train.inputs.shape == birds.test.inputs.shape == (5, 12, 12, 3)
    assert first["image"].shape != (12, 12, 3)
    expected = np.asarray(Image.fromarray(first["image"]).resize((12, 12), Image.Resampling.BILINEAR)) / np.float32(255)
    np.testing.assert_allclose(birds.train.inputs[0], expected, rtol=1e-6)
    assert birds.train.labels[0] == first["label"]
    streamed = np.concatenate([batch.inputs for batch in batches])[:5]
    np.testing.assert_array_equal(streamed, birds.test.inputs)
    assert tensorflow_was_there or "tensorflow" not in sys.modules


class FakeBuilder:
    """Stands for TFDS's builder of a prepared data set of three classes."""

    def __init__(self, examples, features=("image", "label"), dtype=np.uint8, num_classes=3):
        feature = type("Feature", (), {"num_classes": num_classes, "np_dtype": dtype})
        self.info = type("Info", (), {"features": dict.fromkeys(features, feature), "splits": examples})
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
    write_cache = named._write_cache

    def hindered(*arguments):
        with obstacle(own_cache, monkeypatch):
            write_cache(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(named, "_write_cache", hindered)
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
