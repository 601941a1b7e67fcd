"""How arrays say that they are sharded: outside of jit by themselves, inside of it by their types.

Types name only the explicit axes of a mesh. So what is inside of a user's jit, on automatic axes, says nothing.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

AnyMesh: TypeAlias = Mesh | AbstractMesh


class Placement(NamedTuple):
    """Where examples are: over which axes of which mesh they are sharded along their leading axis; hashable, for jit.

    Attributes:
      mesh: the mesh.
      axes: the names of the axes; none if the examples are whole on each device.
    """

    mesh: AnyMesh
    axes: tuple[str, ...]


def sharding_of(leaf: Any) -> NamedSharding | None:
    """Returns the sharding that an array, or its type, names; None if it is on no mesh, or does not say."""
    if not isinstance(leaf, jax.Array):
        return None
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else leaf.sharding
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def find_placement(examples: Any) -> Placement | None:
    """Finds where a tree of examples `[num_examples, ...]` is; None if no array is on a mesh."""
    shardings = [sharding for sharding in map(sharding_of, jax.tree.leaves(examples)) if sharding is not None]
    if not shardings:
        return None
    for sharding in shardings:
        axes = leading_axes(sharding.spec)
        if axes:
            return Placement(sharding.mesh, axes)
    return Placement(shardings[0].mesh, ())


def leading_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """Returns the names of the axes of a mesh over which an array's leading axis is sharded."""
    first = spec[0] if len(spec) else None
    if first is None or first is PartitionSpec.UNCONSTRAINED:
        return ()
    return first if isinstance(first, tuple) else (first,)


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """Returns the names of all axes of a mesh that an array is sharded over."""
    names: list[str] = []
    for entry in spec:
        if entry is not None and entry is not PartitionSpec.UNCONSTRAINED:
            names += entry if isinstance(entry, tuple) else (entry,)
    return tuple(names)
