"""The penalty in any pipeline: against the gradient of loss + penalty, fixed points in closed form, and extremes."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from lifelong_jax import (
    Consolidation,
    add_quadratic_penalty,
    consolidate,
    init_consolidation,
    proximal_adam,
    proximal_quadratic_penalty,
    quadratic_penalty,
)

# Adam and MultiSteps in optax promote dtypes; `test_nothing_is_promoted_silently` has what is ours.
pytestmark = pytest.mark.usefixtures("standard_promotion")

STRENGTH = 3.0
LEARNING_RATE = 0.02

OPTIMIZERS = {
    "sgd": optax.sgd(LEARNING_RATE),
    "heavy ball": optax.sgd(LEARNING_RATE, momentum=0.9),
    "nesterov": optax.sgd(LEARNING_RATE, momentum=0.9, nesterov=True),
    "adam": optax.adam(LEARNING_RATE),
    "adamw": optax.adamw(LEARNING_RATE, weight_decay=0.1),
    "nadam": optax.nadam(LEARNING_RATE),
    "amsgrad": optax.amsgrad(LEARNING_RATE),
    "adabelief": optax.adabelief(LEARNING_RATE),
    "rmsprop": optax.rmsprop(LEARNING_RATE),
    "adagrad": optax.adagrad(LEARNING_RATE),
    "adadelta": optax.adadelta(LEARNING_RATE),
    "lion": optax.lion(LEARNING_RATE),
    "lamb": optax.lamb(LEARNING_RATE),
    "adafactor": optax.adafactor(LEARNING_RATE),
    "clipped sgd": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(LEARNING_RATE)),
    "scheduled adam": optax.adam(optax.linear_schedule(LEARNING_RATE, 0.0, 10)),
}

# `wrapper(penalty, optimizer)`; `penalty(strength)` is `add_quadratic_penalty`, or `no_penalty` for the reference.
WRAPPERS = {
    "chain": lambda penalty, optimizer: optax.chain(penalty(STRENGTH), optimizer),
    "MultiSteps": lambda penalty, optimizer: optax.MultiSteps(
        optax.chain(penalty(STRENGTH), optimizer), 2
    ).gradient_transformation(),
    "in MultiSteps' chain": lambda penalty, optimizer: optax.chain(
        penalty(STRENGTH), optax.MultiSteps(optimizer, 2).gradient_transformation()
    ),
    "masked": lambda penalty, optimizer: optax.chain(
        optax.masked(penalty(STRENGTH), {"w": True, "b": True}, mask_compatible_extra_args=True), optimizer
    ),
    "partition": lambda penalty, optimizer: optax.partition(
        {"one": optax.chain(penalty(STRENGTH), optimizer), "two": optax.chain(penalty(STRENGTH), optimizer)},
        {"w": "one", "b": "two"},
        mask_compatible_extra_args=True,
    ),
    "inject_hyperparams": lambda penalty, optimizer: optax.chain(
        optax.inject_hyperparams(penalty)(strength=STRENGTH), optimizer
    ),
    "apply_if_finite": lambda penalty, optimizer: optax.apply_if_finite(optax.chain(penalty(STRENGTH), optimizer), 3),
    "schedule_free": lambda penalty, optimizer: optax.contrib.schedule_free(
        optax.chain(penalty(STRENGTH), optimizer), LEARNING_RATE
    ),
}


def no_penalty(strength):
    del strength
    return optax.identity()


def make_params(dtype=jnp.float32):
    return {"w": jnp.array([[0.5, -1.0], [2.0, 0.3]], dtype), "b": jnp.array([0.1, -0.2], dtype)}


def make_consolidation(dtype=jnp.float32):
    return Consolidation(
        anchor={"w": jnp.array([[1.0, 1.0], [-1.0, 0.3]], dtype), "b": jnp.array([1.0, 2.0], dtype)},
        importance={"w": jnp.array([[0.5, 2.0], [0.0, 1.0]], dtype), "b": jnp.array([3.0, 0.1], dtype)},
    )


def loss(params, step=0.0):
    targets = {"w": jnp.full((2, 2), -1.0), "b": jnp.full(2, 0.5)}
    squares = jax.tree.map(lambda p, t: jnp.sum((p.astype(t.dtype) - t - 0.1 * step) ** 2), params, targets)
    return sum(jax.tree.leaves(squares)) + jnp.sum(jnp.sin(params["w"])).astype(jnp.float32)


def loss_and_penalty(params, step, consolidation):
    return loss(params, step) + quadratic_penalty(params, consolidation, STRENGTH)


def compiled(function):
    """A function that is compiled even where `jax.disable_jit` is in force."""
    compiled_function = jax.jit(function)

    def call(*arguments):
        with jax.disable_jit(False):
            return compiled_function(*arguments)

    return call


loss_gradient = compiled(jax.grad(loss))
loss_and_penalty_gradient = compiled(jax.grad(loss_and_penalty))


def descend(optimizer, params, consolidation, grad_fn=loss_gradient, num_steps=3):
    state = optimizer.init(params)
    for step in range(num_steps):
        updates, state = optimizer.update(grad_fn(params, step), state, params, **consolidation._asdict())
        params = optax.apply_updates(params, updates)
    return params


@functools.partial(jax.jit, static_argnames=("optimizer", "grad_fn", "num_steps"))
def descend_far(optimizer, params, consolidation, grad_fn, num_steps):
    """As `descend`, but compiled, and in a loop."""

    def step(carry, step):
        params, state = carry
        updates, state = optimizer.update(grad_fn(params, step), state, params, **consolidation._asdict())
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(num_steps))[0][0]


# ------------------------------------------------------------------------------------ the contract, in any pipeline


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_penalty_before_an_optimizer_is_the_gradient_of_loss_plus_penalty(optimizer, wrapper):
    params, consolidation = make_params(), make_consolidation()
    wrap, optimizer = WRAPPERS[wrapper], OPTIMIZERS[optimizer]

    def grad_fn(params, step):
        return loss_and_penalty_gradient(params, step, consolidation)

    with jax.disable_jit():  # compiling all these pipelines would take minutes
        learned = descend(wrap(add_quadratic_penalty, optimizer), params, consolidation)
        expected = descend(wrap(no_penalty, optimizer), params, consolidation, grad_fn)

    chex.assert_trees_all_close(learned, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_penalty_matters_to_every_optimizer_of_the_table(optimizer):
    params, consolidation = make_params(), make_consolidation()
    with jax.disable_jit():
        optimizer = optax.chain(add_quadratic_penalty(STRENGTH), OPTIMIZERS[optimizer])
        learned = descend(optimizer, params, consolidation, num_steps=2)
        without = descend(optimizer, params, init_consolidation(params), num_steps=2)
    assert not np.allclose(learned["w"], without["w"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_the_three_places_in_a_chain(optimizer, num_steps):
    params, consolidation = make_params(), make_consolidation()
    preconditioner = {"sgd": optax.identity, "adam": optax.scale_by_adam}[optimizer]()
    rate = optax.scale_by_learning_rate(LEARNING_RATE)
    penalty = add_quadratic_penalty(STRENGTH)

    def by_hand(place):
        state, theta = preconditioner.init(params), params
        for step in range(num_steps):
            grads = loss_gradient(theta, step)
            pull = jax.tree.map(lambda p, a, o: STRENGTH * o * (p - a), theta, *consolidation)
            if place == "coupled":
                direction, state = preconditioner.update(jax.tree.map(jnp.add, grads, pull), state, theta)
                theta = jax.tree.map(lambda p, d: p - LEARNING_RATE * d, theta, direction)
            else:
                direction, state = preconditioner.update(grads, state, theta)
                sign_and_rate = {"decoupled": -LEARNING_RATE, "after": 1.0}[place]
                theta = jax.tree.map(
                    lambda p, d, q, scale=sign_and_rate: p - LEARNING_RATE * d + scale * q, theta, direction, pull
                )
        return theta

    chains = {
        "coupled": optax.chain(penalty, preconditioner, rate),
        "decoupled": optax.chain(preconditioner, penalty, rate),
        "after": optax.chain(preconditioner, rate, penalty),
    }
    learned = {place: descend(chain, params, consolidation, num_steps=num_steps) for place, chain in chains.items()}

    for place in chains:
        chex.assert_trees_all_close(learned[place], by_hand(place), rtol=1e-5, atol=1e-6)
    agree = np.allclose(learned["coupled"]["w"], learned["decoupled"]["w"], rtol=1e-5)
    assert agree == (optimizer == "sgd")  # there is nothing to be decoupled from in SGD


@pytest.mark.parametrize("optimizer", ["sgd", "heavy ball", "adam", "adamw", "rmsprop", "lion"])
def test_after_a_complete_optimizer_the_sign_is_wrong(optimizer):
    params, consolidation = make_params(), make_consolidation()
    zeros = lambda params, step: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
    weight = {"w": consolidation.importance["w"] > 0, "b": consolidation.importance["b"] > 0}

    def distance(params):
        away = jax.tree.map(
            lambda p, a, used: jnp.sum(jnp.where(used, (p - a) ** 2, 0)), params, *consolidation[:1], weight
        )
        return float(sum(jax.tree.leaves(away)))

    after = descend(optax.chain(OPTIMIZERS[optimizer], add_quadratic_penalty(0.1)), params, consolidation, zeros)
    before = descend(optax.chain(add_quadratic_penalty(0.1), OPTIMIZERS[optimizer]), params, consolidation, zeros)
    proximal = descend(
        optax.chain(OPTIMIZERS[optimizer], proximal_quadratic_penalty(LEARNING_RATE, 0.1)), params, consolidation, zeros
    )

    assert distance(proximal) < distance(params)
    assert distance(before) < distance(params) < distance(after)


# ------------------------------------------------------------------------------------ masks, partitions, None, LoRA


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda params: {"w": True, "b": False}])
@pytest.mark.parametrize("penalty", [add_quadratic_penalty, functools.partial(proximal_quadratic_penalty, 0.1)])
def test_a_mask_leaves_the_masked_parameters_alone(mask, penalty):
    params, consolidation = make_params(), make_consolidation()
    grads = jax.tree.map(jnp.ones_like, params)
    masked = optax.masked(penalty(STRENGTH), mask, mask_compatible_extra_args=True)

    updates, _ = masked.update(grads, masked.init(params), params, **consolidation._asdict())

    whole, _ = penalty(STRENGTH).update(grads, optax.EmptyState(), params, **consolidation._asdict())
    chex.assert_trees_all_equal(updates, {"w": whole["w"], "b": grads["b"]})


def test_a_prefix_mask_stands_for_a_branch():
    params = {"backbone": make_params(), "head": make_params()}
    consolidation = Consolidation(*({"backbone": tree, "head": tree} for tree in make_consolidation()))
    grads = jax.tree.map(jnp.ones_like, params)
    mask = {"backbone": False, "head": True}
    optimizer = optax.masked(add_quadratic_penalty(STRENGTH), mask, mask_compatible_extra_args=True)

    updates, _ = optimizer.update(grads, optimizer.init(params), params, **consolidation._asdict())

    chex.assert_trees_all_equal(updates["backbone"], grads["backbone"])
    assert not np.allclose(updates["head"]["w"], grads["head"]["w"])


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.masked(add_quadratic_penalty(STRENGTH), {"w": True, "b": False}),
        optax.masked(proximal_quadratic_penalty(0.1, STRENGTH), lambda params: {"w": True, "b": False}),
        optax.masked(proximal_adam(0.1, STRENGTH), {"w": True, "b": False}),
        optax.partition(
            {"on": optax.chain(add_quadratic_penalty(STRENGTH), optax.sgd(0.1)), "off": optax.set_to_zero()},
            {"w": "on", "b": "off"},
        ),
    ],
)
def test_masks_need_mask_compatible_extra_args(optimizer):
    params = make_params()
    with pytest.raises(ValueError, match=r"updates has no leaf \['b'\].*mask_compatible_extra_args=True"):
        optimizer.update(params, optimizer.init(params), params, **make_consolidation()._asdict())


def test_selective_transform_leaves_out_the_argument_that_masks_need():
    params = make_params()
    optimizer = optax.selective_transform(
        optax.chain(add_quadratic_penalty(STRENGTH), optax.sgd(0.1)), freeze_mask={"w": False, "b": True}
    )
    with pytest.raises(ValueError, match="mask_compatible_extra_args"):
        optimizer.update(params, optimizer.init(params), params, **make_consolidation()._asdict())


@pytest.mark.parametrize("freeze", ["partition", "freeze"])
def test_a_frozen_backbone(freeze):
    params, consolidation = make_params(), make_consolidation()
    penalised = optax.chain(add_quadratic_penalty(STRENGTH), optax.adam(LEARNING_RATE))
    optimizer = {
        "partition": optax.partition(
            {"train": penalised, "frozen": optax.set_to_zero()},
            {"w": "frozen", "b": "train"},
            mask_compatible_extra_args=True,
        ),
        "freeze": optax.chain(penalised, optax.transforms.freeze({"w": True, "b": False})),
    }[freeze]

    learned = descend(optimizer, params, consolidation)

    chex.assert_trees_all_equal(learned["w"], params["w"])
    chex.assert_trees_all_close(learned["b"], descend(penalised, params, consolidation)["b"])


@pytest.mark.parametrize(
    "penalty",
    [add_quadratic_penalty(STRENGTH), proximal_quadratic_penalty(0.1, STRENGTH), proximal_adam(0.1, STRENGTH)],
)
@pytest.mark.parametrize("absent", ["leaf", "branch"])
def test_none_in_the_importance_leaves_a_leaf_or_a_branch_to_the_pipeline(penalty, absent):
    params, consolidation = make_params(), make_consolidation()
    if absent == "branch":
        params, whole = {"head": params, "rest": params}, {"head": consolidation, "rest": None}
        consolidation = Consolidation(
            {"head": whole["head"].anchor, "rest": None}, {"head": whole["head"].importance, "rest": None}
        )
        zeroed = Consolidation(
            params, {"head": whole["head"].importance, "rest": jax.tree.map(jnp.zeros_like, params["rest"])}
        )
        zeroed.anchor["head"] = whole["head"].anchor
    else:
        zeroed = Consolidation(consolidation.anchor, consolidation.importance | {"b": jnp.zeros(2)})
        consolidation = Consolidation(consolidation.anchor | {"b": None}, consolidation.importance | {"b": None})
    grads = jax.tree.map(jnp.ones_like, params)

    updates, _ = penalty.update(grads, penalty.init(params), params, **consolidation._asdict())

    expected, _ = penalty.update(grads, penalty.init(params), params, **zeroed._asdict())
    chex.assert_trees_all_close(updates, expected)
    chex.assert_trees_all_close(
        quadratic_penalty(params, consolidation, STRENGTH), quadratic_penalty(params, zeroed, STRENGTH)
    )


def test_lora_trees_alone_are_protected():
    base = jnp.eye(3)
    lora = {"a": jnp.ones((3, 1)) / 3, "b": jnp.zeros((1, 3))}

    def lora_loss(lora, step):
        return jnp.sum(((base + lora["a"] @ lora["b"]) @ jnp.arange(3.0)) ** 2)

    importance = jax.tree.map(jnp.ones_like, lora)
    consolidation = consolidate(init_consolidation(lora), lora, importance)
    optimizer, gradient = optax.chain(add_quadratic_penalty(1e3), optax.sgd(1e-4)), jax.grad(lora_loss)
    free = descend_far(optimizer, lora, init_consolidation(lora), gradient, 3)
    held = descend_far(optimizer, lora, consolidation, gradient, 3)
    assert 0 < optax.tree.norm(optax.tree.sub(held, lora)) < optax.tree.norm(optax.tree.sub(free, lora))


# ------------------------------------------------------------------------------------ flax and equinox


def test_train_state_by_two_lines():
    model = nn.Dense(2)
    inputs = jnp.arange(6.0).reshape(2, 3)
    variables = model.init(jax.random.key(0), inputs)
    optimizer = optax.chain(add_quadratic_penalty(STRENGTH), optax.adam(LEARNING_RATE))
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optimizer)
    consolidation = Consolidation(jax.tree.map(jnp.zeros_like, variables), jax.tree.map(jnp.ones_like, variables))
    grads = jax.grad(lambda params: jnp.sum(model.apply(params, inputs) ** 2))(state.params)

    with pytest.raises(ValueError, match="needs params, anchor and importance"):
        state.apply_gradients(grads=grads)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, **consolidation._asdict())
    new = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    both = jax.tree.map(lambda g, p: g + STRENGTH * p, grads, variables)
    expected = TrainState.create(
        apply_fn=model.apply, params=variables, tx=optax.chain(optax.identity(), optax.adam(LEARNING_RATE))
    ).apply_gradients(grads=both)
    chex.assert_trees_all_close(new.params, expected.params, rtol=1e-6)
    assert new.step == expected.step


def test_nnx_optimizer_forwards_the_consolidation():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    inputs = jnp.arange(6.0).reshape(2, 3)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(
        model, optax.chain(add_quadratic_penalty(STRENGTH), optax.sgd(LEARNING_RATE)), wrt=nnx.Param
    )
    params = nnx.state(model, nnx.Param)
    consolidation = Consolidation(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, params))

    grads = nnx.grad(lambda model: jnp.sum(model(inputs) ** 2))(model)
    optimizer.update(model, grads, **consolidation._asdict())

    expected = jax.tree.map(
        lambda p, g: p - LEARNING_RATE * (g + STRENGTH * p), before, nnx.to_pure_dict(nnx.state(grads, nnx.Param))
    )
    chex.assert_trees_all_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), expected, rtol=1e-5)


class Module(eqx.Module):
    weight: jax.Array
    steps: jax.Array
    activation: object

    def __call__(self, x):
        return self.activation(self.weight @ x)


@pytest.mark.parametrize("passed", ["inexact arrays", "arrays", "module"])
def test_equinox_modules_with_integers_and_functions(passed):
    module = Module(jnp.array([[1.0, 2.0]]), jnp.array(3), jax.nn.relu)
    trainable = eqx.filter(module, eqx.is_inexact_array)
    consolidation = Consolidation(
        jax.tree.map(jnp.zeros_like, trainable),
        consolidate(init_consolidation(trainable), trainable, jax.tree.map(jnp.ones_like, trainable)).importance,
    )
    grads = eqx.filter_grad(lambda module: jnp.sum(module(jnp.ones(2))))(module)
    params = {"inexact arrays": trainable, "arrays": eqx.filter(module, eqx.is_array), "module": module}[passed]
    optimizer = optax.chain(add_quadratic_penalty(STRENGTH), optax.sgd(0.1), proximal_quadratic_penalty(0.1, 0.0))

    updates, _ = optimizer.update(grads, optimizer.init(trainable), params, **consolidation._asdict())

    learned = eqx.apply_updates(module, updates)
    chex.assert_trees_all_close(learned.weight, module.weight - 0.1 * (1 + STRENGTH * module.weight))
    assert learned.steps == 3
    assert learned.activation is jax.nn.relu
    chex.assert_trees_all_close(quadratic_penalty(params, consolidation, 2.0), 5.0)


# ------------------------------------------------------------------------------------ strengths and step sizes


def count_of(state):
    return [leaf for path, leaf in jax.tree.leaves_with_path(state) if "count" in jax.tree_util.keystr(path)]


@pytest.mark.parametrize("make", [add_quadratic_penalty, functools.partial(proximal_quadratic_penalty, LEARNING_RATE)])
def test_a_schedule_counts_steps(make):
    params, consolidation = make_params(), make_consolidation()
    zeros = jax.tree.map(jnp.zeros_like, params)
    scheduled = make(lambda count: 10.0 * count)
    state = scheduled.init(params)
    for step in range(3):
        updates, state = scheduled.update(zeros, state, params, **consolidation._asdict())
        expected, _ = make(10.0 * step).update(zeros, optax.EmptyState(), params, **consolidation._asdict())
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    assert state.count == 3
    assert state.count.dtype == jnp.int32
    assert make(1.0).init(params) == optax.EmptyState()


def test_proximal_adam_schedules_both():
    params, consolidation = make_params(), make_consolidation()
    grads = loss_gradient(params)
    rate, strength = optax.linear_schedule(0.1, 0.5, 4), optax.linear_schedule(0.0, 8.0, 4)
    scheduled = proximal_adam(rate, strength)
    state = scheduled.init(params)
    for step in range(3):
        expected, _ = proximal_adam(rate(step), strength(step)).update(grads, state, params, **consolidation._asdict())
        updates, state = scheduled.update(grads, state, params, **consolidation._asdict())
        chex.assert_trees_all_close(updates, expected)


def test_inject_hyperparams_lets_the_strength_be_set_from_outside():
    params, consolidation = make_params(), make_consolidation()
    grads = loss_gradient(params)
    for factory, fixed in ((add_quadratic_penalty, {}), (proximal_quadratic_penalty, {"step_size": 0.1})):
        optimizer = optax.inject_hyperparams(factory)(**fixed, strength=1.0)
        state = optimizer.init(params)
        state.hyperparams["strength"] = jnp.asarray(7.0)
        updates, _ = optimizer.update(grads, state, params, **consolidation._asdict())
        expected, _ = factory(**fixed, strength=7.0).update(
            grads, optax.EmptyState(), params, **consolidation._asdict()
        )
        chex.assert_trees_all_close(updates, expected)


def test_step_sizes_may_be_a_tree_a_prefix_or_a_schedule_of_trees():
    params, consolidation = make_params(), make_consolidation()
    params, consolidation = {"p": params, "q": params}, Consolidation(*({"p": t, "q": t} for t in consolidation))
    zeros = jax.tree.map(jnp.zeros_like, params)

    def step(step_size):
        penalty = proximal_quadratic_penalty(step_size, STRENGTH)
        return penalty.update(zeros, penalty.init(params), params, **consolidation._asdict())[0]

    full = {name: {"w": jnp.full((2, 2), eta), "b": jnp.full(2, eta)} for name, eta in (("p", 0.1), ("q", 0.4))}
    expected = {"p": step(0.1)["p"], "q": step(0.4)["q"]}
    for step_size in (full, {"p": 0.1, "q": 0.4}, lambda count: {"p": 0.1, "q": 0.4}):
        chex.assert_trees_all_close(step(step_size), expected)
    with pytest.raises(ValueError, match="prefix"):
        step({"p": 0.1})


def test_one_trace_serves_all_tasks_and_strengths():
    params = make_params()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def train(params, consolidation, strength):
        optimizer = optax.chain(
            add_quadratic_penalty(strength), optax.adam(LEARNING_RATE), proximal_quadratic_penalty(0.1, strength)
        )
        return descend(optimizer, params, consolidation)

    consolidation = init_consolidation(params)
    for strength in (0.0, 1.0, 1e12):
        params = train(params, consolidation, jnp.asarray(strength))
        consolidation = consolidate(consolidation, params, jax.tree.map(jnp.ones_like, params))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about what XLA does on a CPU")
@pytest.mark.usefixtures("optimized")
def test_before_adam_the_importance_is_read_once():
    params = jnp.ones((100, 100))
    optimizer = optax.chain(add_quadratic_penalty(STRENGTH), optax.adam(LEARNING_RATE))

    def step(params, state, grads, anchor, importance):
        updates, state = optimizer.update(grads, state, params, anchor=anchor, importance=importance)
        return optax.apply_updates(params, updates), state

    arguments = (params, optimizer.init(params), params, params, params)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile().as_text()
    steps = program[program.index("ENTRY") :].splitlines()
    assert sum("%importance" in line and " parameter(" not in line for line in steps[1:]) == 1


# ------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_promoted_silently(dtype):
    params, consolidation = make_params(dtype), make_consolidation()
    strength = jnp.asarray(STRENGTH, jnp.bfloat16)
    optimizer = optax.chain(
        add_quadratic_penalty(strength), optax.sgd(0.1), proximal_quadratic_penalty(jnp.asarray(0.1), strength)
    )
    with jax.numpy_dtype_promotion("strict"):
        learned = descend(optimizer, params, consolidation, lambda params, step: params)
        penalty = quadratic_penalty(params, consolidation, strength)
    chex.assert_trees_all_equal_dtypes(learned, params)
    assert penalty.dtype == jnp.float32


@pytest.mark.parametrize("kept", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        add_quadratic_penalty,
        functools.partial(proximal_quadratic_penalty, 1e-3),
        functools.partial(proximal_adam, 1e-3),
    ],
)
def test_bfloat16_in_and_out_by_way_of_float32(make, kept):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_params())
    consolidation = make_consolidation(kept)
    grads = jax.tree.map(jnp.ones_like, params)
    transform = make(STRENGTH)
    updates, _ = transform.update(grads, transform.init(params), params, **consolidation._asdict())
    chex.assert_trees_all_equal_dtypes(updates, params)

    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (grads, params, consolidation))
    expected, _ = transform.update(wide[0], transform.init(wide[1]), wide[1], **wide[2]._asdict())
    tolerance = 0 if "adam" not in str(make) else 1e-2  # Adam's own moments are bfloat16
    chex.assert_trees_all_close(
        updates, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), expected), rtol=tolerance, atol=tolerance
    )


def test_the_penalty_of_bfloat16_parameters_is_summed_in_float32():
    params = {"w": jnp.full(4096, 1.0, jnp.bfloat16), "scale": jnp.array(2.0, jnp.bfloat16)}
    consolidation = Consolidation(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, params))
    value, grads = jax.value_and_grad(quadratic_penalty)(params, consolidation, 1.0)
    assert value.dtype == jnp.float32
    assert value == (4096 + 4) / 2
    chex.assert_trees_all_equal(grads, params)


def test_a_penalty_on_nothing_is_zero():
    assert quadratic_penalty({}, Consolidation({}, {}), 1.0) == 0


def test_float64_is_kept():
    with jax.enable_x64(True):
        params, consolidation = make_params(jnp.float64), make_consolidation(jnp.float64)
        assert quadratic_penalty(params, consolidation, 1.0).dtype == jnp.float64
        transform = proximal_quadratic_penalty(0.1, 1.0)
        updates, _ = transform.update(params, transform.init(params), params, **consolidation._asdict())
        chex.assert_trees_all_equal_dtypes(updates, params)


# ------------------------------------------------------------------------------------ the proximal step


def proximal_step(theta, update, anchor, importance, step_size, strength):
    transform = proximal_quadratic_penalty(step_size, strength)
    theta, update, anchor, importance = map(jnp.asarray, (theta, update, anchor, importance))
    updates, _ = transform.update(update, transform.init(theta), theta, anchor=anchor, importance=importance)
    return optax.apply_updates(theta, updates)


compiled_proximal_step = jax.jit(proximal_step)


def test_the_proximal_step_minimises_distance_plus_penalty():
    with jax.enable_x64(True):
        theta, update, anchor, importance = np.random.default_rng(0).normal(size=(4, 50)) * [[1], [1], [1], [0]]
        importance = np.geomspace(1e-3, 1e3, 50)
        step_size, strength = 0.3, 2.0
        x = proximal_step(theta, update, anchor, importance, step_size, strength)

        def objective(x):
            proximity = jnp.sum((x - (theta + update)) ** 2) / (2 * step_size)
            return proximity + quadratic_penalty(
                x, Consolidation(jnp.asarray(anchor), jnp.asarray(importance)), strength
            )

        np.testing.assert_allclose(jax.grad(objective)(x), 0, atol=1e-10)


def test_to_first_order_it_is_the_explicit_step():
    with jax.enable_x64(True):
        theta, update, anchor = np.random.default_rng(0).normal(size=(3, 50))
        importance = np.random.default_rng(1).uniform(size=50)
        differences = []
        for strength in (1e-3, 1e-4):
            x = proximal_step(theta, update, anchor, importance, 0.1, strength) - theta
            explicit = update - 0.1 * strength * importance * (theta + update - anchor)
            differences.append(np.abs(x - explicit).max())
            np.testing.assert_allclose(x, explicit, rtol=0, atol=10 * (0.1 * strength) ** 2)
        assert 80 < differences[0] / differences[1] < 120  # the remainder is of second order


def test_tiny_strengths_are_not_lost_to_rounding():
    moved = proximal_step(jnp.zeros(1), jnp.zeros(1), jnp.ones(1), jnp.ones(1), 1.0, 1e-12)
    np.testing.assert_allclose(moved, 1e-12, rtol=1e-6)


@pytest.mark.parametrize("strength", [1e8, 1e12, 1e30])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e12])
def test_a_large_strength_pins_exactly_what_is_important(strength, scale):
    theta, update, anchor = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    importance = (np.arange(1000) % 2 * scale).astype(np.float32)
    learned = proximal_step(theta, update, anchor, importance, 1e-1, strength)
    rounding = np.finfo(np.float32).eps * np.maximum(np.abs(theta), np.abs(anchor))
    pinned = importance > 0
    pull = 1 / (0.1 * strength * scale)  # what is left of the distance
    assert np.all(np.abs(learned - anchor)[pinned] <= rounding[pinned] + 10 * pull)
    np.testing.assert_array_equal(learned[~pinned], (theta + update)[~pinned])


@pytest.mark.parametrize("step_size", [0.0, 1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("strength", [0.0, 1e-30, 1.0, 1e12, 1e38, np.inf])
def test_it_is_finite_at_any_strength(step_size, strength):
    importance = np.float32([0.0, 1e-38, 1e-20, 1.0, 1e12, 1e30, np.finfo(np.float32).max, np.inf])
    theta, update, anchor = (np.full(8, value, np.float32) for value in (1.0, -0.5, 3.0))
    # Traced, because an infinite strength would be refused if it were known.
    learned = np.asarray(compiled_proximal_step(theta, update, anchor, importance, step_size, strength))
    assert np.isfinite(learned).all()
    assert np.all((learned >= 0.5) & (learned <= 3.0))
    if strength >= 1 and step_size >= 1e-3:
        assert learned[-1] == 3.0


def test_at_1e12_the_explicit_step_gives_nan_and_the_proximal_does_not():
    params, consolidation = make_params(), make_consolidation()
    consolidation = consolidation._replace(importance=jax.tree.map(lambda o: 1e12 * o, consolidation.importance))
    explicit = {
        "coupled": optax.chain(add_quadratic_penalty(1e12), optax.sgd(LEARNING_RATE)),
        "decoupled": optax.chain(
            optax.scale_by_adam(), add_quadratic_penalty(1e12), optax.scale_by_learning_rate(LEARNING_RATE)
        ),
    }
    for optimizer in explicit.values():
        assert jnp.isnan(descend_far(optimizer, params, consolidation, loss_gradient, 40)["w"]).any()
    proximal = {
        "sgd": optax.chain(optax.sgd(LEARNING_RATE), proximal_quadratic_penalty(LEARNING_RATE, 1e12)),
        "heavy ball": optax.chain(
            optax.sgd(LEARNING_RATE, momentum=0.9), proximal_quadratic_penalty(10 * LEARNING_RATE, 1e12)
        ),
        "adam": optax.chain(optax.adam(LEARNING_RATE), proximal_quadratic_penalty(LEARNING_RATE, 1e12)),
        "proximal adam": proximal_adam(LEARNING_RATE, 1e12),
    }
    for optimizer in proximal.values():
        learned = descend_far(optimizer, params, consolidation, loss_gradient, 40)
        chex.assert_tree_all_finite(learned)
        np.testing.assert_allclose(learned["b"], consolidation.anchor["b"], rtol=2e-7)
        assert learned["w"][1, 0] != consolidation.anchor["w"][1, 0]  # of importance 0: free to learn


@pytest.mark.parametrize("strength", [0.0, STRENGTH, 1e300])
def test_proximal_adam_is_adam_followed_by_a_proximal_step_of_its_own_step_sizes(strength):
    settings = {"b1": 0.8, "b2": 0.95, "eps": 1e-3}
    with jax.enable_x64(True):
        params, consolidation = make_params(jnp.float64), make_consolidation(jnp.float64)
        optimizer, adam = proximal_adam(LEARNING_RATE, strength, **settings), optax.adam(LEARNING_RATE, **settings)
        state, expected, adam_state = optimizer.init(params), params, adam.init(params)
        for step in range(4):
            grads = jax.tree.map(lambda leaf, step=step: jnp.cos(leaf + step), params)
            updates, state = optimizer.update(grads, state, params, **consolidation._asdict())
            params = optax.apply_updates(params, updates)

            updates, adam_state = adam.update(grads, adam_state)
            variances = optax.tree.bias_correction(adam_state[0].nu, settings["b2"], adam_state[0].count)
            stiffness = jax.tree.map(
                lambda v, omega: strength * omega * LEARNING_RATE / (jnp.sqrt(v) + settings["eps"]),
                variances,
                consolidation.importance,
            )
            expected = jax.tree.map(
                lambda theta, u, s, anchor: (theta + u) / (1 + s) + s / (1 + s) * anchor,
                expected,
                updates,
                stiffness,
                consolidation.anchor,
            )
            chex.assert_trees_all_close(params, expected, rtol=1e-12)


def test_proximal_adam_leaves_to_adam_what_is_not_protected():
    params, consolidation = make_params(), make_consolidation()
    consolidation = Consolidation(*(tree | {"b": None} for tree in consolidation))
    optimizer, adam = proximal_adam(LEARNING_RATE, STRENGTH), optax.adam(LEARNING_RATE)
    updates, _ = optimizer.update(params, optimizer.init(params), params, **consolidation._asdict())
    expected, _ = adam.update(params, adam.init(params))
    np.testing.assert_array_equal(updates["b"], expected["b"])
    assert (updates["w"] != expected["w"]).any()


# ------------------------------------------------------------------------------------ fixed points

CURVATURE, OPTIMUM = 2.0, jnp.array([1.0, -2.0, 0.5])
ANCHOR, IMPORTANCE = jnp.zeros(3), jnp.array([2.0, 4.0, 40.0])


def parabola_gradient(params, step):
    del step
    return CURVATURE * (params - OPTIMUM)


def find_fixed_point(optimizer):
    start = jnp.array([0.3, -0.3, 0.3])
    return descend_far(optimizer, start, Consolidation(ANCHOR, IMPORTANCE), parabola_gradient, 3000)


def minimum(strength):
    return (CURVATURE * OPTIMUM + strength * IMPORTANCE * ANCHOR) / (CURVATURE + strength * IMPORTANCE)


def proximal_after(optimizer, step_size):
    return optax.chain(optimizer, proximal_quadratic_penalty(step_size, STRENGTH))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(add_quadratic_penalty(STRENGTH), optax.sgd(0.01)),
        optax.chain(add_quadratic_penalty(STRENGTH), optax.sgd(0.002, momentum=0.9)),
        proximal_after(optax.sgd(0.01), 0.01),
        proximal_after(optax.sgd(0.01, momentum=0.9), 0.01 / (1 - 0.9)),
        proximal_after(optax.sgd(0.01, momentum=0.9, nesterov=True), 0.01 / (1 - 0.9)),
        proximal_adam(optax.exponential_decay(0.1, 100, 0.8), STRENGTH),
    ],
    ids=["coupled sgd", "coupled heavy ball", "sgd", "heavy ball", "nesterov", "adam with a tree of step sizes"],
)
def test_fixed_points_of_loss_plus_penalty(optimizer):
    np.testing.assert_allclose(find_fixed_point(optimizer), minimum(STRENGTH), rtol=2e-3)


def test_heavy_ball_with_the_learning_rate_for_a_step_size_weakens_the_penalty():
    learned = find_fixed_point(proximal_after(optax.sgd(0.01, momentum=0.9), 0.01))
    np.testing.assert_allclose(learned, minimum(STRENGTH * (1 - 0.9)), rtol=1e-4)


@pytest.mark.parametrize(
    "optimizer",
    [
        proximal_after(optax.adam(0.01), 0.01),
        optax.chain(optax.scale_by_adam(), add_quadratic_penalty(STRENGTH), optax.scale_by_learning_rate(0.01)),
    ],
    ids=["proximal", "decoupled"],
)
def test_adam_with_a_scalar_step_size_has_the_fixed_point_of_the_decoupled_penalty(optimizer):
    learned = find_fixed_point(optimizer)
    towards = jnp.sign(OPTIMUM - ANCHOR)
    expected = ANCHOR + towards * jnp.minimum(1 / (STRENGTH * IMPORTANCE), jnp.abs(OPTIMUM - ANCHOR))
    np.testing.assert_allclose(learned, expected, rtol=2e-2)
    assert not np.allclose(learned, minimum(STRENGTH), rtol=0.1)


# ------------------------------------------------------------------------------------ properties

finite = functools.partial(st.floats, width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
vectors = functools.partial(hypothesis.extra.numpy.arrays, np.float32, 5)
values, importances = vectors(elements=finite(-1e3, 1e3)), vectors(elements=finite(0, 1e3))
several = hypothesis.settings(max_examples=50, deadline=None)


@several
@hypothesis.given(values, values, values, finite(0, np.float32(1e12)), finite(0, 1))
def test_zero_importance_changes_nothing(theta, update, anchor, strength, step_size):
    arrays = {"anchor": jnp.asarray(anchor), "importance": jnp.zeros(5)}
    for transform in (add_quadratic_penalty(strength), proximal_quadratic_penalty(step_size, strength)):
        updates, _ = transform.update(jnp.asarray(update), optax.EmptyState(), jnp.asarray(theta), **arrays)
        np.testing.assert_array_equal(updates, update)
    assert quadratic_penalty(jnp.asarray(theta), Consolidation(**arrays), strength) == 0


@several
@hypothesis.given(values, values, importances, finite(0, 1e3))
def test_the_derivative_of_the_penalty_is_the_transform(theta, anchor, importance, strength):
    theta, consolidation = jnp.asarray(theta), Consolidation(jnp.asarray(anchor), jnp.asarray(importance))
    transform = add_quadratic_penalty(strength)
    updates, _ = transform.update(jnp.zeros(5), optax.EmptyState(), theta, **consolidation._asdict())
    np.testing.assert_allclose(
        jax.grad(quadratic_penalty)(theta, consolidation, strength), updates, rtol=1e-6, atol=1e-30
    )


@several
@hypothesis.given(
    values, values, values, vectors(elements=finite(0, np.float32(1e12))), finite(0, np.float32(1e12)), finite(0, 1)
)
def test_the_proximal_step_never_overshoots(theta, update, anchor, importance, strength, step_size):
    learned = proximal_step(theta, update, anchor, importance, step_size, strength)
    there = theta + update
    rounding = 4 * np.finfo(np.float32).eps * (np.abs(theta) + np.abs(update) + np.abs(anchor))
    assert np.all(learned >= np.minimum(there, anchor) - rounding)
    assert np.all(learned <= np.maximum(there, anchor) + rounding)


# ------------------------------------------------------------------------------------ refusals


UNUSABLE = [-1.0, np.nan, np.inf]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *((number, "must be finite and not negative") for number in UNUSABLE),
        *((other, "must be a number, not ") for other in (None, "1", [1.0, 2.0], jnp.ones(2))),
    ],
)
def test_strengths_and_learning_rates_are_checked(bad, message):
    with pytest.raises(ValueError, match=f"strength {message}"):
        add_quadratic_penalty(bad)
    with pytest.raises(ValueError, match=f"strength {message}"):
        quadratic_penalty(jnp.zeros(2), init_consolidation(jnp.zeros(2)), bad)
    for make in (proximal_quadratic_penalty, proximal_adam):
        with pytest.raises(ValueError, match=f"strength {message}"):
            make(0.1, bad)
    with pytest.raises(ValueError, match=f"learning_rate {message}"):
        proximal_adam(bad, 1.0)


@pytest.mark.parametrize("bad", UNUSABLE)
def test_step_sizes_are_checked(bad):
    with pytest.raises(ValueError, match=r"step_size\['b'\] must be finite and not negative"):
        proximal_quadratic_penalty({"w": 1.0, "b": jnp.array([1.0, bad])}, 1.0)


@pytest.mark.parametrize(("bad", "name"), [(None, "step_size"), ({"w": "1"}, r"step_size\['w'\]")])
def test_step_sizes_are_numbers(bad, name):
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        proximal_quadratic_penalty(bad, 1.0)


def test_proximal_adam_without_a_memory_is_sign_descent():
    params, consolidation = jnp.array([1.0, -2.0]), init_consolidation(jnp.zeros(2))
    optimizer = proximal_adam(0.1, 1.0, b1=0, b2=0)
    updates, _ = optimizer.update(jnp.array([3.0, -0.5]), optimizer.init(params), params, **consolidation._asdict())
    np.testing.assert_allclose(updates, [-0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    "transform", [add_quadratic_penalty(1.0), proximal_quadratic_penalty(0.1, 1.0), proximal_adam(0.1, 1.0)]
)
@pytest.mark.parametrize("missing", ["params", "anchor", "importance"])
def test_what_is_missing_is_asked_for(transform, missing):
    params = make_params()
    arguments = {"params": params} | make_consolidation()._asdict()
    del arguments[missing]
    with pytest.raises(ValueError, match=r"\*\*consolidation\._asdict\(\)"):
        transform.update(params, transform.init(params), **arguments)


@pytest.mark.parametrize(
    ("anchor", "importance", "message"),
    [
        ({"w": jnp.zeros((2, 2))}, None, r"anchor has no leaf \['b'\]"),
        (None, {"w": jnp.zeros((2, 2))}, r"importance has no leaf \['b'\]"),
        (
            None,
            {"w": jnp.zeros((2, 2)), "b": jnp.zeros(3)},
            r"importance\['b'\] has shape \(3,\), but .*\['b'\] has \(2,\)",
        ),
        ({"w": jnp.zeros(4), "b": jnp.zeros(2)}, None, r"anchor\['w'\] has shape \(4,\), but .*\['w'\] has \(2, 2\)"),
        (None, {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2), "c": jnp.zeros(2)}, r"has no leaf \['c'\]"),
        ({"w": jnp.zeros((2, 2)), "b": None}, None, r"anchor has no leaf \['b'\]"),
        (None, {"w": jnp.zeros((2, 2)), "b": None}, r"importance has no leaf \['b'\]"),
    ],
)
def test_trees_that_differ_are_named_by_the_first_path(anchor, importance, message):
    params, good = make_params(), make_consolidation()
    consolidation = Consolidation(anchor or good.anchor, importance or good.importance)
    transform = add_quadratic_penalty(1.0)
    with pytest.raises(ValueError, match=message):
        transform.update(params, transform.init(params), params, **consolidation._asdict())
    with pytest.raises(ValueError, match=message):
        quadratic_penalty(params, consolidation, 1.0)


@pytest.mark.parametrize("transform", [add_quadratic_penalty(1.0), proximal_quadratic_penalty(0.1, 1.0)])
def test_params_that_differ_are_named(transform):
    ones = jnp.ones(2)
    with pytest.raises(ValueError, match=r"importance has shape \(2,\), but params has \(3, 2\)"):
        transform.update(ones, transform.init(ones), jnp.ones((3, 2)), anchor=ones, importance=ones)
