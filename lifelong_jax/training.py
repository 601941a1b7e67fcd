"""One task's training loop, a pure function: call it epoch by epoch, or under `jit`, `scan` and `vmap` as a whole."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from lifelong_jax import _checks
from lifelong_jax._batch_axis import BATCH_AXIS, weigh_means
from lifelong_jax._meshes import check_places, on_automatic_axes
from lifelong_jax._numerics import scale_weights, update_after_reads, vary_with, widen, with_extra_args
from lifelong_jax._processes import copy_arrays
from lifelong_jax._split_batches import (
    LoopShardings,
    find_shardings,
    keep_shardings,
    make_whole,
    round_up,
    specs_of,
    take_split,
)
from lifelong_jax.types import Consolidation, Examples, LossFn, ModelState, Params, TrainLossFn


class TrainingState(NamedTuple):
    """What the next epoch needs.

    Attributes:
      params: a tree of floating-point arrays.
      opt_state: the optimiser's state.
      key: the random key of the shuffling, and of the network's own randomness.
      model_state: what the network updates as it is trained, without gradients; () if it only needs a key, and None for
        a network that is trained as it predicts.
    """

    params: Params
    opt_state: optax.OptState
    key: jax.Array
    model_state: ModelState = None


class TrainingInfo(NamedTuple):
    """What is reported of the training.

    Attributes:
      loss: `[num_epochs, num_batches]`, the mean loss of each step's batch, without the penalty; 0 after an epoch's
        last step.
      num_steps: `[num_epochs]`, the number of steps of each epoch: enough to see every example whose weight is not 0,
        unless `max_steps` ended it.
    """

    loss: jax.Array
    num_steps: jax.Array


def init_training(
    optimizer: optax.GradientTransformation, params: Params, key: jax.Array, model_state: ModelState = None
) -> TrainingState:
    """Makes the state before a task's first step, with a fresh optimiser state.

    Args:
      optimizer: any optax transform.
      params: a tree of floating-point arrays.
      key: the random key of the shuffling, and of the network's own randomness.
      model_state: what the network updates as it is trained: running averages, say. () if it only needs a key, for
        dropout. None for a loss without state and key; see `learn_task`.

    Returns:
      The state. All of it is a copy, so that a loop may donate it: `params` may also be an anchor, and some optimisers
      keep them in their state.

    Raises:
      TypeError: if a leaf of `params` is not a floating-point array.

    Example:
      >>> import optax
      >>> init_training(optax.sgd(0.1), jnp.zeros(2), jax.random.key(0)).params
      Array([0., 0.], dtype=float32)
    """
    _checks.check_params("params", params)
    state = TrainingState(params, optimizer.init(params), key, model_state)
    return copy_arrays(state)


def learn_task(
    loss_fn: LossFn | TrainLossFn,
    optimizer: optax.GradientTransformation,
    state: TrainingState,
    consolidation: Consolidation,
    examples: Examples,
    *,
    num_epochs: int,
    batch_size: int,
    max_steps: int | None = None,
    weights: jax.Array | None = None,
) -> tuple[TrainingState, TrainingInfo]:
    """Trains on one task's examples, shuffled in each epoch.

    A step follows the gradient of `Σ_n weights[n] · loss_fn(params, examples[n]) / Σ_n weights[n]` over its batch; the
    optimiser adds the penalty. Each epoch sees each example once; its last batch may be smaller. Padding takes no
    steps: a small task that is padded to a larger shape is learned in as many steps as without padding. Two calls of
    one epoch do the same as one call of two epochs.

    Where the examples are sharded along their leading axis over a mesh, each batch is split over its devices, and the
    numbers stay the same up to rounding. The state keeps its shardings. Inside of a jit of yours, only types say where
    examples are: there, make the axes of the mesh explicit. On automatic axes, each device computes the whole batch.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar`, the loss of one example, without batch axis. If `state` has a model
        state, `loss_fn(params, model_state, example, key) -> (scalar, model_state)`; see `types.TrainLossFn`.
      optimizer: any optax transform. Its `update` gets `anchor` and `importance`, for `add_quadratic_penalty`;
        `loss_fn`, `examples` and `weights` of the batch, for `riemannian_walk`; and `value`, `grad` and `value_fn` of
        the batch's loss without the penalty, for `optax.contrib.reduce_on_plateau` and line searches.
      state: from `init_training`, or from an earlier call.
      consolidation: what is kept of earlier tasks.
      examples: a tree of arrays `[num_examples, ...]`: this task's training data.
      num_epochs: the number of passes over the examples.
      batch_size: the number of examples per step.
      max_steps: the step after which training ends within these epochs, or None for the last epoch's end.
      weights: `[num_examples]`, 0 for padding, or None for ones. Only their ratios count.

    Returns:
      The state after the last step, and the losses.

    Raises:
      ValueError: if there are no examples, leaves differ in their number, `num_epochs`, `batch_size` or `max_steps` is
        not a positive integer, or the loss is not a scalar; outside of jit, if weights are negative, all 0, or too
        large or too small for float32.
      TypeError: if a leaf of the parameters is not floating-point.

    Example:
      >>> import optax
      >>> from lifelong_jax import init_consolidation, init_training
      >>> optimizer, loss_fn = optax.sgd(0.5), lambda params, x: (params - x) ** 2
      >>> state = init_training(optimizer, jnp.array(0.0), jax.random.key(0))
      >>> none = init_consolidation(state.params)
      >>> learn_task(loss_fn, optimizer, state, none, jnp.array([2.0, 4.0]), num_epochs=1, batch_size=2)[0].params
      Array(3., dtype=float32)
    """
    _checks.check_examples("examples", examples, weights)
    _checks.check_positive_integer("num_epochs", num_epochs)
    _checks.check_positive_integer("batch_size", batch_size)
    _checks.check_positive_integer("max_steps", max_steps, optional=True)
    _checks.check_params("state.params", state.params)
    check_places(state=state, consolidation=consolidation, examples=examples, weights=weights)
    examples, weights = jax.tree.map(jnp.asarray, (examples, weights))
    learn = functools.partial(
        _learn_split_batches,
        loss_fn,
        optimizer,
        num_epochs=num_epochs,
        batch_size=batch_size,
        max_steps=max_steps,
        shardings=find_shardings(state, (examples, weights)),
    )
    arguments = (state, consolidation, examples, weights)
    return on_automatic_axes(learn, arguments, out=(specs_of(state), PartitionSpec()))


def _learn_split_batches(
    loss_fn: LossFn | TrainLossFn,
    optimizer: optax.GradientTransformation,
    state: TrainingState,
    consolidation: Consolidation,
    examples: Examples,
    weights: jax.Array | None,
    *,
    num_epochs: int,
    batch_size: int,
    max_steps: int | None,
    shardings: LoopShardings,
) -> tuple[TrainingState, TrainingInfo]:
    """Trains as `learn_task` does, on automatic axes, for loops whose jit hides where arrays are."""
    check_loss(loss_fn, state, "examples", examples)
    num_examples = jax.tree.leaves(examples)[0].shape[0]
    batch_size = min(batch_size, num_examples)
    num_batches = -(-num_examples // batch_size)
    excess = round_up(batch_size, shardings.batch) - batch_size
    weights = make_whole(weights, shardings.batch)
    num_steps = num_batches if weights is None else -(-jnp.sum(weights > 0) // batch_size)
    step = _make_step(loss_fn, optimizer, consolidation, examples, weights, shardings)
    loss_dtype = _dtype_of_loss(loss_fn, state, examples)
    # Inside of a `jax.shard_map`, each shard trains a state of its own.
    params, opt_state, model_state = vary_with((state.params, state.opt_state, state.model_state), (examples, weights))
    state = TrainingState(params, opt_state, state.key, model_state)

    def epoch(state: TrainingState, index: jax.Array) -> tuple[TrainingState, tuple[jax.Array, jax.Array]]:
        key, epoch_key = jax.random.split(state.key)
        order = _shuffled(epoch_key, num_examples, weights)
        # The last batch is padded with an index past the end, which gets weight 0 in `step`. So is each batch that
        # cannot be split into equal parts.
        order = jnp.pad(order, (0, num_batches * batch_size - num_examples), constant_values=num_examples)
        order = jnp.pad(order.reshape(num_batches, batch_size), ((0, 0), (0, excess)), constant_values=num_examples)
        order = make_whole(order, shardings.batch)
        steps = num_steps if max_steps is None else jnp.clip(max_steps - index * num_steps, 0, num_steps)
        carry = (
            state._replace(key=key),
            vary_with(jnp.zeros(num_batches, loss_dtype), (state.params, examples, weights)),
        )
        take = functools.partial(step, order, epoch_key)
        state, losses = jax.lax.fori_loop(0, steps, take, carry)
        return state, (losses, jnp.asarray(steps))

    state, (losses, num_steps) = jax.lax.scan(epoch, state, jnp.arange(num_epochs))
    return keep_shardings(state, shardings), TrainingInfo(losses, num_steps)


def check_loss(loss_fn: LossFn | TrainLossFn, state: TrainingState, name: str, examples: Examples) -> None:
    """Raises an error that names the argument unless the examples' labels are what a loss of `losses` takes."""
    _checks.check_labels(_as_predicting(loss_fn, state.model_state), name, state.params, examples)


def train_step(
    loss_fn: LossFn | TrainLossFn,
    optimizer: optax.GradientTransformation,
    state: TrainingState,
    consolidation: Consolidation,
    batch: Examples,
    weights: jax.Array,
    keys: jax.Array | None,
) -> tuple[TrainingState, jax.Array]:
    """Takes one step; returns the state, whose key is left as it is, and the loss.

    Args:
      loss_fn: as for `learn_task`.
      optimizer: as for `learn_task`.
      state: the state before the step.
      consolidation: what is kept of earlier tasks.
      batch: a tree of arrays `[batch_size, ...]`.
      weights: `[batch_size]`, 0 for padding.
      keys: `[batch_size]`, the examples' random keys, from `example_keys`.

    Returns:
      The state after the step, and the mean loss of the batch.
    """
    params, model_state = state.params, state.model_state

    def mean_loss(params: Params) -> tuple[jax.Array, ModelState]:
        return _mean_loss(loss_fn, params, model_state, batch, weights, keys)

    # Line searches of optax refuse arguments of `update` that this function does not name.
    def value_fn(
        params: Params, *, anchor: Any, importance: Any, loss_fn: Any, examples: Any, weights: Any
    ) -> jax.Array:
        return mean_loss(params)[0]

    (loss, new_model_state), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
    extra_args = {
        **consolidation._asdict(),
        "loss_fn": _as_predicting(loss_fn, model_state),
        "examples": batch,
        "weights": weights,
        "value": loss,
        "grad": grads,
        "value_fn": value_fn,
    }
    updates, opt_state = with_extra_args(optimizer).update(grads, state.opt_state, params, **extra_args)
    params = optax.apply_updates(params, update_after_reads(updates, grads))
    return state._replace(params=params, opt_state=opt_state, model_state=new_model_state), loss


def example_keys(state: TrainingState, epoch_key: jax.Array, indices: jax.Array) -> jax.Array | None:
    """Makes the random key of each example in an epoch, by its number: it does not depend on the batch.

    Args:
      state: the training state; without a model state, no keys are needed.
      epoch_key: the key that the epoch's shuffling is drawn with.
      indices: `[batch_size]`, the numbers of the examples.

    Returns:
      `[batch_size]`, keys, or None.
    """
    if state.model_state is None:
        return None
    base = jax.random.fold_in(epoch_key, 1)  # so that no key is that of the shuffling
    return jax.vmap(functools.partial(jax.random.fold_in, base))(indices)


_Carry: TypeAlias = tuple[TrainingState, jax.Array]


def _make_step(
    loss_fn: LossFn | TrainLossFn,
    optimizer: optax.GradientTransformation,
    consolidation: Consolidation,
    examples: Examples,
    weights: jax.Array | None,
    shardings: LoopShardings,
) -> Callable[[jax.Array, jax.Array, jax.Array, _Carry], _Carry]:
    num_examples = jax.tree.leaves(examples)[0].shape[0]
    weights = jnp.ones(num_examples) if weights is None else weights

    def step(order: jax.Array, epoch_key: jax.Array, index: jax.Array, carry: _Carry) -> _Carry:
        state, losses = carry
        indices = make_whole(order[index], shardings.batch)
        batch_weights = make_whole(jnp.where(indices < num_examples, weights[indices], 0), shardings.batch)
        # Padding may be NaN: in its place stands the batch's first example, which is never padding.
        indices = jnp.where(batch_weights > 0, indices, indices[0])
        batch = take_split(examples, indices, shardings.batch)
        keys = example_keys(state, epoch_key, indices)
        state, loss = train_step(loss_fn, optimizer, state, consolidation, batch, batch_weights, keys)
        return keep_shardings(state, shardings), losses.at[index].set(loss)

    return step


def _mean_loss(
    loss_fn: Callable[..., Any],
    params: Params,
    model_state: ModelState,
    batch: Examples,
    weights: jax.Array,
    keys: jax.Array | None,
) -> tuple[jax.Array, ModelState]:
    """Computes the mean loss of a batch, weighted, and the next model state."""
    weights = scale_weights(weights)
    if model_state is None:
        losses = jax.vmap(loss_fn, in_axes=(None, 0))(params, batch)
    else:
        losses, model_state = _losses_and_state(loss_fn, params, model_state, batch, weights, keys)
    if losses.ndim != 1:
        raise ValueError(f"loss_fn must return a scalar for one example, not an array of shape {losses.shape[1:]}.")
    losses = widen(losses)  # a sum in float16 overflows
    weights = weights.astype(losses.dtype)
    return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1), model_state  # 0 for padding alone


def _losses_and_state(
    loss_fn: Callable[..., Any],
    params: Params,
    model_state: ModelState,
    batch: Examples,
    weights: jax.Array,
    keys: jax.Array | None,
) -> tuple[jax.Array, ModelState]:
    def of_example(example: Any, key: jax.Array | None, weight: jax.Array) -> tuple[jax.Array, ModelState]:
        return weigh_means(loss_fn, weight, params, model_state, example, key)

    try:
        return jax.vmap(of_example, out_axes=(0, None), axis_name=BATCH_AXIS)(batch, keys, weights)
    except ValueError as error:
        error.add_note(
            f"The model state that loss_fn returns must be the same for all examples of a batch: give batch "
            f"normalisation axis_name={BATCH_AXIS!r}, or take jax.lax.pmean(x, {BATCH_AXIS!r})."
        )
        raise


def _as_predicting(loss_fn: Any, model_state: ModelState) -> LossFn:
    """Returns the loss of the network as it predicts, which importances are of."""
    if model_state is None:
        return loss_fn
    if hasattr(loss_fn, "as_predicting"):
        return loss_fn.as_predicting(model_state)

    def refuse(params: Params, example: Any) -> jax.Array:
        raise ValueError(
            "the optimiser needs the loss of the network as it predicts, which loss_fn does not say: make loss_fn by "
            "losses.TrainLoss(objective, train_fn, apply_fn)."
        )

    return refuse


def _dtype_of_loss(loss_fn: LossFn | TrainLossFn, state: TrainingState, examples: Examples) -> np.dtype:
    """Traces the loss of one example, to fail early and with what it was called with."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), examples)
    keys = jax.eval_shape(example_keys, state, state.key, jax.ShapeDtypeStruct((1,), jnp.int32))
    weight = jax.ShapeDtypeStruct((1,), jnp.float32)
    mean_loss = functools.partial(_mean_loss, loss_fn)
    with _checks.for_one_example("loss_fn", _checks.first_example(examples)):
        loss, model_state = jax.eval_shape(mean_loss, state.params, state.model_state, one, weight, keys)
    _checks.check_same_structure("the returned model state", model_state, "state.model_state", state.model_state)
    return loss.dtype


def _shuffled(key: jax.Array, num_examples: int, weights: jax.Array | None) -> jax.Array:
    order = jax.random.permutation(key, num_examples)
    if weights is None:
        return order
    return order[jnp.argsort(weights[order] == 0, stable=True)]  # padding last, after the last step
