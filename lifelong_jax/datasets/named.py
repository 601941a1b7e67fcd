"""Image-classification data sets by name: bundled with a dependency, prepared by TFDS, or in folders of images.

`load_dataset` reads all images into arrays. `open_dataset` keeps none of them: `streaming` reads them when needed.
"""

import os
import pathlib
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lifelong_jax import _checks
from lifelong_jax._extras import needs_extra
from lifelong_jax.datasets.cache import cache_file, read_cache, write_cache
from lifelong_jax.datasets.folders import (
    Listing,
    files_below,
    find_unreadable,
    list_folder,
    list_mit_scenes,
    without_unreadable,
)
from lifelong_jax.datasets.images import UnreadableImageError
from lifelong_jax.datasets.letters import render_letters
from lifelong_jax.datasets.sources import ArraySource, FileSource, FittedSource, ScaledSource, Source, Subset, open_tfds
from lifelong_jax.types import Batch

with needs_extra("data"):
    import tqdm


class Dataset(NamedTuple):
    """Labelled images, split into training and test examples.

    Attributes:
      train: the training examples: from `load_dataset` a `Batch` with inputs `[num_train, height, width, channels]`,
        float32 in [0, 1]; from `open_dataset` a `Source`.
      test: the test examples, of the same type; after `hold_out_validation`, the validation examples.
      num_classes: the number of classes.
    """

    train: Batch | Source
    test: Batch | Source
    num_classes: int


