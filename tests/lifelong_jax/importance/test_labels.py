"""Fisher information over the model's own labels: sampled ones, and the exact expectation over classes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from lifelong_jax import empirical_fisher_diagonal, empirical_kronecker_fisher, fisher_diagonal
from lifelong_jax.importance import cotangents
from lifelong_jax.importance.cotangents import MAX_PASSES
from tests.lifelong_jax.importance.models import in_float64
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


# The empirical Fisher information of labels: of each by itself, by random signs, and of their sum.


def losses_of_tokens(params, example):
    inputs, labels, counts = example
    each = -jax.nn.log_softmax(linear(params, inputs))
    return counts * jnp.take_along_axis(each, labels[:, None], axis=-1)[:, 0]


def loss_of_sequence(params, example):
    return jnp.sum(losses_of_tokens(params, example))


def make_sequences(num_labels=3):
    inputs, labels = (np.asarray(leaf) for leaf in make_data(num_examples=4 * num_labels))
    counts = np.ones((4, num_labels))
    counts[1, 1:] = 0  # padding
    return inputs.reshape(4, num_labels, -1), labels.reshape(4, num_labels), counts


@functools.cache
def empirical_fishers():
    """Of each label by both methods, from a loop, of the sums, and by signs; in float64, in one program."""

    def by_loop(params, example):
        jacobian = jax.jacrev(losses_of_tokens)(params, example)
        return jax.tree.map(lambda leaf: jnp.sum(leaf**2, axis=0), jacobian)

    @jax.jit
    def run(params, sequences):
        each = functools.partial(empirical_fisher_diagonal, losses_of_tokens, params, sequences)
        signed = functools.partial(each, key=jax.random.key(5))
        whole = functools.partial(empirical_fisher_diagonal, loss_of_sequence, params, sequences)
        return {
            "loop": jax.tree.map(lambda leaf: leaf.mean(axis=0), one_by_one(by_loop, params, sequences)),
            "each": each(microbatch_size=3),
            "each, reference": each(method="reference"),
            "signs": signed(num_samples=20_000),
            "one sign": signed(num_samples=1, microbatch_size=1),
            "one sign, other microbatches": signed(num_samples=1, microbatch_size=3),
            "whole": whole(),
            "whole, with a key": whole(num_samples=2, key=jax.random.key(0)),
        }

    with jax.enable_x64(True):
        return jax.device_get(run(*in_float64((make_linear(), make_sequences()))))


@pytest.mark.parametrize("name", ["each", "each, reference"])
def test_empirical_fisher_of_losses_squares_the_gradient_of_each_label(name):
    found = empirical_fishers()
    chex.assert_trees_all_close(found[name], found["loop"], rtol=1e-10)
    assert relative_distance(found["whole"], found["loop"]) > 0.1


def test_random_signs_estimate_the_empirical_fisher_of_each_label():
    found = empirical_fishers()
    assert relative_distance(found["signs"], found["loop"]) < 0.02
    assert relative_distance(found["one sign"], found["loop"]) > 0.02
    chex.assert_trees_all_close(found["one sign"], found["one sign, other microbatches"], rtol=1e-10)


def test_a_single_loss_has_no_sign():
    found = empirical_fishers()
    chex.assert_trees_all_close(found["whole"], found["whole, with a key"], rtol=1e-12)


def test_empirical_fishers_of_labels_from_the_model_are_its_fisher():
    # All labellings of one sequence of two tokens, each weighted by its probability.
    sequence = np.asarray(make_data(num_examples=2)[0])
    labellings = np.indices((NUM_CLASSES, NUM_CLASSES)).reshape(2, -1)
    p = np.asarray(jax.nn.softmax(linear(make_linear(), sequence)))
    joint = p[0, labellings[0]] * p[1, labellings[1]]
    examples = (np.broadcast_to(sequence, (len(joint), *sequence.shape)), labellings.T, np.ones((len(joint), 2)))
    examples = jax.tree.map(lambda leaf: leaf.astype(np.int32 if leaf.dtype.kind == "i" else np.float32), examples)

    @jax.jit
    def run(params):
        fishers = [
            empirical_fisher_diagonal(loss_fn, params, examples, weights=jnp.asarray(joint))
            for loss_fn in (losses_of_tokens, loss_of_sequence)
        ]
        return fisher_diagonal(linear, params, sequence[None]), fishers

    expected, fishers = run(make_linear())
    for fisher in fishers:
        chex.assert_trees_all_close(fisher, expected, rtol=1e-4, atol=1e-6)


def test_more_labels_than_passes_are_refused_with_what_to_pass_instead():
    losses_fn, examples = lambda params, x: params * x, np.ones((2, MAX_PASSES + 1), np.float32)
    for estimator in (empirical_fisher_diagonal, empirical_kronecker_fisher):
        with pytest.raises(ValueError, match=r"each label would take 4,097 .*num_samples=1 and a key.*signs"):
            estimator(losses_fn, jnp.ones(()), examples)
        with pytest.raises(ValueError, match="give both to draw signs"):
            estimator(losses_fn, jnp.ones(()), examples, num_samples=1)
    signs = functools.partial(empirical_fisher_diagonal, losses_fn, num_samples=1, key=jax.random.key(0))
    jax.eval_shape(signs, jnp.ones(()), examples)


@pytest.mark.parametrize("estimator", [empirical_fisher_diagonal, empirical_kronecker_fisher])
@pytest.mark.parametrize("sampling", [{}, {"num_samples": 1, "key": jax.random.key(0)}])
def test_logits_in_the_place_of_a_loss_are_refused_where_an_example_has_one_label(estimator, sampling):
    compute = functools.partial(estimator, lambda params, example: linear(params, example[0]), make_linear())
    inputs, labels = make_data()
    with pytest.raises(ValueError, match=r"must return a scalar .* not float32\[4\]: are these logits\?"):
        compute((inputs, labels), **sampling)
    index_of_label = np.arange(NUM_CLASSES, dtype=np.int32) + 0 * labels[:, None]
    for examples in ((inputs, index_of_label), (inputs, np.ones((len(labels), NUM_CLASSES), np.float32)), (inputs,)):
        jax.eval_shape(lambda examples: compute(examples, **sampling), examples)  # as far as is known, losses


# A class of many is drawn in two steps: a block of classes, then one of the block.


@pytest.mark.parametrize("num_classes", [9, 11])
def test_a_class_of_many_is_drawn_by_its_probability(monkeypatch, num_classes):
    logits = np.random.default_rng(0).normal(size=num_classes).astype(np.float32) * 2
    logits[3:7] = np.finfo(np.float32).min  # masked: more than one block
    draw = functools.partial(cotangents._sample_class, np.broadcast_to(logits, (200_000, num_classes)))
    monkeypatch.setattr(cotangents, "_MAX_DRAWN", num_classes - 1)
    frequencies = np.bincount(jax.jit(draw)(jax.random.key(1)), minlength=num_classes) / 200_000
    expected = np.asarray(jax.nn.softmax(logits))
    assert (frequencies[3:7] == 0).all()
    np.testing.assert_allclose(frequencies, expected, atol=5 * 0.5 / np.sqrt(200_000))


def test_the_score_of_a_sampled_class_is_the_gradient_of_its_log_probability(monkeypatch):
    monkeypatch.setattr(cotangents, "_MAX_DRAWN", 10)
    logits = np.random.default_rng(0).normal(size=(50, 11)).astype(np.float32) * 3
    key = jax.random.key(2)
    labels = cotangents._sample_class(logits, key)
    log_p = lambda logits: jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1).sum()  # noqa: E731
    np.testing.assert_allclose(cotangents._categorical_score(logits, key), jax.grad(log_p)(logits), atol=1e-6)


@pytest.mark.usefixtures("optimized")
def test_a_sampled_pass_holds_two_arrays_of_labels_times_classes():
    num_labels, num_classes = 16, 50_257

    def logits_fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["head"]

    params = {"w": jnp.ones((4, 4)), "head": jax.ShapeDtypeStruct((4, num_classes), jnp.float32)}
    run = jax.jit(lambda p, x: fisher_diagonal(logits_fn, p, x, num_samples=1, key=jax.random.key(0)))
    sequences = jax.ShapeDtypeStruct((1, num_labels, 4), jnp.float32)
    held = run.lower(params, sequences).compile().memory_analysis().temp_size_in_bytes
    of_head = 2 * 4 * num_classes * 4  # its gradient, and the sum
    assert held - of_head < 2.2 * 4 * num_labels * num_classes


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
