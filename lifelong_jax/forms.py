"""Importances as quadratic forms: a diagonal, which is an array like the leaf or its codes, or Kronecker factors.

A form F says how much a change of one leaf matters: changeᵀ F change. Most importances are diagonal, and their forms
are arrays; `compression.CompressedDiagonal` has one or two bytes for each entry. The functions of this module take a
leaf's form of any kind. `KroneckerFactors` also knows how the leaf's entries correlate, at the price of one matrix for
each of its two sides.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lifelong_jax._layouts import Layout
from lifelong_jax._nearest_product import inner_products, nearest_product, precise_einsum
from lifelong_jax.compression import CompressedDiagonal, decompress
from lifelong_jax.types import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerFactors:
    """The form of a leaf that is a matrix, or a group of matrices, as a Kronecker product of two smaller forms.

        changeᵀ F change = Σ_groups tr(changeᵀ · A · change · G)
        A = row_basis · diag(row_values) · row_basisᵀ,   G = column_basis · diag(column_values) · column_basisᵀ

    Factors are kept by their eigenvectors, so that the penalty's proximal step has a closed form. It is a pytree; an
    importance has one in the place of a leaf.

    Attributes:
      row_basis: `[groups, rows, rows]`, whose columns are A's eigenvectors; None if A is diagonal.
      row_values: `[groups, rows]`, A's eigenvalues.
      column_basis: `[groups, columns, columns]`, whose columns are G's eigenvectors; None if G is diagonal.
      column_values: `[groups, columns]`, G's eigenvalues.
      layout: how the leaf's entries make `[groups, rows, columns]`.

    Example:
      >>> layout = Layout((2, 3), (2, 3), (0, 1), (1, 2, 3))
      >>> form = KroneckerFactors(None, jnp.array([[1.0, 2.0]]), None, jnp.array([[1.0, 0.0, 3.0]]), layout)
      >>> diagonal(form)
      Array([[1., 0., 3.],
             [2., 0., 6.]], dtype=float32)

    Martens and Grosse 2015, arXiv 1503.05671, §3; in continual learning, Ritter, Botev and Barber 2018, arXiv
    1805.07810.
    """

    row_basis: jax.Array | None
    row_values: jax.Array
    column_basis: jax.Array | None
    column_values: jax.Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        return self.layout.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the factors."""
        return self.row_values.dtype


Form: TypeAlias = jax.Array | CompressedDiagonal | KroneckerFactors
"""The form of one leaf: an array like the leaf, which is the form's diagonal; its codes; or Kronecker factors."""


def is_form(node: Any) -> bool:
    """Returns whether a node of a tree is a form, but no array: the `is_leaf` of functions that map over forms.

    Args:
      node: any node of a tree.

    Returns:
      Whether it is a `KroneckerFactors` or a `CompressedDiagonal`.

    Example:
      >>> is_form(jnp.zeros(2))
      False
    """
    return isinstance(node, KroneckerFactors | CompressedDiagonal)


def tree_map(function: Callable[..., Any], importance: Params, *others: Params) -> Params:
    """Maps a function over the forms of an importance: `jax.tree.map` with forms as leaves.

    Args:
      function: `function(form, *others)`, with one argument for each tree.
      importance: a tree of forms.
      *others: trees of the same structure; each may have any branch in the place of a form.

    Returns:
      The tree of what `function` returns.

    Example:
      >>> tree_map(trace, {"w": jnp.ones((2, 3))})
      {'w': Array(6., dtype=float32)}
    """
    return jax.tree.map(function, importance, *others, is_leaf=is_form)


def from_factors(row_factor: jax.Array, column_factor: jax.Array, layout: Layout) -> KroneckerFactors:
    """Makes the form of two symmetric, positive semi-definite factors.

    Args:
      row_factor: A, `[groups, rows, rows]`, or its diagonal `[groups, rows]`.
      column_factor: G, `[groups, columns, columns]`, or its diagonal `[groups, columns]`.
      layout: how the leaf's entries make `[groups, rows, columns]`.

    Returns:
      The form A ⊗ G. Eigenvalues that rounding made negative are 0.

    Example:
      >>> layout = Layout((2, 1), (2, 1), (0, 1), (1, 2, 1))
      >>> from_factors(jnp.array([[[2.0, 1.0], [1.0, 2.0]]]), jnp.ones((1, 1)), layout).row_values
      Array([[1., 3.]], dtype=float32)
    """
    return KroneckerFactors(*_eigen(row_factor), *_eigen(column_factor), layout)


