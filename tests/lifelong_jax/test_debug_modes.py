"""The library under JAX's debug modes: NaN as an error, no promotion of ranks, and a search for leaked tracers."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lifelong_jax as ll
from lifelong_jax import methods

CLASSES = [[0, 1], [2, 3]]


@contextlib.contextmanager
def debug_modes():
    """All at once: an error of one is none of another."""
    with jax.debug_nans(True), jax.numpy_rank_promotion("raise"), jax.checking_leaks():
        yield


def network(params, x):
    return jnp.dot(jnp.tanh(jnp.dot(x, params["w1"]) + params["b1"]), params["w2"])


def make_problem():
    random = np.random.default_rng(0)
    shapes = {"w1": (5, 6), "b1": (6,), "w2": (6, 4)}
    params = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    labels = jnp.asarray(np.arange(12) % 4, jnp.int32)
    batch = ll.Batch(jnp.asarray(random.normal(size=(12, 5)), jnp.float32), labels, jnp.ones(12))
    return params, batch


def with_coupled_penalty(strength):
    return optax.chain(ll.add_quadratic_penalty(strength), optax.sgd(0.1))


def with_proximal_penalty(strength):
    return optax.chain(optax.sgd(0.1), ll.proximal_quadratic_penalty(0.1, strength, every=2))


def test_importances():
    params, batch = make_problem()
    key = jax.random.key(0)

    def loss(params, example):
        return -jax.nn.log_softmax(network(params, example.inputs))[example.labels]

    with debug_modes():
        for method in ("structured", "reference"):
            for likelihood in ("categorical", "gaussian", "bernoulli"):
                options = {"likelihood": likelihood, "method": method, "microbatch_size": 5}
                ll.fisher_diagonal(network, params, batch.inputs, weights=batch.weights, **options)
                ll.fisher_diagonal(network, params, batch.inputs, num_samples=2, key=key, **options)
            ll.empirical_fisher_diagonal(loss, params, batch, method=method)
            for norm in ("squared_l2", "jacobian"):
                ll.mas_importance(network, params, batch.inputs, output_norm=norm, method=method)
        importance = ll.kronecker_fisher(network, params, batch.inputs)
        consolidation = ll.consolidate(ll.init_consolidation(params, importance), params, importance, rule="latest")
        consolidation = ll.consolidate(consolidation, params, importance, rule="latest")
        jax.grad(ll.quadratic_penalty)(params, consolidation, 1.0)


@pytest.mark.parametrize("name", ["ewc", "kfac", "si", "rwalk"])
def test_sequences_and_sweeps(name):
    params, batch = make_problem()
    optimizer_fn = with_proximal_penalty if name == "kfac" else with_coupled_penalty
    recipe = ll.Recipe(network, optimizer_fn, num_epochs=1, batch_size=4, scenario="class")
    tasks = ll.split_tasks(batch, batch, CLASSES, 4)
    method = getattr(methods, name)()
    with debug_modes():
        learned = ll.learn_tasks(method, recipe, params, tasks, jax.random.key(1), strength=1.0)
        swept = ll.learn_sweep(method, recipe, [ll.SweepRun(params, tasks, jax.random.key(1), 1.0)])
    np.testing.assert_array_equal(np.isnan(swept.accuracy_matrix[0]), np.isnan(learned.accuracy_matrix))
    np.testing.assert_allclose(swept.accuracy_matrix[0], learned.accuracy_matrix, rtol=1e-5)
