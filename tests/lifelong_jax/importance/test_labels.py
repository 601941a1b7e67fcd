"""Fisher information over the model's own labels: sampled ones, and the exact expectation over classes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from lifelong_jax import empirical_fisher_diagonal, fisher_diagonal
from tests.lifelong_jax.importance.problems import (
    NUM_CLASSES,
    NUM_FEATURES,
    linear,
    loss_of,
    make_data,
    make_linear,
    make_mlp,
    mlp,
    one_by_one,
    relative_distance,
    squared,
    weighted_sum,
)

# Sampled labels.


@functools.cache
def sampled_fishers(likelihood):
    """The exact Fisher information, and by number of samples that of sampled labels; in one program."""
    numbers = (100, 10_000)

    @jax.jit
    def run(params, inputs, key):
        options = {"likelihood": likelihood}
        sampled = [fisher_diagonal(mlp, params, inputs, num_samples=n, key=key, **options) for n in numbers]
        return fisher_diagonal(mlp, params, inputs, **options), sampled

    exact, sampled = jax.device_get(run(make_mlp(), make_data()[0], jax.random.key(3)))
    return exact, dict(zip(numbers, sampled, strict=True))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_sampled_fisher_converges_to_the_exact_one(likelihood):
    exact, sampled = sampled_fishers(likelihood)
    error = {num_samples: relative_distance(fisher, exact) for num_samples, fisher in sampled.items()}
    assert error[10_000] < 0.02
    assert error[10_000] < error[100] / 3  # as 1 / sqrt(num_samples): by 10


def test_sampled_fisher_does_not_converge_to_the_empirical_one():
    _, sampled = sampled_fishers("categorical")
    empirical = empirical_fisher_diagonal(loss_of(mlp), make_mlp(), make_data())
    assert relative_distance(sampled[10_000], empirical) > 0.2


def test_sample_does_not_depend_on_the_microbatch_size_but_on_the_key():
    @jax.jit
    def run(params, inputs):
        return [
            fisher_diagonal(mlp, params, inputs, num_samples=2, key=jax.random.key(key), microbatch_size=size)
            for key, size in ((0, 1), (0, 3), (1, 1))
        ]

    first, second, other = run(make_mlp(), make_data()[0])
    chex.assert_trees_all_close(first, second, rtol=1e-5, atol=1e-7)
    assert relative_distance(first, other) > 0.01


# The exact expectation over classes, by a factor of their covariance.

LOGITS = [
    [0.5, -1.0],
    [0.3, -1.0, 2.0, 0.1],
    [-200.0, 0.0, 1.0, -200.0],  # where no class before, or none after, is possible
    [0.0, 150.0, -150.0],  # beyond float32's smallest number
    [np.finfo(np.float32).min, 1.0, 2.0, np.finfo(np.float32).min, 0.0],
    [[1.0, 2.0, 0.0], [-1.0, 3.0, 1.0]],
]


def directions_of(logits):
    return np.random.default_rng(0).normal(size=(*np.shape(logits), 20))


@functools.cache
def fishers_of_logits(dtype):
    """For each of LOGITS, in one program."""

    def of_logits(logits, directions):
        return fisher_diagonal(lambda params, x: logits + x @ params, jnp.zeros(20, dtype), directions[None])

    with jax.enable_x64(dtype == "float64"):
        data = [(np.asarray(logits, dtype), directions_of(logits).astype(dtype)) for logits in LOGITS]
        return jax.device_get(jax.jit(lambda data: [of_logits(*each) for each in data])(data))


@pytest.mark.parametrize("number", range(len(LOGITS)))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_fisher_is_that_of_the_covariance_of_the_labels(number, dtype):
    logits, directions = np.array(LOGITS[number]), directions_of(LOGITS[number])
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    p = (odds / odds.sum(-1, keepdims=True)).reshape(-1, logits.shape[-1])
    covariances = [np.diag(one) - np.outer(one, one) for one in p]  # of the one-hot label, for each label
    by_label = directions.reshape(len(p), -1, 20)
    expected = sum(np.diag(d.T @ c @ d) for c, d in zip(covariances, by_label, strict=True))
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(fishers_of_logits(dtype)[number], expected, rtol=tolerance, atol=tolerance)


def test_exact_fisher_has_a_backward_pass_for_each_class_that_is_possible_but_the_last():
    passes = []

    @jax.custom_vjp
    def counted(x):
        return x

    def count(_, cotangent):
        jax.debug.callback(lambda: passes.append(1))
        return (cotangent,)

    counted.defvjp(lambda x: (x, None), count)

    def logits_fn(mask, params, x):
        return jnp.where(mask, counted(x @ params), jnp.finfo(jnp.float32).min)

    params, inputs = jnp.ones((2, 6)), jnp.ones((1, 2))
    for active in ([0, 1, 2, 3, 4, 5], [0, 1], [1, 3, 4], [5]):
        mask = jnp.zeros(6, bool).at[jnp.array(active)].set(True)
        fisher_diagonal(Partial(logits_fn, mask), params, inputs)
        jax.effects_barrier()
        assert len(passes) == len(active) - 1
        passes.clear()


# Labels of several tokens, and masked classes.


def test_exact_fisher_of_tokens_is_that_of_the_sum_of_their_log_likelihoods():
    # All labellings of two tokens, each by its probability: 16 of them.
    sequences = np.asarray(make_data(num_examples=6)[0]).reshape(3, 2, NUM_FEATURES)
    labellings = np.indices((NUM_CLASSES, NUM_CLASSES)).reshape(2, -1)

    def of_sequence(params, sequence):
        def of_labelling(labels):
            gradient = jax.grad(lambda p: jnp.sum(jax.nn.log_softmax(linear(p, sequence))[jnp.arange(2), labels]))
            return squared(gradient(params))

        probabilities = jax.nn.softmax(linear(params, sequence))
        joint = probabilities[0, labellings[0]] * probabilities[1, labellings[1]]
        return weighted_sum(joint, jax.lax.map(of_labelling, labellings.T))

    @jax.jit
    def run(params, sequences, key):
        sampled = fisher_diagonal(linear, params, sequences, num_samples=20_000, key=key)
        return one_by_one(of_sequence, params, sequences), fisher_diagonal(linear, params, sequences), sampled

    each, computed, sampled = jax.device_get(run(make_linear(), sequences, jax.random.key(0)))
    expected = jax.tree.map(lambda leaf: leaf.mean(axis=0), each)
    chex.assert_trees_all_close(computed, expected, rtol=1e-5, atol=1e-6)
    assert relative_distance(sampled, expected) < 0.02


def test_masked_classes_do_not_matter():
    mask = np.array([True, False, True, False])

    def masked(params, x):
        return jnp.where(mask, linear(params, x), jnp.finfo(jnp.float32).min)

    def two_classes(params, x):
        return linear(params, x)[np.array([0, 2])]

    computed, expected = jax.jit(
        lambda *data: [fisher_diagonal(logits_fn, *data) for logits_fn in (masked, two_classes)]
    )(make_linear(), make_data()[0])
    chex.assert_trees_all_close(computed, expected, rtol=1e-5, atol=1e-7)
    assert not np.asarray(computed["w"])[:, 1].any()


# Saturated outputs: 1 − p rounds to 0 in float32.


@pytest.mark.parametrize("logit", [-40.0, -17.0, 15.0, 17.0, 40.0])
def test_the_bernoulli_fisher_of_a_saturated_output(logit):
    computed = fisher_diagonal(lambda b, x: b * x, jnp.array([logit]), jnp.ones((1, 1)), likelihood="bernoulli")
    variance = 1 / (np.exp(logit / 2) + np.exp(-logit / 2)) ** 2
    np.testing.assert_allclose(computed, [variance], rtol=1e-5)


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical"])
def test_the_sampled_label_of_a_saturated_output(likelihood):
    def logits_fn(b, x):
        return b * x if likelihood == "bernoulli" else jnp.concatenate([b * x, 0 * x])

    options = {"likelihood": likelihood, "num_samples": 1, "key": jax.random.key(0)}
    computed = fisher_diagonal(logits_fn, jnp.array([20.0]), jnp.ones((1, 1)), **options)
    np.testing.assert_allclose(computed, [1 / (1 + np.exp(20.0)) ** 2], rtol=1e-5)  # the label is the likely one
