"""Closed form = float64 loop = reference = structured, over a table of models and of estimators."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lifelong_jax import per_example, structured
from lifelong_jax.importance import empirical_fisher_diagonal, fisher_diagonal, mas_importance

NUM_EXAMPLES = 3


class Model(NamedTuple):
    output_fn: Callable[[Any, Any], jax.Array]
    params: Any
    examples: Any
    rules: dict[str, str]  # by a part of the leaf's path, the last that fits; "gradient" where none does


MODELS: dict[str, Callable[[], Model]] = {}


def model(make: Callable[[], Model]) -> Callable[[], Model]:
    MODELS[make.__name__] = make
    return make


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def integers(low: int, high: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(low, high, size=shape), jnp.int32)


def linen(module: nn.Module, examples: Any, **rules: str) -> Model:
    variables = jax.jit(module.init)(jax.random.key(0), jax.tree.map(lambda x: x[0], examples))
    rest = {name: value for name, value in variables.items() if name != "params"}
    return Model(
        lambda params, x: module.apply({"params": params, **rest}, x),
        randomise(variables["params"]),
        examples,
        {f"['{leaf}']" if leaf.isidentifier() else leaf: rule for leaf, rule in rules.items()},
    )


def randomise(params: Any) -> Any:
    # Zero biases and unit scales would hide mistakes.
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [leaf + 0.1 * normal(9 + n, *leaf.shape) for n, leaf in enumerate(leaves)])


@model
def mlp() -> Model:
    module = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(4), jax.nn.log_softmax])
    return linen(module, normal(0, NUM_EXAMPLES, 6), kernel="outer")


@model
def dense_layouts() -> Model:
    def output_fn(params: Any, x: jax.Array) -> jax.Array:
        dot = jax.lax.dot_general
        y = params["left"] @ x  # [4, 3]
        y = dot(params["batch"], y, (((2,), (1,)), ((0,), (0,))))  # [4, 5]: batched over 4
        y = dot(y, params["two axes"], (((1, 0), (1, 3)), ((), ())))  # [2, 3]
        y = jnp.einsum("ab,bca->acb", y, params["batch and rest"])  # [2, 2, 3]
        y = y.reshape(-1) @ params["reshaped"].reshape(12, 2)
        y = y @ params["transposed"].T
        y = jnp.outer(y, params["outer product"][:, None].squeeze(1))
        return y @ jnp.flip(params["flipped"], axis=0)

    shapes = {
        "left": (4, 6),
        "batch": (4, 5, 3),
        "two axes": (2, 5, 3, 4),
        "batch and rest": (3, 2, 2),
        "reshaped": (2, 3, 2, 2),
        "transposed": (3, 2),
        "outer product": (4,),
        "flipped": (4, 3),
    }
    # Small, as in scans_in_scans: cotangents oscillate with the outputs, and float32 must not be blamed for that.
    params = {name: 0.3 * normal(n, *shape) for n, (name, shape) in enumerate(shapes.items())}
    rules = {
        "['left']": "product",
        "['batch']": "outer",
        "['two axes']": "outer",
        "['batch and rest']": "outer",
        "['reshaped']": "outer",
        "['transposed']": "outer",
        "['flipped']": "product",
    }
    return Model(output_fn, params, normal(11, NUM_EXAMPLES, 6, 3), rules)


def convolution(image: tuple[int, ...], kernel: tuple[int, ...], rule: str = "product", **options: Any) -> Model:
    options = {"window_strides": (1,) * (len(image) - 2), "padding": "SAME", **options}

    def output_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(jax.lax.conv_general_dilated(x, params, **options))

    return Model(output_fn, normal(0, *kernel), normal(1, NUM_EXAMPLES, *image), {"": rule})


CONVOLUTIONS = {
    "same": lambda: convolution((1, 2, 5, 4), (3, 2, 3, 3)),
    "strides": lambda: convolution((1, 2, 6, 5), (3, 2, 3, 2), window_strides=(2, 3)),
    "padding": lambda: convolution((1, 2, 5, 4), (3, 2, 3, 3), padding=((2, 0), (-1, 3))),
    "dilated_kernel": lambda: convolution((1, 2, 6, 5), (3, 2, 3, 2), rhs_dilation=(2, 3), padding="VALID"),
    "transposed": lambda: convolution((1, 2, 3, 3), (3, 2, 3, 2), lhs_dilation=(2, 3), padding=((1, 2), (2, 0))),
    "all_at_once": lambda: convolution(
        (2, 4, 5, 6),
        (6, 2, 2, 3),
        window_strides=(2, 1),
        padding=((1, 2), (0, 3)),
        lhs_dilation=(1, 2),
        rhs_dilation=(2, 1),
        feature_group_count=2,
    ),
    "groups": lambda: convolution((1, 4, 4, 3), (6, 2, 2, 3), feature_group_count=2),
    "depthwise": lambda: convolution((1, 3, 4, 3), (6, 1, 3, 3), feature_group_count=3),
    "channels_last": lambda: convolution((2, 4, 5, 2), (3, 2, 2, 4), dimension_numbers=("NHWC", "HWIO", "NHWC")),
    "odd_layout": lambda: convolution((4, 1, 2, 5), (3, 3, 2, 2), dimension_numbers=("HNCW", "WOIH", "CWNH")),
    "one_dimension": lambda: convolution((1, 2, 7), (3, 2, 3), window_strides=(2,)),
    "three_dimensions": lambda: convolution((1, 2, 3, 4, 3), (2, 2, 2, 3, 2), window_strides=(1, 2, 1)),
    "whole_image": lambda: convolution((1, 2, 4, 3), (3, 2, 4, 3), rule="outer", padding="VALID"),
    "batch_groups": lambda: convolution((2, 2, 4, 3), (4, 2, 2, 2), rule="gradient", batch_group_count=2),
}
MODELS.update({f"convolution_{name}": make for name, make in CONVOLUTIONS.items()})


@model
def kernel_as_image() -> Model:
    def output_fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(params, x, (1, 1), "SAME")

    return Model(output_fn, normal(0, 1, 2, 4, 4), normal(1, NUM_EXAMPLES, 3, 2, 2, 2), {})


@model
def cnn_with_flipped_transposed_convolution() -> Model:
    module = nn.Sequential(
        [
            nn.Conv(4, (3, 3), strides=2),
            nn.GroupNorm(2),
            nn.gelu,
            nn.ConvTranspose(4, (2, 2), strides=(2, 2), transpose_kernel=True),
            nn.LayerNorm(),
            jnp.ravel,
            nn.Dense(3),
        ]
    )
    rules = {
        "['layers_0']['kernel']": "product",
        "['layers_3']['kernel']": "product",
        "['layers_6']['kernel']": "outer",
    }
    made = linen(module, normal(0, NUM_EXAMPLES, 4, 4, 2))
    return made._replace(rules=rules)


class Transformer(nn.Module):
    vocabulary_size: int = 7

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary_size, 4)(tokens)
        mask = nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(4)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))
        return nn.Dense(3)(x)


@model
def transformer_with_causal_mask() -> Model:
    tokens = jax.random.randint(
        jax.random.key(0), (NUM_EXAMPLES, 5), 0, 4
    )  # some repeat, some rows are never looked up
    return linen(Transformer(), tokens, kernel="product", embedding="lookup")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.Dense(x.shape[-1])(nn.relu(nn.Dense(5)(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        x, _ = stack()(x, None)
        return nn.Dense(2)(x)


@model
def scanned_stack_on_vectors() -> Model:
    return linen(Stack(), normal(0, NUM_EXAMPLES, 4), kernel="outer")


@model
def scanned_stack_on_tokens() -> Model:
    return linen(Stack(), normal(0, NUM_EXAMPLES, 2, 4), kernel="product")


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        states = nn.RNN(nn.GRUCell(3))(x, initial_carry=jnp.zeros(3, x.dtype))
        return nn.Dense(2)(states[-1])


@model
def recurrent() -> Model:
    module = linen(Recurrent(), normal(0, NUM_EXAMPLES, 4, 2))
    return module._replace(rules={"kernel": "product", "['Dense_0']['kernel']": "outer"})


@model
def scans_in_scans() -> Model:
    def output_fn(params: Any, tokens: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
            def step(carry: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
                carry = jnp.tanh(carry @ weight.T + jnp.take(params["table"], token, axis=0) + carry @ params["shared"])
                return carry, carry * params["scale"]

            x, kept = jax.lax.scan(step, x, tokens, reverse=True)
            return x, kept.sum(axis=0)

        x, kept = jax.lax.scan(layer, jnp.ones_like(params["scale"]), params["stack"])
        carried, _ = jax.lax.scan(lambda c, _: (c, x @ c), params["carried"], None, length=2)
        return kept @ carried + x

    params = {
        "stack": 0.3 * normal(0, 2, 3, 3),
        "shared": 0.3 * normal(1, 3, 3),
        "table": normal(2, 5, 3),
        "scale": normal(3, 3),
        "carried": normal(4, 3, 3),
    }
    tokens = integers(0, 5, NUM_EXAMPLES, 4)
    return Model(output_fn, params, tokens, {"['stack']": "product", "['shared']": "product", "['table']": "lookup"})


@model
def lookups() -> Model:
    def output_fn(params: Any, tokens: jax.Array) -> jax.Array:
        first = jnp.take(params["rows"], tokens, axis=0).sum(axis=0)
        second = jnp.take(params["columns"], tokens, axis=1).sum(axis=(1, 2))
        third = params["one"][tokens[0, 0]]
        out_of_bounds = jnp.take(params["clipped"], tokens + 3, axis=0, mode="clip").sum(axis=0)
        dropped = params["filled"].at[tokens + 3].get(mode="fill", fill_value=0).sum(axis=0)
        pairs = params["pairs"][tokens[0], tokens[1]]
        return jnp.sin(first + out_of_bounds + dropped).sum(axis=0) * second * third * pairs.sum()

    params = {
        "rows": normal(0, 6, 3),
        "columns": normal(1, 3, 6),
        "one": normal(2, 6, 3),
        "clipped": normal(3, 6, 3),
        "filled": normal(4, 6, 3),
        "pairs": normal(5, 6, 6),
    }
    tokens = integers(-2, 5, NUM_EXAMPLES, 2, 4)  # negative ones count from the end
    return Model(
        output_fn, params, tokens, {f"['{name}']": "lookup" for name in params if name not in ("one", "pairs")}
    )


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(6, 4)
        return embed.attend(nn.tanh(nn.Dense(4)(embed(tokens)))).mean(axis=0)


@model
def tied_embedding() -> Model:
    return linen(Tied(), integers(0, 6, NUM_EXAMPLES, 3), kernel="product")


@model
def batch_norm_in_inference_mode() -> Model:
    module = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.silu, nn.Dense(2)])
    return linen(module, normal(0, NUM_EXAMPLES, 3), kernel="outer")


@model
def several_uses() -> Model:
    @jax.jit
    def dense(weight: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ weight)

    def output_fn(params: Any, x: jax.Array) -> jax.Array:
        y = dense(params["first"], x)  # two call sites share one jaxpr
        y = dense(params["second"], y)
        y = dense(params["twice"], dense(params["twice"], y))
        y = y @ params["matrix and bias"] + params["matrix and bias"][0]
        y = y @ (params["low rank a"] @ params["low rank b"])
        y = y @ (params["square"] @ params["square"])
        return y + params["output"].sum() * 0 + jnp.vdot(params["output"], y)

    names = ["first", "second", "twice", "matrix and bias", "square", "unused"]
    params = {name: normal(n, 3, 3) for n, name in enumerate(names)}
    params |= {"low rank a": normal(7, 3, 2), "low rank b": normal(8, 2, 3), "output": normal(9, 3)}
    rules = {"['first']": "outer", "['second']": "outer", "['unused']": "unused"}
    rules |= {"['low rank a']": "product", "['low rank b']": "product"}
    return Model(output_fn, params, normal(10, NUM_EXAMPLES, 3), rules)


@jax.custom_vjp
def scaled(weight: jax.Array, x: jax.Array) -> jax.Array:
    return x @ weight


scaled.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, c: (3 * jnp.outer(kept[1], c), c @ kept[0].T))


@jax.custom_jvp
def doubled(weight: jax.Array, x: jax.Array) -> jax.Array:
    return x @ weight


@doubled.defjvp
def _doubled_jvp(primals: Any, tangents: Any) -> Any:
    (w, x), (dw, dx) = primals, tangents
    return x @ w, 2 * (x @ dw) + dx @ w


@model
def control_flow() -> Model:
    def output_fn(params: Any, x: jax.Array) -> jax.Array:
        y = jax.lax.cond(x[0] > 0, lambda: jnp.sin(x @ params["cond"]), lambda: x)
        y = jax.lax.fori_loop(0, 2, lambda _, y: jnp.tanh(y @ params["loop"]), y)
        y = scaled(params["custom vjp"], y)
        y = doubled(params["custom jvp"], y)
        y = jax.checkpoint(lambda w, y: jnp.tanh(y @ w.T), policy=jax.checkpoint_policies.dots_saveable)(
            params["remat"], y
        )
        y = jax.jit(lambda tree: jax.tree.map(lambda w: jnp.flip(w).T, tree))({"w": params["returned by jit"], "y": y})
        stopped = jax.lax.stop_gradient(params["stopped"])
        return jax.nn.softmax(y["y"] @ y["w"]) @ stopped

    names = ["cond", "loop", "custom vjp", "custom jvp", "remat", "returned by jit", "stopped"]
    params = {name: normal(n, 3, 3) for n, name in enumerate(names)}
    rules = {"['loop']": "product", "['remat']": "outer", "['returned by jit']": "outer"}
    return Model(output_fn, params, normal(10, NUM_EXAMPLES, 3), rules)


@model
def parameter_as_output() -> Model:
    return Model(lambda params, x: params, normal(0, 3), normal(1, NUM_EXAMPLES, 2), {})


@model
def flax_nnx() -> Model:
    module = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(module, nnx.Param)
    return Model(
        lambda p, x: nnx.merge(graph, p)(x), randomise(params), normal(0, NUM_EXAMPLES, 3), {"kernel": "outer"}
    )


@model
def equinox() -> Model:
    module = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    params, rest = eqx.partition(module, eqx.is_inexact_array)
    return Model(lambda p, x: eqx.combine(p, rest)(x), params, normal(0, NUM_EXAMPLES, 3), {".weight": "outer"})


@model
def haiku() -> Model:
    network = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2)(jax.nn.relu(hk.Conv1D(3, 2)(x))).sum(axis=0)))
    examples = normal(0, NUM_EXAMPLES, 4, 2)
    params = randomise(jax.jit(network.init)(jax.random.key(0), examples[0]))
    return Model(network.apply, params, examples, {"['w']": "product"})


@functools.cache
def made(name: str) -> Model:
    plain = MODELS[name]()

    def output_fn(params: Any, x: Any) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # flax needs it; the library does not
            return plain.output_fn(params, x)

    return plain._replace(output_fn=output_fn)


def in_float64(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x), tree
    )


def some_cotangents(num_cotangents: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def cotangents_fn(outputs: jax.Array, index: jax.Array) -> jax.Array:
        phases = jnp.arange(num_cotangents, dtype=jnp.int32) + 2 * index
        return jax.vmap(lambda phase: jnp.cos(outputs + phase.astype(outputs.dtype)))(phases)

    return cotangents_fn


def loop(
    output_fn: Callable,
    params: Any,
    examples: Any,
    settings: list[tuple[int, str]],
    weights: np.ndarray,
) -> list[Any]:
    """The definition, from each example's whole Jacobian, for several numbers of cotangents and reductions."""
    outputs_and_jacobian = jax.jit(lambda params, x: (output_fn(params, x), jax.jacrev(output_fn)(params, x)))
    totals = [jax.tree.map(np.zeros_like, params) for _ in settings]
    for index, weight in enumerate(weights):
        outputs, jacobian = outputs_and_jacobian(params, jax.tree.map(lambda x, index=index: x[index], examples))
        for number, (num_cotangents, reduction) in enumerate(settings):
            cotangents = some_cotangents(num_cotangents)(outputs, jnp.int32(index))
            gradients = jax.tree.map(lambda j, c=cotangents, o=outputs: np.tensordot(c, j, o.ndim), jacobian)
            squares = jax.tree.map(lambda g: np.square(g).sum(axis=0), gradients)
            contribution = squares if reduction == "sum_of_squares" else jax.tree.map(np.sqrt, squares)
            totals[number] = jax.tree.map(lambda t, c, w=weight: t + w * c, totals[number], contribution)
    return totals


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Compares on the scale of the tree: some gradients are 0, and their relative error is noise over noise."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", MODELS)
def test_equals_loop_and_reference(name: str) -> None:
    output_fn, params, examples, _ = made(name)
    weights = np.array([0.5, 2.0, 1.5])
    settings = [(1, "sum_of_squares"), (2, "norm")]

    def compute(method: Any, number: int, size: int | None, params: Any, examples: Any) -> Any:
        num_cotangents, reduction = settings[number]
        run = functools.partial(method.sum_over_examples, output_fn, some_cotangents(num_cotangents))
        return jax.jit(functools.partial(run, reduction=reduction, microbatch_size=size))(
            params, examples, weights=weights.astype(np.float32)
        )

    with jax.enable_x64(True):
        wide = in_float64((params, examples))
        expected = loop(output_fn, *wide, settings, weights)
        assert_close(compute(structured, 0, 1, *wide), expected[0], 1e-10)
        assert_close(compute(structured, 1, 2, *wide), expected[1], 1e-10)
        assert_close(compute(per_example, 1, 2, *wide), expected[1], 1e-10)
    with jax.default_matmul_precision("highest"):
        assert_close(compute(structured, 0, None, params, examples), expected[0], 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_rule_of_each_leaf(name: str) -> None:
    output_fn, params, examples, rules = made(name)
    found = structured.explain(output_fn, params, jax.tree.map(lambda x: x[0], examples))
    assert len(found) == len(jax.tree.leaves(params))
    for rule in found:
        expected = [wanted for part, wanted in rules.items() if part in rule.leaf] or ["gradient"]
        assert rule.rule == expected[-1], f"{rule.leaf}: {rule.reason}"


def classifier() -> tuple[Callable, Any, jax.Array]:
    output_fn, params, examples, _ = made("mlp")
    return output_fn, params, examples


ESTIMATORS = {
    "empirical": lambda f, p, x, **o: empirical_fisher_diagonal(lambda p, x: jnp.sum(jnp.cos(f(p, x))), p, x, **o),
    "categorical": fisher_diagonal,
    "gaussian": functools.partial(fisher_diagonal, likelihood="gaussian"),
    "bernoulli": functools.partial(fisher_diagonal, likelihood="bernoulli"),
    "mas": mas_importance,
    "mas_jacobian": functools.partial(mas_importance, output_norm="jacobian"),
}


QUICK = ("empirical", "categorical", "mas", "sampled")


def sampled(f: Callable, p: Any, x: Any, **options: Any) -> Any:
    return fisher_diagonal(f, p, x, num_samples=2, key=jax.random.key(3), **options)


@pytest.mark.parametrize(
    ("name", "estimator"),
    [("mlp", estimator) for estimator in [*ESTIMATORS, "sampled"]]
    + [  # with logits per token
        pytest.param("transformer_with_causal_mask", estimator, marks=() if estimator in QUICK else pytest.mark.slow)
        for estimator in [*ESTIMATORS, "sampled"]
    ],
)
def test_estimators(name: str, estimator: str) -> None:
    output_fn, params, examples, _ = made(name)
    estimate = ESTIMATORS.get(estimator, sampled)
    with jax.enable_x64(True):
        params, examples = in_float64((params, examples))
        actual = estimate(output_fn, params, examples, microbatch_size=2)
        expected = estimate(output_fn, params, examples, method="reference", microbatch_size=1)
    assert_close(actual, expected, 1e-10)


def test_closed_forms_of_a_linear_layer() -> None:
    kernel, inputs = normal(0, 4, 3), normal(1, 5, 4)
    with jax.enable_x64(True):
        kernel, inputs = in_float64((kernel, inputs))
        outputs = inputs @ kernel
        p = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
        layer = jnp.matmul
        expected = {
            "fisher": ((inputs**2).T @ (p * (1 - p)) / 5, fisher_diagonal(lambda k, x: layer(x, k), kernel, inputs)),
            "mas": (
                np.abs(inputs).T @ np.abs(2 * outputs) / 5,
                mas_importance(lambda k, x: layer(x, k), kernel, inputs),
            ),
        }
        for closed, computed in expected.values():
            np.testing.assert_allclose(computed, closed, rtol=1e-12)


def fisher(params: Any, examples: Any, name: str = "mlp", **options: Any) -> Any:
    return fisher_diagonal(made(name).output_fn, params, examples, **options)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 99, None])
