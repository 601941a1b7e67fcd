"""The cotangents that each importance pulls back: `cotangents_fn(outputs, key) -> Cotangents`, for one example.

For a Fisher information, the sum over cotangents of the gradients' outer products is the expectation over the labels
of the outer product of ∂ log p(label) / ∂params. Probabilities are computed in float32 at least. All cotangents are
differentiable functions of the outputs, so that importances have gradients.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax._numerics import widen

_LOG_OF_ZERO = -1e30  # finite, so that differences are

MAX_PASSES = 4096
"""The largest number of backward passes per example of an exact expectation: they take as long as 4,096 epochs of
training. An image of 64×64 grey pixels as output needs as many, and a text of 64 tokens of 65 characters."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cotangents:
    """The cotangents of one example's outputs. They are made one at a time: all together may not fit the memory.

    Attributes:
      values: a tree of arrays that the cotangents are made from.
      make: `make(values, index)`, a cotangent, an array like the outputs.
      num: the number of cotangents.
      dtype: the dtype of the outputs.
    """

    values: Any
    make: Callable[[Any, jax.Array | int], jax.Array] = dataclasses.field(metadata={"static": True})
    num: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    def at(self, index: jax.Array | int) -> jax.Array:
        """Makes one of the cotangents."""
        return self.make(self.values, index).astype(self.dtype)


def stacked(array: jax.Array) -> Cotangents:
    """Returns the cotangents that are the entries of an array, `[num, *outputs.shape]`."""
    return Cotangents(array, lambda array, index: array[index], array.shape[0], array.dtype)


@functools.cache  # one function object per setting, so jit compiles once per setting
def of_losses(num_samples: int | None) -> Callable[[jax.Array, jax.Array | None], Cotangents]:
    """Makes the cotangents of the losses of an example's labels: of each by itself, or of all, with random signs."""
    # E (Σ_label ε_label g_label)² = Σ_label g_label², because the signs ε are independent, with mean 0 and square 1.
    scale = 1 if num_samples is None else 1 / math.sqrt(num_samples)

    def signed(values: tuple[jax.Array, jax.Array], index: jax.Array | int) -> jax.Array:
        ones, key = values
        key = key if num_samples == 1 else jax.random.fold_in(key, index)
        return scale * jax.random.rademacher(key, ones.shape, ones.dtype) * ones

    def cotangents_fn(losses: jax.Array, key: jax.Array | None) -> Cotangents:
        if losses.size == 1:  # its square does not depend on a sign
            return stacked(jnp.ones((1, *losses.shape), losses.dtype))
        if num_samples is None:
            _check_passes(losses, losses.size, "the empirical Fisher information of each label", _BY_SIGNS)
            return _each_output(losses)
        return Cotangents((jnp.ones_like(losses), key), signed, num_samples, losses.dtype)

    return cotangents_fn


def squared_l2(outputs: jax.Array, key: jax.Array | None) -> Cotangents:
    """Returns the cotangent of ‖outputs‖²."""
    return stacked(2 * outputs[None])


def jacobian(outputs: jax.Array, key: None) -> Cotangents:
    """Returns a cotangent for each output."""
    _check_passes(outputs, outputs.size, "output_norm='jacobian'", "Pass output_norm='squared_l2', which takes one.")
    return _each_output(outputs)


def _exact_categorical(logits: jax.Array, key: None) -> Cotangents:
    _check_has_classes(logits)
    # E_y of the squared gradient of log p_y is Σ_k (∂logitsᵀ v_k)², for any v_k with Σ_k v_k v_kᵀ = diag(p) − p pᵀ, the
    # covariance of the one-hot label. Here the v_k are the columns of its Cholesky factor, which asks one class after
    # the other: is y class k, given that it is none before k? The last column is 0, so there are num_classes − 1
    # cotangents. With several labels, each has its own cotangents: the gradients of independent labels have mean 0 and
    # are uncorrelated, so the expected square of their sum is the sum of their expected squares.
    # Quotients of probabilities are differences of logarithms: neither these nor their derivatives overflow.
    log_p = jnp.maximum(jax.nn.log_softmax(widen(logits)), _LOG_OF_ZERO)
    from_here = jax.lax.cumlogsumexp(log_p, axis=log_p.ndim - 1, reverse=True)
    later = jnp.concatenate([from_here[..., 1:], jnp.full_like(log_p[..., :1], _LOG_OF_ZERO)], axis=-1)
    spread = jnp.exp((log_p - from_here + later) / 2)
    num = math.prod(logits.shape[:-1]) * (logits.shape[-1] - 1)
    _check_passes(logits, num)
    return Cotangents((log_p, spread, later), _cholesky_column, num, logits.dtype)


def _cholesky_column(values: tuple[jax.Array, jax.Array, jax.Array], index: jax.Array | int) -> jax.Array:
    """Returns column k of the factor of one label's covariance, and 0 for all other labels."""
    log_p, spread, later = (array.reshape(-1, array.shape[-1]) for array in values)
    num_labels, num_classes = log_p.shape
    label, k = jnp.divmod(index, num_classes - 1)
    classes = jnp.arange(num_classes, dtype=jnp.int32)
    p_if_later = jnp.exp(jnp.where(classes > k, log_p[label] - later[label, k], _LOG_OF_ZERO))
    column = spread[label, k] * jnp.where(classes == k, 1, -p_if_later)
    is_label = jnp.arange(num_labels, dtype=jnp.int32)[:, None] == label
    return jnp.where(is_label, column[None, :], 0).reshape(values[0].shape)


