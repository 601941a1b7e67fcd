"""Sequences of tasks made from arrays. One compilation serves all tasks with the same numbers of examples."""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lifelong_jax import _checks
from lifelong_jax._numerics import indices_per_example, pad, wide_dtype
from lifelong_jax._processes import place_arrays, to_host
from lifelong_jax._split_batches import check_sharding_of_examples, round_up
from lifelong_jax.types import Batch, Example, OutputFn, Params, Task


def permuted_tasks(train: Batch, test: Batch, num_tasks: int, key: jax.Array) -> list[Task]:
    """Makes tasks that have the same examples, each with a fixed random permutation of the input's features.

    All tasks are equally hard for a network without convolutions; none is left unpermuted. The tasks share their
    arrays: only the permutations differ.

    Args:
      train: training examples, inputs `[num_train, ...]`.
      test: test examples, inputs `[num_test, ...]` of the same shape per example.
      num_tasks: the number of tasks.
      key: the random key of the permutations. A longer sequence begins with the tasks of a shorter one.

    Returns:
      `num_tasks` tasks.

    Raises:
      ValueError: if `num_tasks` is not a positive integer, or train and test inputs differ in shape per example.
      TypeError: if a data set was opened rather than loaded.

    Example:
      >>> from lifelong_jax import Batch
      >>> batch = Batch(jnp.zeros((5, 2, 3)), jnp.zeros(5, int), jnp.ones(5))
      >>> [task.permutation.shape for task in permuted_tasks(batch, batch, 2, jax.random.key(0))]
      [(6,), (6,)]

    Goodfellow et al. 2013, arXiv 1312.6211; Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114.
    """
    _checks.check_positive_integer("num_tasks", num_tasks)
    _check_loaded(train, test)
    if not hasattr(train.inputs, "shape"):
        raise TypeError(
            f"train.inputs is a {type(train.inputs).__name__}, but must be one array, whose features can be permuted."
        )
    shape = train.inputs.shape[1:]
    if test.inputs.shape[1:] != shape:
        raise ValueError(f"test inputs have shape {test.inputs.shape[1:]} per example, but train inputs have {shape}.")
    num_features = math.prod(shape)
    keys = [jax.random.fold_in(key, index) for index in range(num_tasks)]
    return [Task(train, test, jax.random.permutation(task_key, num_features)) for task_key in keys]


def rotated_tasks(train: Batch, test: Batch, angles: Sequence[float]) -> list[Task]:
    """Makes tasks that have the same images, each rotated by another angle: a domain that drifts.

    Pixels are interpolated linearly, and 0 outside the image.

    Args:
      train: training examples, inputs `[num_train, height, width, channels]`, floating.
      test: test examples, inputs `[num_test, height, width, channels]`, floating.
      angles: degrees, counter-clockwise, one for each task.

    Returns:
      A task for each angle, in the dtypes of the inputs.

    Raises:
      ValueError: if there is no angle, or one is not finite, or the inputs are not images.
      TypeError: if pixels are not floating-point, or a data set was opened rather than loaded.

    Example:
      >>> from lifelong_jax import Batch
      >>> batch = Batch(jnp.arange(4.0).reshape(1, 2, 2, 1), jnp.zeros(1, int), jnp.ones(1))
      >>> rotated_tasks(batch, batch, [0, 90])[1].train.inputs[0, :, :, 0].round().tolist()
      [[1.0, 3.0], [0.0, 2.0]]

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840, section 4 (rotated MNIST).
    """
    if not len(angles):
        raise ValueError("angles is empty: pass one for each task.")
    _checks.check_finite("angles", list(angles), hint="Pass degrees.")
    _check_loaded(train, test)
    for name, batch in (("train", train), ("test", test)):
        if getattr(batch.inputs, "ndim", None) != 4:
            raise ValueError(
                f"{name}.inputs has shape {jax.tree.map(jnp.shape, batch.inputs)}, but must be images: [num_examples, "
                f"height, width, channels]."
            )
        if not jnp.issubdtype(batch.inputs.dtype, jnp.floating):
            raise TypeError(
                f"{name}.inputs has dtype {batch.inputs.dtype}, but only floating-point pixels can be interpolated: "
                f"convert them, by datasets.scale_bytes, say."
            )

    def rotated(batch: Batch, angle: float) -> Batch:
        return batch._replace(inputs=_rotate(batch.inputs, jnp.float32(angle)))

    return [Task(rotated(train, angle), rotated(test, angle)) for angle in angles]


