"""The reference path: what it sums, and the memory it takes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax.importance import reference
from lifelong_jax.importance.cotangents import stacked

SIZE, NUM_EXAMPLES = 64, 5
SIZES = [1, 2, 5, 8]
REDUCTIONS = ["sum_of_squares", "norm"]


def output_fn(params, x):
    return jnp.tanh(params["w"] @ x) * params["scale"]


def cotangents_fn(outputs, index):
    return stacked(jnp.stack([outputs, jnp.cos(outputs) + index.astype(outputs.dtype)]))


@functools.cache
def results():
    """The sums, by reduction and microbatch size, and each example's gradients, one after the other; in one program."""
    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(SIZE, SIZE)).astype(np.float32) / 8, "scale": np.linspace(0.5, 1.5, SIZE)}
    params = jax.tree.map(np.float32, params)
    inputs = random.normal(size=(NUM_EXAMPLES, SIZE)).astype(np.float32)
    weights = np.array([1.0, 0.5, 0.0, 2.0, 1.0], np.float32)

    def gradients_of(params, x, index):
        outputs, pull_back = jax.vjp(lambda p: output_fn(p, x), params)
        return [pull_back(cotangent)[0] for cotangent in cotangents_fn(outputs, index).values]

    @jax.jit
    def run(params, inputs, weights):
        compute = functools.partial(reference.sum_over_examples, output_fn, cotangents_fn, params, inputs)
        computed = {
            reduction: [compute(reduction=reduction, weights=weights, microbatch_size=size) for size in SIZES]
            for reduction in REDUCTIONS
        }
        numbers = jnp.arange(NUM_EXAMPLES, dtype=jnp.int32)
        return computed, jax.lax.map(lambda x: gradients_of(params, *x), (inputs, numbers))

    return weights, *jax.device_get(run(params, inputs, weights))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("microbatch_size", SIZES)
def test_sums_over_examples(reduction, microbatch_size):
    weights, computed, gradients = results()
    squares = jax.tree.map(lambda a, b: a**2 + b**2, *gradients)
    contributions = squares if reduction == "sum_of_squares" else jax.tree.map(np.sqrt, squares)
    expected = jax.tree.map(lambda leaf: np.tensordot(weights, leaf, 1), contributions)
    found = computed[reduction][SIZES.index(microbatch_size)]
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("optimized")
def test_memory_is_set_by_the_microbatch_and_not_by_the_number_of_examples():
    params = {"w": jax.ShapeDtypeStruct((SIZE, SIZE), np.float32), "scale": jax.ShapeDtypeStruct((SIZE,), np.float32)}

    @functools.cache
    def temporary_bytes(num_examples, microbatch_size):
        compute = functools.partial(
            reference.sum_over_examples,
            output_fn,
            cotangents_fn,
            reduction="sum_of_squares",
            microbatch_size=microbatch_size,
        )
        inputs = jax.ShapeDtypeStruct((num_examples, SIZE), np.float32)
        return jax.jit(compute).lower(params, inputs).compile().memory_analysis().temp_size_in_bytes

    bytes_of_params = 4 * SIZE * SIZE
    assert temporary_bytes(4000, 10) - temporary_bytes(40, 10) < bytes_of_params
    assert temporary_bytes(40, 40) - temporary_bytes(40, 10) > 20 * bytes_of_params


def test_default_microbatch_size_on_a_cpu_is_one_example(monkeypatch):
    params = {"w": jax.ShapeDtypeStruct((SIZE, SIZE), np.float32), "scale": jax.ShapeDtypeStruct((SIZE,), np.float32)}
    assert reference.default_microbatch_size(params) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert reference.default_microbatch_size(params) == 256
    assert reference.default_microbatch_size({"w": jax.ShapeDtypeStruct((2**14, 2**14), np.float32)}) == 1
