"""Each method's importance and rule."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lifelong_jax import Batch, empirical_fisher_diagonal, fisher_diagonal, init_training, mas_importance, methods
from lifelong_jax.losses import cross_entropy
from lifelong_jax.objectives import CLASSIFICATION
from tests.problems import as_batch


def logits_fn(params, x):
    return x @ params


INPUTS = np.random.default_rng(0).normal(size=(6, 3))
BATCH = as_batch(INPUTS, np.array([0, 1, 1, 0, 1, 0]), np.array([1.0, 1, 1, 1, 2, 0]))


def test_narrow_weights_of_examples_are_summed_wide():
    """Their dtype may differ from that of the labels' weights; in bfloat16, 257 ones make 256."""
    random = np.random.default_rng(0)
    labels, label_weights = random.integers(2, size=(257, 4)), random.uniform(size=(257, 4)).astype(np.float32)
    batch = Batch(jnp.asarray(random.normal(size=(257, 4, 3)), jnp.float32), labels, None, None, label_weights)
    state = init_training(optax.identity(), jnp.ones((3, 2)), jax.random.key(3))
    found, expected = (
        methods.mas().importance_fn(
            logits_fn, CLASSIFICATION, state, batch._replace(weights=jnp.ones(257, dtype)), None
        )
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_importances():
    params = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), jnp.float32)
    state = init_training(optax.identity(), params, jax.random.key(3))
    inputs, weights, key = BATCH.inputs, BATCH.weights, jax.random.key(2)

    def loss_fn(params, example):
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits_fn(params, example.inputs), example.labels)

    expected = {
        methods.finetune(): lambda: jnp.zeros((3, 2)),
        methods.l2(): lambda: jnp.ones((3, 2)),
        methods.ewc("exact"): lambda: fisher_diagonal(logits_fn, params, inputs, weights=weights),
        methods.ewc("sampled"): lambda: fisher_diagonal(
            logits_fn, params, inputs, num_samples=1, key=key, weights=weights
        ),
        methods.ewc("empirical"): lambda: empirical_fisher_diagonal(loss_fn, params, BATCH, weights=weights),
        methods.mas(): lambda: mas_importance(logits_fn, params, inputs, weights=weights),
    }

    @jax.jit  # one program
    def importances():
        return [
            (method.importance_fn(logits_fn, CLASSIFICATION, state, BATCH, key), make())
            for method, make in expected.items()
        ]

    for importance, of_estimator in importances():
        chex.assert_trees_all_close(importance, of_estimator, rtol=1e-6)


@pytest.mark.parametrize("method", [methods.ewc("empirical"), methods.kfac("empirical")], ids=["ewc", "kfac"])
def test_true_labels_need_no_key(method):
    # Of one label there is no sign; several then take a pass each.
    state = init_training(optax.identity(), jnp.ones((3, 2)), jax.random.key(3))

    @jax.jit
    def importances(key):
        return [method.importance_fn(logits_fn, CLASSIFICATION, state, BATCH, key) for key in (None, key)]

    chex.assert_trees_all_close(*importances(jax.random.key(2)), rtol=1e-6)


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


def test_the_loss_is_of_one_label():
    column = jax.tree.map(lambda leaf: leaf[0], BATCH)._replace(labels=jnp.zeros(1, int))
    with pytest.raises(ValueError, match=r"labels has shape \(1,\) for one example, .*labels\[:, 0\]"):
        cross_entropy(logits_fn)(jnp.ones((3, 2)), column)