def _exact_gaussian(outputs: jax.Array, key: None) -> Cotangents:
    _check_passes(outputs, outputs.size)
    return _each_output(outputs)


def _each_output(outputs: jax.Array) -> Cotangents:
    return Cotangents(jnp.ones_like(outputs), _one_output, outputs.size, outputs.dtype)


def _exact_bernoulli(logits: jax.Array, key: None) -> Cotangents:
    _check_passes(logits, logits.size)
    wide = widen(logits)
    deviation = jnp.exp((jax.nn.log_sigmoid(wide) + jax.nn.log_sigmoid(-wide)) / 2)  # sqrt(p (1 − p)), not rounded
    return Cotangents(deviation, _one_output, logits.size, logits.dtype)


def _one_output(values: jax.Array, index: jax.Array | int) -> jax.Array:
    """Returns one of the values, and 0 for all other outputs."""
    return jnp.where(jnp.arange(values.size, dtype=jnp.int32) == index, values.ravel(), 0).reshape(values.shape)


EXACT: dict[str, Callable[..., Cotangents]] = {
    "categorical": _exact_categorical,
    "gaussian": _exact_gaussian,
    "bernoulli": _exact_bernoulli,
}
"""The cotangents of the exact expectation, by likelihood."""


@functools.cache  # one function object per setting, so jit compiles once per setting
def sampled(likelihood: str, num_samples: int) -> Callable[[jax.Array, jax.Array], Cotangents]:
    """Makes the cotangents of labels that are sampled from the model."""
    score_fn, scale = _SCORES[likelihood], math.sqrt(num_samples)

    def score(values: tuple[jax.Array, jax.Array], index: jax.Array | int) -> jax.Array:
        wide, key = values
        return score_fn(wide, key if num_samples == 1 else jax.random.fold_in(key, index)) / scale

    def cotangents_fn(outputs: jax.Array, key: jax.Array) -> Cotangents:
        if likelihood == "categorical":
            _check_has_classes(outputs)
        return Cotangents((widen(outputs), key), score, num_samples, outputs.dtype)

    return cotangents_fn


def _categorical_score(logits: jax.Array, key: jax.Array) -> jax.Array:
    # XLA holds no array of labels × classes but the logits and the result, because no exponential is used twice.
    label = _sample_class(jax.lax.stop_gradient(logits), key)[..., None]
    is_label = jnp.arange(logits.shape[-1], dtype=jnp.int32) == label
    relative = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    others = jnp.sum(jnp.where(is_label, 0, jnp.exp(relative)), axis=-1, keepdims=True)
    total = others + jnp.exp(jnp.take_along_axis(relative, label, axis=-1))
    return jnp.where(is_label, others / total, -jnp.exp(relative - jnp.log(total)))  # 1 − p(label) would round to 0


_MAX_DRAWN = 4096  # a random number for each class of a label takes longer than the logits, for a large vocabulary


def _sample_class(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Samples a class of each label, `logits.shape[:-1]`; of many classes, first a block of them, then one of it."""
    num_classes = logits.shape[-1]
    if num_classes <= _MAX_DRAWN:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    of_block, in_block = jax.random.split(key)
    size = math.isqrt(num_classes)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    whole = num_classes // size * size
    blocks = logits[..., :whole].reshape(*logits.shape[:-1], -1, size)
    blocks = jnp.sum(jnp.exp(blocks - largest[..., None]), axis=-1)
    rest = jnp.sum(jnp.exp(logits[..., whole:] - largest), axis=-1, keepdims=True)  # 0 if there is none
    block = jax.random.categorical(of_block, jnp.log(jnp.concatenate([blocks, rest], axis=-1))).astype(jnp.int32)
    classes = block[..., None] * size + jnp.arange(size, dtype=jnp.int32)
    within = jnp.take_along_axis(logits, classes, axis=-1, mode="fill", fill_value=-jnp.inf)
    drawn = jax.random.categorical(in_block, within).astype(jnp.int32)
    return block * size + drawn


def _gaussian_score(outputs: jax.Array, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, outputs.shape, outputs.dtype)


def _bernoulli_score(logits: jax.Array, key: jax.Array) -> jax.Array:
    p = jax.nn.sigmoid(logits)
    return jnp.where(jax.random.bernoulli(key, p), jax.nn.sigmoid(-logits), -p)


_SCORES = {"categorical": _categorical_score, "gaussian": _gaussian_score, "bernoulli": _bernoulli_score}
"""`score(outputs, key)`: ∂ log p(label) / ∂outputs of a label that is sampled from the model, by likelihood."""


def _check_has_classes(logits: jax.Array) -> None:
    if logits.ndim == 0 or logits.shape[-1] == 1:  # the label of one class is certain: the importance would be 0
        raise ValueError(
            f"logits_fn must return [..., num_classes] for one example, of two classes or more, not {logits.shape}. "
            f"For one logit of a binary label, pass likelihood='bernoulli'."
        )


_BY_SAMPLING = (
    "Pass num_samples=1 and a key (in methods, fisher='sampled'), which takes one; or return only the logits of the "
    "classes that are active, if others are masked."
)

_BY_SIGNS = (
    "Pass num_samples=1 and a key, which gives all labels random signs and takes one; or return the sum of the losses, "
    "whose gradient is squared as a whole."
)


def _check_passes(outputs: jax.Array, num: int, of: str = "the exact Fisher information", instead: str = "") -> None:
    if num > MAX_PASSES:
        raise ValueError(
            f"{of} would take {num:,} backward passes per example, because one example has outputs of shape "
            f"{outputs.shape}; at most {MAX_PASSES:,} are made. {instead or _BY_SAMPLING}"
        )
