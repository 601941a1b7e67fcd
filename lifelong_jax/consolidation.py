"""Consolidations: the anchors and importances of several tasks as one anchor and one importance."""

import functools
from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lifelong_jax import _checks, forms
from lifelong_jax._numerics import widen
from lifelong_jax.types import Consolidation, Params

Rule: TypeAlias = Literal["separate", "latest"]

_OVERFLOW = "It overflows: scale the importances down (by normalize_importance, say) and the strength up."


def init_consolidation(params: Params, like: Params | None = None) -> Consolidation:
    """Makes the consolidation of no tasks: importance 0 everywhere, so that the first task is no special case.

    Args:
      params: a tree of floating-point arrays, with None for what is not to be protected.
      like: an importance that has the forms of those to come, if these are not all diagonal. Its arrays may be
        `jax.ShapeDtypeStruct`s: `jax.eval_shape(importance_fn, params)` makes it without computing.

    Returns:
      A consolidation whose anchor is a copy of `params`, in their dtypes or float32, whichever is wider. So `params`
      may be donated.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: if `params` and `like` differ in structure or shapes.

    Example:
      >>> init_consolidation({"w": jnp.ones(2)}).importance
      {'w': Array([0., 0.], dtype=float32)}
    """
    _checks.check_params("params", params)
    anchor = _widen(params)
    if like is None:
        importance = jax.tree.map(jnp.zeros_like, anchor)
    else:
        _checks.check_same_structure("like", like, "params", params)
        importance = _widen(forms.tree_map(forms.zeros_like, like))
    return Consolidation(jax.device_put(anchor, may_alias=False), importance)


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


def merge(consolidations: Sequence[Consolidation], strengths: Sequence[float | jax.Array]) -> Consolidation:
    """Merges several consolidations into one, exactly: that of EWC and that of MAS, say, with a strength for each.

        importance ← Σ_k strengths_k · consolidations_k.importance
        anchor     ← Σ_k strengths_k · consolidations_k.importance · consolidations_k.anchor / importance

    The importance includes the strengths, so use the result with strength 1. The gradient of its penalty is then the
    sum of the gradients of the single penalties; the penalty itself is smaller than their sum by a constant.

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
    merged = start = init_consolidation(*consolidations[0])
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


@functools.partial(jax.jit, static_argnames=("rule",))
def _add(
    consolidation: Consolidation, params: Params, importance: Params, rule: Rule, decay: ArrayLike, weight: ArrayLike
) -> Consolidation:
    consolidation = Consolidation(*map(_widen, consolidation))
    earlier = forms.tree_map(lambda form: forms.scale(form, decay), consolidation.importance)
    incoming = forms.tree_map(lambda form: forms.scale(form, weight), _widen(importance))
    total = forms.tree_map(forms.add, earlier, incoming)
    if rule == "latest":
        return Consolidation(_widen(params), total)

    def weighted_mean(anchor: jax.Array, theta: jax.Array, incoming: jax.Array, total: jax.Array) -> jax.Array:
        # Where nothing matters, the anchor is the latest parameters.
        share = jnp.where(total > 0, incoming / jnp.where(total > 0, total, 1), 1)
        return anchor + share * (theta - anchor)

    return Consolidation(jax.tree.map(weighted_mean, consolidation.anchor, _widen(params), incoming, total), total)


def _widen(tree: Params) -> Params:
    # In bfloat16, a sum over tasks or a mean of anchors would lose too many digits.
    return jax.tree.map(widen, tree)


def _has_factors(importance: Params) -> bool:
    return any(map(forms.is_form, jax.tree.leaves(importance, is_leaf=forms.is_form)))


def _are_equal(anchor: Params, other: Params) -> bool:
    """Returns whether two anchors are known to be equal: the same arrays, or arrays of equal values."""
    return all(
        ours is theirs or (_checks.is_concrete(ours) and _checks.is_concrete(theirs) and bool(jnp.all(ours == theirs)))
        for ours, theirs in zip(jax.tree.leaves(anchor), jax.tree.leaves(other), strict=True)
    )
