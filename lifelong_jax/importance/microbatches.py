"""The loop over microbatches that all importances share, and the quantity that they all sum over examples.

All importances have one form. For example n, a function has the outputs F_n. Cotangents v_nk are pulled back through
it to gradients g_nk = (∂F_n/∂params)ᵀ v_nk. The example then contributes, elementwise,

    q_n = Σ_k g_nk²            (reduction="sum_of_squares")
    q_n = sqrt(Σ_k g_nk²)      (reduction="norm"; |g_n| if there is one cotangent)

`estimators.py` defines the outputs and cotangents of each importance. `reference.py` and `structured.py` compute the
sum over examples in two ways. Both square each example's own gradient before they sum over examples: the square of a
minibatch's gradient is another quantity.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from lifelong_jax import _checks
from lifelong_jax._numerics import equal_size
from lifelong_jax.importance.cotangents import Cotangents
from lifelong_jax.types import Example, Examples, Params

Reduction: TypeAlias = Literal["sum_of_squares", "norm"]

CotangentsFn: TypeAlias = Callable[[jax.Array, jax.Array], Cotangents]
"""`cotangents_fn(outputs, index)` returns an example's cotangents; `index` numbers the example, for random keys."""


def sum_microbatches(
    sum_microbatch: Callable[..., Any],
    zeros_fn: Callable[[Params], Any],
    output_fn: Callable[[Params, Example], jax.Array],
    cotangents_fn: CotangentsFn,
    params: Params,
    examples: Examples,
    weights: jax.Array | None,
    microbatch_size: int,
    start: Any = None,
) -> Any:
    """Sums a function over microbatches of the examples, one after the other.

    All microbatches have one size, so the function is compiled once; the last one is padded with examples of weight 0.

    Args:
      sum_microbatch: `(output_fn, cotangents_fn, params, examples, indices, weights) -> tree`; the last three arguments
        have a leading axis of the microbatch's size. It must be linear in the weights.
      zeros_fn: `zeros_fn(params) -> tree`, what the sum starts from.
      output_fn: passed to `sum_microbatch`.
      cotangents_fn: passed to `sum_microbatch`.
      params: a tree of floating-point arrays.
      examples: a tree of arrays `[num_examples, ...]`.
      weights: `[num_examples]`, or None for ones.
      microbatch_size: the largest number of examples per call.
      start: what the sum starts from, a tree like that of `zeros_fn`; None for zeros.

    Returns:
      The sum, a tree like those of `sum_microbatch`.
    """
    examples, weights = jax.tree.map(jnp.asarray, (examples, weights))
    num_examples = jax.tree.leaves(examples)[0].shape[0]
    size = equal_size(num_examples, microbatch_size)

    def add_microbatch(total: Any, start: jax.Array) -> tuple[Any, None]:
        positions = start + jnp.arange(size, dtype=jnp.int32)
        rows = jnp.minimum(positions, num_examples - 1)
        row_weights = jnp.where(positions < num_examples, 1.0 if weights is None else weights[rows], 0)
        if weights is not None:  # an example of weight 0 is absent, even if it is NaN: another one is in its place
            rows = jnp.where(row_weights > 0, rows, jnp.argmax(weights > 0).astype(rows.dtype))
        microbatch = jax.tree.map(lambda x: x[rows], examples)
        term = sum_microbatch(output_fn, cotangents_fn, params, microbatch, rows, row_weights)
        if weights is not None:  # a shard, or a batch of a stream, may have no example of a weight above 0
            term = jax.tree.map(lambda leaf: jnp.where(jnp.any(weights > 0), leaf, 0), term)
        return jax.tree.map(jnp.add, total, term), None

    if start is None:
        start = zeros_fn(params)
    else:
        _check_start(start, jax.eval_shape(zeros_fn, params))
    starts = jnp.arange(0, num_examples, size, dtype=jnp.int32)
    total, _ = jax.lax.scan(add_microbatch, start, starts)
    return total


def _check_start(start: Any, zeros: Any) -> None:
    """Raises ValueError, naming the leaf, unless a sum may start from `start`."""
    hint = "Begin with init_accumulation(params), and with like=importance for Kronecker factors."
    try:
        _checks.check_same_structure("into.mean", start, "this importance", zeros)
    except ValueError as error:
        raise ValueError(f"{error} {hint}") from None
    for (path, leaf), zero in zip(jax.tree.leaves_with_path(start), jax.tree.leaves(zeros), strict=True):
        if leaf.dtype != zero.dtype:
            raise ValueError(
                f"into.mean{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, but this importance has {zero.dtype}. "
                f"{hint}"
            )
