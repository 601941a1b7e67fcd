"""Geometry of parameter space: planes through solutions, losses and penalties on them, and overlaps of importances."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lifelong_jax import _checks, forms
from lifelong_jax._numerics import wide_dtype
from lifelong_jax._processes import to_host
from lifelong_jax.types import Examples, LossFn, Params


class Plane(NamedTuple):
    """A plane in the space of all parameters, with orthonormal axes.

    Attributes:
      origin: a tree like the parameters: the point (0, 0).
      axes: two trees like the parameters, orthogonal and of length 1.
    """

    origin: Params
    axes: tuple[Params, Params]


def plane_through(origin: Params, first: Params, second: Params) -> Plane:
    """Makes the plane through three points.

    The first axis points from `origin` to `first`. The second coordinate of `second` is positive.

    Args:
      origin: a tree of floating-point arrays; the point (0, 0).
      first: a tree like `origin`.
      second: a tree like `origin`, not on the line through the other two.

    Returns:
      The plane.

    Raises:
      ValueError: if the trees differ in structure or shapes, or the points lie on one line.

    Example:
      >>> from lifelong_jax.geometry import plane_coordinates
      >>> plane = plane_through(jnp.zeros(3), jnp.array([0.0, 2.0, 0.0]), jnp.array([3.0, 4.0, 0.0]))
      >>> plane_coordinates(plane, jnp.array([3.0, 4.0, 0.0])).tolist()
      [4.0, 3.0]

    Garipov et al. 2018, arXiv 1802.10026, §3.
    """
    _checks.check_same_structure("first", first, "origin", origin)
    _checks.check_same_structure("second", second, "origin", origin)
    # In float64 on the host: the rest of the second direction may be a small difference of large numbers.
    start = _flatten(origin)
    axes: list[np.ndarray] = []
    for point in (first, second):
        direction = _flatten(point) - start
        rest = direction - sum(axis * (axis @ direction) for axis in axes)
        length = np.linalg.norm(rest)
        if not length > 1e-6 * np.linalg.norm(direction):
            raise ValueError("the three points lie on one line, so they define no plane.")
        axes.append(rest / length)
    return Plane(origin, tuple(_unflatten(axis, origin) for axis in axes))


def plane_coordinates(plane: Plane, params: Params) -> np.ndarray:
    """Computes the coordinates of parameters in a plane, onto which they are projected.

    Args:
      plane: from `plane_through`.
      params: a tree like the plane's origin.

    Returns:
      `[2]`, float64.

    Raises:
      ValueError: if the trees differ in structure or shapes.
    """
    _checks.check_same_structure("params", params, "plane.origin", plane.origin)
    offset = _flatten(params) - _flatten(plane.origin)
    return np.array([_flatten(axis) @ offset for axis in plane.axes])


def plane_point(plane: Plane, coordinates: ArrayLike) -> Params:
    """Computes the parameters at a point of a plane.

    Args:
      plane: from `plane_through`.
      coordinates: `[2]`.

    Returns:
      A tree like the plane's origin, computed in float32 or wider and rounded to its dtypes.
    """

    def of_leaf(origin: jax.Array, *axes: jax.Array) -> jax.Array:
        dtype = wide_dtype(axes[0])
        pairs = zip(coordinates, axes, strict=True)  # type: ignore[arg-type]
        steps = (jnp.asarray(x, dtype) * axis.astype(dtype) for x, axis in pairs)
        return sum(steps, start=jnp.asarray(origin, dtype)).astype(axes[0].dtype)

    return jax.tree.map(of_leaf, plane.origin, *plane.axes)


def loss_on_plane(loss_fn: LossFn, plane: Plane, first: ArrayLike, second: ArrayLike, examples: Examples) -> np.ndarray:
    """Computes the mean loss at the points of a grid in a plane.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar`, the loss of one example, without batch axis. Pass the same function
        object in every call, or it is compiled again.
      plane: from `plane_through`.
      first: `[num_columns]`, the first coordinates of the grid.
      second: `[num_rows]`, the second coordinates of the grid.
      examples: a tree of arrays `[num_examples, ...]`.

    Returns:
      `[num_rows, num_columns]`, float32 or, if the losses are wider, their dtype.

    Example:
      >>> from lifelong_jax.geometry import plane_through
      >>> plane = plane_through(jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
      >>> loss_on_plane(lambda params, x: jnp.sum(x * params), plane, [0.0, 1.0], [2.0], jnp.ones((3, 2))).tolist()
      [[2.0, 3.0]]
    """
    _checks.check_examples("examples", examples, None)
    rows, columns = np.meshgrid(second, first, indexing="ij")
    grid = jnp.asarray(np.stack([columns, rows], axis=-1).reshape(-1, 2))
    return np.asarray(_mean_losses(loss_fn, plane, grid, examples)).reshape(rows.shape)


def penalty_on_plane(plane: Plane, importance: Params) -> np.ndarray:
    """Computes the matrix M of a quadratic penalty in a plane, for strength 1 and the anchor in the plane's origin.

        penalty = ½ · cᵀ M c,   M_jk = Σ_i importance_i · axes_j,i · axes_k,i    or    axes_jᵀ F axes_k

    with c the coordinates of a point, and F the form of an importance with Kronecker factors.

    Args:
      plane: from `plane_through`.
      importance: a tree like the plane's origin.

    Returns:
      M, `[2, 2]`, float64.

    Raises:
      ValueError: if the trees differ in structure or shapes.

    Example:
      >>> from lifelong_jax.geometry import plane_through
      >>> plane = plane_through(jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
      >>> penalty_on_plane(plane, jnp.array([2.0, 3.0])).tolist()
      [[2.0, 0.0], [0.0, 3.0]]
    """
    _checks.check_same_structure("importance", importance, "plane.origin", plane.origin)
    products = [forms.tree_map(forms.times, importance, axis) for axis in plane.axes]
    return np.stack([_flatten(axis) for axis in plane.axes]) @ np.stack([_flatten(product) for product in products]).T


def importance_overlap(importance: Params, other: Params) -> float:
    """Computes how much two tasks rely on the same parameters, from 0 (disjoint) to 1 (proportional importances).

        overlap = 1 − d²,   d² = ½ tr(F + G − 2 (F G)^½) = 1 − Σ_i (F_i · G_i)^½

    with F and G the two importances as diagonal matrices, each scaled to trace 1, and d their Fréchet distance.

    Args:
      importance: a diagonal importance, a tree of arrays; of a single layer, say.
      other: a tree like `importance`.

    Returns:
      A number in [0, 1]; NaN if an importance is 0 everywhere.

    Raises:
      ValueError: if the trees differ in structure or shapes, or have entries that are NaN, infinite or negative.

    Example:
      >>> round(importance_overlap(jnp.array([1.0, 1.0, 0.0]), jnp.array([0.0, 3.0, 3.0])), 3)
      0.5

    Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114, figure 2C and supplementary information, §4.3.
    """
    _checks.check_same_structure("other", other, "importance", importance)
    _checks.check_importance("importance", importance)
    _checks.check_importance("other", other)
    first, second = (_flatten(forms.tree_map(forms.diagonal, tree)) for tree in (importance, other))
    scale = first.sum() * second.sum()
    return float(np.sqrt(first * second).sum() / np.sqrt(scale)) if scale > 0 else float("nan")


@functools.partial(jax.jit, static_argnums=0)
def _mean_losses(loss_fn: LossFn, plane: Plane, grid: jax.Array, examples: Examples) -> jax.Array:
    def mean_loss(coordinates: jax.Array) -> jax.Array:
        losses = jax.vmap(loss_fn, in_axes=(None, 0))(plane_point(plane, coordinates), examples)
        return jnp.mean(losses, dtype=wide_dtype(losses))

    # In batches of points: all at once would need a copy of the parameters for each.
    return jax.lax.map(mean_loss, grid, batch_size=8)


def _flatten(tree: Params) -> np.ndarray:
    return np.concatenate([np.ravel(to_host(leaf).astype(np.float64)) for leaf in jax.tree.leaves(tree)])


def _unflatten(flat: np.ndarray, like: Params) -> Params:
    leaves, structure = jax.tree.flatten(like)
    parts = np.split(flat, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return structure.unflatten(
        [jnp.asarray(part.reshape(leaf.shape), leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    )
