"""Data sets that TFDS has prepared: what is damaged, of another kind, or not there is named."""

import sys

import numpy as np
import pytest
from PIL import Image

from lifelong_jax import datasets
from lifelong_jax.datasets.sources import TfdsSource
from lifelong_jax.streaming import stream_batches

epath = pytest.importorskip("etils.epath")
tfds = pytest.importorskip("tensorflow_datasets")


def test_birds_as_tfds_mocks_them(mocked_birds):
    tensorflow_was_there = "tensorflow" in sys.modules
    birds = datasets.load_dataset("caltech_birds2011", mocked_birds, image_size=12)
    opened = datasets.open_dataset("caltech_birds2011", mocked_birds, image_size=12)
    batches = list(stream_batches(opened.test, 2))
    first = opened.train.source.source.records[0]
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


def pixels(number):
    return np.full((4, 4, 3), number, np.uint8)


IMAGE, CLASSES = tfds.features.Tensor(shape=(4, 4, 3), dtype=np.uint8), tfds.features.ClassLabel(num_classes=3)


@pytest.fixture
def prepare(tmp_path):
    """Prepares a data set of TFDS: two splits of six examples `{"image": image, "label": label}`."""

    def prepare(name, image=IMAGE, label=CLASSES, make_image=pixels, make_label=lambda number: number % 3):
        features = tfds.features.FeaturesDict({"image": image, "label": label})

        def examples(self):
            yield from ((n, {"image": make_image(n), "label": make_label(n)}) for n in range(6))

        attributes = {
            "VERSION": tfds.core.Version("1.0.0"),
            "pkg_dir_path": epath.Path(tmp_path),
            "_info": lambda self: self.dataset_info_from_configs(features=features),
            "_split_generators": lambda self, manager: {split: examples(self) for split in ("train", "test")},
            "_generate_examples": examples,
        }
        with tfds.core.registered.skip_registration():
            builder = type("Prepared", (tfds.core.GeneratorBasedBuilder,), attributes)
        builder.name = name
        builder(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        return tmp_path / name / "1.0.0"

    return prepare


def refused(name, folder, message):
    """Both doors refuse a data set, if the second one is gone through."""
    with pytest.raises(ValueError, match=message):
        datasets.load_dataset(name, folder)
    with pytest.raises(ValueError, match=message):
        datasets.open_dataset(name, folder).train[0]


def test_several_labels_and_videos_are_refused_by_name(tmp_path, prepare):
    prepare("several", label=tfds.features.Sequence(CLASSES), make_label=lambda number: [0, number % 3])
    refused("several", tmp_path, r"data set 'several' has several labels for an example, of shape \(None,\), but 1")
    clip = tfds.features.Tensor(shape=(None, 4, 4, 3), dtype=np.uint8)
    prepare("clips", image=clip, make_image=lambda number: np.stack([pixels(number)] * (2 + number)))
    refused("clips", tmp_path, r"'clips' has an 'image' of shape \(None, 4, 4, 3\), such as a video, but \[height")


def test_damaged_files_are_refused_by_name(tmp_path, prepare):
    prepared = prepare("broken")
    assert datasets.load_dataset("broken", tmp_path).num_classes == 3
    source = datasets.open_dataset("broken", tmp_path).train.source.source
    assert sorted(example.inputs.max() for example in source) == list(range(6))
    (shard,) = prepared.glob("*train.array_record*")
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 255
    shard.write_bytes(bytes(whole))
    refused("broken", tmp_path, r"example 0 of broken, split 'train' cannot be read: .*\. Prepare the data set again\.")
    shard.unlink()
    refused("broken", tmp_path, r"example 0 of broken, split 'train' cannot be read: .*No such file")
    (prepared / "dataset_info.json").write_text("{")
    refused("broken", tmp_path, r"data set 'broken' cannot be opened: .*JSON.*\. Prepared in .*: broken:1\.0\.0\.")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("known:9.9.9", "data set 'known:9.9.9' cannot be opened: Dataset known not found"),
        ("known/nothing", "data set 'known/nothing' cannot be opened: "),
        ("known:nonsense", "data set 'known:nonsense' cannot be opened: Namespace known not found"),
        ("mnist:9.9.9", "data set 'mnist:9.9.9' cannot be opened: .*cannot be loaded at version 9.9.9"),
        ("mnist", "data set 'mnist' has not been prepared in this version"),
    ],
)
def test_versions_that_are_not_prepared_are_refused_by_name(tmp_path, prepare, name, message):
    prepare("known").parent.rename(tmp_path / name.partition(":")[0].partition("/")[0])
    refused(name, tmp_path, message + r".*\. Prepared in .*: (known|mnist):1\.0\.0\.$")


def test_grey_images_among_coloured_ones_may_lack_the_axis_of_channels():
    records = [{"image": np.zeros((2, 3), np.uint8), "label": 0}]
    assert TfdsSource(records, "birds", 1)[0].inputs.shape == (2, 3, 1)
