"""How arrays say that they are sharded: outside of jit by themselves, inside of it by their types.

Types name only the explicit axes of a mesh. So what is inside of a user's jit, on automatic axes, says nothing.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

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
    return axes_of(PartitionSpec(*tuple(spec)[:1]))


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """Returns the names of all axes of a mesh that an array is sharded over."""
    names: list[str] = []
    for entry in spec:
        if entry is not None and entry is not PartitionSpec.UNCONSTRAINED:
            names += entry if isinstance(entry, tuple) else (entry,)
    return tuple(names)


def check_places(**arguments: Any) -> None:
    """Raises ValueError, naming two arrays, unless all that have a place are on the same devices, and on one mesh.

    What is whole on each device of a mesh with automatic axes may be on any mesh of these devices. Within a function
    that is being traced, nothing is checked: an array whose place is known there is a constant.
    """
    leaves = [
        (name + jax.tree_util.keystr(path), leaf)
        for name, tree in arguments.items()
        for path, leaf in jax.tree.leaves_with_path(tree)
        if isinstance(leaf, jax.Array)
    ]
    if any(isinstance(leaf, jax.core.Tracer) for _, leaf in leaves):
        return
    placed = [(name, leaf.sharding) for name, leaf in leaves if leaf.committed]
    on_one_mesh: list[tuple[str, Any]] = [place for place in placed if _names_its_mesh(place[1])]
    apart = [(place, placed[0]) for place in placed if place[1].device_set != placed[0][1].device_set]
    apart += [(place, on_one_mesh[0]) for place in on_one_mesh if place[1].mesh != on_one_mesh[0][1].mesh]
    if apart:
        (name, sharding), (other, wanted) = apart[0]
        raise ValueError(
            f"{name} is on {_describe(sharding)}, but {other} is on {_describe(wanted)}: place all arrays on one mesh, "
            f"by jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())) where each "
            f"device needs all of an array."
        )


def _names_its_mesh(sharding: Any) -> bool:
    if not isinstance(sharding, NamedSharding):
        return False
    return bool(axes_of(sharding.spec)) or AxisType.Explicit in sharding.mesh.axis_types


def _describe(sharding: Any) -> str:
    numbers = sorted(device.id for device in sharding.device_set)
    devices = f"device {numbers[0]}" if len(numbers) == 1 else f"devices {numbers[0]} to {numbers[-1]}"
    return f"{devices}, in {sharding.mesh}" if isinstance(sharding, NamedSharding) else devices


class Layout(NamedTuple):
    """Where parameters and examples are; hashable, for jit.

    Attributes:
      mesh: the mesh.
      axes: the names of the axes over which the examples are sharded along their leading axis.
      specs: how each leaf of the parameters is sharded; None where that is not known.
      num_parts: into how many parts the compiler may split a microbatch if the examples say nothing.
    """

    mesh: AnyMesh
    axes: tuple[str, ...]
    specs: tuple[PartitionSpec | None, ...]
    num_parts: int


def find_layout(params: Any, examples: Any, others: Any) -> Layout | None:
    """Finds where parameters, examples with their weights, and other arrays are; None if they are on no mesh.

    Within `knowing`, it is the layout that is known there.
    """
    known = _known.get()
    if known is not None:
        num_leaves = len(jax.tree.leaves(params))
        return known if len(known.specs) == num_leaves else known._replace(specs=(None,) * num_leaves)
    of_examples = find_placement(examples)
    placement = of_examples or find_placement((params, others))
    if placement is None:
        return None
    axes = () if of_examples is None else of_examples.axes
    num_parts = 1
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(examples)):
        types = zip(placement.mesh.axis_sizes, placement.mesh.axis_types, strict=True)
        num_parts = math.prod(size for size, kind in types if kind == AxisType.Auto)
    return Layout(placement.mesh, axes, tuple(map(_spec_of, jax.tree.leaves(params))), num_parts)


def on_automatic(layout: Layout | None) -> Layout | None:
    """Returns a layout on automatic axes of its mesh."""
    return None if layout is None else layout._replace(mesh=automatic(layout.mesh))


def automatic(mesh: AnyMesh) -> AnyMesh:
    """Returns a mesh with all of its axes automatic."""
    return mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))


_known: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def knowing(layout: Layout | None) -> Iterator[None]:
    """Lets importances know, inside of a loop's own jit, how the arrays outside of it are sharded.

    The layout is a static argument of that jit.
    """
    token = _known.set(layout)
    try:
        yield
    finally:
        _known.reset(token)


def _spec_of(leaf: Any) -> PartitionSpec | None:
    sharding = sharding_of(leaf)
    if sharding is None:
        return None
    is_unknown = isinstance(leaf, jax.core.Tracer) and AxisType.Explicit not in sharding.mesh.axis_types
    return None if is_unknown else sharding.spec


def on_automatic_axes(function: Callable[..., Any], arguments: tuple, out: Any) -> Any:
    """Calls a function with arrays on automatic axes of a mesh, where the types of the arguments name explicit ones.

    A network may refuse arrays whose types say how they are sharded: a product over a sharded axis, say. The results
    are on explicit axes again, sharded as `out` says, a tree of `PartitionSpec` that begins like the results.
    """
    mesh = explicit_mesh(arguments)
    if mesh is None:
        return function(*arguments)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(function, out_sharding=out)(*arguments)


def explicit_mesh(arguments: Any) -> jax.sharding.AbstractMesh | None:
    """Returns the mesh whose explicit axes the types of arrays name; None if there is none."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arguments)]
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def on_automatic_axes_as(params: Any, function: Callable[..., Any], arguments: tuple) -> Any:
    """Does the same for a function that returns a tree like `params`: arrays are sharded as the leaves, forms whole."""
    if explicit_mesh(arguments) is None:
        return function(*arguments)

    def spec_of(leaf: jax.Array, form: Any) -> Any:
        return jax.typeof(leaf).sharding.spec if isinstance(form, jax.ShapeDtypeStruct) else PartitionSpec()

    shapes = jax.eval_shape(lambda *given: on_automatic_axes(function, given, out=PartitionSpec()), *arguments)
    return on_automatic_axes(function, arguments, out=jax.tree.map(spec_of, params, shapes))
