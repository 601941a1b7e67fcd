"""The score of a network on tasks: the evaluator, which alone sees the test sets."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lifelong_jax import _checks
from lifelong_jax._jaxprs import activation_floats
from lifelong_jax._meshes import check_places, on_automatic_axes
from lifelong_jax._numerics import equal_size
from lifelong_jax._split_batches import batch_sharding, num_parts, split
from lifelong_jax.losses import ExampleLoss, with_model_state
from lifelong_jax.objectives import CLASSIFICATION, Objective, label_counts
from lifelong_jax.scenarios import active_classes, with_class_mask
from lifelong_jax.tasks import with_permutation
from lifelong_jax.types import Batch, ModelState, OutputFn, Params, Scenario, Task

_MAX_EXAMPLES = 1024  # at once; more are no faster
_MAX_FLOATS = 2**28  # of all activations of the examples at once: 1 GiB in float32, if none were freed


def score(
    apply_fn: OutputFn,
    params: Params,
    test: Batch,
    permutation: jax.Array | None,
    class_mask: jax.Array | None,
    objective: Objective = CLASSIFICATION,
    model_state: ModelState = None,
) -> jax.Array:
    """Measures the score on one test set: for classification, the accuracy.

        Σ_n weights[n] · score_fn(outputs for example n, example n) / Σ_n weights[n] · count_fn(example n)

    Examples are evaluated together, as many as their activations allow. If they are sharded along their leading axis
    over a mesh, each device evaluates its own; see `training.learn_task`.

    Args:
      apply_fn: `apply_fn(params, x) -> outputs`, without batch axis, or `apply_fn(params, model_state, x)`.
      params: the parameters.
      test: the examples.
      permutation: a task's permutation of the features, or None; see `tasks.permute_features`.
      class_mask: `[num_classes]`, bool, the active outputs, or None for all of them.
      objective: what the outputs mean.
      model_state: the model state, or None.

    Returns:
      The mean score of a label: a fraction, if it is the accuracy. Where an output is NaN, a label counts as wrong.

    Raises:
      TypeError: if labels are not what the objective takes.
      ValueError: if there are no examples, if inputs, labels and weights differ in their number, or if labels do not
        fit what `apply_fn` returns for one example.

    Example:
      >>> from lifelong_jax import Batch
      >>> test = Batch(jnp.eye(2), jnp.array([0, 0]), jnp.ones(2))
      >>> score(lambda params, x: params * x, jnp.array(1.0), test, None, None)
      Array(0.5, dtype=float32)
    """
    _checks.check_batch("test", test)
    arguments = (params, test, permutation, class_mask, model_state)
    names = ("params", "test", "permutation", "class_mask", "model_state")
    check_places(**dict(zip(names, arguments, strict=True)))
    return _score(apply_fn, objective, batch_sharding(test), *arguments)


@functools.partial(jax.jit, static_argnames=("apply_fn", "objective", "sharding"))
def _score(apply_fn: OutputFn, objective: Objective, sharding: NamedSharding | None, *arguments: Any) -> jax.Array:
    score = functools.partial(_score_shards, apply_fn, objective, sharding)
    return on_automatic_axes(score, arguments, out=PartitionSpec())


def _score_shards(
    apply_fn: OutputFn,
    objective: Objective,
    sharding: NamedSharding | None,
    params: Params,
    test: Batch,
    permutation: jax.Array | None,
    class_mask: jax.Array | None,
    model_state: ModelState,
) -> jax.Array:
    output_fn = with_permutation(with_model_state(apply_fn, model_state), permutation)
    x = _checks.first_example(test.inputs)
    with _checks.for_one_example("apply_fn", x):
        jaxpr, outputs = jax.make_jaxpr(output_fn, return_shape=True)(params, x)
    objective.check_fn("test", test, outputs)
    num_examples = len(test.labels)
    counts = label_counts(objective, test)
    counts = jnp.ones(num_examples) if counts is None else counts.astype(float)  # a sum of narrow floats is rounded
    weights = jnp.ones(num_examples) if test.weights is None else test.weights.astype(float)
    test = with_class_mask(test, class_mask)._replace(weights=weights)
    is_constant = [True] * len(jax.tree.leaves(params)) + [False] * len(jax.tree.leaves(x))
    num_floats = max(1, activation_floats(jaxpr.jaxpr, is_constant))
    num_shards = num_parts(sharding)
    shard_size = num_examples // num_shards
    size = equal_size(shard_size, max(1, min(_MAX_EXAMPLES, _MAX_FLOATS // num_floats)))
    shards = split(jax.tree.map(lambda leaf: leaf.reshape(num_shards, shard_size, *leaf.shape[1:]), test), sharding)

    def of_example(example: Batch) -> jax.Array:
        return objective.score_fn(output_fn(params, example.inputs), example).astype(weights.dtype)

    def scores(start: jax.Array) -> jax.Array:
        # All parts have one size: the last part overlaps the one before, and the overlap does not count again.
        first = jnp.minimum(start, shard_size - size)
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size, axis=1), shards)
        part = jax.tree.map(lambda leaf: leaf.reshape(num_shards * size, *leaf.shape[2:]), part)
        is_new = jnp.tile(first + jnp.arange(size) >= start, num_shards)
        counted = is_new & (part.weights > 0)  # the scores of padding may be NaN
        return jnp.where(counted, jax.vmap(of_example)(part) * part.weights, 0)

    # Summed like the weights below: a sum of the parts' rounded sums could exceed theirs.
    return jnp.sum(jax.lax.map(scores, jnp.arange(0, shard_size, size))) / jnp.sum(counts)


def evaluate(
    apply_fn: Callable[..., jax.Array],
    params: Params,
    tasks: Sequence[Task],
    scenario: Scenario = "domain",
    *,
    objective: Objective = CLASSIFICATION,
    model_state: ModelState = None,
) -> list[float]:
    """Measures the score on each task's test set: for classification, the accuracy.

    Args:
      apply_fn: `apply_fn(params, x) -> outputs`, for one example, without batch axis; with a model state,
        `apply_fn(params, model_state, x)`.
      params: the parameters.
      tasks: the tasks; in "class", those learned so far.
      scenario: which outputs are active; see `scenarios.active_classes`.
      objective: what the outputs mean, and the score; from `objectives`.
      model_state: the model state, or None for a network without.

    Returns:
      A score for each task: a fraction, if it is the accuracy.

    Raises:
      TypeError: as for `score`.
      ValueError: as for `score`, or if labels are out of range, or weights are negative, all 0, or too large or too
        small for float32.

    Example:
      >>> from lifelong_jax import Batch, Task
      >>> batch = Batch(jnp.eye(2), jnp.array([0, 0]), jnp.ones(2))
      >>> evaluate(lambda params, x: params * x, jnp.array(1.0), [Task(batch, batch)])
      [0.5]
    """
    loss_fn = ExampleLoss(objective, with_model_state(apply_fn, model_state))
    for index, task in enumerate(tasks):
        _checks.check_batch(f"tasks[{index}].test", task.test)
        loss_fn.check_examples(f"tasks[{index}].test", params, task.test)
    return scores_of_tasks(apply_fn, params, tasks, scenario, objective, model_state)


def scores_of_tasks(
    apply_fn: Callable[..., jax.Array],
    params: Params,
    tasks: Sequence[Task],
    scenario: Scenario,
    objective: Objective,
    model_state: ModelState,
) -> list[float]:
    """Measures the score on each task's test set, as `evaluate` does, without its checks: a loop makes them once.

    Args:
      apply_fn: as for `evaluate`; so are the other arguments.
      params: the parameters.
      tasks: the tasks.
      scenario: which outputs are active.
      objective: what the outputs mean.
      model_state: the model state, or None.

    Returns:
      A score for each task.
    """
    class_masks = [active_classes(tasks, scenario, index, len(tasks) - 1) for index in range(len(tasks))]
    scores = [
        score(apply_fn, params, task.test, task.permutation, class_mask, objective, model_state)
        for task, class_mask in zip(tasks, class_masks, strict=True)
    ]
    return [float(of_task) for of_task in scores]
