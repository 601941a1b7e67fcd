"""Sums over examples where the types of arrays say how they are sharded: over the explicit axes of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from lifelong_jax._numerics import is_sharded
from lifelong_jax.importance.cotangents import Cotangents
from lifelong_jax.importance.microbatches import CotangentsFn
from lifelong_jax.types import Examples, Params


def sum_over_mesh(
    sum_over_examples: Callable[..., Any],
    output_fn: Partial,
    cotangents_fn: Partial,
    params: Params,
    examples: Examples,
    weights: jax.Array | None,
    start: Any,
) -> Any:
    """Sums over examples, wherever the types of arrays say that they are (`jax.make_mesh` makes such meshes).

    If the examples are sharded over their leading axis, each shard sums its own, with parameters that are whole over
    those axes of the mesh, and one `psum` adds the shards. All else is left to the compiler, as in an automatic mesh.

    Args:
      sum_over_examples: `(output_fn, cotangents_fn, params, examples, weights=weights, start=start) -> tree`.
      output_fn: a function of one example. It must not close over arrays of the mesh: a `jax.tree_util.Partial` has
        them as arguments.
      cotangents_fn: the same for the cotangents.
      params: a tree of floating-point arrays.
      examples: a tree of arrays `[num_examples, ...]`.
      weights: `[num_examples]`, or None for ones.
      start: what the sum starts from, or None for zeros.

    Returns:
      The sum. An array in the place of a leaf of `params` is sharded as the leaf is; other arrays are replicated.
    """
    arguments = (output_fn, cotangents_fn, params, examples, weights, start)
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arguments) if is_sharded(leaf)]
    if not meshes:
        return sum_over_examples(*arguments[:-2], weights=weights, start=start)
    axes = _axes_of_examples((examples, weights))

    def sum_shard(*arguments: Any) -> Any:
        output_fn, cotangents_fn, params, examples, weights, start = arguments
        shard = jax.lax.axis_index(axes)
        numbered = Partial(_numbered_from, cotangents_fn, shard * jax.tree.leaves(examples)[0].shape[0])
        start = jax.tree.map(lambda leaf: jnp.where(shard == 0, leaf, 0), start)  # it is added once
        total = sum_over_examples(output_fn, numbered, params, examples, weights=weights, start=start)
        return jax.lax.psum(total, axes)

    def sum_shards(*arguments: Any) -> Any:
        if not axes:
            return sum_over_examples(*arguments[:-2], weights=arguments[-2], start=arguments[-1])
        replicated, by_shard = PartitionSpec(), PartitionSpec(axes)
        return jax.shard_map(
            sum_shard,
            in_specs=(replicated, replicated, replicated, by_shard, by_shard, replicated),
            out_specs=replicated,
            axis_names=set(axes),
            check_vma=False,  # each shard differentiates with respect to its own copy of the parameters
        )(*arguments)

    with jax.sharding.use_abstract_mesh(meshes[0]):
        total = jax.eval_shape(jax.sharding.auto_axes(sum_shards, out_sharding=PartitionSpec()), *arguments)
        specs = jax.tree.map(_spec, params, total)
        return jax.sharding.auto_axes(sum_shards, out_sharding=specs)(*arguments)


def _axes_of_examples(examples: tuple[Examples, jax.Array | None]) -> tuple[str, ...]:
    """Returns the axes of the mesh over which the examples or the weights are sharded along their leading axis."""
    for leaf in jax.tree.leaves(examples):
        spec = jax.typeof(leaf).sharding.spec
        if spec and spec[0] is not None:
            return spec[0] if isinstance(spec[0], tuple) else (spec[0],)
    return ()


def _numbered_from(cotangents_fn: CotangentsFn, first: jax.Array, outputs: jax.Array, index: jax.Array) -> Cotangents:
    return cotangents_fn(outputs, first + index)


def _spec(leaf: jax.Array, total: Any) -> Any:
    if isinstance(total, jax.ShapeDtypeStruct):
        return jax.typeof(leaf).sharding.spec
    return jax.tree.map(lambda _: PartitionSpec(), total)
