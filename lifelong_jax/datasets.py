"""Image-classification data as arrays: the digits that scikit-learn bundles, and any data set that TFDS has
prepared."""

import hashlib
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
import sklearn.datasets
import sklearn.model_selection
from numpy.typing import ArrayLike
from rich.progress import track

from lifelong_jax.types import Batch


class Dataset(NamedTuple):
    """Labelled images, in two parts.

    Attributes:
      train: what may be trained on; inputs `[num_train, height, width, channels]`, float32 in [0, 1].
      test: what results are reported on, or, after `hold_out_validation`, chosen by; inputs likewise.
      num_classes: how many classes there are.
    """

    train: Batch
    test: Batch
    num_classes: int


def load_dataset(name: str, data_dir: str | os.PathLike | None = None) -> Dataset:
    """Loads a data set by its name.

    Args:
      name: "digits" for the bundled digits, or a TFDS image-classification name, such as "mnist".
      data_dir: where TFDS keeps prepared data sets; by default the environment variable TFDS_DATA_DIR, else
        `~/tensorflow_datasets`. Not used for "digits".

    Returns:
      The data set.

    Raises:
      FileNotFoundError: if TFDS has not prepared the data set there.
      ValueError: if it is not one of images of one shape with one label each.

    Example:
      >>> load_dataset("digits").train.inputs.shape
      (1437, 8, 8, 1)
    """
    return load_digits() if name == "digits" else load_tfds(name, data_dir)


def load_digits() -> Dataset:
    """Loads the 1,797 real handwritten digits, 8×8 pixels, that scikit-learn bundles; a fifth of them are for testing.

    Returns:
      The data set, 10 classes.

    Example:
      >>> load_digits().test.labels.shape
      (360,)

    Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI machine learning repository.
    """
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    train_images, test_images, train_labels, test_labels = sklearn.model_selection.train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return Dataset(make_batch(train_images, train_labels, 10), make_batch(test_images, test_labels, 10), 10)


def load_tfds(name: str, data_dir: str | os.PathLike | None = None) -> Dataset:
    """Loads an image-classification data set that TFDS has prepared in the array_record format.

    TensorFlow is not needed. The decoded arrays are cached on disk (uncompressed, in the user's cache folder), so that
    from the second time on they load in well under a second; the cache is renewed when the prepared files change.

    Args:
      name: a TFDS name, such as "mnist", "mnist:3.0.1" or "emnist/letters".
      data_dir: where TFDS keeps prepared data sets; by default the environment variable TFDS_DATA_DIR, else
        `~/tensorflow_datasets`.

    Returns:
      The data set, from its splits "train" and "test".

    Raises:
      FileNotFoundError: if TFDS has not prepared the data set there.
      ValueError: if it has no "image" and "label", or its images differ in shape.
    """
    folder = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    cache = _cache_file(name, folder)
    if not cache.exists():
        _save(cache, _decode(name, folder))
    with np.load(cache, allow_pickle=False) as arrays:
        num_classes = int(arrays["num_classes"])
        train, test = (
            make_batch(arrays[f"{split}_images"], arrays[f"{split}_labels"], num_classes) for split in ("train", "test")
        )
    return Dataset(train, test, num_classes)


def hold_out_validation(dataset: Dataset, fraction: float, key: jax.Array) -> Dataset:
    """Takes validation data from the training data, for choosing settings without a look at the test data.

    Args:
      dataset: a data set; its test part is dropped.
      fraction: how much of the training data is held out, in (0, 1).
      key: the random key of the choice.

    Returns:
      A data set whose `train` is what is left, and whose `test` is what was held out.

    Raises:
      ValueError: if either part would be empty.

    Example:
      >>> hold_out_validation(load_digits(), 0.2, jax.random.key(0)).test.labels.shape
      (287,)
    """
    num_examples = dataset.train.labels.shape[0]
    num_held_out = round(fraction * num_examples)
    if not 0 < num_held_out < num_examples:
        raise ValueError(f"fraction {fraction} of {num_examples} examples would leave one of the two parts empty.")
    order = jax.random.permutation(key, num_examples)
    held_out, rest = order[:num_held_out], order[num_held_out:]
    return Dataset(
        jax.tree.map(lambda leaf: leaf[rest], dataset.train),
        jax.tree.map(lambda leaf: leaf[held_out], dataset.train),
        dataset.num_classes,
    )


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
    scaled = _scale_bytes(inputs) if inputs.dtype == np.uint8 else jnp.asarray(inputs, jnp.float32)
    return Batch(scaled, jnp.asarray(labels, jnp.int32), jnp.ones(len(labels)))


@jax.jit  # one pass over memory: a large part of the time that cached data take to load
def _scale_bytes(inputs: jax.Array) -> jax.Array:
    return inputs.astype(jnp.float32) / 255


def _cache_file(name: str, folder: pathlib.Path) -> pathlib.Path:
    # The key has the prepared files' sizes and times, so that a data set prepared anew is decoded anew.
    prepared = sorted((folder / name.split(":")[0].split("/")[0]).rglob("*.array_record*"))
    if not prepared:
        raise FileNotFoundError(
            f"no data set {name!r} prepared in array_record format in {folder.absolute()}. Either point --data-dir or "
            f"TFDS_DATA_DIR at a folder that has it, or prepare it there (this needs a network, and TensorFlow):\n"
            f'  pip install -e ".[tensorflow]"\n'
            f'  python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir={str(folder)!r}, '
            f"file_format='array_record').download_and_prepare()\""
        )
    stats = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in prepared]
    digest = hashlib.sha256(repr((name, stats)).encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("lifelong_jax") / f"{name.replace('/', '-').replace(':', '-')}-{digest}.npz"


def _decode(name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    import tensorflow_datasets as tfds  # slow to import, and not needed once the arrays are cached

    builder = tfds.builder(name, data_dir=folder)
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(f"data set {name!r} has the features {sorted(features)}, but 'image' and 'label' are needed.")
    if not {"train", "test"} <= set(builder.info.splits):
        splits = sorted(builder.info.splits)
        raise ValueError(f"data set {name!r} has the splits {splits}, but 'train' and 'test' are needed.")
    arrays = {"num_classes": np.array(features["label"].num_classes)}
    for split in ("train", "test"):
        source = builder.as_data_source(split)
        images, labels = [], []
        for example in track(source, description=f"decoding {name} {split}", transient=True):
            images.append(example["image"])
            labels.append(example["label"])
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise ValueError(f"data set {name!r} has images of {len(shapes)} shapes, but one shape is needed.")
        arrays[f"{split}_images"] = np.stack(images)
        arrays[f"{split}_labels"] = np.asarray(labels)
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
