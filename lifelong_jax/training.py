"""One task's training loop, a pure function: call it epoch by epoch, or under `jit`, `scan` and `vmap` as a whole."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks
from lifelong_jax._numerics import is_sharded, scale_weights, update_after_reads, widen, with_extra_args
from lifelong_jax.types import Consolidation, Examples, LossFn, Params


class TrainingState(NamedTuple):
    """What the next epoch needs.

    Attributes:
      params: a tree of floating-point arrays.
      opt_state: the optimiser's state.
      key: the random key of the shuffling.
    """

    params: Params
    opt_state: optax.OptState
    key: jax.Array


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


def init_training(optimizer: optax.GradientTransformation, params: Params, key: jax.Array) -> TrainingState:
    """Makes the state before a task's first step, with a fresh optimiser state.

    Args:
      optimizer: any optax transform.
      params: a tree of floating-point arrays.
      key: the random key of the shuffling.

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
    state = TrainingState(params, optimizer.init(params), key)
    return jax.device_put(state, may_alias=False)  # unlike jnp.copy, it has nothing to compile


def learn_task(
    loss_fn: LossFn,
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

    Args:
      loss_fn: `loss_fn(params, example) -> scalar`, the loss of one example, without batch axis.
      optimizer: any optax transform. Its `update` gets `anchor` and `importance`, for `add_quadratic_penalty`, and
        `loss_fn`, `examples` and `weights` of the batch, for `riemannian_walk`.
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
      ValueError: if there are no examples, leaves differ in their number or are sharded over a mesh's explicit axes,
        `num_epochs`, `batch_size` or `max_steps` is not a positive integer, or the loss is not a scalar; outside of
        jit, if weights are negative, all 0, or too large or too small for float32.
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
    examples, weights = jax.tree.map(jnp.asarray, (examples, weights))
    if any(map(is_sharded, jax.tree.leaves((examples, weights)))):
        raise ValueError(
            "examples or weights are sharded over explicit axes of a mesh, which leave open how to gather a batch: "
            "make the mesh with axis_types=(jax.sharding.AxisType.Auto,), or replicate them."
        )
    num_examples = jax.tree.leaves(examples)[0].shape[0]
    batch_size = min(batch_size, num_examples)
    num_batches = -(-num_examples // batch_size)
    num_steps = num_batches if weights is None else -(-jnp.sum(weights > 0) // batch_size)
    step = _make_step(loss_fn, optimizer, consolidation, examples, weights)
    one_batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), examples)
    one_weight = jax.ShapeDtypeStruct((batch_size,), jnp.result_type(float) if weights is None else weights.dtype)
    with _checks.for_one_example("loss_fn", _checks.first_example(examples)):
        loss_dtype = jax.eval_shape(functools.partial(_mean_loss, loss_fn), state.params, one_batch, one_weight).dtype

    def epoch(state: TrainingState, index: jax.Array) -> tuple[TrainingState, tuple[jax.Array, jax.Array]]:
        key, shuffle_key = jax.random.split(state.key)
        order = _shuffled(shuffle_key, num_examples, weights)
        # The last batch is padded with an index past the end, which gets weight 0 in `step`.
        order = jnp.pad(order, (0, num_batches * batch_size - num_examples), constant_values=num_examples)
        steps = num_steps if max_steps is None else jnp.clip(max_steps - index * num_steps, 0, num_steps)
        params, opt_state, losses = jax.lax.fori_loop(
            0,
            steps,
            functools.partial(step, order=order.reshape(num_batches, batch_size)),  # type: ignore[call-arg]
            (state.params, state.opt_state, jnp.zeros(num_batches, loss_dtype)),
        )
        return TrainingState(params, opt_state, key), (losses, jnp.asarray(steps))

    state, (losses, num_steps) = jax.lax.scan(epoch, state, jnp.arange(num_epochs))
    return state, TrainingInfo(losses, num_steps)


_Carry: TypeAlias = tuple[Params, optax.OptState, jax.Array]


def _make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    consolidation: Consolidation,
    examples: Examples,
    weights: jax.Array | None,
) -> Callable[[jax.Array, _Carry, jax.Array], _Carry]:
    optimizer = with_extra_args(optimizer)
    num_examples = jax.tree.leaves(examples)[0].shape[0]
    weights = jnp.ones(num_examples) if weights is None else weights
    loss_and_grads = jax.value_and_grad(functools.partial(_mean_loss, loss_fn))

    def step(index: jax.Array, carry: _Carry, order: jax.Array) -> _Carry:
        params, opt_state, losses = carry
        indices = order[index]
        batch_weights = jnp.where(indices < num_examples, weights[indices], 0)
        # Padding may be NaN: in its place stands the batch's first example, which is never padding.
        indices = jnp.where(batch_weights > 0, indices, indices[0])
        batch = jax.tree.map(lambda x: x[indices], examples)
        loss, grads = loss_and_grads(params, batch, batch_weights)
        extra_args = {**consolidation._asdict(), "loss_fn": loss_fn, "examples": batch, "weights": batch_weights}
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra_args)
        params = optax.apply_updates(params, update_after_reads(updates, grads))
        return params, opt_state, losses.at[index].set(loss)

    return step


def _mean_loss(loss_fn: LossFn, params: Params, batch: Examples, weights: jax.Array) -> jax.Array:
    losses = jax.vmap(loss_fn, in_axes=(None, 0))(params, batch)
    if losses.ndim != 1:
        raise ValueError(f"loss_fn must return a scalar for one example, not an array of shape {losses.shape[1:]}.")
    losses = widen(losses)  # a sum in float16 overflows
    weights = scale_weights(weights).astype(losses.dtype)
    return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1)  # 0 for padding alone


def _shuffled(key: jax.Array, num_examples: int, weights: jax.Array | None) -> jax.Array:
    order = jax.random.permutation(key, num_examples)
    if weights is None:
        return order
    return order[jnp.argsort(weights[order] == 0, stable=True)]  # padding last, after the last step
