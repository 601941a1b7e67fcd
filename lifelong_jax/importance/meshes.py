"""Sums over examples on a mesh: each device its own examples, and the result sharded as the parameters are.

An array says how it is sharded: outside of jit by itself, inside of it by its type, as far as axes are explicit. The
program depends on it:

- Examples that are sharded over axes which no parameter is sharded over: each shard sums its own (`jax.shard_map`), and
  one `psum` adds the shards at the end.
- Parameters that are sharded over the examples' axes too (FSDP): each microbatch has examples of all shards, and the
  compiler gathers each layer's weights where they are used, and scatters each layer's sum.
- The reference needs each example's gradient in full, so each shard sums its own, with whole parameters. The compiler
  gets gradients by a sharded kernel of a convolution wrong.
- Other axes (tensor-parallel parameters) are left to the compiler.
- Inside of a user's jit, on automatic axes, only the number of devices is known: microbatches then have examples of all
  of as many equal parts, which the compiler can leave where they are. The jits of the library's own loops know more
  (`_meshes.knowing`).
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from lifelong_jax._meshes import Layout, axes_of, on_automatic_axes_as
from lifelong_jax.importance.cotangents import Cotangents
from lifelong_jax.importance.microbatches import CotangentsFn, Spread
from lifelong_jax.types import Examples, Params


def sum_over_mesh(
    sum_over_examples: Callable[..., Any],
    layout: Layout | None,
    output_fn: Partial,
    cotangents_fn: Partial,
    params: Params,
    examples: Examples,
    weights: jax.Array | None,
    start: Any,
) -> Any:
    """Sums over examples, wherever they are.

    Args:
      sum_over_examples: `(output_fn, cotangents_fn, params, examples, weights=, start=, spread=) -> tree`. Without an
        argument `spread`, each shard sums its own examples with whole parameters, also where these are sharded.
      layout: where parameters and examples are.
      output_fn: a function of one example. It must not close over arrays of the mesh: a `jax.tree_util.Partial` has
        them as arguments.
      cotangents_fn: the same for the cotangents.
      params: a tree of floating-point arrays.
      examples: a tree of arrays `[num_examples, ...]`.
      weights: `[num_examples]`, or None for ones.
      start: what the sum starts from, or None for zeros.

    Returns:
      The sum. An array in the place of a leaf of `params` is sharded as the leaf is.
    """
    arguments = (output_fn, cotangents_fn, params, examples, weights, start)
    if layout is None:
        return sum_over_examples(*arguments[:-2], weights=weights, start=start)
    sum_shards = functools.partial(_sum_shards, sum_over_examples, layout)
    mesh = layout.mesh if isinstance(layout.mesh, jax.sharding.AbstractMesh) else layout.mesh.abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        return on_automatic_axes_as(params, sum_shards, arguments)


def _sum_shards(sum_over_examples: Callable[..., Any], layout: Layout, *arguments: Any) -> Any:
    takes_spread = "spread" in inspect.signature(sum_over_examples).parameters
    of_params = {name for spec in layout.specs if spec is not None for name in axes_of(spec)} if takes_spread else set()
    by_hand = tuple(name for name in layout.axes if name not in of_params)
    by_compiler = tuple(name for name in layout.axes if name in of_params)
    num_shards = math.prod(layout.mesh.shape[name] for name in by_compiler)
    like_params = Spread(specs=layout.specs)
    specs = () if set(by_hand) == set(layout.mesh.axis_names) else layout.specs  # no axis is left to shard a sum over
    spread = Spread(num_shards if layout.axes else layout.num_parts, by_compiler, specs)
    options = {"spread": spread} if takes_spread else {}

    def sum_here(*arguments: Any) -> Any:
        *functions_and_data, weights, start = arguments
        return sum_over_examples(*functions_and_data, weights=weights, start=start, **options)

    def sum_shard(*arguments: Any) -> Any:
        output_fn, cotangents_fn, params, examples, weights, start = arguments
        shard = jax.lax.axis_index(by_hand)
        numbered = Partial(_numbered_from, cotangents_fn, shard * jax.tree.leaves(examples)[0].shape[0])
        start = jax.tree.map(lambda leaf: jnp.where(shard == 0, leaf, 0), start)  # it is added once
        return jax.lax.psum(sum_here(output_fn, numbered, params, examples, weights, start), by_hand)

    params = arguments[2]
    if not by_hand:
        return like_params.place_sum(params, sum_here(*arguments))
    replicated, by_shard = PartitionSpec(), PartitionSpec(by_hand)
    sum_all = jax.shard_map(
        sum_shard,
        in_specs=(replicated, replicated, replicated, by_shard, by_shard, replicated),
        out_specs=replicated,
        axis_names=set(by_hand),
        check_vma=False,  # each shard differentiates with respect to its own copy of the parameters
    )
    return like_params.place_sum(params, sum_all(*arguments))


def _numbered_from(cotangents_fn: CotangentsFn, first: jax.Array, outputs: jax.Array, index: jax.Array) -> Cotangents:
    return cotangents_fn(outputs, first + index)