def factors_of(form: KroneckerFactors) -> tuple[jax.Array, jax.Array]:
    """Multiplies out the two factors of a form.

    Args:
      form: the leaf's form.

    Returns:
      A, `[groups, rows, rows]`, or its diagonal `[groups, rows]`; and G, `[groups, columns, columns]`, or its diagonal.

    Example:
      >>> layout = Layout((2, 1), (2, 1), (0, 1), (1, 2, 1))
      >>> form = from_factors(jnp.array([[[2.0, 1.0], [1.0, 2.0]]]), jnp.ones((1, 1)), layout)
      >>> factors_of(form)[0].round(3)
      Array([[[2., 1.],
              [1., 2.]]], dtype=float32)
    """

    def of_side(basis: jax.Array | None, values: jax.Array) -> jax.Array:
        return values if basis is None else precise_einsum("gij,gj,gkj->gik", basis, values, basis)

    return of_side(form.row_basis, form.row_values), of_side(form.column_basis, form.column_values)


def times(form: Form, change: jax.Array) -> jax.Array:
    """Multiplies a form by a change of the leaf: half the gradient of changeᵀ F change.

        form · change    or    A · change · G

    Args:
      form: the leaf's form.
      change: an array like the leaf.

    Returns:
      An array like the leaf.

    Example:
      >>> times(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
      Array([3., 8.], dtype=float32)
    """
    if not isinstance(form, KroneckerFactors):
        return decompress(form) * change
    return _from_eigenbasis(form, _values(form) * _to_eigenbasis(form, change))


def quadratic_terms(form: Form, change: jax.Array) -> jax.Array:
    """Computes the terms whose sum is changeᵀ F change; none is negative.

        form · change²    or    row_values ⊗ column_values · (row_basisᵀ · change · column_basis)²

    Args:
      form: the leaf's form.
      change: an array like the leaf.

    Returns:
      An array, to be summed.

    Example:
      >>> quadratic_terms(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
      Array([ 9., 32.], dtype=float32)
    """
    if not isinstance(form, KroneckerFactors):
        return decompress(form) * change * change
    return _values(form) * jnp.square(_to_eigenbasis(form, change))


def shrink(form: KroneckerFactors, change: jax.Array, step_size: jax.Array) -> jax.Array:
    """Computes what the proximal step takes away from a change of the leaf.

        change − (1 + step_size · F)⁻¹ change
        = row_basis · [x · s / (1 + s)] · column_basisᵀ
          with x = row_basisᵀ · change · column_basis and s = step_size · row_values ⊗ column_values

    Args:
      form: the leaf's form.
      change: an array like the leaf: what leaves the anchor.
      step_size: η λ, not negative; a scalar.

    Returns:
      An array like the leaf.

    Example:
      >>> layout = Layout((1, 2), (1, 2), (0, 1), (1, 1, 2))
      >>> form = KroneckerFactors(None, jnp.ones((1, 1)), None, jnp.array([[0.0, 3.0]]), layout)
      >>> shrink(form, jnp.array([[1.0, 1.0]]), jnp.array(1.0))
      Array([[0.  , 0.75]], dtype=float32)
    """
    largest = jnp.finfo(change.dtype).max  # an infinite stiffness, divided by itself or times 0, would be NaN
    stiffness = jnp.minimum(jnp.minimum(step_size, largest) * _values(form), largest)
    return _from_eigenbasis(form, stiffness / (1 + stiffness) * _to_eigenbasis(form, change))


