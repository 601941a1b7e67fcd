"""Consolidations: the anchors and importances of several tasks as one anchor and one importance."""

import functools
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lifelong_jax import _checks, forms
from lifelong_jax._numerics import widen
from lifelong_jax._processes import copy_arrays
from lifelong_jax.compression import CompressedDiagonal, Storage, compress, decompress, stored_like, widen_form
from lifelong_jax.forms import Form
from lifelong_jax.types import Consolidation, Params

Rule: TypeAlias = Literal["separate", "latest"]

_OVERFLOW = "It overflows: scale the importances down (by normalize_importance, say) and the strength up."


def init_consolidation(params: Params, like: Params | Consolidation | None = None) -> Consolidation:
    """Makes the consolidation of no tasks: importance 0 everywhere, so that the first task is no special case.

    Args:
      params: a tree of floating-point arrays, with None for what is not to be protected.
      like: an importance that has the forms of those to come, if these are not all diagonal. Its arrays may be
        `jax.ShapeDtypeStruct`s: `jax.eval_shape(importance_fn, params)` makes it without computing. Or a consolidation,
        whose anchor has the dtypes of the one to come.

    Returns:
      A consolidation whose anchor is a copy of `params`, in their dtypes or float32, whichever is wider, or in those of
      `like`. So `params` may be donated.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: if `params` and `like` differ in structure or shapes.

    Example:
      >>> init_consolidation({"w": jnp.ones(2)}).importance
      {'w': Array([0., 0.], dtype=float32)}
    """
    _checks.check_params("params", params)
    kept, like = like if isinstance(like, Consolidation) else (None, like)
    if kept is None:
        anchor = _widen(params)
    else:
        _checks.check_same_structure("like.anchor", kept, "params", params)
        anchor = jax.tree.map(lambda leaf, old: jnp.asarray(leaf, old.dtype), params, kept)
    if like is None:
        importance = jax.tree.map(jnp.zeros_like, anchor)
    else:
        _checks.check_same_structure("like", like, "params", params)
        importance = _widen_forms(forms.tree_map(forms.zeros_like, like))
    return Consolidation(copy_arrays(anchor), importance)


def consolidate(
    consolidation: Consolidation,
    params: Params,
    importance: Params,
    *,
    rule: Rule = "separate",
    decay: float | jax.Array = 1.0,
    weight: float | jax.Array = 1.0,
) -> Consolidation:
    """Adds the task just learned to the tasks consolidated so far.

        importance ← decay · consolidation.importance + weight · importance
        anchor     ← params                                                                        rule="latest"
        anchor     ← (decay · consolidation.importance · consolidation.anchor + weight · importance · params)
                     / (decay · consolidation.importance + weight · importance)                    rule="separate"

    "separate" is the original EWC, with one quadratic penalty per task. A sum of quadratics is a quadratic, so the
    gradient is exactly that of the sum of all the penalties. "latest" is online EWC and MAS: one penalty around the
    latest parameters.

    Kronecker factors need "latest". Their sum is the nearest Kronecker product (`forms.add`), so that its memory does
    not grow with the number of tasks; `forms.sum_error` tells how near it is.

    A compressed consolidation stays compressed: the importance is added to what the codes stand for, and the sum gets
    codes again. The anchors of compressed leaves keep their dtypes. See `compress_consolidation` for the errors.

    Args:
      consolidation: that of the earlier tasks; `init_consolidation(params)` if there are none.
      params: the parameters after the task.
      importance: a tree like `params`: how much each parameter matters for this task.
      rule: "separate" or "latest".
      decay: γ, the factor of the earlier tasks' importance; 1 forgets nothing.
      weight: the factor of this task's importance: the number of its examples for the Laplace form of EWC, else 1. (The
        strength λ is no argument here: it belongs to the task being learned; see `penalty`.)

    Returns:
      The consolidation for the next task.

    Raises:
      TypeError: if a leaf is not floating-point.
      ValueError: if the trees differ in structure, shapes or forms, if `rule` is unknown, or if it is "separate" and
        the importance has Kronecker factors; outside of jit, if an importance is NaN, infinite or negative, the sum
        overflows, or `decay` or `weight` is negative.

    Example:
      >>> first = consolidate(init_consolidation(jnp.array(0.0)), jnp.array(1.0), jnp.array(3.0))
      >>> consolidate(first, jnp.array(5.0), jnp.array(1.0))
      Consolidation(anchor=Array(2., dtype=float32), importance=Array(4., dtype=float32))

    Kirkpatrick et al. 2017, eq. 3 ("separate"; for the sum, Huszár 2018, arXiv 1712.03847); Schwarz et al. 2018, arXiv
    1805.06370, eq. 9 ("latest").
    """
    _checks.check_choice("rule", rule, ("separate", "latest"))
    _checks.check_not_negative("decay", decay)
    _checks.check_not_negative("weight", weight)
    for name, tree in (("consolidation", consolidation), ("params", params), ("importance", importance)):
        _checks.check_params(name, tree)
    with _checks.for_a_consolidation():
        _checks.check_same_structure("params", params, "consolidation.anchor", consolidation.anchor)
    _checks.check_same_forms("importance", importance, "consolidation.importance", consolidation.importance)
    if rule == "separate" and _has_factors(importance):
        raise ValueError(
            "rule='separate' is for diagonal importances: Kronecker-factored penalties around several anchors make no "
            "single one. Use rule='latest'."
        )
    _checks.check_importance("consolidation.importance", consolidation.importance)
    _checks.check_importance("importance", importance)
    _checks.check_finite("params", params)
    total = _add(consolidation, params, importance, rule, decay, weight)
    _checks.check_finite("decay · consolidation.importance + weight · importance", total.importance, hint=_OVERFLOW)
    return total


