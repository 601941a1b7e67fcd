"""Gradients through importances, as of a regulariser: against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import (
    empirical_fisher_diagonal,
    fisher_diagonal,
    kronecker_fisher,
    local_mas_importance,
    mas_importance,
    quadratic_penalty,
)
from lifelong_jax.consolidation import Consolidation
from lifelong_jax.importance.layers import layer_output
from tests.lifelong_jax.importance.problems import loss_of, make_data, make_mlp, mlp


def masked(params, x):
    return jnp.where(np.array([True, False, True, False]), mlp(params, x), float(np.finfo(np.float32).min))


def saturated(params, x):
    return 50 * mlp(params, x)


def marked(params, x):
    return layer_output(jnp.tanh(x @ params["w1"] + params["b1"])) @ params["w2"]


def tokens(params, x):
    return jnp.stack([mlp(params, x), mlp(params, 2 * x)])


IMPORTANCES = {
    "exact": functools.partial(fisher_diagonal, mlp),
    "exact, masked classes": functools.partial(fisher_diagonal, masked),
    "exact, saturated": functools.partial(fisher_diagonal, saturated),
    "exact, several labels": functools.partial(fisher_diagonal, tokens),
    "sampled": functools.partial(fisher_diagonal, mlp, num_samples=3, key=np.array([0, 1], np.uint32)),
    "gaussian": functools.partial(fisher_diagonal, mlp, likelihood="gaussian"),
    "bernoulli": functools.partial(fisher_diagonal, mlp, likelihood="bernoulli"),
    "empirical": functools.partial(empirical_fisher_diagonal, loss_of(mlp)),
    "mas": functools.partial(mas_importance, mlp),
    "mas, jacobian": functools.partial(mas_importance, mlp, output_norm="jacobian"),
}


@pytest.mark.parametrize("name", IMPORTANCES)
def test_gradient_of_an_importance_is_right_by_both_methods(name):
    with jax.enable_x64(True):
        params = make_mlp(np.float64)
        inputs, labels = make_data(np.float64)
        inputs = jnp.concatenate([inputs, jnp.zeros_like(inputs[:1])])  # an input of 0 has gradients of 0
        examples = (inputs, jnp.append(labels, 0)) if name == "empirical" else inputs
        random = np.random.default_rng(3)
        direction = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), params)

        def weighted_trace(params, method):
            importance = IMPORTANCES[name](params, examples, method=method)
            return sum(jnp.vdot(jnp.cos(leaf), leaf) for leaf in jax.tree.leaves(importance))

        def along(step):
            moved = jax.tree.map(lambda leaf, change: leaf + step * change, params, direction)
            return weighted_trace(moved, "reference")

        expected = (along(1e-6) - along(-1e-6)) / 2e-6
        for method in ("structured", "reference"):
            gradient = jax.jit(jax.grad(functools.partial(weighted_trace, method=method)))(params)
            found = sum(map(jnp.vdot, jax.tree.leaves(gradient), jax.tree.leaves(direction)))
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_local_mas_refuses_to_be_differentiated():
    def trace(params):
        importance = local_mas_importance(marked, params, make_data()[0])
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(importance))

    assert np.isfinite(jax.grad(lambda params: trace(jax.lax.stop_gradient(params)))(make_mlp())["w1"]).all()
    with pytest.raises(ValueError, match="local_mas_importance cannot be differentiated"):
        jax.grad(trace)(make_mlp())


def test_kronecker_factors_refuse_to_be_differentiated_but_a_penalty_with_them_does_not():
    params, (inputs, _) = make_mlp(), make_data()

    def penalty(params, fisher_params):
        anchor = jax.tree.map(jnp.zeros_like, params)
        return quadratic_penalty(params, Consolidation(anchor, kronecker_fisher(mlp, fisher_params, inputs)), 1.0)

    gradient = jax.jit(jax.grad(penalty))(params, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    with pytest.raises(ValueError, match="Kronecker factors cannot be differentiated"):
        jax.grad(penalty, argnums=1)(params, params)
