"""The cotangents that each importance pulls back: `cotangents_fn(outputs, key) -> [num_cotangents, *outputs.shape]`.

For a Fisher information, the sum over cotangents of the gradients' outer products is the expectation over the labels
of the outer product of ∂ log p(label) / ∂params. Probabilities are computed in float32 at least.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lifelong_jax._numerics import widen


def unit(outputs: jax.Array, key: None) -> jax.Array:
    """Returns the cotangent of a loss: 1."""
    if outputs.shape != ():
        raise ValueError(f"loss_fn must return a scalar for one example, not an array of shape {outputs.shape}.")
    return jnp.ones((1, *outputs.shape), outputs.dtype)


def squared_l2(outputs: jax.Array, key: None) -> jax.Array:
    """Returns the cotangent of ‖outputs‖²."""
    return 2 * outputs[None]


def _exact_categorical(logits: jax.Array, key: None) -> jax.Array:
    _check_has_classes(logits)
    # E_y of the squared gradient of log p_y is Σ_k (∂logitsᵀ v_k)², for any v_k with Σ_k v_k v_kᵀ = diag(p) − p pᵀ, the
    # covariance of the one-hot label. Here the v_k are the columns of its Cholesky factor, which asks one class after
    # the other: is y class k, given that it is none before k? The last column is 0, so there are num_classes − 1
    # cotangents. With several labels, each has its own cotangents: the gradients of independent labels have mean 0 and
    # are uncorrelated, so the expected square of their sum is the sum of their expected squares.
    p = jax.nn.softmax(widen(logits))
    num_classes, smallest = p.shape[-1], jnp.finfo(p.dtype).tiny  # a sum below this is 0 here, and so is p
    from_here = jax.lax.cumsum(p, axis=p.ndim - 1, reverse=True)
    later = jnp.concatenate([from_here[..., 1:], jnp.zeros_like(p[..., :1])], axis=-1)
    spread = jnp.sqrt(p / jnp.maximum(from_here, smallest) * later)
    p_if_later = jnp.triu(p[..., None, :] / jnp.maximum(later, smallest)[..., None], 1)
    factor = spread[..., None] * (jnp.eye(num_classes, dtype=p.dtype) - p_if_later)  # [..., k, num_classes]
    factor = factor[..., : max(1, num_classes - 1), :]
    num_labels = p[..., 0].size
    one_label = jnp.eye(num_labels, dtype=p.dtype).reshape(num_labels, 1, *logits.shape[:-1], 1)
    return (one_label * jnp.moveaxis(factor, -2, 0)).reshape(-1, *logits.shape).astype(logits.dtype)


def each_output(outputs: jax.Array, key: None) -> jax.Array:
    """Returns a cotangent for each output, which also are those of a Gaussian with unit variance."""
    return jnp.eye(outputs.size, dtype=outputs.dtype).reshape(-1, *outputs.shape)


def _exact_bernoulli(logits: jax.Array, key: None) -> jax.Array:
    wide = widen(logits)
    deviation = jnp.exp((jax.nn.log_sigmoid(wide) + jax.nn.log_sigmoid(-wide)) / 2)  # sqrt(p (1 − p)), not rounded
    return each_output(logits, key) * deviation.astype(logits.dtype)


EXACT: dict[str, Callable[..., jax.Array]] = {
    "categorical": _exact_categorical,
    "gaussian": each_output,
    "bernoulli": _exact_bernoulli,
}
"""The cotangents of the exact expectation, by likelihood."""


@functools.cache  # one function object per setting, so jit compiles once per setting
def sampled(likelihood: str, num_samples: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Makes the cotangents of labels that are sampled from the model."""

    def cotangents_fn(outputs: jax.Array, key: jax.Array) -> jax.Array:
        wide = widen(outputs)
        if likelihood == "categorical":
            _check_has_classes(wide)
            labels = jax.random.categorical(key, wide, shape=(num_samples, *wide.shape[:-1]))
            is_label = jax.nn.one_hot(labels, wide.shape[-1], dtype=wide.dtype)
            others = (1 - is_label) * jax.nn.softmax(wide)
            score = is_label * jnp.sum(others, axis=-1, keepdims=True) - others  # 1 − p(label) would round to 0
        elif likelihood == "gaussian":
            score = jax.random.normal(key, (num_samples, *wide.shape), wide.dtype)
        else:
            labels = jax.random.bernoulli(key, jax.nn.sigmoid(wide), (num_samples, *wide.shape))
            score = jnp.where(labels, jax.nn.sigmoid(-wide), -jax.nn.sigmoid(wide))
        return (score / jnp.sqrt(jnp.asarray(num_samples, wide.dtype))).astype(outputs.dtype)

    return cotangents_fn


def _check_has_classes(logits: jax.Array) -> None:
    if logits.ndim == 0:
        raise ValueError("logits_fn must return [..., num_classes] for one example, not a scalar.")
