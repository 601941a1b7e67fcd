"""Importances scaled to mean 1, or to maximum 1."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import normalize_importance
from tests.problems import flat


def make_importance(seed):
    """An importance, some of it 0."""
    random = np.random.default_rng(seed)
    return {"w": jnp.maximum(random.normal(size=(3, 2)), 0), "b": jnp.maximum(random.normal(size=4), 0)}


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e30])
def test_normalised_importances_have_mean_or_maximum_1(scale):
    importance = jax.tree.map(lambda leaf: scale * (leaf + 0.1), make_importance(0))
    np.testing.assert_allclose(flat(normalize_importance(importance)).mean(), 1, rtol=1e-6)
    np.testing.assert_allclose(flat(normalize_importance(importance, to="max")).max(), 1, rtol=1e-6)
    ratios = flat(normalize_importance(importance)) / flat(importance)
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)


@pytest.mark.parametrize("to", ["mean", "max"])
def test_an_importance_of_0_stays(to):
    zeros = jax.tree.map(jnp.zeros_like, make_importance(0))
    chex.assert_trees_all_equal(jax.jit(functools.partial(normalize_importance, to=to))(zeros), zeros)


def test_normalising_is_checked():
    with pytest.raises(ValueError, match="to must be one of mean, max, not 'sum'"):
        normalize_importance(make_importance(0), to="sum")
    with pytest.raises(ValueError, match=r"importance\['b'\] has entries that are NaN"):
        normalize_importance({"b": jnp.array(jnp.nan)})


def test_normalising_huge_importances():
    normalised = normalize_importance(jnp.array([3e38, 3e38, 0.0]), to="max")
    np.testing.assert_allclose(normalised, [1.0, 1.0, 0.0], rtol=1e-6)


def test_what_is_not_protected_stays_none():
    assert normalize_importance({"w": jnp.ones(2), "b": None})["b"] is None
