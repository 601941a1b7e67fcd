"""Importances against closed forms, and against loops over single examples in float64."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lifelong_jax import empirical_fisher_diagonal, fisher_diagonal, kronecker_fisher, mas_importance
from tests.lifelong_jax.importance.problems import (
    NUM_CLASSES,
    NUM_EXAMPLES,
    NUM_FEATURES,
    linear,
    loss_of,
    make_data,
    make_linear,
    make_mlp,
    mlp,
    one_by_one,
    squared,
    weighted_sum,
)

METHODS = ("structured", "reference")


# Closed forms.


@functools.cache
def linear_problem():
    """Inputs, labels and outputs of the linear model, in NumPy."""
    inputs, labels = make_data()
    params = jax.device_get(make_linear())
    return np.asarray(inputs), np.asarray(labels), linear(params, np.asarray(inputs))


def softmax(logits):
    odds = np.exp(logits)
    return odds / odds.sum(axis=-1, keepdims=True)


def mean_over_examples(factor, cotangents):
    """The importance of a linear model: a mean of outer products of powers of its inputs and of its cotangents."""
    return {"w": factor.T @ cotangents / NUM_EXAMPLES, "b": cotangents.mean(0)}


def test_fisher_of_softmax_regression():
    # ∂ log p_y / ∂w = x (e_y − p)ᵀ, and E_y (e_y − p)² = p (1 − p).
    inputs, _, logits = linear_problem()
    expected = mean_over_examples(inputs**2, softmax(logits) * (1 - softmax(logits)))
    chex.assert_trees_all_close(fisher_diagonal(linear, make_linear(), inputs), expected, rtol=1e-5, atol=1e-7)


def test_empirical_fisher_of_softmax_regression():
    inputs, labels, logits = linear_problem()
    residual = softmax(logits) - np.eye(NUM_CLASSES, dtype=np.float32)[labels]
    computed = empirical_fisher_diagonal(loss_of(linear), make_linear(), (inputs, labels))
    chex.assert_trees_all_close(computed, mean_over_examples(inputs**2, residual**2), rtol=1e-5, atol=1e-7)


def test_fisher_of_linear_regression_is_the_second_moment_of_the_inputs():
    inputs, _, logits = linear_problem()
    computed = fisher_diagonal(linear, make_linear(), inputs, likelihood="gaussian")
    chex.assert_trees_all_close(computed, mean_over_examples(inputs**2, np.ones_like(logits)), rtol=1e-5)


def test_fisher_of_logistic_regression():
    inputs, _, logits = linear_problem()
    probabilities = 1 / (1 + np.exp(-logits))
    expected = mean_over_examples(inputs**2, probabilities * (1 - probabilities))
    computed = fisher_diagonal(linear, make_linear(), inputs, likelihood="bernoulli")
    chex.assert_trees_all_close(computed, expected, rtol=1e-5, atol=1e-7)


def test_mas_of_a_linear_model():
    # ∂ ‖xᵀw + b‖² / ∂w = 2 x (xᵀw + b)ᵀ.
    inputs, _, outputs = linear_problem()
    expected = mean_over_examples(np.abs(inputs), np.abs(2 * outputs))
    chex.assert_trees_all_close(mas_importance(linear, make_linear(), inputs), expected, rtol=1e-5, atol=1e-7)


def test_mas_by_the_jacobian_of_a_linear_model():
    inputs, _, outputs = linear_problem()
    computed = mas_importance(linear, make_linear(), inputs, output_norm="jacobian")
    chex.assert_trees_all_close(computed, mean_over_examples(np.abs(inputs), np.ones_like(outputs)), rtol=1e-5)


def test_mas_of_opposite_examples_does_not_cancel():
    # The gradients of the two examples are 2·3 and −2·3: their sum is 0, their mean magnitude 6.
    params = jnp.array(0.0)
    computed = mas_importance(lambda p, x: x[0] * p + x[1], params, jnp.array([[1.0, 3.0], [-1.0, 3.0]]))
    chex.assert_trees_all_close(computed, jnp.array(6.0))


def test_mas_of_tiny_gradients_does_not_underflow():
    computed = mas_importance(lambda p, x: p * x, jnp.array(1.0), jnp.array([1e-15]))
    chex.assert_trees_all_close(computed, jnp.array(2e-30), rtol=1e-6)


# Against a loop over single examples, in float64.


def log_likelihood(params, x, label):
    return jax.nn.log_softmax(mlp(params, x))[label]


def exact_fisher_of_example(params, x):
    gradients = [jax.grad(log_likelihood)(params, x, label) for label in range(NUM_CLASSES)]
    return weighted_sum(jax.nn.softmax(mlp(params, x)), squared(jax.tree.map(lambda *gs: jnp.stack(gs), *gradients)))


def bernoulli_fisher_of_example(params, x):
    probabilities = jax.nn.sigmoid(mlp(params, x))
    return weighted_sum(probabilities * (1 - probabilities), squared(jax.jacobian(mlp)(params, x)))


def jacobian_norm_of_example(params, x):
    return jax.tree.map(lambda j: jnp.sqrt((j**2).sum(0)), jax.jacobian(mlp)(params, x))


def mas_of_example(params, x):
    return jax.tree.map(jnp.abs, jax.grad(lambda p: jnp.sum(mlp(p, x) ** 2))(params))


ESTIMATORS = {
    "empirical": (
        lambda params, data, **options: empirical_fisher_diagonal(loss_of(mlp), params, data, **options),
        lambda params, data: squared(jax.grad(loss_of(mlp))(params, data)),
    ),
    "exact": (
        lambda params, data, **options: fisher_diagonal(mlp, params, data[0], **options),
        lambda params, data: exact_fisher_of_example(params, data[0]),
    ),
    "gaussian": (
        lambda params, data, **options: fisher_diagonal(mlp, params, data[0], likelihood="gaussian", **options),
        lambda params, data: squared(jacobian_norm_of_example(params, data[0])),
    ),
    "bernoulli": (
        lambda params, data, **options: fisher_diagonal(mlp, params, data[0], likelihood="bernoulli", **options),
        lambda params, data: bernoulli_fisher_of_example(params, data[0]),
    ),
    "mas": (
        lambda params, data, **options: mas_importance(mlp, params, data[0], **options),
        lambda params, data: mas_of_example(params, data[0]),
    ),
    "mas by jacobian": (
        lambda params, data, **options: mas_importance(mlp, params, data[0], output_norm="jacobian", **options),
        lambda params, data: jacobian_norm_of_example(params, data[0]),
    ),
}
SETTINGS = [
    ("reference", 1),
    ("reference", 3),
    ("reference", 100),
    ("structured", 1),
    ("structured", 3),
    ("structured", None),
]
PADDED_SIZES = [1, 3]


@functools.cache
def results_in_float64(estimator):
    """With each setting, and from a loop; in one program."""
    importance, quantity = ESTIMATORS[estimator]

    @jax.jit
    def run(params, data, weights):
        computed = [
            importance(params, data, weights=weights, microbatch_size=size, method=method) for method, size in SETTINGS
        ]
        return computed, one_by_one(quantity, params, data)

    with jax.enable_x64(True):
        weights = np.linspace(0.0, 2.0, NUM_EXAMPLES).astype(np.float32)  # whose ratios must not be rounded to float32
        computed, each = jax.device_get(run(make_mlp(jnp.float64), make_data(jnp.float64), weights))
    expected = jax.tree.map(lambda leaf: np.tensordot(weights.astype(np.float64), leaf, 1) / np.sum(weights), each)
    return dict(zip(SETTINGS, computed, strict=True)), expected


@functools.cache
def results_in_float32(estimator):
    """Of all examples, of examples and padding, of one example, and of several networks at once; in one program."""
    importance, quantity = ESTIMATORS[estimator]

    @jax.jit
    def run(params, data, padded, weights, ensemble):
        one = jax.tree.map(lambda x: x[:1], data)
        return {
            "plain": importance(params, data),
            "padded": [importance(params, padded, weights=weights, microbatch_size=size) for size in PADDED_SIZES],
            "one": [importance(params, one, microbatch_size=size) for size in (1, 4)],
            "one expected": one_by_one(quantity, params, one),
            "ensemble": jax.vmap(lambda params: importance(params, data))(ensemble),
            "ensemble one by one": jax.lax.map(lambda params: importance(params, data), ensemble),
        }

    params, data = jax.device_get((make_mlp(), make_data()))
    padded = jax.tree.map(lambda x: np.concatenate([x, np.ones_like(x[:4])]), data)
    weights = np.array([1.0] * NUM_EXAMPLES + [0.0] * 4, np.float32)
    ensemble = jax.tree.map(lambda leaf: np.stack([leaf, leaf / 2, -leaf]), params)
    return jax.device_get(run(params, data, padded, weights, ensemble))


@pytest.mark.parametrize(("method", "microbatch_size"), SETTINGS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_a_loop_in_float64(estimator, method, microbatch_size):
    computed, expected = results_in_float64(estimator)
    chex.assert_trees_all_close(computed[method, microbatch_size], expected, rtol=1e-10, atol=1e-13)
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(computed[method, microbatch_size]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_example(estimator):
    results = results_in_float32(estimator)
    for computed in results["one"]:
        expected = jax.tree.map(lambda leaf: leaf[0], results["one expected"])
        chex.assert_trees_all_close(computed, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("microbatch_size", PADDED_SIZES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_of_weight_0_changes_nothing(estimator, microbatch_size):
    results = results_in_float32(estimator)
    padded = results["padded"][PADDED_SIZES.index(microbatch_size)]
    chex.assert_trees_all_close(padded, results["plain"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_under_jit_and_vmap_over_parameters(estimator):
    results = results_in_float32(estimator)
    chex.assert_trees_all_close(results["ensemble"], results["ensemble one by one"], rtol=1e-4, atol=1e-6)


def test_bfloat16_parameters_are_accumulated_in_float32():
    # 300 ones: a sum in bfloat16 would stop at 256.
    computed = fisher_diagonal(
        lambda p, x: p * x, jnp.ones((), jnp.bfloat16), jnp.ones(300, jnp.bfloat16), likelihood="gaussian"
    )
    chex.assert_trees_all_equal(computed, jnp.array(1.0, jnp.float32))


# Other kinds of parameters and inputs.


def test_flax_linen_and_nnx_parameters():
    inputs, _ = make_data()
    plain = make_linear()
    linen = nn.Dense(NUM_CLASSES)
    variables = {"params": {"kernel": plain["w"], "bias": plain["b"]}}
    graph, state = nnx.split(nnx.eval_shape(lambda: nnx.Linear(NUM_FEATURES, NUM_CLASSES, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda leaf: plain["w"] if leaf.ndim == 2 else plain["b"], state)

    of_linen = fisher_diagonal(linen.apply, variables, inputs)
    of_nnx = fisher_diagonal(lambda params, x: nnx.merge(graph, params)(x), state, inputs)
    of_plain = fisher_diagonal(linear, plain, inputs)
    chex.assert_trees_all_equal_structs(of_nnx, state)
    chex.assert_trees_all_close(of_linen["params"]["kernel"], of_plain["w"], rtol=1e-5)
    chex.assert_trees_all_close(of_nnx["kernel"][...], of_plain["w"], rtol=1e-5)
    chex.assert_trees_all_close(of_nnx["bias"][...], of_plain["b"], rtol=1e-5)


@pytest.mark.parametrize(("dtype", "num_rows"), [(np.uint8, 256), (np.uint8, 300), (np.int8, 128), (np.uint16, 9)])
def test_tokens_of_narrow_dtypes(dtype, num_rows):
    table = np.random.default_rng(0).normal(size=(num_rows, 2)).astype(np.float32)
    tokens = np.array([[0, 7, 7], [8, 0, 100 % num_rows]]).astype(dtype)

    def logits_fn(params, x):
        return jnp.take(params, x, axis=0).sum(axis=0) ** 2

    # The simple emitters of `conftest` compare indices and the number of rows in uint8, in JAX's own gradient too.
    compute = jax.jit(by_both_methods(logits_fn), compiler_options={"xla_cpu_use_fusion_emitters": True})
    structured, reference = jax.device_get(compute(table, tokens))
    chex.assert_trees_all_close(structured, reference, rtol=1e-5)
    assert structured[7].any()


def by_both_methods(output_fn, **options):
    return jax.jit(lambda *data: [mas_importance(output_fn, *data, method=method, **options) for method in METHODS])


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("shape", [(4, NUM_FEATURES), (4, 2, NUM_FEATURES)])
def test_integer_inputs(shape):
    inputs = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape) % 5
    for output_norm in ("squared_l2", "jacobian"):
        structured, reference = by_both_methods(linear, output_norm=output_norm)(make_linear(), inputs)
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
        ({"weights": jnp.full(7, 1e-40)}, ValueError, "a weight above 0 must be at least 1.2e-38"),
        ({"weights": jnp.full(7, 3e37)}, ValueError, "weights .* sum at most 8.5e[+]37"),
        ({"microbatch_size": 0}, ValueError, "microbatch_size must be an integer of at least 1"),
        ({"num_samples": 0, "key": jax.random.key(0)}, ValueError, "num_samples must be an integer of at least 1"),
        ({"num_samples": 1}, ValueError, "num_samples and key go together"),
        ({"key": jax.random.key(0)}, ValueError, "num_samples and key go together"),
        ({"method": "fast"}, ValueError, "method must be one of structured, reference"),
        ({"likelihood": "poisson"}, ValueError, "likelihood must be one of categorical, gaussian, bernoulli"),
        ({"logits_fn": lambda params, x: x.sum()}, ValueError, r"of two classes or more, not \(\)"),
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
    with pytest.raises(ValueError, match="num_samples and key go together"):
        empirical_fisher_diagonal(linear, make_linear(), inputs, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"examples\[1\]: 3"):
        empirical_fisher_diagonal(loss_of(linear), make_linear(), (inputs, labels[:3]))
    with pytest.raises(ValueError, match="output_norm must be one of squared_l2, jacobian"):
        mas_importance(linear, make_linear(), inputs, output_norm="l1")


@pytest.mark.parametrize("importance", [fisher_diagonal, mas_importance, kronecker_fisher])
def test_outputs_without_entries_and_networks_for_batches_are_named(importance):
    with pytest.raises(ValueError, match="one floating-point array, with entries"):
        importance(lambda params, x: (x @ params)[:0], jnp.ones((3, 2)), jnp.ones((4, 3)))
    with pytest.raises(Exception) as raised:  # the network's own error
        importance(lambda params, x: jax.lax.dot(x, params), jnp.ones((3, 2)), jnp.ones((4, 2)))
    assert any("without batch axis" in note for note in raised.value.__notes__)
