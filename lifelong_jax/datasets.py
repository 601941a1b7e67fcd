"""Image-classification data by name: bundled with a dependency, prepared by TFDS, or in folders.

`load_dataset` reads all of it into arrays; `open_dataset` reads nothing, for `streaming.py` to read it bit by bit.
"""

import hashlib
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
import rich.console
import sklearn.datasets
import sklearn.model_selection
from numpy.typing import ArrayLike
from rich.progress import track

from lifelong_jax import _checks
from lifelong_jax.images import list_folder, list_mit_scenes
from lifelong_jax.letters import render_letters
from lifelong_jax.sources import ArraySource, FileSource, FittedSource, Source, Subset, open_tfds
from lifelong_jax.types import Batch


class Dataset(NamedTuple):
    """Labelled images, in two parts.

    Attributes:
      train: what may be trained on; inputs `[num_train, height, width, channels]`, float32 in [0, 1]; or, of a data
        set that is opened and not loaded, a `Source`.
      test: what results are reported on, or, after `hold_out_validation`, chosen by; likewise.
      num_classes: how many classes there are.
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

    What is not bundled is decoded once, and cached (uncompressed, in the user's cache folder) as unsigned bytes at the
    size asked for, so that it loads fast from the second time on. The cache is renewed when the files change.

    Args:
      name: one of

        - "digits": 1,797 real handwritten digits, 8×8, that scikit-learn bundles; a fifth of them are for testing;
        - "letters": 4,576 letters A to Z, 8×8 unless `image_size` says otherwise, rendered from matplotlib's fonts, and
          tested on typefaces that are not trained on: see `letters.render_letters`;
        - "folder:PATH": images in `PATH/train/<class>/` and `PATH/test/<class>/`, jpg or png, in colour unless
          `channels` is 1;
        - "mit_scenes:PATH": MIT Indoor Scenes as published, `PATH/Images/<class>/*.jpg` with `PATH/TrainImages.txt`
          and `PATH/TestImages.txt`;
        - any TFDS image-classification name, such as "mnist" or "caltech_birds2011", that TFDS has prepared. What is
          tested on is its split "test", or else "validation", or else every fifth training example.
      data_dir: where TFDS keeps prepared data sets; by default the environment variable TFDS_DATA_DIR, else
        `~/tensorflow_datasets`. Not used for the others.
      image_size: height and width in pixels that the whole of each image is resized to, whatever its shape was. None
        leaves images as they are, which is possible where all have one shape.
      channels: 1 for grey, 3 for red, green and blue, so that several data sets can share a network. None leaves them
        as they are.

    Returns:
      The data set, in arrays on the device.

    Raises:
      FileNotFoundError: if there is no such folder, or TFDS has not prepared the data set.
      ValueError: if its examples are not one image and one label each, if an image cannot be read, if images differ in
        shape and `image_size` is None, or classes between training and testing.

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
        if not cache.exists():
            _save(cache, _read(name, open_dataset(name, data_dir, image_size=image_size, channels=channels)))
        with np.load(cache, allow_pickle=False) as cached:
            arrays = dict(cached)
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
    """Opens a data set by its name without reading its images: they are read, and resized, as they are asked for.

    Args:
      name: as for `load_dataset`.
      data_dir: as for `load_dataset`.
      image_size: as for `load_dataset`.
      channels: as for `load_dataset`.

    Returns:
      A data set whose parts are sources: sequences of examples, for `streaming.py`.

    Raises:
      FileNotFoundError: if there is no such folder, or TFDS has not prepared the data set.
      ValueError: if its examples are not one image and one label each, or classes differ between training and testing.

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
    """Takes validation data from the training data, for choosing settings without a look at the test data.

    Args:
      dataset: a data set, loaded or only opened; its test part is dropped.
      fraction: how much of the training data is held out, in (0, 1).
      key: the random key of the choice.

    Returns:
      A data set whose `train` is what is left, and whose `test` is what was held out.

    Raises:
      ValueError: if either part would be empty.

    Example:
      >>> hold_out_validation(load_dataset("digits"), 0.2, jax.random.key(0)).test.labels.shape
      (287,)
    """
    loaded = isinstance(dataset.train, Batch)
    num_examples = dataset.train.labels.shape[0] if loaded else len(dataset.train)
    num_held_out = round(fraction * num_examples) if 0 < fraction < 1 else 0
    if not 0 < num_held_out < num_examples:
        raise ValueError(f"fraction {fraction} of {num_examples} examples would leave one of the two parts empty.")
    order = jax.random.permutation(key, num_examples)

    def take(indices: jax.Array) -> Batch | Source:
        if loaded:
            return jax.tree.map(lambda leaf: leaf[indices], dataset.train)
        return Subset(dataset.train, np.asarray(indices))

    return Dataset(take(order[num_held_out:]), take(order[:num_held_out]), dataset.num_classes)


