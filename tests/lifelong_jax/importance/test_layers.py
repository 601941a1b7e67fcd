"""Local MAS: against Hebb's rule, and against MAS of each layer alone and of the whole network."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import Batch, TrainingState, layer_output, local_mas_importance, mas_importance, methods
from lifelong_jax.models import MLP
from lifelong_jax.objectives import CLASSIFICATION

NUM_EXAMPLES, SIZES = 5, (3, 4, 6, 2)


def dense(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"])


def network(params, x):
    for layer in params[:-1]:
        x = layer_output(dense(layer, x))
    return x @ params[-1]["w"] + params[-1]["b"]


def make_params(dtype=jnp.float64):
    random = np.random.default_rng(0)
    return [
        {"w": jnp.asarray(random.normal(size=shape), dtype), "b": jnp.asarray(random.normal(size=shape[1:]), dtype)}
        for shape in itertools.pairwise(SIZES)
    ]


def make_inputs(dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(1).normal(size=(NUM_EXAMPLES, SIZES[0])), dtype)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", [{}, {"method": "reference", "microbatch_size": 2}])
def test_it_is_hebbs_rule(options):
    params, inputs, weights = make_params(), make_inputs(), np.array([1.0, 2.0, 0.0, 1.0, 0.5])
    importance = local_mas_importance(network, params, inputs, weights=weights, **options)
    before = np.asarray(inputs)
    for index, layer in enumerate(params):
        after = before @ np.asarray(layer["w"]) + np.asarray(layer["b"])
        after = after if index == len(params) - 1 else np.maximum(after, 0)
        together = [2 * np.outer(np.abs(x), np.abs(y)) for x, y in zip(before, after, strict=True)]
        np.testing.assert_allclose(importance[index]["w"], np.average(together, axis=0, weights=weights), rtol=1e-12)
        expected = np.average(2 * np.abs(after), axis=0, weights=weights)
        np.testing.assert_allclose(importance[index]["b"], expected, rtol=1e-12)
        before = after
    assert (importance[0]["w"] > 0).any()


@pytest.mark.usefixtures("float64")
def test_each_layer_is_mas_of_that_layer_alone_and_the_last_that_of_the_network():
    params, x = make_params(), np.asarray(make_inputs())
    importance = local_mas_importance(network, params, x)
    for index, layer in enumerate(params[:-1]):
        chex.assert_trees_all_close(importance[index], mas_importance(dense, layer, x), rtol=1e-12)
        x = np.maximum(x @ np.asarray(layer["w"]) + np.asarray(layer["b"]), 0)
    whole = mas_importance(network, params, make_inputs())
    chex.assert_trees_all_close(importance[-1], whole[-1], rtol=1e-12)
    assert not np.allclose(importance[0]["w"], whole[0]["w"])


@pytest.mark.usefixtures("float64")
def test_it_is_mas_where_what_follows_keeps_the_norm():
    random = np.random.default_rng(2)
    orthogonal = [jnp.asarray(np.linalg.qr(random.normal(size=(4, 4)))[0]) for _ in range(2)]
    params, inputs = jnp.asarray(random.normal(size=(3, 4))), make_inputs()

    def isometric(params, x):
        x = layer_output(jnp.tanh(x @ params["first"]))
        return layer_output(x @ params["second"]) @ params["third"]

    params = {"first": params, "second": orthogonal[0], "third": orthogonal[1]}
    local, whole = (function(isometric, params, inputs) for function in (local_mas_importance, mas_importance))
    chex.assert_trees_all_close(local, whole, rtol=1e-10)


def test_the_mark_is_the_identity_elsewhere():
    params, inputs = make_params(jnp.float32), make_inputs(jnp.float32)

    def unmarked(params, x):
        for layer in params[:-1]:
            x = dense(layer, x)
        return x @ params[-1]["w"] + params[-1]["b"]

    marked, plain = (mas_importance(function, params, inputs) for function in (network, unmarked))
    chex.assert_trees_all_equal(marked, plain)


def test_in_jit_and_checkpoint_and_vmap_and_for_one_example():
    params, inputs = make_params(jnp.float32), np.asarray(make_inputs(jnp.float32))[:1]

    def nested(params, x):
        inner = jax.checkpoint(lambda layer, x: jax.jit(lambda layer, x: layer_output(dense(layer, x)))(layer, x))
        for layer in params[:-1]:
            x = inner(layer, x)
        return x @ params[-1]["w"] + params[-1]["b"]

    expected = local_mas_importance(network, params, inputs)
    chex.assert_trees_all_close(local_mas_importance(nested, params, inputs), expected, rtol=1e-6)
    doubled = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), params)
    batched = jax.jit(jax.vmap(lambda params: local_mas_importance(network, params, inputs)))(doubled)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: np.asarray(leaf)[1], batched), expected, rtol=1e-5)


def test_compiled_once_per_function():
    traced = []

    def counted(params, x):
        traced.append(x)
        return network(params, x)

    params, inputs = make_params(jnp.float32), make_inputs(jnp.float32)
    local_mas_importance(counted, params, inputs)
    count = len(traced)
    local_mas_importance(counted, jax.tree.map(np.zeros_like, params), inputs)
    assert len(traced) == count


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("class_mask", [None, [True, False, True]])
def test_the_method_on_the_librarys_network(class_mask):
    model = MLP((4,), 3)
    inputs = make_inputs(jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), inputs[0])
    masks = None if class_mask is None else jnp.asarray(np.tile(class_mask, (NUM_EXAMPLES, 1)))
    batch = Batch(inputs, jnp.zeros(NUM_EXAMPLES, int), jnp.ones(NUM_EXAMPLES), masks)
    state = TrainingState(params, (), jax.random.key(1))
    importance = methods.local_mas().importance_fn(model.apply, CLASSIFICATION, state, batch, None)["params"]
    whole = methods.mas().importance_fn(model.apply, CLASSIFICATION, state, batch, None)["params"]
    chex.assert_trees_all_close(importance["Dense_1"], whole["Dense_1"], rtol=1e-5)
    assert np.asarray(importance["Dense_1"]["kernel"]).any(axis=0).tolist() == (class_mask or [True] * 3)
    inputs, kernel = np.asarray(inputs), np.asarray(params["params"]["Dense_0"]["kernel"])
    hidden = np.maximum(inputs @ kernel, 0)
    expected = 2 * np.mean(np.abs(inputs)[:, :, None] * hidden[:, None, :], axis=0)
    np.testing.assert_allclose(importance["Dense_0"]["kernel"], expected, rtol=1e-5)


def test_layers_may_have_dtypes_that_have_none_in_common():
    params, inputs = make_params(jnp.float32), make_inputs(jnp.float32)

    def mixed(params, x):
        hidden = layer_output(dense(params[0], x).astype(jnp.bfloat16))
        return dense(params[1], hidden.astype(jnp.float32)).astype(jnp.float16)

    def single(params, x):
        return dense(params[1], layer_output(dense(params[0], x)))

    importance = local_mas_importance(mixed, params[:2], inputs)
    expected = local_mas_importance(single, params[:2], inputs)
    chex.assert_trees_all_close(importance, expected, rtol=2e-2, atol=1e-3)


def test_bad_marks():
    params, inputs = make_params(jnp.float32), make_inputs(jnp.float32)

    def scanned(params, x):
        first = jax.lax.scan(lambda x, _: (layer_output(x), None), dense(params[0], x), length=2)[0]
        return first @ params[1]["w"]

    for function, message in (
        (lambda params, x: dense(params[0], x), "output_fn marks no layer"),
        (lambda params, x: layer_output(dense(params[0], x)), "mark all layers but the last"),
        (lambda params, x: 2 * layer_output(dense(params[0], x)), "mark all layers but the last"),
        (scanned, "layer_output cannot be used inside of a scan"),
        (lambda params, x: (x, x), "must return one floating-point array"),
    ):
        with pytest.raises(ValueError, match=message):
            local_mas_importance(function, params, inputs)
