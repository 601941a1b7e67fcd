"""Sequences of tasks made from arrays. Tasks of one sequence have equal shapes: one compilation serves them all."""

import math
import operator
from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax import _checks
from lifelong_jax.types import Batch, Example, OutputFn, Params, Task

Scenario: TypeAlias = Literal["task", "domain", "class"]
"""What is known of the task at test time: see `active_classes`."""


def permuted_tasks(train: Batch, test: Batch, num_tasks: int, key: jax.Array) -> list[Task]:
    """Makes tasks that show the same examples, each through a fixed random permutation of the input's features.

    Every task is as hard as the next for a network without convolutions, and none is the unpermuted one. The tasks
    share their arrays: only the permutations differ.

    Args:
      train: training examples, inputs `[num_train, ...]`.
      test: test examples, inputs `[num_test, ...]` of the same shape per example.
      num_tasks: how many tasks.
      key: the random key of the permutations. The first tasks of a longer sequence are those of a shorter one.

    Returns:
      `num_tasks` tasks.

    Raises:
      ValueError: if `num_tasks` is not a positive integer, or train and test inputs differ in shape per example.
      TypeError: if a data set was opened and not loaded.

    Example:
      >>> batch = Batch(jnp.zeros((5, 2, 3)), jnp.zeros(5, int), jnp.ones(5))
      >>> [task.permutation.shape for task in permuted_tasks(batch, batch, 2, jax.random.key(0))]
      [(6,), (6,)]

    Goodfellow et al. 2013, arXiv 1312.6211; Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114.
    """
    _checks.check_positive_integer("num_tasks", num_tasks)
    _check_loaded(train, test)
    shape = train.inputs.shape[1:]
    if test.inputs.shape[1:] != shape:
        raise ValueError(f"test inputs have shape {test.inputs.shape[1:]} per example, but train inputs have {shape}.")
    num_features = math.prod(shape)
    keys = [jax.random.fold_in(key, index) for index in range(num_tasks)]
    return [Task(train, test, jax.random.permutation(task_key, num_features)) for task_key in keys]


def present(x: jax.Array, permutation: jax.Array | None) -> jax.Array:
    """Shows one input as a task shows it: feature i is where feature `permutation[i]` was.

    Args:
      x: one example's input, of any shape.
      permutation: `[num_features]`, integers, or None to leave the input as it is.

    Returns:
      An array like `x`.

    Example:
      >>> present(jnp.array([[1, 2], [3, 4]]), jnp.array([3, 2, 1, 0]))
      Array([[4, 3],
             [2, 1]], dtype=int32)
    """
    if permutation is None:
        return x
    features = jnp.ravel(x)
    permutation = jnp.asarray(permutation).reshape(features.shape)
    # The permutation, but one for each example under vmap: XLA then gathers along each example, in the order of memory,
    # not feature by feature across all of them. It does not know that what is added is 0, or it would hold them all.
    first = features[0].astype(jnp.float32)
    order = permutation + ((first > 0) & (first < 0)).astype(permutation.dtype)
    return features[order].reshape(x.shape)


def shown(apply_fn: OutputFn, permutation: jax.Array | None) -> OutputFn:
    """Makes a network see its inputs as a task shows them.

    Args:
      apply_fn: `apply_fn(params, x) -> [num_classes]`, one example's outputs.
      permutation: the task's, as for `present`.

    Returns:
      `output_fn(params, x) = apply_fn(params, present(x, permutation))`.

    Example:
      >>> shown(lambda params, x: params * x, jnp.array([1, 0]))(2, jnp.array([3, 4]))
      Array([8, 6], dtype=int32)
    """

    def output_fn(params: Params, x: Example) -> jax.Array:
        return apply_fn(params, present(x, permutation))

    return output_fn