def scale(form: Form, factor: ArrayLike) -> Form:
    """Multiplies a form by a number.

    Args:
      form: the leaf's form.
      factor: a number, not negative.

    Returns:
      The form, in its own dtype.

    Example:
      >>> scale(jnp.array([1.0, 2.0]), 3.0)
      Array([3., 6.], dtype=float32)
    """
    if isinstance(form, CompressedDiagonal):
        return dataclasses.replace(form, scale=jnp.asarray(factor, form.dtype) * form.scale)
    if not isinstance(form, KroneckerFactors):
        return jnp.asarray(factor, form.dtype) * form
    return dataclasses.replace(form, row_values=jnp.asarray(factor, form.dtype) * form.row_values)


def add(form: Form, other: Form) -> Form:
    """Adds two forms of one leaf: exactly if they are diagonal, else as the nearest Kronecker product.

    The nearest product has the smallest Frobenius distance from A ⊗ G + A′ ⊗ G′. Its factors are weighted sums,
    α A + α′ A′ and β G + β′ G′. The weights are the first singular vectors of the rearranged sum (Van Loan), which has
    rank 2. So they are found from the inner products of the factors alone. `sum_error` is the distance.

    Args:
      form: the leaf's form.
      other: another one: both are diagonal, or have one layout.

    Returns:
      The form of the sum. It is an array if both are diagonal.

    Example:
      >>> add(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
      Array([4., 6.], dtype=float32)

    Van Loan and Pitsianis 1993, Approximation with Kronecker products.
    """
    if not (isinstance(form, KroneckerFactors) and isinstance(other, KroneckerFactors)):
        return decompress(form) + decompress(other)
    rows, columns, sizes = _unit_factors(form, other)
    row_weights, column_weights, *_ = nearest_product(inner_products(rows), inner_products(columns), sizes)

    def weighted(weights: jax.Array, factors: jax.Array) -> jax.Array:
        return jnp.sum(weights.reshape(*weights.shape, *[1] * (factors.ndim - 2)) * factors, axis=0)

    return from_factors(weighted(row_weights, rows), weighted(column_weights, columns), form.layout)


def sum_error(form: Form, other: Form) -> jax.Array:
    """Computes how far `add` is from the sum of two forms of one leaf.

        ‖add(form, other) − (form + other)‖ / ‖form + other‖,   in Frobenius norm

    Args:
      form: the leaf's form.
      other: another one: both are diagonal, or have one layout.

    Returns:
      A scalar: 0 for diagonal forms; at most 1/√2.

    Example:
      >>> sum_error(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
      Array(0., dtype=float32)
    """
    if not (isinstance(form, KroneckerFactors) and isinstance(other, KroneckerFactors)):
        return jnp.zeros((), form.dtype)
    rows, columns, sizes = _unit_factors(form, other)
    *_, error, norm = nearest_product(inner_products(rows), inner_products(columns), sizes)
    largest = jnp.max(norm)
    error, norm = (jnp.sum(jnp.square(x / jnp.where(largest > 0, largest, 1))) for x in (error, norm))
    return jnp.sqrt(error / jnp.where(norm > 0, norm, 1))


def diagonal(form: Form) -> jax.Array:
    """Computes the diagonal of a form.

    Args:
      form: the leaf's form.

    Returns:
      An array like the leaf.

    Example:
      >>> diagonal(jnp.array([1.0, 2.0]))
      Array([1., 2.], dtype=float32)
    """
    if not isinstance(form, KroneckerFactors):
        return decompress(form)

    def of_side(basis: jax.Array | None, values: jax.Array) -> jax.Array:
        return values if basis is None else precise_einsum("gij,gj->gi", jnp.square(basis), values)

    rows, columns = of_side(form.row_basis, form.row_values), of_side(form.column_basis, form.column_values)
    return form.layout.from_matrices(rows[:, :, None] * columns[:, None, :])


def trace(form: Form) -> jax.Array:
    """Computes the sum of the diagonal of a form.

    Args:
      form: the leaf's form.

    Returns:
      A scalar.

    Example:
      >>> trace(jnp.array([1.0, 2.0]))
      Array(3., dtype=float32)
    """
    if not isinstance(form, KroneckerFactors):
        return jnp.sum(decompress(form))
    return jnp.sum(jnp.sum(form.row_values, axis=1) * jnp.sum(form.column_values, axis=1))


