"""Sums over examples of the Kronecker factors of each leaf's gradients, in one pass.

A tapped leaf's gradient is Σ_position row ⊗ column, with rows from the layer's input and columns from the cotangents at
its output. Its factors are sums of the outer products of rows, and of columns:

    A = Σ_n weights[n] · Σ_position row rowᵀ / num_positions        weight_sharing="expand"
    G = Σ_n weights[n] · Σ_cotangent Σ_position column columnᵀ

    A = Σ_n weights[n] · row rowᵀ,       row = the mean over positions          weight_sharing="reduce"
    G = Σ_n weights[n] · Σ_cotangent column columnᵀ,   column = the sum over positions

Both are exact for a single example with one position. A vector, such as a bias, is a matrix of one row. Its G is the
matrix of its whole gradients, which is exact. Other leaves keep the diagonal.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax._checks import first_example
from lifelong_jax._layouts import Layout, find_layout
from lifelong_jax._numerics import unbatched, varies, wide_dtype, widen
from lifelong_jax.importance import tapping
from lifelong_jax.importance.factors import Lookup
from lifelong_jax.importance.linearization import (
    columns_of,
    cotangents_at,
    find_biases,
    linearize,
    rows_of,
    sum_cotangents,
    tokens_of,
)
from lifelong_jax.importance.microbatches import ON_ONE_DEVICE, CotangentsFn, Spread, sum_microbatches
from lifelong_jax.importance.plan import Plan, Tap, default_microbatch_size, make_plan
from lifelong_jax.types import Example, Examples, Params

_MAX_BLOCKS = 8  # more would save little, and make the products narrow

WeightSharing: TypeAlias = Literal["expand", "reduce"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactorSums:
    """The sums of a leaf's factors: a matrix `[groups, size, size]` for each side, or its diagonal `[groups, size]`.

    Of a matrix, which is symmetric, only the entries on and above the diagonal count.
    """

    rows: jax.Array
    columns: jax.Array
    layout: Layout = dataclasses.field(metadata={"static": True})


def sum_over_examples(
    output_fn: Callable[[Params, Example], jax.Array],
    cotangents_fn: CotangentsFn,
    params: Params,
    examples: Examples,
    *,
    weight_sharing: WeightSharing,
    max_side: int,
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
    start: Params | None = None,
    spread: Spread = ON_ONE_DEVICE,
) -> Params:
    """Sums the factors of each leaf over examples; the other arguments are those of `reference.sum_over_examples`.

    Returns:
      A tree like `params`, with `FactorSums`, or the diagonal, an array, in the place of each leaf.
    """
    if varies((params, examples)):
        raise ValueError(
            "Kronecker factors cannot be computed inside of jax.shard_map where arrays vary over the mesh: call it "
            "with check_vma=False, or outside of it with sharded examples."
        )
    examples = jax.tree.map(jnp.asarray, examples)
    if microbatch_size is None:
        microbatch_size = default_microbatch_size(output_fn, cotangents_fn, params, first_example(examples))
    spread, microbatch_size = spread.fit(jax.tree.leaves(examples)[0].shape[0], microbatch_size)
    plan = make_plan(output_fn, params, first_example(examples))
    blocks = [_block(plan, number, leaf, max_side) for number, leaf in enumerate(jax.tree.leaves(params))]
    return sum_microbatches(
        functools.partial(_sum_microbatch, blocks, weight_sharing),
        functools.partial(_zeros, blocks),
        output_fn,
        cotangents_fn,
        params,
        examples,
        weights,
        microbatch_size,
        start,
        spread,
    )


class _Block(NamedTuple):
    """How the factors of a leaf are kept.

    Attributes:
      layout: how the leaf makes matrices.
      tap: how its gradients are factored; None for a vector, whose gradients are taken as a whole.
      full_rows: whether the side of the rows has a full matrix, not a diagonal.
      full_columns: whether the side of the columns has one.
    """

    layout: Layout
    tap: Tap | None
    full_rows: bool
    full_columns: bool


def _block(plan: Plan, number: int, leaf: jax.Array, max_side: int) -> _Block | None:
    """Returns a leaf's block, or None if it keeps the diagonal."""
    if leaf.size == 0:
        return None
    leaf_plan = plan.leaf_plans[number]
    tap = leaf_plan if isinstance(leaf_plan, Tap) else None
    is_lookup = tap is not None and isinstance(tap.factors, Lookup)
    indices = np.arange(leaf.size, dtype=np.int32).reshape(leaf.shape)
    matrices = None if is_lookup else _row_vectors(plan, number, indices)
    if matrices is not None:
        tap = None
    elif tap is not None:
        matrices = _matrices(tap, indices)
    layout = None if matrices is None else find_layout(matrices, leaf.shape)
    if layout is None:
        return None
    _, rows, columns = layout.matrices
    block = _Block(layout, tap, 1 < rows <= max_side and not is_lookup, 1 < columns <= max_side)
    return block if block.full_rows or block.full_columns else None


