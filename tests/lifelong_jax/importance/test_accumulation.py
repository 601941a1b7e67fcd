"""Examples may come batch by batch: the importance is that of all at once, and no second tree is held."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lifelong_jax import (
    empirical_fisher_diagonal,
    empirical_kronecker_fisher,
    fisher_diagonal,
    forms,
    kronecker_fisher,
    layer_output,
    local_mas_importance,
    mas_importance,
)
from lifelong_jax.importance import init_accumulation, make_forms
from tests.lifelong_jax.importance.problems import NUM_CLASSES, NUM_FEATURES, make_data, make_linear

WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 3.0])


def linear(params, x):
    return x @ params


def marked(params, x):
    return params @ layer_output(linear(params, x))


def squared_outputs(params, x):
    """A loss for each of several labels."""
    return linear(params, x) ** 2


def scaled(params, x):
    """A function that is compiled fast."""
    return params * x


scaled_mas = functools.partial(mas_importance, scaled)

ESTIMATORS = {
    "exact": functools.partial(fisher_diagonal, linear, method="reference", microbatch_size=2),
    "sampled": functools.partial(fisher_diagonal, linear, num_samples=1, key=jax.random.key(3)),
    "mas": functools.partial(mas_importance, linear, method="reference"),
    "local mas": functools.partial(local_mas_importance, marked),
    "empirical": functools.partial(empirical_fisher_diagonal, squared_outputs, num_samples=2, key=jax.random.key(5)),
    "kronecker": functools.partial(kronecker_fisher, linear, num_samples=1, key=jax.random.key(4)),
    "empirical kronecker": functools.partial(
        empirical_kronecker_fisher, squared_outputs, num_samples=1, key=jax.random.key(6)
    ),
}
SLOWER = ["exact", "empirical", "mas", "local mas"]
SLOW = {"local mas", "empirical kronecker"}


def add_all(estimator, params, examples, weights, cuts=((0, 3), (3, 4), (4, 7))):
    """The accumulation of batches of several sizes."""
    total = init_accumulation(params)
    for start, end in cuts:
        total = estimator(params, examples[start:end], weights=weights[start:end], into=total)
    return total


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ESTIMATORS])
def test_batches_give_the_importance_of_all_examples(name):
    # In a loop over two batches, the last of which is padded.
    with jax.enable_x64(True):
        params, (inputs, _) = make_linear(jnp.float64)["w"], make_data(jnp.float64)
        estimator = ESTIMATORS[name]

        @jax.jit
        def run(params, inputs, weights):
            expected = estimator(params, inputs, weights=weights)
            padded = jnp.concatenate([inputs, jnp.full((1, NUM_FEATURES), jnp.nan)]), jnp.append(weights, 0)
            batches = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), padded)
            add = lambda into, batch: (estimator(params, batch[0], weights=batch[1], into=into), None)  # noqa: E731
            total, _ = jax.lax.scan(add, init_accumulation(params, like=expected), batches)
            return expected, total._replace(mean=make_forms(total.mean))

        expected, total = run(params, inputs, jnp.asarray(WEIGHTS))
        actual, expected = (
            forms.tree_map(lambda form: forms.factors_of(form) if forms.is_form(form) else form, importance)
            for importance in (total.mean, expected)
        )
        chex.assert_trees_all_close(actual, expected, rtol=1e-12, atol=1e-14)
        assert (total.weight, total.num_examples) == (WEIGHTS.sum(), 8)


def test_labels_do_not_depend_on_how_examples_are_cut():
    params, inputs = jnp.ones(3), make_data()[0]
    sampled = functools.partial(fisher_diagonal, scaled, num_samples=1, key=jax.random.key(3), method="reference")
    total = sampled(params, inputs[:3], into=init_accumulation(params))
    leaves, structure = jax.tree.flatten(jax.device_get(total))  # it can be saved, and restored
    total = sampled(params, inputs[3:], into=jax.tree.unflatten(structure, leaves))
    np.testing.assert_allclose(total.mean, sampled(params, inputs), rtol=1e-5)


def test_runs_side_by_side():
    params, inputs = jnp.array([1.0, 2.0]), jnp.array([[1.0, 2.0, 4.0], [-1.0, 1.0, 3.0]])
    run = jax.jit(jax.vmap(lambda p, x: add_all(scaled_mas, p, x, jnp.ones(3), ((0, 1), (1, 3))).mean))
    np.testing.assert_allclose(run(params, inputs), 2 * params * jnp.mean(inputs**2, axis=1), rtol=1e-6)


def test_a_sum_of_bfloat16_numbers_is_in_float32():
    inputs = jnp.asarray(np.random.default_rng(0).uniform(size=1000), jnp.bfloat16)
    add = lambda total, x: (empirical_fisher_diagonal(scaled, params, x[None], into=total), None)  # noqa: E731
    params = jnp.ones((), jnp.bfloat16)
    total, _ = jax.lax.scan(add, init_accumulation(params), inputs)
    assert total.mean.dtype == jnp.float32
    np.testing.assert_allclose(total.mean, np.mean(np.asarray(inputs, np.float32) ** 2), rtol=5e-3)


@pytest.mark.parametrize("method", ["structured", "reference"])
def test_a_batch_of_padding_adds_nothing_whatever_it_is(method):
    params, inputs = jnp.array([1.0]), jnp.array([1.0, 2.0])
    mas = functools.partial(mas_importance, scaled, method=method)
    empty, none = jnp.full(2, jnp.nan), jnp.zeros(2)
    total = mas(params, empty, weights=none, into=init_accumulation(params))
    assert total.mean == 0
    total = mas(params, inputs, into=total)
    total = mas(params, empty, weights=none, into=total)
    assert (total.mean, total.weight, total.num_examples) == (5, 2, 6)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_weights_of_any_size(unit):
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=7), jnp.float32)
    total = add_all(scaled_mas, jnp.array(1.0), inputs, jnp.asarray(unit * WEIGHTS, jnp.float32))
    np.testing.assert_allclose(total.mean, np.average(2 * inputs**2, weights=WEIGHTS), rtol=1e-5)
    np.testing.assert_allclose(total.weight, unit * WEIGHTS.sum(), rtol=1e-6)


def test_the_weights_of_a_batch_may_be_far_from_those_before():
    total = init_accumulation(jnp.array(1.0))
    for unit, x in ((1e-25, 1.0), (1e25, 2.0), (1e-25, 3.0)):
        total = scaled_mas(jnp.array(1.0), jnp.array([x]), weights=jnp.array([unit]), into=total)
    np.testing.assert_allclose(total.mean, 8, rtol=1e-6)


def test_counts_are_weights():
    inputs, counts = jnp.arange(7.0), np.array([0, 1, 2, 3, 0, 0, 1])
    total = add_all(scaled_mas, jnp.array(1.0), inputs, counts)
    np.testing.assert_allclose(total.mean, np.average(2 * inputs**2, weights=counts), rtol=1e-6)


def test_the_accumulation_before_is_donated():
    params = jnp.ones((3, 2))
    total = init_accumulation(params)
    buffers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(total)}
    after = scaled_mas(params, jnp.ones(4), into=total)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(total))
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)} == buffers


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["sampled", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOWER)])
def test_no_second_tree_is_held(name):
    width, num_layers = 64, 10

    def deep(params, x, end=lambda hidden: hidden):
        for w in params[:-1]:
            x = end(jnp.tanh(x @ w))
        return x @ params[-1]

    estimators = {
        "exact": functools.partial(fisher_diagonal, deep, likelihood="gaussian"),
        "sampled": functools.partial(fisher_diagonal, deep, num_samples=1, key=jax.random.key(0)),
        "empirical": functools.partial(empirical_fisher_diagonal, lambda params, x: jnp.sum(deep(params, x) ** 2)),
        "mas": functools.partial(mas_importance, deep),
        "local mas": functools.partial(local_mas_importance, functools.partial(deep, end=layer_output)),
    }
    params = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * num_layers
    inputs = jax.ShapeDtypeStruct((6, width), jnp.float32)
    total = jax.eval_shape(init_accumulation, params)

    @functools.partial(jax.jit, donate_argnames="into")
    def run(params, inputs, into):
        return estimators[name](params, inputs, microbatch_size=2, into=into)

    memory = run.lower(params, inputs, total).compile().memory_analysis()
    one_tree = num_layers * width * width * 4
    # One more sum would take a whole tree. XLA's schedule for a CPU holds that of a microbatch in two cases.
    bound = 1.2 if name in ("exact", "local mas") else 0.5
    not_in_place = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert memory.alias_size_in_bytes >= one_tree
    assert memory.temp_size_in_bytes + not_in_place < bound * one_tree


@pytest.mark.parametrize("inside_jit", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sharded_batches(inside_jit):
    params, (inputs, _) = jnp.ones((NUM_FEATURES, NUM_CLASSES)), make_data(num_examples=8)
    sampled = functools.partial(fisher_diagonal, linear, num_samples=1, key=jax.random.key(3))
    weights = jnp.asarray(np.resize(WEIGHTS, 8), jnp.float32)
    expected = sampled(params, inputs, weights=weights)
    mesh = jax.make_mesh((4,), ("data",))
    place = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    total, params = place(init_accumulation(params)), place(params)
    run = lambda *data, into: sampled(*data[:2], weights=data[2], into=into)  # noqa: E731
    run = jax.jit(run, donate_argnames="into") if inside_jit else run
    for batch in (slice(0, 4), slice(4, 8)):
        total = run(params, *place((inputs[batch], weights[batch]), "data"), into=total)
    chex.assert_trees_all_close(jax.device_get(total.mean), jax.device_get(expected), rtol=1e-5)


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_zeros_are_sharded_as_the_parameters(axis_type):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    total = init_accumulation({"w2": jax.device_put(jnp.ones((2, 4)), sharding)})
    assert total.mean["w2"].sharding == sharding


def test_errors():
    params, inputs = {"w": jnp.ones(2), "b": jnp.ones(1)}, jnp.ones(3)
    mas = functools.partial(mas_importance, lambda params, x: params["w"] * x + params["b"])
    total = init_accumulation(params)
    with pytest.raises(TypeError, match="into must be an Accumulation"):
        mas(params, inputs, into=params)
    with pytest.raises(ValueError, match=r"into.mean\['w'\] has shape \(1,\).*Begin with init_accumulation"):
        mas(params, inputs, into=init_accumulation(params | {"w": jnp.zeros(1)}))
    with pytest.raises(ValueError, match=r"into.mean\['b'\] has dtype bfloat16, but .* float32. Begin with"):
        mas(params, inputs, into=total._replace(mean=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), total.mean)))
    with pytest.raises(ValueError, match="like=importance for Kronecker factors"):
        kronecker_fisher(lambda params, x: x @ params, jnp.ones((1, 2)), jnp.ones((3, 1)), into=total)
    with pytest.raises(ValueError, match="like and params must be trees of one structure"):
        init_accumulation(params, like={"w": params["w"]})
    with pytest.raises(TypeError, match="floating-point"):
        init_accumulation({"w": jnp.arange(3)})
    with pytest.raises(ValueError, match="not all 0"):
        mas(params, inputs, weights=jnp.zeros(3))