def test_independent_of_the_microbatch(size: int | None) -> None:
    _, params, _ = classifier()
    examples = normal(5, 7, 6)
    assert_close(
        sampled(made("mlp").output_fn, params, examples, microbatch_size=size),
        sampled(made("mlp").output_fn, params, examples, method="reference"),
        1e-5,
    )


def test_weight_zero_is_padding_and_weights_may_be_traced() -> None:
    _, params, examples = classifier()
    padded = jnp.concatenate([examples, normal(7, 2, 6)])
    weights = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])
    actual = jax.jit(lambda w: fisher(params, padded, weights=w, microbatch_size=2))(weights)
    assert_close(actual, fisher(params, examples), 1e-5)


def test_one_example() -> None:
    _, params, examples = classifier()
    assert_close(fisher(params, examples[:1]), fisher(params, examples[:1], method="reference"), 1e-5)


@pytest.mark.parametrize("name", ["mlp", "transformer_with_causal_mask"])
def test_bfloat16_accumulates_in_float32(name: str) -> None:
    _, params, examples, _ = made(name)
    output_fn = made(name).output_fn
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    if name == "mlp":
        examples = examples.astype(jnp.bfloat16)
    # 512 equal examples: a sum in bfloat16 would stop growing at 256 times its terms.
    many = jnp.broadcast_to(examples[:1], (512, *examples.shape[1:]))
    actual = mas_importance(output_fn, narrow, many)
    expected = mas_importance(output_fn, narrow, examples[:1])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(actual))
    assert_close(actual, expected, 1e-2)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (narrow, examples[:1])) if name == "mlp" else None
    if wide is not None:
        assert_close(actual, mas_importance(output_fn, *wide), 5e-2)


