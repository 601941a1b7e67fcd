"""Synaptic Intelligence and RWalk: against NumPy over whole training runs, closed forms, misuse, peers' mistakes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from lifelong_jax import (
    Batch,
    add_quadratic_penalty,
    consolidate,
    continue_walk,
    fisher_diagonal,
    init_consolidation,
    learn_tasks,
    merge,
    methods,
    path_integral,
    permuted_tasks,
    proximal_quadratic_penalty,
    quadratic_penalty,
    riemannian_walk,
    rwalk_importance,
    si_importance,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

NUM_TASKS, NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES = 3, 7, 3, 2
BATCH_SIZE, NUM_EPOCHS, INTERVAL, ALPHA = 3, 3, 4, 0.3  # 9 steps in a task: intervals of 4, 4 and 1
STRENGTH, RATE, DAMPING = 0.5, 0.3, 0.02

OPTIMIZERS = {
    "momentum": lambda strength: optax.chain(add_quadratic_penalty(strength), optax.sgd(RATE, momentum=0.9)),
    "adam": lambda strength: optax.chain(add_quadratic_penalty(strength), optax.adam(RATE)),
    "proximal": lambda strength: optax.chain(optax.sgd(RATE), proximal_quadratic_penalty(RATE, strength)),
}
WRAPPERS = {
    "si": path_integral,
    "rwalk": functools.partial(riemannian_walk, interval=INTERVAL, alpha=ALPHA, damping=DAMPING),
}


def apply_fn(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def loss_fn(params, example):
    x, y = example[:2]
    return optax.losses.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y)


def make_params(dtype=jnp.float64):
    random = np.random.default_rng(0)
    return {
        "w1": jnp.asarray(random.normal(size=(NUM_FEATURES, 4)), dtype),
        "w2": jnp.asarray(random.normal(size=(4, NUM_CLASSES)), dtype),
    }


def make_tasks(dtype=jnp.float64):
    random = np.random.default_rng(1)
    inputs = jnp.asarray(random.normal(size=(NUM_TASKS, NUM_EXAMPLES, NUM_FEATURES)), dtype)
    return list(zip(inputs, jnp.asarray(random.integers(0, NUM_CLASSES, (NUM_TASKS, NUM_EXAMPLES))), strict=True))


def make_batches():
    """`[num_steps, BATCH_SIZE]`: indices, and weights; each epoch's last batch has one example."""
    random = np.random.default_rng(2)
    orders = [np.pad(random.permutation(NUM_EXAMPLES), (0, 2)) for _ in range(NUM_EPOCHS)]
    weights = np.ones((NUM_EPOCHS, 9))
    weights[:, NUM_EXAMPLES:] = 0
    return np.concatenate(orders).reshape(-1, BATCH_SIZE), weights.reshape(-1, BATCH_SIZE)


def mean_loss(params, batch, weights):
    losses = jax.vmap(loss_fn, in_axes=(None, 0))(params, batch)
    return jnp.sum(weights * losses) / jnp.sum(weights)


@functools.partial(jax.jit, static_argnums=0)
def train(optimizer_fn, params, opt_state, consolidation, task, strength):
    optimizer = optimizer_fn(strength)

    def step(carry, batch):
        params, opt_state = carry
        indices, weights = batch
        examples = jax.tree.map(lambda leaf: leaf[indices], task)
        grads = jax.grad(mean_loss)(params, examples, weights)
        given = {"loss_fn": loss_fn, "examples": examples, "weights": weights}
        updates, opt_state = optimizer.update(grads, opt_state, params, **given, **consolidation._asdict())
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), jax.tree.map(jnp.asarray, make_batches()))[0]


@functools.cache
def wrapped(method, optimizer):  # one function object for each, so that `train` is compiled once
    return lambda strength: WRAPPERS[method](OPTIMIZERS[optimizer](strength))


def learn_by_library(method, optimizer):
    params, tasks = make_params(), make_tasks()
    consolidation, opt_state, results = init_consolidation(params), None, []
    for task in tasks:
        fresh = wrapped(method, optimizer)(STRENGTH).init(params)
        opt_state = fresh if opt_state is None or method == "si" else continue_walk(fresh, opt_state)
        params, opt_state = train(wrapped(method, optimizer), params, opt_state, consolidation, task, STRENGTH)
        if method == "si":
            importance = si_importance(opt_state, params, damping=DAMPING)
        else:
            importance = rwalk_importance(opt_state, params)
        decay = {"si": 1.0, "rwalk": 0.0}[method]
        consolidation = consolidate(consolidation, params, importance, rule="latest", decay=decay)
        results.append((params, consolidation.importance))
    return results


