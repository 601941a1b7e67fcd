"""The loop over microbatches: sizes and padding change no result, and sharded examples are summed in place."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial

from lifelong_jax import fisher_diagonal, mas_importance
from tests.lifelong_jax.importance.models import assert_close, made, normal

METHODS = ("structured", "reference")
MASK = np.array([True, True, False, True])
SIZES = [1, 2, 3, 4, 7, 99, None]


def masked_output(mask: jax.Array, params: Any, x: jax.Array) -> jax.Array:
    return jnp.where(mask, made("mlp").output_fn(params, x), 0)


def sampled(output_fn: Any, params: Any, examples: Any, **options: Any) -> Any:
    return fisher_diagonal(output_fn, params, examples, num_samples=2, key=jax.random.key(3), **options)


@functools.cache
def results_by_size() -> dict[Any, Any]:
    """Samples labels for seven examples, with every microbatch size and by the reference, in one program."""
    output_fn, params, _, _ = made("mlp")

    def run(*data: Any) -> dict[Any, Any]:
        reference = sampled(output_fn, *data, method="reference")
        return {"reference": reference} | {str(size): sampled(output_fn, *data, microbatch_size=size) for size in SIZES}

    return jax.jit(run)(params, normal(5, 7, 6))


@pytest.mark.parametrize("size", SIZES)
def test_independent_of_the_microbatch(size: int | None) -> None:
    results = results_by_size()
    assert_close(results[str(size)], results["reference"], 1e-5)


def test_weight_zero_is_padding_and_weights_may_be_traced() -> None:
    output_fn, params, examples, _ = made("mlp")
    padded = np.concatenate([examples, normal(7, 2, 6)])
    weights = np.array([1.0, 1.0, 1.0, 0.0, 0.0], np.float32)
    actual = jax.jit(lambda w: fisher_diagonal(output_fn, params, padded, weights=w, microbatch_size=2))(weights)
    assert_close(actual, fisher_diagonal(output_fn, params, examples), 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("absent", [np.nan, np.inf, 1e20])
def test_an_example_of_weight_zero_is_absent_whatever_it_is(method: str, absent: float) -> None:
    output_fn, params, examples, _ = made("mlp")
    padded = np.concatenate([np.full((1, 6), absent, np.float32), examples])
    weights = np.array([0.0, 1.0, 1.0, 1.0], np.float32)
    actual = fisher_diagonal(output_fn, params, padded, weights=weights, method=method, microbatch_size=2)
    assert_close(actual, fisher_diagonal(output_fn, params, examples), 1e-5)
    by_shard = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
    sharded = jax.device_put(padded, by_shard)  # the first shard has no other example
    actual = fisher_diagonal(output_fn, params, sharded, weights=weights, method=method, microbatch_size=2)
    assert_close(actual, fisher_diagonal(output_fn, params, examples), 1e-5)


def run_all(params: Any, examples: Any, weights: Any, mask: Any) -> dict[str, Any]:
    return {
        method: sampled(
            Partial(masked_output, mask), params, examples, weights=weights, method=method, microbatch_size=2
        )
        for method in METHODS
    }


@functools.cache
def sharding_problem() -> tuple[tuple[Any, ...], dict[str, Any]]:
    data = (made("mlp").params, normal(5, 12, 6), np.arange(12, dtype=np.float32), MASK)
    return data, jax.device_get(run_all(*data))


@functools.cache
def sharded_results(inside_jit: bool, sharded: str) -> dict[str, Any]:
    (params, examples, weights, mask), _ = sharding_problem()
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    place = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    axes = ("data",) if sharded == "both" else ()
    placed = (place(params), place(examples, *axes), place(weights, "data"), place(mask))
    return jax.device_get((jax.jit(run_all) if inside_jit else run_all)(*placed))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inside_jit", [False, True])
@pytest.mark.parametrize("sharded", ["both", "weights"])
def test_sharded_examples(method: str, inside_jit: bool, sharded: str) -> None:
    _, expected = sharding_problem()
    assert_close(sharded_results(inside_jit, sharded)[method], expected[method], 1e-5)


def test_random_keys_as_examples() -> None:
    params, keys = normal(0, 3, 2), jax.random.split(jax.random.key(0), 5)
    output_fn = lambda p, key: jax.random.normal(key, (3,)) @ p  # noqa: E731
    actual, expected = jax.jit(
        lambda *data: [mas_importance(output_fn, *data, method=method, microbatch_size=2) for method in METHODS]
    )(params, keys)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("method", ["reference", "structured"])
def test_shards_of_a_users_own_shard_map_are_squared_one_by_one(method, check_vma):
    # With check_vma, a gradient with respect to replicated parameters would be summed over the shards first.
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32), "b": jnp.ones(3)}
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(16, 6)), jnp.float32)

    def logits_fn(params, x):
        return jnp.tanh(x @ params["w"]) * params["b"]

    def importances(params, inputs):
        fisher = fisher_diagonal(logits_fn, params, inputs, method=method)
        return fisher, mas_importance(logits_fn, params, inputs, method=method, weights=jnp.ones(len(inputs)))

    def of_shard(params, inputs):
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "x"), importances(params, inputs))

    specs = {"in_specs": (PartitionSpec(), PartitionSpec("x")), "out_specs": PartitionSpec()}
    sharded = jax.jit(jax.shard_map(of_shard, mesh=mesh, check_vma=check_vma, **specs))(params, inputs)
    chex.assert_trees_all_close(sharded, importances(params, inputs), rtol=1e-5)
