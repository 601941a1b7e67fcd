"""The three scenarios of van de Ven and Tolias, as masks of active classes.

All tasks share one output layer of fixed size, so that one compilation serves all tasks.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lifelong_jax import _checks
from lifelong_jax.tasks import permute_features
from lifelong_jax.types import Batch, Scenario, Task


def active_classes(tasks: Sequence[Task], scenario: Scenario, index: int, latest: int) -> jax.Array | None:
    """Returns the outputs that are active for one task's examples.

    - "task": the task is known at test time, and only its classes are active.
    - "domain": all tasks have the same classes, and all outputs are active.
    - "class": the task is unknown at test time, and the classes of all tasks up to the latest are active.

    Args:
      tasks: the sequence.
      scenario: "task", "domain" or "class".
      index: the number of the task whose examples are used, from 0.
      latest: the number of the task that is being learned, or was learned last, from 0.

    Returns:
      `[num_classes]`, bool, or None if all outputs are active.

    Raises:
      ValueError: if `scenario` is unknown, or it needs class masks and a task has none.

    Example:
      >>> from lifelong_jax import Batch, split_tasks
      >>> batch = Batch(jnp.zeros((2, 3)), jnp.array([0, 1]), jnp.ones(2))
      >>> tasks = split_tasks(batch, batch, [[0], [1]], num_classes=2)
      >>> active_classes(tasks, "task", 0, latest=1), active_classes(tasks, "class", 0, latest=1)
      (Array([ True, False], dtype=bool), Array([ True,  True], dtype=bool))

    van de Ven and Tolias 2019, arXiv 1904.07734, table 1.
    """
    _checks.check_choice("scenario", scenario, ("task", "domain", "class"))
    if scenario == "domain":
        return None
    masks = [task.class_mask for task in tasks if task.class_mask is not None]
    if len(masks) < len(tasks):
        raise ValueError(f"scenario {scenario!r} needs tasks with class masks.")
    return masks[index] if scenario == "task" else jnp.any(jnp.stack(masks[: latest + 1]), axis=0)


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
    """Sets inactive outputs to 0: `where(class_mask, outputs, 0)`.

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


def with_class_mask(batch: Batch, class_mask: jax.Array | None) -> Batch:
    """Gives every example of a batch the same class mask.

    Args:
      batch: examples.
      class_mask: `[num_classes]`, bool, or None for all classes.

    Returns:
      The batch with `class_mask` `[num_examples, num_classes]`, or None.

    Example:
      >>> from lifelong_jax import Batch
      >>> batch = Batch(jnp.zeros((5, 2)), jnp.zeros(5, int), jnp.ones(5))
      >>> with_class_mask(batch, jnp.array([True, False, True])).class_mask.shape
      (5, 3)
    """
    if class_mask is None:
        return batch._replace(class_mask=None)
    return batch._replace(class_mask=jnp.broadcast_to(class_mask, (len(batch.labels), *class_mask.shape)))


def joint_examples(tasks: Sequence[Task], scenario: Scenario) -> Batch:
    """Joins the training examples of all tasks in one batch, for joint training.

    Args:
      tasks: a sequence of tasks whose inputs have the same shape per example.
      scenario: which outputs are active for each example; see `active_classes`.

    Returns:
      A batch with the examples of all tasks, their features permuted as in their tasks, and their class masks. It has
      weights if a task's training examples have.

    Example:
      >>> from lifelong_jax import Batch, permuted_tasks
      >>> batch = Batch(jnp.zeros((5, 2, 3)), jnp.zeros(5, int), jnp.ones(5))
      >>> joint_examples(permuted_tasks(batch, batch, 2, jax.random.key(0)), "domain").inputs.shape
      (10, 2, 3)
    """
    batches, weighted = [], any(task.train.weights is not None for task in tasks)
    labels_weighted = any(task.train.label_weights is not None for task in tasks)
    for index, task in enumerate(tasks):
        inputs = jax.vmap(permute_features, in_axes=(0, None))(task.train.inputs, task.permutation)
        class_mask = active_classes(tasks, scenario, index, len(tasks) - 1)
        batch = with_class_mask(task.train._replace(inputs=inputs), class_mask)
        if weighted:
            batch = batch._replace(weights=_ones_or(batch.weights, len(batch.labels)))
        if labels_weighted:
            batch = batch._replace(label_weights=_ones_or(batch.label_weights, batch.labels.shape))
        batches.append(batch)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)


def _ones_or(weights: jax.Array | None, shape: int | tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape) if weights is None else weights.astype(float)  # of one dtype, to be joined