def split_tasks(
    train: Batch, test: Batch, class_groups: Sequence[Sequence[int]], num_classes: int, *, shared_outputs: bool = False
) -> list[Task]:
    """Makes tasks of disjoint classes, each with its own number of examples: `pad_tasks` makes them equal.

    Args:
      train: training examples.
      test: test examples.
      class_groups: each task's classes: any number of them, in any order, none twice.
      num_classes: the number of classes in all, and of the network's outputs.
      shared_outputs: whether the tasks share their outputs, for the scenario "domain": the labels then count from 0
        within each task's group. Otherwise each class has its own output, and each task a class mask.

    Returns:
      A task for each group.

    Raises:
      ValueError: if a class is out of range, occurs twice, or has no examples of weight above 0.
      TypeError: if a data set was opened rather than loaded.

    Example:
      >>> from lifelong_jax import Batch
      >>> batch = Batch(jnp.zeros((5, 2)), jnp.array([0, 1, 2, 3, 3]), jnp.ones(5))
      >>> task = split_tasks(batch, batch, [[0, 1], [2, 3]], num_classes=4)[0]
      >>> task.train.labels, task.class_mask
      (Array([0, 1], dtype=int32), Array([ True,  True, False, False], dtype=bool))

    Zenke et al. 2017, arXiv 1703.04200; for the scenarios, van de Ven and Tolias 2019, arXiv 1904.07734.
    """
    _check_loaded(train, test)
    _checks.check_classes("train", train)
    _checks.check_classes("test", test)
    classes = [int(label) for group in class_groups for label in group]
    valid = len(set(classes)) == len(classes) and all(0 <= label < num_classes for label in classes)
    if not (valid and classes and all(len(group) for group in class_groups)):
        raise ValueError(
            f"class_groups must hold classes from 0 to {num_classes - 1}, at least one per group and none twice, not "
            f"{[list(group) for group in class_groups]}."
        )
    tasks = []
    for group in class_groups:
        parts: list[Batch] = []
        for name, batch in (("train", train), ("test", test)):
            labels = to_host(batch.labels)
            counted = labels if batch.weights is None else labels[to_host(batch.weights) > 0]
            missing = sorted(set(group) - set(counted.tolist()))
            if missing:
                raise ValueError(f"{name} has no examples of the classes {missing}.")
            part = jax.tree.map(operator.itemgetter(np.flatnonzero(np.isin(labels, group))), batch)
            if shared_outputs:
                positions = (part.labels[:, None] == jnp.asarray(group)).argmax(axis=-1)
                part = part._replace(labels=positions.astype(part.labels.dtype))
            parts.append(part)
        class_mask = None if shared_outputs else jnp.isin(jnp.arange(num_classes), jnp.asarray(group))
        tasks.append(Task(parts[0], parts[1], class_mask=class_mask))
    return tasks