def load_dataset(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """Loads a data set by its name.

    A data set that is not bundled is decoded once. It is cached in the user's cache folder as unsigned bytes at the
    requested size, uncompressed, so that it loads fast the next time. If its files change, it is decoded again; with a
    warning, also if the cache is damaged or cannot be written.

    Images in folders are what a viewer shows: turned as their EXIF orientation says, on white where they are
    transparent, the first of several frames, 8 bits per channel. Colour profiles are not applied. A warning counts the
    files that are left out, and names some.

    Args:
      name: one of

        - "digits": 1,797 handwritten digits, 8×8, from scikit-learn; a fifth of them are test examples;
        - "letters": 4,576 letters A to Z, rendered from matplotlib's fonts, 8×8 unless `image_size` is given. Test
          examples have typefaces that are not in the training examples; see `render_letters`;
        - "folder:PATH": images in `PATH/train/<class>/` and `PATH/test/<class>/`, at any depth, in any format that
          Pillow reads, in colour unless `channels` is 1. Hidden files are left out;
        - "mit_scenes:PATH": MIT Indoor Scenes as published, with `PATH/Images/<class>/*.jpg`, `PATH/TrainImages.txt`
          and `PATH/TestImages.txt`;
        - the name of an image-classification data set that TFDS has prepared, such as "mnist" or "caltech_birds2011".
          The test examples are its split "test"; without one, "validation"; without either, every fifth training
          example.
      data_dir: the folder of data sets prepared by TFDS; by default the environment variable TFDS_DATA_DIR, or else
        `~/tensorflow_datasets`. Other data sets do not use it.
      image_size: height and width in pixels to which each whole image is resized, whatever its shape. None keeps the
        images' size, which must then be the same for all.
      channels: 1 for grey or 3 for red, green and blue, so that several data sets can share a network. None keeps the
        images' channels.
      skip_unreadable: whether images in folders that cannot be read are left out. A warning counts them, and names ten.

    Returns:
      The data set, with its arrays on the device.

    Raises:
      FileNotFoundError: if a folder does not exist, or TFDS has not prepared the data set.
      ValueError: if an example is not one image with one label, if images differ in shape and `image_size` is None, if
        training and test examples have different classes, or if what TFDS has prepared is damaged or is another
        version. Also, unless `skip_unreadable`, if images cannot be read: the message counts them, and names ten.

    Example:
      >>> load_dataset("digits").train.inputs.shape
      (1437, 8, 8, 1)
      >>> load_dataset("digits", image_size=16, channels=3).test.inputs.shape
      (360, 16, 16, 3)

    Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI machine learning repository.
    """
    _check_shape(image_size, channels)
    if name in _BUNDLED:
        arrays = _read(name, _open(name, None, data_dir, image_size, channels), None, skip_unreadable)
    else:
        prefix, files = _cached_files(name, data_dir)
        cache = cache_file(prefix, [name, image_size, channels, skip_unreadable], files)
        cached = read_cache(cache, _CACHED)
        if cached is None:
            listing = _list(name)
            opened = _open(name, listing, data_dir, image_size, channels)
            cached = _read(name, opened, listing, skip_unreadable)
            write_cache(cache, cached)
        arrays = cached
    for note in arrays["notes"].tolist():
        warnings.warn(f"{name}: {note}", stacklevel=2)
    num_classes = int(arrays["num_classes"])
    train, test = (
        make_batch(arrays[f"{split}_images"], arrays[f"{split}_labels"], num_classes) for split in ("train", "test")
    )
    return Dataset(train, test, num_classes)


def open_dataset(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """Opens a data set by its name. An image is read and resized when it is indexed.

    Images in folders are all read once, in threads, when the data set is opened first, to find those that cannot be
    read. What was found is kept in the user's cache folder until the files change.

    Args:
      name: as for `load_dataset`.
      data_dir: as for `load_dataset`.
      image_size: as for `load_dataset`.
      channels: as for `load_dataset`.
      skip_unreadable: as for `load_dataset`.

    Returns:
      A data set whose `train` and `test` are sources: sequences of examples, for `streaming`. Their images are float32
      in [0, 1].

    Raises:
      FileNotFoundError: if a folder does not exist, or TFDS has not prepared the data set.
      ValueError: as for `load_dataset`, but that images differ in shape, or that a file of TFDS is damaged, is noticed
        when they are read.

    Example:
      >>> digits = open_dataset("digits", image_size=16)
      >>> len(digits.train), digits.train[0].inputs.shape
      (1437, (16, 16, 1))
    """
    _check_shape(image_size, channels)
    listing = _list(name)
    if listing is not None:
        listing = without_unreadable(listing, _unreadable(name, listing), skip=skip_unreadable)
        for note in listing.notes:
            warnings.warn(f"{name}: {note}", stacklevel=2)
    opened: Any = _open(name, listing, data_dir, image_size, channels)
    return Dataset(ScaledSource(opened.train), ScaledSource(opened.test), opened.num_classes)


def hold_out_validation(dataset: Dataset, fraction: float, key: jax.Array) -> Dataset:
    """Holds out validation examples from the training examples, to choose settings without using the test examples.

    Args:
      dataset: from `load_dataset` or `open_dataset`; its test examples are not used.
      fraction: the fraction of the training examples to hold out, between 0 and 1.
      key: a random key that selects the held-out examples.

    Returns:
      A data set whose `test` is the held-out examples, and whose `train` is the other training examples.

    Raises:
      ValueError: if either part would be empty.

    Example:
      >>> hold_out_validation(load_dataset("digits"), 0.2, jax.random.key(0)).test.labels.shape
      (287,)
    """
    train = dataset.train
    num_examples = train.labels.shape[0] if isinstance(train, Batch) else len(train)
    num_held_out = round(fraction * num_examples) if 0 < fraction < 1 else 0
    if not 0 < num_held_out < num_examples:
        raise ValueError(f"fraction {fraction} of {num_examples} examples leaves one of the two parts empty.")
    order = jax.random.permutation(key, num_examples)

    def take(indices: jax.Array) -> Batch | Source:
        if isinstance(train, Batch):
            return jax.tree.map(lambda leaf: leaf[indices], train)
        return Subset(train, np.asarray(indices))

    return Dataset(take(order[num_held_out:]), take(order[:num_held_out]), dataset.num_classes)


def make_batch(inputs: ArrayLike, labels: ArrayLike, num_classes: int) -> Batch:
    """Checks arrays and makes a batch of them on the device.

    Args:
      inputs: `[num_examples, ...]`, floating-point, or unsigned bytes, which are divided by 255.
      labels: `[num_examples]`, integers from 0 to `num_classes - 1`.
      num_classes: the number of classes.

    Returns:
      A batch with float32 inputs, int32 labels and weights of 1.

    Raises:
      TypeError: if inputs or labels have another dtype.
      ValueError: if there are no examples, if inputs and labels differ in number, if an input is NaN or infinite, or if
        a label is out of range.

    Example:
      >>> make_batch(np.array([[0, 255]], np.uint8), np.array([1]), num_classes=2).inputs
      Array([[0., 1.]], dtype=float32)
    """
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    if inputs.dtype != np.uint8 and not np.issubdtype(inputs.dtype, np.floating):
        raise TypeError(f"inputs have dtype {inputs.dtype}, but must be unsigned bytes or floating-point numbers.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels have dtype {labels.dtype}, but must be integers, one per example.")
    if inputs.ndim == 0 or labels.shape != inputs.shape[:1] or labels.size == 0:
        raise ValueError(
            f"inputs {inputs.shape} and labels {labels.shape} must have the same number of examples, at least 1."
        )
    if inputs.dtype != np.uint8 and not np.isfinite(inputs).all():
        raise ValueError("inputs have entries that are NaN or infinite.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels range from {labels.min()} to {labels.max()}, but num_classes is {num_classes}.")
    # Labels and weights are made by NumPy, so that nothing needs to be compiled.
    labels, weights = labels.astype(np.int32), np.ones(len(labels), np.float32)
    return Batch(scale_bytes(inputs), *jax.device_put((labels, weights)))


@jax.jit  # one pass over memory, where most of the loading time of cached data is spent
def scale_bytes(inputs: jax.Array) -> jax.Array:
    """Converts images to float32 in [0, 1] on the device.

    Args:
      inputs: unsigned bytes, which are divided by 255, or floating-point numbers, which are not scaled.

    Returns:
      An array of the same shape, float32.

    Example:
      >>> scale_bytes(np.array([0, 255], np.uint8))
      Array([0., 1.], dtype=float32)
    """
    scaled = inputs.astype(jnp.float32)
    return scaled / 255 if inputs.dtype == jnp.uint8 else scaled


def _open_digits(image_size: int | None) -> tuple[Source, Source, int]:
    with needs_extra("data"):
        import sklearn.datasets  # here, because it is slow to import
        import sklearn.model_selection
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    train_images, test_images, train_labels, test_labels = sklearn.model_selection.train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return ArraySource(train_images, train_labels), ArraySource(test_images, test_labels), 10


def _open_letters(image_size: int | None) -> tuple[Source, Source, int]:
    train, test = render_letters(image_size)
    return ArraySource(*train), ArraySource(*test), 26


_BUNDLED = {"digits": _open_digits, "letters": _open_letters}
_FOLDERS = {"folder": list_folder, "mit_scenes": list_mit_scenes}


def _check_shape(image_size: int | None, channels: int | None) -> None:
    _checks.check_positive_integer("image_size", image_size, optional=True)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, not {channels!r}.")


def _list(name: str) -> Listing | None:
    """Lists the images of a data set that is a folder of them."""
    kind, _, path = name.partition(":")
    return _FOLDERS[kind](_folder(kind, path)) if kind in _FOLDERS else None


def _open(
    name: str,
    listing: Listing | None,
    data_dir: str | os.PathLike | None,
    image_size: int | None,
    channels: int | None,
) -> Dataset:
    train: Source
    test: Source
    if listing is not None:
        train, test, num_classes = FileSource(listing.train), FileSource(listing.test), len(listing.names)
    elif name in _BUNDLED:
        train, test, num_classes = _BUNDLED[name](image_size)
    else:
        _prepared_files(name, data_dir)
        train, test, num_classes = open_tfds(name, _tfds_folder(data_dir))
    return Dataset(FittedSource(train, image_size, channels), FittedSource(test, image_size, channels), num_classes)


def _folder(kind: str, path: str) -> pathlib.Path:
    folder = pathlib.Path(path).expanduser()
    if not path or not folder.is_dir():
        raise FileNotFoundError(f"no folder {path!r}: a data set {kind}:PATH needs the path of a folder.")
    return folder


def _tfds_folder(data_dir: str | os.PathLike | None) -> pathlib.Path:
    return pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _prepared_files(name: str, data_dir: str | os.PathLike | None) -> list[pathlib.Path]:
    folder = _tfds_folder(data_dir)
    prepared = sorted((folder / name.split(":")[0].split("/")[0]).rglob("*.array_record*"))
    if not prepared:
        raise FileNotFoundError(
            f"no data set {name!r} prepared in array_record format in {folder.absolute()}. Either set data_dir or "
            f"TFDS_DATA_DIR to a folder that contains it, or prepare it there (needs network access and TensorFlow):\n"
            f'  pip install "lifelong-jax[tensorflow]"\n'
            f'  python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir={str(folder)!r}, '
            f"file_format='array_record').download_and_prepare()\"\n"
            f"Bundled data sets: {', '.join(_BUNDLED)}. Images in a folder: "
            f"{', '.join(f'{kind}:PATH' for kind in _FOLDERS)}."
        )
    return prepared


_CACHED = ("num_classes", "train_images", "train_labels", "test_images", "test_labels", "notes")


def _cached_files(name: str, data_dir: str | os.PathLike | None) -> tuple[str, list[pathlib.Path]]:
    """Returns the beginning of a cache's name, and the files that it depends on."""
    kind, _, path = name.partition(":")
    if kind in _FOLDERS:
        return kind, [file for file in files_below(_folder(kind, path)) if file.is_file()]
    return name.replace("/", "-").replace(":", "-"), _prepared_files(name, data_dir)


def _unreadable(name: str, listing: Listing) -> dict[str, str]:
    """Finds the images that cannot be read; keeps what was found in the user's cache folder."""
    kind, files = _cached_files(name, None)
    cache = cache_file(f"{kind}-unreadable", [name], files)
    cached = read_cache(cache, ("paths", "messages"))
    if cached is None:
        found = find_unreadable([*listing.train.paths, *listing.test.paths], f"checking {name}")
        cached = {"paths": np.array([*found], np.str_), "messages": np.array([*found.values()], np.str_)}
        write_cache(cache, cached)
    return dict(zip(cached["paths"].tolist(), cached["messages"].tolist(), strict=True))


def _read(name: str, dataset: Dataset, listing: Listing | None, skip_unreadable: bool) -> dict[str, Any]:
    arrays: dict[str, Any] = {"num_classes": np.array(dataset.num_classes)}
    shape: tuple[int, ...] | None = None
    unreadable: dict[str, str] = {}
    sources: dict[str, Any] = {"train": dataset.train, "test": dataset.test}
    for split, source in sources.items():
        images = np.empty(0, np.uint8)
        labels: list[int] = []
        for index in tqdm.tqdm(range(len(source)), f"reading {name} {split}", disable=None):
            try:
                image, label, *_ = source[index]
            except UnreadableImageError as error:
                unreadable[str(error.path)] = str(error)
                continue
            shape = shape or image.shape
            if image.shape != shape:
                raise ValueError(
                    f"data set {name!r} has images of shapes {shape} and {image.shape}, but all must have the same "
                    f"shape: set image_size, or channels if only the channels differ."
                )
            if not labels:
                images = np.empty((len(source), *shape), image.dtype)
            images[len(labels)] = image
            labels.append(label)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[: len(labels)], np.array(labels, np.int32)
    notes = [] if listing is None else without_unreadable(listing, unreadable, skip=skip_unreadable).notes
    return {**arrays, "notes": np.array(notes, np.str_)}
