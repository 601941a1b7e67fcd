"""Importances that are computed after a task: Fisher diagonals, and the sensitivities of memory-aware synapses.

Each importance is a mean over examples of a quantity of one example. This module defines the outputs of each
importance, and the cotangents that are pulled back from them. `structured.py` or `reference.py` computes the sum over
examples.

Each importance is compiled once per function and shapes. As in any `jax.jit`, whatever else the function reads (a
global, an attribute) becomes a constant. So put a value that changes, such as the mask of a head, into the parameters
or the examples, or pass a `jax.tree_util.Partial(function, value)`, whose arrays are arguments.
"""

import functools
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from lifelong_jax import _checks
from lifelong_jax._numerics import scale_weights, varies, vary_with, widen
from lifelong_jax.importance import reference, structured
from lifelong_jax.importance.layers import layer_outputs
from lifelong_jax.importance.microbatches import Reduction
from lifelong_jax.types import Examples, LogitsFn, LossFn, OutputFn, Params

Algorithm: TypeAlias = Literal["structured", "reference"]

_SUMS = {"structured": structured.sum_over_examples, "reference": reference.sum_over_examples}


def empirical_fisher_diagonal(
    loss_fn: LossFn,
    params: Params,
    examples: Examples,
    *,
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
    method: Algorithm = "structured",
) -> Params:
    """Computes the diagonal of the empirical Fisher information: the mean squared gradient at the true labels.

        importance = mean_n (∂ loss_fn(params, examples[n]) / ∂params)²

    Each example's own gradient is squared, not a batch's mean gradient, so the result depends on no batch size. For
    examples that the model predicts well, it is much smaller than `fisher_diagonal`: if the true class has probability
    p, it falls like (1 − p)², and the other like 1 − p.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar`, the negative log-likelihood of one example, without batch axis.
        Pass the same function object in every call: another one is compiled again.
      params: a tree of floating-point arrays.
      examples: a tree of arrays `[num_examples, ...]`, with the labels.
      weights: as for `fisher_diagonal`.
      microbatch_size: as for `fisher_diagonal`.
      method: as for `fisher_diagonal`.

    Returns:
      A tree like `params`, in its dtypes or float32, whichever is wider.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: if there are no examples, if leaves differ in their number, if weights are negative, all 0 or outside
        the range of float32, if the loss is not a scalar, or if `method` is unknown.

    Example:
      >>> loss_fn = lambda params, example: 0.5 * (params * example["x"] - example["y"]) ** 2
      >>> examples = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([0.0, 2.0])}
      >>> empirical_fisher_diagonal(loss_fn, jnp.array(2.0), examples)
      Array(10., dtype=float32)

    Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114; on the two Fishers, Kunstner et al. 2019, arXiv 1905.12558.
    """
    _check(params, "examples", examples, weights, microbatch_size, method)
    return _mean_over_examples(
        _as_tree(loss_fn), _unit_cotangent, params, examples, None, weights, "sum_of_squares", microbatch_size, method
    )


def fisher_diagonal(
    logits_fn: LogitsFn,
    params: Params,
    inputs: Examples,
    *,
    likelihood: Literal["categorical", "gaussian", "bernoulli"] = "categorical",
    num_samples: int | None = None,
    key: jax.Array | None = None,
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
    method: Algorithm = "structured",
) -> Params:
    """Computes the diagonal of the Fisher information: the expected squared gradient at labels from the model itself.

        importance = mean_n E_y (∂ log p(y | logits_fn(params, inputs[n])) / ∂params)²

    The expectation is exact, or a mean over `num_samples` sampled labels per example. `likelihood` names p:

    - "categorical": y is a class, with p = softmax(logits) over the last axis. Leading axes (tokens) are independent
      labels of one example. The exact expectation takes num_labels · (num_classes − 1) backward passes; "structured"
      skips classes that have probability 0 in all examples (those outside of a head, say). A sample takes one pass.
    - "gaussian": y is a vector, normally distributed around the logits with unit variance.
    - "bernoulli": y is a vector of independent binary outputs, with p = sigmoid(logits).

    Args:
      logits_fn: `logits_fn(params, x) -> [..., num_classes]`, for one x without batch axis. Mask classes outside of a
        head here: `jnp.where(mask, logits, jnp.finfo(logits.dtype).min)`. Pass the same function object in every call:
        another one is compiled again.
      params: a tree of floating-point arrays.
      inputs: a tree of arrays `[num_examples, ...]`; no labels.
      likelihood: "categorical", "gaussian" or "bernoulli".
      num_samples: how many labels to sample per example, or None for the exact expectation.
      key: the random key of the samples, which do not depend on the microbatch size.
      weights: `[num_examples]`, not negative; the mean divides by their sum. 0 marks padding, whose gradients must be
        finite too. None weighs all examples equally.
      microbatch_size: the largest number of examples computed together; the result does not depend on it.
      method: "structured" costs about one ordinary gradient per backward pass; "reference" computes each example's
        gradient in full. Both are exact.

    Returns:
      A tree like `params`, in its dtypes or float32, whichever is wider.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: if there are no inputs, if leaves differ in their number, if weights are negative, all 0 or outside
        the range of float32, if `likelihood` or `method` is unknown, or if only one of `num_samples` and `key` is
        given.

    Example:
      >>> logits_fn = lambda params, x: params * x
      >>> fisher_diagonal(logits_fn, jnp.zeros(2), jnp.array([[1.0, 1.0], [2.0, 2.0]])).round(3)
      Array([0.625, 0.625], dtype=float32)

    Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114; Martens 2020, arXiv 1412.1193, §5.
    """
    _checks.check_choice("likelihood", likelihood, tuple(_EXACT))
    _checks.check_positive_integer("num_samples", num_samples, optional=True)
    if (num_samples is None) != (key is None):
        raise ValueError(
            "num_samples and key go together: give both to sample labels, or neither for the exact expectation; "
            f"num_samples is {num_samples} and key is {'not ' if key is not None else ''}None."
        )
    _check(params, "inputs", inputs, weights, microbatch_size, method)
    cotangents_fn = _EXACT[likelihood] if num_samples is None else _sampled(likelihood, num_samples)
    return _mean_over_examples(
        _as_tree(logits_fn), cotangents_fn, params, inputs, key, weights, "sum_of_squares", microbatch_size, method
    )


