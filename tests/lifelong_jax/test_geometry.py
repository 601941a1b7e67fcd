"""Planes against arithmetic by hand, and the overlap of importances against the Fréchet distance of whole matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import Consolidation, quadratic_penalty
from lifelong_jax.geometry import (
    importance_overlap,
    loss_on_plane,
    penalty_on_plane,
    plane_coordinates,
    plane_point,
    plane_through,
)
from tests.problems import flat

POINTS = jax.device_put(
    [
        {"w": np.array([[1.0, 2.0], [3.0, 4.0]]), "b": np.array(0.5)},
        {"w": np.array([[1.0, 2.0], [3.0, 7.0]]), "b": np.array(4.5)},
        {"w": np.array([[0.0, 2.0], [5.0, 4.0]]), "b": np.array(-0.5)},
    ]
)


def test_a_plane_holds_its_points():
    plane = plane_through(*POINTS)
    axes = np.stack([flat(axis) for axis in plane.axes])
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-6)
    coordinates = [plane_coordinates(plane, point) for point in POINTS]
    np.testing.assert_allclose(coordinates[0], [0, 0], atol=1e-6)
    np.testing.assert_allclose(coordinates[1], [5, 0], rtol=1e-6, atol=1e-6)  # along the first axis
    assert coordinates[2][1] > 0
    for point, at in zip(POINTS, coordinates, strict=True):
        np.testing.assert_allclose(flat(plane_point(plane, at)), flat(point), atol=1e-5)


def test_parameters_outside_are_projected():
    plane = plane_through(*POINTS)
    normal = np.linalg.svd(np.stack([flat(axis) for axis in plane.axes]))[2][-1]
    outside = {"b": POINTS[1]["b"] + 2 * normal[0], "w": POINTS[1]["w"] + 2 * normal[1:].reshape(2, 2)}
    np.testing.assert_allclose(plane_coordinates(plane, outside), plane_coordinates(plane, POINTS[1]), atol=1e-5)


def test_points_on_a_line_make_no_plane():
    with pytest.raises(ValueError, match="lie on one line"):
        plane_through(jnp.zeros(3), jnp.ones(3), -2 * jnp.ones(3))
    with pytest.raises(ValueError, match="lie on one line"):
        plane_through(jnp.zeros(3), jnp.zeros(3), jnp.ones(3))


def test_loss_and_penalty_on_a_plane():
    plane = plane_through(*POINTS)
    importance = {"w": jnp.array([[0.0, 1.0], [2.0, 3.0]]), "b": jnp.array(4.0)}
    consolidation = Consolidation(POINTS[0], importance)

    def loss_fn(params, x):
        return x * quadratic_penalty(params, consolidation, 1.0)

    first, second = np.array([-1.0, 0.0, 2.5]), np.array([0.5, 3.0])
    losses = loss_on_plane(loss_fn, plane, first, second, jnp.array([1.0, 3.0]))
    matrix = penalty_on_plane(plane, importance)
    for row, y in enumerate(second):
        for column, x in enumerate(first):
            at = np.array([x, y])
            np.testing.assert_allclose(losses[row, column], 2 * (at @ matrix @ at) / 2, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_planes_keep_the_dtype_of_the_parameters(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        plane = plane_through(jnp.zeros(2, dtype), jnp.array([1, 0], dtype), jnp.array([0, 1], dtype))
        for coordinates in ([1.0, 2.0], np.array([1.0, 2.0]), jnp.array([1.0, 2.0], jnp.float32)):
            point = plane_point(plane, coordinates)
            assert point.dtype == dtype
            np.testing.assert_array_equal(point.astype(jnp.float32), [1, 2])
        x = jnp.array([[1, 1], [3, 1]], dtype)
        losses = loss_on_plane(lambda params, x: jnp.sum(x * params), plane, [0.0, 1.0], [2.0], x)
        assert losses.dtype == np.promote_types(dtype, np.float32)
        np.testing.assert_array_equal(losses, [[2, 4]])


def test_what_is_laid_in_a_plane_is_like_its_origin():
    plane = plane_through(*POINTS)
    with pytest.raises(ValueError, match=r"importance\['b'\] has shape \(1,\), but plane.origin\['b'\] has \(\)"):
        penalty_on_plane(plane, {"w": jnp.ones((2, 2)), "b": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"params and plane.origin must be trees of one structure"):
        plane_coordinates(plane, jnp.ones(1))


def test_overlap_is_that_of_the_frechet_distance():
    first, second = np.array([0.1, 2.0, 0.0, 1.0]), np.array([3.0, 1.0, 1.0, 0.0])
    tree = {"a": jnp.array(second[:3]), "b": jnp.array(second[3:])}
    f, g = np.diag(first / first.sum()), np.diag(second / second.sum())
    distance_squared = np.trace(f + g - 2 * np.sqrt(f @ g)) / 2
    overlap = importance_overlap({"a": jnp.array(first[:3]), "b": jnp.array(first[3:])}, tree)
    np.testing.assert_allclose(overlap, 1 - distance_squared, rtol=1e-6)


def test_overlap_does_not_depend_on_scale():
    first, second = jnp.array([1.0, 2.0]), jnp.array([5.0, 0.5])
    np.testing.assert_allclose(importance_overlap(1e3 * first, first), 1, rtol=1e-6)
    np.testing.assert_allclose(importance_overlap(1e3 * first, second), importance_overlap(first, second), rtol=1e-6)
    assert importance_overlap(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])) == 0
    assert np.isnan(importance_overlap(jnp.zeros(2), first))


def test_overlap_refuses_what_is_no_importance():
    with pytest.raises(ValueError, match="other has entries that are NaN, infinite or negative"):
        importance_overlap(jnp.ones(2), jnp.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="other has shape"):
        importance_overlap(jnp.ones(2), jnp.ones(3))
