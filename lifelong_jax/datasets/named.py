"""Image-classification data sets by name: bundled with a dependency, prepared by TFDS, or in folders of images.

`load_dataset` reads all images into arrays. `open_dataset` reads none of them: `streaming` reads them when needed.
"""

import hashlib
import os
import pathlib
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lifelong_jax import _checks, _files
from lifelong_jax._extras import needs_extra
from lifelong_jax.datasets.images import list_folder, list_mit_scenes
from lifelong_jax.datasets.letters import render_letters
from lifelong_jax.datasets.sources import ArraySource, FileSource, FittedSource, Source, Subset, open_tfds
from lifelong_jax.types import Batch

with needs_extra("data"):
    import platformdirs
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
) -> Dataset:
    """Loads a data set by its name.

    A data set that is not bundled is decoded once. It is cached in the user's cache folder as unsigned bytes at the
    requested size, uncompressed, so that it loads fast the next time. If its files change, it is decoded again; with a
    warning, also if the cache is damaged or cannot be written.

    Args:
      name: one of

        - "digits": 1,797 handwritten digits, 8×8, from scikit-learn; a fifth of them are test examples;
        - "letters": 4,576 letters A to Z, rendered from matplotlib's fonts, 8×8 unless `image_size` is given. Test
          examples have typefaces that are not in the training examples; see `render_letters`;
        - "folder:PATH": jpg or png images in `PATH/train/<class>/` and `PATH/test/<class>/`, in colour unless
          `channels` is 1;
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

    Returns:
      The data set, with its arrays on the device.

    Raises:
      FileNotFoundError: if a folder does not exist, or TFDS has not prepared the data set.
      ValueError: if an example is not one image with one label, if an image cannot be read, if images differ in shape
        and `image_size` is None, or if training and test examples have different classes.

    Example:
      >>> load_dataset("digits").train.inputs.shape
      (1437, 8, 8, 1)
      >>> load_dataset("digits", image_size=16, channels=3).test.inputs.shape
      (360, 16, 16, 3)

    Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI machine learning repository.
    """
    _check_shape(image_size, channels)
    if name in _BUNDLED:
        arrays = _read(name, open_dataset(name, image_size=image_size, channels=channels))
    else:
        cache = _cache_file(name, data_dir, image_size, channels)
        cached = _read_cache(cache)
        if cached is None:
            cached = _read(name, open_dataset(name, data_dir, image_size=image_size, channels=channels))
            _write_cache(cache, cached)
        arrays = cached
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
) -> Dataset:
    """Opens a data set by its name without reading its images. An image is read and resized when it is indexed.

    Args:
      name: as for `load_dataset`.
      data_dir: as for `load_dataset`.
      image_size: as for `load_dataset`.
      channels: as for `load_dataset`.

    Returns:
      A data set whose `train` and `test` are sources: sequences of examples, for `streaming`.

    Raises:
      FileNotFoundError: if a folder does not exist, or TFDS has not prepared the data set.
      ValueError: if the data set does not have one image and one label per example, or if training and test examples
        have different classes.

    Example:
      >>> digits = open_dataset("digits", image_size=16)
      >>> len(digits.train), digits.train[0].inputs.shape
      (1437, (16, 16, 1))
    """
    _check_shape(image_size, channels)
    kind, _, path = name.partition(":")
    if name in _BUNDLED:
        train, test, num_classes = _BUNDLED[name](image_size)
    elif kind in _FOLDERS:
        train_files, test_files, names = _FOLDERS[kind](_folder(kind, path))
        train, test, num_classes = FileSource(train_files), FileSource(test_files), len(names)
    else:
        _prepared_files(name, data_dir)
        train, test, num_classes = open_tfds(name, _tfds_folder(data_dir))
    return Dataset(FittedSource(train, image_size, channels), FittedSource(test, image_size, channels), num_classes)


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


_DECODING = 1  # to be increased whenever decoding, resizing or splitting changes


def _cache_file(
    name: str, data_dir: str | os.PathLike | None, image_size: int | None, channels: int | None
) -> pathlib.Path:
    # The name depends on the files' sizes and times: when a file changes, the data set is decoded again.
    kind, _, path = name.partition(":")
    if kind in _FOLDERS:
        files, prefix = sorted(file for file in _folder(kind, path).rglob("*") if file.is_file()), kind
    else:
        files, prefix = _prepared_files(name, data_dir), name.replace("/", "-").replace(":", "-")
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((_DECODING, name, image_size, channels, stats)).encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("lifelong_jax") / f"{prefix}-{digest}.npz"


def _read(name: str, dataset: Dataset) -> dict[str, Any]:
    arrays = {"num_classes": np.array(dataset.num_classes)}
    sources: dict[str, Any] = {"train": dataset.train, "test": dataset.test}
    shape = sources["train"][0].inputs.shape
    for split, source in sources.items():
        images = np.empty((len(source), *shape), source[0].inputs.dtype)
        labels = np.empty(len(source), np.int32)
        for index in tqdm.tqdm(range(len(source)), f"reading {name} {split}", disable=None):
            image, labels[index], *_ = source[index]
            if image.shape != shape:
                raise ValueError(
                    f"data set {name!r} has images of shapes {shape} and {image.shape}, but all must have the same "
                    f"shape: set image_size, or channels if only the channels differ."
                )
            images[index] = image
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, labels
    return arrays


def _read_cache(file: pathlib.Path) -> dict[str, Any] | None:
    """Returns the arrays, checked by their CRC; None, with a warning, if the file is damaged; None if there is none."""
    names = ("num_classes", "train_images", "train_labels", "test_images", "test_labels")
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as cached:
            return {name: cached[name] for name in names}
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file can raise any
        warnings.warn(f"{file} is damaged or cannot be read, and is decoded again: {error}", stacklevel=3)
        return None


def _write_cache(file: pathlib.Path, arrays: dict[str, Any]) -> None:
    try:
        with _files.writing(file, sync=True) as opened:
            np.savez(opened, **arrays)
    except OSError as error:
        warnings.warn(f"what was decoded is not kept for the next time: {error}", stacklevel=3)