def mas_importance(
    output_fn: OutputFn,
    params: Params,
    inputs: Examples,
    *,
    output_norm: Literal["squared_l2", "jacobian"] = "squared_l2",
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
    method: Algorithm = "structured",
) -> Params:
    """Computes the importance of memory-aware synapses: how sensitive the outputs are to each parameter.

        importance = mean_n |∂ ‖output_fn(params, inputs[n])‖² / ∂params|              "squared_l2"
        importance = mean_n sqrt(Σ_o (∂ output_fn(params, inputs[n])_o / ∂params)²)    "jacobian"

    The absolute value is taken per example, so opposite examples do not cancel.

    Args:
      output_fn: `output_fn(params, x) -> array` of any shape, for one x without batch axis. Mask outputs outside of a
        head here: `jnp.where(mask, outputs, 0)`. Pass the same function object in every call: another one is
        compiled again.
      params: a tree of floating-point arrays.
      inputs: a tree of arrays `[num_examples, ...]`; no labels.
      output_norm: "squared_l2" takes one backward pass per example, "jacobian" one for each output.
      weights: as for `fisher_diagonal`.
      microbatch_size: as for `fisher_diagonal`.
      method: as for `fisher_diagonal`.

    Returns:
      A tree like `params`, in its dtypes or float32, whichever is wider.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: if there are no inputs, if leaves differ in their number, if weights are negative, all 0 or outside
        the range of float32, or if `output_norm` or `method` is unknown.

    Example:
      >>> mas_importance(lambda params, x: params * x, jnp.array(1.0), jnp.array([1.0, -3.0]))
      Array(10., dtype=float32)

    Aljundi et al. 2018, arXiv 1711.09601, eq. 2 ("jacobian") and §4.1 ("squared_l2").
    """
    _checks.check_choice("output_norm", output_norm, ("squared_l2", "jacobian"))
    _check(params, "inputs", inputs, weights, microbatch_size, method)
    cotangents_fn = _squared_l2_cotangent if output_norm == "squared_l2" else _exact_gaussian
    return _mean_over_examples(
        _as_tree(output_fn), cotangents_fn, params, inputs, None, weights, "norm", microbatch_size, method
    )


