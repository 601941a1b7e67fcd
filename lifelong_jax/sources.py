"""Where examples come from, one at a time: arrays, image files, data sets that TFDS has prepared.

Nothing is read before it is asked for, so that a source may be larger than memory.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lifelong_jax.images import LabelledFiles, fit_image, read_image
from lifelong_jax.types import Batch


class Source(Protocol):
    """A sequence of labelled examples. It may be read from several threads at once."""

    def __len__(self) -> int:
        """Returns how many examples there are."""

    def __getitem__(self, index: int) -> Batch:
        """Reads one example.

        Args:
          index: from 0.

        Returns:
          A `Batch` of NumPy arrays without the example axis; images are `[height, width, channels]`, unsigned bytes or
          float32 in [0, 1].
        """


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Examples that are in memory.

    Attributes:
      images: `[num_examples, height, width, channels]`, unsigned bytes or float32 in [0, 1].
      labels: `[num_examples]`, integers.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Returns how many examples there are."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """Returns one example."""
        return _example(self.images[index], self.labels[index])


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Image files.

    Attributes:
      files: the files and their labels.
    """

    files: LabelledFiles

    def __len__(self) -> int:
        """Returns how many examples there are."""
        return len(self.files.paths)

    def __getitem__(self, index: int) -> Batch:
        """Reads one example, in colour; a file that cannot be read is named by a ValueError."""
        return _example(read_image(self.files.paths[index]), self.files.labels[index])


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A split that TFDS has prepared.

    Attributes:
      records: what TFDS's `as_data_source` returns.
      name: the data set and the split, for messages.
      num_classes: how many classes there are.
    """

    records: Any
    name: str
    num_classes: int

    def __len__(self) -> int:
        """Returns how many examples there are."""
        return len(self.records)

    def __getitem__(self, index: int) -> Batch:
        """Reads one example; a label that stands for none is refused by a ValueError."""
        record = self.records[index]
        if not 0 <= record["label"] < self.num_classes:
            raise ValueError(
                f"example {index} of {self.name} has the label {record['label']}, which is none of its "
                f"{self.num_classes} classes: the labels of this split may not be public."
            )
        return _example(record["image"], record["label"])


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some of a source's examples.

    Attributes:
      source: a source.
      indices: `[num_examples]`, which of its examples, in order.
    """

    source: Source
    indices: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        """Returns how many examples there are."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        """Reads one example."""
        return self.source[int(self.indices[index])]


@dataclasses.dataclass(frozen=True)
class FittedSource:
    """A source whose images are brought to one size, or one number of channels, as they are read: see `fit_image`.

    Attributes:
      source: a source.
      image_size: height and width in pixels, or None.
      channels: 1, 3 or None.
    """

    source: Source
    image_size: int | None
    channels: int | None

    def __len__(self) -> int:
        """Returns how many examples there are."""
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        """Reads one example."""
        example = self.source[index]
        return example._replace(inputs=fit_image(example.inputs, self.image_size, self.channels))


def open_tfds(name: str, folder: pathlib.Path) -> tuple[Source, Source, int]:
    """Opens an image-classification data set that TFDS has prepared in the array_record format.

    TensorFlow is not needed.

    Args:
      name: a TFDS name, such as "mnist", "mnist:3.0.1" or "emnist/letters".
      folder: where TFDS keeps prepared data sets.

    Returns:
      The training examples, from its split "train"; the test examples, from "test", or else "validation", or else every
      fifth of "train", which are then left out of the training examples; and the number of classes.

    Raises:
      ValueError: if it has no "train", or its examples are not one image and one label each.
    """
    import tensorflow_datasets as tfds  # slow to import, and not needed once the arrays are cached

    try:
        builder = tfds.builder(name, data_dir=folder)
    except AssertionError as error:  # of a version that TFDS does not know
        raise ValueError(f"data set {name!r}: {error}") from error
    features, splits = builder.info.features, builder.info.splits
    if not {"image", "label"} <= set(features):
        raise ValueError(f"data set {name!r} has the features {sorted(features)}, but 'image' and 'label' are needed.")
    num_classes = getattr(features["label"], "num_classes", None)
    if num_classes is None:
        raise ValueError(f"data set {name!r} has labels that are no classes: {features['label']}.")
    if features["image"].np_dtype != np.uint8:
        raise ValueError(f"data set {name!r} has images of {features['image'].np_dtype}, not of unsigned bytes.")
    if "train" not in splits:
        raise ValueError(f"data set {name!r} has the splits {sorted(splits)}, but 'train' is needed.")

    def source(split: str) -> Source:
        return TfdsSource(builder.as_data_source(split), f"{name}, split {split!r}", num_classes)

    for split in ("test", "validation"):
        if split in splits:
            return source("train"), source(split), num_classes
    everything = source("train")
    fifth = np.arange(len(everything)) % 5 == 4
    return Subset(everything, np.flatnonzero(~fifth)), Subset(everything, np.flatnonzero(fifth)), num_classes


def _example(image: np.ndarray, label: Any) -> Batch:
    return Batch(image, np.int32(label), np.float32(1))