def test_cast_to_bfloat16_inside_the_model() -> None:
    def output_fn(params: Any, x: jax.Array) -> jax.Array:
        return (x.astype(jnp.bfloat16) @ params.astype(jnp.bfloat16).T).astype(jnp.float32)

    params, examples = normal(0, 3, 4), normal(1, 5, 4)
    assert structured.explain(output_fn, params, examples[0])[0].rule == "outer"
    actual = mas_importance(output_fn, params, examples)
    assert actual.dtype == jnp.float32
    assert_close(actual, mas_importance(output_fn, params, examples, method="reference"), 1e-2)


def test_vmap_over_an_ensemble() -> None:
    output_fn, params, examples = classifier()
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    actual = jax.vmap(lambda p: mas_importance(output_fn, p, examples))(ensemble)
    for member in range(2):
        alone = mas_importance(output_fn, jax.tree.map(lambda leaf, m=member: leaf[m], ensemble), examples)
        assert_close(jax.tree.map(lambda leaf, m=member: leaf[m], actual), alone, 1e-5)


def test_inside_a_users_function_that_closes_over_traced_values() -> None:
    output_fn, params, examples = classifier()
    mask = jnp.array([True, True, False, True])

    @jax.jit
    def run(params: Any, examples: Any, mask: jax.Array) -> Any:
        masked = lambda p, x: jnp.where(mask, output_fn(p, x), 0)  # noqa: E731
        return structured.sum_over_examples(
            masked, lambda outputs, index: jnp.where(mask, 2 * outputs[None], 0), params, examples, reduction="norm"
        )

    expected = mas_importance(lambda p, x: jnp.where(mask, output_fn(p, x), 0), params, examples, method="reference")
    assert_close(run(params, examples, mask), jax.tree.map(lambda leaf: 3 * leaf, expected), 1e-5)