def local_mas_importance(
    output_fn: OutputFn,
    params: Params,
    inputs: Examples,
    *,
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
    method: Algorithm = "structured",
) -> Params:
    """Computes local memory-aware synapses: how sensitive each layer's output is to that layer's own parameters.

        importance = mean_n |∂ ‖output of the layer, for inputs[n]‖² / ∂params|,    the layer's input held fixed

    For a dense layer y = relu(x @ w + b), that is 2 · mean_n y_j |x_i| for w_ij, and 2 · mean_n y_j for b_j. If inputs
    are not negative, this is Hebb's rule; the paper omits the factor 2. The importance equals `mas_importance` in the
    last layer, and in every layer whose later layers keep the norm.

    Args:
      output_fn: `output_fn(params, x) -> array` of any shape, for one x without batch axis. It marks the end of each
        layer but the last with `layer_output`. Mask outputs outside of a head here: `jnp.where(mask, outputs, 0)`.
        Pass the same function object in every call: another one is compiled again.
      params: a tree of floating-point arrays.
      inputs: a tree of arrays `[num_examples, ...]`; no labels.
      weights: as for `fisher_diagonal`.
      microbatch_size: as for `fisher_diagonal`.
      method: as for `fisher_diagonal`.

    Returns:
      A tree like `params`, in its dtypes or float32, whichever is wider.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: if `output_fn` marks no layer, or the last one, or one inside of a loop or a branch; if there are no
        inputs, if leaves differ in their number, if weights are negative, all 0 or outside the range of float32, or if
        `method` is unknown.

    Example:
      >>> from lifelong_jax import layer_output
      >>> network = lambda params, x: layer_output(jax.nn.relu(x @ params[0])) @ params[1]
      >>> params = [jnp.array([[1.0, -1.0]]), jnp.array([[2.0], [3.0]])]
      >>> first, _ = local_mas_importance(network, params, jnp.array([[1.0], [3.0]]))
      >>> first  # twice the mean of 1 · 1 and 3 · 3; the second unit is silent
      Array([[10.,  0.]], dtype=float32)

    Aljundi et al. 2018, arXiv 1711.09601, §4.3.
    """
    layers_fn = Partial(layer_outputs, _as_tree(output_fn))
    return mas_importance(layers_fn, params, inputs, weights=weights, microbatch_size=microbatch_size, method=method)


@functools.partial(jax.jit, static_argnums=(1, 6, 7, 8))
def _mean_over_examples(
    output_fn: Partial,
    cotangents_fn: Callable[[jax.Array, jax.Array | None], jax.Array],
    params: Params,
    examples: Examples,
    key: jax.Array | None,
    weights: jax.Array | None,
    reduction: Reduction,
    microbatch_size: int | None,
    method: Algorithm,
) -> Params:
    def keyed_cotangents(key: jax.Array | None, outputs: jax.Array, index: jax.Array) -> jax.Array:
        if not isinstance(outputs, jax.Array) or not jnp.issubdtype(outputs.dtype, jnp.floating):
            returned = jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", outputs)
            raise ValueError(f"the function must return one floating-point array for one example, not {returned}.")
        cotangents = cotangents_fn(outputs, None if key is None else jax.random.fold_in(key, index))
        return vary_with(cotangents, like=outputs)

    arguments = (output_fn, params, examples, key, weights)
    if varies(arguments):  # inside of `jax.shard_map`, where jaxprs of arrays that vary cannot be evaluated again
        method = "reference"
    output_fn, params, examples, key, weights = vary_with(arguments, like=arguments)
    weights = None if weights is None else scale_weights(weights)
    total = _SUMS[method](
        output_fn,
        Partial(keyed_cotangents, key),
        params,
        examples,
        reduction=reduction,
        weights=weights,
        microbatch_size=microbatch_size,
    )
    count = jax.tree.leaves(examples)[0].shape[0] if weights is None else jnp.sum(weights)
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(count, leaf.dtype), total)


def _as_tree(function: Callable) -> Partial:
    # A `Partial` is a tree whose arrays are traced. A plain function becomes part of the tree's structure.
    return function if isinstance(function, Partial) else Partial(function)


# Cotangents: `cotangents_fn(outputs, key) -> [num_cotangents, *outputs.shape]`. For a Fisher diagonal, the sum over
# cotangents of the squared gradients is E_y (∂ log p(y) / ∂params)². Probabilities are computed in float32 at least.


def _unit_cotangent(outputs: jax.Array, key: None) -> jax.Array:
    if outputs.shape != ():
        raise ValueError(f"loss_fn must return a scalar for one example, not an array of shape {outputs.shape}.")
    return jnp.ones((1, *outputs.shape), outputs.dtype)


def _squared_l2_cotangent(outputs: jax.Array, key: None) -> jax.Array:
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


def _exact_gaussian(outputs: jax.Array, key: None) -> jax.Array:
    return jnp.eye(outputs.size, dtype=outputs.dtype).reshape(-1, *outputs.shape)


def _exact_bernoulli(logits: jax.Array, key: None) -> jax.Array:
    wide = widen(logits)
    deviation = jnp.exp((jax.nn.log_sigmoid(wide) + jax.nn.log_sigmoid(-wide)) / 2)  # sqrt(p (1 − p)), not rounded
    return _exact_gaussian(logits, key) * deviation.astype(logits.dtype)


_EXACT = {"categorical": _exact_categorical, "gaussian": _exact_gaussian, "bernoulli": _exact_bernoulli}


@functools.cache  # one function object per setting, so jit compiles once per setting
def _sampled(likelihood: str, num_samples: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
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


def _check(
    params: Params,
    name: str,
    examples: Examples,
    weights: jax.Array | None,
    microbatch_size: int | None,
    method: Algorithm,
) -> None:
    _checks.check_choice("method", method, tuple(_SUMS))
    _checks.check_params("params", params)
    _checks.check_examples(name, examples, weights)
    _checks.check_positive_integer("microbatch_size", microbatch_size, optional=True)
