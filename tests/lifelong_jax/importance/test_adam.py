"""Adam's second moment, rescaled by the batch size, is the size of the empirical Fisher information."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lifelong_jax import add_quadratic_penalty, empirical_fisher_diagonal
from lifelong_jax.importance import importance_from_adam
from lifelong_jax.penalty import hold_consolidation

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on it

PARAMS = {"w": jnp.zeros(2), "b": jnp.zeros(())}
GRADS = [{"w": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}, {"w": jnp.array([0.0, 2.0]), "b": jnp.array(-1.0)}]


def second_moment(squares, b2):
    """The bias-corrected running mean of squares, written out."""
    weights = b2 ** np.arange(len(squares))[::-1]
    return np.tensordot(weights / weights.sum(), np.asarray(squares, np.float64), 1)


def after(optimizer, grads=GRADS, params=PARAMS):
    """The optimiser's state after these gradients."""
    state = optimizer.init(params)
    for grad in grads:
        _, state = optimizer.update(grad, state, params)
    return state


ADAM = optax.adam(0.1, b2=0.9)
OPTIMIZERS = {
    "adam": ADAM,
    "adamw": optax.adamw(0.1, b2=0.9, weight_decay=0.3),
    "chain": optax.chain(optax.clip(100.0), ADAM),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=0.1, b2=0.9),
    "hold_consolidation": hold_consolidation(optax.chain(ADAM, add_quadratic_penalty(1.0))),
    "partition": optax.partition({"all": ADAM, "none": optax.sgd(0.1)}, {"w": "all", "b": "all"}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_found_wherever_it_is(name):
    importance = importance_from_adam(after(OPTIMIZERS[name]), batch_size=8, b2=0.9)
    for leaf, values in importance.items():
        expected = 8 * second_moment([grad[leaf] ** 2 for grad in GRADS], 0.9)
        np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_a_step_of_several_microbatches():
    state = after(optax.MultiSteps(ADAM, 2).gradient_transformation())
    mean = 0.5 * (GRADS[0]["w"] + GRADS[1]["w"])
    np.testing.assert_allclose(importance_from_adam(state, batch_size=8, b2=0.9)["w"], 8 * mean**2, rtol=1e-6)


def test_none_for_what_is_masked():
    masked = importance_from_adam(after(optax.masked(ADAM, {"w": True, "b": False})), batch_size=8, b2=0.9)
    assert masked["b"] is None
    whole = importance_from_adam(after(ADAM), batch_size=8, b2=0.9)
    np.testing.assert_array_equal(masked["w"], whole["w"])


def test_the_variables_of_nnx():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3), nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    importance = importance_from_adam(optimizer.opt_state, batch_size=2, b2=0.9)
    chex.assert_trees_all_close(importance, jax.tree.map(lambda leaf: 2 * leaf**2, nnx.as_pure(grads)), rtol=1e-6)


def test_a_moment_in_bfloat16_gives_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    state = after(ADAM, [jax.tree.map(jnp.ones_like, params)], params)
    importance = importance_from_adam(state, batch_size=2, b2=0.9)
    assert importance["w"].dtype == jnp.float32
    np.testing.assert_allclose(importance["w"], 2, rtol=1e-2)


def test_the_batch_size_and_the_decay_may_be_traced():
    state = after(ADAM)
    expected = importance_from_adam(state, batch_size=8, b2=0.9)
    with jax.numpy_dtype_promotion("strict"):
        actual = jax.jit(lambda state, size, b2: importance_from_adam(state, batch_size=size, b2=b2))(state, 8, 0.9)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_the_stacked_states_of_runs_give_the_stacked_importances():
    # As many runs as a leaf has entries, after different numbers of steps.
    states = [after(ADAM, grads) for grads in (GRADS, GRADS[:1])]
    each = [importance_from_adam(state, batch_size=8, b2=0.9) for state in states]
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    chex.assert_trees_all_close(importance_from_adam(stack(states), batch_size=8, b2=0.9), stack(each), rtol=1e-6)


def logistic_loss(params, example):
    x, y = example
    return optax.losses.sigmoid_binary_cross_entropy(x @ params, y)


def make_labelled(params, num_examples=200):
    """Inputs, and labels that the model itself draws, so that the mean gradient is near 0."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(num_examples, len(params))).astype(np.float32)
    labels = random.uniform(size=num_examples) < 1 / (1 + np.exp(-inputs @ params))
    return jnp.asarray(inputs), jnp.asarray(labels, jnp.float32)


def at_the_minimum(inputs, labels):
    """Newton's method on the mean loss."""
    inputs, labels, params = np.asarray(inputs, np.float64), np.asarray(labels, np.float64), np.zeros(inputs.shape[1])
    for _ in range(8):
        p = 1 / (1 + np.exp(-inputs @ params))
        params -= np.linalg.solve((inputs * (p * (1 - p))[:, None]).T @ inputs, inputs.T @ (p - labels))
    return jnp.asarray(params, jnp.float32)


@functools.partial(jax.jit, static_argnames=("batch_size", "b2"))
def moment_at(params, examples, batch_size, b2=0.999, num_steps=7_000):
    """The importance after a run at learning rate 0, in which the parameters do not move."""
    optimizer = optax.adam(0.0, b2=b2)
    numbers = jax.random.randint(jax.random.key(0), (num_steps, batch_size), 0, len(examples[0]))

    def step(state, rows):
        batch = jax.tree.map(lambda leaf: leaf[rows], examples)
        grads = jax.grad(lambda p: jax.vmap(logistic_loss, (None, 0))(p, batch).mean())(params)
        return optimizer.update(grads, state, params)[1], None

    state, _ = jax.lax.scan(step, optimizer.init(params), numbers)
    return importance_from_adam(state, batch_size=batch_size, b2=b2)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_importance_is_the_empirical_fisher_information_for_batches_of_any_size(batch_size):
    examples = make_labelled(np.array([1.0, -0.5, 0.2], np.float32))
    params = at_the_minimum(*examples)
    expected = empirical_fisher_diagonal(logistic_loss, params, examples)
    # A mean over about 2,000 squares of normal numbers has a standard error of 3 %, of single gradients a little more.
    np.testing.assert_allclose(moment_at(params, examples, batch_size), expected, rtol=0.12)


def test_a_mean_gradient_counts_once_for_each_other_example_of_a_batch():
    examples = make_labelled(np.array([1.0, -0.5, 0.2], np.float32))
    params = jnp.array([0.0, 0.5, 0.2])
    mean = jax.grad(lambda p: jax.vmap(logistic_loss, (None, 0))(p, examples).mean())(params)
    expected = empirical_fisher_diagonal(logistic_loss, params, examples) + 15 * mean**2
    np.testing.assert_allclose(moment_at(params, examples, 16), expected, rtol=0.12)


def test_errors():
    state = after(ADAM)
    with pytest.raises(ValueError, match=r"must have one optax\.ScaleByAdamState, but has 0\. Only optimisers"):
        importance_from_adam(optax.sgd(0.1).init(PARAMS), batch_size=8)
    with pytest.raises(ValueError, match=r"but has 2\. Pass the part of it that belongs to one"):
        importance_from_adam((state, state), batch_size=8)
    with pytest.raises(ValueError, match="opt_state has taken no step"):
        importance_from_adam(ADAM.init(PARAMS), batch_size=8)
    for options in ({"batch_size": 0}, {"batch_size": 8, "b2": 1.0}, {"batch_size": 8, "b2": 0.0}):
        with pytest.raises(ValueError, match=r"batch_size must be|b2 must be"):
            importance_from_adam(state, **options)
