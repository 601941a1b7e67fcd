"""Codes keep entries of many powers of 10, within the error that is stated; all that takes forms takes them, too."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lifelong_jax import (
    Batch,
    Consolidation,
    Recipe,
    Task,
    add_quadratic_penalty,
    forms,
    learn_tasks,
    methods,
    normalize_importance,
    proximal_adam,
    proximal_quadratic_penalty,
    quadratic_penalty,
)
from lifelong_jax.compression import CompressedDiagonal, compress, decompress, stored_like
from lifelong_jax.consolidation import compress_consolidation, decompress_consolidation
from lifelong_jax.geometry import importance_overlap
from lifelong_jax.streaming import mean_over_stream

LARGEST_ERROR = {"uint8": 2 ** (1 / 16) - 1, "bfloat16": 2**-8}


def over_decades(shape, seed=0):
    """Entries of many powers of 10, with a few zeros, as float32."""
    random = np.random.default_rng(seed)
    entries = 10 ** random.uniform(-13, 3, shape)
    return jnp.array(np.where(random.uniform(size=shape) < 0.1, 0, entries), jnp.float32)


@functools.cache
def kept():
    """A consolidation of several leaves of odd shapes, and parameters elsewhere."""
    shapes = {"w": (5, 7), "b": (3,), "one": (), "none": (0, 2)}
    random = np.random.default_rng(0)
    params, other = (
        {name: jnp.array(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()} for _ in range(2)
    )
    importance = {name: over_decades(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    return Consolidation(params, importance), other


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_entries_are_off_by_at_most_half_a_code(storage):
    diagonal = over_decades((1001, 3))
    form = jax.jit(compress, static_argnums=1)(diagonal, storage)
    assert form.codes.dtype == storage and form.storage == storage and form.scale.dtype == jnp.float32
    assert form.shape == diagonal.shape and forms.num_bytes(form) == diagonal.size * form.codes.dtype.itemsize + 4
    found, expected = np.asarray(decompress(form), np.float64), np.asarray(diagonal, np.float64)
    in_range = expected >= (expected.max() * 2.0**-31.75 if storage == "uint8" else 1e-30)
    assert 0.5 < in_range.mean() < 0.95
    errors = np.abs(found[in_range] / expected[in_range] - 1)
    assert 0.95 * LARGEST_ERROR[storage] < errors.max() < 1.001 * LARGEST_ERROR[storage]
    assert found.max() == expected.max() and (found[expected == 0] == 0).all()
    below = expected < expected.max() * 2.0**-31.82
    assert (found[below] == 0).all() or storage == "bfloat16"


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_what_codes_stand_for_has_these_codes(storage):
    form = compress(over_decades(500), storage)
    chex.assert_trees_all_equal(compress(decompress(form), storage), form)
    chex.assert_trees_all_equal(jax.jit(decompress)(form), decompress(form))
    assert stored_like(form, form) is form
    assert stored_like(decompress(form), form).storage == storage
    chex.assert_trees_all_equal(stored_like(form, jnp.ones(1)), decompress(form))


def test_every_code_is_an_eighth_of_an_octave():
    form = CompressedDiagonal(jnp.arange(256, dtype=jnp.uint8), jnp.float32(3))
    expected = 3 * 2 ** ((np.arange(256) - 255) / 8)
    np.testing.assert_allclose(decompress(form)[1:], expected[1:], rtol=3e-7)
    assert decompress(form)[0] == 0


def test_extreme_leaves_are_kept():
    cases = [[], [0.0, 0.0], [1e-45, 0.0], [1e-38, 1e-30], [3e38, 1e-3], 2.0]
    leaves = [np.array(case, np.float32) for case in cases]
    for storage in ("uint8", "bfloat16"):
        there_and_back = jax.jit(
            lambda leaves, storage=storage: [decompress(compress(leaf, storage)) for leaf in leaves]
        )
        for leaf, found in zip(leaves, there_and_back(leaves), strict=True):
            in_range = leaf > max(leaf.max(initial=0) * 1e-9, 1e-37)  # XLA takes subnormal numbers for 0
            assert found.shape == leaf.shape
            np.testing.assert_allclose(found, np.where(in_range, leaf, 0), rtol=0.05, atol=1e-8 * leaf.max(initial=0))


def test_no_nan_is_lost():
    assert jnp.isnan(decompress(compress(jnp.array([jnp.nan, 1.0])))).all()
    assert not jnp.isfinite(compress(jnp.array([jnp.inf, 1.0])).scale)


def test_double_precision_keeps_its_scale():
    with jax.enable_x64(True):
        form = compress(jnp.array([1 / 3, 0.0]))
        assert form.dtype == jnp.float64 and decompress(form)[0] == 1 / 3


def test_stacked_forms_have_a_scale_each():
    stack = over_decades((4, 3, 5)) * jnp.array([1.0, 1e-6, 1e6, 0.0])[:, None, None]
    form = jax.jit(jax.vmap(compress))(stack)
    assert form.scale.shape == (4,)
    chex.assert_trees_all_equal(jax.jit(decompress)(form), jax.jit(jax.vmap(decompress))(form))
    one = jax.jit(compress)(stack[1])
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[1], form), one)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_codes_are_sharded_as_the_leaf_is(kind):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    with jax.set_mesh(mesh):
        form = jax.jit(compress)(jax.device_put(over_decades((8, 3)), sharding))
        assert form.codes.sharding.is_equivalent_to(sharding, 2)
        assert jax.jit(decompress)(form).sharding.is_equivalent_to(sharding, 2)
    chex.assert_trees_all_equal(jax.device_get(form), jax.device_get(compress(over_decades((8, 3)))))


def test_functions_of_forms_take_codes():
    form, change = jax.jit(compress)(over_decades((5, 7))), over_decades((5, 7), 1)
    diagonal = jax.jit(decompress)(form)
    for function in (forms.times, forms.quadratic_terms):
        chex.assert_trees_all_equal(function(form, change), function(diagonal, change))
    chex.assert_trees_all_equal(forms.diagonal(form), diagonal)
    chex.assert_trees_all_equal(forms.trace(form), forms.trace(diagonal))
    chex.assert_trees_all_equal(forms.add(form, diagonal), 2 * diagonal)
    assert forms.sum_error(form, diagonal) == 0
    scaled = forms.scale(form, 0.3)
    chex.assert_trees_all_equal(scaled.codes, form.codes)
    np.testing.assert_allclose(decompress(scaled), 0.3 * diagonal, rtol=1e-6)
    for zeros in (forms.zeros_like(form), forms.zeros_like(jax.eval_shape(lambda: form))):
        chex.assert_trees_all_equal_shapes_and_dtypes(zeros, form)
        assert not decompress(zeros).any()
    assert forms.is_form(form) and forms.tree_map(forms.is_form, {"w": form}) == {"w": True}


def test_functions_of_importances_take_codes():
    importance = {"w": over_decades((5, 7)), "b": over_decades(7)}
    codes, decoded = jax.jit(lambda tree: (there := forms.tree_map(compress, tree), forms.tree_map(decompress, there)))(
        importance
    )
    normal, expected = (jax.jit(normalize_importance)(tree) for tree in (codes, decoded))
    assert forms.is_form(normal["w"])
    chex.assert_trees_all_close(jax.jit(forms.tree_map, static_argnums=0)(decompress, normal), expected, rtol=1e-6)
    assert importance_overlap(codes, importance) == importance_overlap(decoded, importance)


PENALTIES = {
    "coupled": lambda: optax.chain(add_quadratic_penalty(2.0), optax.trace(0.9), optax.scale(-0.1)),
    "proximal": lambda: optax.chain(optax.sgd(0.1), proximal_quadratic_penalty(0.1, 2.0)),
    "every": lambda: optax.chain(optax.sgd(0.1), proximal_quadratic_penalty(0.1, 2.0, every=2)),
    "proximal_adam": lambda: proximal_adam(0.1, 2.0),
    "masked": lambda: optax.masked(
        add_quadratic_penalty(2.0), {"w": True, "b": False, "one": True, "none": True}, mask_compatible_extra_args=True
    ),
    "partition": lambda: optax.partition(
        {"a": add_quadratic_penalty(2.0), "b": optax.chain(optax.sgd(0.1), proximal_quadratic_penalty(0.1, 3.0))},
        {"w": "a", "b": "b", "one": "a", "none": "b"},
        mask_compatible_extra_args=True,
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_take_codes_for_what_they_stand_for_to_the_bit(standard_promotion, name):
    consolidation, params = kept()
    compressed = compress_consolidation(consolidation, importance="bfloat16" if name == "proximal" else "uint8")
    optimizer = PENALTIES[name]()

    @jax.jit
    def step(consolidation):
        state = optimizer.init(params)
        state = optax.tree.set(state, count=jnp.int32(1)) if name == "every" else state
        updates, _ = optimizer.update(params, state, params, **consolidation._asdict())
        return optax.apply_updates(params, updates)

    found = step(compressed)
    chex.assert_trees_all_equal(found, step(decompress_consolidation(compressed)))
    assert not jnp.array_equal(found["w"], step(compressed._replace(anchor=params))["w"])


def test_the_penalty_of_the_loss_takes_codes():
    consolidation, params = kept()
    compressed = compress_consolidation(consolidation)
    of_loss = jax.jit(jax.value_and_grad(functools.partial(quadratic_penalty, strength=2.0)))
    chex.assert_trees_all_equal(of_loss(params, compressed), of_loss(params, decompress_consolidation(compressed)))
    part = Consolidation(compressed.anchor | {"w": None}, compressed.importance | {"w": None})
    assert quadratic_penalty(params, part, 2.0) < of_loss(params, compressed)[0]


def steps_of_many_leaves(num_steps):
    """Steps of a penalty over 16 leaves, all in one program, and its arguments."""
    params = {f"w{index}": jnp.ones((64, 256)) for index in range(16)}
    compressed = compress_consolidation(Consolidation(params, params))
    optimizer = optax.chain(add_quadratic_penalty(2.0), optax.sgd(0.1))

    def steps(params, consolidation):
        def step(params, _):
            updates, _ = optimizer.update(params, optimizer.init(params), params, **consolidation._asdict())
            return optax.apply_updates(params, updates), None

        return jax.lax.scan(step, params, length=num_steps)[0] if num_steps > 1 else step(params, None)[0]

    return jax.jit(steps, donate_argnums=0), params, compressed


@pytest.mark.parametrize(("num_steps", "parameters_held"), [(1, 0), (3, 1)])
def test_no_step_holds_all_that_codes_stand_for(optimized, num_steps, parameters_held):
    steps, params, compressed = steps_of_many_leaves(num_steps)
    memory = steps.lower(params, compressed).compile().memory_analysis()
    assert memory.temp_size_in_bytes < (parameters_held + 0.1) * forms.num_bytes(params)


@pytest.mark.slow
def test_a_method_may_compress_its_importance():
    random = np.random.default_rng(0)
    batches = [Batch(jnp.array(random.normal(size=(8, 4)), jnp.float32), jnp.arange(8) % 3) for _ in range(2)]
    ewc = methods.ewc()
    coded = ewc._replace(importance_fn=functools.partial(compressed_importance, ewc.importance_fn))
    recipe = Recipe(lambda params, x: x @ params["w"], penalised_sgd, num_epochs=2, batch_size=8)
    tasks, start, key = [Task(batch, batch) for batch in batches], {"w": jnp.zeros((4, 3))}, jax.random.key(0)
    exact, found = (
        learn_tasks(method, recipe, start, tasks, key, strength=1.0).consolidation for method in (ewc, coded)
    )
    assert forms.is_form(found.importance["w"]) and found.anchor["w"].dtype == jnp.float32
    chex.assert_trees_all_close(decompress_consolidation(found).importance, exact.importance, rtol=0.1)


def compressed_importance(importance_fn, *arguments):
    return forms.tree_map(compress, importance_fn(*arguments))


def penalised_sgd(strength):
    return optax.chain(add_quadratic_penalty(strength), optax.sgd(0.1))


def test_a_stream_of_compressed_importances_has_the_mean_of_what_they_stand_for():
    def mean_fn(state, batch, key):
        return {"w": compress(jnp.mean(batch.inputs, axis=0))}

    inputs = np.array([[1.0, 4.0], [3.0, 0.0]], np.float32)
    source = [Batch(x, np.int32(0), np.float32(1)) for x in inputs]
    mean = mean_over_stream(mean_fn, (), source, batch_size=1)
    chex.assert_trees_all_close(mean, {"w": jnp.array([2.0, 2.0])}, rtol=0.05)