@pytest.mark.parametrize("method", ["structured", "reference"])
@pytest.mark.parametrize("inside_jit", [False, True])
@pytest.mark.parametrize("sharded", ["both", "weights"])
def test_sharded_examples(method: str, inside_jit: bool, sharded: str) -> None:
    output_fn, params, _ = classifier()
    examples, weights = normal(5, 12, 6), jnp.arange(12.0)
    mask = jnp.array([True, True, False, True])

    def run(params: Any, examples: Any, weights: Any, mask: Any) -> Any:
        masked = jax.tree_util.Partial(lambda mask, p, x: jnp.where(mask, output_fn(p, x), 0), mask)
        return sampled(masked, params, examples, weights=weights, method=method, microbatch_size=2)

    expected = run(params, examples, weights, mask)
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    place = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    axes = ("data",) if sharded == "both" else ()
    placed = (place(params), place(examples, *axes), place(weights, "data"), place(mask))
    actual = (jax.jit(run) if inside_jit else run)(*placed)
    assert_close(jax.device_get(actual), jax.device_get(expected), 1e-5)


def test_random_keys_as_examples() -> None:
    params, keys = normal(0, 3, 2), jax.random.split(jax.random.key(0), 5)
    output_fn = lambda p, key: jax.random.normal(key, (3,)) @ p  # noqa: E731
    actual, expected = (
        mas_importance(output_fn, params, keys, method=method, microbatch_size=2)
        for method in ("structured", "reference")
    )
    assert_close(actual, expected, 1e-5)


