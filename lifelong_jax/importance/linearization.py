"""Evaluates all examples of a microbatch at once, and pulls cotangents back to the taps of a plan."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lifelong_jax.importance import tapping
from lifelong_jax.importance.cotangents import Cotangents
from lifelong_jax.importance.factors import Lookup
from lifelong_jax.importance.in_backward import Summing
from lifelong_jax.importance.plan import Plan, Tap
from lifelong_jax.types import Example, Examples, Params


def linearize(
    plan: Plan,
    taps: dict[int, Tap],
    params: Params,
    examples: Examples,
    over_examples: Callable,
    sums: dict[int, Summing],
    weights: jax.Array,
) -> tuple[Any, Callable[[jax.Array], tuple[dict[int, jax.Array]]], dict[int, jax.Array]]:
    """Evaluates all examples; returns the outputs, their pull-back, and the operands of the taps.

    The pull-back returns, for each leaf, the cotangents at its tap, or else the leaf's gradients per example. For a tap
    in `sums`, it returns the weighted sum over examples that is made within the backward pass, and there is no operand.
    """
    leaves = jax.tree.leaves(params)
    num_examples = jax.tree.leaves(examples)[0].shape[0]
    uses = {number: tap.use for number, tap in taps.items()}

    def outputs_and_operands(
        of_all: dict[int, jax.Array], differentiated: dict[int, jax.Array], example: Example, weight: jax.Array
    ) -> tuple[Any, dict]:
        def at_use(tap: int, output: jax.Array, operand: jax.Array, zeros: jax.Array) -> tuple[jax.Array, Any]:
            if tap in sums:
                return sums[tap].insert(output, operand, weight, zeros), None
            return tapping.add_zeros(tap, output, operand, zeros)

        zeros = {number: differentiated[number] for number in taps if number not in sums} | of_all
        arguments = [leaf if n in taps else differentiated.get(n, leaf) for n, leaf in enumerate(leaves)]
        arguments += jax.tree.leaves(example)
        outputs, operands = tapping.evaluate(plan.jaxpr.jaxpr, plan.jaxpr.consts, arguments, uses, zeros, at_use)
        return jax.tree.unflatten(plan.outputs, outputs), operands

    differentiated = {
        number: _tap_zeros(taps[number].use, num_examples)
        if number in taps
        else jnp.broadcast_to(leaves[number], (num_examples, *leaves[number].shape))
        for number, leaf_plan in enumerate(plan.leaf_plans)
        if not isinstance(leaf_plan, tapping.Unused) and number not in sums
    }
    of_all = {number: summing.zeros() for number, summing in sums.items()}

    def evaluate(differentiated: dict[int, jax.Array]) -> tuple[Any, dict]:
        per_example = {number: array for number, array in differentiated.items() if number not in sums}
        of_all = {number: differentiated[number] for number in sums}
        return over_examples(functools.partial(outputs_and_operands, of_all))(per_example, examples, weights)

    return jax.vjp(evaluate, differentiated | of_all, has_aux=True)


def cotangents_at(cotangents: Cotangents, over_examples: Callable) -> Callable[[jax.Array | int], jax.Array]:
    """Returns the function that makes the cotangents with one index, of all examples."""
    return lambda index: over_examples(lambda of_example: of_example.at(index))(cotangents)


def sum_cotangents(
    summands: Callable[[jax.Array], Any],
    cotangent_at: Callable[[jax.Array | int], jax.Array],
    num_cotangents: int,
    add: Callable[[Any, Any], Any],
) -> Any:
    """Sums over cotangents, one after the other: an array of cotangents × weights would not fit the cache."""
    if num_cotangents == 1:
        return summands(cotangent_at(0))
    shapes = jax.eval_shape(lambda: summands(cotangent_at(0)))
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # for derivatives: no array of cotangents × weights is held
    def add_next(total: Any, index: jax.Array) -> tuple[Any, None]:
        cotangent = cotangent_at(index)
        # Skips a cotangent that is 0 for all examples: that of a class outside of the head.
        return jax.lax.cond(jnp.any(cotangent != 0), lambda: add(total, summands(cotangent)), lambda: total), None

    total, _ = jax.lax.scan(add_next, start, jnp.arange(num_cotangents, dtype=jnp.int32))
    return total


def find_biases(
    pull_back: Callable[[jax.Array], tuple[dict[int, jax.Array]]], cotangent: jax.Array, taps: dict[int, Tap]
) -> dict[int, int]:
    """Finds each leaf whose gradient is the cotangents at a tap: the bias of the tapped layer. Returns leaf: tap.

    What is summed of both is then the same. In a loop over cotangents, XLA does not notice, and would compute it twice.
    """
    jaxpr, (pulled_back,) = jax.make_jaxpr(pull_back, return_shape=True)(cotangent)
    variables = jax.tree.unflatten(jax.tree.structure(pulled_back), jaxpr.jaxpr.outvars)
    taps_of_vectors = {
        variables[number]: number
        for number, tap in taps.items()
        if not isinstance(tap.factors, Lookup) and tap.positions == tap.groups == 1 and pulled_back[number].ndim == 2
    }
    return {
        number: taps_of_vectors[variable]
        for number, variable in variables.items()
        if number not in taps and variable in taps_of_vectors
    }


def _tap_zeros(use: tapping.Use, num_examples: int) -> jax.Array:
    outputs = use.equation.outvars[0].aval
    return jnp.zeros((num_examples, *use.lengths, *outputs.shape), outputs.dtype)


def tokens_of(tap: Tap, operand: jax.Array) -> jax.Array:
    """Maps the indices of a look-up to `[num_examples, positions]`."""
    tokens = tapping.nested_vmap(tap.factors.operand, 1 + len(tap.use.lengths))(operand)
    return tokens.reshape(operand.shape[0], tap.positions)


def rows_of(tap: Tap, operand: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Maps the other operand of a product to `[num_examples, groups, positions, rows]`."""
    rows = _grouped(tap, tap.factors.operand, operand)
    return rows if jnp.issubdtype(rows.dtype, jnp.floating) else rows.astype(dtype)  # integer inputs


def columns_of(tap: Tap, cotangents: jax.Array) -> jax.Array:
    """Maps the cotangents at a tap to `[num_examples, groups, positions, columns]`."""
    return _grouped(tap, tap.factors.cotangents, cotangents)


def _grouped(tap: Tap, factor: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
    """Maps `[num_examples, *lengths, ...]` to a factor of all scan steps, `[num_examples, groups, positions, ...]`."""
    factors = tapping.nested_vmap(factor, 1 + len(tap.use.lengths))(array)
    factors = factors.reshape(*array.shape[: 1 + len(tap.use.lengths)], -1, *factors.shape[-2:])
    stacked = [1 + axis for axis, stacks in enumerate(tap.use.stacked) if stacks]
    shared = [1 + axis for axis, stacks in enumerate(tap.use.stacked) if not stacks]
    group, position, entry = range(factors.ndim - 3, factors.ndim)
    factors = factors.transpose(0, *stacked, group, *shared, position, entry)
    return factors.reshape(array.shape[0], tap.groups, tap.positions, -1)