def _matrices(tap: Tap, indices: np.ndarray) -> np.ndarray:
    """Maps a tapped leaf to `[groups, rows, columns]`; see `structured._restore` for the way back."""
    factors, num_stacked = tap.factors, sum(tap.use.stacked)
    groups = 1 if isinstance(factors, Lookup) else factors.groups
    shape = (groups, factors.rows, factors.columns)
    with _known():
        moved = np.asarray(tap.use.move(jnp.asarray(indices)))
        places = np.asarray(factors.restore(jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)))
    moved = moved.reshape(math.prod(moved.shape[:num_stacked]), -1)
    matrices = np.empty_like(moved)
    matrices[:, places.ravel()] = moved
    return matrices.reshape(-1, *shape[1:])


@contextlib.contextmanager
def _known() -> Iterator[None]:
    """Computes at once what depends on no traced array, on one device, though this is traced for a mesh perhaps."""
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        yield


def _row_vectors(plan: Plan, number: int, indices: np.ndarray) -> np.ndarray | None:
    """Maps a vector, or a stack of a scan's vectors, to `[groups, 1, columns]`; returns None for other leaves."""
    use = tapping.find_use(plan.jaxpr.jaxpr, number)
    if isinstance(use, tapping.Use) and any(use.stacked):
        with _known():
            indices = np.asarray(use.move(jnp.asarray(indices)))
        stack, shape = np.split(indices.shape, [sum(use.stacked)])
        indices = indices.reshape(math.prod(stack), *(size for size in shape if size > 1))
        return indices[:, None, :] if indices.ndim == 2 else None
    return indices[None, None, :] if indices.ndim == 1 and not isinstance(use, tapping.Unused) else None


def _zeros(blocks: list[_Block | None], params: Params) -> Params:
    leaves, structure = jax.tree.flatten(params)

    def of_leaf(block: _Block | None, leaf: jax.Array) -> FactorSums | jax.Array:
        if block is None:
            return jnp.zeros(leaf.shape, wide_dtype(leaf))
        groups, rows, columns = block.layout.matrices
        row_shape = (groups, rows, rows) if block.full_rows else (groups, rows)
        column_shape = (groups, columns, columns) if block.full_columns else (groups, columns)
        dtype = wide_dtype(leaf)
        return FactorSums(jnp.zeros(row_shape, dtype), jnp.zeros(column_shape, dtype), block.layout)

    return jax.tree.unflatten(structure, map(of_leaf, blocks, leaves))


