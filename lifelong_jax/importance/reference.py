"""The reference for sums over examples: `vmap(grad)` in microbatches.

It computes each example's gradient in full, by a simple rule for all functions. The tests of `structured.py` compare
with it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lifelong_jax._numerics import safe_sqrt, unbatched, wide_dtype, widen, widened_zeros
from lifelong_jax.importance.microbatches import CotangentsFn, Reduction, sum_microbatches
from lifelong_jax.platforms import is_for_cpu
from lifelong_jax.types import Example, Examples, Params


def sum_over_examples(
    output_fn: Callable[[Params, Example], jax.Array],
    cotangents_fn: CotangentsFn,
    params: Params,
    examples: Examples,
    *,
    reduction: Reduction,
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
    start: Params | None = None,
) -> Params:
    """Sums the squares, or the magnitudes, of each example's gradients over examples.

        Σ_n weights[n] · q_n

    q_n is defined in `microbatches.py`.

    Args:
      output_fn: `output_fn(params, example) -> outputs`, an array of any shape, for one example without batch axis.
      cotangents_fn: `cotangents_fn(outputs, index) -> Cotangents`: the cotangents that are pulled back. `index`, an
        int32 scalar, is the example's number among all examples, not in its microbatch.
      params: a tree of floating-point arrays.
      examples: a tree of arrays `[num_examples, ...]`.
      reduction: "sum_of_squares" or "norm".
      weights: `[num_examples]`, or None for ones.
      microbatch_size: the largest number of examples that are differentiated together; None chooses one from the
        platform and the shapes. The result does not depend on it; peak memory is proportional to it.
      start: what the sum starts from, a tree like the result; None for zeros.

    Returns:
      A tree like `params`, in its dtypes or float32, whichever is wider.

    Example:
      >>> from lifelong_jax.importance.cotangents import stacked
      >>> square = lambda params, x: params * x
      >>> once = lambda outputs, index: stacked(jnp.ones((1,)))
      >>> sum_over_examples(square, once, jnp.array(3.0), jnp.array([1.0, -2.0]), reduction="norm")
      Array(3., dtype=float32)
    """
    if microbatch_size is None:
        microbatch_size = default_microbatch_size(params)

    return sum_microbatches(
        functools.partial(_sum_microbatch, reduction),
        widened_zeros,
        output_fn,
        cotangents_fn,
        params,
        examples,
        weights,
        microbatch_size,
        start,
    )


def default_microbatch_size(params: Params) -> int:
    """Chooses how many examples to differentiate together, from the platform and the size of the parameters.

    On a CPU, the choice is 1: the gradient of a single example stays in the cache, and XLA's products with a batch axis
    do not use the matrix kernels (`python -m benchmarks.importance` measures both). On other platforms, the gradients
    fill at most one GiB, and there are at most 256 examples: a rule of thumb.
    """
    if is_for_cpu():
        return 1
    bytes_per_example = sum(leaf.size * wide_dtype(leaf).itemsize for leaf in jax.tree.leaves(params))
    return max(1, min(256, 2**30 // max(1, bytes_per_example)))


def _sum_microbatch(
    reduction: Reduction,
    output_fn: Callable[[Params, Example], jax.Array],
    cotangents_fn: CotangentsFn,
    params: Params,
    examples: Examples,
    indices: jax.Array,
    weights: jax.Array,
) -> Params:
    def contribution(example: Example, index: jax.Array) -> Params:
        outputs, pull_back = jax.vjp(lambda p: output_fn(p, example), params)
        cotangents = cotangents_fn(outputs, index)
        if cotangents.num == 1:  # no accumulator is needed, and |g| does not underflow as sqrt(g²) does
            function = jnp.square if reduction == "sum_of_squares" else jnp.abs
            return jax.tree.map(lambda g: function(widen(g)), *pull_back(cotangents.at(0)))

        # One cotangent at a time: an array of cotangents × parameters would not fit the cache.
        @functools.partial(jax.checkpoint, prevent_cse=False)  # nor would one of derivatives fit the memory
        def add_square(total: Params, index: jax.Array) -> tuple[Params, None]:
            return jax.tree.map(lambda t, g: t + jnp.square(widen(g)), total, *pull_back(cotangents.at(index))), None

        total, _ = jax.lax.scan(add_square, widened_zeros(params), jnp.arange(cotangents.num, dtype=jnp.int32))
        return total if reduction == "sum_of_squares" else jax.tree.map(safe_sqrt, total)

    over_examples = jax.vmap if indices.shape[0] > 1 else unbatched
    contributions = over_examples(contribution)(examples, indices)
    return jax.tree.map(lambda q: jnp.tensordot(weights.astype(q.dtype), q, axes=1), contributions)
