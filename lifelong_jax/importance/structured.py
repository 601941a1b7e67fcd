"""Exact sums over examples at about the cost of one gradient, for any JAX function.

One example's gradient of a dense layer is the outer product of the layer's input and the cotangents at its output.
Squares and absolute values of a product are products of squares and absolute values, so their sums over examples are
products of matrices:

    Σ_n (input_n ⊗ cotangent_n)² = (input²)ᵀ cotangent²

No array of examples × weights is ever made. If an example has several positions (tokens, pixels), its gradient is a sum
over positions, which must be computed before it is squared: one product of matrices per example, as in an ordinary
gradient. Where one example is computed at a time, it is that of the ordinary gradient.

`tapping.py` finds such layers in the jaxpr of the function of one example, and reads their inputs and cotangents.
`factors.py` defines how the two multiply. Every other leaf (biases, scales, leaves used twice, leaves inside loops) is
differentiated per example. Both ways are exact; they differ in time and memory, which `explain` lists.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lifelong_jax._checks import first_example
from lifelong_jax._numerics import safe_sqrt, unbatched, varies, widen, widened_zeros
from lifelong_jax.importance import reference, tapping
from lifelong_jax.importance.factors import Lookup
from lifelong_jax.importance.in_backward import Summing
from lifelong_jax.importance.linearization import (
    columns_of,
    cotangents_at,
    find_biases,
    linearize,
    rows_of,
    sum_cotangents,
    tokens_of,
)
from lifelong_jax.importance.microbatches import ON_ONE_DEVICE, CotangentsFn, Reduction, Spread, sum_microbatches
from lifelong_jax.importance.plan import (
    Tap,
    default_microbatch_size,
    make_plan,
    num_cotangents,
    takes_gradient_of_one,
)
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
    spread: Spread = ON_ONE_DEVICE,
) -> Params:
    """Sums the squares, or the magnitudes, of each example's gradients over examples.

    The arguments and the result are those of `reference.sum_over_examples`.

    Example:
      >>> from lifelong_jax.importance.cotangents import stacked
      >>> dense = lambda params, x: x @ params
      >>> once = lambda outputs, index: stacked(jnp.ones((1, 1)))
      >>> examples = jnp.array([[1.0, 2.0], [3.0, -4.0]])
      >>> sum_over_examples(dense, once, jnp.zeros((2, 1)), examples, reduction="sum_of_squares").ravel()
      Array([10., 20.], dtype=float32)
    """
    if varies((params, examples)):  # inside of `jax.shard_map`, where jaxprs cannot be evaluated again
        return reference.sum_over_examples(
            output_fn,
            cotangents_fn,
            params,
            examples,
            reduction=reduction,
            weights=weights,
            microbatch_size=microbatch_size,
            start=start,
        )
    examples = jax.tree.map(jnp.asarray, examples)
    if microbatch_size is None:
        microbatch_size = default_microbatch_size(output_fn, cotangents_fn, params, first_example(examples))
    spread, microbatch_size = spread.fit(jax.tree.leaves(examples)[0].shape[0], microbatch_size)
    return sum_microbatches(
        functools.partial(_sum_microbatch, reduction, spread),
        widened_zeros,
        output_fn,
        cotangents_fn,
        params,
        examples,
        weights,
        microbatch_size,
        start,
        spread,
    )


class _Powers(NamedTuple):
    """An example contributes `root(Σ_cotangents summand(gradient))`.

    If a gradient is a product of a tap's operand, which all cotangents share, and of cotangents, this is
    `operand(operand) · root(Σ_cotangents summand(cotangents))`.
    """

    summand: Callable[[jax.Array], jax.Array]
    operand: Callable[[jax.Array], jax.Array]
    root: Callable[[jax.Array], jax.Array] | None  # None for the identity
    of_one: bool  # whether there is one cotangent


def _powers(reduction: Reduction, num_cotangents: int) -> _Powers:
    if reduction == "sum_of_squares":
        return _Powers(jnp.square, jnp.square, None, num_cotangents == 1)
    if num_cotangents == 1:  # |g| does not underflow as sqrt(g²) does
        return _Powers(jnp.abs, jnp.abs, None, True)
    return _Powers(jnp.square, jnp.abs, safe_sqrt, False)


class _Scaled(NamedTuple):
    """A sum of squares, `values · scale²`, one per example: where the square of a cotangent leaves the range of floats,
    the square of its product with the operand need not.

    Attributes:
      values: `[num_examples, groups, columns]`.
      scale: `[num_examples]`, powers of 2.
    """

    values: jax.Array
    scale: jax.Array


def _square_scaled(cotangents: jax.Array) -> _Scaled:
    """Squares cotangents, `[num_examples, groups, columns]`, with each example's largest one scaled to about 1."""
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(cotangents)), axis=(1, 2), initial=0)
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 1))
    limits = jnp.finfo(cotangents.dtype)
    scale = jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, limits.minexp, limits.maxexp - 2))
    return _Scaled(jnp.square(cotangents / scale[:, None, None]), scale)


