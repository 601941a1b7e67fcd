"""Sums over examples of a function of each example's gradients: the reference path, `vmap(grad)` in microbatches.

Every importance is of one shape. On example n a function has the outputs F_n; some cotangents v_nk are pulled back
through it to gradients g_nk = (∂F_n/∂params)ᵀ v_nk; and the example's contribution is, elementwise,

    q_n = Σ_k g_nk²            (reduction="sum_of_squares")
    q_n = sqrt(Σ_k g_nk²)      (reduction="norm"; |g_n| where there is one cotangent)

`importance.py` says which outputs and cotangents make which importance. The power is taken of each example's own
gradient, before the sum over examples: the two do not commute, and a squared minibatch gradient is another quantity.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from lifelong_jax.types import Example, Examples, Params

Reduction: TypeAlias = Literal["sum_of_squares", "norm"]

CotangentsFn: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""`cotangents_fn(outputs, index) -> [num_cotangents, *outputs.shape]`; `index` numbers the example, for random keys."""


def sum_over_examples(
    output_fn: Callable[[Params, Example], jax.Array],
    cotangents_fn: CotangentsFn,
    params: Params,
    examples: Examples,
    *,
    reduction: Reduction,
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
) -> Params:
    """Sums over examples the squares, or the absolute values, of each example's gradients.

        Σ_n weights[n] · q_n

    Args:
      output_fn: `output_fn(params, example) -> outputs`, an array of any shape; one example, no batch axis.
      cotangents_fn: `cotangents_fn(outputs, index) -> [num_cotangents, *outputs.shape]`: what is pulled back. It is not
        differentiated. `index`, an int32 scalar, is the example's place among all examples, whatever the microbatch.
      params: a tree of floating-point arrays.
      examples: a tree of arrays `[num_examples, ...]`.
      reduction: "sum_of_squares" or "norm", as above.
      weights: `[num_examples]`, or None for ones.
      microbatch_size: at most how many examples are differentiated together. The result does not depend on it; peak
        memory is proportional to it. By default a static function of the backend and of the shapes.

    Returns:
      A tree like `params`, in its dtypes or float32, whichever is wider.

    Example:
      >>> square = lambda params, x: params * x
      >>> once = lambda outputs, index: jnp.ones((1,))
      >>> sum_over_examples(square, once, jnp.array(3.0), jnp.array([1.0, -2.0]), reduction="norm")
      Array(3., dtype=float32)
    """
    if microbatch_size is None:
        microbatch_size = default_microbatch_size(params)

    def sum_microbatch(
        output_fn: Callable[[Params, Example], jax.Array],
        cotangents_fn: CotangentsFn,
        params: Params,
        examples: Examples,
        indices: jax.Array,
        weights: jax.Array,
    ) -> Params:
        def contribution(example: Example, index: jax.Array) -> Params:
            outputs, pull_back = jax.vjp(lambda p: output_fn(p, example), params)
            cotangents = cotangents_fn(jax.lax.stop_gradient(outputs), index)
            if cotangents.shape[0] == 1:  # no accumulator, and |g| where a root of a square would underflow
                function = jnp.square if reduction == "sum_of_squares" else jnp.abs
                return jax.tree.map(lambda g: function(widen(g)), *pull_back(cotangents[0]))

            # One cotangent at a time: an array of cotangents × parameters would leave the cache.
            def add_square(total: Params, cotangent: jax.Array) -> tuple[Params, None]:
                return jax.tree.map(lambda t, g: t + jnp.square(widen(g)), total, *pull_back(cotangent)), None

            total, _ = jax.lax.scan(add_square, zeros_like_sum(params), cotangents)
            return total if reduction == "sum_of_squares" else jax.tree.map(jnp.sqrt, total)

        if indices.shape[0] == 1:  # without the axis: on a CPU, XLA's batched products are tens of times slower
            alone = contribution(jax.tree.map(lambda x: x[0], examples), indices[0])
            return jax.tree.map(lambda q: weights[0].astype(q.dtype) * q, alone)
        contributions = jax.vmap(contribution)(examples, indices)
        return jax.tree.map(lambda q: jnp.tensordot(weights.astype(q.dtype), q, axes=1), contributions)

    return sum_microbatches(sum_microbatch, output_fn, cotangents_fn, params, examples, weights, microbatch_size)