def test_memory_does_not_grow_with_examples_or_hold_examples_times_weights() -> None:
    def output_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["first"]) @ params["second"]

    params = {"first": jnp.ones((256, 256)), "second": jnp.ones((256, 256))}

    def temporary_bytes(num_examples: int) -> int:
        run = jax.jit(lambda p, x: mas_importance(output_fn, p, x, microbatch_size=32))
        compiled = run.lower(params, jnp.ones((num_examples, 256))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    of_params = 2 * 256 * 256 * 4
    assert temporary_bytes(64) < 3 * of_params  # 32 examples × weights would be 32 times the parameters
    assert temporary_bytes(1024) <= 1.05 * temporary_bytes(64)


def test_explain_prints_a_table() -> None:
    output_fn, params, examples, _ = made("mlp")
    table = structured.explain(output_fn, params, examples[0])
    lines = str(table).splitlines()
    assert len(lines) == 2 + 4
    assert len({len(line) for line in lines}) == 1
    kernel = next(rule for rule in table if "layers_0" in rule.leaf and "kernel" in rule.leaf)
    assert (kernel.shape, kernel.rule, kernel.multiply_adds, kernel.floats) == ((6, 5), "outer", 30, 11)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, examples[0]))
    assert structured.explain(output_fn, *shapes) == table