def make_batch(inputs: ArrayLike, labels: ArrayLike, num_classes: int) -> Batch:
    """Makes a batch of arrays on the device, once their values have been checked.

    Args:
      inputs: `[num_examples, ...]`; unsigned bytes are divided by 255, anything else must be floating-point.
      labels: `[num_examples]`, integers in `[0, num_classes)`.
      num_classes: how many classes there are.

    Returns:
      A batch with float32 inputs, int32 labels and weights of 1.

    Raises:
      TypeError: if inputs or labels have another dtype.
      ValueError: if there are no examples, or their number differs, an input is not finite, or a label out of range.

    Example:
      >>> make_batch(np.array([[0, 255]], np.uint8), np.array([1]), num_classes=2).inputs
      Array([[0., 1.]], dtype=float32)
    """
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    if inputs.dtype != np.uint8 and not np.issubdtype(inputs.dtype, np.floating):
        raise TypeError(f"inputs have dtype {inputs.dtype}: give unsigned bytes or floating-point numbers.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels have dtype {labels.dtype}: give integers, one per example.")
    if inputs.ndim == 0 or labels.shape != inputs.shape[:1] or labels.size == 0:
        raise ValueError(f"inputs {inputs.shape} and labels {labels.shape} must have [num_examples] > 0 in common.")
    if inputs.dtype != np.uint8 and not np.isfinite(inputs).all():
        raise ValueError("inputs have entries that are NaN or infinite.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels reach from {labels.min()} to {labels.max()}, but num_classes is {num_classes}.")
    # Made by NumPy, and put there as they are: nothing is to be compiled.
    labels, weights = labels.astype(np.int32), np.ones(len(labels), np.float32)
    return Batch(scale_bytes(inputs), *jax.device_put((labels, weights)))


@jax.jit  # one pass over memory: a large part of the time that cached data take to load
def scale_bytes(inputs: jax.Array) -> jax.Array:
    """Brings images to [0, 1] on the device.

    Args:
      inputs: unsigned bytes, which are divided by 255, or floating-point numbers, which are left as they are.

    Returns:
      An array of the same shape, float32.

    Example:
      >>> scale_bytes(np.array([0, 255], np.uint8))
      Array([0., 1.], dtype=float32)
    """
    scaled = inputs.astype(jnp.float32)
    return scaled / 255 if inputs.dtype == jnp.uint8 else scaled


def _open_digits(image_size: int | None) -> tuple[Source, Source, int]:
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
        raise FileNotFoundError(f"no folder {path!r} for the data set {kind}:{path}: name it {kind}:PATH.")
    return folder


def _tfds_folder(data_dir: str | os.PathLike | None) -> pathlib.Path:
    return pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _prepared_files(name: str, data_dir: str | os.PathLike | None) -> list[pathlib.Path]:
    folder = _tfds_folder(data_dir)
    prepared = sorted((folder / name.split(":")[0].split("/")[0]).rglob("*.array_record*"))
    if not prepared:
        raise FileNotFoundError(
            f"no data set {name!r} prepared in array_record format in {folder.absolute()}. Either point --data-dir or "
            f"TFDS_DATA_DIR at a folder that has it, or prepare it there (this needs a network, and TensorFlow):\n"
            f'  pip install -e ".[tensorflow]"\n'
            f'  python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir={str(folder)!r}, '
            f"file_format='array_record').download_and_prepare()\"\n"
            f"The bundled data sets are {', '.join(_BUNDLED)}; images in a folder are "
            f"{', '.join(f'{kind}:PATH' for kind in _FOLDERS)}."
        )
    return prepared


_DECODING = 1  # to be raised when images are decoded, resized or split in another way


def _cache_file(
    name: str, data_dir: str | os.PathLike | None, image_size: int | None, channels: int | None
) -> pathlib.Path:
    # The key has the files' sizes and times, so that data prepared anew, or another set of images, are decoded anew.
    kind, _, path = name.partition(":")
    if kind in _FOLDERS:
        files, shown = sorted(file for file in _folder(kind, path).rglob("*") if file.is_file()), kind
    else:
        files, shown = _prepared_files(name, data_dir), name.replace("/", "-").replace(":", "-")
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((_DECODING, name, image_size, channels, stats)).encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("lifelong_jax") / f"{shown}-{digest}.npz"


def _read(name: str, dataset: Dataset) -> dict[str, np.ndarray]:
    arrays = {"num_classes": np.array(dataset.num_classes)}
    shape = dataset.train[0].inputs.shape
    console = rich.console.Console(stderr=True)
    for split, source in (("train", dataset.train), ("test", dataset.test)):
        images = np.empty((len(source), *shape), source[0].inputs.dtype)
        labels = np.empty(len(source), np.int32)
        for index in track(
            range(len(source)), f"reading {name} {split}", console=console, disable=not console.is_terminal
        ):
            image, labels[index], *_ = source[index]
            if image.shape != shape:
                raise ValueError(
                    f"data set {name!r} has images of shape {shape} and {image.shape}, but one shape is needed: give "
                    f"image_size, or channels where only these differ."
                )
            images[index] = image
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, labels
    return arrays


def _save(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.stem}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            np.savez(stream, **arrays)
        partial.replace(file)  # at once, so that a killed run leaves no half a file to be read
    finally:
        partial.unlink(missing_ok=True)