def _add(total: Any, term: Any) -> Any:
    """Adds sums over cotangents."""

    def add_leaf(total: Any, term: Any) -> Any:
        if not isinstance(total, _Scaled):
            return total + term
        scale = jnp.maximum(total.scale, term.scale)
        parts = [part.values * jnp.square(part.scale / scale)[:, None, None] for part in (total, term)]
        return _Scaled(parts[0] + parts[1], scale)

    return jax.tree.map(add_leaf, total, term, is_leaf=lambda node: isinstance(node, _Scaled))


def _sum_microbatch(
    reduction: Reduction,
    spread: Spread,
    output_fn: Callable[[Params, Example], jax.Array],
    cotangents_fn: CotangentsFn,
    params: Params,
    examples: Examples,
    indices: jax.Array,
    weights: jax.Array,
) -> Params:
    plan = make_plan(output_fn, params, first_example(examples))
    is_one = indices.shape[0] == 1
    taps = {
        number: leaf_plan
        for number, leaf_plan in enumerate(plan.leaf_plans)
        if isinstance(leaf_plan, Tap) and not (is_one and takes_gradient_of_one(leaf_plan))
    }
    over_examples = unbatched if is_one else jax.vmap
    powers = _powers(reduction, num_cotangents(plan, cotangents_fn))
    in_backward = _sums_in_backward(taps, powers, spread) if powers.of_one and (spread.axes or not is_for_cpu()) else {}
    outputs, pull_back, operands = linearize(plan, taps, params, examples, over_examples, in_backward, weights)
    cotangents = over_examples(cotangents_fn)(outputs, indices)
    cotangent_at = cotangents_at(cotangents, over_examples)
    biases = find_biases(pull_back, cotangent_at(0), taps) if cotangents.num > 1 else {}

    def summands(cotangents: jax.Array) -> dict[int, jax.Array | _Scaled]:
        (pulled_back,) = pull_back(cotangents)
        return {number: summand(number, array) for number, array in pulled_back.items() if number not in biases}

    def summand(number: int, array: jax.Array) -> jax.Array | _Scaled:
        if number in in_backward:
            return array
        if number in taps:
            return _tap_summand(taps[number], operands[number], array, weights, powers, spread.num_shards)
        return _sum_examples_early(powers.summand(widen(array)), weights, powers)

    sums = sum_cotangents(summands, cotangent_at, cotangents.num, _add)
    for number, tap in biases.items():
        squares, scale = sums[tap]
        sums[number] = _sum_examples_early(squares[:, 0] * scale[:, None] * scale[:, None], weights, powers)

    leaves, structure = jax.tree.flatten(widened_zeros(params))
    for number, summed in sums.items():
        if number in taps:
            product = summed
            if number not in in_backward:
                product = _sum_tap(taps[number], operands[number], summed, weights, powers)
            leaves[number] = _restore(taps[number], product, leaves[number])
        else:
            leaves[number] = _sum_examples_late(summed, weights, powers)
    return jax.tree.unflatten(structure, leaves)


def _sums_in_backward(taps: dict[int, Tap], powers: _Powers, spread: Spread) -> dict[int, Summing]:
    """Returns what sums the contributions of taps whose gradients are not sums over the steps of a scan."""

    def sum_examples(tap: Tap, operand: jax.Array, cotangents: jax.Array, weights: jax.Array) -> jax.Array:
        num_shards = min(spread.num_shards, operand.shape[0])
        summed = _tap_summand(tap, operand, cotangents, weights, powers, num_shards)
        return _sum_tap(tap, operand, summed, weights, powers)

    return {
        number: Summing(tap, sum_examples) for number, tap in taps.items() if tap.positions == tap.factors.positions
    }