def rotated_tasks(train: Batch, test: Batch, angles: Sequence[float]) -> list[Task]:
    """Makes tasks that show the same images, each rotated by another angle: a domain that drifts.

    Pixels are interpolated linearly, and 0 outside of the image.

    Args:
      train: training examples, inputs `[num_train, height, width, channels]`, floating.
      test: test examples, inputs `[num_test, height, width, channels]`, floating.
      angles: degrees, counter-clockwise, one for each task.

    Returns:
      A task for each angle, in the dtypes of the inputs.

    Raises:
      ValueError: if there is no angle, or one is not finite, or the inputs are not images.
      TypeError: if pixels are not floating-point, or a data set was opened and not loaded.

    Example:
      >>> batch = Batch(jnp.arange(4.0).reshape(1, 2, 2, 1), jnp.zeros(1, int), jnp.ones(1))
      >>> rotated_tasks(batch, batch, [0, 90])[1].train.inputs[0, :, :, 0].round().tolist()
      [[1.0, 3.0], [0.0, 2.0]]

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840, section 4 (rotated MNIST).
    """
    if not len(angles):
        raise ValueError("angles is empty: give one for each task.")
    _checks.check_finite("angles", list(angles), hint="Give degrees.")
    _check_loaded(train, test)
    for name, batch in (("train", train), ("test", test)):
        if batch.inputs.ndim != 4:
            raise ValueError(
                f"{name}.inputs has shape {batch.inputs.shape}, but images [num_examples, height, width, channels] are "
                f"needed."
            )
        if not jnp.issubdtype(batch.inputs.dtype, jnp.floating):
            raise TypeError(
                f"{name}.inputs has dtype {batch.inputs.dtype}, but pixels between others are to be interpolated: make "
                f"them floating-point, by datasets.scale_bytes, say."
            )
    return [
        Task(*(batch._replace(inputs=_rotate(batch.inputs, jnp.float32(angle))) for batch in (train, test)))
        for angle in angles
    ]


def split_tasks(
    train: Batch, test: Batch, class_groups: Sequence[Sequence[int]], num_classes: int, *, shared_outputs: bool = False
) -> list[Task]:
    """Makes tasks of disjoint classes. Smaller tasks are padded to the largest one's shape, with weight 0.

    Args:
      train: training examples.
      test: test examples.
      class_groups: for each task, its classes: in any order, any number of them, none twice.
      num_classes: how many classes there are, and outputs of the network.
      shared_outputs: whether the tasks share their outputs, for the domain-incremental scenario: labels then count
        from 0 within each task's group. Otherwise each class has its own, and each task a class mask.

    Returns:
      A task for each group.

    Raises:
      ValueError: if a class is out of range, stands twice, or has no examples of weight above 0.
      TypeError: if a data set was opened and not loaded.

    Example:
      >>> batch = Batch(jnp.zeros((5, 2)), jnp.array([0, 1, 2, 3, 3]), jnp.ones(5))
      >>> task = split_tasks(batch, batch, [[0, 1], [2, 3]], num_classes=4)[0]
      >>> task.train.weights, task.class_mask
      (Array([1., 1., 0.], dtype=float32), Array([ True,  True, False, False], dtype=bool))

    Zenke et al. 2017, arXiv 1703.04200; scenarios: van de Ven and Tolias 2019, arXiv 1904.07734.
    """
    _check_loaded(train, test)
    classes = [int(label) for group in class_groups for label in group]
    valid = len(set(classes)) == len(classes) and all(0 <= label < num_classes for label in classes)
    if not (valid and classes and all(len(group) for group in class_groups)):
        raise ValueError(
            f"class_groups must hold classes from 0 to {num_classes - 1}, at least one a group and none twice, and not "
            f"{[list(group) for group in class_groups]}."
        )
    tasks = []
    for group in class_groups:
        parts = []
        for name, batch in (("train", train), ("test", test)):
            labels = np.asarray(batch.labels)
            lacking = sorted(set(group) - set(labels[np.asarray(batch.weights) > 0].tolist()))
            if lacking:
                raise ValueError(f"{name} has no examples of the classes {lacking}.")
            part = jax.tree.map(operator.itemgetter(np.flatnonzero(np.isin(labels, group))), batch)
            if shared_outputs:
                positions = (part.labels[:, None] == jnp.asarray(group)).argmax(axis=-1)
                part = part._replace(labels=positions.astype(part.labels.dtype))
            parts.append(part)
        class_mask = None if shared_outputs else jnp.isin(jnp.arange(num_classes), jnp.asarray(group))
        tasks.append(Task(*parts, class_mask=class_mask))
    return _pad_tasks(tasks)


