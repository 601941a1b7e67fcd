"""The nearest Kronecker product to a sum of two, from the inner products of their factors."""

import jax
import jax.numpy as jnp


def inner_products(factors: jax.Array) -> jax.Array:
    """Maps `[2, groups, ...]` to `[groups, 2, 2]`."""
    flat = factors.reshape(*factors.shape[:2], -1)
    return precise_einsum("igx,jgx->gij", flat, flat)


def nearest_product(
    rows: jax.Array, columns: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Finds the nearest product to Σ_i sizes_i A_i ⊗ G_i from the factors' inner products, `[groups, 2, 2]`.

    Returns the weights of row factors and of column factors, `[2, groups]`, the error and the norm of the sum,
    `[groups]`.
    """
    row_norms, column_norms = (jnp.sqrt(jnp.einsum("gii->ig", products)) for products in (rows, columns))
    norms = sizes * row_norms * column_norms  # of the two products
    largest = jnp.max(norms, axis=0, keepdims=True)
    # The product i is relative_i² · largest · (a unit factor) ⊗ (a unit factor).
    relative = jnp.sqrt(norms / jnp.where(largest > 0, largest, 1))
    row_scales, column_scales = (relative / jnp.where(norms > 0, norms, 1) for norms in (row_norms, column_norms))

    def scaled(products: jax.Array, scales: jax.Array) -> jax.Array:
        return products * scales.T[:, :, None] * scales.T[:, None, :]

    rows, columns = scaled(rows, row_scales), scaled(columns, column_scales)
    # A singular pair of Σ_i vec(A_i) vec(G_i)ᵀ is (Σ_i α_i A_i, Σ_i β_i G_i) with α ∝ columns · β and β ∝ rows · α. So
    # α is the first eigenvector of columns · rows, whose entries are not negative.
    products = precise_einsum("gij,gjk->gik", columns, rows)

    def square(_: int, matrix: jax.Array) -> jax.Array:  # after 12 times, the first eigenvector is all that is left
        matrix = precise_einsum("gij,gjk->gik", matrix, matrix)
        size = jnp.sum(matrix, axis=(1, 2), keepdims=True)
        return matrix / jnp.where(size > 0, size, 1)

    alpha = jnp.sum(jax.lax.fori_loop(0, 12, square, products), axis=2)
    length = jnp.sqrt(precise_einsum("gi,gij,gj->g", alpha, rows, alpha))[:, None]
    alpha = alpha / jnp.where(length > 0, length, 1)
    beta = precise_einsum("gij,gj->gi", rows, alpha)  # of length σ, since Σ_i α_i A_i has length 1
    squared_norm, squared_sigma = (
        jnp.sum(rows * columns, axis=(1, 2)),
        precise_einsum("gi,gij,gj->g", beta, columns, beta),
    )
    error = jnp.sqrt(jnp.maximum(squared_norm - squared_sigma, 0))
    share = jnp.sqrt(largest)  # both sides share the size of the product
    return (
        share * alpha.T * row_scales,
        share * beta.T * column_scales,
        largest[0] * error,
        largest[0] * jnp.sqrt(squared_norm),
    )


def precise_einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """Computes an einsum without the short cuts that accelerators take by default."""
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)