def _tap_summand(
    tap: Tap, operand: jax.Array, cotangents: jax.Array, weights: jax.Array, powers: _Powers, num_shards: int
) -> jax.Array | _Scaled:
    """Computes a tap's summand: a power of the cotangents if gradients are outer products, else of the gradients."""
    if isinstance(tap.factors, Lookup):
        rows = widen(columns_of(tap, cotangents)[:, 0])
        return powers.summand(_sum_equal_tokens(tokens_of(tap, operand), rows, tap.factors.rows))
    if tap.positions == 1:
        columns = widen(columns_of(tap, cotangents)[:, :, 0])
        return _square_scaled(columns) if powers.summand is jnp.square else powers.summand(columns)

    precision = tap.factors.precision

    def gradients(operand: jax.Array, cotangents: jax.Array) -> jax.Array:
        return jnp.einsum(
            "ngpr,ngpc->ngrc",
            rows_of(tap, operand, cotangents.dtype),
            columns_of(tap, cotangents),
            precision=precision,
            preferred_element_type=widen(cotangents).dtype,
        )

    if not is_for_cpu() or powers.root is not None:
        return _sum_examples_early(powers.summand(gradients(operand, cotangents)), weights, powers)

    def add_examples(total: jax.Array, one_of_each: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        operand, cotangents, weights = one_of_each
        terms = powers.summand(gradients(operand, cotangents))
        return total + weights.astype(total.dtype).reshape(-1, 1, 1, 1) * terms, None

    def by_shard(array: jax.Array) -> jax.Array:  # one example of each shard at a time
        return jnp.moveaxis(array.reshape(num_shards, -1, *array.shape[1:]), 1, 0)

    of_shards = jax.eval_shape(gradients, operand[:num_shards], cotangents[:num_shards])
    start = jnp.zeros(of_shards.shape, of_shards.dtype)
    total, _ = jax.lax.scan(add_examples, start, jax.tree.map(by_shard, (operand, cotangents, weights)))
    return jnp.sum(total, axis=0)


def _sum_tap(
    tap: Tap, operand: jax.Array, summed: jax.Array | _Scaled, weights: jax.Array, powers: _Powers
) -> jax.Array:
    """Sums a tap's contributions over examples, to `[groups, rows, columns]`."""
    scale = jnp.ones_like(weights)
    if isinstance(summed, _Scaled):
        summed, scale = summed
    if not isinstance(tap.factors, Lookup) and tap.positions > 1:
        return _sum_examples_late(summed, weights, powers)
    if powers.root is not None:
        summed = powers.root(summed)
    weights = weights.astype(summed.dtype).reshape(-1, 1, 1)
    if isinstance(tap.factors, Lookup):
        table = jnp.zeros((tap.factors.rows, tap.factors.columns), summed.dtype)
        return table.at[tokens_of(tap, operand)].add(weights * summed, mode="drop")
    # The operand is weighted and not the cotangents, because the bias has the same sum of cotangents, unweighted.
    rows = widen(rows_of(tap, operand, summed.dtype)[:, :, 0])
    weighted = weights * powers.operand(rows * scale.astype(rows.dtype).reshape(-1, 1, 1))
    if weighted.shape[1] == 1:  # a plain product: on a CPU, a batched one is slower, even with a batch of one
        return jnp.matmul(weighted[:, 0].T, summed[:, 0], precision=tap.factors.precision)[None]
    return jnp.einsum("ngr,ngc->grc", weighted, summed, precision=tap.factors.precision)


_MAX_COMPARED = 256  # more tokens are not compared each with each: that is quadratic in time and memory


def _sum_equal_tokens(tokens: jax.Array, cotangents: jax.Array, num_rows: int) -> jax.Array:
    """Sums the rows of equal tokens of an example into the first one's row, and sets the others to 0."""
    num_tokens = tokens.shape[1]
    if num_tokens > _MAX_COMPARED:

        def sum_in_example(tokens: jax.Array, cotangents: jax.Array) -> jax.Array:
            positions = jnp.arange(num_tokens, dtype=jnp.int32)
            first = jnp.full(num_rows + 1, num_tokens, jnp.int32).at[tokens].min(positions)  # the last row: no token
            return jnp.zeros_like(cotangents).at[first[tokens]].add(cotangents)

        return jax.vmap(sum_in_example)(tokens, cotangents)
    equal = tokens[:, :, None] == tokens[:, None, :]
    first = jnp.argmax(equal, axis=-1) == jnp.arange(num_tokens)
    return jnp.einsum("npq,nqc->npc", (equal & first[:, :, None]).astype(cotangents.dtype), cotangents)


def _restore(tap: Tap, product: jax.Array, leaf: jax.Array) -> jax.Array:
    """Maps `[groups, rows, columns]` to the shape and the order of the leaf."""
    stack = [length for length, stacks in zip(tap.use.lengths, tap.use.stacked, strict=True) if stacks]
    if stack:
        product = product.reshape(*stack, -1, *product.shape[-2:])
    moved = tapping.nested_vmap(tap.factors.restore, len(stack))(product)
    (restored,) = jax.linear_transpose(tap.use.move, jax.ShapeDtypeStruct(leaf.shape, moved.dtype))(moved)
    return restored.astype(leaf.dtype)


def _sum_examples_early(summands: jax.Array, weights: jax.Array, powers: _Powers) -> jax.Array:
    """Sums over examples before the sum over cotangents, unless a root is taken in between."""
    if powers.root is not None:
        return summands
    return jnp.tensordot(weights.astype(summands.dtype), summands, axes=1)


def _sum_examples_late(summed: jax.Array, weights: jax.Array, powers: _Powers) -> jax.Array:
    """Sums over examples after the sum over cotangents, if `_sum_examples_early` did not."""
    if powers.root is None:
        return summed
    return jnp.tensordot(weights.astype(summed.dtype), powers.root(summed), axes=1)
