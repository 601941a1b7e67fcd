"""A table of models, which use their parameters in all the ways that a plan has a rule for, or none.

Their parameters are drawn by NumPy, which compiles nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lifelong_jax.importance.cotangents import Cotangents, stacked

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


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(low: int, high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, size=shape).astype(np.int32)


def linen(module: nn.Module, examples: Any, **rules: str) -> Model:
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jax.tree.map(lambda x: x[0], examples)))
    rest = {name: jax.tree.map(np.exp, draw(shape)) for name, shape in shapes.items() if name != "params"}
    return Model(
        lambda params, x: module.apply({"params": params, **rest}, x),
        draw(shapes["params"]),
        examples,
        {f"['{leaf}']" if leaf.isidentifier() else leaf: rule for leaf, rule in rules.items()},
    )


def draw(shapes: Any) -> Any:
    """Draws all leaves at random: biases of 0 and scales of 1 would hide mistakes."""
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [0.5 * normal(9 + n, *leaf.shape) for n, leaf in enumerate(leaves)])


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
    tokens = integers(0, 4, NUM_EXAMPLES, 5)  # some repeat, some rows are never looked up
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
def scan_of_no_steps() -> Model:
    def output_fn(params: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ weight @ params["shared"]), None

        return jax.lax.scan(step, x, params["stack"])[0] * params["scale"]

    params = {"stack": normal(0, 0, 3, 3), "shared": normal(1, 3, 3), "scale": normal(2, 3)}
    return Model(output_fn, params, normal(3, NUM_EXAMPLES, 3), {})


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
    def make() -> nnx.Module:
        return nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))

    graph, shapes = nnx.split(nnx.eval_shape(make), nnx.Param)
    return Model(lambda p, x: nnx.merge(graph, p)(x), draw(shapes), normal(0, NUM_EXAMPLES, 3), {"kernel": "outer"})


@model
def equinox() -> Model:
    module = eqx.filter_eval_shape(lambda: eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)))
    shapes, rest = eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return Model(lambda p, x: eqx.combine(p, rest)(x), draw(shapes), normal(0, NUM_EXAMPLES, 3), {".weight": "outer"})


@model
def haiku() -> Model:
    network = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2)(jax.nn.relu(hk.Conv1D(3, 2)(x))).sum(axis=0)))
    examples = normal(0, NUM_EXAMPLES, 4, 2)
    params = draw(jax.eval_shape(lambda: network.init(jax.random.key(0), examples[0])))
    return Model(network.apply, params, examples, {"['w']": "product"})


@functools.cache
def made(name: str) -> Model:
    plain = MODELS[name]()

    def output_fn(params: Any, x: Any) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # flax needs it; the library does not
            return plain.output_fn(params, x)

    params, examples = jax.tree.map(jnp.asarray, (plain.params, plain.examples))
    return Model(output_fn, params, examples, plain.rules)


def in_float64(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x), tree
    )


def some_cotangents(num_cotangents: int) -> Callable[[jax.Array, jax.Array], Cotangents]:
    def cotangents_fn(outputs: jax.Array, index: jax.Array) -> Cotangents:
        phases = jnp.arange(num_cotangents, dtype=jnp.int32) + 2 * index
        return stacked(jax.vmap(lambda phase: jnp.cos(outputs + phase.astype(outputs.dtype)))(phases))

    return cotangents_fn


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Compares on the scale of the tree: some gradients are 0, and their relative error is noise over noise."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    scale = max(np.abs(leaf).max(initial=0) for leaf in jax.tree.leaves(expected))
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)
