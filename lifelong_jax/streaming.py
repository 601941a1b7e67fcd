"""Training and means over data larger than memory: threads (of grain) read batches while the device computes.

Only a few batches are in memory at a time. A source of examples is what `datasets.open_dataset` returns, or any other
sequence of examples: an object with a length that is indexed by integers.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lifelong_jax import _checks, forms
from lifelong_jax._extras import needs_extra
from lifelong_jax._meshes import Layout, check_places, find_layout, knowing, on_automatic_axes
from lifelong_jax._numerics import pad
from lifelong_jax._process_rows import held_rows, own_rows, place_rows, rows_of_batches, weigh_rows
from lifelong_jax._processes import copy_arrays
from lifelong_jax._split_batches import (
    LoopShardings,
    check_sharding_of_examples,
    find_shardings,
    keep_shardings,
    onto_mesh,
    round_up,
    specs_of,
)
from lifelong_jax.datasets.sources import Source
from lifelong_jax.training import TrainingInfo, TrainingState, check_loss, example_keys, train_step
from lifelong_jax.types import Batch, Consolidation, LossFn, TrainLossFn

with needs_extra("data"):
    import grain
    import tqdm


class StreamState(NamedTuple):
    """The state within a stream: what the next step needs, and the losses so far.

    Attributes:
      training: the state after the last step; its key is that of the current epoch's beginning.
      epoch: the number of epochs that are finished.
      step: the number of steps taken in the current epoch.
      losses: `[num_epochs, num_batches]`, the loss of each step so far; 0 for others.
      num_steps: `[num_epochs]`, the number of steps of each epoch so far.
    """

    training: TrainingState
    epoch: int
    step: int
    losses: np.ndarray
    num_steps: np.ndarray


def stream_batches(
    source: Source, batch_size: int, key: jax.Array | None = None, *, sharding: NamedSharding | None = None
) -> Iterator[Batch]:
    """Reads each example once, in batches; leaves out those of weight 0.

    Threads read and decode up to two batches ahead.

    Args:
      source: the examples.
      batch_size: examples per batch.
      key: a random key to shuffle the examples with, or None to keep their order. `learn_task` shuffles in the same
        order in an epoch for which it draws this key.
      sharding: how a batch's leading axis is sharded over a mesh, `NamedSharding(mesh, PartitionSpec("data"))`; None
        for one device. Batches are padded, with weight 0, to a size that can be split. Where the mesh spans several
        processes, each reads the examples of its own devices, and no example may have weight 0.

    Yields:
      Batches `[batch_size, ...]` on the device, in the dtypes of the source. The last batch is padded with examples of
      weight 0.

    Raises:
      ValueError: if there are no examples, if `batch_size` is not a positive integer, if examples differ in shape, or
        if the sharding has other axes than that of the examples.

    Example:
      >>> from lifelong_jax.datasets import open_dataset
      >>> batches = list(stream_batches(open_dataset("digits").test, 100))
      >>> batches[0].inputs.shape, [int(batch.weights.sum()) for batch in batches]
      ((100, 8, 8, 1), [100, 100, 100, 60])
    """
    for _, batch in _numbered_batches(source, batch_size, key, sharding):
        yield batch


def _numbered_batches(
    source: Source, batch_size: int, key: jax.Array | None, sharding: NamedSharding | None
) -> Iterator[tuple[jax.Array, Batch]]:
    """Yields batches with the numbers of their examples in the source."""
    _check(source, batch_size, sharding)
    order = np.arange(len(source)) if key is None else np.asarray(jax.random.permutation(_on_host(key), len(source)))
    size = round_up(batch_size, sharding)
    if sharding is None or sharding.is_fully_addressable:
        pipeline = _read(source, order, batch_size)
        pipeline = pipeline.filter(
            lambda numbered: numbered[1].weights is None or numbered[1].weights > 0
        )  # as in memory
        with contextlib.closing(iter(pipeline.batch(batch_size, drop_remainder=False))) as batches:
            for indices, batch in batches:
                indices = indices[np.arange(size) % len(indices)]
                numbered = (indices, pad(batch, size))
                yield jax.tree.map(jnp.asarray, numbered) if sharding is None else jax.device_put(numbered, sharding)
        return
    rows = own_rows(sharding, size)
    positions, counted = rows_of_batches(len(order), batch_size, size)
    pipeline = _read(source, order[positions[:, rows].ravel()], batch_size)
    with contextlib.closing(iter(pipeline.batch(len(rows)))) as batches:
        for (indices, batch), is_example in zip(batches, counted[:, rows], strict=True):
            yield place_rows((indices, weigh_rows(batch, is_example)), sharding, rows, size)


def _on_host(key: jax.Array) -> jax.Array:
    """Takes a key from the devices of a mesh."""
    data = np.asarray(jax.random.key_data(key))
    return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(key))


def _read(source: Source, order: np.ndarray, batch_size: int) -> Any:
    """Makes a pipeline of examples, with their numbers, in an order."""
    first = source[int(order[0])]
    shapes = jax.tree.map(np.shape, first)

    def read(index: np.integer) -> tuple[np.integer, Batch]:
        example = source[int(index)]
        if jax.tree.map(np.shape, example) != shapes:
            try:
                _checks.check_same_structure(f"example {index}", example, f"example {order[0]}", first)
            except ValueError as error:
                raise ValueError(
                    f"{error} Open images with image_size, or with channels if only the channels differ."
                ) from None
        return index, example

    num_threads = min(16, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(num_threads, 2 * batch_size))
    return grain.MapDataset.source(order).map(read).to_iter_dataset(options)


def learn_stream(
    loss_fn: LossFn | TrainLossFn,
    optimizer: optax.GradientTransformation,
    state: TrainingState | StreamState,
    consolidation: Consolidation,
    source: Source,
    *,
    num_epochs: int,
    batch_size: int,
    interval: int | None = None,
    callback: Callable[[StreamState], None] = lambda state: None,
    sharding: NamedSharding | None = None,
) -> tuple[TrainingState, TrainingInfo]:
    """Trains on one task's examples while they are read.

    It takes the same batches in the same order as `learn_task` with the same examples in memory, and gives the same
    result up to rounding. A step is compiled once. Progress is shown on standard error.

    Args:
      loss_fn: as for `learn_task`; an example is a `Batch` without the example axis. Pass the same function object to
        each call, and the same optimiser: for another object, the step is compiled again.
      optimizer: as for `learn_task`.
      state: from `init_training`, or from an earlier call; or a state that a callback got, to go on from. The examples
        before it in its epoch are read again, and not used.
      consolidation: of the earlier tasks.
      source: the training examples of this task.
      num_epochs: passes over the examples, with those before `state`.
      batch_size: examples per step.
      interval: the number of steps after which the callback is called within an epoch, or None for an epoch's end only.
      callback: `callback(state)`, called after every epoch, and every `interval` steps, to save a `StreamState`. It
        must copy what it keeps: the next step frees the state.
      sharding: how a batch's leading axis is sharded over a mesh, as for `stream_batches`. The order of the examples is
        that of one device. Of the state and the consolidation, arrays that are on no mesh are placed whole on each
        device; the others keep their shardings.

    Returns:
      The state after the last step, and the losses `[num_epochs, num_steps]`.

    Raises:
      TypeError: if labels are not what `loss_fn` takes.
      ValueError: if there are no examples, if examples differ in shape, if a label is out of range, if `num_epochs`,
        `batch_size` or `interval` is not a positive integer, if the loss is not a scalar, or if the sharding has other
        axes than that of the examples.
      FloatingPointError: if training diverged.

    Example:
      >>> from lifelong_jax import init_consolidation, init_training
      >>> from lifelong_jax.datasets import open_dataset
      >>> from lifelong_jax.losses import cross_entropy
      >>> loss_fn = cross_entropy(lambda params, x: x.ravel() @ params)
      >>> optimizer = optax.sgd(0.1)
      >>> state = init_training(optimizer, jnp.zeros((64, 10)), jax.random.key(0))
      >>> none = init_consolidation(state.params)
      >>> digits = open_dataset("digits")
      >>> state, info = learn_stream(loss_fn, optimizer, state, none, digits.train, num_epochs=1, batch_size=32)
      >>> info.loss.shape
      (1, 45)
    """
    _check(source, batch_size, sharding)
    _checks.check_positive_integer("num_epochs", num_epochs)
    _checks.check_positive_integer("interval", interval, optional=True)
    batch_size = min(batch_size, len(source))
    num_batches = -(-len(source) // batch_size)
    stream = _start(state, num_epochs, num_batches)
    if sharding is not None:
        training, consolidation = onto_mesh(sharding.mesh, (stream.training, consolidation))
        stream = stream._replace(training=training)
    shardings = find_shardings(stream.training, None)
    learn = functools.partial(_learn_batch, loss_fn, optimizer, consolidation, shardings=shardings)
    for epoch in range(stream.epoch, num_epochs):
        key, epoch_key = jax.random.split(stream.training.key)
        batches = _numbered_batches(source, batch_size, epoch_key, sharding)
        with tqdm.tqdm(batches, f"epoch {epoch + 1} of {num_epochs}", num_batches, disable=None) as progress:
            for step, (indices, batch) in enumerate(progress):
                if step < stream.step:
                    continue
                if step == 0:
                    check_places(source=batch, state=stream.training, consolidation=consolidation)
                    check_loss(loss_fn, stream.training, "source", held_rows(batch))
                stream = _take_step(learn, stream, epoch_key, indices, batch)
                if not math.isfinite(stream.losses[epoch, step]):
                    check_loss(
                        loss_fn, stream.training, "source", held_rows(batch)
                    )  # a label out of range makes it NaN
                    _refuse(epoch, step)
                progress.set_postfix_str(f"loss {stream.losses[epoch, : step + 1].mean():.3f}", refresh=False)
                if interval is not None and (step + 1) % interval == 0:
                    callback(stream)
        if stream.step == 0:
            raise ValueError("source has no example of a weight above 0: there is nothing to learn from.")
        if not _checks.is_finite(stream.training.params):
            _refuse(epoch, stream.step - 1)
        stream = stream._replace(training=stream.training._replace(key=key), epoch=epoch + 1, step=0)
        callback(stream)
    return stream.training, TrainingInfo(jnp.asarray(stream.losses, float), jnp.asarray(stream.num_steps))


def _start(state: TrainingState | StreamState, num_epochs: int, num_batches: int) -> StreamState:
    """Returns a copy of the state, whose arrays each step frees, with room for all losses."""
    losses, num_steps = np.zeros((num_epochs, num_batches)), np.zeros(num_epochs, np.int32)
    if isinstance(state, TrainingState):
        return StreamState(copy_arrays(state), 0, 0, losses, num_steps)
    if state.epoch > num_epochs or state.losses.shape[1:] != (num_batches,):
        raise ValueError(
            f"state is after {state.epoch} epochs of {state.losses.shape[1]} batches, but there are {num_epochs} "
            f"epochs of {num_batches}."
        )
    num_known = min(num_epochs, len(state.losses))
    losses[:num_known], num_steps[:num_known] = state.losses[:num_known], state.num_steps[:num_known]
    return StreamState(copy_arrays(state.training), state.epoch, state.step, losses, num_steps)


def _take_step(
    learn: Callable, stream: StreamState, epoch_key: jax.Array, indices: jax.Array, batch: Batch
) -> StreamState:
    training, loss = learn(stream.training, epoch_key, indices, batch)
    stream.losses[stream.epoch, stream.step] = loss  # waits for the step; otherwise batches would queue up in memory
    stream.num_steps[stream.epoch] = stream.step + 1
    return stream._replace(training=training, step=stream.step + 1)


def mean_over_stream(
    mean_fn: Callable[[Any, Batch, jax.Array | None], Any],
    state: Any,
    source: Source,
    *,
    batch_size: int,
    key: jax.Array | None = None,
    sharding: NamedSharding | None = None,
) -> Any:
    """Computes a mean over all examples, such as an importance or an accuracy, from means over batches.

        Σ_batches Σweights · mean_fn(state, batch, key) / Σ_batches Σweights

    It is exact: an importance over a stream is the importance over the same examples in memory. Of Kronecker factors,
    each factor's mean is computed. Their eigenvectors are computed for every batch, so let batches be large.

    Args:
      mean_fn: `mean_fn(state, batch, key) -> tree`, a mean over the batch's examples weighted by `batch.weights`, such
        as a method's importance, `functools.partial(ewc().importance_fn, apply_fn, classification())`. Pass the same
        function object to each call: another object is compiled again.
      state: the first argument of `mean_fn`, any tree of arrays: parameters, or a `TrainingState`.
      source: the examples.
      batch_size: examples per batch. The result depends on it only if `mean_fn` uses `key`.
      key: a random key that is folded with each batch's number, or None.
      sharding: how a batch's leading axis is sharded over a mesh, as for `stream_batches`. The library's importances
        are then split over its axes.

    Returns:
      A tree like that of `mean_fn`.

    Raises:
      ValueError: if there are no examples, if examples differ in shape, if `batch_size` is not a positive integer, or
        if the sharding has other axes than that of the examples.

    Example:
      >>> from lifelong_jax import mas_importance
      >>> from lifelong_jax.datasets import open_dataset
      >>> def measure(params, batch, key):
      ...     return mas_importance(lambda params, x: x.ravel() @ params, params, batch.inputs, weights=batch.weights)
      >>> digits = open_dataset("digits")
      >>> mean_over_stream(measure, jnp.ones((64, 10)), digits.train, batch_size=100).shape
      (64, 10)
    """
    _check(source, batch_size, sharding)
    if sharding is not None:
        state, key = onto_mesh(sharding.mesh, (state, key))
    batch_size = min(batch_size, len(source))
    num_batches = -(-len(source) // batch_size)
    batches = tqdm.tqdm(
        stream_batches(source, batch_size, sharding=sharding), "measuring", num_batches, leave=False, disable=None
    )
    total: Any = None
    for number, batch in enumerate(batches):
        batch_key = None if key is None else jax.random.fold_in(key, number)
        if total is None:
            check_places(source=batch, state=state, key=key)
            shapes = jax.eval_shape(mean_fn, state, batch, batch_key)
        params = state.params if isinstance(state, TrainingState) else state
        layout = find_layout(params, (batch, None), state)
        term = _sum_batch(mean_fn, layout, state, batch, batch_key)
        total = jax.block_until_ready(term if total is None else _add(total, term))
    if total is None:
        raise ValueError("source has no example of a weight above 0: there is nothing to measure.")
    summed, weight = total
    return _with_forms(jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), summed), shapes)


@functools.partial(jax.jit, static_argnames=("loss_fn", "optimizer", "shardings"), donate_argnames=("state",))
def _learn_batch(
    loss_fn: LossFn | TrainLossFn,
    optimizer: optax.GradientTransformation,
    consolidation: Consolidation,
    state: TrainingState,
    epoch_key: jax.Array,
    indices: jax.Array,
    batch: Batch,
    *,
    shardings: LoopShardings,
) -> tuple[TrainingState, jax.Array]:
    def learn(
        consolidation: Consolidation, state: TrainingState, epoch_key: jax.Array, indices: jax.Array, batch: Batch
    ) -> tuple[TrainingState, jax.Array]:
        weights: Any = batch.weights
        keys = example_keys(state, epoch_key, indices)
        state, loss = train_step(loss_fn, optimizer, state, consolidation, batch, weights, keys)
        return keep_shardings(state, shardings), loss

    arguments = (consolidation, state, epoch_key, indices, batch)
    return on_automatic_axes(learn, arguments, out=(specs_of(state), PartitionSpec()))


@functools.partial(jax.jit, static_argnames=("mean_fn", "layout"))
def _sum_batch(
    mean_fn: Callable, layout: Layout | None, state: Any, batch: Batch, key: jax.Array | None
) -> tuple[Any, jax.Array]:
    """Returns the sum over a batch, and that of its weights."""
    weight = jnp.sum(batch.weights).astype(float)  # type: ignore[arg-type]  # `stream_batches` fills them in
    with knowing(layout):
        means = _with_factors(mean_fn(state, batch, key))
    return jax.tree.map(lambda m: weight.astype(m.dtype) * m, means), weight


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Any, term: Any) -> Any:
    return jax.tree.map(jnp.add, total, term)


def _with_factors(tree: Any) -> Any:
    """Replaces forms by their factors: sums of eigenvectors, or of codes, would mean nothing."""

    def of_node(node: Any) -> Any:
        return forms.factors_of(node) if isinstance(node, forms.KroneckerFactors) else forms.diagonal(node)

    return forms.tree_map(of_node, tree)


def _with_forms(tree: Any, shapes: Any) -> Any:
    """Makes forms of factors, where `shapes` has forms."""

    def of_node(shape: Any, node: Any) -> Any:
        return forms.from_factors(node[0], node[1], shape.layout) if isinstance(shape, forms.KroneckerFactors) else node

    return forms.tree_map(of_node, shapes, tree)


def _check(source: Source, batch_size: int, sharding: NamedSharding | None) -> None:
    _checks.check_positive_integer("batch_size", batch_size)
    if sharding is not None:
        check_sharding_of_examples(sharding)
    if len(source) == 0:
        raise ValueError("source is empty: at least one example is needed.")


def _refuse(epoch: int, step: int) -> NoReturn:
    raise FloatingPointError(
        f"training diverged in epoch {epoch + 1}, step {step + 1}: lower the learning rate or the strength, or use the "
        f"proximal penalty"
    )
