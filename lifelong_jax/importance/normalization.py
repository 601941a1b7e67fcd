"""Importances scaled to mean 1, or to maximum 1."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks, forms
from lifelong_jax.compression import CompressedDiagonal, widen_form
from lifelong_jax.types import Params


def normalize_importance(importance: Params, to: Literal["mean", "max"] = "mean") -> Params:
    """Scales an importance so that its mean, or its maximum, over all parameters is 1.

        importance / mean_i importance_i    or    importance / max_i importance_i

    The best strength differs from network to network. It differs less if each task's importance is normalised before
    `consolidate`. On three permuted tasks of the bundled digits (Fisher diagonal; MLPs with one layer of 64, 256 or
    1024 units, or three of 128; two seeds; `experiments.strength_transfer`) the best strengths lay within a factor of
    100 without normalisation, 10 with mean 1, and 30 with maximum 1. At the best strength of the other networks, a
    network lost up to 5.8, 1.1 and 0.4 points of accuracy. So normalising gives a search a good start, but does not
    replace it. All tasks then count alike, and the strength is no longer that of the Laplace form of EWC.

    Args:
      importance: a tree of forms: arrays, not negative; their codes; or Kronecker factors, which are scaled by their
        diagonals.
      to: "mean" or "max".

    Returns:
      A tree like `importance`, in its dtypes or float32, whichever is wider. An importance that is 0 everywhere is
      returned as it is.

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
    importance = forms.tree_map(widen_form, importance)
    largest = optax.tree.max(forms.tree_map(forms.diagonal, importance))
    # Divided by the maximum first, because a sum of large entries could overflow; by its root twice, because XLA may
    # multiply by a reciprocal, which could underflow.
    root = jnp.sqrt(jnp.where(largest > 0, largest, 1))
    relative = _divide(_divide(importance, root), root)
    if to == "max":
        return relative
    diagonal = forms.tree_map(forms.diagonal, relative)
    mean = optax.tree.sum(diagonal) / max(optax.tree.size(diagonal), 1)
    return _divide(relative, jnp.where(mean > 0, mean, 1))


def _divide(importance: Params, number: jax.Array) -> Params:
    def of_leaf(form: forms.Form) -> forms.Form:
        if isinstance(form, forms.KroneckerFactors):
            return dataclasses.replace(form, row_values=form.row_values / number.astype(form.dtype))
        if isinstance(form, CompressedDiagonal):
            return dataclasses.replace(form, scale=form.scale / number.astype(form.dtype))
        return form / number.astype(form.dtype)

    return forms.tree_map(of_leaf, importance)
