"""The loops on a mesh: each step's batch is split over the devices, and the training state stays where it is.

A loop is computed on automatic axes: the compiler splits what follows from the batch, as in a user's own program.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lifelong_jax._meshes import AnyMesh, automatic, axes_of, find_placement, leading_axes, sharding_of
from lifelong_jax.types import Consolidation, Examples


class LoopShardings(NamedTuple):
    """How the arrays of a loop are sharded, over automatic axes of a mesh; hashable, for jit.

    Attributes:
      batch: how a batch's leading axis is sharded; None if the examples are whole on each device.
      state: how each array of the training state is sharded; None where it is not known.
    """

    batch: NamedSharding | None
    state: tuple[NamedSharding | None, ...]


def find_shardings(state: Any, examples: Examples) -> LoopShardings:
    """Finds how a loop's arrays are sharded: outside of jit from the arrays, inside of it from their types."""
    return LoopShardings(batch_sharding(examples), tuple(map(_known_sharding, jax.tree.leaves(state))))


def batch_sharding(examples: Examples) -> NamedSharding | None:
    """Returns the sharding of the examples' leading axis, over automatic axes; None if it is not sharded."""
    placement = find_placement(examples)
    if placement is None or not placement.axes:
        return None
    return NamedSharding(automatic(placement.mesh), PartitionSpec(placement.axes))


def _known_sharding(leaf: Any) -> NamedSharding | None:
    sharding = sharding_of(leaf)
    if sharding is None:
        return None
    kinds = set(sharding.mesh.axis_types)
    if isinstance(leaf, jax.core.Tracer) and kinds != {AxisType.Explicit}:  # its type does not name all axes
        return None
    return _canonical(NamedSharding(automatic(sharding.mesh), sharding.spec), jnp.ndim(leaf))


def _canonical(sharding: NamedSharding, ndim: int) -> NamedSharding:
    """Writes a sharding as it is written for what a compiled program returns, which is then not compiled again."""
    axes = list(sharding.spec)
    if AxisType.Explicit in sharding.mesh.axis_types:
        axes += [None] * (ndim - len(axes))
    else:
        while axes and axes[-1] is None:
            axes.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*axes), memory_kind=sharding.memory_kind)


def check_sharding_of_examples(sharding: Any) -> None:
    """Raises ValueError unless a sharding says how the axis of examples is sharded, and nothing else."""
    if not (isinstance(sharding, NamedSharding) and len(sharding.spec) <= 1):
        raise ValueError(
            f"sharding must say how the examples' axis is sharded, and nothing else, but is {sharding}: pass "
            f"jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))."
        )


def num_parts(sharding: NamedSharding | None) -> int:
    """Returns into how many parts a leading axis is split."""
    if sharding is None:
        return 1
    return math.prod(sharding.mesh.shape[name] for name in leading_axes(sharding.spec))


def round_up(size: int, sharding: NamedSharding | None) -> int:
    """Returns the smallest size of a batch, not below `size`, that can be split into equal parts."""
    parts = num_parts(sharding)
    return -(-size // parts) * parts


def take_split(examples: Examples, indices: jax.Array, sharding: NamedSharding | None) -> Examples:
    """Takes the rows of a batch from wherever they are, and splits them over the devices, inside of a loop.

    The rows are first whole on each device: otherwise the compiler splits the indices as well, and gathers them again.
    """
    rows = jax.tree.map(lambda leaf: leaf[indices], examples)
    if sharding is not None:
        rows = split(rows, NamedSharding(sharding.mesh, PartitionSpec(None)))
    return split(rows, sharding)


def split(batch: Examples, sharding: NamedSharding | None) -> Examples:
    """Splits the leading axis of a batch over the devices, inside of a loop."""
    if sharding is None:
        return batch

    def of_leaf(leaf: jax.Array) -> jax.Array:
        others = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        spec = PartitionSpec(*sharding.spec, *others)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(sharding.mesh, spec))

    return jax.tree.map(of_leaf, batch)


def make_whole(tree: Any, sharding: NamedSharding | None) -> Any:
    """Makes arrays whole on each device of the mesh that batches are split over, inside of a loop."""
    if sharding is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(sharding.mesh, PartitionSpec()))


def keep_shardings(state: Any, shardings: LoopShardings) -> Any:
    """Shards a new training state as the one before is, inside of a loop."""
    leaves, structure = jax.tree.flatten(state)
    kept = [
        leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)
        for leaf, sharding in zip(leaves, shardings.state, strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def sharding_of_runs(tree: Any) -> NamedSharding | None:
    """Returns a sharding over the axes of a mesh that no array of a tree is sharded over; None if there are none."""
    shardings = [sharding for sharding in map(sharding_of, jax.tree.leaves(tree)) if sharding is not None]
    if not shardings:
        return None
    used = {name for sharding in shardings for name in axes_of(sharding.spec)}
    free = tuple(name for name in shardings[0].mesh.axis_names if name not in used)
    return NamedSharding(automatic(shardings[0].mesh), PartitionSpec(free)) if free else None


def specs_of(tree: Any) -> Any:
    """Returns a tree of the `PartitionSpec` that the arrays' types name."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def onto_mesh_of(examples: Examples, tree: Any) -> Any:
    """Places arrays on the mesh of the examples, if these are on one."""
    placement = find_placement(examples)
    return tree if placement is None else onto_mesh(placement.mesh, tree)


def onto_mesh(mesh: AnyMesh, tree: Any) -> Any:
    """Places arrays whole on each device of a mesh, unless they are on one already."""

    def place(leaf: Any) -> jax.Array:
        sharding = sharding_of(leaf)
        if sharding is None:
            return _to_sharding(leaf, _canonical(NamedSharding(mesh, PartitionSpec()), jnp.ndim(leaf)))
        wanted = _canonical(sharding, leaf.ndim)
        return leaf if wanted == sharding else jax.device_put(leaf, wanted)

    return jax.tree.map(place, tree)


def _to_sharding(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        data = _to_sharding(jax.random.key_data(leaf), NamedSharding(sharding.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.device_put(np.asarray(leaf), sharding)  # to devices of other processes, from the host alone


def place_consolidation(examples: Examples, consolidation: Consolidation) -> Consolidation:
    """Shards an importance's diagonals as the anchor is, and places all else on the examples' mesh."""

    def place(leaf: Any, form: Any) -> Any:
        sharding = sharding_of(leaf)
        if sharding is None:
            return form
        # A form has arrays of other shapes too: Kronecker factors, scales of codes.
        is_like = lambda array: jnp.shape(array) == jnp.shape(leaf)  # noqa: E731
        return jax.tree.map(lambda array: _to_sharding(array, sharding) if is_like(array) else array, form)

    importance = jax.tree.map(place, consolidation.anchor, consolidation.importance)
    return onto_mesh_of(examples, consolidation._replace(importance=importance))