def zeros_like(form: Form | jax.ShapeDtypeStruct) -> Form:
    """Makes the form of a leaf to which nothing matters.

    Args:
      form: a form of the kind and layout wanted. Its arrays may be `jax.ShapeDtypeStruct`s.

    Returns:
      A form of zeros; bases are identity matrices.

    Example:
      >>> zeros_like(jnp.array([1.0, 2.0]))
      Array([0., 0.], dtype=float32)
    """
    if isinstance(form, CompressedDiagonal):
        return CompressedDiagonal(*(jnp.zeros(array.shape, array.dtype) for array in (form.codes, form.scale)))
    if not isinstance(form, KroneckerFactors):
        return jnp.zeros(jnp.shape(form), jnp.result_type(form))

    def identity(basis: jax.Array | None) -> jax.Array | None:
        return None if basis is None else jnp.broadcast_to(jnp.eye(basis.shape[-1], dtype=basis.dtype), basis.shape)

    return KroneckerFactors(
        identity(form.row_basis),
        jnp.zeros(form.row_values.shape, form.dtype),
        identity(form.column_basis),
        jnp.zeros(form.column_values.shape, form.dtype),
        form.layout,
    )


def num_bytes(importance: Params) -> int:
    """Counts the bytes of an importance, or of any tree.

    Args:
      importance: a tree of forms; arrays may be `jax.ShapeDtypeStruct`s, so that the memory is
        known before it is needed: `num_bytes(jax.eval_shape(importance_fn, params))`.

    Returns:
      The number of bytes.

    Example:
      >>> num_bytes({"w": jnp.zeros((2, 3))})
      24
    """
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(importance))


def _eigen(factor: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """Returns a factor's eigenvectors, or None if it is diagonal, and its eigenvalues."""
    if factor.ndim == 2:
        return None, factor
    values, basis = jax.vmap(_eigen_of_one)(factor)
    return basis, jnp.maximum(values, 0)


@jax.custom_batching.sequential_vmap
def _eigen_of_one(factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    # One matrix after the other: on a CPU, batches wait for each other's threads, and a program of several may hang.
    return tuple(jnp.linalg.eigh(factor))


def _unit_factors(form: KroneckerFactors, other: KroneckerFactors) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the row factors of two forms, `[2, groups, ...]`, their column factors, and their sizes, `[2, groups]`.

    Factors are scaled to the largest eigenvalue 1, so that no square over- or underflows.
    """

    def of_form(form: KroneckerFactors) -> tuple[jax.Array, jax.Array, jax.Array]:
        row_size, column_size = jnp.max(form.row_values, axis=1), jnp.max(form.column_values, axis=1)
        row_values = form.row_values / jnp.where(row_size > 0, row_size, 1)[:, None]
        column_values = form.column_values / jnp.where(column_size > 0, column_size, 1)[:, None]
        unit = dataclasses.replace(form, row_values=row_values, column_values=column_values)
        return *factors_of(unit), row_size * column_size

    rows, columns, sizes = map(jnp.stack, zip(of_form(form), of_form(other), strict=True))
    return rows, columns, sizes


def _values(form: KroneckerFactors) -> jax.Array:
    """Returns the eigenvalues of A ⊗ G, `[groups, rows, columns]`."""
    return form.row_values[:, :, None] * form.column_values[:, None, :]


def _to_eigenbasis(form: KroneckerFactors, change: jax.Array) -> jax.Array:
    x = form.layout.to_matrices(change)
    x = x if form.row_basis is None else precise_einsum("gki,gkj->gij", form.row_basis, x)
    return x if form.column_basis is None else precise_einsum("gik,gkj->gij", x, form.column_basis)


def _from_eigenbasis(form: KroneckerFactors, x: jax.Array) -> jax.Array:
    x = x if form.column_basis is None else precise_einsum("gik,gjk->gij", x, form.column_basis)
    x = x if form.row_basis is None else precise_einsum("gik,gkj->gij", form.row_basis, x)
    return form.layout.from_matrices(x)