def dataset_tasks(datasets: Sequence[tuple[Batch, Batch, int]]) -> list[Task]:
    """Makes a task of each of several data sets, with outputs of their own: one head each on a shared trunk.

    The outputs of all data sets stand one after the other. Smaller data sets are padded to the largest one's shape,
    with weight 0.

    Args:
      datasets: for each, training examples, test examples and the number of classes (a `datasets.Dataset`, say); the
        inputs of all have one shape per example.

    Returns:
      A task for each data set.

    Raises:
      ValueError: if there are no data sets, their inputs differ in shape per example, or labels are out of range.
      TypeError: if a data set was opened and not loaded.

    Example:
      >>> batch = Batch(jnp.zeros((5, 2)), jnp.zeros(5, int), jnp.ones(5))
      >>> [task.class_mask.tolist() for task in dataset_tasks([(batch, batch, 1), (batch, batch, 2)])]
      [[True, False, False], [False, True, True]]

    Aljundi et al. 2018, arXiv 1711.09601, section 5.
    """
    if not datasets:
        raise ValueError("datasets is empty: give one for each task.")
    for index, (train, test, _) in enumerate(datasets):
        _check_loaded(train, test, f"datasets[{index}].")
    shapes = [batch.inputs.shape[1:] for train, test, _ in datasets for batch in (train, test)]
    if len(set(shapes)) > 1:
        raise ValueError(f"inputs must have one shape per example, but have {sorted(set(shapes))}: resize them.")
    for index, (train, test, num_classes) in enumerate(datasets):
        _checks.check_batch(f"datasets[{index}].train", train, num_classes)
        _checks.check_batch(f"datasets[{index}].test", test, num_classes)
    total = sum(num_classes for _, _, num_classes in datasets)
    tasks, first = [], 0
    for train, test, num_classes in datasets:
        parts = (batch._replace(labels=batch.labels.astype(jnp.int32) + first) for batch in (train, test))
        outputs = jnp.arange(total)
        tasks.append(Task(*parts, class_mask=(outputs >= first) & (outputs < first + num_classes)))
        first += num_classes
    return _pad_tasks(tasks)


def active_classes(tasks: Sequence[Task], scenario: Scenario, index: int, latest: int) -> jax.Array | None:
    """Says which outputs are active on one task when the latest one learned, or being learned, is another.

    Args:
      tasks: the sequence.
      scenario: "task", where the task is known at test time too, and its classes alone are active; "domain", where all
        tasks have the same classes, and all outputs are active; "class", where the task is not known, and the classes
        of all tasks up to the latest are active.
      index: of the task whose examples are shown.
      latest: of the task that is being learned, or was learned last.

    Returns:
      `[num_classes]`, bool, or None where all are active.

    Raises:
      ValueError: if `scenario` is no such, or a task has no class mask where it needs one.

    Example:
      >>> batch = Batch(jnp.zeros((2, 3)), jnp.array([0, 1]), jnp.ones(2))
      >>> tasks = split_tasks(batch, batch, [[0], [1]], num_classes=2)
      >>> active_classes(tasks, "task", 0, latest=1), active_classes(tasks, "class", 0, latest=1)
      (Array([ True, False], dtype=bool), Array([ True,  True], dtype=bool))

    van de Ven and Tolias 2019, arXiv 1904.07734, table 1.
    """
    _checks.check_choice("scenario", scenario, ("task", "domain", "class"))
    if scenario == "domain":
        return None
    if any(task.class_mask is None for task in tasks):
        raise ValueError(f"scenario {scenario!r} needs tasks with class masks.")
    if scenario == "task":
        return tasks[index].class_mask
    return jnp.any(jnp.stack([task.class_mask for task in tasks[: latest + 1]]), axis=0)


def mask_logits(logits: jax.Array, class_mask: jax.Array | None) -> jax.Array:
    """Gives inactive classes probability 0: `where(class_mask, logits, finfo.min)`.

    Args:
      logits: `[..., num_classes]`, floating.
      class_mask: `[num_classes]`, bool, or None to leave the logits as they are.

    Returns:
      An array like `logits`.

    Example:
      >>> jax.nn.softmax(mask_logits(jnp.zeros(3), jnp.array([True, True, False])))
      Array([0.5, 0.5, 0. ], dtype=float32)
    """
    return logits if class_mask is None else jnp.where(class_mask, logits, jnp.finfo(logits.dtype).min)


def mask_outputs(outputs: jax.Array, class_mask: jax.Array | None) -> jax.Array:
    """Takes inactive outputs out of the network's function: `where(class_mask, outputs, 0)`.

    Args:
      outputs: `[..., num_classes]`, floating.
      class_mask: `[num_classes]`, bool, or None to leave the outputs as they are.

    Returns:
      An array like `outputs`.

    Example:
      >>> mask_outputs(jnp.ones(3), jnp.array([True, True, False]))
      Array([1., 1., 0.], dtype=float32)
    """
    return outputs if class_mask is None else jnp.where(class_mask, outputs, 0)