# ------------------------------------------------------------------------------------ the same, written out in NumPy


class NumpyOptimizer:
    def __init__(self, name):
        self.name, self.count, self.mean, self.square = name, 0, 0.0, 0.0

    def step(self, gradient, pull, theta, anchor, importance):
        total, self.count = gradient + pull, self.count + 1
        if self.name == "momentum":
            self.mean = 0.9 * self.mean + total
            return -RATE * self.mean
        if self.name == "adam":
            self.mean = 0.9 * self.mean + 0.1 * total
            self.square = 0.999 * self.square + 0.001 * total**2
            root = np.sqrt(self.square / (1 - 0.999**self.count))
            return -RATE * self.mean / (1 - 0.9**self.count) / (root + 1e-8)
        stiffness = RATE * STRENGTH * importance
        return (theta - RATE * gradient + stiffness * anchor) / (1 + stiffness) - theta


@jax.jit
def per_example_gradients(vector, task):
    unravel = ravel_pytree(make_params())[1]
    grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(unravel(vector), task)
    return jax.vmap(lambda tree: ravel_pytree(tree)[0])(grads)


def gradients_at(theta, task, indices, weights):
    return np.asarray(per_example_gradients(theta, task))[indices[weights > 0]]


def learn_by_numpy(method, optimizer, batches, tasks=None):
    theta = np.asarray(ravel_pytree(make_params())[0])
    anchor, importance, results = theta, np.zeros_like(theta), []
    fisher = score = None
    for task in tasks or make_tasks():
        start, omega, descent = theta.copy(), np.zeros_like(theta), NumpyOptimizer(optimizer)
        checkpoint, walked, task_score = theta.copy(), np.zeros_like(theta), np.zeros_like(theta)
        for count, (indices, weights) in enumerate(zip(*batches, strict=True)):
            each = gradients_at(theta, task, indices, weights)
            if count % INTERVAL == 0:
                fisher = (each**2).mean(0) if fisher is None else ALPHA * (each**2).mean(0) + (1 - ALPHA) * fisher
            pull = STRENGTH * importance * (theta - anchor)
            moved = theta + descent.step(each.mean(0), pull, theta, anchor, importance)
            omega -= each.mean(0) * (moved - theta)
            walked -= each.mean(0) * (moved - theta)
            theta = moved
            if (count + 1) % INTERVAL == 0 or count + 1 == len(batches[0]):
                distance = 0.5 * fisher * (theta - checkpoint) ** 2
                task_score += np.maximum(walked, 0) / (distance + DAMPING)
                checkpoint, walked = theta.copy(), np.zeros_like(theta)
        if method == "si":
            importance = importance + np.maximum(omega, 0) / ((theta - start) ** 2 + DAMPING)
        else:
            score = task_score if score is None else (score + task_score) / 2
            importance = fisher / fisher.max() + score / score.max()
        anchor = theta.copy()
        results.append((theta, importance))
    return results


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("si", "momentum"), ("si", "adam"), ("si", "proximal"), ("rwalk", "momentum"), ("rwalk", "adam")],
)
def test_three_tasks_equal_numpy(method, optimizer):
    ours = learn_by_library(method, optimizer)
    expected = learn_by_numpy(method, optimizer, make_batches())
    for (params, importance), (theta, omega) in zip(ours, expected, strict=True):
        np.testing.assert_allclose(ravel_pytree(params)[0], theta, rtol=1e-10)
        np.testing.assert_allclose(ravel_pytree(importance)[0], omega, rtol=1e-9, atol=1e-12)
        assert (omega > 0).any()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["si", "rwalk"])
def test_learn_tasks_equals_numpy(method):
    # Batches of everything, so that their order does not matter.
    batch = Batch(*make_tasks()[0], jnp.ones(7))
    tasks = permuted_tasks(batch, batch, 2, jax.random.key(0))
    of_library = {"si": methods.si(damping=DAMPING), "rwalk": methods.rwalk(INTERVAL, ALPHA, DAMPING)}[method]
    learn = functools.partial(learn_tasks, of_library, apply_fn, OPTIMIZERS["momentum"], strength=STRENGTH)
    learned = learn(make_params(), tasks, jax.random.key(1), num_epochs=9, batch_size=7)
    shown = [(task.train.inputs[:, task.permutation], task.train.labels) for task in tasks]
    everything = np.tile(np.arange(7), (9, 1)), np.ones((9, 7))
    theta, importance = learn_by_numpy(method, "momentum", everything, tasks=shown)[-1]
    np.testing.assert_allclose(ravel_pytree(learned.params)[0], theta, rtol=1e-7)
    np.testing.assert_allclose(ravel_pytree(learned.consolidation.importance)[0], importance, rtol=1e-6, atol=1e-10)
    chex.assert_trees_all_close(learned.consolidation.anchor, learned.params)