def sum_microbatches(
    sum_microbatch: Callable[..., Params],
    output_fn: Callable[[Params, Example], jax.Array],
    cotangents_fn: CotangentsFn,
    params: Params,
    examples: Examples,
    weights: jax.Array | None,
    microbatch_size: int,
) -> Params:
    """Adds up what a function makes of one microbatch after the other.

    All have one size, so that the function is compiled for one shape: the last is filled up with examples of weight 0.
    Where the types of the examples say that they are sharded over axes of a mesh (`jax.make_mesh` makes such axes),
    each shard goes through its own, with the parameters replicated, and one sum joins them. JAX does not allow the
    functions to close over arrays of that mesh then: they may be `jax.tree_util.Partial`s, with these as arguments.

    Args:
      sum_microbatch: `(output_fn, cotangents_fn, params, examples, indices, weights) -> tree like params`, the last
        three with a leading axis of the microbatch's size; it must be linear in the weights.
      output_fn: is handed on.
      cotangents_fn: is handed on.
      params: a tree of floating-point arrays.
      examples: a tree of arrays `[num_examples, ...]`.
      weights: `[num_examples]`, or None for ones.
      microbatch_size: examples per call, and per shard, at most.

    Returns:
      The sum, a tree like `params`, in its dtypes or float32, whichever is wider.
    """

    def sum_shard(
        functions: tuple[Any, Any], params: Params, examples: Examples, weights: jax.Array | None, shard: jax.Array
    ) -> Params:
        num_here = jax.tree.leaves(examples)[0].shape[0]
        size = equal_size(num_here, microbatch_size)

        def step(total: Params, start: jax.Array) -> tuple[Params, None]:
            positions = start + jnp.arange(size, dtype=jnp.int32)
            within = jnp.minimum(positions, num_here - 1)
            here = jax.tree.map(lambda x: x[within], examples)
            present = jnp.where(positions < num_here, 1.0 if weights is None else weights[within], 0)
            indices = shard * num_here + within  # among all examples, for random keys
            return jax.tree.map(jnp.add, total, sum_microbatch(*functions, params, here, indices, present)), None

        starts = jnp.arange(0, num_here, size, dtype=jnp.int32)
        return jax.lax.scan(step, zeros_like_sum(params), starts)[0]

    examples, weights = jax.tree.map(jnp.asarray, (examples, weights))
    mesh, axes = _sharded_over((examples, weights))
    if not axes:
        return sum_shard((output_fn, cotangents_fn), params, examples, weights, jnp.int32(0))
    functions = tuple(f if isinstance(f, Partial) else Partial(f) for f in (output_fn, cotangents_fn))
    everywhere, by_shard = PartitionSpec(), PartitionSpec(axes)
    return jax.shard_map(
        lambda *arguments: jax.lax.psum(sum_shard(*arguments, jax.lax.axis_index(axes)), axes),
        mesh=mesh,
        in_specs=(everywhere, everywhere, by_shard, by_shard),
        out_specs=everywhere,
        check_vma=False,  # each shard differentiates by its own copy of the parameters, and sums afterwards
    )(
        *jax.sharding.reshard((functions, params), NamedSharding(mesh, everywhere)),
        *jax.sharding.reshard((examples, weights), NamedSharding(mesh, by_shard)),
    )


def _sharded_over(examples: tuple[Examples, jax.Array | None]) -> tuple[AbstractMesh | None, tuple[str, ...]]:
    """The mesh and its axes over which the types of the examples, or weights, say that they are sharded, if any."""
    for leaf in jax.tree.leaves(examples):
        sharding = jax.typeof(leaf).sharding
        axes = sharding.spec[0] if sharding.spec else None
        if axes is not None:
            return sharding.mesh, axes if isinstance(axes, tuple) else (axes,)
    return None, ()


def equal_size(num_examples: int, at_most: int) -> int:
    """Says how large the parts are when examples are divided into as few as may be, as equal as can be.

        ceil(num_examples / ceil(num_examples / at_most))

    So little of the last part is left over.

    Args:
      num_examples: at least 1.
      at_most: the largest size of a part, at least 1.

    Returns:
      The size; the last part may be smaller.

    Example:
      >>> equal_size(1437, 1024)
      719
    """
    num_parts = -(-num_examples // at_most)
    return -(-num_examples // num_parts)


def default_microbatch_size(params: Params) -> int:
    """Chooses how many examples to differentiate together from the backend and the size of the parameters alone.

    On a CPU, 1: gradients of single examples stay in the cache, and XLA's products with a batch axis do not use the
    matrix kernels (`benchmarks/importance.py` measures both). Elsewhere, as many as a GiB of gradients holds, at most
    256: a rule of thumb.

    Args:
      params: a tree of arrays.

    Returns:
      The microbatch size, at least 1.
    """
    if jax.default_backend() == "cpu":
        return 1
    bytes_per_example = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(zeros_like_sum(params)))
    return max(1, min(256, 2**30 // max(1, bytes_per_example)))


def zeros_like_sum(params: Params) -> Params:
    """Makes the zeros that a sum over examples starts from: bfloat16 parameters are accumulated in float32.

    Args:
      params: a tree of floating-point arrays.

    Returns:
      A tree like `params`, in its dtypes or float32, whichever is wider.
    """
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _wide_dtype(leaf)), params)


def widen(array: jax.Array) -> jax.Array:
    """Casts to float32 what is narrower.

    Args:
      array: a floating-point array.

    Returns:
      The array, in its dtype or float32, whichever is wider.
    """
    return array.astype(_wide_dtype(array))


def relative(weights: jax.Array) -> jax.Array:
    """Scales weights by a power of 2, exactly, so that neither their sum nor a quotient by it over- or underflows.

    Args:
      weights: `[num_examples]`, not negative.

    Returns:
      The weights, in their dtype or float32, whichever is wider: the largest is from 1 to below 2, unless all are 0.
    """
    counts = not jnp.issubdtype(weights.dtype, jnp.floating)
    weights = weights.astype(jnp.float32) if counts else widen(weights)
    _, exponent = jnp.frexp(jnp.max(weights))
    return jnp.ldexp(weights, 1 - exponent)


def _wide_dtype(array: jax.Array) -> jnp.dtype:  # `promote_types` refuses under strict promotion
    return array.dtype if jnp.finfo(array.dtype).bits >= 32 else jnp.dtype(jnp.float32)
