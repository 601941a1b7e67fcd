"""The reference path: what it sums, and the memory it takes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import per_example

SIZE = 64


def output_fn(params, x):
    return jnp.tanh(params["w"] @ x) * params["scale"]


def cotangents_fn(outputs, index):
    return jnp.stack([outputs, jnp.cos(outputs) + index.astype(outputs.dtype)])


def make_problem(num_examples):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"w": jax.random.normal(keys[0], (SIZE, SIZE)) / 8, "scale": jnp.linspace(0.5, 1.5, SIZE)}
    return params, jax.random.normal(keys[1], (num_examples, SIZE))


@pytest.mark.parametrize("reduction", ["sum_of_squares", "norm"])
@pytest.mark.parametrize("microbatch_size", [1, 2, 5, 8])
def test_is_the_sum_over_examples_of_what_it_says(reduction, microbatch_size):
    params, inputs = make_problem(5)
    weights = jnp.array([1.0, 0.5, 0.0, 2.0, 1.0])
    expected = jax.tree.map(jnp.zeros_like, params)
    for index in range(5):
        outputs, pull_back = jax.vjp(lambda p, index=index: output_fn(p, inputs[index]), params)
        gradients = [pull_back(cotangent)[0] for cotangent in cotangents_fn(outputs, jnp.int32(index))]
        squares = jax.tree.map(lambda a, b: a**2 + b**2, *gradients)
        contribution = squares if reduction == "sum_of_squares" else jax.tree.map(jnp.sqrt, squares)
        expected = jax.tree.map(lambda t, c, index=index: t + weights[index] * c, expected, contribution)
    computed = per_example.sum_over_examples(
        output_fn,
        cotangents_fn,
        params,
        inputs,
        reduction=reduction,
        weights=weights,
        microbatch_size=microbatch_size,
    )
    chex.assert_trees_all_close(computed, expected, rtol=1e-5, atol=1e-5)


def test_memory_is_set_by_the_microbatch_and_not_by_the_number_of_examples():
    def temporary_bytes(num_examples, microbatch_size):
        compute = functools.partial(
            per_example.sum_over_examples,
            output_fn,
            cotangents_fn,
            reduction="sum_of_squares",
            microbatch_size=microbatch_size,
        )
        return jax.jit(compute).lower(*make_problem(num_examples)).compile().memory_analysis().temp_size_in_bytes

    bytes_of_params = 4 * SIZE * SIZE
    assert temporary_bytes(4000, 10) - temporary_bytes(40, 10) < bytes_of_params
    assert temporary_bytes(40, 40) - temporary_bytes(40, 10) > 20 * bytes_of_params


def test_default_microbatch_size_on_a_cpu_is_one_example(monkeypatch):
    params, _ = make_problem(1)
    assert per_example.default_microbatch_size(params) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert per_example.default_microbatch_size(params) == 256
    assert per_example.default_microbatch_size({"w": jax.ShapeDtypeStruct((2**14, 2**14), np.float32)}) == 1
