"""The wrappers that follow the parameters' path, in any pipeline and misused: what `_steps.py` is for."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

from lifelong_jax import (
    SweepRun,
    add_quadratic_penalty,
    consolidate,
    continue_walk,
    init_consolidation,
    init_training,
    learn_sweep,
    learn_task,
    learn_tasks,
    methods,
    path_integral,
    riemannian_walk,
    rwalk_importance,
    si_importance,
)
from tests.problems import RECIPE, coupled_sgd, make_params, make_tasks

pytestmark = pytest.mark.usefixtures("standard_promotion")


def make_small(dtype=jnp.float32):
    return {"w": jnp.array([0.5, -1.0, 2.0], dtype), "b": jnp.array([0.25], dtype)}


def small_grads(params, step=0):
    return jax.tree.map(lambda leaf: leaf - 0.3 * step + 1, params)


def walk(optimizer, params, num_steps=4, grads_fn=small_grads, change=lambda updates: updates):
    """Also returns −Σ gradient · step, from the parameters themselves."""
    state, path = optimizer.init(params), jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    for step in range(num_steps):
        grads = grads_fn(params, step)
        with jax.disable_jit():  # compiling all these pipelines would take minutes
            updates, state = optimizer.update(grads, state, params, **init_consolidation(params)._asdict())
        moved = optax.apply_updates(params, change(updates))
        path = jax.tree.map(
            lambda total, g, old, new: total - np.nan_to_num(g) * (np.float64(new) - np.float64(old)),
            path,
            grads,
            params,
            moved,
        )
        params = moved
    return params, state, path


PENALISED_ADAM = optax.chain(add_quadratic_penalty(2.0), optax.adam(0.1))
INSIDE = {
    "adam": PENALISED_ADAM,
    "masked penalty": optax.chain(
        optax.masked(add_quadratic_penalty(2.0), {"w": True, "b": False}, mask_compatible_extra_args=True),
        optax.sgd(0.1),
    ),
    "partition": optax.partition(
        {"train": PENALISED_ADAM, "frozen": optax.set_to_zero()},
        {"w": "train", "b": "frozen"},
        mask_compatible_extra_args=True,
    ),
    "schedule_free": optax.contrib.schedule_free(PENALISED_ADAM, 0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), PENALISED_ADAM),
    "warm-up": optax.adam(optax.linear_schedule(0.0, 0.1, 3)),
    "apply_if_finite": optax.apply_if_finite(PENALISED_ADAM, 3),
    "another walk": riemannian_walk(PENALISED_ADAM),
}


@pytest.mark.parametrize("inside", INSIDE)
def test_the_path_is_that_of_the_parameters_whatever_is_inside(inside):
    optimizer = INSIDE[inside]
    if inside == "another walk":
        loss = {"loss_fn": lambda params, x: jnp.sum(params["w"] * x), "examples": jnp.ones(2)}
        given = optimizer
        optimizer = optax.GradientTransformationExtraArgs(given.init, functools.partial(given.update, **loss))
    params, state, path = walk(path_integral(optimizer), make_small())
    chex.assert_trees_all_close(state.path, path, rtol=1e-5, atol=1e-7)
    importance = si_importance(state, params)
    assert (importance["w"] > 0).any()
    if inside == "partition":
        chex.assert_trees_all_equal(importance["b"], jnp.zeros(1))
    if inside == "another walk":
        rwalk_importance(state, params)  # what only looks on may go around it
    chex.assert_trees_all_equal(params, walk(optimizer, make_small())[0])  # the updates are the optimiser's own


def test_gradients_that_are_accumulated_outside_are_those_of_one_large_batch():
    optimizer = path_integral(optax.chain(add_quadratic_penalty(2.0), optax.sgd(0.1)))
    once, expected, _ = walk(optimizer, make_small(), 2, lambda params, step: small_grads(params, 1))
    split = optax.MultiSteps(optimizer, 3)
    params, state, _ = walk(split, make_small(), 6, lambda params, step: small_grads(params, step % 3))
    chex.assert_trees_all_close(params, once, rtol=1e-5)
    chex.assert_trees_all_close(si_importance(state, params), si_importance(expected, once), rtol=1e-5)


@pytest.mark.parametrize("outside", ["apply_if_finite", "inject_hyperparams"])
def test_what_may_go_around(outside):
    optimizer = {
        "apply_if_finite": optax.apply_if_finite(path_integral(optax.sgd(0.1)), 3),
        "inject_hyperparams": optax.inject_hyperparams(lambda rate: path_integral(optax.sgd(rate)))(rate=0.1),
    }[outside]
    params, state, _ = walk(optimizer, make_small())
    expected, plain, _ = walk(path_integral(optax.sgd(0.1)), make_small())
    chex.assert_trees_all_close(si_importance(state, params), si_importance(plain, expected), rtol=1e-6)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_gradient_that_is_not_finite_and_is_dropped_does_not_count(where):
    def grads_fn(params, step):
        grads = small_grads(params, step)
        return {"w": grads["w"].at[1].set(jnp.nan), "b": grads["b"] * jnp.inf} if step == 1 else grads

    optimizer = {
        "inside": path_integral(optax.apply_if_finite(optax.sgd(0.1), 3)),
        "outside": optax.apply_if_finite(path_integral(optax.sgd(0.1)), 3),
    }[where]
    params, state, _ = walk(optimizer, make_small(), 3, grads_fn)
    finite = lambda params, step: small_grads(params, 2 * step)  # noqa: E731
    expected, plain, _ = walk(path_integral(optax.sgd(0.1)), make_small(), 2, finite)
    chex.assert_trees_all_close(si_importance(state, params), si_importance(plain, expected), rtol=1e-6)


MISPLACED = {
    "the penalty before": optax.chain(add_quadratic_penalty(2.0), path_integral(optax.adam(0.1))),
    "a scale after": optax.chain(path_integral(PENALISED_ADAM), optax.scale(0.5)),
    "alone in a chain": optax.chain(path_integral(PENALISED_ADAM)),
    "in schedule_free": optax.contrib.schedule_free(path_integral(PENALISED_ADAM), 0.1),
    "masked": optax.masked(path_integral(optax.sgd(0.1)), {"w": True, "b": False}),
    "none": PENALISED_ADAM,
}


@pytest.mark.parametrize("place", MISPLACED)
def test_another_place_is_an_error(place):
    params, state, _ = walk(MISPLACED[place], make_small(), 1)
    with pytest.raises(TypeError, match=r"must be that of path_integral, but is a .*: wrap the whole pipeline"):
        si_importance(state, params)
    with pytest.raises(TypeError, match="must be that of riemannian_walk"):
        rwalk_importance(state, params)
    with pytest.raises(TypeError, match="must be that of riemannian_walk"):
        continue_walk(state, state)


@pytest.mark.parametrize("interval", [None, 1, 3])  # None for the path integral
@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("rate", [0.1, optax.linear_schedule(0.0, 0.1, 3)])
def test_updates_that_are_applied_otherwise_are_found_out(interval, num_steps, rate):
    importance_fn = si_importance if interval is None else rwalk_importance
    optimizer = optax.sgd(rate)
    given = path_integral(optimizer) if interval is None else riemannian_walk(optimizer, interval=interval)
    batch = {"loss_fn": lambda params, x: jnp.sum(params["w"] * x), "examples": jnp.ones(2)}
    optimizer = optax.GradientTransformationExtraArgs(
        given.init, lambda grads, state, params, **extra_args: given.update(grads, state, params, **batch)
    )
    for scale in (0.5, 2.0, 0.0):
        params, state, _ = walk(optimizer, make_small(), num_steps, change=lambda u, k=scale: optax.tree.scale(k, u))
        if num_steps > 1 or rate == 0.1:  # else nothing has moved, and nothing should have
            with pytest.raises(ValueError, match=r"did not move by the updates that .* returned"):
                importance_fn(state, params)
    params, state, _ = walk(optimizer, make_small(), num_steps)
    importance_fn(state, params)


@pytest.mark.parametrize("wrap", [path_integral, riemannian_walk])
def test_multi_steps_goes_outside(wrap):
    inner = optax.MultiSteps(optax.sgd(0.1), 2)
    for optimizer in (inner, optax.chain(optax.clip(1.0), inner.gradient_transformation())):
        with pytest.raises(ValueError, match=f"{wrap.__name__} goes inside of MultiSteps.*_replace.wrap_optimizer="):
            wrap(optimizer).init(make_small())


MULTI_STEPS = {
    "object": lambda optimizer: optax.MultiSteps(optimizer, 2),
    "transformation": lambda optimizer: optax.MultiSteps(optimizer, 2).gradient_transformation(),
}


@pytest.mark.parametrize("accumulate", MULTI_STEPS)
@pytest.mark.parametrize("wrap", [path_integral, riemannian_walk])
def test_in_learn_task_two_half_batches_are_a_whole_one(wrap, accumulate):
    loss_fn = lambda params, x: jnp.sum((params["w"] - x) ** 2) + jnp.sum(params["b"] * x)  # noqa: E731
    consolidation = consolidate(init_consolidation(make_small()), make_small(), small_grads(make_small()))
    examples = jnp.array([[1.0], [1.0], [3.0], [3.0]])[jnp.array([0, 2, 1, 3])]
    whole = wrap(optax.chain(add_quadratic_penalty(2.0), optax.sgd(0.1)))
    importance_fn = {path_integral: si_importance, riemannian_walk: rwalk_importance}[wrap]
    ended = []
    for optimizer, batch_size in ((whole, 4), (MULTI_STEPS[accumulate](whole), 2)):
        state = init_training(optimizer, make_small(), jax.random.key(0))
        state, _ = learn_task(loss_fn, optimizer, state, consolidation, examples, num_epochs=3, batch_size=batch_size)
        ended.append((state.params, importance_fn(state.opt_state, state.params)))
    (params, expected), (accumulated, importance) = ended
    chex.assert_trees_all_close(accumulated, params, rtol=1e-5)
    if wrap is path_integral:  # RWalk's Fisher is that of the last half
        chex.assert_trees_all_close(importance, expected, rtol=1e-5)


def test_the_methods_accumulate_gradients_as_the_error_says():
    tasks, params, key = make_tasks(2), make_params(), jax.random.key(0)
    accumulating = RECIPE._replace(optimizer_fn=lambda s: optax.MultiSteps(coupled_sgd(s), 2))
    with pytest.raises(ValueError, match="return it without MultiSteps"):
        learn_tasks(methods.si(), accumulating, params, tasks, key, strength=3.0)
    method = methods.si()._replace(wrap_optimizer=lambda optimizer: optax.MultiSteps(path_integral(optimizer), 2))
    halves = RECIPE._replace(batch_size=RECIPE.batch_size // 2)
    whole = learn_tasks(methods.si(), RECIPE, params, tasks, key, strength=3.0)
    learned = learn_tasks(method, halves, params, tasks, key, strength=3.0)
    chex.assert_trees_all_close(learned.consolidation, whole.consolidation, rtol=1e-3, atol=1e-5)
    swept = learn_sweep(method, halves, [SweepRun(params, tasks, key, strength) for strength in (3.0, 0.0)])
    np.testing.assert_allclose(swept.accuracy_matrix[0], learned.accuracy_matrix)


def test_no_steps_no_importance():
    optimizer = path_integral(optax.sgd(0.1))
    importance = si_importance(optimizer.init(make_small()), make_small())
    chex.assert_trees_all_equal(importance, jax.tree.map(jnp.zeros_like, make_small()))


@pytest.mark.parametrize("jit", [True, False])
def test_bfloat16_parameters_move_as_far_as_they_do(jit):
    params = {"w": jnp.array([1.0, 1.0, 0.0], jnp.bfloat16)}
    optimizer = path_integral(optax.sgd(1.0))

    def step(params, state):
        grads = {"w": jnp.array([1e-3, 1e-2, 1e-3], jnp.bfloat16)}  # half a place of 1 is 2e-3 below it
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    step = jax.jit(step) if jit else step
    moved, state, grads = step(params, optimizer.init(params))
    expected = -np.float32(grads["w"]) * (np.float32(moved["w"]) - np.float32(params["w"]))
    assert state.path["w"].dtype == jnp.float32
    np.testing.assert_array_equal(state.path["w"], expected)
    assert state.path["w"][0] == 0 < state.path["w"][1]
    for _ in range(3):
        moved, state, _ = step(moved, state)
    assert si_importance(state, moved)["w"].dtype == jnp.float32


def test_none_leaves_are_left_out():
    params = {"w": jnp.ones(2), "frozen": None}
    optimizer = path_integral(optax.sgd(0.1))
    updates, state = optimizer.update(params, optimizer.init(params), params)
    moved = {"w": params["w"] + updates["w"], "frozen": None}
    importance = si_importance(state, moved)
    assert importance["frozen"] is None
    consolidate(init_consolidation(params), moved, importance)


@pytest.mark.parametrize("wrap", [path_integral, riemannian_walk])
def test_parameters_and_state_may_be_donated(wrap):
    optimizer = wrap(optax.sgd(0.1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        batch = {"loss_fn": lambda params, x: jnp.sum(params["w"] * x), "examples": jnp.ones(2)}
        updates, state = optimizer.update(params, state, params, **batch)
        return optax.apply_updates(params, updates), state

    params = make_small()
    params, state = step(params, optimizer.init(params))
    if wrap is riemannian_walk:
        step(jax.tree.map(jnp.copy, params), continue_walk(optimizer.init(params), state))
        chex.assert_tree_all_finite(rwalk_importance(state, params))  # the last task's state is still there


def test_under_vmap_the_fisher_is_still_computed_once_per_interval():
    optimizer = riemannian_walk(optax.sgd(0.1), interval=4)

    def three_steps(params):
        state, zero = optimizer.init(params), jnp.zeros(())
        for _ in range(3):
            batch = {"loss_fn": lambda p, x: jnp.sin(p * x), "examples": jnp.ones(2)}
            updates, state = optimizer.update(zero, state, params, **batch)
            params = optax.apply_updates(params, updates)
        return state.fisher

    assert str(jax.make_jaxpr(jax.vmap(three_steps))(jnp.ones(3))).count(" cond[") == 3


def test_nnx_optimizer():
    @nnx.jit
    def make():
        model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, path_integral(PENALISED_ADAM), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, none):
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((3, 2))) ** 2))(model)
        optimizer.update(model, grads, **none._asdict())

    model, optimizer = make()
    none = init_consolidation(nnx.as_pure(nnx.state(model, nnx.Param)))
    for _ in range(2):
        step(model, optimizer, none)
    importance = si_importance(nnx.as_pure(optimizer.opt_state), nnx.as_pure(nnx.state(model, nnx.Param)))
    assert (importance["kernel"] > 0).all()


def test_a_batch_of_padding_leaves_the_fisher_alone():
    examples, loss = jnp.array([2.0, 4.0]), lambda p, x: 0.5 * (p - x) ** 2
    optimizer = riemannian_walk(optax.sgd(0.0), interval=1, alpha=0.25)
    state, zero = optimizer.init(jnp.zeros(())), jnp.zeros(())
    fishers = []
    for weights in ([0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 3.0]):
        given = {"loss_fn": loss, "examples": examples, "weights": jnp.array(weights)}
        _, state = optimizer.update(zero, state, zero, **given)
        fishers.append(float(state.fisher))
    assert fishers == [0.0, 4.0, 4.0, 0.25 * 13 + 0.75 * 4]


def test_bad_input():
    params, optimizer = make_small(), path_integral(optax.sgd(0.1))
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="path_integral needs params"):
        optimizer.update(params, state)
    with pytest.raises(ValueError, match=r"updates and params must be trees of one structure.*\['b'\]"):
        optimizer.update({"w": params["w"]}, state, params)
    with pytest.raises(TypeError, match=r"params\['w'\] has dtype int32"):
        optimizer.init({"w": jnp.arange(3)})
    for damping in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="damping must be finite, above 0, not"):
            si_importance(state, params, damping=damping)
    with pytest.raises(ValueError, match="params and the parameters in opt_state must be trees of one structure"):
        si_importance(state, {"w": params["w"]})
    with pytest.raises(ValueError, match="riemannian_walk needs the loss and the batch"):
        riemannian_walk(optax.sgd(0.1)).update(params, riemannian_walk(optax.sgd(0.1)).init(params), params)
    for bad, message in (
        ({"interval": 0}, "interval must be an integer of at least 1"),
        ({"alpha": 0.0}, "alpha must be finite, above 0 and at most 1, not 0.0"),
        ({"alpha": 1.5}, "alpha must be finite, above 0 and at most 1, not 1.5"),
        ({"damping": -1e-3}, "damping must be finite, above 0, not -0.001"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.rwalk(**bad)
    with pytest.raises(ValueError, match="damping"):
        methods.si(damping=0.0)
