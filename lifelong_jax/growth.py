"""Networks that grow and shrink: a consolidation for parameters with more leaves or fewer, larger ones or smaller.

Leaves are matched by their plain paths: keys, indices and attributes, joined by slashes. So the trees may be of
different kinds: a consolidation of nested dicts can be extended to a flax State or to an equinox module.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lifelong_jax import _checks, forms
from lifelong_jax._blocks import cut_factors, pad_factors
from lifelong_jax._numerics import is_sharded, wide_dtype
from lifelong_jax._paths import join, leaves_by_path, listed
from lifelong_jax.compression import CompressedDiagonal
from lifelong_jax.consolidation import init_consolidation
from lifelong_jax.forms import Form, KroneckerFactors, is_form
from lifelong_jax.types import Consolidation, Params

_SHRUNK = "drop what is gone first, by restrict_consolidation"
_GROWN = "put None in the place of what is new, and add it to the result by extend_consolidation"


def extend_consolidation(consolidation: Consolidation, params: Params, *, like: Params | None = None) -> Consolidation:
    """Extends a consolidation to the parameters of a network that has grown: with new leaves, or larger ones.

        anchor     = consolidation.anchor for the old entries, params for the new ones
        importance = consolidation.importance for the old entries, 0 for the new ones

    The old entries of a larger leaf are its first ones along each axis: those of a head that grows from 10 outputs to
    15 are `[..., :10]`.

    Args:
      consolidation: that of the tasks so far.
      params: the parameters of the grown network. Their tree may be of another kind, if the old leaves have their old
        paths in it.
      like: an importance of the grown network, as for `init_consolidation`. It is needed where the importance has
        Kronecker factors. These get rows and columns of zeros, which is exact.

    Returns:
      A consolidation of trees like `params`. An unchanged leaf is kept as it is, in its dtype and sharding. No array is
      shared with `params`, which may be donated.

    Raises:
      TypeError: if a leaf is not floating-point.
      ValueError: naming the paths, if `params` lacks a leaf of the consolidation, or has it smaller or of another rank;
        if two leaves of a tree have the same plain path; or if `like` is missing, or does not fit.

    Example:
      >>> old = Consolidation({"head": jnp.array([1.0, 2.0])}, {"head": jnp.array([3.0, 4.0])})
      >>> grown = extend_consolidation(old, {"head": jnp.array([5.0, 6.0, 7.0]), "other": jnp.array(8.0)})
      >>> grown.anchor
      {'head': Array([1., 2., 7.], dtype=float32), 'other': Array(8., dtype=float32)}
      >>> grown.importance
      {'head': Array([3., 4., 0.], dtype=float32), 'other': Array(0., dtype=float32)}
    """
    old, new, likes = _by_path(consolidation, params, like)
    anchors = {path: leaf.anchor for path, leaf in old.items()}
    _check_contains("params", new, "the consolidation", anchors, _SHRUNK)
    changed = _changed(old, new, like)
    begun, zeros = init_consolidation({path: new[path] for path in changed})
    leaves = dict(old)
    for path in changed:
        anchor, form = begun[path], forms.zeros_like(likes[path]) if is_form(likes.get(path)) else zeros[path]
        if path in old:
            form = _resize(path, old[path].form, form, _overwrite, pad_factors)
            wide = _overwrite(anchors[path], anchor)
            anchor = wide.astype(anchors[path].dtype) if isinstance(form, CompressedDiagonal) else wide
        leaves[path] = _Leaf(anchor, form)
    return _as_tree([leaves[path] for path in new], params, like)


def restrict_consolidation(
    consolidation: Consolidation, params: Params, *, like: Params | None = None
) -> Consolidation:
    """Restricts a consolidation to the parameters of a smaller network, or to a part: a trunk without its head.

    It is the reverse of `extend_consolidation`. Leaves that `params` lacks are left out. Larger ones are cut to their
    first entries along each axis.

    Args:
      consolidation: that of the tasks so far.
      params: the parameters that are kept, with None for others. Their tree may be of another kind. Their values are
        not used, so the leaves may be `jax.ShapeDtypeStruct`s.
      like: an importance of these parameters, as for `init_consolidation`. It is needed where Kronecker factors are
        cut.

    Returns:
      A consolidation of trees like `params`.

    Raises:
      TypeError: if a leaf is not floating-point.
      ValueError: naming the paths, if the consolidation lacks a leaf of `params`, or has it smaller or of another rank;
        if two leaves of a tree have the same plain path; or if `like` is missing, or does not fit.

    Example:
      >>> tree = {"trunk": jnp.ones(2), "head": jnp.ones(3)}
      >>> restrict_consolidation(Consolidation(tree, tree), {"trunk": jnp.zeros(2)}).anchor
      {'trunk': Array([1., 1.], dtype=float32)}
    """
    old, new, likes = _by_path(consolidation, params, like)
    anchors = {path: leaf.anchor for path, leaf in old.items()}
    _check_contains("the consolidation", anchors, "params", new, _GROWN)
    leaves = dict(old)
    for path in _changed(old, new, like):
        target = likes[path] if is_form(likes.get(path)) else new[path]
        form = _resize(path, old[path].form, target, _first_entries, cut_factors)
        leaves[path] = _Leaf(_first_entries(anchors[path], new[path]), form)
    return _as_tree([leaves[path] for path in new], params, like)


class _Leaf(NamedTuple):
    anchor: jax.Array
    form: Form


def _by_path(
    consolidation: Consolidation, params: Params, like: Params | None
) -> tuple[dict[str, _Leaf], dict[str, jax.Array], dict[str, Form]]:
    """Checks the arguments, and returns the leaves of each by their plain paths."""
    anchor, importance = consolidation
    _checks.check_params("consolidation", consolidation)
    _checks.check_params("params", params)
    _checks.check_same_structure("consolidation.importance", importance, "consolidation.anchor", anchor)
    if like is not None:
        _checks.check_same_structure("like", like, "params", params)
    anchors = leaves_by_path("consolidation.anchor", anchor)
    old = map(_Leaf, anchors.values(), jax.tree.leaves(importance, is_leaf=is_form))
    likes = {} if like is None else leaves_by_path("like", like)
    return dict(zip(anchors, old, strict=True)), leaves_by_path("params", params), likes


def _check_contains(name: str, whole: Mapping[str, Any], part_name: str, part: Mapping[str, Any], remedy: str) -> None:
    """Raises ValueError, naming the first few paths, unless each leaf of `part` fits into the one of `whole`."""
    missing, others = ([path for path in these if path not in those] for these, those in ((part, whole), (whole, part)))
    if missing:
        besides = f" ({name} has {listed(others)} besides)" if others else ""
        raise ValueError(f"{name} has no leaf {listed(missing)}, but {part_name} has{besides}: {remedy}.")
    shapes = {path: (jnp.shape(whole[path]), jnp.shape(leaf)) for path, leaf in part.items()}
    wrong = [
        f"{path} of shape {large}, not {small}"
        for path, (large, small) in shapes.items()
        if len(large) != len(small) or any(size < least for size, least in zip(large, small, strict=True))
    ]
    if wrong:
        raise ValueError(f"{name} must have all entries of {part_name}, but has {listed(wrong)}: {remedy}.")


def _changed(old: Mapping[str, _Leaf], new: Mapping[str, jax.Array], like: Params | None) -> list[str]:
    """Returns the paths of leaves that are new or of another shape."""
    changed = [path for path in new if path not in old or jnp.shape(new[path]) != jnp.shape(old[path].anchor)]
    with_factors = {path for path, leaf in old.items() if isinstance(leaf.form, KroneckerFactors)}
    unknown = [path for path in changed if (path in with_factors if path in old else with_factors)]
    if unknown and like is None:
        raise ValueError(
            f"the consolidation has Kronecker factors, and those of {listed(unknown)} are not known: pass "
            f"like=jax.eval_shape(importance_fn, params), which computes nothing."
        )
    return changed


def _resize(
    path: str, form: Form, target: Form, of_array: Callable[..., jax.Array], of_factors: Callable[..., Form]
) -> Form:
    """Extends or cuts a form, by the function of its kind, to what `target` is a form of."""
    with_factors = [isinstance(one, KroneckerFactors) for one in (form, target)]
    if with_factors[0] != with_factors[1]:
        kinds = ["Kronecker factors" if factored else "a diagonal" for factored in with_factors]
        raise ValueError(f"{join('consolidation.importance', path)} has {kinds[0]}, but like has {kinds[1]}.")
    if isinstance(form, KroneckerFactors):
        return of_factors(join("consolidation.importance", path), form, target)
    target = target.codes if isinstance(target, CompressedDiagonal) else target
    if isinstance(form, CompressedDiagonal):  # the scale is kept, so that the entries are, too
        return dataclasses.replace(form, codes=of_array(form.codes, jnp.zeros_like(target, form.codes.dtype)))
    return of_array(form, target)


def _overwrite(part: jax.Array, whole: jax.Array) -> jax.Array:
    """Puts an array in the place of the first entries of a larger one."""
    dtype = part.dtype if part.dtype == whole.dtype else wide_dtype(part, whole)

    def overwrite(whole: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, part, [0] * whole.ndim)

    return _sharded_like(whole, overwrite, jnp.asarray(whole, dtype), jnp.asarray(part, dtype))


def _first_entries(whole: jax.Array, part: jax.Array) -> jax.Array:
    """Returns the first entries of an array, as many as a smaller one has."""
    return _sharded_like(part, lambda whole: jax.lax.slice(whole, [0] * jnp.ndim(part), jnp.shape(part)), whole)


def _sharded_like(target: jax.Array, function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Computes an array. Where types say how arrays are sharded, over explicit axes, it is sharded as `target` is."""
    meshes = [jax.typeof(array).sharding.mesh for array in (target, *arrays) if is_sharded(array)]
    if not meshes:
        return function(*arrays)
    with jax.sharding.use_abstract_mesh(meshes[0]):
        return jax.sharding.auto_axes(function, out_sharding=jax.typeof(target).sharding.spec)(*arrays)


def _as_tree(leaves: list[_Leaf], params: Params, like: Params | None) -> Consolidation:
    structure = jax.tree.structure(params)
    anchor, importance = (jax.tree.unflatten(structure, [leaf[side] for leaf in leaves]) for side in (0, 1))
    if like is not None:
        _checks.check_same_forms("consolidation.importance", importance, "like", like)
    return Consolidation(anchor, importance)
