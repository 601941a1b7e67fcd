"""Each method's importance and rule."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from lifelong_jax import Batch, empirical_fisher_diagonal, fisher_diagonal, init_training, mas_importance, methods


def logits_fn(params, x):
    return x @ params


def make_batch():
    inputs = jax.random.normal(jax.random.key(0), (6, 3))
    return Batch(inputs, jnp.array([0, 1, 1, 0, 1, 0]), jnp.array([1.0, 1, 1, 1, 2, 0]))


def importance_of(method):
    params = jax.random.normal(jax.random.key(1), (3, 2))
    state = init_training(optax.identity(), params, jax.random.key(3))
    return method.importance_fn(logits_fn, state, make_batch(), jax.random.key(2))


def test_importances():
    params = jax.random.normal(jax.random.key(1), (3, 2))
    batch = make_batch()

    def loss_fn(params, example):
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits_fn(params, example.inputs), example.labels)

    expected = {
        methods.finetune(): jnp.zeros((3, 2)),
        methods.l2(): jnp.ones((3, 2)),
        methods.ewc("exact"): fisher_diagonal(logits_fn, params, batch.inputs, weights=batch.weights),
        methods.ewc("sampled"): fisher_diagonal(
            logits_fn, params, batch.inputs, num_samples=1, key=jax.random.key(2), weights=batch.weights
        ),
        methods.ewc("empirical"): empirical_fisher_diagonal(loss_fn, params, batch, weights=batch.weights),
        methods.mas(): mas_importance(logits_fn, params, batch.inputs, weights=batch.weights),
    }
    for method, importance in expected.items():
        chex.assert_trees_all_close(importance_of(method), importance, rtol=1e-6)


def test_names_and_rules():
    names = ["finetune", "l2", "ewc", "mas", "local_mas", "si", "rwalk"]
    assert [getattr(methods, name)().name for name in names] == names
    assert methods.ewc(rule="latest", decay=0.5)[2:4] == ("latest", 0.5)
    assert methods.si(rule="separate", decay=0.5)[2:4] == ("separate", 0.5)
    assert methods.rwalk()[2:4] == ("latest", 0.0)  # what it keeps of earlier tasks is in its state


def test_what_is_compiled_by_is_one_object_per_setting():
    for method in (methods.si, methods.rwalk):
        assert method() == method()
        assert method(damping=0.5) != method()


def test_unknown_fisher():
    with pytest.raises(ValueError, match="fisher must be one of exact, sampled, empirical"):
        methods.ewc("diagonal")
