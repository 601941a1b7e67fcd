"""The sums of `per_example.py`, exactly, at about the cost of one gradient, for any JAX function.

One example's gradient of a dense layer is an outer product of the layer's input and the cotangents at its output.
Squares and absolute values are multiplicative, so their sums over examples are products of matrices:

    Σ_n (input_n ⊗ cotangent_n)² = (input²)ᵀ cotangent²

and no array of examples × weights is ever made. Where an example has several positions (tokens, pixels), its gradient
is a sum over them, which comes before the square: a product of matrices per example, as cheap as in an ordinary
gradient.

`tapping.py` finds such layers in the jaxpr of the function of one example and reads their inputs and cotangents;
`factors.py` says how they multiply. Every other leaf (biases, scales, leaves used twice, leaves inside loops) goes by
its own gradient per example. Both ways are exact, so nothing depends on which is found, but time and memory: `explain`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from lifelong_jax import per_example, tapping
from lifelong_jax.factors import Lookup, Product, find_factors
from lifelong_jax.per_example import CotangentsFn, Reduction, widen, zeros_like_sum
from lifelong_jax.types import Example, Examples, Params


class LeafRule(NamedTuple):
    """The way that one leaf's importance is computed, and what it costs.

    Attributes:
      leaf: the leaf's path in the tree of parameters.
      shape: its shape.
      rule: "outer" (no gradient per example is made), "product" (one product of matrices per example), "lookup" (rows
        of a table), "gradient" (differentiated per example as it is), or "unused".
      reason: the equation that uses the leaf, or why none of the rules holds.
      multiply_adds: per example and cotangent, for the leaf's own gradient; None where it is not known.
      floats: held per example.
    """

    leaf: str
    shape: tuple[int, ...]
    rule: str
    reason: str
    multiply_adds: int | None
    floats: int


class Explanation(tuple):
    """A tuple of `LeafRule`, one for each leaf, that prints as a table."""

    def __str__(self) -> str:
        """Returns the table, in Markdown."""
        rows = [
            (rule.leaf, str(rule.shape), rule.rule, rule.reason, _thousands(rule.multiply_adds), f"{rule.floats:,}")
            for rule in self
        ]
        header = ("leaf", "shape", "rule", "reason", "multiply-adds", "floats held")
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [header, tuple("-" * width for width in widths), *rows]
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        )

    __repr__ = __str__


def explain(output_fn: Callable[[Params, Example], jax.Array], params: Params, example: Example) -> Explanation:
    """Says by which rule each leaf of the parameters goes, why, and what it costs.

    Args:
      output_fn: `output_fn(params, example) -> outputs`, of one example, as for any importance.
      params: a tree of floating-point arrays.
      example: one example, without example axis: arrays, or `jax.ShapeDtypeStruct`s.

    Returns:
      A tuple of `LeafRule`, one for each leaf, in the order of `jax.tree.leaves(params)`; it prints as a table.

    Example:
      >>> dense = lambda params, x: x @ params["kernel"] + params["bias"]
      >>> params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}
      >>> explain(dense, params, jnp.zeros(2))
      | leaf       | shape  | rule     | reason      | multiply-adds | floats held |
      | ---------- | ------ | -------- | ----------- | ------------- | ----------- |
      | ['bias']   | (3,)   | gradient | used by add |               | 3           |
      | ['kernel'] | (2, 3) | outer    | dense       | 6             | 5           |
    """
    plan = _plan(output_fn, params, example)
    leaves = jax.tree.leaves_with_path(params)
    return Explanation(
        _rule(jax.tree_util.keystr(path), leaf.shape, way) for (path, leaf), way in zip(leaves, plan.ways, strict=True)
    )


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

    It computes what `per_example.sum_over_examples` does, of which see the arguments and the result.

    Example:
      >>> dense = lambda params, x: x @ params
      >>> once = lambda outputs, index: jnp.ones((1, 1))
      >>> examples = jnp.array([[1.0, 2.0], [3.0, -4.0]])
      >>> sum_over_examples(dense, once, jnp.zeros((2, 1)), examples, reduction="sum_of_squares").ravel()
      Array([10., 20.], dtype=float32)
    """
    examples = jax.tree.map(jnp.asarray, examples)
    if microbatch_size is None:
        microbatch_size = default_microbatch_size(output_fn, cotangents_fn, params, _first_example(examples))
    sum_microbatch = functools.partial(_sum_microbatch, reduction)
    return per_example.sum_microbatches(
        sum_microbatch, output_fn, cotangents_fn, params, examples, weights, microbatch_size
    )


