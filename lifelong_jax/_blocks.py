"""The Kronecker factors of a leaf as blocks of those of a larger leaf, whose first entries are the smaller one's."""

import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax import forms
from lifelong_jax._layouts import Layout
from lifelong_jax.forms import KroneckerFactors

_Side: TypeAlias = tuple[jax.Array | None, jax.Array]  # a factor's basis and its values

_NO_DIAGONAL = (
    "{} has a matrix for a side of which like has the diagonal alone: compute like with a larger max_side, or "
    "consolidate diagonal importances (forms.diagonal)."
)


class _Places(NamedTuple):
    """Where the groups, rows and columns of the smaller leaf's matrices are in the larger one's."""

    groups: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


def pad_factors(name: str, form: KroneckerFactors, like: KroneckerFactors) -> KroneckerFactors:
    """Returns the form of a larger leaf that is `form` for its first entries and 0 for all others.

    Raises:
      ValueError: if no form of the kind and layout of `like` is exactly that.
    """
    groups, rows, columns = _find_places(name, form.layout, like.layout)
    row_side, column_side = (form.row_basis, form.row_values), (form.column_basis, form.column_values)
    padded_rows = _pad(name, row_side, (like.row_basis, like.row_values), groups, rows)
    padded_columns = _pad(name, column_side, (like.column_basis, like.column_values), groups, columns)
    return KroneckerFactors(*padded_rows, *padded_columns, like.layout)


def cut_factors(name: str, form: KroneckerFactors, like: KroneckerFactors) -> KroneckerFactors:
    """Returns the form of a smaller leaf, whose entries are the first ones of the leaf of `form`.

    Raises:
      ValueError: if no form of the kind and layout of `like` is exactly that.
    """
    groups, rows, columns = _find_places(name, like.layout, form.layout)
    row_factor, column_factor = forms.factors_of(form)
    cut_rows = _cut(name, row_factor, like.row_basis is not None, groups, rows)
    cut_columns = _cut(name, column_factor, like.column_basis is not None, groups, columns)
    return forms.from_factors(cut_rows, cut_columns, like.layout)


def _find_places(name: str, small: Layout, large: Layout) -> _Places:
    size = math.prod(large.shape)
    place_of = np.empty(size, np.int64)
    place_of[large.to_matrices(np.arange(size).reshape(large.shape)).ravel()] = np.arange(size)
    first = place_of.reshape(large.shape)[tuple(map(slice, small.shape))]
    found = np.unravel_index(small.to_matrices(first), large.matrices)
    places = _Places(found[0][:, 0, 0], found[1][0, :, 0], found[2][0, 0, :])
    for expected, number in zip(np.ix_(*places), found, strict=True):
        if not np.array_equal(np.broadcast_to(expected, number.shape), number):
            raise ValueError(
                f"{name} has Kronecker factors of shapes {small.shape} and {large.shape}, but the smaller leaf is no "
                f"block of the larger one's matrices ({small}; {large}): change another axis, or consolidate diagonal "
                f"importances (forms.diagonal)."
            )
    return places


def _pad(name: str, side: _Side, like: _Side, groups: np.ndarray, places: np.ndarray) -> _Side:
    """Pads one side; what is new has an axis of its own, with the eigenvalue 0."""
    (basis, values), (like_basis, like_values) = side, like
    num_groups, size = like_values.shape
    padded = _spread(_spread(values, 0, groups, num_groups), 1, places, size)
    if like_basis is None:
        if basis is not None:
            raise ValueError(_NO_DIAGONAL.format(name))
        return None, padded
    if basis is None:
        basis = jnp.broadcast_to(jnp.eye(len(places), dtype=values.dtype), (*values.shape, len(places)))
    is_new = np.ones((num_groups, size, 1))
    is_new[np.ix_(groups, places)] = 0
    spread = _spread(_spread(_spread(basis, 0, groups, num_groups), 1, places, size), 2, places, size)
    return spread + jnp.asarray(is_new, basis.dtype) * jnp.eye(size, dtype=basis.dtype), padded


def _spread(array: jax.Array, axis: int, places: np.ndarray, size: int) -> jax.Array:
    """Puts the entries of an axis at places of a longer one, and 0 elsewhere."""
    zeros = jnp.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), array.dtype)
    return zeros.at[(slice(None),) * axis + (places,)].set(array)


def _cut(name: str, factor: jax.Array, to_matrix: bool, groups: np.ndarray, places: np.ndarray) -> jax.Array:
    """Cuts one side's factor, which becomes a matrix or a diagonal."""
    cut = factor[groups][:, places]
    if factor.ndim == 2:
        return cut[:, :, None] * jnp.eye(len(places), dtype=cut.dtype) if to_matrix else cut
    cut = cut[:, :, places]
    if not to_matrix and len(places) > 1:
        raise ValueError(_NO_DIAGONAL.format(name))
    return cut if to_matrix else cut[:, :, 0]
