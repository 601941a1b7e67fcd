"""Kronecker-factored importances: the Fisher information of each layer, with the correlations of its parameters."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from lifelong_jax import _checks, forms
from lifelong_jax._numerics import refuse_to_differentiate
from lifelong_jax.importance import factor_sums
from lifelong_jax.importance.accumulation import Accumulation
from lifelong_jax.importance.estimators import (
    as_tree,
    check_arguments,
    fisher_cotangents,
    loss_cotangents,
    losses_of_labels,
    mean_over_examples,
)
from lifelong_jax.importance.factor_sums import FactorSums, WeightSharing
from lifelong_jax.types import Examples, LogitsFn, LossFn, Params

_NO_DERIVATIVE = (
    "Kronecker factors cannot be differentiated: eigenvectors have no derivative where eigenvalues are equal. Compute "
    "them from jax.lax.stop_gradient(params), or differentiate fisher_diagonal."
)


def kronecker_fisher(
    logits_fn: LogitsFn,
    params: Params,
    inputs: Examples,
    *,
    likelihood: Literal["categorical", "gaussian", "bernoulli"] = "categorical",
    num_samples: int | None = None,
    key: jax.Array | None = None,
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
    weight_sharing: WeightSharing = "expand",
    max_side: int = 8192,
    into: Accumulation | None = None,
) -> Any:
    """Computes the Fisher information of each layer as a Kronecker product of two matrices.

        F ≈ A ⊗ G,   A = mean_n Σ_position input inputᵀ,   G = mean_n Σ_position E_y gradient gradientᵀ

    `input` is the layer's input, and `gradient` that of log p(y) at the layer's output. The penalty then knows which
    *directions* matter, where `fisher_diagonal` knows which parameters do.

    - The weight of a dense layer or a convolution gets both matrices, for each group or stacked layer.
    - A vector, such as a bias, gets the full matrix of its gradients, which is exact.
    - A table of embeddings gets the diagonal of A, and the matrix G.
    - Any other leaf (a matrix that is used twice, a table of single numbers, a scan's scalars) gets its diagonal, as
      from `fisher_diagonal`.

    Args:
      logits_fn: as for `fisher_diagonal`.
      params: a tree of floating-point arrays.
      inputs: a tree of arrays `[num_examples, ...]`; no labels.
      likelihood: as for `fisher_diagonal`.
      num_samples: as for `fisher_diagonal`.
      key: as for `fisher_diagonal`.
      weights: as for `fisher_diagonal`.
      microbatch_size: as for `fisher_diagonal`.
      weight_sharing: how a weight that is used at several positions (tokens, pixels) is treated. "expand" takes the
        positions for independent, and A is a mean over them. This is exact for a deep linear network with a loss at
        each position. "reduce" takes an example's mean input and the sum of its gradients, which is exact for a deep
        linear network with one loss of the mean over positions. With one position, they are the same.
      max_side: a side with more rows or columns keeps only its diagonal: its matrix would take more than max_side²
        numbers.
      into: as for `fisher_diagonal`; from `init_accumulation(params, like=importance)`.

    Returns:
      A tree like `params`, with a `KroneckerFactors` in the place of each leaf but those that keep the diagonal, which
      are arrays. `forms.num_bytes(jax.eval_shape(...))` tells beforehand how much memory it takes. With `into`, the
      `Accumulation` of all examples so far: `make_forms(accumulation.mean)` is such a tree.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: as for `fisher_diagonal`; or if `weight_sharing` is unknown, `max_side` is no positive integer, or
        arrays vary over a mesh inside of `jax.shard_map`.

    Example:
      >>> logits_fn = lambda params, x: x @ params
      >>> importance = kronecker_fisher(logits_fn, jnp.zeros((1, 2)), jnp.array([[1.0], [3.0]]))
      >>> importance.row_values  # the mean of 1² and 3²
      Array([[5.]], dtype=float32)
      >>> importance.column_values.round(3)  # of the covariance of the label, [[0.25, -0.25], [-0.25, 0.25]]
      Array([[0. , 0.5]], dtype=float32)

    Martens and Grosse 2015, arXiv 1503.05671; Grosse and Martens 2016, arXiv 1602.01407; for positions, Eschenhagen et
    al. 2023, arXiv 2311.00636, eq. 9 and 15.
    """
    cotangents_fn = fisher_cotangents(likelihood, num_samples, key)
    check_arguments(params, "inputs", inputs, weights, microbatch_size, into)
    means = mean_over_examples(
        as_tree(logits_fn),
        cotangents_fn,
        params,
        inputs,
        key,
        weights,
        sum_fn(weight_sharing, max_side),
        microbatch_size,
        into,
    )
    return make_forms(means) if into is None else means


def empirical_kronecker_fisher(
    loss_fn: LossFn,
    params: Params,
    examples: Examples,
    *,
    num_samples: int | None = None,
    key: jax.Array | None = None,
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
    weight_sharing: WeightSharing = "expand",
    max_side: int = 8192,
    into: Accumulation | None = None,
) -> Any:
    """Computes the empirical Fisher information of each layer, at the true labels, as a Kronecker product.

    It is to `kronecker_fisher` what `empirical_fisher_diagonal` is to `fisher_diagonal`.

    Args:
      loss_fn: `loss_fn(params, example)`, a scalar or the losses of labels, as for `empirical_fisher_diagonal`.
      params: a tree of floating-point arrays.
      examples: a tree of arrays `[num_examples, ...]`, with the labels.
      num_samples: as for `empirical_fisher_diagonal`.
      key: as for `empirical_fisher_diagonal`.
      weights: as for `fisher_diagonal`.
      microbatch_size: as for `fisher_diagonal`.
      weight_sharing: as for `kronecker_fisher`.
      max_side: as for `kronecker_fisher`.
      into: as for `kronecker_fisher`.

    Returns:
      As for `kronecker_fisher`.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: as for `empirical_fisher_diagonal` and `kronecker_fisher`.

    Example:
      >>> loss_fn = lambda params, example: 0.5 * jnp.sum((example["x"] @ params - example["y"]) ** 2)
      >>> examples = {"x": jnp.array([[1.0], [3.0]]), "y": jnp.zeros((2, 2))}
      >>> empirical_kronecker_fisher(loss_fn, jnp.array([[1.0, 0.0]]), examples).column_values
      Array([[0., 5.]], dtype=float32)

    Martens and Grosse 2015, arXiv 1503.05671; on the two Fishers, Kunstner et al. 2019, arXiv 1905.12558.
    """
    cotangents_fn = loss_cotangents(num_samples, key)
    check_arguments(params, "examples", examples, weights, microbatch_size, into)
    _checks.check_labels(loss_fn, "examples", params, examples)
    means = mean_over_examples(
        Partial(losses_of_labels, as_tree(loss_fn)),
        cotangents_fn,
        params,
        examples,
        key,
        weights,
        sum_fn(weight_sharing, max_side),
        microbatch_size,
        into,
    )
    return make_forms(means) if into is None else means


@functools.cache  # one function object per setting, so jit compiles once per setting
def sum_fn(weight_sharing: WeightSharing, max_side: int) -> Callable[..., Params]:
    """Makes the sum over examples, after checking its settings."""
    _checks.check_choice("weight_sharing", weight_sharing, ("expand", "reduce"))
    _checks.check_positive_integer("max_side", max_side)
    return functools.partial(factor_sums.sum_over_examples, weight_sharing=weight_sharing, max_side=max_side)


@jax.jit
def make_forms(means: Params) -> Params:
    """Makes the importance of the means of Kronecker factors: computes their eigenvectors.

    Args:
      means: the `mean` of an `Accumulation`.

    Returns:
      As for `kronecker_fisher`.

    Example:
      >>> from lifelong_jax.importance import init_accumulation
      >>> logits_fn, params = lambda params, x: x @ params, jnp.zeros((1, 2))
      >>> like = kronecker_fisher(logits_fn, params, jnp.ones((1, 1)))
      >>> total = init_accumulation(params, like)
      >>> for inputs in (jnp.array([[1.0]]), jnp.array([[3.0]])):
      ...     total = kronecker_fisher(logits_fn, params, inputs, into=total)
      >>> make_forms(total.mean).row_values
      Array([[5.]], dtype=float32)
    """
    means = refuse_to_differentiate(_NO_DERIVATIVE, means)

    def of_leaf(mean: FactorSums | jax.Array) -> forms.Form:
        if not isinstance(mean, FactorSums):
            return mean
        return forms.from_factors(_symmetric(mean.rows), _symmetric(mean.columns), mean.layout)

    return jax.tree.map(of_leaf, means, is_leaf=lambda node: isinstance(node, FactorSums))


def _symmetric(upper: jax.Array) -> jax.Array:
    """Mirrors matrices, `[groups, size, size]`, at their diagonals; leaves diagonals, `[groups, size]`, as they are."""
    return upper if upper.ndim == 2 else jnp.triu(upper) + jnp.matrix_transpose(jnp.triu(upper, 1))