@pytest.mark.parametrize("reduction", ["sum_of_squares", "norm"])
def test_squares_for_a_bias_are_those_for_its_kernel(reduction) -> None:
    # One sum for each layer's outputs goes through the loop over cotangents, not two.
    output_fn, params, examples, _ = made("mlp")
    assert len(jax.tree.leaves(params)) == 4  # two layers
    run = functools.partial(structured.sum_over_examples, output_fn, some_cotangents(2), reduction=reduction)
    jaxpr = jax.make_jaxpr(functools.partial(run, microbatch_size=2))(params, examples).jaxpr
    (over_microbatches,) = (e for e in jaxpr.eqns if e.primitive.name == "scan")
    (over_cotangents,) = (e for e in over_microbatches.params["jaxpr"].jaxpr.eqns if e.primitive.name == "scan")
    assert over_cotangents.params["num_carry"] == 2


def test_default_microbatch_is_wide_for_vectors_and_narrow_for_tokens() -> None:
    sizes = []
    for name in ("mlp", "transformer_with_causal_mask"):
        output_fn, params, examples, _ = made(name)
        sizes.append(structured.default_microbatch_size(output_fn, some_cotangents(1), params, examples[0]))
    assert sizes[0] > sizes[1] >= 1


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_default_microbatch_is_narrower_where_cotangents_are_many(monkeypatch, backend) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    dense, x = lambda params, x: x @ params, jax.ShapeDtypeStruct((8,), np.float32)

    def size(num_outputs: int) -> int:
        def one_per_output(outputs: jax.Array, index: jax.Array) -> jax.Array:
            return jnp.eye(num_outputs)

        params = jax.ShapeDtypeStruct((8, num_outputs), np.float32)
        return structured.default_microbatch_size(dense, one_per_output, params, x)

    assert size(10) == size(100) == 1024
    assert 1 <= size(1000) <= 2**28 // 1000**2
    assert size(2**15) == 1
