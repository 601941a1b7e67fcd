"""Closed form = float64 loop = reference = structured, over a table of models and of estimators."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import empirical_fisher_diagonal, explain, fisher_diagonal, mas_importance
from lifelong_jax._jaxprs import count_constants_and_carry
from lifelong_jax.importance import reference, structured
from lifelong_jax.importance.cotangents import stacked
from lifelong_jax.importance.microbatches import Spread
from tests.lifelong_jax.importance.models import MODELS, assert_close, in_float64, made, normal, some_cotangents

SETTINGS = [(1, "sum_of_squares"), (2, "norm")]
WEIGHTS = np.array([0.5, 2.0, 1.5], np.float32)


def loop(outputs: np.ndarray, jacobian: Any, num_cotangents: int, reduction: str) -> Any:
    """The definition, from the outputs and the whole Jacobian of each example."""
    total = jax.tree.map(lambda leaf: 0.0, jacobian)
    for index, weight in enumerate(WEIGHTS):
        phases = np.arange(num_cotangents) + 2 * index
        cotangents = np.cos(outputs[index] + phases.reshape(-1, *[1] * outputs[index].ndim))
        here = jax.tree.map(lambda leaf, index=index: leaf[index], jacobian)
        gradients = jax.tree.map(lambda j, c=cotangents: np.tensordot(c, j, c.ndim - 1), here)
        squares = jax.tree.map(lambda g: np.square(g).sum(axis=0), gradients)
        contribution = squares if reduction == "sum_of_squares" else jax.tree.map(np.sqrt, squares)
        total = jax.tree.map(lambda t, c, w=weight: t + w * c, total, contribution)
    return total


@pytest.mark.parametrize("name", MODELS)
def test_equals_loop_and_reference(name: str) -> None:
    output_fn, params, examples, _ = made(name)

    def compute(method: Any, setting: int, microbatch_size: int | None, *arguments: Any, **spread: Any) -> Any:
        num_cotangents, reduction = SETTINGS[setting]
        run = functools.partial(method.sum_over_examples, output_fn, some_cotangents(num_cotangents), **spread)
        params, examples, weights = arguments
        return run(params, examples, reduction=reduction, weights=weights, microbatch_size=microbatch_size)

    @jax.jit
    def compute_all(*arguments: Any) -> Any:
        params, examples, _ = arguments
        one_by_one = jax.lax.map(lambda x: (output_fn(params, x), jax.jacrev(output_fn)(params, x)), examples)
        runs = [(structured, 0, 1), (structured, 1, 2), (reference, 1, 2)]
        in_backward = compute(structured, 0, 2, *arguments, spread=Spread(1, ("data",)))
        return one_by_one, [compute(*run, *arguments) for run in runs], in_backward

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.enable_x64(True), jax.set_mesh(mesh):
        arguments = (*in_float64((params, examples)), WEIGHTS)
        one_by_one, (squares, norm, reference_norm), in_backward = jax.device_get(compute_all(*arguments))
    expected = [loop(*one_by_one, *setting) for setting in SETTINGS]
    assert_close(squares, expected[0], 1e-10)
    assert_close(in_backward, expected[0], 1e-10)
    assert_close(norm, expected[1], 1e-10)
    assert_close(reference_norm, expected[1], 1e-10)
    with jax.default_matmul_precision("highest"):
        single = jax.jit(functools.partial(compute, structured, 0, None))(params, examples, WEIGHTS)
    assert_close(single, expected[0], 1e-5)


def sampled(f: Callable, p: Any, x: Any, **options: Any) -> Any:
    return fisher_diagonal(f, p, x, num_samples=2, key=jax.random.key(3), **options)


ESTIMATORS = {
    "empirical": lambda f, p, x, **o: empirical_fisher_diagonal(lambda p, x: jnp.sum(jnp.cos(f(p, x))), p, x, **o),
    "categorical": fisher_diagonal,
    "gaussian": functools.partial(fisher_diagonal, likelihood="gaussian"),
    "bernoulli": functools.partial(fisher_diagonal, likelihood="bernoulli"),
    "mas": mas_importance,
    "mas_jacobian": functools.partial(mas_importance, output_norm="jacobian"),
    "sampled": sampled,
}
TRANSFORMER = "transformer_with_causal_mask"
QUICK = ("empirical", "categorical", "mas", "sampled")


@functools.cache
def estimates(name: str, estimators: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """Computes each by both methods, in float64, all in one program."""
    output_fn, params, examples, _ = made(name)

    def both(estimator: str, params: Any, examples: Any) -> tuple[Any, Any]:
        estimate = functools.partial(ESTIMATORS[estimator], output_fn, params, examples)
        return estimate(microbatch_size=2), estimate(method="reference", microbatch_size=1)

    with jax.enable_x64(True):
        run = jax.jit(lambda *arguments: {estimator: both(estimator, *arguments) for estimator in estimators})
        return jax.device_get(run(*in_float64((params, examples))))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_of_a_dense_network(estimator: str) -> None:
    assert_close(*estimates("mlp", tuple(ESTIMATORS))[estimator], 1e-10)


@pytest.mark.parametrize(
    "estimator", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ESTIMATORS]
)
def test_estimators_with_logits_per_token(estimator: str) -> None:
    assert_close(*estimates(TRANSFORMER, QUICK if estimator in QUICK else (estimator,))[estimator], 1e-10)


def test_closed_forms_of_a_linear_layer() -> None:
    with jax.enable_x64(True):
        kernel, inputs = in_float64((normal(0, 4, 3), normal(1, 5, 4)))
        outputs = inputs @ kernel
        p = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
        layer = lambda k, x: jnp.matmul(x, k)  # noqa: E731
        fisher, mas = jax.jit(lambda *data: (fisher_diagonal(layer, *data), mas_importance(layer, *data)))(
            kernel, inputs
        )
        np.testing.assert_allclose(fisher, (inputs**2).T @ (p * (1 - p)) / 5, rtol=1e-12)
        np.testing.assert_allclose(mas, np.abs(inputs).T @ np.abs(2 * outputs) / 5, rtol=1e-12)


def test_one_example() -> None:
    output_fn, params, examples, _ = made("mlp")
    actual, expected = jax.jit(
        lambda *data: [fisher_diagonal(output_fn, *data, method=method) for method in ("structured", "reference")]
    )(params, examples[:1])
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("name", ["mlp", TRANSFORMER])
def test_bfloat16_accumulates_in_float32(name: str) -> None:
    output_fn, params, examples, _ = made(name)
    narrow, one = jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else np.asarray(leaf),
        (params, examples[:1]),
    )
    # 512 equal examples: a sum in bfloat16 would stop growing at 256 times its terms.
    many = np.broadcast_to(one, (512, *one.shape[1:]))
    importance = functools.partial(mas_importance, output_fn)
    actual, expected = jax.jit(lambda p, many, one: (importance(p, many), importance(p, one)))(narrow, many, one)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(actual))
    assert_close(actual, expected, 1e-2)
    if name == "mlp":
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), (narrow, one))
        assert_close(actual, importance(*wide), 5e-2)


def test_cast_to_bfloat16_inside_the_model() -> None:
    def output_fn(params: Any, x: jax.Array) -> jax.Array:
        return (x.astype(jnp.bfloat16) @ params.astype(jnp.bfloat16).T).astype(jnp.float32)

    params, examples = normal(0, 3, 4), normal(1, 5, 4)
    assert explain(output_fn, params, examples[0])[0].rule == "outer"
    actual = mas_importance(output_fn, params, examples)
    assert actual.dtype == jnp.float32
    assert_close(actual, mas_importance(output_fn, params, examples, method="reference"), 1e-2)


def test_vmap_over_an_ensemble() -> None:
    output_fn, params, examples, _ = made("mlp")
    ensemble = jax.tree.map(lambda leaf: np.stack([leaf, 2 * np.asarray(leaf)]), params)
    actual = jax.jit(jax.vmap(lambda p: mas_importance(output_fn, p, examples)))(ensemble)
    for member in range(2):
        alone = mas_importance(output_fn, jax.tree.map(lambda leaf, m=member: leaf[m], ensemble), examples)
        assert_close(jax.tree.map(lambda leaf, m=member: np.asarray(leaf)[m], actual), alone, 1e-5)


def test_inside_a_users_function_that_closes_over_traced_values() -> None:
    output_fn, params, examples, _ = made("mlp")
    mask = jnp.array([True, True, False, True])

    @jax.jit
    def run(params: Any, examples: Any, mask: jax.Array) -> Any:
        masked = lambda p, x: jnp.where(mask, output_fn(p, x), 0)  # noqa: E731
        return structured.sum_over_examples(
            masked,
            lambda outputs, index: stacked(jnp.where(mask, 2 * outputs[None], 0)),
            params,
            examples,
            reduction="norm",
        )

    expected = mas_importance(lambda p, x: jnp.where(mask, output_fn(p, x), 0), params, examples, method="reference")
    assert_close(run(params, examples, mask), jax.tree.map(lambda leaf: 3 * np.asarray(leaf), expected), 1e-5)


@pytest.mark.usefixtures("optimized")
def test_memory_does_not_grow_with_examples_or_hold_examples_times_weights() -> None:
    def output_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["first"]) @ params["second"]

    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    params = {"first": shape, "second": shape}

    def temporary_bytes(num_examples: int) -> int:
        run = jax.jit(lambda p, x: mas_importance(output_fn, p, x, microbatch_size=32))
        compiled = run.lower(params, jax.ShapeDtypeStruct((num_examples, 256), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    of_params = 2 * 256 * 256 * 4
    bytes_of_few = temporary_bytes(64)
    assert bytes_of_few < 3 * of_params  # 32 examples × weights would be 32 times the parameters
    assert temporary_bytes(1024) <= 1.05 * bytes_of_few


@pytest.mark.usefixtures("optimized")
def test_one_example_at_a_time_holds_what_an_ordinary_gradient_holds() -> None:
    num_layers, width, num_tokens = 6, 16, 256

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x: jax.Array, weights: Any) -> jax.Array:
        return x + jnp.tanh(x @ weights["up"]) @ weights["down"]

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda x, weights: (layer(x, weights), None), x, params)[0] ** 2)

    shapes = {"up": (num_layers, width, 4 * width), "down": (num_layers, 4 * width, width)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    example = jax.ShapeDtypeStruct((num_tokens, width), jnp.float32)
    examples = jax.ShapeDtypeStruct((3, num_tokens, width), jnp.float32)
    fisher = functools.partial(empirical_fisher_diagonal, loss_fn, microbatch_size=1)

    def held(run: Callable, *arguments: Any) -> int:
        return jax.jit(run).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    of_params = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    operands = num_layers * num_tokens * 4 * width * 4  # of one of the two products
    bound = 1.1 * held(jax.grad(loss_fn), params, example) + of_params + 4 * example.size
    assert held(fisher, params, examples) < bound < operands + bound - of_params


@pytest.mark.parametrize("reduction", ["sum_of_squares", "norm"])
def test_squares_for_a_bias_are_those_for_its_kernel(reduction: str) -> None:
    # One sum for each layer's outputs goes through the loop over cotangents, not two.
    output_fn, params, examples, _ = made("mlp")
    assert len(jax.tree.leaves(params)) == 4  # two layers
    run = functools.partial(structured.sum_over_examples, output_fn, some_cotangents(2), reduction=reduction)
    jaxpr = jax.make_jaxpr(functools.partial(run, microbatch_size=2))(params, examples).jaxpr
    (over_microbatches,) = (e for e in jaxpr.eqns if e.primitive.name == "scan")
    (over_cotangents,) = (e for e in over_microbatches.params["jaxpr"].jaxpr.eqns if e.primitive.name == "scan")
    _, num_carried = count_constants_and_carry(over_cotangents)
    assert num_carried == 4  # for each layer, squares and their scales


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("num_rows", [1, 7, 1000])
def test_many_tokens_are_not_compared_each_with_each(num_rows: int) -> None:
    num_tokens = 2 * structured._MAX_COMPARED + 1

    def output_fn(params: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.take(params, tokens, axis=0, mode="fill", fill_value=0)).mean(axis=0)

    random = np.random.default_rng(0)
    params = jnp.asarray(random.normal(size=(num_rows, 2)), jnp.float32)
    examples = jnp.asarray(random.integers(0, num_rows + 2, size=(3, num_tokens)), jnp.int32)  # some out of bounds
    run = functools.partial(mas_importance, output_fn)
    with jax.enable_x64(True):
        expected = run(params.astype(np.float64), examples, method="reference")
        np.testing.assert_allclose(run(params.astype(np.float64), examples), expected, rtol=1e-10)
    np.testing.assert_allclose(run(params, examples), expected, rtol=1e-4, atol=1e-7)
    held = jax.jit(run).lower(params, examples).compile().memory_analysis().temp_size_in_bytes
    assert held < num_tokens**2


@pytest.mark.parametrize("operand, cotangent", [(1e10, 1e-22), (1e-12, 1e21), (1e-12, 1e-10), (3e25, 1e-20)])
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_squares_of_products_are_right_where_those_of_their_factors_leave_the_range(
    operand: float, cotangent: float, num_outputs: int
) -> None:
    def output_fn(params: Any, x: jax.Array) -> jax.Array:
        return (x @ params["kernel"] + params["bias"]) * jnp.full(num_outputs, cotangent)

    params = {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}
    x = np.float32([[operand, 0.0], [operand, operand / 8]])
    fisher = fisher_diagonal(output_fn, params, x, likelihood="gaussian")
    expected = num_outputs * (np.float64(x) * cotangent) ** 2
    np.testing.assert_allclose(fisher["kernel"][:, 0], expected.mean(axis=0), rtol=1e-5, atol=1e-37)
    with np.errstate(over="ignore"):
        of_bias = np.float32(num_outputs * np.float64(cotangent) ** 2)  # may be infinite or 0 itself
    np.testing.assert_allclose(fisher["bias"][0], of_bias, rtol=1e-5, atol=1e-37)
