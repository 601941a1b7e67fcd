"""Sources of examples: arrays, image files, and data sets that TFDS has prepared.

An example is read when it is indexed, so a source may be larger than memory.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lifelong_jax._extras import needs_extra
from lifelong_jax.datasets.folders import LabelledFiles
from lifelong_jax.datasets.images import fit_image, read_image
from lifelong_jax.types import Batch


class Source(Protocol):
    """A sequence of labelled examples. Several threads may read it at once."""

    def __len__(self) -> int:
        """Returns the number of examples."""

    def __getitem__(self, index: int) -> Batch:
        """Reads one example.

        Args:
          index: from 0 to the number of examples, exclusive.

        Returns:
          A `Batch` of NumPy arrays without the example axis. Its inputs are one array or a tree of arrays, of any
          dtype.
        """


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Examples in memory.

    Attributes:
      images: `[num_examples, height, width, channels]`, unsigned bytes or float32 in [0, 1].
      labels: `[num_examples]`, integers.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """Returns one example."""
        return _example(self.images[index], self.labels[index])


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Image files.

    Attributes:
      files: the paths and their labels.
    """

    files: LabelledFiles

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.files.paths)

    def __getitem__(self, index: int) -> Batch:
        """Reads one example in colour. If its file cannot be read, a ValueError names the file."""
        return _example(read_image(self.files.paths[index]), self.files.labels[index])


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A split that TFDS has prepared.

    Attributes:
      records: what TFDS's `as_data_source` returns.
      name: the name of the data set and the split, for error messages.
      num_classes: the number of classes.
    """

    records: Any
    name: str
    num_classes: int

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.records)

    def __getitem__(self, index: int) -> Batch:
        """Reads one example. If it is damaged, or its label is not a class, a ValueError names it."""
        if index >= len(self):
            raise IndexError(index)
        try:
            record = self.records[index]
        except Exception as error:  # a damaged file can raise any
            raise ValueError(
                f"example {index} of {self.name} cannot be read: {_first_line(error)}. Prepare the data set again."
            ) from error
        if not 0 <= record["label"] < self.num_classes:
            raise ValueError(
                f"example {index} of {self.name} has label {record['label']}, but classes are 0 to "
                f"{self.num_classes - 1}: the labels of this split may not be public."
            )
        return _example(np.atleast_3d(record["image"]), record["label"])  # grey ones may lack the axis of channels


@dataclasses.dataclass(frozen=True)
class Subset:
    """Selected examples of a source.

    Attributes:
      source: the source.
      indices: `[num_examples]`, the indices of the examples in the source.
    """

    source: Source
    indices: Sequence[int] | np.ndarray

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        """Reads one example."""
        return self.source[int(self.indices[index])]


@dataclasses.dataclass(frozen=True)
class FittedSource:
    """A source of images that are resized, or converted to grey or colour, when they are read; see `fit_image`.

    Attributes:
      source: the source.
      image_size: height and width in pixels, or None to keep them.
      channels: 1, 3, or None to keep them.
    """

    source: Source
    image_size: int | None
    channels: int | None

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        """Reads one example."""
        example = self.source[index]
        inputs: Any = fit_image(np.asarray(example.inputs), self.image_size, self.channels)
        return example._replace(inputs=inputs)


@dataclasses.dataclass(frozen=True)
class ScaledSource:
    """A source of images whose unsigned bytes become float32 in [0, 1] when they are read.

    Attributes:
      source: the source.
    """

    source: Source

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        """Reads one example."""
        example = self.source[index]
        images: Any = np.asarray(example.inputs)
        scaled = images * np.float32(1 / 255) if images.dtype == np.uint8 else images.astype(np.float32)
        return example._replace(inputs=scaled)


def open_tfds(name: str, folder: pathlib.Path) -> tuple[Source, Source, int]:
    """Opens an image-classification data set that TFDS has prepared in the array_record format.

    This does not need TensorFlow.

    Args:
      name: a TFDS name, such as "mnist", "mnist:3.0.1" or "emnist/letters".
      folder: the folder of prepared data sets.

    Returns:
      The training examples, the test examples and the number of classes. Training examples are the split "train". Test
      examples are the split "test"; without one, "validation"; without either, every fifth example of "train", which is
      then no training example.

    Raises:
      ValueError: if the data set has no split "train", or does not have one image and one label per example; if it is
        damaged, or not prepared in this version.
    """
    with needs_extra("data"):
        import tensorflow_datasets as tfds  # here, because it is slow to import and cached data sets do not need it

    prepared = sorted({file.parent for file in (folder / name.split(":")[0].split("/")[0]).rglob("*.array_record*")})
    there = ", ".join(f"{path.parent.relative_to(folder)}:{path.name}" for path in prepared)
    try:
        builder = tfds.builder(name, data_dir=folder)
        features, splits = builder.info.features, builder.info.splits
    except Exception as error:  # for what it does not know, or cannot read, TFDS raises errors of many kinds
        raise ValueError(
            f"data set {name!r} cannot be opened: {_first_line(error)}. Prepared in {folder}: {there}."
        ) from error
    _check_features(name, features)
    if "train" not in splits:
        found = f"splits {sorted(splits)}, but 'train' is needed" if splits else "not been prepared in this version"
        raise ValueError(f"data set {name!r} has {found}. Prepared in {folder}: {there}.")
    num_classes = features["label"].num_classes

    def source(split: str) -> Source:
        try:
            return TfdsSource(builder.as_data_source(split), f"{name}, split {split!r}", num_classes)
        except Exception as error:  # as above
            raise ValueError(f"data set {name!r}, split {split!r}, cannot be opened: {_first_line(error)}.") from error

    for split in ("test", "validation"):
        if split in splits:
            return source("train"), source(split), num_classes
    everything = source("train")
    fifth = np.arange(len(everything)) % 5 == 4
    return Subset(everything, np.flatnonzero(~fifth)), Subset(everything, np.flatnonzero(fifth)), num_classes


def _check_features(name: str, features: Any) -> None:
    if not {"image", "label"} <= set(features):
        raise ValueError(f"data set {name!r} has features {sorted(features)}, but 'image' and 'label' are needed.")
    image, label = features["image"], features["label"]
    if getattr(label, "num_classes", None) is None:
        raise ValueError(f"data set {name!r} has labels that are not classes: {label}.")
    if label.shape != ():
        raise ValueError(
            f"data set {name!r} has several labels for an example, of shape {label.shape}, but 1 is needed."
        )
    if len(image.shape) != 3:
        raise ValueError(
            f"data set {name!r} has an 'image' of shape {image.shape}, such as a video, but [height, width, channels] "
            f"is needed."
        )
    if image.np_dtype != np.uint8:
        raise ValueError(f"data set {name!r} has images of dtype {image.np_dtype}, but uint8 is needed.")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].removesuffix(".")


def _example(image: Any, label: Any) -> Batch:
    arrays: tuple[Any, ...] = (image, np.int32(label), np.float32(1))  # NumPy's, until a batch is on the device
    return Batch(*arrays)
