"""Training and means over data larger than memory: threads (of grain) read batches while the device computes.

Only a few batches are in memory at a time. A source of examples is what `datasets.open_dataset` returns, or any other
sequence of examples: an object with a length that is indexed by integers.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lifelong_jax import _checks, forms
from lifelong_jax._extras import needs_extra
from lifelong_jax._numerics import pad
from lifelong_jax.datasets.named import scale_bytes
from lifelong_jax.datasets.sources import Source
from lifelong_jax.training import TrainingInfo, TrainingState, learn_task
from lifelong_jax.types import Batch, Consolidation, LossFn

with needs_extra("data"):
    import grain
    import tqdm


def stream_batches(source: Source, batch_size: int, key: jax.Array | None = None) -> Iterator[Batch]:
    """Reads each example once, in batches; leaves out those of weight 0.

    Threads read and decode up to two batches ahead.

    Args:
      source: the examples.
      batch_size: examples per batch.
      key: a random key to shuffle the examples with, or None to keep their order. `learn_task` shuffles in the same
        order in an epoch for which it draws this key.

    Yields:
      Batches `[batch_size, ...]` on the device, with float32 inputs. The last batch is padded with
      examples of weight 0.

    Raises:
      ValueError: if there are no examples, if `batch_size` is not a positive integer, or if examples differ in shape.

    Example:
      >>> from lifelong_jax.datasets import open_dataset
      >>> batches = list(stream_batches(open_dataset("digits").test, 100))
      >>> batches[0].inputs.shape, [int(batch.weights.sum()) for batch in batches]
      ((100, 8, 8, 1), [100, 100, 100, 60])
    """
    _check(source, batch_size)
    order = np.arange(len(source)) if key is None else np.asarray(jax.random.permutation(key, len(source)))
    shape = source[int(order[0])].inputs.shape

    def read(index: np.integer) -> Batch:
        example = source[int(index)]
        if example.inputs.shape != shape:
            raise ValueError(
                f"example {index} has shape {example.inputs.shape}, but others have {shape}: open the data set with "
                f"image_size, or with channels if only the channels differ."
            )
        return example

    num_threads = min(16, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(num_threads, 2 * batch_size))
    pipeline = grain.MapDataset.source(order).map(read).to_iter_dataset(options)
    pipeline = pipeline.filter(lambda example: example.weights is None or example.weights > 0)  # as in memory
    with contextlib.closing(iter(pipeline.batch(batch_size, drop_remainder=False))) as batches:
        for batch in batches:
            batch = pad(batch, batch_size)
            yield jax.tree.map(jnp.asarray, batch._replace(inputs=scale_bytes(batch.inputs)))


def learn_stream(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state: TrainingState,
    consolidation: Consolidation,
    source: Source,
    *,
    num_epochs: int,
    batch_size: int,
) -> tuple[TrainingState, TrainingInfo]:
    """Trains on one task's examples while they are read.

    It takes the same batches in the same order as `learn_task` with the same examples in memory, and gives the same
    result up to rounding. `learn_task` makes each step, and is compiled once. Progress is shown on standard error.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar`, the loss of one example, a `Batch` without the example axis. Pass
        the same function object to each call, and the same optimiser: for another object, the step is compiled again.
      optimizer: as for `learn_task`.
      state: from `init_training`, or from an earlier call.
      consolidation: of the earlier tasks.
      source: the training examples of this task.
      num_epochs: passes over the examples.
      batch_size: examples per step.

    Returns:
      The state after the last step, and the losses `[num_epochs, num_steps]`.

    Raises:
      ValueError: if there are no examples, if examples differ in shape, if `num_epochs` or `batch_size` is not a
        positive integer, or if the loss is not a scalar.
      FloatingPointError: if training diverged.

    Example:
      >>> from lifelong_jax import init_consolidation, init_training
      >>> from lifelong_jax.datasets import open_dataset
      >>> from lifelong_jax.methods import cross_entropy
      >>> loss_fn = cross_entropy(lambda params, x: x.ravel() @ params)
      >>> optimizer = optax.sgd(0.1)
      >>> state = init_training(optimizer, jnp.zeros((64, 10)), jax.random.key(0))
      >>> none = init_consolidation(state.params)
      >>> digits = open_dataset("digits")
      >>> state, info = learn_stream(loss_fn, optimizer, state, none, digits.train, num_epochs=1, batch_size=32)
      >>> info.loss.shape
      (1, 45)
    """
    _check(source, batch_size)
    _checks.check_positive_integer("num_epochs", num_epochs)
    batch_size = min(batch_size, len(source))
    num_steps = -(-len(source) // batch_size)
    state = jax.device_put(state, may_alias=False)  # a copy: each step frees the arrays of the state before
    losses, num_taken = np.zeros((num_epochs, num_steps)), np.zeros(num_epochs, np.int32)
    for epoch in range(num_epochs):
        key, shuffle_key = jax.random.split(state.key)
        batches = stream_batches(source, batch_size, shuffle_key)
        with tqdm.tqdm(batches, f"epoch {epoch + 1} of {num_epochs}", num_steps, disable=None) as progress:
            for step, batch in enumerate(progress):
                state, loss = _learn_batch(loss_fn, optimizer, state, consolidation, batch)
                num_taken[epoch] = step + 1
                losses[epoch, step] = loss  # waits for the step; otherwise batches would queue up in memory
                _check_finite(losses[epoch, step], epoch, step)
                progress.set_postfix_str(f"loss {losses[epoch, : step + 1].mean():.3f}", refresh=False)
        if num_taken[epoch] == 0:
            raise ValueError("source has no example of a weight above 0: there is nothing to learn from.")
        state = state._replace(key=key)
        if not _checks.is_finite(state.params):
            _check_finite(math.nan, epoch, num_steps - 1)
    return state, TrainingInfo(jnp.asarray(losses, loss.dtype), jnp.asarray(num_taken))


def mean_over_stream(
    mean_fn: Callable[[Any, Batch, jax.Array | None], Any],
    state: Any,
    source: Source,
    *,
    batch_size: int,
    key: jax.Array | None = None,
) -> Any:
    """Computes a mean over all examples, such as an importance or an accuracy, from means over batches.

        Σ_batches Σweights · mean_fn(state, batch, key) / Σ_batches Σweights

    It is exact: an importance over a stream is the importance over the same examples in memory. Of Kronecker factors,
    each factor's mean is computed. Their eigenvectors are computed for every batch, so let batches be large.

    Args:
      mean_fn: `mean_fn(state, batch, key) -> tree`, a mean over the batch's examples weighted by `batch.weights`, such
        as a method's importance, `functools.partial(ewc().importance_fn, apply_fn)`. Pass the same function object to
        each call: another object is compiled again.
      state: the first argument of `mean_fn`, any tree of arrays: parameters, or a `TrainingState`.
      source: the examples.
      batch_size: examples per batch. The result depends on it only if `mean_fn` uses `key`.
      key: a random key that is folded with each batch's number, or None.

    Returns:
      A tree like that of `mean_fn`.

    Raises:
      ValueError: if there are no examples, if examples differ in shape, or if `batch_size` is not a positive integer.

    Example:
      >>> from lifelong_jax import mas_importance
      >>> from lifelong_jax.datasets import open_dataset
      >>> def measure(params, batch, key):
      ...     return mas_importance(lambda params, x: x.ravel() @ params, params, batch.inputs, weights=batch.weights)
      >>> digits = open_dataset("digits")
      >>> mean_over_stream(measure, jnp.ones((64, 10)), digits.train, batch_size=100).shape
      (64, 10)
    """
    _check(source, batch_size)
    batch_size = min(batch_size, len(source))
    num_batches = -(-len(source) // batch_size)
    batches = tqdm.tqdm(stream_batches(source, batch_size), "measuring", num_batches, leave=False, disable=None)
    total: Any = None
    for number, batch in enumerate(batches):
        batch_key = None if key is None else jax.random.fold_in(key, number)
        if total is None:
            shapes = jax.eval_shape(mean_fn, state, batch, batch_key)
            sums = jax.eval_shape(_with_factors, shapes)
            total = (jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums), jnp.zeros(()))
        total = jax.block_until_ready(_add_batch(mean_fn, total, state, batch, batch_key))
    if total is None:
        raise ValueError("source has no example of a weight above 0: there is nothing to measure.")
    summed, weight = total
    return _with_forms(jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), summed), shapes)


@functools.partial(jax.jit, static_argnames=("loss_fn", "optimizer"), donate_argnames=("state",))
def _learn_batch(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state: TrainingState,
    consolidation: Consolidation,
    batch: Batch,
) -> tuple[TrainingState, jax.Array]:
    state, info = learn_task(
        loss_fn,
        optimizer,
        state,
        consolidation,
        batch,
        num_epochs=1,
        batch_size=batch.labels.shape[0],
        weights=batch.weights,
    )
    return state, info.loss[0, 0]


@functools.partial(jax.jit, static_argnames=("mean_fn",), donate_argnames=("total",))
def _add_batch(
    mean_fn: Callable, total: tuple[Any, jax.Array], state: Any, batch: Batch, key: jax.Array | None
) -> tuple[Any, jax.Array]:
    summed, weight = total
    batch_weight = jnp.sum(batch.weights)  # type: ignore[arg-type]  # `stream_batches` fills them in
    means = _with_factors(mean_fn(state, batch, key))
    weighted = jax.tree.map(lambda m: batch_weight.astype(m.dtype) * m, means)
    return jax.tree.map(jnp.add, summed, weighted), weight + batch_weight


def _with_factors(tree: Any) -> Any:
    """Replaces forms by their factors: sums of eigenvectors would mean nothing."""
    return forms.tree_map(lambda node: forms.factors_of(node) if forms.is_form(node) else node, tree)


def _with_forms(tree: Any, shapes: Any) -> Any:
    """Makes forms of factors, where `shapes` has forms."""

    def of_node(shape: Any, node: Any) -> Any:
        return forms.from_factors(node[0], node[1], shape.layout) if forms.is_form(shape) else node

    return forms.tree_map(of_node, shapes, tree)


def _check(source: Source, batch_size: int) -> None:
    _checks.check_positive_integer("batch_size", batch_size)
    if len(source) == 0:
        raise ValueError("source is empty: at least one example is needed.")


def _check_finite(loss: float, epoch: int, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"training diverged in epoch {epoch + 1}, step {step + 1}: lower the learning rate or the strength, or use "
            f"the proximal penalty"
        )