def _sum_microbatch(
    blocks: list[_Block | None],
    weight_sharing: WeightSharing,
    output_fn: Callable[[Params, Example], jax.Array],
    cotangents_fn: CotangentsFn,
    params: Params,
    examples: Examples,
    indices: jax.Array,
    weights: jax.Array,
) -> Params:
    plan = make_plan(output_fn, params, first_example(examples))
    taps = {number: block.tap for number, block in enumerate(blocks) if block is not None and block.tap is not None}
    over_examples = jax.vmap if indices.shape[0] > 1 else unbatched
    outputs, pull_back, operands = linearize(plan, taps, params, examples, over_examples, {}, weights)
    cotangents = over_examples(cotangents_fn)(outputs, indices)
    cotangent_at = cotangents_at(cotangents, over_examples)
    reduce = weight_sharing == "reduce"
    biases = find_biases(pull_back, cotangent_at(0), taps)
    biases = {number: tap for number, tap in biases.items() if blocks[number] is not None}

    def column_sums(cotangents: jax.Array) -> dict[int, jax.Array]:
        (pulled_back,) = pull_back(cotangents)
        others = {number: array for number, array in pulled_back.items() if number not in biases}
        return {number: of_leaf(number, widen(array)) for number, array in others.items()}

    def of_leaf(number: int, array: jax.Array) -> jax.Array:
        block = blocks[number]
        if block is None:
            return jnp.tensordot(weights.astype(array.dtype), jnp.square(array), axes=1)
        if number not in taps:
            return _outer(jax.vmap(block.layout.to_matrices)(array), weights, block.full_columns, None)
        columns = columns_of(taps[number], array)
        columns = jnp.sum(columns, 2, keepdims=True) if reduce else columns
        return _outer(columns, weights, block.full_columns, _precision(taps[number]))

    def row_sum(number: int, block: _Block, dtype: np.dtype) -> jax.Array:
        if number not in taps:
            return jnp.full((block.layout.matrices[0], 1), jnp.sum(weights), dtype)
        tap, operand = taps[number], operands[number]
        if isinstance(tap.factors, Lookup):
            return _count_tokens(tokens_of(tap, operand), weights.astype(dtype), tap.factors.rows, reduce)[None]
        rows, precision = widen(rows_of(tap, operand, dtype)), _precision(tap)
        if reduce:
            return _outer(jnp.mean(rows, axis=2, keepdims=True), weights, block.full_rows, precision)
        return _outer(rows, weights, block.full_rows, precision) / rows.shape[2]

    columns = sum_cotangents(column_sums, cotangent_at, cotangents.num, functools.partial(jax.tree.map, jnp.add))
    columns |= {number: columns[tap] for number, tap in biases.items()}
    sums, structure = jax.tree.flatten(_zeros(blocks, params), is_leaf=lambda node: isinstance(node, FactorSums))
    for number, of_columns in columns.items():
        block = blocks[number]
        found: FactorSums | jax.Array = of_columns
        if block is not None:
            found = FactorSums(row_sum(number, block, of_columns.dtype), of_columns, block.layout)
        sums[number] = jax.tree.map(lambda zero, array: array.astype(zero.dtype), sums[number], found)
    return jax.tree.unflatten(structure, sums)


def _precision(tap: Tap) -> Any:
    return None if isinstance(tap.factors, Lookup) else tap.factors.precision


def _outer(vectors: jax.Array, weights: jax.Array, full: bool, precision: Any) -> jax.Array:
    """Sums the outer products of vectors, `[num_examples, groups, positions, size]`, or only their diagonals.

    Of the matrices, only the blocks on and above the diagonal are computed; the others are 0.
    """
    weighted = weights.astype(vectors.dtype).reshape(-1, 1, 1, 1) * vectors
    if not full:
        return jnp.sum(weighted * vectors, axis=(0, 2))
    groups, size = vectors.shape[1], vectors.shape[3]
    left, right = (jnp.moveaxis(array, 1, 0).reshape(groups, -1, size) for array in (weighted, vectors))

    def products(start: int, end: int) -> jax.Array:
        rows, columns = left[:, :, start:end], right[:, :, start:]
        if groups == 1:  # a plain product: on a CPU, a batched one is slower, even with a batch of one
            return jnp.matmul(rows[0].T, columns[0], precision=precision)[None]
        return jnp.einsum("gmi,gmj->gij", rows, columns, precision=precision)

    bounds = np.linspace(0, size, 1 + max(1, min(_MAX_BLOCKS, size // 64))).astype(int).tolist()
    blocks = [jnp.pad(products(start, end), ((0, 0), (0, 0), (start, 0))) for start, end in itertools.pairwise(bounds)]
    return jnp.concatenate(blocks, axis=1)


def _count_tokens(tokens: jax.Array, weights: jax.Array, num_rows: int, reduce: bool) -> jax.Array:
    """Sums the squares of one-hot rows, for "expand" one by one, for "reduce" as means over an example's positions."""

    def of_example(tokens: jax.Array) -> jax.Array:
        return jnp.zeros(num_rows, weights.dtype).at[tokens].add(1, mode="drop")

    if reduce:
        return jnp.tensordot(weights, jnp.square(jax.vmap(of_example)(tokens) / tokens.shape[1]), axes=1)
    per_position = jnp.broadcast_to(weights[:, None] / tokens.shape[1], tokens.shape)
    return jnp.zeros(num_rows, weights.dtype).at[tokens].add(per_position, mode="drop")
