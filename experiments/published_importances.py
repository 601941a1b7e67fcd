"""The importances of published sources, as their code computes them, where they differ from this library's.

Each function has the signature `importance_fn(apply_fn, objective, state, batch, key)` of a method, or makes such a
function.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lifelong_jax import Batch, TrainingState, empirical_fisher_diagonal, methods
from lifelong_jax.losses import cross_entropy
from lifelong_jax.objectives import Objective
from lifelong_jax.scenarios import mask_logits, mask_outputs
from lifelong_jax.types import OutputFn, Params


def fisher_at_prediction(
    apply_fn: OutputFn, objective: Objective, state: TrainingState, batch: Batch, key: jax.Array
) -> Params:
    """Computes mean_n g_n², with g_n the gradient of −log p at the label that the model predicts."""

    def predict(x: jax.Array, class_mask: jax.Array | None) -> jax.Array:
        return jnp.argmax(mask_logits(apply_fn(state.params, x), class_mask), axis=-1)

    labels = jax.lax.map(lambda x: predict(*x), (batch.inputs, batch.class_mask), batch_size=512)
    predicted = batch._replace(labels=labels.astype(batch.labels.dtype))
    return empirical_fisher_diagonal(cross_entropy(apply_fn), state.params, predicted, weights=batch.weights)


def fisher_of_500(
    apply_fn: OutputFn, objective: Objective, state: TrainingState, batch: Batch, key: jax.Array
) -> Params:
    """Computes the exact Fisher diagonal on 500 random examples."""
    order = jax.random.permutation(key, len(batch.labels))
    chosen = order[jnp.argsort(batch.weights[order] == 0, stable=True)][:500]
    return methods.ewc("exact").importance_fn(apply_fn, objective, state, jax.tree.map(lambda x: x[chosen], batch), key)


def mean_over_batches(
    of_gradient: Callable[[jax.Array], jax.Array],
    loss_fn: Callable[[Params, Batch], jax.Array],
    params: Params,
    batch: Batch,
    key: jax.Array,
    batch_size: int,
) -> Params:
    """Computes the mean of `of_gradient(gradient of the batch's loss)` over shuffled batches.

    Some sources use this in place of a mean over examples. It depends on the batch size.
    """
    num_batches = -(-len(batch.labels) // batch_size)
    order = jax.random.permutation(key, len(batch.labels))
    order = order[jnp.argsort(batch.weights[order] == 0, stable=True)]  # padding last
    order = jnp.pad(order, (0, num_batches * batch_size - len(order)), constant_values=len(order))

    def add(total: tuple[Params, jax.Array], chosen: jax.Array) -> tuple[tuple[Params, jax.Array], None]:
        part = jax.tree.map(lambda x: x[chosen], batch)
        part = part._replace(weights=jnp.where(chosen < len(batch.labels), part.weights, 0))
        gradient = jax.grad(loss_fn)(params, part)
        summed, count = total
        return (
            jax.tree.map(lambda a, g: a + of_gradient(g), summed, gradient),
            count + part.weights.any().astype(count.dtype),
        ), None

    start = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    total, count = jax.lax.scan(add, start, order.reshape(num_batches, batch_size))[0]
    return jax.tree.map(lambda x: x / count, total)


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Computes the mean over a batch's examples, without padding."""
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1)


def squared_batch_gradient(
    apply_fn: OutputFn, objective: Objective, state: TrainingState, batch: Batch, key: jax.Array
) -> Params:
    """Computes the mean of the squared gradients of batches of 128. This is not the Fisher diagonal."""

    def loss_fn(params: Params, part: Batch) -> jax.Array:
        losses = jax.vmap(cross_entropy(apply_fn), in_axes=(None, 0))(params, part)
        return weighted_mean(losses, part.weights)

    return mean_over_batches(jnp.square, loss_fn, state.params, batch, key, batch_size=128)


def mas_of_batches(batch_size: int, over_outputs: Callable[[jax.Array, jax.Array | None], jax.Array]) -> Callable:
    """Makes MAS with absolute gradients of batches; `over_outputs(squares, class_mask)` reduces the outputs."""

    def importance_fn(
        apply_fn: OutputFn, objective: Objective, state: TrainingState, batch: Batch, key: jax.Array
    ) -> Params:
        def loss_fn(params: Params, part: Batch) -> jax.Array:
            def squares(x: jax.Array, class_mask: jax.Array | None) -> jax.Array:
                return over_outputs(jnp.square(mask_outputs(apply_fn(params, x), class_mask)), class_mask)

            return weighted_mean(jax.vmap(squares)(part.inputs, part.class_mask), part.weights)

        return mean_over_batches(jnp.abs, loss_fn, state.params, batch, key, batch_size)

    return importance_fn


def mean_of_active(squares: jax.Array, class_mask: jax.Array | None) -> jax.Array:
    """Averages over the active outputs."""
    return jnp.mean(squares) if class_mask is None else jnp.sum(squares) / jnp.sum(class_mask, dtype=squares.dtype)


def sum_of_all(squares: jax.Array, class_mask: jax.Array | None) -> jax.Array:
    """Sums over the outputs. Inactive ones are 0."""
    return jnp.sum(squares)


def scaled_mas(apply_fn: OutputFn, objective: Objective, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    """Computes MAS on batches of 10, scaled so that the smallest importance is 0 and the largest is 1."""
    importance = mas_of_batches(10, sum_of_all)(apply_fn, objective, state, batch, key)
    leaves = jax.tree.leaves(importance)
    least, largest = (jnp.stack([f(leaf) for leaf in leaves]) for f in (jnp.min, jnp.max))
    least, largest = least.min(), largest.max()
    return jax.tree.map(lambda x: (x - least) / (largest - least), importance)


def unclipped_si(damping: float) -> Callable:
    """Makes Synaptic Intelligence's importance, path / (distance² + damping), without clipping it at 0."""

    def importance_fn(
        apply_fn: OutputFn, objective: Objective, state: TrainingState, batch: Batch, key: jax.Array
    ) -> Params:
        walked = state.opt_state
        return jax.tree.map(
            lambda w, old, new: w / (jnp.square(new - old) + damping), walked.path, walked.start, state.params
        )

    return importance_fn
