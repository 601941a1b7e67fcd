"""The loop over microbatches: sizes and padding change no result."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lifelong_jax import fisher_diagonal, mas_importance
from tests.lifelong_jax.importance.models import assert_close, made, normal

METHODS = ("structured", "reference")
SIZES = [1, 2, 3, 4, 7, 99, None]


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


def test_random_keys_as_examples() -> None:
    params, keys = normal(0, 3, 2), jax.random.split(jax.random.key(0), 5)
    output_fn = lambda p, key: jax.random.normal(key, (3,)) @ p  # noqa: E731
    actual, expected = jax.jit(
        lambda *data: [mas_importance(output_fn, *data, method=method, microbatch_size=2) for method in METHODS]
    )(params, keys)
    assert_close(actual, expected, 1e-5)
