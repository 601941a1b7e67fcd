"""Sequences of tasks made from arrays. Tasks of one sequence have equal shapes: one compilation serves them all."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lifelong_jax import _checks
from lifelong_jax.types import Batch, Task


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

    Example:
      >>> batch = Batch(jnp.zeros((5, 2, 3)), jnp.zeros(5, int), jnp.ones(5))
      >>> [task.permutation.shape for task in permuted_tasks(batch, batch, 2, jax.random.key(0))]
      [(6,), (6,)]

    Goodfellow et al. 2013, arXiv 1312.6211; Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114.
    """
    _checks.check_positive_integer("num_tasks", num_tasks)
    shape = train.inputs.shape[1:]
    if test.inputs.shape[1:] != shape:
        raise ValueError(f"test inputs have shape {test.inputs.shape[1:]} per example, but train inputs have {shape}.")
    num_features = jnp.zeros(shape).size
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
    return x if permutation is None else x.reshape(-1)[permutation].reshape(x.shape)


def joint_examples(tasks: Sequence[Task]) -> Batch:
    """Puts all tasks' training examples into one batch, each as its task shows it: the upper bound trains on these.

    Args:
      tasks: a sequence of tasks whose inputs have equal shapes.

    Returns:
      A batch of the sum of the tasks' numbers of examples; to be shown without a permutation.

    Example:
      >>> batch = Batch(jnp.zeros((5, 2, 3)), jnp.zeros(5, int), jnp.ones(5))
      >>> joint_examples(permuted_tasks(batch, batch, 2, jax.random.key(0))).inputs.shape
      (10, 2, 3)
    """
    shown = [
        task.train._replace(inputs=jax.vmap(present, in_axes=(0, None))(task.train.inputs, task.permutation))
        for task in tasks
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *shown)
