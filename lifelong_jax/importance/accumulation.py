"""Importances of examples that come batch by batch: a running mean, updated in place.

    total = init_accumulation(params)
    for inputs in batches:  # any iterable
        total = fisher_diagonal(logits_fn, params, inputs, into=total)
    importance = total.mean

Every importance of `estimators.py` and `kronecker.py` takes `into`. The result is the importance of all examples at
once, up to rounding, however they are cut into batches. Sampled labels do not depend on the cut either, because
examples are numbered on from batch to batch; so pass the same key each time.

`into` is donated: its arrays become those of the result, so one tree of the size of the parameters is kept, not two.
Inside of a function that you compile, donate it there: `jax.jit(function, donate_argnames="into")`. It is also the
carry of a `jax.lax.scan`. It is a plain tree, so it can be saved between two batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from lifelong_jax import _checks, forms
from lifelong_jax._meshes import sharding_of
from lifelong_jax._numerics import scale_to, wide_dtype
from lifelong_jax.importance.factor_sums import FactorSums
from lifelong_jax.types import Params


class Accumulation(NamedTuple):
    """The importance of the examples so far.

    Attributes:
      mean: a tree like the parameters: the importance; of Kronecker factors, the means that
        `kronecker.make_forms` makes it of.
      weight: a scalar, the sum of the examples' weights.
      num_examples: a scalar, the number of the next example, for random keys. Examples of weight 0 are counted.
    """

    mean: Params
    weight: jax.Array
    num_examples: jax.Array


def init_accumulation(params: Params, like: Params | None = None) -> Accumulation:
    """Makes the accumulation of no examples.

    Args:
      params: a tree of floating-point arrays.
      like: for Kronecker factors, an importance that has the forms of that to come. Its arrays may be
        `jax.ShapeDtypeStruct`s: `jax.eval_shape(importance_fn, params, inputs)` makes it without computing.

    Returns:
      Zeros in the dtypes of `params` or float32, whichever is wider, and in their shardings.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: if `params` and `like` differ in structure or shapes.

    Example:
      >>> from lifelong_jax import mas_importance
      >>> params, output_fn = jnp.array(1.0), lambda params, x: params * x
      >>> total = init_accumulation(params)
      >>> for inputs in (jnp.array([1.0, -3.0]), jnp.array([2.0])):
      ...     total = mas_importance(output_fn, params, inputs, into=total)
      >>> total.mean.round(3), mas_importance(output_fn, params, jnp.array([1.0, -3.0, 2.0])).round(3)
      (Array(9.333, dtype=float32), Array(9.333, dtype=float32))
    """
    _checks.check_params("params", params)

    def zeros(leaf: jax.Array) -> jax.Array:
        return jnp.zeros_like(leaf, wide_dtype(leaf))

    if like is None:
        mean = jax.tree.map(zeros, params)
    else:
        _checks.check_same_structure("like", like, "params", params)
        mean = forms.tree_map(
            lambda form, leaf: _no_sums(form, leaf) if forms.is_form(form) else zeros(leaf), like, params
        )
    return Accumulation(mean, jnp.zeros(()), jnp.zeros((), jnp.int32))


def _no_sums(form: forms.KroneckerFactors, leaf: jax.Array) -> FactorSums:
    """Makes zeros that are whole on each device of the leaf's mesh, as the sums will be: they are donated."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else sharding_of(leaf)
    whole = None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
    sides = ((form.row_basis, form.row_values), (form.column_basis, form.column_values))
    shapes = [(values if basis is None else basis).shape for basis, values in sides]
    rows, columns = (jnp.zeros(shape, form.dtype, device=whole) for shape in shapes)
    return FactorSums(rows, columns, form.layout)


def add_batch(
    into: Accumulation,
    sum_from: Callable[[jax.Array | None, Any], Any],
    num_examples: int,
    weights: jax.Array | None,
) -> Accumulation:
    """Adds a batch to an accumulation.

        mean ← (weight · mean + Σ_n weights[n] · q_n) / (weight + Σ_n weights[n])

    Args:
      into: the accumulation.
      sum_from: `sum_from(weights, start)`: `start`, and the sum over the batch's examples.
      num_examples: the size of the batch.
      weights: `[num_examples]`, or None for ones.

    Returns:
      The accumulation of all examples so far.
    """
    earlier, scaled = into.weight, weights
    added = jnp.asarray(num_examples, earlier.dtype)
    if weights is not None:
        weights = weights.astype(earlier.dtype)
        added = jnp.sum(weights)
        # By one power of 2 for all, so that neither products nor the sum of weights overflow.
        largest = jnp.maximum(earlier, jnp.max(weights))
        earlier, scaled = scale_to(largest, earlier), scale_to(largest, weights)
    total = sum_from(scaled, jax.tree.map(lambda leaf: leaf * earlier.astype(leaf.dtype), into.mean))
    count = earlier + (added if scaled is None else jnp.sum(scaled))
    mean = divide(total, jnp.where(count > 0, count, 1))
    return Accumulation(mean, into.weight + added, into.num_examples + num_examples)


def divide(total: Any, count: ArrayLike) -> Any:
    """Divides a sum by the number of examples, or by the sum of their weights."""
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(count, leaf.dtype), total)