# ------------------------------------------------------------------------------------ what it means, and what it is not


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def descend(optimizer, params, grad_fn, num_steps, extra_args):
    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(grad_fn(params), state, params, **extra_args)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=num_steps)[0]


@pytest.mark.usefixtures("float64")
def test_on_a_quadratic_it_is_half_the_hessian():
    hessian, start = jnp.array([0.5, 1.0, 4.0]), jnp.array([1.0, -2.0, 3.0])
    params, state = descend(path_integral(optax.sgd(1e-3)), start, lambda p: hessian * p, 20_000, {})
    # The loss falls by ½ h start² in each parameter, over a distance of start.
    np.testing.assert_allclose(state.path, hessian * start**2 / 2, rtol=3e-3)
    np.testing.assert_allclose(si_importance(state, params, damping=1e-9), hessian / 2, rtol=3e-3)


@pytest.mark.usefixtures("float64")
def test_the_shares_add_up_to_the_fall_of_the_loss_whatever_the_penalty():
    params, task = make_params(), make_tasks()[0]
    everything = functools.partial(mean_loss, batch=task, weights=jnp.ones(7))
    held = init_consolidation(params)._replace(importance=jax.tree.map(jnp.ones_like, params))
    optimizer = path_integral(optax.chain(add_quadratic_penalty(0.2), optax.sgd(1e-3)))
    learned, state = descend(optimizer, params, jax.grad(everything), 1_000, held._asdict())
    fall = everything(params) - everything(learned)
    assert fall > 0.1
    np.testing.assert_allclose(optax.tree.sum(state.path), fall, rtol=2e-3)


@pytest.mark.usefixtures("float64")
def test_it_is_none_of_the_known_mistakes():
    indices, weights = make_batches()
    anchor, importance = (np.asarray(tree) for tree in learn_by_numpy("si", "momentum", (indices, weights))[0])
    theta, task, descent = anchor.copy(), make_tasks()[1], NumpyOptimizer("momentum")
    mistakes = dict.fromkeys(["penalised", "lr g²", "gradient after"], 0.0)
    for batch in zip(indices, weights, strict=True):
        gradient, pull = gradients_at(theta, task, *batch).mean(0), STRENGTH * importance * (theta - anchor)
        moved = theta + descent.step(gradient, pull, theta, anchor, importance)
        after = gradients_at(moved, task, *batch).mean(0)
        mistakes["penalised"] -= (gradient + pull) * (moved - theta)
        mistakes["lr g²"] += RATE * (gradient + pull) ** 2
        mistakes["gradient after"] -= after * (moved - theta)
        theta = moved
    omegas = {name: np.maximum(path, 0) / ((theta - anchor) ** 2 + DAMPING) for name, path in mistakes.items()}
    ours = [np.asarray(ravel_pytree(result[1])[0]) for result in learn_by_library("si", "momentum")]
    second = ours[1] - ours[0]
    omegas["start moved before"] = second * ((theta - anchor) ** 2 + DAMPING) / DAMPING
    omegas["zero"] = np.zeros_like(second)
    for omega in omegas.values():
        assert np.linalg.norm(omega - second) > 0.02 * np.linalg.norm(second)


def test_a_share_in_a_rise_of_the_loss_is_no_importance():
    params = jnp.array([1.0, 1.0])
    state = path_integral(optax.sgd(0.1)).init(params)._replace(path=jnp.array([-3.0, 2.0]))
    np.testing.assert_allclose(si_importance(state, params + 1, damping=1.0), [0.0, 1.0])
    state = riemannian_walk(optax.sgd(0.1), damping=1.0).init(params)
    state = state._replace(path=jnp.array([-3.0, 2.0]), score=jnp.array([0.25, 0.0]), fisher=jnp.array([4.0, 2.0]))
    np.testing.assert_allclose(rwalk_importance(state, params + 1), [1 + 0.25, 0.5 + 1])


def test_the_online_fisher_is_of_single_examples():
    examples = jnp.array([1.0, -1.0])  # whose mean gradient is 0
    optimizer = riemannian_walk(optax.sgd(0.1))
    state = optimizer.init(jnp.zeros(()))
    _, state = optimizer.update(
        jnp.zeros(()), state, jnp.zeros(()), loss_fn=lambda p, x: 0.5 * (p - x) ** 2, examples=examples
    )
    assert state.fisher == 1.0


