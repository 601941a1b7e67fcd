"""Importances against closed forms, and against loops over single examples in float64."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from lifelong_jax import empirical_fisher_diagonal, fisher_diagonal, mas_importance

NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES = 7, 3, 4


def linear(params, x):
    return x @ params["w"] + params["b"]


def mlp(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def cross_entropy(logits_fn, params, example):
    x, label = example
    return -jax.nn.log_softmax(logits_fn(params, x))[label]


@functools.cache
def loss_of(logits_fn):
    return functools.partial(cross_entropy, logits_fn)


def make_data(dtype=jnp.float32, num_examples=NUM_EXAMPLES):
    x_key, label_key = jax.random.split(jax.random.key(0))
    inputs = jax.random.normal(x_key, (num_examples, NUM_FEATURES), dtype)
    return inputs, jax.random.randint(label_key, (num_examples,), 0, NUM_CLASSES)


def make_mlp(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "w1": jax.random.normal(keys[0], (NUM_FEATURES, 5), dtype),
        "b1": jax.random.normal(keys[1], (5,), dtype),
        "w2": jax.random.normal(keys[2], (5, NUM_CLASSES), dtype),
    }


def make_linear(dtype=jnp.float32):
    w_key, b_key = jax.random.split(jax.random.key(2))
    return {
        "w": jax.random.normal(w_key, (NUM_FEATURES, NUM_CLASSES), dtype),
        "b": jax.random.normal(b_key, (NUM_CLASSES,), dtype),
    }


# Closed forms.


def test_fisher_of_softmax_regression():
    # ∂ log p_y / ∂w = x (e_y − p)ᵀ, and E_y (e_y − p)² = p (1 − p).
    inputs, _ = make_data()
    params = make_linear()
    probabilities = jax.nn.softmax(jax.vmap(linear, (None, 0))(params, inputs))
    variance = probabilities * (1 - probabilities)
    expected = {"w": (inputs**2).T @ variance / NUM_EXAMPLES, "b": variance.mean(0)}
    chex.assert_trees_all_close(fisher_diagonal(linear, params, inputs), expected, rtol=1e-5, atol=1e-7)


def test_empirical_fisher_of_softmax_regression():
    inputs, labels = make_data()
    params = make_linear()
    residual = jax.nn.softmax(jax.vmap(linear, (None, 0))(params, inputs)) - jax.nn.one_hot(labels, NUM_CLASSES)
    expected = {"w": (inputs**2).T @ residual**2 / NUM_EXAMPLES, "b": (residual**2).mean(0)}
    computed = empirical_fisher_diagonal(loss_of(linear), params, (inputs, labels))
    chex.assert_trees_all_close(computed, expected, rtol=1e-5, atol=1e-7)


def test_fisher_of_linear_regression_is_the_second_moment_of_the_inputs():
    inputs, _ = make_data()
    moment = jnp.broadcast_to((inputs**2).mean(0)[:, None], (NUM_FEATURES, NUM_CLASSES))
    computed = fisher_diagonal(linear, make_linear(), inputs, likelihood="gaussian")
    chex.assert_trees_all_close(computed, {"w": moment, "b": jnp.ones(NUM_CLASSES)}, rtol=1e-5)


def test_fisher_of_logistic_regression():
    inputs, _ = make_data()
    params = make_linear()
    probabilities = jax.nn.sigmoid(jax.vmap(linear, (None, 0))(params, inputs))
    variance = probabilities * (1 - probabilities)
    expected = {"w": (inputs**2).T @ variance / NUM_EXAMPLES, "b": variance.mean(0)}
    computed = fisher_diagonal(linear, params, inputs, likelihood="bernoulli")
    chex.assert_trees_all_close(computed, expected, rtol=1e-5, atol=1e-7)


def test_mas_of_a_linear_model():
    # ∂ ‖xᵀw + b‖² / ∂w = 2 x (xᵀw + b)ᵀ.
    inputs, _ = make_data()
    params = make_linear()
    outputs = jax.vmap(linear, (None, 0))(params, inputs)
    expected = {"w": jnp.abs(inputs).T @ jnp.abs(2 * outputs) / NUM_EXAMPLES, "b": jnp.abs(2 * outputs).mean(0)}
    chex.assert_trees_all_close(mas_importance(linear, params, inputs), expected, rtol=1e-5, atol=1e-7)


def test_mas_by_the_jacobian_of_a_linear_model():
    inputs, _ = make_data()
    magnitude = jnp.broadcast_to(jnp.abs(inputs).mean(0)[:, None], (NUM_FEATURES, NUM_CLASSES))
    computed = mas_importance(linear, make_linear(), inputs, output_norm="jacobian")
    chex.assert_trees_all_close(computed, {"w": magnitude, "b": jnp.ones(NUM_CLASSES)}, rtol=1e-5)


def test_mas_of_opposite_examples_does_not_cancel():
    # The gradients of the two examples are 2·3 and −2·3: their sum is 0, their mean magnitude 6.
    params = jnp.array(0.0)
    computed = mas_importance(lambda p, x: x[0] * p + x[1], params, jnp.array([[1.0, 3.0], [-1.0, 3.0]]))
    chex.assert_trees_all_close(computed, jnp.array(6.0))


def test_mas_of_tiny_gradients_does_not_underflow():
    computed = mas_importance(lambda p, x: p * x, jnp.array(1.0), jnp.array([1e-15]))
    chex.assert_trees_all_close(computed, jnp.array(2e-30), rtol=1e-6)


# Against a loop over single examples, in float64.


def loop(quantity, params, examples, weights):
    """The weighted mean, in NumPy, of `quantity(params, example, index)`."""
    total = jax.tree.map(np.zeros_like, params)
    for index, weight in enumerate(weights):
        example = jax.tree.map(lambda x, index=index: x[index], examples)
        term = quantity(params, example, index)
        total = jax.tree.map(lambda t, q, weight=weight: t + weight * np.asarray(q), total, term)
    return jax.tree.map(lambda t: t / np.sum(weights), total)


def squared(tree):
    return jax.tree.map(lambda g: g**2, tree)


def sum_of(trees):
    return functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), trees)


def log_likelihood(params, x, label):
    return jax.nn.log_softmax(mlp(params, x))[label]


def exact_fisher_of_example(params, x, index):
    probabilities = jax.nn.softmax(mlp(params, x))
    terms = []
    for label in range(NUM_CLASSES):
        gradient = jax.grad(log_likelihood)(params, x, label)
        terms.append(jax.tree.map(lambda g, label=label: probabilities[label] * g**2, gradient))
    return sum_of(terms)


def jacobian_norm_of_example(params, x, index):
    return jax.tree.map(lambda j: jnp.sqrt((j**2).sum(0)), jax.jacobian(mlp)(params, x))


def mas_of_example(params, x, index):
    return jax.tree.map(jnp.abs, jax.grad(lambda p: jnp.sum(mlp(p, x) ** 2))(params))


ESTIMATORS = {
    "empirical": (
        lambda params, data, **options: empirical_fisher_diagonal(loss_of(mlp), params, data, **options),
        lambda params, data, index: squared(jax.grad(loss_of(mlp))(params, data)),
    ),
    "exact": (
        lambda params, data, **options: fisher_diagonal(mlp, params, data[0], **options),
        lambda params, data, index: exact_fisher_of_example(params, data[0], index),
    ),
    "gaussian": (
        lambda params, data, **options: fisher_diagonal(mlp, params, data[0], likelihood="gaussian", **options),
        lambda params, data, index: squared(jacobian_norm_of_example(params, data[0], index)),
    ),
    "bernoulli": (
        lambda params, data, **options: fisher_diagonal(mlp, params, data[0], likelihood="bernoulli", **options),
        lambda params, data, index: sum_of(
            jax.tree.map(lambda j, o=o, p=p: p * (1 - p) * j[o] ** 2, jax.jacobian(mlp)(params, data[0]))
            for o, p in enumerate(np.asarray(jax.nn.sigmoid(mlp(params, data[0]))))
        ),
    ),
    "mas": (
        lambda params, data, **options: mas_importance(mlp, params, data[0], **options),
        lambda params, data, index: mas_of_example(params, data[0], index),
    ),
    "mas by jacobian": (
        lambda params, data, **options: mas_importance(mlp, params, data[0], output_norm="jacobian", **options),
        lambda params, data, index: jacobian_norm_of_example(params, data[0], index),
    ),
}


@pytest.mark.parametrize(
    ("method", "microbatch_size"),
    [
        ("reference", 1),
        ("reference", 3),
        ("reference", 100),
        ("structured", 1),
        ("structured", 3),
        ("structured", None),
    ],
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_a_loop_in_float64(estimator, method, microbatch_size):
    importance, quantity = ESTIMATORS[estimator]
    with jax.enable_x64(True):
        params, data = make_mlp(jnp.float64), make_data(jnp.float64)
        weights = np.linspace(0.0, 2.0, NUM_EXAMPLES).astype(np.float32)  # whose ratios must not be rounded to float32
        computed = importance(params, data, weights=weights, microbatch_size=microbatch_size, method=method)
        expected = loop(quantity, params, data, weights)
        chex.assert_trees_all_close(computed, expected, rtol=1e-10, atol=1e-13)
        chex.assert_trees_all_equal_dtypes(computed, params)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_example(estimator):
    importance, quantity = ESTIMATORS[estimator]
    params, data = make_mlp(), make_data(num_examples=1)
    expected = quantity(params, jax.tree.map(lambda x: x[0], data), 0)
    for microbatch_size in (1, 4):
        computed = importance(params, data, microbatch_size=microbatch_size)
        chex.assert_trees_all_close(computed, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("microbatch_size", [1, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_of_weight_0_changes_nothing(estimator, microbatch_size):
    importance, _ = ESTIMATORS[estimator]
    params, data = make_mlp(), make_data()
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.ones_like(x[:4])]), data)
    weights = jnp.array([1.0] * NUM_EXAMPLES + [0.0] * 4)
    computed = importance(params, padded, weights=weights, microbatch_size=microbatch_size)
    chex.assert_trees_all_close(computed, importance(params, data), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_under_jit_and_vmap_over_parameters(estimator):
    importance, _ = ESTIMATORS[estimator]
    data = make_data()
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf, -leaf]), make_mlp())
    together = jax.jit(jax.vmap(lambda params: importance(params, data)))(ensemble)
    for index in range(3):
        alone = importance(jax.tree.map(lambda leaf, index=index: leaf[index], ensemble), data)
        here = jax.tree.map(lambda leaf, index=index: leaf[index], together)
        chex.assert_trees_all_close(here, alone, rtol=1e-4, atol=1e-6)


def test_bfloat16_parameters_are_accumulated_in_float32():
    # 300 ones: a sum in bfloat16 would stop at 256.
    computed = fisher_diagonal(
        lambda p, x: p * x, jnp.ones((), jnp.bfloat16), jnp.ones(300, jnp.bfloat16), likelihood="gaussian"
    )
    chex.assert_trees_all_equal(computed, jnp.array(1.0, jnp.float32))


# Sampled labels.


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_sampled_fisher_converges_to_the_exact_one(likelihood):
    params, (inputs, _) = make_mlp(), make_data()
    exact = fisher_diagonal(mlp, params, inputs, likelihood=likelihood)
    error = {}
    for num_samples in (100, 10_000):
        sampled = fisher_diagonal(
            mlp, params, inputs, likelihood=likelihood, num_samples=num_samples, key=jax.random.key(3)
        )
        error[num_samples] = relative_distance(sampled, exact)
    assert error[10_000] < 0.02
    assert error[10_000] < error[100] / 3  # as 1 / sqrt(num_samples): by 10


def test_sampled_fisher_does_not_converge_to_the_empirical_one():
    params, (inputs, labels) = make_mlp(), make_data()
    sampled = fisher_diagonal(mlp, params, inputs, num_samples=10_000, key=jax.random.key(3))
    empirical = empirical_fisher_diagonal(loss_of(mlp), params, (inputs, labels))
    assert relative_distance(sampled, empirical) > 0.2


def test_sample_does_not_depend_on_the_microbatch_size_but_on_the_key():
    params, (inputs, _) = make_mlp(), make_data()
    first, second, other = (
        fisher_diagonal(mlp, params, inputs, num_samples=2, key=jax.random.key(key), microbatch_size=size)
        for key, size in ((0, 1), (0, 3), (1, 1))
    )
    chex.assert_trees_all_close(first, second, rtol=1e-5, atol=1e-7)
    assert relative_distance(first, other) > 0.01


def relative_distance(ours, theirs):
    ours, theirs = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (ours, theirs))
    return float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))


# The exact expectation over classes, by a factor of their covariance.


@pytest.mark.parametrize(
    "logits",
    [
        [3.0],
        [0.5, -1.0],
        [0.3, -1.0, 2.0, 0.1],
        [-200.0, 0.0, 1.0, -200.0],  # where no class before, or none after, is possible
        [0.0, 150.0, -150.0],  # beyond float32's smallest number
        [np.finfo(np.float32).min, 1.0, 2.0, np.finfo(np.float32).min, 0.0],
        [[1.0, 2.0, 0.0], [-1.0, 3.0, 1.0]],
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_fisher_is_that_of_the_covariance_of_the_labels(logits, dtype):
    logits = np.array(logits)
    directions = np.random.default_rng(0).normal(size=(*logits.shape, 20))
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    p = (odds / odds.sum(-1, keepdims=True)).reshape(-1, logits.shape[-1])
    covariances = [np.diag(one) - np.outer(one, one) for one in p]  # of the one-hot label, for each label
    by_label = directions.reshape(len(p), -1, 20)
    expected = sum(np.diag(d.T @ c @ d) for c, d in zip(covariances, by_label, strict=True))
    with jax.enable_x64(dtype == "float64"):
        inputs = jnp.asarray(directions[None], dtype)

        def logits_fn(params, x):
            return jnp.asarray(logits, dtype) + x @ params

        computed = fisher_diagonal(logits_fn, jnp.zeros(20, dtype), inputs)
        tolerance = 1e-5 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(computed, expected, rtol=tolerance, atol=tolerance)


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


# Logits with leading axes, masked classes, other kinds of parameters.


def test_exact_fisher_of_tokens_is_that_of_the_sum_of_their_log_likelihoods():
    # All labellings of two tokens, each by its probability: 16 of them.
    params, (inputs, _) = make_linear(), make_data(num_examples=6)
    sequences = inputs.reshape(3, 2, NUM_FEATURES)

    def of_sequence(params, sequence, index):
        probabilities = jax.nn.softmax(linear(params, sequence))
        terms = []
        for first in range(NUM_CLASSES):
            for second in range(NUM_CLASSES):
                joint = probabilities[0, first] * probabilities[1, second]
                gradient = jax.grad(
                    lambda p, first=first, second=second: (
                        jax.nn.log_softmax(linear(p, sequence))[0, first]
                        + jax.nn.log_softmax(linear(p, sequence))[1, second]
                    )
                )(params)
                terms.append(jax.tree.map(lambda g, joint=joint: joint * g**2, gradient))
        return sum_of(terms)

    expected = loop(of_sequence, params, sequences, np.ones(3))
    chex.assert_trees_all_close(fisher_diagonal(linear, params, sequences), expected, rtol=1e-5, atol=1e-6)
    sampled = fisher_diagonal(linear, params, sequences, num_samples=20_000, key=jax.random.key(0))
    assert relative_distance(sampled, expected) < 0.02


def test_masked_classes_do_not_matter():
    params, (inputs, _) = make_linear(), make_data()
    mask = jnp.array([True, False, True, False])

    def masked(params, x):
        return jnp.where(mask, linear(params, x), jnp.finfo(jnp.float32).min)

    def two_classes(params, x):
        return linear(params, x)[jnp.array([0, 2])]

    computed = fisher_diagonal(masked, params, inputs)
    chex.assert_trees_all_close(computed, fisher_diagonal(two_classes, params, inputs), rtol=1e-5, atol=1e-7)
    assert not computed["w"][:, 1].any()


def test_flax_linen_and_nnx_parameters():
    inputs, _ = make_data()
    linen = nn.Dense(NUM_CLASSES)
    variables = linen.init(jax.random.key(0), inputs[0])
    graph, state = nnx.split(nnx.Linear(NUM_FEATURES, NUM_CLASSES, rngs=nnx.Rngs(0)))
    state["kernel"][...] = variables["params"]["kernel"]

    of_linen = fisher_diagonal(linen.apply, variables, inputs)
    of_nnx = fisher_diagonal(lambda params, x: nnx.merge(graph, params)(x), state, inputs)
    of_plain = fisher_diagonal(linear, {"w": variables["params"]["kernel"], "b": variables["params"]["bias"]}, inputs)
    chex.assert_trees_all_equal_structs(of_nnx, state)
    chex.assert_trees_all_close(of_linen["params"]["kernel"], of_plain["w"], rtol=1e-5)
    chex.assert_trees_all_close(of_nnx["kernel"][...], of_plain["w"], rtol=1e-5)
    chex.assert_trees_all_close(of_nnx["bias"][...], of_plain["b"], rtol=1e-5)


@pytest.mark.parametrize(("dtype", "num_rows"), [(jnp.uint8, 256), (jnp.uint8, 300), (jnp.int8, 128), (jnp.uint16, 9)])
def test_tokens_of_narrow_dtypes(dtype, num_rows):
    table = jax.random.normal(jax.random.key(0), (num_rows, 2))
    tokens = jnp.array([[0, 7, 7], [8, 0, 100 % num_rows]]).astype(dtype)

    def logits_fn(params, x):
        return jnp.take(params, x, axis=0).sum(axis=0) ** 2

    structured, reference = (
        mas_importance(logits_fn, table, tokens, method=way) for way in ("structured", "reference")
    )
    chex.assert_trees_all_close(structured, reference, rtol=1e-5)
    assert structured[7].any()


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("shape", [(4, NUM_FEATURES), (4, 2, NUM_FEATURES)])
def test_integer_inputs(shape):
    inputs = jnp.arange(int(np.prod(shape))).reshape(shape) % 5
    for output_norm in ("squared_l2", "jacobian"):
        structured, reference = (
            mas_importance(linear, make_linear(), inputs, output_norm=output_norm, method=way)
            for way in ("structured", "reference")
        )
        chex.assert_trees_all_close(structured, reference, rtol=1e-5)


def test_numbers_and_numpy_arrays_are_parameters_and_inputs():
    inputs, _ = make_data()
    params = {"w": np.asarray(make_linear()["w"]), "b": 0.5}
    computed = fisher_diagonal(linear, params, np.asarray(inputs))
    expected = fisher_diagonal(linear, {"w": make_linear()["w"], "b": jnp.array(0.5)}, inputs)
    chex.assert_trees_all_close(computed, expected, rtol=1e-6)


def test_unused_parameters_get_0():
    inputs, _ = make_data()
    computed = fisher_diagonal(linear, {**make_linear(), "unused": jnp.ones(2)}, inputs)
    chex.assert_trees_all_equal(computed["unused"], jnp.zeros(2))


def test_same_function_is_traced_once():
    traces = 0

    def counted(params, x):
        nonlocal traces
        traces += 1
        return linear(params, x)

    inputs, _ = make_data()
    fisher_diagonal(counted, make_linear(), inputs)
    first = traces
    fisher_diagonal(counted, jax.tree.map(jnp.zeros_like, make_linear()), 2 * inputs)
    assert traces == first


# Bad input.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"params": {"w": jnp.ones((3, 4), int), "b": jnp.ones(4)}}, TypeError, r"params\['w'\] has dtype int32"),
        ({"inputs": jnp.zeros((0, 3))}, ValueError, "inputs is empty"),
        ({"inputs": {}}, ValueError, "inputs has no arrays"),
        ({"inputs": {"x": jnp.zeros((2, 3)), "y": jnp.zeros((3, 3))}}, ValueError, r"inputs\['x'\]: 2"),
        ({"inputs": jnp.array(1.0)}, ValueError, "leading axis"),
        ({"weights": jnp.ones(3)}, ValueError, "weights: 3"),
        ({"weights": [1.0] * 7}, ValueError, "weights must be an array"),
        ({"weights": jnp.ones((7, 1))}, ValueError, "weights has shape"),
        ({"weights": -jnp.ones(7)}, ValueError, "weights must be finite, not negative"),
        ({"weights": jnp.zeros(7)}, ValueError, "not all 0"),
        ({"weights": jnp.full(7, jnp.nan)}, ValueError, "weights must be finite"),
        ({"weights": jnp.full(7, 1e-40)}, ValueError, "weights .* above 0 at least 1.2e-38"),
        ({"weights": jnp.full(7, 3e37)}, ValueError, "weights .* sum at most 8.5e[+]37"),
        ({"microbatch_size": 0}, ValueError, "microbatch_size must be an integer of at least 1"),
        ({"num_samples": 0, "key": jax.random.key(0)}, ValueError, "num_samples must be an integer of at least 1"),
        ({"num_samples": 1}, ValueError, "num_samples and key go together"),
        ({"key": jax.random.key(0)}, ValueError, "num_samples and key go together"),
        ({"method": "fast"}, ValueError, "method must be one of structured, reference"),
        ({"likelihood": "poisson"}, ValueError, "likelihood must be one of categorical, gaussian, bernoulli"),
        ({"logits_fn": lambda params, x: x.sum()}, ValueError, "not a scalar"),
        ({"logits_fn": lambda params, x: (x, x)}, ValueError, "one floating-point array"),
        ({"logits_fn": lambda params, x: jnp.argmax(x)}, ValueError, "one floating-point array"),
    ],
)
def test_bad_input_to_fisher_diagonal(changes, error, message):
    arguments = {"logits_fn": linear, "params": make_linear(), "inputs": make_data()[0], **changes}
    positional = [arguments.pop(name) for name in ("logits_fn", "params", "inputs")]
    with pytest.raises(error, match=message):
        fisher_diagonal(*positional, **arguments)


def test_bad_input_to_the_others():
    inputs, labels = make_data()
    with pytest.raises(ValueError, match="loss_fn must return a scalar"):
        empirical_fisher_diagonal(linear, make_linear(), inputs)
    with pytest.raises(ValueError, match=r"examples\[1\]: 3"):
        empirical_fisher_diagonal(loss_of(linear), make_linear(), (inputs, labels[:3]))
    with pytest.raises(ValueError, match="output_norm must be one of squared_l2, jacobian"):
        mas_importance(linear, make_linear(), inputs, output_norm="l1")