def dataset_tasks(datasets: Sequence[tuple[Batch, Batch, int]], *, shared_outputs: bool = False) -> list[Task]:
    """Makes a task of each data set, each with its own outputs: one head per data set on a shared trunk.

    The first outputs are the first data set's classes, the next ones the second's, and so on. Each task has its own
    number of examples: `pad_tasks` makes them equal.

    Args:
      datasets: for each, training examples, test examples and the number of classes (a `datasets.Dataset`, say). All
        inputs have the same shape per example.
      shared_outputs: whether the tasks share their outputs, for the scenario "domain" (digits from several sources,
        say): the labels then stay as they are, and all data sets have the same number of classes. Otherwise each task
        has a class mask.

    Returns:
      A task for each data set.

    Raises:
      ValueError: if there are no data sets, their inputs differ in shape per example, labels are out of range, or data
        sets that share their outputs differ in their numbers of classes.
      TypeError: if a data set was opened rather than loaded.

    Example:
      >>> from lifelong_jax import Batch
      >>> batch = Batch(jnp.zeros((5, 2)), jnp.zeros(5, int), jnp.ones(5))
      >>> [task.class_mask.tolist() for task in dataset_tasks([(batch, batch, 1), (batch, batch, 2)])]
      [[True, False, False], [False, True, True]]

    Aljundi et al. 2018, arXiv 1711.09601, section 5.
    """
    if not datasets:
        raise ValueError("datasets is empty: pass one for each task.")
    for index, (train, test, _) in enumerate(datasets):
        _check_loaded(train, test, f"datasets[{index}].")
    batches = [batch for train, test, _ in datasets for batch in (train, test)]
    shapes = {str(jax.tree.map(lambda leaf: leaf.shape[1:], batch.inputs)) for batch in batches}
    if len(shapes) > 1:
        raise ValueError(
            f"inputs must have the same shape per example, but have {', '.join(sorted(shapes))}: resize them."
        )
    for index, (train, test, num_classes) in enumerate(datasets):
        _checks.check_classes(f"datasets[{index}].train", train, num_classes)
        _checks.check_classes(f"datasets[{index}].test", test, num_classes)
    counts = [num_classes for _, _, num_classes in datasets]
    if shared_outputs and len(set(counts)) > 1:
        raise ValueError(
            f"datasets have {', '.join(map(str, counts))} classes: to share their outputs, all must have the same "
            f"number. With shared_outputs=False, each has its own."
        )
    tasks, outputs = [], jnp.arange(sum(counts))
    for (train, test, num_classes), end in zip(datasets, itertools.accumulate(counts), strict=True):
        first = 0 if shared_outputs else end - num_classes
        train, test = (batch._replace(labels=batch.labels.astype(jnp.int32) + first) for batch in (train, test))
        tasks.append(Task(train, test, class_mask=None if shared_outputs else (outputs >= first) & (outputs < end)))
    return tasks


def pad_tasks(tasks: Sequence[Task]) -> list[Task]:
    """Pads smaller tasks to the largest one's numbers of examples, for `learn_sweep`, or to compile once.

    Padding has weight 0: it takes no training steps, and counts in no importance and no accuracy. It takes memory: a
    task of 60,000 examples and nine of 60 become ten of 60,000.

    Args:
      tasks: tasks whose inputs have the same shape per example.

    Returns:
      The tasks, with weights. Batches that need no padding are as they were.

    Raises:
      ValueError: if there are no tasks.

    Example:
      >>> small, large = (Batch(np.zeros((size, 3)), np.arange(size)) for size in (2, 4))
      >>> pad_tasks([Task(small, large), Task(large, large)])[0].train.weights
      Array([1., 1., 0., 0.], dtype=float32)
    """
    if not tasks:
        raise ValueError("tasks is empty: there is nothing to pad.")

    def pad_all(batches: Sequence[Batch | None]) -> list[Batch | None]:
        size = max((len(batch.labels) for batch in batches if batch is not None), default=0)
        return [
            batch if batch is None or (batch.weights is not None and len(batch.labels) == size) else pad(batch, size)
            for batch in batches
        ]

    parts: list[Any] = [pad_all([getattr(task, part) for task in tasks]) for part in ("train", "test", "validation")]
    return [
        task._replace(train=train, test=test, validation=validation)
        for task, train, test, validation in zip(tasks, *parts, strict=True)
    ]


