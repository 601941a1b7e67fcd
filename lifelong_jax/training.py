"""One task's training loop, pure: a host loop calls it an epoch at a time, and `scan` and `vmap` may run it whole."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks
from lifelong_jax.per_example import relative
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
    """What people look at.

    Attributes:
      loss: `[num_epochs, num_batches]`, the mean loss of each step's batch, without the penalty; 0 behind an epoch's
        last step.
      num_steps: `[num_epochs]`, how many steps each epoch had: as many as it takes to see each example whose weight is
        not 0, unless `max_steps` ended it.
    """

    loss: jax.Array
    num_steps: jax.Array


def init_training(optimizer: optax.GradientTransformation, params: Params, key: jax.Array) -> TrainingState:
    """Makes the state in which a task's training begins, with a fresh optimiser state.

    Args:
      optimizer: any optax transform.
      params: a tree of floating-point arrays. All of the state is a copy: a loop that donates it must not free the
        caller's parameters, which may be an anchor too, nor donate those that an optimiser keeps as well.
      key: a random key, for the shuffling.

    Returns:
      The state.

    Example:
      >>> init_training(optax.sgd(0.1), jnp.zeros(2), jax.random.key(0)).params
      Array([0., 0.], dtype=float32)
    """
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
    """Trains on one task's examples, reshuffled each epoch.

    A step's gradient is that of `Σ_n weights[n] · loss_fn(params, examples[n]) / Σ_n weights[n]` over its batch; the
    optimiser adds the penalty. Each epoch sees each example once; its last batch may be smaller. Padding takes no
    steps: a short task that is padded to a long one's shape is learned in the steps that it has examples for. Two
    calls of an epoch each do what one call of two epochs does.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar`, the loss of one example, without batch axis.
      optimizer: any optax transform. It is called with `anchor` and `importance`, and may hold `add_quadratic_penalty`;
        and with the batch, `loss_fn`, `examples` and `weights`, for `riemannian_walk`.
      state: from `init_training`, or from an earlier call.
      consolidation: what is kept of earlier tasks.
      examples: a tree of arrays `[num_examples, ...]`: this task's training data.
      num_epochs: passes over the examples.
      batch_size: examples per step.
      max_steps: where training ends within these epochs, or None for their end.
      weights: `[num_examples]`, 0 for padding, or None for ones. Only their ratios count.

    Returns:
      The state after the last step, and the losses.

    Raises:
      ValueError: if there are no examples, or leaves disagree on their number, or they are sharded over a mesh's
        explicit axes, or if `num_epochs`, `batch_size` or `max_steps` is not a positive integer, or if the loss is no
        scalar; outside of jit, if weights are negative, all 0, or too large or too small for float32.
      TypeError: if a leaf of the parameters is not floating-point.

    Example:
      >>> from lifelong_jax import init_consolidation
      >>> loss_fn = lambda params, x: (params - x) ** 2
      >>> state = init_training(optax.sgd(0.5), jnp.array(0.0), jax.random.key(0))
      >>> none = init_consolidation(state.params)
      >>> learn_task(loss_fn, optax.sgd(0.5), state, none, jnp.array([2.0, 4.0]), num_epochs=1, batch_size=2)[0].params
      Array(3., dtype=float32)
    """
    _checks.check_examples("examples", examples, weights)
    _checks.check_positive_integer("num_epochs", num_epochs)
    _checks.check_positive_integer("batch_size", batch_size)
    _checks.check_positive_integer("max_steps", max_steps, optional=True)
    _checks.check_params("state.params", state.params)
    examples, weights = jax.tree.map(jnp.asarray, (examples, weights))
    if any(map(_is_sharded, jax.tree.leaves((examples, weights)))):
        raise ValueError(
            "examples or weights are sharded over explicit axes of a mesh, which do not say how a batch is taken from "
            "all shards: make the mesh with axis_types=(jax.sharding.AxisType.Auto,), or put them on each device whole."
        )
    optimizer = optax.with_extra_args_support(optimizer)
    num_examples = jax.tree.leaves(examples)[0].shape[0]
    batch_size = min(batch_size, num_examples)
    num_batches = -(-num_examples // batch_size)
    padded = weights is not None
    num_steps = -(-jnp.sum(weights > 0) // batch_size) if padded else num_batches
    if not padded:
        weights = jnp.ones(num_examples)

    def batch_loss(params: Params, batch: Examples, weights: jax.Array) -> jax.Array:
        losses = jax.vmap(loss_fn, in_axes=(None, 0))(params, batch)
        if losses.ndim != 1:
            raise ValueError(f"loss_fn must return a scalar for one example, not an array of shape {losses.shape[1:]}.")
        weights = relative(weights).astype(losses.dtype)
        return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1)  # 0 where all is padding

    one_batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), (examples, weights))
    loss_dtype = jax.eval_shape(batch_loss, state.params, *one_batch).dtype

    def step(
        index: jax.Array, carry: tuple[Params, optax.OptState, jax.Array], order: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        params, opt_state, losses = carry
        indices = order[index]
        present = jnp.where(indices < num_examples, weights[indices], 0)
        batch = jax.tree.map(lambda x: x[indices], examples)
        loss, grads = jax.value_and_grad(batch_loss)(params, batch, present)
        extra_args = {**consolidation._asdict(), "loss_fn": loss_fn, "examples": batch, "weights": present}
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra_args)
        params = optax.apply_updates(params, _after(grads, updates))
        return params, opt_state, losses.at[index].set(loss)

    def epoch(state: TrainingState, index: jax.Array) -> tuple[TrainingState, tuple[jax.Array, jax.Array]]:
        key, shuffle_key = jax.random.split(state.key)
        order = jax.random.permutation(shuffle_key, num_examples)
        if padded:
            order = order[jnp.argsort(weights[order] == 0, stable=True)]  # padding last, behind the last step
        # The last batch is filled up with an index past the end, which `step` gives weight 0.
        order = jnp.pad(order, (0, num_batches * batch_size - num_examples), constant_values=num_examples)
        steps = num_steps if max_steps is None else jnp.clip(max_steps - index * num_steps, 0, num_steps)
        params, opt_state, losses = jax.lax.fori_loop(
            0,
            steps,
            functools.partial(step, order=order.reshape(num_batches, batch_size)),
            (state.params, state.opt_state, jnp.zeros(num_batches, loss_dtype)),
        )
        return TrainingState(params, opt_state, key), (losses, jnp.asarray(steps))

    state, (losses, num_steps) = jax.lax.scan(epoch, state, jnp.arange(num_epochs))
    return state, TrainingInfo(losses, num_steps)


def _after(grads: Params, updates: Params) -> Params:
    """Has every update wait for the gradients of biases and scales, on a CPU.

    These are sums of cotangents: where they are known, the backward pass has read all parameters. Otherwise, XLA takes
    it that a parameter may be updated before it is read, and copies it in each step. It drops optimization barriers too
    early to keep it from that, but it does not know that what is added here is 0.
    """
    vectors = [leaf for leaf in jax.tree.leaves(grads) if leaf.ndim == 1 and leaf.size and not _is_sharded(leaf)]
    if jax.default_backend() != "cpu" or not vectors:
        return updates
    impossible = functools.reduce(jnp.logical_or, [(leaf[0] > 0) & (leaf[0] < 0) for leaf in vectors])
    return jax.tree.map(lambda leaf: leaf + impossible.astype(leaf.dtype), updates)


def _is_sharded(array: jax.Array) -> bool:
    """Says whether an array's type says so: a mesh with explicit axes does not let an entry be taken."""
    return any(jax.typeof(array).sharding.spec)