def default_microbatch_size(
    output_fn: Callable[[Params, Example], jax.Array], cotangents_fn: CotangentsFn, params: Params, example: Example
) -> int:
    """Chooses how many examples to take together from the backend and from shapes alone.

    On a CPU, as many as make products of 512 rows, which measured fastest or close to it for convolutions and
    transformers (`benchmarks/importance.py`), or of 1,024 where no weight is used at several positions, as in a dense
    network on vectors. Elsewhere a rule of thumb. Fewer, where what is held per example would not fit: gradients,
    and cotangents, of which an exact Fisher has almost `outputs.size`, each as large as the outputs.

    Args:
      output_fn: `output_fn(params, example) -> outputs`.
      cotangents_fn: `cotangents_fn(outputs, index) -> [num_cotangents, *outputs.shape]`.
      params: a tree of arrays, or of shapes and dtypes.
      example: the same for one example.

    Returns:
      The microbatch size, at least 1.
    """
    plan = _plan(output_fn, params, example)
    taps = [way for way in plan.ways if isinstance(way, _Tap)]
    leaves = jax.tree.leaves(params)
    positions = max((tap.positions for tap in taps), default=1)
    positions_at_once = max((tap.factors.positions for tap in taps), default=1)
    # What is held per example at the worst: the gradients of all but outer products.
    held = sum(leaf.size for leaf, way in zip(leaves, plan.ways, strict=True) if getattr(way, "positions", 2) > 1)
    outputs = jax.tree.unflatten(plan.outputs, map(_shape_and_dtype, plan.jaxpr.out_avals))
    cotangent_floats = jax.eval_shape(cotangents_fn, outputs, jax.ShapeDtypeStruct((), np.int32)).size
    if jax.default_backend() != "cpu":
        return max(1, min(1024, 2**16 // positions, 2**28 // max(1, held, cotangent_floats)))
    # Matrices that are differentiated per example cost batched products, which are slow here.
    matrices = sum(
        leaf.size
        for leaf, way in zip(leaves, plan.ways, strict=True)
        if isinstance(way, tapping.Opaque) and leaf.ndim > 1
    )
    rows = 1024 if positions == 1 else 512
    fitting = min(2**24 // max(1, held), 2**26 // max(1, cotangent_floats), 2**17 // max(1, matrices))
    return max(1, min(rows // positions_at_once, 2048 // positions, fitting))


class _Tap(NamedTuple):
    use: tapping.Use
    factors: Product | Lookup  # of one step of the scans around
    groups: int  # in all: steps of scans over stacked layers are groups, ...
    positions: int  # ... and steps that share one weight are positions


_Way: TypeAlias = _Tap | tapping.Unused | tapping.Opaque


class _Plan(NamedTuple):
    jaxpr: ClosedJaxpr
    outputs: Any  # the structure of the outputs
    ways: tuple[_Way, ...]  # one for each leaf


def _plan(output_fn: Callable[[Params, Example], jax.Array], params: Params, example: Example) -> _Plan:
    params, example = jax.tree.map(_shape_and_dtype, (params, example))
    jaxpr, outputs = tapping.trace(output_fn, params, example)
    return _Plan(jaxpr, outputs, tuple(_way(jaxpr, number) for number in range(len(jax.tree.leaves(params)))))


def _way(jaxpr: ClosedJaxpr, argument: int) -> _Way:
    use = tapping.find_use(jaxpr.jaxpr, argument)
    if not isinstance(use, tapping.Use):
        return use
    factors = find_factors(use)
    if isinstance(factors, str):
        return tapping.Opaque(factors)
    if 0 in use.lengths:
        return tapping.Opaque("empty")
    steps = [
        math.prod(n for n, s in zip(use.lengths, use.stacked, strict=True) if s is stacks) for stacks in (True, False)
    ]
    if isinstance(factors, Lookup):
        if any(use.stacked):
            return tapping.Opaque("a look-up in a stack of tables")
        return _Tap(use, factors, 1, factors.positions * steps[1])
    return _Tap(use, factors, factors.groups * steps[0], factors.positions * steps[1])


def _first_example(examples: Examples) -> Example:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples)


def _shape_and_dtype(leaf: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(leaf, "dtype"):  # a Python number
        leaf = jnp.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


class _Powers(NamedTuple):
    """An example contributes `root(Σ_cotangents entry(gradient))`; a factor common to all, `shared(factor)` times."""

    entry: Callable[[jax.Array], jax.Array]
    shared: Callable[[jax.Array], jax.Array]
    root: Callable[[jax.Array], jax.Array] | None  # None where there is none to take


def _powers(reduction: Reduction, num_cotangents: int) -> _Powers:
    if reduction == "sum_of_squares":
        return _Powers(jnp.square, jnp.square, None)
    if num_cotangents == 1:  # a root of a square would underflow
        return _Powers(jnp.abs, jnp.abs, None)
    return _Powers(jnp.square, jnp.abs, jnp.sqrt)


def _sum_microbatch(
    reduction: Reduction,
    output_fn: Callable[[Params, Example], jax.Array],
    cotangents_fn: CotangentsFn,
    params: Params,
    examples: Examples,
    indices: jax.Array,
    weights: jax.Array,
) -> Params:
    plan = _plan(output_fn, params, _first_example(examples))
    leaves, structure = jax.tree.flatten(params)
    num_examples = indices.shape[0]
    over_examples = jax.vmap if num_examples > 1 else _alone
    taps = {number: way for number, way in enumerate(plan.ways) if isinstance(way, _Tap)}
    uses = {number: tap.use for number, tap in taps.items()}

    def outputs_and_operands(differentiated: dict[int, jax.Array], example: Example) -> tuple[Any, dict]:
        zeros = {number: differentiated[number] for number in taps}
        arguments = [leaf if n in taps else differentiated.get(n, leaf) for n, leaf in enumerate(leaves)]
        arguments += jax.tree.leaves(example)
        outputs, operands = tapping.evaluate(plan.jaxpr.jaxpr, plan.jaxpr.consts, arguments, uses, zeros)
        return jax.tree.unflatten(plan.outputs, outputs), operands

    differentiated = {
        number: _zeros(way.use, num_examples)
        if isinstance(way, _Tap)
        else jnp.broadcast_to(leaves[number], (num_examples, *leaves[number].shape))
        for number, way in enumerate(plan.ways)
        if not isinstance(way, tapping.Unused)
    }
    outputs, pull_back, operands = jax.vjp(
        lambda differentiated: over_examples(outputs_and_operands)(differentiated, examples),
        differentiated,
        has_aux=True,
    )
    cotangents = jnp.moveaxis(over_examples(cotangents_fn)(outputs, indices), 1, 0)
    powers = _powers(reduction, cotangents.shape[0])
    twins = _find_twins(pull_back, cotangents[0], taps) if cotangents.shape[0] > 1 else {}

    def entries(cotangents: jax.Array) -> dict[int, jax.Array]:
        (pulled_back,) = pull_back(cotangents)
        return {
            number: _tap_entries(taps[number], operands[number], array, weights, powers)
            if number in taps
            else _weigh_unless_rooted(powers.entry(widen(array)), weights, powers)
            for number, array in pulled_back.items()
            if number not in twins
        }

    if cotangents.shape[0] == 1:
        total = entries(cotangents[0])
    else:  # one after the other: an array of cotangents × weights would leave the cache
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(entries, cotangents[0]))

        def add(total: dict[int, jax.Array], cotangent: jax.Array) -> tuple[dict[int, jax.Array], None]:
            # It is 0 for all examples where it belongs to a class outside of the head.
            return jax.lax.cond(
                jnp.any(cotangent != 0),
                lambda: jax.tree.map(jnp.add, total, entries(cotangent)),
                lambda: total,
            ), None

        total, _ = jax.lax.scan(add, start, cotangents)

    for number, tap in twins.items():
        total[number] = _weigh_unless_rooted(total[tap][:, 0], weights, powers)
    results = jax.tree.leaves(zeros_like_sum(params))
    for number, summed in total.items():
        if number in taps:
            gradient = _finish_tap(taps[number], operands[number], summed, weights, powers)
            results[number] = _restore(taps[number], gradient, results[number])
        else:
            results[number] = _finish(summed, weights, powers)
    return jax.tree.unflatten(structure, results)


def _find_twins(
    pull_back: Callable[[jax.Array], tuple[dict[int, jax.Array]]], cotangent: jax.Array, taps: dict[int, _Tap]
) -> dict[int, int]:
    """Finds the leaves whose gradients are the very cotangents of a tap, `[num_examples, columns]`: a layer's bias.

    In a loop over cotangents XLA would not see that both sums of squares are one, and spend as long on the second.
    """
    jaxpr, (pulled_back,) = jax.make_jaxpr(pull_back, return_shape=True)(cotangent)
    variables = jax.tree.unflatten(jax.tree.structure(pulled_back), jaxpr.jaxpr.outvars)
    vectors = {
        variables[number]: number
        for number, tap in taps.items()
        if not isinstance(tap.factors, Lookup) and tap.positions == tap.groups == 1 and pulled_back[number].ndim == 2
    }
    return {n: vectors[variable] for n, variable in variables.items() if n not in taps and variable in vectors}


def _alone(function: Callable) -> Callable:
    """Maps over an axis of one without that axis: on a CPU, XLA's batched products are tens of times slower."""

    def mapped(*arguments: Any) -> Any:
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], arguments)))

    return mapped