def compress_consolidation(
    consolidation: Consolidation,
    *,
    importance: Storage | None = "uint8",
    anchor: Literal["bfloat16"] | None = "bfloat16",
) -> Consolidation:
    """Compresses a consolidation: from 8 bytes for each parameter to 3, or to 1 beside an anchor that is kept anyway.

    All penalties take it as it is, and compute what its codes stand for within the step. `consolidate` and
    `set_consolidation` keep it compressed. Under `jax.jit`, with the consolidation donated, no second one is made.

    One byte keeps an entry of the importance within 4.5 %, bfloat16 within 0.4 % (`compression.CompressedDiagonal`).
    `consolidate` rounds again. What grows in all entries alike is kept in the scale, without a further error. Of 20
    tasks whose importances differ at random, the sum in bytes is off by 7 % (root mean square), in bfloat16 by 0.5 %;
    of 100 tasks, by up to 34 % and by 1.5 %. So "bfloat16" is for many tasks. Anchors in bfloat16 are off by up to
    0.4 % of themselves, which nothing adds to if the parameters are bfloat16, too.

    Args:
      consolidation: from `consolidate`, `init_consolidation`, or one task's `Consolidation(params, importance)`.
      importance: "uint8", "bfloat16", or None to keep the importance as it is. Kronecker factors are kept in any case.
      anchor: "bfloat16", or None for the same arrays: a frozen checkpoint, say, which `save_consolidation` can name
        instead of copying it.

    Returns:
      A consolidation with a `CompressedDiagonal` in the place of each array of the importance.

    Raises:
      TypeError: if a leaf is not floating-point.
      ValueError: if `importance` or `anchor` is none of the above; if the trees differ in structure or shapes;
        outside of jit, if an importance is NaN, infinite or negative.

    Example:
      >>> kept = Consolidation(jnp.array([1.0, 2.0]), jnp.array([0.0, 3.0]))
      >>> compress_consolidation(kept).importance.codes
      Array([  0, 255], dtype=uint8)

      The memory for 7 billion parameters, in GiB, is known before it is needed:

      >>> shapes = jax.ShapeDtypeStruct((6_738_415_616,), jnp.float32)
      >>> compressed = jax.eval_shape(compress_consolidation, Consolidation(shapes, shapes))
      >>> [round(forms.num_bytes(tree) / 2**30, 1) for tree in ((shapes, shapes), compressed, compressed.importance)]
      [50.2, 18.8, 6.3]
    """
    if importance is not None:
        _checks.check_choice("importance", importance, get_args(Storage))
    if anchor is not None:
        _checks.check_choice("anchor", anchor, ("bfloat16",))
    _checks.check_params("consolidation", consolidation)
    _checks.check_same_structure(
        "consolidation.importance", consolidation.importance, "consolidation.anchor", consolidation.anchor
    )
    _checks.check_importance("consolidation.importance", consolidation.importance)
    stored, kept = consolidation.importance, consolidation.anchor
    return Consolidation(
        kept if anchor is None else _cast(kept, anchor), stored if importance is None else _compress(stored, importance)
    )