# ------------------------------------------------------------------------------------ in any pipeline, and misused


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
def test_another_place_is_refused(place):
    params, state, _ = walk(MISPLACED[place], make_small(), 1)
    with pytest.raises(TypeError, match=r"must be that of path_integral, but is a .*: wrap the whole pipeline"):
        si_importance(state, params)
    with pytest.raises(TypeError, match="must be that of riemannian_walk"):
        rwalk_importance(state, params)
    with pytest.raises(TypeError, match="must be that of riemannian_walk"):
        continue_walk(state, state)


@pytest.mark.parametrize("wrap", [path_integral, riemannian_walk])
@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("rate", [0.1, optax.linear_schedule(0.0, 0.1, 3)])
def test_updates_that_are_applied_otherwise_are_found_out(wrap, num_steps, interval, rate):
    importance_fn = {path_integral: si_importance, riemannian_walk: rwalk_importance}[wrap]
    if wrap is riemannian_walk:
        wrap = functools.partial(riemannian_walk, interval=interval)
    given = wrap(optax.sgd(rate))
    batch = {"loss_fn": lambda params, x: jnp.sum(params["w"] * x), "examples": jnp.ones(2)}
    optimizer = optax.GradientTransformationExtraArgs(
        given.init, lambda grads, state, params, **extra_args: given.update(grads, state, params, **batch)
    )
    for scale in (0.5, 2.0, 0.0):
        params, state, _ = walk(optimizer, make_small(), num_steps, change=lambda u, k=scale: optax.tree.scale(k, u))
        if num_steps > 1 or rate == 0.1:  # else nothing has moved, and nothing should have
            with pytest.raises(ValueError, match=r"did not move as .* told them to"):
                importance_fn(state, params)
    params, state, _ = walk(optimizer, make_small(), num_steps)
    importance_fn(state, params)


def test_multi_steps_goes_outside():
    inner = optax.MultiSteps(optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match="path_integral goes inside of MultiSteps"):
        path_integral(optax.chain(optax.clip(1.0), inner.gradient_transformation())).init(make_small())


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


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", WRAPPERS)
def test_vmap_over_strengths_equals_one_by_one(method):
    params, task, optimizer_fn = make_params(), make_tasks()[0], wrapped(method, "momentum")
    held = init_consolidation(params)._replace(importance=jax.tree.map(jnp.ones_like, params))
    importance_fn = {"si": si_importance, "rwalk": rwalk_importance}[method]

    def importance_at(strength):
        learned, state = train(optimizer_fn, params, optimizer_fn(STRENGTH).init(params), held, task, strength)
        return importance_fn(state, learned)

    strengths = [0.0, 2.0]
    together = jax.jit(jax.vmap(importance_at))(jnp.array(strengths))
    for index, strength in enumerate(strengths):
        here = jax.tree.map(lambda leaf, index=index: leaf[index], together)
        chex.assert_trees_all_close(here, importance_at(strength), rtol=1e-9)


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
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, path_integral(PENALISED_ADAM), wrt=nnx.Param)
    none = init_consolidation(nnx.as_pure(nnx.state(model, nnx.Param)))
    for _ in range(2):
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((3, 2))) ** 2))(model)
        optimizer.update(model, grads, **none._asdict())
    importance = si_importance(nnx.as_pure(optimizer.opt_state), nnx.as_pure(nnx.state(model, nnx.Param)))
    assert (importance["kernel"] > 0).all()


@pytest.mark.usefixtures("float64")
def test_ewc_and_si_by_merge():
    params, task, optimizer_fn = make_params(), make_tasks()[0], wrapped("si", "momentum")
    none = init_consolidation(params)
    learned, state = train(optimizer_fn, params, optimizer_fn(STRENGTH).init(params), none, task, STRENGTH)
    ewc = consolidate(none, learned, fisher_diagonal(apply_fn, learned, task[0], method="reference"))
    si = consolidate(none, learned, si_importance(state, learned), rule="latest")

    def pull(consolidation, strength):
        return jax.grad(quadratic_penalty)(params, consolidation, strength)

    expected = jax.tree.map(jnp.add, pull(ewc, 100.0), pull(si, 0.5))
    chex.assert_trees_all_close(pull(merge([ewc, si], strengths=[100.0, 0.5]), 1.0), expected, rtol=1e-9)


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


# ------------------------------------------------------------------------------------ bad input


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
