"""The training loop against a plain Python loop."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lifelong_jax import (
    Consolidation,
    add_quadratic_penalty,
    empirical_fisher_diagonal,
    init_consolidation,
    init_training,
    learn_task,
    quadratic_penalty,
)

NUM_EXAMPLES = 10
SGD = optax.sgd(0.05)

# As people call it: compiled as a whole. The errors, and one test, are about calls outside of jit.
learn_compiled = jax.jit(learn_task, static_argnames=("loss_fn", "optimizer", "num_epochs", "batch_size", "max_steps"))


def loss_fn(params, example):
    x, y = example
    return (x @ params["w"] + params["b"] - y) ** 2


def make_arrays(num_padding=0):
    """Inputs and targets, padded with 9."""
    random = np.random.default_rng(0)
    arrays = random.normal(size=(NUM_EXAMPLES, 3)), random.normal(size=NUM_EXAMPLES)
    padding = [(0, num_padding), (0, 0)]
    return tuple(np.pad(x, padding[: x.ndim], constant_values=np.nan).astype(np.float32) for x in arrays)


def make_problem():
    examples = jax.tree.map(jnp.asarray, make_arrays())
    params = {"w": np.random.default_rng(1).normal(size=3).astype(np.float32), "b": np.float32(0)}
    anchor = {name: leaf + np.float32(1) for name, leaf in params.items()}
    importance = {name: np.full_like(leaf, 0.5) for name, leaf in params.items()}
    return examples, *jax.tree.map(jnp.asarray, (params, Consolidation(anchor, importance)))


def test_one_batch_of_everything_is_gradient_descent_on_loss_and_penalty():
    examples, params, consolidation = make_problem()
    optimizer = optax.chain(add_quadratic_penalty(0.7), optax.sgd(0.05))

    def mean_loss(params):
        return jax.vmap(loss_fn, (None, 0))(params, examples).mean()

    @jax.jit
    def step(params):
        grads = jax.grad(lambda params: mean_loss(params) + quadratic_penalty(params, consolidation, 0.7))(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), mean_loss(params)

    expected, losses = params, []
    for _ in range(4):
        expected, loss = step(expected)
        losses.append(loss)
    state = init_training(optimizer, params, jax.random.key(1))
    state, info = learn_task(loss_fn, optimizer, state, consolidation, examples, num_epochs=4, batch_size=99)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5)
    assert info.loss.shape == (4, 1)
    np.testing.assert_allclose(info.loss[:, 0], losses, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10])
def test_an_epoch_sees_each_example_once_and_the_last_batch_may_be_smaller(batch_size):
    # Under this loss the gradient of a batch is the mean of one-hot vectors: who was seen, and in how large a batch.
    examples = jnp.eye(NUM_EXAMPLES)
    optimizer = optax.sgd(1.0)
    state = init_training(optimizer, jnp.zeros(NUM_EXAMPLES), jax.random.key(0))
    none = init_consolidation(state.params)
    first, _ = learn_compiled(jnp.vdot, optimizer, state, none, examples, num_epochs=1, batch_size=batch_size)
    sizes = [batch_size] * (NUM_EXAMPLES // batch_size) + [NUM_EXAMPLES % batch_size] * (NUM_EXAMPLES % batch_size > 0)
    expected = sorted(-1 / size for size in sizes for _ in range(size))
    np.testing.assert_allclose(sorted(first.params.tolist()), expected, rtol=1e-6)


def test_epochs_are_shuffled_anew():
    # Each step moves params to the example's number: their history is the order.
    examples, optimizer = jnp.arange(float(NUM_EXAMPLES)), optax.sgd(1.0)
    state = init_training(optimizer, jnp.array(0.0), jax.random.key(0))
    none = init_consolidation(state.params)

    def square(params, x):
        return 0.5 * (params - x) ** 2

    orders = []
    for _ in range(2):
        state, info = learn_compiled(square, optimizer, state, none, examples, num_epochs=1, batch_size=1)
        orders.append(info.loss.ravel().tolist())
    assert orders[0] != orders[1]


@pytest.mark.usefixtures("standard_promotion")
def test_two_calls_of_one_epoch_are_one_call_of_two():
    examples, params, consolidation = make_problem()
    optimizer = optax.chain(add_quadratic_penalty(0.7), optax.adam(0.05))
    learn = functools.partial(learn_compiled, loss_fn, optimizer, batch_size=3)
    start = init_training(optimizer, params, jax.random.key(1))
    once, info = learn(start, consolidation, examples, num_epochs=2)
    state = start
    losses = []
    for _ in range(2):
        state, part = learn(state, consolidation, examples, num_epochs=1)
        losses.append(part.loss)
    chex.assert_trees_all_close(state[:2], once[:2], rtol=1e-5)
    assert jnp.array_equal(state.key, once.key)
    np.testing.assert_allclose(np.concatenate(losses), info.loss, rtol=1e-5)


def test_padding_of_weight_0_changes_nothing():
    examples, params, consolidation = make_problem()
    weights = jnp.array([1.0] * NUM_EXAMPLES + [0.0] * 5)
    state = init_training(SGD, params, jax.random.key(1))
    learn = functools.partial(learn_compiled, loss_fn, SGD, state, consolidation, num_epochs=3)
    plain, _ = learn(examples, batch_size=10)
    weighted, _ = learn(make_arrays(num_padding=5), batch_size=15, weights=weights)
    chex.assert_trees_all_close(plain.params, weighted.params, rtol=1e-5)


def test_a_batch_of_padding_alone_has_no_gradient():
    optimizer = optax.sgd(0.5)
    state = init_training(optimizer, jnp.array(3.0), jax.random.key(0))
    none = init_consolidation(state.params)
    after, info = learn_compiled(
        jnp.multiply, optimizer, state, none, jnp.ones(4), num_epochs=1, batch_size=1, weights=jnp.array([1.0, 0, 0, 0])
    )
    chex.assert_trees_all_close(after.params, jnp.array(2.5))
    assert jnp.isfinite(info.loss).all()


# The parameters before each step, of three epochs of four steps, are kept in the optimiser's state.
WITH_HISTORY = optax.chain(
    SGD,
    optax.GradientTransformation(
        lambda params: (jnp.array(0), jnp.zeros((12, 3))),
        lambda updates, state, params: (updates, (state[0] + 1, state[1].at[state[0]].set(params["w"]))),
    ),
)


@pytest.mark.parametrize(("padding", "num_steps"), [(0, [4, 2, 0]), (5, [4, 4, 1]), (5, [3, 0, 0])])
def test_max_steps_ends_training_within_the_same_epochs(padding, num_steps):
    _, params, consolidation = make_problem()
    weights = (np.arange(NUM_EXAMPLES + padding) < NUM_EXAMPLES).astype(np.float32) if padding else None
    state = init_training(WITH_HISTORY, params, jax.random.key(1))
    learn = functools.partial(
        learn_compiled,
        loss_fn,
        WITH_HISTORY,
        state,
        consolidation,
        make_arrays(padding),
        weights=weights,
        num_epochs=3,
        batch_size=3,
    )
    whole, whole_info = learn()
    assert whole_info.num_steps.tolist() == [4, 4, 4]

    taken = sum(num_steps)
    ended, info = learn(max_steps=taken)
    assert info.num_steps.tolist() == num_steps
    (_, before_steps), (_, whole_before_steps) = jax.device_get((ended.opt_state[1], whole.opt_state[1]))
    np.testing.assert_allclose(before_steps[:taken], whole_before_steps[:taken], rtol=1e-5)
    np.testing.assert_allclose(ended.params["w"], whole_before_steps[taken], rtol=1e-5)
    was_taken = np.arange(info.loss.shape[1]) < np.asarray(info.num_steps)[:, None]
    np.testing.assert_allclose(info.loss, np.where(was_taken, whole_info.loss, 0), rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_vmap_over_runs_equals_the_runs_one_by_one():
    examples, params, consolidation = make_problem()
    keys = jax.random.split(jax.random.key(5), 3)
    strengths = jnp.array([0.0, 0.5, 2.0])

    @jax.jit
    def run(key, strength):
        optimizer = optax.chain(add_quadratic_penalty(strength), optax.adam(0.05))
        state = init_training(optimizer, params, key)
        return learn_task(loss_fn, optimizer, state, consolidation, examples, num_epochs=2, batch_size=4)[0].params

    together = jax.jit(jax.vmap(run))(keys, strengths)
    for index in range(3):
        alone = run(keys[index], strengths[index])
        here = jax.tree.map(lambda leaf, index=index: leaf[index], together)
        chex.assert_trees_all_close(here, alone, rtol=1e-4, atol=1e-6)


def test_donating_the_state_leaves_anchor_and_key_alone():
    examples, params, _ = make_problem()
    optimizer = optax.chain(add_quadratic_penalty(1.0), optax.sgd(0.05))
    learn = jax.jit(functools.partial(learn_task, loss_fn, optimizer, num_epochs=1, batch_size=4), donate_argnums=0)
    consolidation = Consolidation(params, jax.tree.map(jnp.ones_like, params))
    key = jax.random.key(0)
    learn(init_training(optimizer, params, key), consolidation, examples)
    chex.assert_tree_all_finite(consolidation)
    jax.random.split(key)


def make_network():
    return [{"w": jnp.zeros(shape), "b": jnp.zeros(shape[1])} for shape in itertools.pairwise([5, 70, 80, 3])]


def network_loss(layers, example):
    x, y = example
    for layer in layers:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.sum((x - y) ** 2)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about what XLA does on a CPU")
@pytest.mark.usefixtures("optimized")
def test_no_parameter_is_copied_in_each_step():
    layers = make_network()
    examples = (jnp.ones((40, 5)), jnp.ones((40, 3)))
    optimizer = optax.sgd(0.1)

    def learn(state):
        return learn_task(
            network_loss, optimizer, state, init_consolidation(layers), examples, num_epochs=1, batch_size=10
        )

    state = init_training(optimizer, layers, jax.random.key(1))
    program = jax.jit(learn, donate_argnums=0).lower(state).compile().as_text()
    assert "f32[70,80]" in program
    in_the_loop = program[: program.index("ENTRY")]
    assert not re.search(r"= f32\[70,80\]\S* copy\(", in_the_loop)


def test_a_gradient_that_is_nan_stays_where_it_is():
    params = {"bad": jnp.zeros(2), "good": jnp.zeros(2)}
    state = init_training(optax.sgd(0.1), params, jax.random.key(0))

    def loss(params, x):
        return jnp.sum(x * params["good"]) + jnp.sum(jnp.sqrt(params["bad"]) * 0.0)  # 0 · ∞ at 0

    state, _ = learn_compiled(
        loss, optax.sgd(0.1), state, init_consolidation(params), jnp.ones((1, 2)), num_epochs=1, batch_size=1
    )
    assert jnp.isnan(state.params["bad"]).all()
    np.testing.assert_allclose(state.params["good"], -0.1, rtol=1e-6)


def test_biases_may_be_sharded():
    mesh = jax.make_mesh((2,), ("model",))
    params = {"b": jnp.arange(4.0), "c": jnp.zeros(3)}
    sharded = params | {"b": jax.device_put(params["b"], jax.sharding.NamedSharding(mesh, jax.P("model")))}
    examples = jnp.ones((5, 3))

    def learn(params):
        def loss(params, x):
            return jnp.sum(params["b"] ** 2) + jnp.sum((params["c"] - x) ** 2)

        state = init_training(optax.sgd(0.1), params, jax.random.key(0))
        none = init_consolidation(params)
        return learn_task(loss, optax.sgd(0.1), state, none, examples, num_epochs=2, batch_size=2)[0].params

    with jax.set_mesh(mesh):
        learned = learn(sharded)
    chex.assert_trees_all_close(learned, learn(params), rtol=1e-6)


def test_a_state_may_be_donated_whole_where_an_optimiser_keeps_the_parameters():
    params = jnp.arange(3.0)
    state = init_training(optax.contrib.prodigy(1.0), params, jax.random.key(0))
    donated = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf, state), donate_argnums=0)(state)
    np.testing.assert_array_equal(donated.params, np.arange(3.0))
    np.testing.assert_array_equal(params, np.arange(3.0))


def test_only_ratios_of_weights_count():
    examples, params, none = jnp.array([2.0, 4.0, 7.0, 0.0]), jnp.array(1.0), init_consolidation(jnp.array(1.0))
    optimizer, weights = optax.sgd(0.25), jnp.array([1.0, 3.0, 2.0, 0.0])

    def square(params, x):
        return (params - x) ** 2

    def learn(weights):
        state = init_training(optimizer, params, jax.random.key(0))
        # In batches of 2, there is one of padding alone: it takes no step.
        options = {"num_epochs": 1, "batch_size": 2, "weights": weights}
        return learn_compiled(square, optimizer, state, none, examples, **options)[0].params

    for scale in (4e36, 3e-38):
        np.testing.assert_allclose(learn(scale * weights), learn(weights), rtol=1e-6)
        fisher = empirical_fisher_diagonal(square, params, examples, weights=scale * weights)
        np.testing.assert_allclose(fisher, (1 * 4 + 3 * 36 + 2 * 144) / 6, rtol=1e-6)


def test_numpy_examples_and_weights():
    examples, params, consolidation = make_problem()
    state = init_training(SGD, params, jax.random.key(1))
    learn = functools.partial(learn_task, loss_fn, SGD, state, consolidation, num_epochs=1, batch_size=4)
    ours, _ = learn(jax.tree.map(np.asarray, examples), weights=np.ones(NUM_EXAMPLES, np.float32))
    chex.assert_trees_all_close(ours.params, learn(examples)[0].params)


def test_a_loss_that_is_no_scalar():
    examples, params, consolidation = make_problem()
    state = init_training(optax.sgd(0.1), params, jax.random.key(0))
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar for one example, not an array of shape \(3,\)"):
        learn_task(
            lambda p, example: p["w"], optax.sgd(0.1), state, consolidation, examples, num_epochs=1, batch_size=2
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"examples": (jnp.zeros((0, 3)), jnp.zeros(0))}, "examples is empty"),
        ({"examples": (jnp.zeros((4, 3)), jnp.zeros(5))}, r"examples\[0\]: 4"),
        ({"num_epochs": 0}, "num_epochs must be an integer of at least 1"),
        ({"batch_size": 2.0}, "batch_size must be an integer of at least 1"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1"),
        ({"weights": jnp.ones(3)}, "weights: 3"),
    ],
)
def test_bad_input(changes, message):
    examples, params, consolidation = make_problem()
    arguments = {"examples": examples, "num_epochs": 1, "batch_size": 2, **changes}
    optimizer = optax.sgd(0.1)
    state = init_training(optimizer, params, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        learn_task(loss_fn, optimizer, state, consolidation, arguments.pop("examples"), **arguments)


def test_losses_of_float16_parameters_are_averaged_in_float32():
    params, examples = jnp.ones(1, jnp.float16), jnp.ones((1024, 1), jnp.float16)
    optimizer = optax.sgd(1e-3)
    state = init_training(optimizer, params, jax.random.key(0))
    state, info = learn_compiled(
        lambda params, x: jnp.sum((params * x - 10) ** 2),
        optimizer,
        state,
        init_consolidation(params),
        examples,
        num_epochs=1,
        batch_size=1024,
    )
    np.testing.assert_array_equal(info.loss, [[81.0]])
    assert state.params.dtype == jnp.float16
    np.testing.assert_allclose(state.params, [1 + 1e-3 * 18], rtol=1e-3)


def test_an_optimiser_gets_the_batch_s_loss_its_gradient_and_the_function():
    examples, params, consolidation = make_problem()

    def see(updates, state, params, *, value, grad, value_fn, **extra_args):
        at_params = jax.value_and_grad(lambda params: value_fn(params, **extra_args))(params)
        return updates, (value, grad, *at_params)

    zeros = (jnp.zeros(()), params, jnp.zeros(()), params)
    seen = optax.GradientTransformationExtraArgs(lambda params: zeros, see)
    optimizer = optax.chain(seen, add_quadratic_penalty(0.7), optax.sgd(0.05))
    start = init_training(optimizer, params, jax.random.key(0))
    state, info = learn_compiled(
        loss_fn, optimizer, start, consolidation, examples, num_epochs=1, batch_size=NUM_EXAMPLES
    )
    value, grad, value_again, grad_again = state.opt_state[0]
    np.testing.assert_allclose((value, value_again), [info.loss[0, 0]] * 2, rtol=1e-5)
    chex.assert_trees_all_close(grad, grad_again, rtol=1e-5)  # without the penalty


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(add_quadratic_penalty(0.0), optax.adam(0.05), optax.contrib.reduce_on_plateau(patience=1)),
        optax.lbfgs(),
    ],
    ids=["reduce_on_plateau", "lbfgs"],
)
@pytest.mark.usefixtures("standard_promotion")
def test_optimisers_that_look_at_the_loss(optimizer):
    examples, params, consolidation = make_problem()
    start = init_training(optimizer, params, jax.random.key(0))
    learn = functools.partial(learn_compiled, loss_fn, optimizer, start, consolidation, examples)
    _, info = learn(num_epochs=5, batch_size=NUM_EXAMPLES)
    assert info.loss[-1, 0] < 0.9 * info.loss[0, 0]