def decompress_consolidation(consolidation: Consolidation) -> Consolidation:
    """Makes arrays, of float32 or wider, of all that `compress_consolidation` compressed.

    Args:
      consolidation: a compressed one.

    Returns:
      A consolidation with arrays in the place of codes. The largest entry of each leaf and 0 are those of before, and
      others within the error of their storage.

    Example:
      >>> compressed = compress_consolidation(Consolidation(jnp.array([1.0, 2.0]), jnp.array([0.0, 3.0])))
      >>> decompress_consolidation(compressed)
      Consolidation(anchor=Array([1., 2.], dtype=float32), importance=Array([0., 3.], dtype=float32))
    """
    anchor, importance = consolidation
    return Consolidation(_widen(anchor), _widen_forms(forms.tree_map(decompress, importance)))


def merge(consolidations: Sequence[Consolidation], strengths: Sequence[float | jax.Array]) -> Consolidation:
    """Merges several consolidations into one, exactly: that of EWC and that of MAS, say, with a strength for each.

        importance ← Σ_k strengths_k · consolidations_k.importance
        anchor     ← Σ_k strengths_k · consolidations_k.importance · consolidations_k.anchor / importance

    The importance includes the strengths, so use the result with strength 1. The gradient of its penalty is then the
    sum of the gradients of the single penalties; the penalty itself is smaller than their sum by a constant.

    Compressed consolidations make one of arrays, of float32 or wider.

    Kronecker factors can be merged around one anchor only. Their sum is the nearest Kronecker product (`forms.add`).

    Args:
      consolidations: one or more, trees of one structure.
      strengths: λ for each, not negative.

    Returns:
      A consolidation, to be used with strength 1.

    Raises:
      ValueError: if there are no consolidations, there is not one strength for each, or the trees differ in structure,
        shapes or forms, or there are Kronecker factors and several anchors; outside of jit, if an importance or a
        strength is NaN, infinite or negative, or the sum overflows.

    Example:
      >>> ewc, mas = Consolidation(jnp.array(1.0), jnp.array(3.0)), Consolidation(jnp.array(5.0), jnp.array(0.5))
      >>> merge([ewc, mas], strengths=[1.0, 2.0])
      Consolidation(anchor=Array(2., dtype=float32), importance=Array(4., dtype=float32))

    A sum of quadratics is a quadratic: Huszár 2018, arXiv 1712.03847.
    """
    if not consolidations or len(consolidations) != len(strengths):
        raise ValueError(
            f"merge needs one or more consolidations and a strength for each, not {len(consolidations)} consolidations "
            f"and {len(strengths)} strengths."
        )
    for index, consolidation in enumerate(consolidations):
        _checks.check_params(f"consolidations[{index}]", consolidation)
    like = jax.eval_shape(lambda importance: forms.tree_map(decompress, importance), consolidations[0].importance)
    merged = start = init_consolidation(consolidations[0].anchor, like)
    rule: Rule = "latest" if _has_factors(start.importance) else "separate"
    for index, (consolidation, strength) in enumerate(zip(consolidations, strengths, strict=True)):
        name, (anchor, importance) = f"consolidations[{index}]", consolidation
        _checks.check_not_negative(f"strengths[{index}]", strength)
        _checks.check_same_structure(f"{name}.anchor", anchor, "consolidations[0].anchor", start.anchor)
        _checks.check_same_forms(f"{name}.importance", importance, "consolidations[0].importance", start.importance)
        _checks.check_importance(f"{name}.importance", importance)
        if rule == "latest" and not _are_equal(anchor, consolidations[0].anchor):
            raise ValueError(
                f"{name}.anchor is not known to equal consolidations[0].anchor: Kronecker factors can be merged around "
                f"one anchor only."
            )
        merged = _add(merged, anchor, importance, rule=rule, decay=1.0, weight=strength)
    _checks.check_finite("Σ strengths · consolidations.importance", merged.importance, hint=_OVERFLOW)
    return merged