def joint_examples(tasks: Sequence[Task], scenario: Scenario) -> Batch:
    """Puts all tasks' training examples into one batch, each as its task shows it: the upper bound trains on these.

    Args:
      tasks: a sequence of tasks whose inputs have equal shapes.
      scenario: which outputs are active for an example: see `active_classes`.

    Returns:
      A batch of the sum of the tasks' numbers of examples, with class masks; to be shown without a permutation.

    Example:
      >>> batch = Batch(jnp.zeros((5, 2, 3)), jnp.zeros(5, int), jnp.ones(5))
      >>> joint_examples(permuted_tasks(batch, batch, 2, jax.random.key(0)), "domain").inputs.shape
      (10, 2, 3)
    """
    shown = []
    for index, task in enumerate(tasks):
        inputs = jax.vmap(present, in_axes=(0, None))(task.train.inputs, task.permutation)
        class_mask = active_classes(tasks, scenario, index, len(tasks) - 1)
        shown.append(with_class_mask(task.train._replace(inputs=inputs), class_mask))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *shown)


def with_class_mask(batch: Batch, class_mask: jax.Array | None) -> Batch:
    """Gives every example of a batch the same class mask.

    Args:
      batch: examples.
      class_mask: `[num_classes]`, bool, or None for all classes.

    Returns:
      The batch with `class_mask` `[num_examples, num_classes]`, or None.

    Example:
      >>> batch = Batch(jnp.zeros((5, 2)), jnp.zeros(5, int), jnp.ones(5))
      >>> with_class_mask(batch, jnp.array([True, False, True])).class_mask.shape
      (5, 3)
    """
    if class_mask is None:
        return batch._replace(class_mask=None)
    return batch._replace(class_mask=jnp.broadcast_to(class_mask, (len(batch.labels), *class_mask.shape)))


def _check_loaded(train: Batch, test: Batch, of: str = "") -> None:
    for name, batch in (("train", train), ("test", test)):
        if not isinstance(batch, Batch):
            raise TypeError(
                f"{of}{name} is a {type(batch).__name__}, but a Batch is needed: load the data by load_dataset, as "
                f"open_dataset reads no images."
            )


@jax.jit
def _rotate(images: jax.Array, angle: jax.Array) -> jax.Array:
    dtype = np.promote_types(images.dtype, np.float32)
    angle = angle.astype(dtype)
    height, width = images.shape[1:3]
    middle_row, middle_column = (height - 1) / 2, (width - 1) / 2
    rows = jnp.arange(height, dtype=angle.dtype)[:, None] - middle_row
    columns = jnp.arange(width, dtype=angle.dtype) - middle_column
    sine, cosine = jnp.sin(jnp.deg2rad(angle)), jnp.cos(jnp.deg2rad(angle))
    # Where each pixel comes from: rows run downwards.
    sources = [rows * cosine + columns * sine + middle_row, columns * cosine - rows * sine + middle_column]

    def rotate_channel(channel: jax.Array) -> jax.Array:
        return jax.scipy.ndimage.map_coordinates(channel, sources, order=1, mode="constant")

    rotated = jax.vmap(jax.vmap(rotate_channel, in_axes=-1, out_axes=-1))(images.astype(dtype))
    return rotated.astype(images.dtype)


def _pad_tasks(tasks: list[Task]) -> list[Task]:
    def pad(*batches: Batch) -> list[Batch]:
        size = max(len(batch.labels) for batch in batches)

        def pad_leaf(leaf: jax.Array) -> jax.Array:
            return jnp.pad(leaf, [(0, size - len(leaf))] + [(0, 0)] * (leaf.ndim - 1), mode="constant")

        # Padding has the first example's label, which is one of the task's own classes.
        padded = [jax.tree.map(pad_leaf, batch) for batch in batches]
        return [
            part._replace(labels=jnp.where(jnp.arange(size) < len(batch.labels), part.labels, batch.labels[0]))
            for part, batch in zip(padded, batches, strict=True)
        ]

    trains, tests = pad(*(task.train for task in tasks)), pad(*(task.test for task in tasks))
    return [task._replace(train=train, test=test) for task, train, test in zip(tasks, trains, tests, strict=True)]
