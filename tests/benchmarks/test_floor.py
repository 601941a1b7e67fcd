"""Tests that the floors which benchmarks divide by are the products that they say, all of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import floor

SIZES = (48, 64, 32, 5)
BATCH_SIZE = 16


# The compiler's account has a loop's body once: of classes one by one, the first, and the loop over the others.
@pytest.mark.parametrize(
    ("part", "name", "vmapped", "uncounted"),
    [
        ("training", "", 1, 0),
        ("training", "", 3, 0),
        ("importance", "classes stacked", 1, 0),
        ("importance", "classes one by one", 1, SIZES[-1] - 3),
        ("evaluation", "", 1, 0),
    ],
)
def test_compiled_loops_have_all_products(part, name, vmapped, uncounted):
    products = functools.partial(floor.PRODUCTS[part][name], floor.Linear(transposed=vmapped > 1))
    function = functools.partial(floor.loop, products)
    compiled, _ = floor.compile_loop(function, SIZES, BATCH_SIZE, vmapped > 1, vmapped)
    one_cotangent = floor.flops("training", SIZES) - 2 * floor.flops("evaluation", SIZES)
    expected = vmapped * BATCH_SIZE * (floor.flops(part, SIZES) - uncounted * one_cotangent)
    # A little more, for sums and indices, and less than the smallest product.
    smallest = 2 * vmapped * BATCH_SIZE * SIZES[-1] * SIZES[-2]
    assert 0 <= compiled.cost_analysis()["flops"] - expected < smallest


@pytest.mark.parametrize("transposed", [False, True])
def test_training_products_are_the_gradient_of_a_linear_network(transposed):
    linear, weights, x = draw(transposed)

    def half_square(weights):
        return jnp.sum(floor.evaluation_products(linear, weights, x)[-1] ** 2) / 2

    gradients, found = jax.jit(lambda w: (jax.grad(half_square)(w), floor.training_products(linear, w, x)))(weights)
    for product, gradient in zip(found, gradients, strict=True):
        np.testing.assert_allclose(product, gradient, rtol=1e-4, atol=1e-4)


def test_classes_one_by_one_and_stacked_agree():
    linear, weights, x = draw(transposed=False)
    ways = floor.PRODUCTS["importance"].values()
    by_way = jax.jit(lambda weights: [products(linear, weights, x) for products in ways])(weights)
    for one_by_one, stacked in zip(*by_way, strict=True):
        np.testing.assert_allclose(one_by_one, stacked, rtol=1e-4, atol=1e-4)


def test_flops_by_hand():
    # 2 · (48 · 64 + 64 · 32 + 32 · 5) forward and by weights, 2 · (64 · 32 + 32 · 5) back.
    assert floor.flops("evaluation", SIZES) == 10560
    assert floor.flops("training", SIZES) == 2 * 10560 + 4416
    assert floor.flops("importance", SIZES) == 2 * 10560 + 4 * 4416


def draw(transposed):
    keys = jax.random.split(jax.random.key(0), len(SIZES))
    weights = [
        jax.random.normal(key, pair[::-1] if transposed else pair) / pair[0] ** 0.5
        for key, pair in zip(keys[1:], itertools.pairwise(SIZES), strict=True)
    ]
    return floor.Linear(transposed), weights, jax.random.normal(keys[0], (BATCH_SIZE, SIZES[0]))