@functools.partial(jax.jit, static_argnames=("dtype",))  # one program for the whole tree
def _cast(tree: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


@functools.partial(jax.jit, static_argnames=("storage",))
def _compress(importance: Params, storage: Storage) -> Params:
    def of_leaf(form: Form) -> Form:
        return form if isinstance(form, forms.KroneckerFactors) else compress(forms.diagonal(form), storage)

    return forms.tree_map(of_leaf, importance)


@functools.partial(jax.jit, static_argnames=("rule",))
def _add(
    consolidation: Consolidation, params: Params, importance: Params, rule: Rule, decay: ArrayLike, weight: ArrayLike
) -> Consolidation:
    def scaled(importance: Params, factor: ArrayLike) -> Params:
        wide = forms.tree_map(decompress, _widen_forms(importance))
        return forms.tree_map(lambda form: forms.scale(form, factor), wide)

    earlier, incoming = scaled(consolidation.importance, decay), scaled(importance, weight)
    total = forms.tree_map(forms.add, earlier, incoming)
    if rule == "latest":
        return _stored_like(consolidation, Consolidation(_widen(params), total))

    def weighted_mean(anchor: jax.Array, theta: jax.Array, incoming: jax.Array, total: jax.Array) -> jax.Array:
        # Where nothing matters, the anchor is the latest parameters.
        share = jnp.where(total > 0, incoming / jnp.where(total > 0, total, 1), 1)
        return anchor + share * (theta - anchor)

    anchor = jax.tree.map(weighted_mean, _widen(consolidation.anchor), _widen(params), incoming, total)
    return _stored_like(consolidation, Consolidation(anchor, total))


def _stored_like(like: Consolidation, consolidation: Consolidation) -> Consolidation:
    """Compresses the leaves that are compressed in another consolidation, whose anchor's dtypes they get."""

    def of_anchor(form: Form, old: jax.Array, new: jax.Array) -> jax.Array:
        return new.astype(old.dtype) if isinstance(form, CompressedDiagonal) else new

    anchor = forms.tree_map(of_anchor, like.importance, like.anchor, consolidation.anchor)
    importance = forms.tree_map(stored_like, consolidation.importance, like.importance)
    return Consolidation(anchor, importance)


def _widen(tree: Params) -> Params:
    # In bfloat16, a sum over tasks or a mean of anchors would lose too many digits.
    return jax.tree.map(widen, tree)


def _widen_forms(importance: Params) -> Params:
    return forms.tree_map(widen_form, importance)


def _has_factors(importance: Params) -> bool:
    leaves = jax.tree.leaves(importance, is_leaf=forms.is_form)
    return any(isinstance(form, forms.KroneckerFactors) for form in leaves)


def _are_equal(anchor: Params, other: Params) -> bool:
    """Returns whether two anchors are known to be equal: the same arrays, or arrays of equal values."""
    with jax.ensure_compile_time_eval():
        return all(
            ours is theirs or (all(map(_checks.is_concrete, (ours, theirs))) and bool(jnp.all(ours == theirs)))
            for ours, theirs in zip(jax.tree.leaves(anchor), jax.tree.leaves(other), strict=True)
        )