def place_batch(batch: Batch, sharding: NamedSharding) -> Batch:
    """Shards a batch's examples over the devices of a mesh, all of which the library then splits its work over.

    JAX shards an axis in equal parts only. Where the examples do not divide evenly, they are padded with weight 0.

    Args:
      batch: arrays `[num_examples, ...]`. In several processes, each has all of them.
      sharding: how the axis of the examples is sharded: `NamedSharding(mesh, PartitionSpec("data"))`.

    Returns:
      The batch, of a size that the number of devices divides. Each process holds the examples of its own devices.

    Raises:
      ValueError: if `sharding` says how other axes are sharded.

    Example:
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> from lifelong_jax import Batch
      >>> mesh = jax.make_mesh((len(jax.devices()),), ("data",))
      >>> placed = place_batch(Batch(jnp.ones((4, 2)), jnp.arange(4)), NamedSharding(mesh, PartitionSpec("data")))
      >>> placed.inputs.sharding.spec
      P('data',)
    """
    check_sharding_of_examples(sharding)
    num_examples = len(batch.labels)
    size = round_up(num_examples, sharding)
    return place_arrays(batch if size == num_examples else pad(batch, size), sharding)


def permute_features(x: jax.Array, permutation: jax.Array | None) -> jax.Array:
    """Permutes the features of one input: feature i of the result is feature `permutation[i]` of `x`.

    Args:
      x: one example's input, of any shape.
      permutation: `[num_features]`, integers, or None to leave the input as it is.

    Returns:
      An array like `x`.

    Example:
      >>> permute_features(jnp.array([[1, 2], [3, 4]]), jnp.array([3, 2, 1, 0]))
      Array([[4, 3],
             [2, 1]], dtype=int32)
    """
    if permutation is None:
        return x
    features = jnp.ravel(x)
    permutation = jnp.asarray(permutation).reshape(features.shape)
    return features[indices_per_example(permutation, features)].reshape(x.shape)


def with_permutation(apply_fn: OutputFn, permutation: jax.Array | None) -> OutputFn:
    """Makes the network that permutes the features of its inputs.

    Args:
      apply_fn: `apply_fn(params, x) -> [num_classes]`, one example's outputs.
      permutation: `[num_features]`, a task's, as for `permute_features`.

    Returns:
      `output_fn(params, x) = apply_fn(params, permute_features(x, permutation))`.

    Example:
      >>> with_permutation(lambda params, x: params * x, jnp.array([1, 0]))(2, jnp.array([3, 4]))
      Array([8, 6], dtype=int32)
    """

    def output_fn(params: Params, x: Example) -> jax.Array:
        return apply_fn(params, permute_features(x, permutation))

    return output_fn


def _check_loaded(train: Batch, test: Batch, of: str = "") -> None:
    for name, batch in (("train", train), ("test", test)):
        if not isinstance(batch, Batch):
            raise TypeError(
                f"{of}{name} is a {type(batch).__name__}, but must be a Batch: load the data by load_dataset, because "
                f"open_dataset reads no images."
            )
        _checks.check_batch(f"{of}{name}", batch)


@jax.jit
def _rotate(images: jax.Array, angle: jax.Array) -> jax.Array:
    dtype = wide_dtype(images)
    angle = angle.astype(dtype)
    height, width = images.shape[1:3]
    middle_row, middle_column = (height - 1) / 2, (width - 1) / 2
    rows = jnp.arange(height, dtype=angle.dtype)[:, None] - middle_row
    columns = jnp.arange(width, dtype=angle.dtype) - middle_column
    sine, cosine = jnp.sin(jnp.deg2rad(angle)), jnp.cos(jnp.deg2rad(angle))
    # The position that each pixel comes from; rows count downwards.
    sources = [rows * cosine + columns * sine + middle_row, columns * cosine - rows * sine + middle_column]

    def rotate_channel(channel: jax.Array) -> jax.Array:
        return jax.scipy.ndimage.map_coordinates(channel, sources, order=1, mode="constant")

    rotated = jax.vmap(jax.vmap(rotate_channel, in_axes=-1, out_axes=-1))(images.astype(dtype))
    return rotated.astype(images.dtype)
