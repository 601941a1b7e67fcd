"""Synaptic Intelligence and RWalk: against NumPy over whole training runs, closed forms, and known mistakes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.flatten_util import ravel_pytree

from lifelong_jax import (
    Batch,
    Recipe,
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
    recipe = Recipe(apply_fn, OPTIMIZERS["momentum"], num_epochs=9, batch_size=7)
    learned = learn_tasks(of_library, recipe, make_params(), tasks, jax.random.key(1), strength=STRENGTH)
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
    everything = jax.jit(functools.partial(mean_loss, batch=task, weights=np.ones(7)))
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
    @jax.jit
    def importances(params, path, score, fisher):
        si = path_integral(optax.sgd(0.1)).init(params)._replace(path=path)
        rwalk = riemannian_walk(optax.sgd(0.1), damping=1.0).init(params)
        rwalk = rwalk._replace(path=path, score=score, fisher=fisher)
        return si_importance(si, params + 1, damping=1.0), rwalk_importance(rwalk, params + 1)

    si, rwalk = importances(*map(jnp.array, ([1.0, 1.0], [-3.0, 2.0], [0.25, 0.0], [4.0, 2.0])))
    np.testing.assert_allclose(si, [0.0, 1.0])
    np.testing.assert_allclose(rwalk, [1 + 0.25, 0.5 + 1])


def test_the_online_fisher_is_of_single_examples():
    examples = jnp.array([1.0, -1.0])  # whose mean gradient is 0
    optimizer = riemannian_walk(optax.sgd(0.1))
    state = optimizer.init(jnp.zeros(()))
    _, state = optimizer.update(
        jnp.zeros(()), state, jnp.zeros(()), loss_fn=lambda p, x: 0.5 * (p - x) ** 2, examples=examples
    )
    assert state.fisher == 1.0


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


@pytest.mark.usefixtures("float64")
def test_ewc_and_si_by_merge():
    params, task, optimizer_fn = make_params(), make_tasks()[0], wrapped("si", "momentum")
    none = init_consolidation(params)
    learned, state = train(optimizer_fn, params, optimizer_fn(STRENGTH).init(params), none, task, STRENGTH)
    ewc = consolidate(none, learned, fisher_diagonal(apply_fn, learned, task[0], method="reference"))
    si = consolidate(none, learned, si_importance(state, learned), rule="latest")

    pull = jax.jit(lambda consolidation, strength: jax.grad(quadratic_penalty)(params, consolidation, strength))
    expected = jax.tree.map(np.add, *jax.device_get((pull(ewc, 100.0), pull(si, 0.5))))
    chex.assert_trees_all_close(pull(merge([ewc, si], strengths=[100.0, 0.5]), 1.0), expected, rtol=1e-9)
