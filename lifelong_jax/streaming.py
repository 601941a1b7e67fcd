"""Data larger than memory: batches read ahead by threads (grain), while the device trains on those before.

Only a few batches are in memory at a time. A source of examples comes from `datasets.open_dataset`, or is any object
with a length and examples by number.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from rich.progress import track

from lifelong_jax import _checks
from lifelong_jax.datasets import scale_bytes
from lifelong_jax.runs import progress_bar
from lifelong_jax.sources import Source
from lifelong_jax.training import TrainingInfo, TrainingState, learn_task
from lifelong_jax.types import Batch, Consolidation, LossFn


def stream_batches(source: Source, batch_size: int, key: jax.Array | None = None) -> Iterator[Batch]:
    """Reads all examples once, a batch at a time.

    Threads read and decode ahead, up to two batches.

    Args:
      source: the examples.
      batch_size: examples per batch.
      key: a random key to shuffle all the examples by, or None to take them in order. The order is that in which
        `learn_task` would take them in an epoch that it draws this key for.

    Yields:
      Batches of one shape, `[batch_size, ...]`, with float32 inputs, on the device. The last one is filled up with
      examples of weight 0.

    Raises:
      ValueError: if there are no examples, if `batch_size` is not a positive integer, or examples differ in shape.

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
                f"example {index} has shape {example.inputs.shape}, but others have {shape}: open the data set with an "
                f"image_size, or with channels where only these differ."
            )
        return example

    num_threads = min(16, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(num_threads, 2 * batch_size))
    pipeline = grain.MapDataset.source(order).map(read).to_iter_dataset(options)
    with contextlib.closing(iter(pipeline.batch(batch_size, drop_remainder=False))) as batches:
        for batch in batches:
            batch = _fill_up(batch, batch_size)
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
    """Trains on one task's examples as they are read.

    It does what `learn_task` does with the same examples in memory: the same batches in the same order, and the same
    result to rounding. `learn_task` makes each step, compiled once. Progress is shown on standard error.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar`, the loss of one example, a `Batch` without its example axis. It
        must be the same function object from call to call, or it is compiled anew; and so must the optimiser.
      optimizer: as for `learn_task`.
      state: from `init_training`, or from an earlier call.
      consolidation: what is kept of earlier tasks.
      source: this task's training examples.
      num_epochs: passes over the examples.
      batch_size: examples per step.

    Returns:
      The state after the last step, and the losses, `[num_epochs, num_steps]`.

    Raises:
      ValueError: if there are no examples, or they differ in shape, or if `num_epochs` or `batch_size` is not a
        positive integer, or if the loss is no scalar.
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
    state = jax.device_put(state, may_alias=False)  # each step frees the state before, which must not be the caller's
    losses = np.zeros((num_epochs, num_steps))
    with progress_bar(rich.console.Console(stderr=True)) as bar:
        for epoch in range(num_epochs):
            line = bar.add_task(f"epoch {epoch + 1} of {num_epochs}", total=num_steps, status="")
            key, shuffle_key = jax.random.split(state.key)
            for step, batch in enumerate(stream_batches(source, batch_size, shuffle_key)):
                state, loss = _learn_batch(loss_fn, optimizer, state, consolidation, batch)
                losses[epoch, step] = loss  # waits for the step: else batches would queue up in memory
                _check_finite(losses[epoch, step], epoch, step)
                bar.update(line, advance=1, status=f"loss {losses[epoch, : step + 1].mean():.3f}")
            state = state._replace(key=key)
            if not _checks.is_finite(state.params):
                _check_finite(math.nan, epoch, num_steps - 1)
    return state, TrainingInfo(jnp.asarray(losses, loss.dtype), jnp.full(num_epochs, num_steps))


def mean_over_stream(
    mean_fn: Callable[[Any, Batch, jax.Array | None], Any],
    state: Any,
    source: Source,
    *,
    batch_size: int,
    key: jax.Array | None = None,
) -> Any:
    """Takes the mean over all examples of what is a mean over examples: an importance, or an accuracy.

        Σ_batches Σweights · mean_fn(state, batch, key) / Σ_batches Σweights

    It is exact: an importance over a stream is the importance over the same examples in memory.

    Args:
      mean_fn: `mean_fn(state, batch, key) -> tree`, a mean over the batch's examples weighted by `batch.weights`: a
        method's importance, `functools.partial(ewc().importance_fn, apply_fn)`, say. It must be the same function
        object from call to call, or it is compiled anew.
      state: its first argument, any tree of arrays: the parameters, or a `TrainingState`.
      source: the examples.
      batch_size: how many are taken together; the result does not depend on it, but for random samples.
      key: a random key, of which each batch gets a part, or None.

    Returns:
      A tree like that of `mean_fn`.

    Raises:
      ValueError: if there are no examples, or they differ in shape, or if `batch_size` is not a positive integer.

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
    console = rich.console.Console(stderr=True)
    batches = track(
        stream_batches(source, batch_size),
        "measuring",
        total=-(-len(source) // batch_size),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    total = None
    for number, batch in enumerate(batches):
        batch_key = None if key is None else jax.random.fold_in(key, number)
        if total is None:
            shapes = jax.eval_shape(mean_fn, state, batch, batch_key)
            total = (jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), jnp.zeros(()))
        total = jax.block_until_ready(_add_batch(mean_fn, total, state, batch, batch_key))
    summed, weight = total
    return jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), summed)


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
    here = jnp.sum(batch.weights)
    means = mean_fn(state, batch, key)
    # Of a batch of nothing but weights 0, a mean is not defined.
    weighted = jax.tree.map(lambda m: jnp.where(here > 0, here.astype(m.dtype) * m, 0), means)
    return jax.tree.map(jnp.add, summed, weighted), weight + here


def _fill_up(batch: Batch, batch_size: int) -> Batch:
    rows = np.arange(batch_size) % len(batch.labels)  # examples once more: they are valid, whatever the loss is
    filled = jax.tree.map(lambda leaf: leaf[rows], batch)
    return filled._replace(weights=np.where(np.arange(batch_size) < len(batch.labels), filled.weights, 0))


def _check(source: Source, batch_size: int) -> None:
    _checks.check_positive_integer("batch_size", batch_size)
    if len(source) == 0:
        raise ValueError("source is empty: there is nothing to read.")


def _check_finite(loss: float, epoch: int, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"training diverged in epoch {epoch + 1}, step {step + 1}: lower the learning rate or the strength, or use "
            f"the proximal penalty"
        )
