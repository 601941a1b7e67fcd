"""The penalty on weights that are a function of the parameters: against autodiff of the loss term, and its memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lifelong_jax import (
    Consolidation,
    add_quadratic_penalty,
    forms,
    init_consolidation,
    init_training,
    learn_task,
    quadratic_penalty,
)
from lifelong_jax._layouts import Layout
from lifelong_jax.compression import decompress
from lifelong_jax.consolidation import compress_consolidation
from lifelong_jax.penalty import add_reparametrized_penalty, hold_consolidation, set_consolidation

STRENGTH = 3.0
SHAPES = {"w": (3, 4), "v": (4, 2)}


def draw(seed, dtype=np.float32, shapes=SHAPES):
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def make_adapters(dtype=np.float32, rank=2):
    shapes = {name: {"a": (rows, rank), "b": (rank, columns)} for name, (rows, columns) in SHAPES.items()}
    adapters = {name: draw(1, dtype, of_layer) for name, of_layer in shapes.items()}
    return adapters | {"scale": np.array(0.7, dtype)}  # which all layers share


def change_fn(adapters):
    return {name: adapters["scale"] * (adapters[name]["a"] @ adapters[name]["b"]) for name in SHAPES}


def lora_fn(base, adapters):
    return jax.tree.map(jnp.add, base, change_fn(adapters))


def dora_fn(base, adapters):
    directions = lora_fn(base, adapters)
    return {name: w / jnp.linalg.norm(w, axis=0) * adapters[name]["b"][0] for name, w in directions.items()}


def stacked_fn(base, adapters):
    """Weights that one scan makes, and one that it does not."""
    stacked = jnp.stack([base["w"], base["w"]])
    a, b = (jnp.stack([adapters["w"][name]] * 2) for name in "ab")
    _, stacked = jax.lax.scan(lambda carry, layer: (carry, layer[0] + layer[1] @ layer[2]), (), (stacked, a, b))
    return {"w": stacked[0] + 2 * stacked[1], "v": base["v"] * adapters["v"]["a"][:, :1]}


def jitted_fn(base, adapters):
    return jax.jit(lora_fn)(base, adapters)


@functools.partial(jax.jit, static_argnums=0)  # much faster to compile as a whole
def pull(weights_fn, params, consolidation, strength=STRENGTH):
    """The gradient that the transform adds to updates of 1, without these."""
    transform = add_reparametrized_penalty(weights_fn, strength)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = transform.update(ones, transform.init(params), params, **consolidation._asdict())
    return jax.tree.map(lambda leaf: leaf - 1, updates)


@functools.partial(jax.jit, static_argnums=0)
def gradient_of_the_term(weights_fn, params, consolidation, strength=STRENGTH):
    return jax.grad(lambda params: quadratic_penalty(weights_fn(params), consolidation, strength))(params)


# ------------------------------------------------------------------------------------ the gradient


@pytest.mark.parametrize("make", [lora_fn, dora_fn, stacked_fn, jitted_fn])
def test_it_is_the_gradient_of_the_term_of_the_loss(make):
    with jax.enable_x64(True):
        base, adapters = draw(0, np.float64), make_adapters(np.float64)
        consolidation = Consolidation(base, jax.tree.map(np.square, draw(2, np.float64)))
        weights_fn = functools.partial(make, base)
        expected = gradient_of_the_term(weights_fn, adapters, consolidation)
        assert all(jnp.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(expected["w"]))
        chex.assert_trees_all_close(pull(weights_fn, adapters, consolidation), expected, rtol=1e-12, atol=1e-12)


def test_the_change_needs_no_anchor():
    with jax.enable_x64(True):
        base, adapters = draw(0, np.float64), make_adapters(np.float64)
        importance = jax.tree.map(np.square, draw(2, np.float64))
        expected = gradient_of_the_term(functools.partial(lora_fn, base), adapters, Consolidation(base, importance))
        chex.assert_trees_all_close(
            pull(change_fn, adapters, Consolidation(None, importance)), expected, rtol=1e-12, atol=1e-12
        )


def test_the_closed_form_of_lora():
    adapters, importance = make_adapters(), jax.tree.map(np.square, draw(2))
    found = pull(change_fn, adapters, Consolidation(None, importance))
    a, b, s = adapters["w"]["a"], adapters["w"]["b"], adapters["scale"]
    weighted = STRENGTH * importance["w"] * (s * a @ b)
    np.testing.assert_allclose(found["w"]["a"], s * weighted @ b.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["w"]["b"], s * a.T @ weighted, rtol=1e-4, atol=1e-4)


def test_without_a_reparametrisation_it_is_the_quadratic_penalty():
    params, consolidation = draw(0), Consolidation(draw(1), jax.tree.map(np.square, draw(2)))
    ones = jax.tree.map(np.ones_like, params)
    update = jax.jit(add_quadratic_penalty(STRENGTH).update)
    expected, _ = update(ones, optax.EmptyState(), params, **consolidation._asdict())
    found = pull(lambda params: params, params, consolidation)
    chex.assert_trees_all_close(found, jax.tree.map(lambda leaf: leaf - 1, expected), rtol=1e-5, atol=1e-5)


def test_kronecker_factors():
    with jax.enable_x64(True):
        base, adapters = draw(0, np.float64), make_adapters(np.float64)
        factors = draw(3, np.float64, {"rows": (1, 3, 3), "row": (1, 3), "columns": (1, 4, 4), "column": (1, 4)})
        form = forms.KroneckerFactors(*map(np.abs, factors.values()), Layout((3, 4), (3, 4), (0, 1), (1, 3, 4)))
        importance = {"w": form, "v": np.ones(SHAPES["v"], np.float32)}
        expected = gradient_of_the_term(functools.partial(lora_fn, base), adapters, Consolidation(base, importance))
        found = pull(change_fn, adapters, Consolidation(None, importance))
        chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("anchored", [False, True])
def test_none_is_not_protected(anchored):
    base, adapters = draw(0), make_adapters()
    weights_fn = functools.partial(lora_fn, base) if anchored else change_fn
    importance = {"w": None, "v": np.ones(SHAPES["v"], np.float32)}
    found = pull(weights_fn, adapters, Consolidation({"w": None, "v": base["v"]} if anchored else None, importance))
    assert not any(jnp.any(leaf) for leaf in found["w"].values())
    ones = jax.tree.map(np.ones_like, base)
    whole = pull(weights_fn, adapters, Consolidation(base if anchored else None, ones))
    chex.assert_trees_all_close(found["v"], whole["v"], rtol=1e-5)


def test_weights_that_no_parameter_changes_add_nothing():
    base, ones = draw(0), jax.tree.map(np.ones_like, draw(0))
    found = pull(lambda params: base | {"w": base["w"] + params}, jnp.ones(()), Consolidation(base, ones))
    np.testing.assert_allclose(found, STRENGTH * 12, rtol=1e-6)
    assert pull(lambda params: base, jnp.ones(()), Consolidation(base, ones)) == 0


def test_at_strength_0_a_huge_change_adds_nothing():
    adapters, importance = make_adapters(), jax.tree.map(np.ones_like, draw(0))
    adapters["w"]["a"] = jnp.full((3, 2), 1e30)
    found = pull(change_fn, adapters, Consolidation(None, importance), 0.0)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(found))


def test_at_b_0_adapters_have_no_importance_but_the_penalty_on_the_weights_holds():
    base, adapters = draw(0), make_adapters()
    adapters |= {"w": adapters["w"] | {"b": jnp.zeros((2, 4))}}

    def loss_fn(adapters):
        weights = lora_fn(base, adapters)
        return jnp.sum(jnp.tanh(weights["w"]) @ weights["v"])

    assert not jnp.any(jax.jit(jax.grad(loss_fn))(adapters)["w"]["a"])
    moved = adapters | {"w": adapters["w"] | {"b": jnp.ones((2, 4))}}
    found = pull(change_fn, moved, Consolidation(None, jax.tree.map(np.ones_like, base)))
    assert jnp.abs(found["w"]["a"]).max() > 0.1


# ------------------------------------------------------------------------------------ in pipelines


def test_in_a_chain_with_a_schedule_and_under_jit():
    adapters, consolidation = make_adapters(), Consolidation(None, jax.tree.map(np.ones_like, draw(0)))
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    optimizer = optax.chain(add_reparametrized_penalty(change_fn, schedule), optax.sgd(0.01))

    @jax.jit
    def step(adapters, state, consolidation):
        updates, state = optimizer.update(
            jax.tree.map(jnp.zeros_like, adapters), state, adapters, **consolidation._asdict()
        )
        return optax.apply_updates(adapters, updates), state

    learned, state = jax.device_put(adapters), optimizer.init(adapters)
    expected = adapters
    for count in range(3):
        learned, state = step(learned, state, consolidation)
        grads = gradient_of_the_term(change_fn, expected, Consolidation(zeros(), consolidation.importance), count / 4)
        expected = jax.tree.map(lambda leaf, grad: leaf - 0.01 * grad, expected, grads)
    chex.assert_trees_all_close(learned, expected, rtol=1e-5, atol=1e-6)
    assert step._cache_size() == 1


def zeros():
    return jax.tree.map(np.zeros_like, draw(0))


@pytest.mark.parametrize("compatible", [False, True])
def test_masked_to_the_adapters(compatible):
    params = {"base": draw(0), "adapters": make_adapters()}
    consolidation = Consolidation(None, jax.tree.map(np.ones_like, draw(0)))
    transform = add_reparametrized_penalty(lambda params: change_fn(params["adapters"]), STRENGTH)
    mask = {"base": False, "adapters": True}
    masked = optax.masked(transform, mask, mask_compatible_extra_args=compatible)
    ones = jax.tree.map(np.ones_like, params)
    updates, _ = jax.jit(masked.update)(ones, masked.init(params), params, **consolidation._asdict())
    chex.assert_trees_all_equal(updates["base"], ones["base"])
    expected = pull(change_fn, params["adapters"], consolidation)
    chex.assert_trees_all_close(updates["adapters"], jax.tree.map(lambda leaf: leaf + 1, expected), rtol=1e-6)


@pytest.mark.parametrize("anchored", [False, True])
def test_held_in_the_optimisers_state(anchored):
    base, adapters = draw(0), make_adapters()
    consolidation = Consolidation(draw(3) if anchored else None, jax.tree.map(np.ones_like, base))
    weights_fn = functools.partial(lora_fn, base) if anchored else change_fn
    optimizer = add_reparametrized_penalty(weights_fn, STRENGTH)
    held = optax.chain(hold_consolidation(optimizer, like=jax.eval_shape(lambda: consolidation)))
    ones = jax.tree.map(np.ones_like, adapters)
    state = held.init(adapters)
    update = jax.jit(held.update)
    before, state = update(ones, state, adapters)
    chex.assert_trees_all_equal(before, ones)  # importance 0: the first task is no special case
    updates, _ = update(ones, set_consolidation(state, consolidation), adapters)
    expected = pull(weights_fn, adapters, consolidation)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda leaf: leaf + 1, expected), rtol=1e-5, atol=1e-5)
    assert update._cache_size() == 1


def test_a_mask_of_the_parameters_masks_no_weight_of_the_same_name():
    # The frozen weight and the adapters are in one tree, as in a module with adapters.
    params = {"w": {"kernel": jnp.ones((3, 4)), "a": jnp.ones((3, 1)), "b": jnp.ones((1, 4))}}
    mask = {"w": {"kernel": False, "a": True, "b": True}}
    penalty = add_reparametrized_penalty(lambda params: {"w": {"kernel": params["w"]["a"] @ params["w"]["b"]}}, 1.0)
    importance = {"w": {"kernel": jnp.asarray(draw(0)["w"]) ** 2}}
    consolidation = compress_consolidation(Consolidation(jax.tree.map(jnp.zeros_like, importance), importance))
    optimizer = optax.masked(hold_consolidation(penalty, like=consolidation), mask)
    state = set_consolidation(optimizer.init(params), consolidation)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    expected = decompress(consolidation.importance["w"]["kernel"])
    np.testing.assert_allclose(updates["w"]["a"][:, 0], expected.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(updates["w"]["b"][0], expected.sum(axis=0), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_in_learn_task():
    adapters, consolidation = make_adapters(), Consolidation(None, jax.tree.map(np.ones_like, draw(0)))
    optimizer = optax.chain(add_reparametrized_penalty(change_fn, 1e3), optax.adam(1e-2))
    state = init_training(optimizer, adapters, jax.random.key(0))

    def loss_fn(adapters, x):
        return 1e-6 * x * jnp.sum(adapters["w"]["a"])

    state, _ = learn_task(loss_fn, optimizer, state, consolidation, jnp.ones(4), num_epochs=20, batch_size=2)
    size = lambda adapters: sum(jnp.sum(leaf**2) for leaf in change_fn(adapters).values())  # noqa: E731
    assert size(state.params) < 0.8 * size(adapters)


def test_under_vmap():
    adapters, importance = make_adapters(), jax.tree.map(np.ones_like, draw(0))
    strengths = jnp.array([0.0, 1.0, 2.0])
    found = jax.vmap(lambda strength: pull(change_fn, adapters, Consolidation(None, importance), strength))(strengths)
    expected = pull(change_fn, adapters, Consolidation(None, importance), 1.0)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[2], found), jax.tree.map(lambda x: 2 * x, expected), rtol=1e-4, atol=1e-5
    )


def test_bfloat16_in_and_out_by_way_of_float32():
    adapters = make_adapters(jnp.bfloat16)
    importance = jax.tree.map(np.square, draw(2))
    transform = add_reparametrized_penalty(change_fn, STRENGTH)
    zero = jax.tree.map(np.zeros_like, adapters)
    updates, _ = jax.jit(transform.update)(zero, transform.init(adapters), adapters, importance=importance)
    chex.assert_trees_all_equal_dtypes(updates, adapters)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), adapters)
    expected = pull(change_fn, wide, Consolidation(None, importance))
    for name in SHAPES:
        for side in "ab":
            found = np.float32(updates[name][side])
            assert np.abs(found - expected[name][side]).max() < 0.02 * np.abs(expected[name][side]).max()


# ------------------------------------------------------------------------------------ memory


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the account of XLA on a CPU")
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("form", ["change", "weights", "jitted weights"])
def test_one_layers_change_is_in_memory_at_a_time(form):
    num_layers, width = 8, 128
    layer = {"a": jnp.ones((width, 2)), "b": jnp.ones((2, width))}
    adapters, base = [layer] * num_layers, [jnp.ones((width, width))] * num_layers

    def gradients(adapters, base, importance):
        def weights_fn(adapters):
            changes = [layer["a"] @ layer["b"] for layer in adapters]
            return changes if form == "change" else jax.tree.map(jnp.add, base, changes)

        weights_fn = jax.jit(weights_fn) if form == "jitted weights" else weights_fn
        consolidation = Consolidation(None if form == "change" else base, importance)
        return pull(weights_fn, adapters, consolidation)

    program = jax.jit(gradients).lower(adapters, base, base).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1.25 * base[0].nbytes


# ------------------------------------------------------------------------------------ errors


def test_errors_say_what_is_missing_or_differs():
    adapters, importance = make_adapters(), jax.tree.map(np.ones_like, draw(0))
    transform = add_reparametrized_penalty(change_fn, STRENGTH)
    with pytest.raises(ValueError, match="strength must be finite and not negative"):
        add_reparametrized_penalty(change_fn, -1.0)
    with pytest.raises(ValueError, match="needs params and importance"):
        transform.update(adapters, optax.EmptyState(), adapters)
    with pytest.raises(ValueError, match="needs params and importance"):
        transform.update(adapters, optax.EmptyState(), importance=importance)
    with pytest.raises(ValueError, match=r"importance\['w'\] has shape \(2,\), but weights_fn\(params\)\['w'\]"):
        transform.update(adapters, optax.EmptyState(), adapters, importance=importance | {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"anchor\['v'\] has shape \(\)"):
        transform.update(
            adapters, optax.EmptyState(), adapters, anchor=importance | {"v": jnp.ones(())}, importance=importance
        )
    with pytest.raises(ValueError, match="importance and weights_fn"):
        transform.update(adapters, optax.EmptyState(), adapters, **init_consolidation(adapters)._asdict())
    with pytest.raises(TypeError, match="has dtype int32"):
        pull(lambda params: jnp.ones(2, jnp.int32), adapters, Consolidation(None, jnp.ones(2)))
    with pytest.raises(ValueError, match="updates and params must be trees of one structure"):
        transform.update(adapters["w"], optax.EmptyState(), adapters, importance=importance)
