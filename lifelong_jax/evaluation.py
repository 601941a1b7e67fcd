"""The accuracy of a network on tasks: the evaluator, which alone sees the test sets."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lifelong_jax import _checks
from lifelong_jax._numerics import equal_size
from lifelong_jax.scenarios import active_classes
from lifelong_jax.tasks import with_permutation
from lifelong_jax.types import Batch, OutputFn, Params, Scenario, Task

_MAX_EVALUATED = 1024  # examples at once; a large network's activations on a whole test set could exceed the memory


@functools.partial(jax.jit, static_argnames=("apply_fn",))
def accuracy(
    apply_fn: OutputFn, params: Params, test: Batch, permutation: jax.Array | None, class_mask: jax.Array | None
) -> jax.Array:
    """Measures the accuracy on one test set.

        Σ_n weights[n] · (argmax of the active outputs for example n = labels[n]) / Σ_n weights[n]

    Args:
      apply_fn: `apply_fn(params, x) -> [num_classes]`, one example's logits, without batch axis.
      params: the parameters.
      test: the examples.
      permutation: a task's permutation of the features, or None; see `tasks.permute_features`.
      class_mask: `[num_classes]`, bool, the active outputs, or None for all of them.

    Returns:
      A fraction. An example with an output that is NaN counts as wrong.

    Raises:
      TypeError: if labels are not integers.
      ValueError: if there are no examples, if inputs, labels and weights differ in their number, if labels are not
        `[num_examples]`, or if `apply_fn` does not return one example's logits.

    Example:
      >>> from lifelong_jax import Batch
      >>> test = Batch(jnp.eye(2), jnp.array([0, 0]), jnp.ones(2))
      >>> accuracy(lambda params, x: params * x, jnp.array(1.0), test, None, None)
      Array(0.5, dtype=float32)
    """
    _checks.check_labelled("test", test)
    output_fn = with_permutation(apply_fn, permutation)
    num_examples = len(test.labels)
    weights = jnp.ones(num_examples) if test.weights is None else test.weights
    weights = weights.astype(float)  # a sum of narrow floats would be rounded
    test = test._replace(weights=weights)
    size = equal_size(num_examples, _MAX_EVALUATED)

    def logits_fn(x: jax.Array) -> jax.Array:
        with _checks.for_one_example("apply_fn", x):
            logits = output_fn(params, x)
        _checks.check_logits(logits)
        return logits

    def correct_weights(start: jax.Array) -> jax.Array:
        # All parts have one size: the last part overlaps the one before, and the overlap does not count again.
        first = jnp.minimum(start, num_examples - size)
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size), test)
        outputs = jax.vmap(logits_fn)(part.inputs)
        if class_mask is not None:  # below any active output, and no inactive NaN counts
            outputs = jnp.where(class_mask, outputs, -jnp.inf)
        predicted = jnp.argmax(outputs, axis=-1)
        correct = predicted.astype(jnp.int32) == part.labels.astype(jnp.int32)
        correct &= ~jnp.isnan(outputs).any(axis=-1)  # argmax returns the index of a NaN
        correct &= first + jnp.arange(size) >= start
        return jnp.where(correct, part.weights, 0)

    # Summed like the weights below: a sum of the parts' rounded sums could exceed theirs.
    return jnp.sum(jax.lax.map(correct_weights, jnp.arange(0, num_examples, size))) / jnp.sum(weights)


def evaluate(apply_fn: OutputFn, params: Params, tasks: Sequence[Task], scenario: Scenario = "domain") -> list[float]:
    """Measures the accuracy on each task's test set.

    Args:
      apply_fn: `apply_fn(params, x) -> [num_classes]`, one example's logits, without batch axis.
      params: the parameters.
      tasks: the tasks; in "class", those learned so far.
      scenario: which outputs are active; see `scenarios.active_classes`.

    Returns:
      A fraction for each task.

    Raises:
      TypeError: as for `accuracy`.
      ValueError: as for `accuracy`, or if weights are negative, all 0, or too large or too small for float32.

    Example:
      >>> from lifelong_jax import Batch, Task
      >>> batch = Batch(jnp.eye(2), jnp.array([0, 0]), jnp.ones(2))
      >>> evaluate(lambda params, x: params * x, jnp.array(1.0), [Task(batch, batch)])
      [0.5]
    """
    for index, task in enumerate(tasks):
        _checks.check_labelled(f"tasks[{index}].test", task.test)
    class_masks = [active_classes(tasks, scenario, index, len(tasks) - 1) for index in range(len(tasks))]
    accuracies = [
        accuracy(apply_fn, params, task.test, task.permutation, class_mask)
        for task, class_mask in zip(tasks, class_masks, strict=True)
    ]
    return [float(accuracy) for accuracy in accuracies]
