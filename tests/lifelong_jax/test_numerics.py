"""Dtypes of sums, scaled weights, equal parts, and workarounds for XLA, none of which changes a number."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from lifelong_jax import _numerics

SPECIAL = np.array([0.0, 1.5, -2.0, 1e-30, -3e38, np.inf, -np.inf, np.nan], np.float32)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["bfloat16"], "float32"),
        (["float16"], "float32"),
        (["bfloat16", "float16"], "float32"),
        (["float16", "bfloat16", "float32"], "float32"),
        (["int32", "bfloat16"], "float64"),  # as in NumPy
        (["float64"], "float64"),
        (["bfloat16", "float64", "float16"], "float64"),
    ],
)
def test_wide_dtype_holds_all_and_is_float32_at_least(dtypes, expected):
    with jax.enable_x64(True):
        assert _numerics.wide_dtype(*(jnp.zeros(2, dtype) for dtype in dtypes)) == expected
        assert _numerics.wide_dtype(*(jax.ShapeDtypeStruct((2,), dtype) for dtype in dtypes)) == expected


def test_widen_leaves_wider_arrays_alone():
    with jax.enable_x64(True):
        for dtype, wide in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
            array = jnp.asarray(np.array([1.5, -2.0]), dtype)
            assert _numerics.widen(array).dtype == wide
            chex.assert_trees_all_equal(_numerics.widen(array), np.array([1.5, -2.0], wide))
            zeros = _numerics.widened_zeros({"w": array})["w"]
            assert zeros.dtype == wide
            assert zeros.shape == (2,)
            assert not zeros.any()


TINY, HUGE = np.finfo(np.float32).tiny, np.float32(3e38)


@pytest.mark.parametrize(
    "weights",
    [
        np.array([TINY, 3 * TINY, 0.0], np.float32),
        np.array([HUGE, HUGE / 3, HUGE / 1024, 0.0], np.float32),
        np.array([1.0, 0.3, 1.9], np.float32),
        np.array([1.0, 0.25], jnp.bfloat16),
        np.array([3, 0, 7], np.int32),
        np.array([True, False]),
        np.array([1e-300, 3e-300, 1e-305]),
    ],
    ids=["tiny", "huge", "plain", "bfloat16", "integers", "bools", "float64"],
)
def test_weights_are_scaled_by_a_power_of_2(weights):
    with jax.enable_x64(weights.dtype == np.float64):
        scaled = np.asarray(jax.jit(_numerics.scale_weights)(weights))
    assert scaled.dtype == (np.float64 if weights.dtype == np.float64 else np.float32)
    assert 1 <= scaled.max() < 2
    factor = np.float64(scaled.max()) / np.float64(weights.max())
    assert np.frexp(factor)[0] == 0.5  # a power of 2
    np.testing.assert_array_equal(scaled, weights.astype(np.float64) * factor)
    assert np.isfinite(scaled.sum())
    assert np.isfinite(1 / scaled.sum())


def test_weights_that_are_all_0_stay_0():
    np.testing.assert_array_equal(_numerics.scale_weights(jnp.zeros(3)), np.zeros(3))


@pytest.mark.parametrize("num_examples", [1, 2, 7, 10, 1437])
@pytest.mark.parametrize("at_most", [1, 2, 3, 10, 1024])
def test_parts_are_few_and_equal(num_examples, at_most):
    size = _numerics.equal_size(num_examples, at_most)
    num_parts = -(-num_examples // at_most)
    assert 1 <= size <= at_most
    assert -(-num_examples // size) <= num_parts  # no more parts than needed
    assert (size - 1) * num_parts < num_examples  # a smaller size would need more
    assert _numerics.equal_size(1437, 1024) == 719


def test_unbatched_is_vmap_over_one_entry():
    def function(tree, number):
        return {"product": jnp.tanh(tree["x"] @ tree["w"]) * number, "number": number + 1}

    random = np.random.default_rng(0)
    tree = {"x": random.normal(size=(1, 5)), "w": random.normal(size=(1, 5, 3))}
    arguments = (jax.tree.map(np.float32, tree), np.array([2.0], np.float32))
    ours, theirs = (jax.jit(over(function))(*arguments) for over in (_numerics.unbatched, jax.vmap))
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)
    chex.assert_trees_all_equal(ours["number"], theirs["number"])


@pytest.mark.parametrize("grads", [{"w": np.ones((2, 2), np.float32), "b": SPECIAL}, {"b": SPECIAL[::-1]}, {}])
def test_updates_after_reads_are_the_updates(grads):
    updates = {"w": SPECIAL, "b": np.array([0.5, -1.0], jnp.bfloat16)}
    updated = jax.jit(_numerics.update_after_reads)(updates, grads)
    chex.assert_trees_all_equal(updated, updates)
    chex.assert_trees_all_equal_dtypes(updated, updates)


def test_updates_wait_for_vectors_only():
    updates = {"w": jnp.ones((2, 2))}
    assert _numerics.update_after_reads(updates, {"w": jnp.ones((2, 2)), "empty": jnp.ones(0)}) is updates


def test_a_value_that_is_computed_once_is_the_value_and_has_its_derivative():
    values, updates = np.meshgrid(SPECIAL, SPECIAL[:-1])  # an update that is NaN makes the value NaN

    @jax.jit
    def run(value, update):
        gradients = jax.grad(lambda *both: jnp.sum(_numerics.compute_once(*both)), argnums=(0, 1))(value, update)
        return _numerics.compute_once(value, update), gradients

    computed, (by_value, by_update) = run(values, updates)
    np.testing.assert_array_equal(computed, values)
    np.testing.assert_array_equal(by_value, np.ones_like(values))
    np.testing.assert_array_equal(np.nan_to_num(by_update), np.zeros_like(values))


def test_to_wait_for_results_changes_nothing():
    tree = {"a": SPECIAL, "b": np.ones((2, 2), jnp.bfloat16)}
    for results in ([np.array([first, 1.0], np.float32) for first in SPECIAL], [], [np.zeros((0, 3), np.float32)]):
        waited, unchanged = jax.jit(_numerics.wait_for)(tree, results)
        chex.assert_trees_all_equal(waited, tree)
        chex.assert_trees_all_equal(unchanged, results)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32])
@pytest.mark.parametrize("index_dtype", [np.int32, np.uint8])
def test_indices_per_example_are_the_indices(dtype, index_dtype):
    indices = np.array([2, 0, 1, 3], index_dtype)
    firsts = [3, 0, -2] if dtype == np.int32 else SPECIAL
    inputs = np.tile(np.array(firsts, dtype)[:, None], (1, 4))
    copies = jax.jit(jax.vmap(_numerics.indices_per_example, (None, 0)))(indices, inputs)
    assert copies.dtype == index_dtype
    np.testing.assert_array_equal(copies, np.tile(indices, (len(firsts), 1)))


def test_sharded_arrays_are_told_by_their_types():
    mesh = jax.make_mesh((4,), ("data",))
    placed = jax.device_put(np.ones(4), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert _numerics.is_sharded(placed)
    assert not _numerics.is_sharded(jnp.ones(4))
    assert _numerics.update_after_reads(placed, {"b": placed}) is placed


def test_an_optimiser_gets_the_keyword_arguments_that_its_update_takes():
    def report(**extra_args):  # the names that arrive
        return optax.GradientTransformationExtraArgs(
            lambda params: (), lambda updates, state, params=None, **extra_args: (sorted(extra_args), state)
        )

    def one_by_name(updates, state, params=None, *, value=None):
        return value, state

    def names(optimizer):
        return _numerics.with_extra_args(optimizer).update(1.0, (), 2.0, anchor=3, value=4)[0]

    assert names(report()) == ["anchor", "value"]
    assert names(optax.GradientTransformation(*report())) == ["anchor", "value"]  # forwards, whatever its class says
    assert names(optax.GradientTransformation(lambda params: (), one_by_name)) == 4
    assert names(optax.GradientTransformationExtraArgs(lambda params: (), one_by_name)) == 4
    assert names(optax.stateless(lambda updates, params: updates + params)) == 3.0  # takes none
