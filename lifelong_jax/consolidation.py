"""How the importances of several tasks become one: what is kept is the size of the parameters, whatever their
number."""

import functools
from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lifelong_jax import _checks
from lifelong_jax.types import Consolidation, Params

Rule: TypeAlias = Literal["separate", "latest"]

_OVERFLOW = "It overflows: scale the importances down, by normalize_importance, say, and the strength up."


def init_consolidation(params: Params) -> Consolidation:
    """Makes the consolidation of no tasks: importance 0 everywhere, so that the first task needs no case of its own.

    Args:
      params: a tree of floating-point arrays; None, as everywhere, in the place of what is not to be protected.

    Returns:
      A consolidation anchored at a copy of `params`, which may be donated, in their dtypes or float32, whichever is
      wider.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.

    Example:
      >>> init_consolidation({"w": jnp.ones(2)}).importance
      {'w': Array([0., 0.], dtype=float32)}
    """
    _checks.check_params("params", params)
    anchor = _widen(params)
    return Consolidation(jax.device_put(anchor, may_alias=False), jax.tree.map(jnp.zeros_like, anchor))


def consolidate(
    consolidation: Consolidation,
    params: Params,
    importance: Params,
    *,
    rule: Rule = "separate",
    decay: float | jax.Array = 1.0,
    weight: float | jax.Array = 1.0,
) -> Consolidation:
    """Adds a task just learned to what is kept.

        importance ← decay · consolidation.importance + weight · importance
        anchor     ← params                                                                        rule="latest"
        anchor     ← (decay · consolidation.importance · consolidation.anchor + weight · importance · params)
                     / (decay · consolidation.importance + weight · importance)                    rule="separate"

    "separate" is the original EWC, one quadratic penalty per task: a sum of quadratics is one quadratic, so the
    gradient is exactly that of all the separate penalties. "latest" is online EWC and MAS: one penalty around the
    latest parameters.

    Args:
      consolidation: what was kept so far; `init_consolidation(params)` before the first task.
      params: the parameters as the task left them.
      importance: a tree like `params`: how much each mattered for this task.
      rule: "separate" or "latest".
      decay: γ, what the earlier tasks' importance is multiplied by; 1 forgets nothing.
      weight: what the incoming importance is multiplied by: the number of the task's examples for the Laplace form of
        EWC, else 1. (λ is not here: the strength belongs to the task being learned, see `penalty.py`.)

    Returns:
      The consolidation for the next task.

    Raises:
      TypeError: if a leaf is not floating-point.
      ValueError: if the trees differ in structure or shapes, if `rule` is unknown, or, outside of jit, if an importance
        is NaN, infinite or negative, or the sum overflows, or `decay` or `weight` is negative.

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
    _checks.check_same_structure("params", params, "consolidation.anchor", consolidation.anchor)
    _checks.check_same_structure("importance", importance, "consolidation.importance", consolidation.importance)
    _checks.check_importance("importance", importance)

    _checks.check_finite("params", params)
    total = _add(consolidation, params, importance, rule, decay, weight)
    _checks.check_finite("decay · consolidation.importance + weight · importance", total.importance, hint=_OVERFLOW)
    return total


def merge(consolidations: Sequence[Consolidation], strengths: Sequence[float | jax.Array]) -> Consolidation:
    """Makes one consolidation of several, exactly: of EWC and of MAS, say, with a strength each.

        importance ← Σ_k strengths_k · consolidations_k.importance
        anchor     ← Σ_k strengths_k · consolidations_k.importance · consolidations_k.anchor / importance

    The strengths are in the importance from then on, so the result is to be used at strength 1. The penalty's gradient
    is then the sum of those of the single penalties; the penalty itself is less than their sum by a constant.

    Args:
      consolidations: one or more, trees of one structure.
      strengths: λ for each, not negative.

    Returns:
      A consolidation, for strength 1.

    Raises:
      ValueError: if there are no consolidations, if there is not one strength for each, if the trees differ in
        structure or shapes, or, outside of jit, if an importance is NaN, infinite or negative, or a strength is, or the
        sum overflows.

    Example:
      >>> near, far = Consolidation(jnp.array(1.0), jnp.array(3.0)), Consolidation(jnp.array(5.0), jnp.array(0.5))
      >>> merge([near, far], strengths=[1.0, 2.0])
      Consolidation(anchor=Array(2., dtype=float32), importance=Array(4., dtype=float32))

    A sum of quadratics is one quadratic: Huszár 2018, arXiv 1712.03847.
    """
    if not consolidations or len(consolidations) != len(strengths):
        raise ValueError(
            f"merge needs one or more consolidations and a strength for each, not {len(consolidations)} consolidations "
            f"and {len(strengths)} strengths."
        )
    first = consolidations[0]
    for index, consolidation in enumerate(consolidations):
        _checks.check_params(f"consolidations[{index}]", consolidation)
    merged = init_consolidation(first.anchor)
    for index, (consolidation, strength) in enumerate(zip(consolidations, strengths, strict=True)):
        name = f"consolidations[{index}]"
        _checks.check_not_negative(f"strengths[{index}]", strength)
        _checks.check_same_structure(f"{name}.anchor", consolidation.anchor, "consolidations[0].anchor", first.anchor)
        _checks.check_same_structure(
            f"{name}.importance", consolidation.importance, f"{name}.anchor", consolidation.anchor
        )
        _checks.check_importance(f"{name}.importance", consolidation.importance)
        merged = _add(merged, *consolidation, rule="separate", decay=1.0, weight=strength)
    _checks.check_finite("Σ strengths · consolidations.importance", merged.importance, hint=_OVERFLOW)
    return merged


def normalize_importance(importance: Params, to: Literal["mean", "max"] = "mean") -> Params:
    """Scales an importance so that its mean, or its maximum, over all the parameters is 1.

        importance / mean_i importance_i    or    importance / max_i importance_i

    The best strength for one network is not that for another. With importances normalised, task by task and before
    `consolidate`, they come closer: on three permuted tasks of the bundled digits (Fisher diagonal; MLPs with one layer
    of 64, 256 or 1024 units, or three of 128; two seeds; `experiments.strength_transfer`) the best strengths lay within
    a factor of 100 as they were, 10 with mean 1, and 30 with maximum 1, and a network at the strength that was best for
    the others lost up to 5.8, 1.1 and 0.4 points of accuracy. So it gives a search a good start; it does not replace
    one. All tasks then count alike, and the strength is no longer that of the Laplace form of EWC.

    Args:
      importance: a tree of arrays, not negative.
      to: "mean" or "max".

    Returns:
      A tree like `importance`, in its dtypes or float32, whichever is wider. An importance of 0 everywhere stays.

    Raises:
      TypeError: if a leaf is not floating-point.
      ValueError: if `to` is unknown, or, outside of jit, if an importance is NaN, infinite or negative.

    Example:
      >>> normalize_importance({"w": jnp.array([0.0, 2.0, 4.0, 2.0])})
      {'w': Array([0., 1., 2., 1.], dtype=float32)}
    """
    _checks.check_choice("to", to, ("mean", "max"))
    _checks.check_params("importance", importance)
    _checks.check_importance("importance", importance)
    importance = _widen(importance)
    largest = optax.tree.max(importance)
    # By the maximum first: a sum of large entries could overflow.
    # And by its root twice: a division by a scalar may be a product with its reciprocal, which could underflow.
    root = jnp.sqrt(jnp.where(largest > 0, largest, 1))
    relative = jax.tree.map(lambda omega: omega / root.astype(omega.dtype) / root.astype(omega.dtype), importance)
    if to == "max":
        return relative
    mean = optax.tree.sum(relative) / max(optax.tree.size(relative), 1)
    return jax.tree.map(lambda omega: omega / jnp.where(mean > 0, mean, 1).astype(omega.dtype), relative)


@functools.partial(jax.jit, static_argnames=("rule",))
def _add(
    consolidation: Consolidation,
    params: Params,
    importance: Params,
    rule: Rule,
    decay: float | jax.Array,
    weight: float | jax.Array,
) -> Consolidation:
    consolidation = Consolidation(*map(_widen, consolidation))
    earlier = jax.tree.map(lambda omega: jnp.asarray(decay, omega.dtype) * omega, consolidation.importance)
    incoming = jax.tree.map(lambda omega: jnp.asarray(weight, omega.dtype) * omega, _widen(importance))
    total = jax.tree.map(jnp.add, earlier, incoming)
    if rule == "latest":
        return Consolidation(_widen(params), total)

    def weighted_mean(anchor: jax.Array, here: jax.Array, incoming: jax.Array, total: jax.Array) -> jax.Array:
        share = jnp.where(total > 0, incoming / jnp.where(total > 0, total, 1), 1)  # where nothing matters, the latest
        return anchor + share * (here - anchor)

    return Consolidation(jax.tree.map(weighted_mean, consolidation.anchor, _widen(params), incoming, total), total)


def _widen(tree: Params) -> Params:
    # Kept in float32 at least: a sum over tasks, or a mean of anchors, loses too much in bfloat16.
    def widen(leaf: jax.Array) -> jax.Array:
        leaf = jnp.asarray(leaf)
        return leaf.astype(np.promote_types(leaf.dtype, np.float32))

    return jax.tree.map(widen, tree)