def _zeros(use: tapping.Use, num_examples: int) -> jax.Array:
    outputs = use.equation.outvars[0].aval
    return jnp.zeros((num_examples, *use.lengths, *outputs.shape), outputs.dtype)


def _tap_entries(
    tap: _Tap, operand: jax.Array, cotangents: jax.Array, weights: jax.Array, powers: _Powers
) -> jax.Array:
    """What is summed over cotangents: the entries of the factor that they change, or else of the gradients."""
    if isinstance(tap.factors, Lookup):
        rows = widen(_grouped(tap, tap.factors.cotangents, cotangents)[:, 0])
        return powers.entry(_sum_equal_tokens(_tokens(tap, operand), rows))
    if tap.positions == 1:
        return powers.entry(widen(_grouped(tap, tap.factors.cotangents, cotangents)[:, :, 0]))

    def gradients(operand: jax.Array, cotangents: jax.Array) -> jax.Array:
        return jnp.einsum(
            "ngpr,ngpc->ngrc",
            _operand(tap, operand, cotangents.dtype),
            _grouped(tap, tap.factors.cotangents, cotangents),
            precision=tap.factors.precision,
            preferred_element_type=widen(cotangents).dtype,
        )

    if jax.default_backend() != "cpu" or powers.root is not None:
        return _weigh_unless_rooted(powers.entry(gradients(operand, cotangents)), weights, powers)

    def add(total: jax.Array, one: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        operand, cotangents, weight = one
        return total + weight.astype(total.dtype) * powers.entry(gradients(operand[None], cotangents[None])[0]), None

    shape = jax.eval_shape(gradients, operand[:1], cotangents[:1])
    total, _ = jax.lax.scan(add, jnp.zeros(shape.shape[1:], shape.dtype), (operand, cotangents, weights))
    return total


def _finish_tap(tap: _Tap, operand: jax.Array, summed: jax.Array, weights: jax.Array, powers: _Powers) -> jax.Array:
    """Sums over examples, to `[groups, rows, columns]`."""
    if not isinstance(tap.factors, Lookup) and tap.positions > 1:
        return _finish(summed, weights, powers)
    if powers.root is not None:
        summed = powers.root(summed)
    weights = weights.astype(summed.dtype).reshape(-1, 1, 1)
    if isinstance(tap.factors, Lookup):
        table = jnp.zeros((tap.factors.rows, tap.factors.columns), summed.dtype)
        return table.at[_tokens(tap, operand)].add(weights * summed, mode="drop")
    # The weights go to the input's factor: that of the cotangents is the bias's, too, and is computed once.
    shared = weights * powers.shared(widen(_operand(tap, operand, summed.dtype)[:, :, 0]))
    if shared.shape[1] == 1:  # one plain product: on a CPU, batched ones are slower, even with a batch of one
        return jnp.matmul(shared[:, 0].T, summed[:, 0], precision=tap.factors.precision)[None]
    return jnp.einsum("ngr,ngc->grc", shared, summed, precision=tap.factors.precision)


def _sum_equal_tokens(tokens: jax.Array, cotangents: jax.Array) -> jax.Array:
    """Sums within an example the rows of equal tokens into the first of them, and leaves 0 in the others."""
    equal = tokens[:, :, None] == tokens[:, None, :]
    first = jnp.argmax(equal, axis=-1) == jnp.arange(tokens.shape[1])
    return jnp.einsum("npq,nqc->npc", (equal & first[:, :, None]).astype(cotangents.dtype), cotangents)


def _tokens(tap: _Tap, operand: jax.Array) -> jax.Array:
    tokens = tapping.nested_vmap(tap.factors.operand, 1 + len(tap.use.lengths))(operand)
    return tokens.reshape(operand.shape[0], tap.positions)


def _operand(tap: _Tap, operand: jax.Array, dtype: jnp.dtype) -> jax.Array:
    grouped = _grouped(tap, tap.factors.operand, operand)
    return grouped if jnp.issubdtype(grouped.dtype, jnp.floating) else grouped.astype(dtype)  # integer inputs


def _grouped(tap: _Tap, factor: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
    """Maps `[num_examples, *lengths, ...]` to the factor in all, `[num_examples, groups, positions, ...]`."""
    factors = tapping.nested_vmap(factor, 1 + len(tap.use.lengths))(array)
    factors = factors.reshape(*array.shape[: 1 + len(tap.use.lengths)], -1, *factors.shape[-2:])
    stacked = [1 + axis for axis, stacks in enumerate(tap.use.stacked) if stacks]
    shared = [1 + axis for axis, stacks in enumerate(tap.use.stacked) if not stacks]
    group, position, entry = range(factors.ndim - 3, factors.ndim)
    factors = factors.transpose(0, *stacked, group, *shared, position, entry)
    return factors.reshape(array.shape[0], tap.groups, tap.positions, -1)


def _restore(tap: _Tap, gradient: jax.Array, leaf: jax.Array) -> jax.Array:
    """Moves `[groups, rows, columns]` to where the leaf has its entries."""
    stack = [length for length, stacks in zip(tap.use.lengths, tap.use.stacked, strict=True) if stacks]
    if stack:
        gradient = gradient.reshape(*stack, -1, *gradient.shape[1:])
    moved = tapping.nested_vmap(tap.factors.restore, len(stack))(gradient)
    (restored,) = jax.linear_transpose(tap.use.move, jax.ShapeDtypeStruct(leaf.shape, moved.dtype))(moved)
    return restored.astype(leaf.dtype)


def _weigh_unless_rooted(contributions: jax.Array, weights: jax.Array, powers: _Powers) -> jax.Array:
    if powers.root is not None:
        return contributions
    return jnp.tensordot(weights.astype(contributions.dtype), contributions, axes=1)


def _finish(summed: jax.Array, weights: jax.Array, powers: _Powers) -> jax.Array:
    if powers.root is None:
        return summed
    return jnp.tensordot(weights.astype(summed.dtype), powers.root(summed), axes=1)


def _rule(leaf: str, shape: tuple[int, ...], way: _Way) -> LeafRule:
    if isinstance(way, tapping.Unused):
        return LeafRule(leaf, shape, "unused", "", 0, 0)
    if isinstance(way, tapping.Opaque):
        return LeafRule(leaf, shape, "gradient", way.reason, None, math.prod(shape))
    factors = way.factors
    size = way.groups * factors.rows * factors.columns
    if isinstance(factors, Lookup):
        floats = way.positions * factors.columns
        return LeafRule(leaf, shape, "lookup", "embedding", way.positions * floats, floats)
    if way.positions == 1:
        return LeafRule(leaf, shape, "outer", factors.name, size, way.groups * (factors.rows + factors.columns))
    return LeafRule(leaf, shape, "product", factors.name, size * way.positions, size)


def _thousands(count: int | None) -> str:
    return "" if count is None else f"{count:,}"
