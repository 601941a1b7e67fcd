"""Anchor and importance in the optimiser's state: the same steps as with arguments, in any wrapper and any loop."""

import functools
import itertools
import pickle

import chex
import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from lifelong_jax import (
    Consolidation,
    add_quadratic_penalty,
    consolidate,
    continue_walk,
    forms,
    init_consolidation,
    init_training,
    kronecker_fisher,
    learn_task,
    path_integral,
    proximal_adam,
    proximal_quadratic_penalty,
    quadratic_penalty,
    riemannian_walk,
    rwalk_importance,
    si_importance,
)
from lifelong_jax.consolidation import compress_consolidation, decompress_consolidation
from lifelong_jax.penalty import hold_consolidation, set_consolidation

pytestmark = pytest.mark.usefixtures("standard_promotion")

STRENGTH = 3.0
RATE = 0.02
PIPELINES = {
    "sgd": optax.chain(add_quadratic_penalty(STRENGTH), optax.sgd(RATE)),
    "adam": optax.chain(add_quadratic_penalty(STRENGTH), optax.adam(RATE)),
    "decoupled": optax.chain(optax.scale_by_adam(), add_quadratic_penalty(STRENGTH), optax.scale(-RATE)),
    "proximal": optax.chain(optax.sgd(RATE), proximal_quadratic_penalty(RATE, STRENGTH, every=2)),
    "proximal Adam": proximal_adam(RATE, STRENGTH),
}
SAM_STEP = optax.chain(optax.contrib.normalize(), optax.sgd(0.01))


def make_params(dtype=jnp.float32):
    return {"w": jnp.array([[0.5, -1.0], [2.0, 0.3]], dtype), "b": jnp.array([0.1, -0.2], dtype)}


def make_consolidation(shift=0.0):
    return Consolidation(
        anchor={"w": jnp.array([[1.0, 1.0], [-1.0, 0.3]]) + shift, "b": jnp.array([1.0, 2.0])},
        importance={"w": jnp.array([[0.5, 2.0], [0.0, 1.0]]), "b": jnp.array([3.0, 0.1])},
    )


def loss(params):
    return jnp.sum((params["w"] + 1) ** 2) + jnp.sum((params["b"] - 0.5) ** 2) + jnp.sum(jnp.sin(params["w"]))


def loss_and_penalty(params):
    return loss(params) + quadratic_penalty(params, make_consolidation(), STRENGTH)


gradient = jax.jit(jax.grad(loss))
gradient_of_both = jax.jit(jax.grad(loss_and_penalty))


def descend(optimizer, state, *, grad_fn=gradient, num_steps=5, **extra_args):
    """Takes steps from `make_params`."""
    params = make_params()
    for _ in range(num_steps):
        updates, state = optimizer.update(grad_fn(params), state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


def descend_held(optimizer, consolidation=None, **options):
    consolidation = make_consolidation() if consolidation is None else consolidation
    return descend(optimizer, set_consolidation(optimizer.init(make_params()), consolidation), **options)[0]


def descend_passed(optimizer, consolidation=None, **options):
    consolidation = make_consolidation() if consolidation is None else consolidation
    return descend(optimizer, optimizer.init(make_params()), **consolidation._asdict(), **options)[0]


# ------------------------------------------------------------------------------------ the same steps


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_it_is_the_same_to_the_bit_as_passing_anchor_and_importance(pipeline):
    optimizer = PIPELINES[pipeline]
    held = hold_consolidation(optimizer)
    chex.assert_trees_all_equal(descend_held(held), descend_passed(optimizer))
    chex.assert_trees_all_equal(
        descend(held, held.init(make_params()))[0], descend_passed(optimizer, init_consolidation(make_params()))
    )


def test_one_compilation_serves_all_tasks_and_all_may_be_donated():
    optimizer = hold_consolidation(PIPELINES["adam"])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = optimizer.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    params = make_params()
    state = optimizer.init(params)
    for task in range(3):
        for _ in range(2):
            params, state = step(params, state)
        consolidation = make_consolidation(shift=task)
        state = set_consolidation(state, consolidation)
        chex.assert_trees_all_equal(optax.tree.get(state, "consolidation"), consolidation)
        params, state = step(params, state)
        chex.assert_trees_all_equal(state.consolidation, consolidation)  # which was not donated: a copy was
    assert step._cache_size() == 1
    chex.assert_trees_all_equal(optimizer.init(params).consolidation, init_consolidation(params))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("wrapper", ["none", "MultiSteps", "apply_if_finite"])
def test_a_step_that_donates_the_state_copies_nothing_of_what_is_held(wrapper):
    held = hold_consolidation(PIPELINES["adam"])
    optimizer = {"none": held, "MultiSteps": optax.MultiSteps(held, 2)}.get(wrapper, optax.apply_if_finite(held, 2))
    state = set_consolidation(optimizer.init(make_params()), make_consolidation())
    pointers = lambda state: [  # noqa: E731
        leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(optax.tree.get(state, "consolidation"))
    ]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before = pointers(state)
    assert pointers(step(make_params(), state)[1]) == before


def test_in_a_scan_and_under_vmap():
    optimizer = hold_consolidation(PIPELINES["adam"])

    def run(consolidation):
        params = make_params()

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        state = set_consolidation(optimizer.init(params), consolidation)
        return jax.lax.scan(step, (params, state), length=5)[0][0]

    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), make_consolidation(), make_consolidation(2.0))
    learned = jax.jit(jax.vmap(run))(both)
    for index, shift in enumerate((0.0, 2.0)):
        alone = descend_held(optimizer, make_consolidation(shift))
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, i=index: leaf[i], learned), alone, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_is_held_is_at_least_float32_whatever_is_set(dtype):
    optimizer = hold_consolidation(add_quadratic_penalty(1.0))
    state = optimizer.init(make_params(dtype))
    narrow = Consolidation(make_params(dtype), jax.tree.map(np.ones_like, make_params(dtype)))
    for held in (state, set_consolidation(state, narrow)):
        assert {leaf.dtype for leaf in jax.tree.leaves(held.consolidation)} == {jnp.dtype(jnp.float32)}


# ------------------------------------------------------------------------------------ wrappers


def extra_args(optimizer):
    return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)


# What may be written around a penalty `p`, which holds or gets its consolidation, or is the identity.
FORWARDING = {
    "named_chain": lambda p: optax.named_chain(("penalty", p), ("sgd", optax.sgd(RATE))),
    "MultiSteps": lambda p: optax.MultiSteps(optax.chain(p, optax.sgd(RATE)), 2),
    "MultiSteps, transformation": lambda p: optax.MultiSteps(
        optax.chain(p, optax.sgd(RATE)), 2
    ).gradient_transformation(),
    "MultiSteps in a chain, of the class that forwards": lambda p: optax.chain(
        optax.clip(1e3), extra_args(optax.MultiSteps(optax.chain(p, optax.sgd(RATE)), 2))
    ),
    "apply_if_finite": lambda p: optax.apply_if_finite(optax.chain(p, optax.adam(RATE)), 2),
    "apply_every": lambda p: optax.chain(p, optax.sgd(RATE), optax.apply_every(2)),
    "conditionally_mask": lambda p: optax.conditionally_mask(
        optax.chain(p, optax.sgd(RATE)), lambda step: step % 2 == 0
    ),
    "conditionally_transform": lambda p: optax.chain(
        p, optax.conditionally_transform(optax.clip(0.1), lambda step: step % 2 == 0), optax.sgd(RATE)
    ),
    "inject_hyperparams": lambda p: optax.inject_hyperparams(lambda rate: optax.chain(p, optax.sgd(rate)))(rate=RATE),
    "mechanize": lambda p: optax.contrib.mechanize(optax.chain(p, optax.sgd(RATE))),
    "schedule_free": lambda p: optax.contrib.schedule_free(optax.chain(p, optax.sgd(RATE)), RATE),
    "flatten, after the penalty": lambda p: optax.chain(p, optax.flatten(optax.adam(RATE))),
    "SAM as a plain transformation": lambda p: optax.chain(
        p, optax.GradientTransformation(*optax.contrib.sam(optax.sgd(RATE), SAM_STEP))
    ),
    "masked": lambda p: optax.chain(
        optax.masked(p, {"w": True, "b": True}, mask_compatible_extra_args=True), optax.adam(RATE)
    ),
    "partition": lambda p: optax.partition(
        {"one": optax.chain(p, optax.sgd(RATE)), "two": optax.chain(p, optax.adam(RATE))},
        {"w": "one", "b": "two"},
        mask_compatible_extra_args=True,
    ),
}
HOLDING_ONLY = {
    "MultiSteps in a chain": lambda p: optax.chain(
        optax.clip(1e3), optax.MultiSteps(optax.chain(p, optax.sgd(RATE)), 2).gradient_transformation()
    ),
    "MultiSteps in inject_hyperparams": lambda p: optax.inject_hyperparams(
        lambda rate: optax.MultiSteps(optax.chain(p, optax.sgd(rate)), 2).gradient_transformation()
    )(rate=RATE),
    "SAM": lambda p: optax.contrib.sam(optax.chain(p, optax.sgd(RATE)), SAM_STEP),
    "SAM in a chain": lambda p: optax.chain(p, optax.contrib.sam(optax.sgd(RATE), SAM_STEP)),
    "partition without compatible masks": lambda p: optax.partition(
        {"one": optax.chain(p, optax.sgd(RATE)), "two": optax.chain(p, optax.adam(RATE))}, {"w": "one", "b": "two"}
    ),
    "selective_transform": lambda p: optax.selective_transform(
        optax.chain(p, optax.sgd(RATE)), freeze_mask={"w": False, "b": True}
    ),
}
WRAPPERS = FORWARDING | HOLDING_ONLY


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_in_any_wrapper_it_is_the_gradient_of_loss_plus_penalty(wrapper):
    with jax.disable_jit():  # compiling all these pipelines would take minutes
        learned = descend_held(WRAPPERS[wrapper](hold_consolidation(add_quadratic_penalty(STRENGTH))))
        free = WRAPPERS[wrapper](optax.identity())
        if wrapper == "SAM":  # the step to the adversary is that of the loss alone
            grad_fns = [gradient, gradient_of_both]
            expected, state = make_params(), free.init(make_params())
            for index in range(4):
                start = state.cache if index % 2 else expected
                pull = jax.tree.map(jnp.subtract, gradient_of_both(start), gradient(start))
                grads = jax.tree.map(jnp.add, gradient(expected), pull) if index % 2 else grad_fns[0](expected)
                updates, state = free.update(grads, state, expected)
                expected = optax.apply_updates(expected, updates)
            learned = descend_held(WRAPPERS[wrapper](hold_consolidation(add_quadratic_penalty(STRENGTH))), num_steps=4)
        else:
            expected = descend(free, free.init(make_params()), grad_fn=gradient_of_both)[0]
    chex.assert_trees_all_close(learned, expected, rtol=1e-5, atol=1e-6)


def test_it_may_go_around_a_wrapper_that_forwards():
    optimizer = optax.MultiSteps(PIPELINES["adam"], 2)
    expected = descend_passed(optimizer)
    for inner in (optimizer, optimizer.gradient_transformation()):
        chex.assert_trees_all_equal(descend_held(hold_consolidation(inner)), expected)


@pytest.mark.parametrize("wrapper", FORWARDING)
def test_these_wrappers_pass_anchor_and_importance_on(wrapper):
    penalty = add_quadratic_penalty(STRENGTH)
    with jax.disable_jit():
        learned = descend_passed(FORWARDING[wrapper](penalty))
        held = descend_held(FORWARDING[wrapper](hold_consolidation(penalty)))
    chex.assert_trees_all_equal(learned, held)


@pytest.mark.parametrize("wrapper", HOLDING_ONLY)
def test_these_wrappers_do_not_and_say_so(wrapper):
    optimizer = HOLDING_ONLY[wrapper](add_quadratic_penalty(STRENGTH))
    said = {
        "SAM": "unexpected keyword argument",
        "SAM in a chain": "unexpected keyword argument",
        "partition without compatible masks": "mask_compatible_extra_args=True",
        "selective_transform": "mask_compatible_extra_args=True",
    }.get(wrapper, "hold anchor and importance in the optimiser's state, by hold_consolidation")
    with pytest.raises((TypeError, ValueError), match=said):
        descend_passed(optimizer, num_steps=1)


def test_lookahead_takes_one_that_holds():
    held = optax.lookahead(hold_consolidation(PIPELINES["adam"]), sync_period=2, slow_step_size=0.5)
    plain = optax.lookahead(optax.adam(RATE), sync_period=2, slow_step_size=0.5)
    ended = []
    for optimizer, grad_fn in ((held, gradient), (plain, gradient_of_both)):
        params = optax.LookaheadParams.init_synced(make_params())
        state = optimizer.init(params)
        state = state if optimizer is plain else set_consolidation(state, make_consolidation())
        for _ in range(4):
            updates, state = optimizer.update(grad_fn(params.fast), state, params)
            params = optax.apply_updates(params, updates)
        ended.append(params)
    chex.assert_trees_all_close(*ended, rtol=1e-5)


@pytest.mark.parametrize("search", ["backtracking", "zoom", "lbfgs"])
def test_line_searches_need_the_penalty_in_the_loss(search):
    optimizer = {
        "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
        "zoom": optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(10)),
        "lbfgs": optax.lbfgs(),
    }[search]
    params = make_params()

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss_and_penalty)(params)
        given = {"value": value, "grad": grad, "value_fn": loss_and_penalty}
        updates, state = optimizer.update(grad, state, params, **given)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    values = [loss_and_penalty(params)]
    for _ in range(12):
        params, state = step(params, state)
        values.append(loss_and_penalty(params))
    assert all(new <= old for old, new in itertools.pairwise(values))
    assert optax.tree.norm(gradient_of_both(params)) < 0.2 * optax.tree.norm(gradient_of_both(make_params()))


def test_reduce_on_plateau_beside_a_penalty_scales_both():
    reduce = optax.contrib.reduce_on_plateau(patience=1, rtol=0.9, factor=0.5)
    penalised = optax.chain(add_quadratic_penalty(STRENGTH), optax.sgd(RATE), reduce)
    plain = optax.chain(optax.sgd(RATE), reduce)
    learned = descend_passed(penalised, value=1.0)
    expected, state = descend(plain, plain.init(make_params()), grad_fn=gradient_of_both, value=1.0)
    assert state[1].scale < 1
    chex.assert_trees_all_close(learned, expected, rtol=1e-5)


def learn(optimizer, loss_fn):
    return learn_task(
        lambda params, x: loss_fn(params) + 0 * x,
        optimizer,
        init_training(optimizer, make_params(), jax.random.key(0)),
        make_consolidation(),
        jnp.zeros(6),
        num_epochs=1,
        batch_size=1,
    )[0].params


def test_sam_in_learn_task_is_sam_of_loss_plus_penalty():
    sam = optax.contrib.sam(optax.sgd(RATE), SAM_STEP)
    learned = learn(optax.chain(add_quadratic_penalty(STRENGTH), optax.GradientTransformation(*sam)), loss)
    chex.assert_trees_all_close(learned, learn(sam, loss_and_penalty), rtol=1e-5)


def test_opaque_sam_takes_the_penalty_in_its_gradient():
    sam = optax.contrib.sam(optax.sgd(RATE), SAM_STEP, opaque_mode=True)
    grad_fn = lambda params, _: gradient_of_both(params)  # noqa: E731
    updates, _ = sam.update(gradient_of_both(make_params()), sam.init(make_params()), make_params(), grad_fn=grad_fn)
    params = optax.apply_updates(make_params(), updates)
    adversary = optax.apply_updates(
        make_params(),
        jax.tree.map(jnp.negative, SAM_STEP.update(gradient_of_both(make_params()), SAM_STEP.init(params))[0]),
    )
    expected = jax.tree.map(lambda p, g: p - RATE * g, make_params(), gradient_of_both(adversary))
    chex.assert_trees_all_close(params, expected, rtol=1e-5)


# ------------------------------------------------------------------------------------ masks, None, Kronecker factors


def test_a_masked_state_holds_what_is_not_masked():
    params = make_params()
    optimizer = optax.masked(hold_consolidation(PIPELINES["sgd"]), lambda tree: {"w": True, "b": False})
    state = set_consolidation(optimizer.init(params), make_consolidation())
    assert [leaf.shape for leaf in jax.tree.leaves(optax.tree.get(state, "consolidation"))] == [(2, 2), (2, 2)]
    updates, _ = optimizer.update(params, state, params)
    whole, _ = PIPELINES["sgd"].update(params, PIPELINES["sgd"].init(params), params, **make_consolidation()._asdict())
    chex.assert_trees_all_equal(updates, {"w": whole["w"], "b": params["b"]})


def fisher_of_layers():
    out = lambda params, x: jnp.tanh(x @ params["w"]) + params["b"]  # noqa: E731
    return kronecker_fisher(out, make_params(), jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.0, 1.0]]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("abstract", [False, True])
def test_kronecker_factors_are_held_by_their_shapes(abstract, masked):
    importance = fisher_of_layers()
    like = jax.eval_shape(lambda: importance) if abstract else importance
    optimizer = hold_consolidation(PIPELINES["sgd"], like)
    if masked:
        mask = {"w": True, "b": False}
        optimizer = optax.chain(
            optax.masked(optimizer, mask), optax.masked(optax.set_to_zero(), {"w": False, "b": True})
        )
    zero = descend(optimizer, optimizer.init(make_params()))[0]
    chex.assert_trees_all_close(zero["w"], descend(optax.sgd(RATE), optax.sgd(RATE).init(make_params()))[0]["w"])
    consolidation = Consolidation(make_consolidation().anchor, importance)
    learned = descend_held(optimizer, consolidation)
    chex.assert_trees_all_close(learned["w"], descend_passed(PIPELINES["sgd"], consolidation)["w"], rtol=1e-6)


@pytest.mark.parametrize("held", ["codes", "arrays"])
@pytest.mark.parametrize("given", ["codes", "arrays"])
def test_it_is_stored_as_like_says_whatever_is_set(held, given):
    coded = compress_consolidation(make_consolidation())
    trees = {"codes": coded, "arrays": decompress_consolidation(coded)}
    optimizer = hold_consolidation(PIPELINES["sgd"], like=jax.eval_shape(lambda: trees[held]))
    start = optimizer.init(make_params())
    chex.assert_trees_all_equal_shapes_and_dtypes(start.consolidation, trees[held])
    assert not any(jnp.any(forms.diagonal(start.consolidation.importance[name])) for name in ("w", "b"))
    state = set_consolidation(start, trees[given])
    chex.assert_trees_all_equal(state.consolidation, trees[held])
    updates, _ = optimizer.update(make_params(), state, make_params())
    sgd = PIPELINES["sgd"]
    expected, _ = sgd.update(make_params(), sgd.init(make_params()), make_params(), **coded._asdict())
    chex.assert_trees_all_equal(updates, expected)


def test_a_masked_state_holds_the_codes_of_what_is_not_masked():
    coded = compress_consolidation(make_consolidation())
    mask = {"w": True, "b": False}
    optimizer = optax.masked(hold_consolidation(add_quadratic_penalty(2.0), like=coded), mask)
    state = set_consolidation(optimizer.init(make_params()), coded)
    kept = optax.tree.get(state, "consolidation")
    chex.assert_trees_all_equal((kept.anchor["w"], kept.importance["w"]), (coded.anchor["w"], coded.importance["w"]))
    assert not jax.tree.leaves((kept.anchor["b"], kept.importance["b"]))


def test_none_in_like_leaves_a_leaf_or_a_branch_free():
    params = {"head": make_params(), "rest": make_params()}
    whole = Consolidation(*({"head": tree, "rest": None} for tree in make_consolidation()))
    optimizer = hold_consolidation(PIPELINES["sgd"], like=whole.importance)
    state = set_consolidation(optimizer.init(params), whole)
    assert len(jax.tree.leaves(state.consolidation)) == 4
    updates, _ = optimizer.update(params, state, params)
    expected, _ = PIPELINES["sgd"].update(params, PIPELINES["sgd"].init(params), params, **whole._asdict())
    chex.assert_trees_all_equal(updates, expected)


def test_an_equinox_module_with_none():
    module = eqx.nn.MLP(in_size=2, out_size=2, width_size=3, depth=1, key=jax.random.key(0))
    params = eqx.filter(module, eqx.is_inexact_array)
    consolidation = consolidate(init_consolidation(params), params, jax.tree.map(jnp.ones_like, params))
    optimizer = hold_consolidation(PIPELINES["sgd"])
    state = set_consolidation(optimizer.init(params), consolidation)
    updates, _ = optimizer.update(params, state, params)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda leaf: -RATE * leaf, params))


# ------------------------------------------------------------------------------------ flax, files, meshes


@pytest.mark.parametrize("set_in", ["opt_state", "state"])
def test_train_state_applies_gradients(set_in):
    model, inputs = nn.Dense(2), jnp.arange(6.0).reshape(2, 3)
    params = model.init(jax.random.key(0), inputs)["params"]
    consolidation = Consolidation(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, params))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=hold_consolidation(PIPELINES["adam"]))
    if set_in == "state":
        state = set_consolidation(state, consolidation)
    else:
        state = state.replace(opt_state=set_consolidation(state.opt_state, consolidation))

    state = jax.jit(lambda state: state.apply_gradients(grads=state.params))(state)

    expected, _ = PIPELINES["adam"].update(params, PIPELINES["adam"].init(params), params, **consolidation._asdict())
    chex.assert_trees_all_close(state.params, optax.apply_updates(params, expected), rtol=1e-6)


@pytest.mark.parametrize("kind", ["diagonal", "Kronecker factors", "Kronecker factors of variables"])
def test_nnx_optimizer_updates(kind):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, variables = nnx.split(model, nnx.Param)
    params, inputs = nnx.as_pure(variables), jnp.arange(6.0).reshape(2, 3)
    output_fn = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
    like = None if kind == "diagonal" else kronecker_fisher(output_fn, params, inputs)
    importance = jax.tree.map(jnp.ones_like, params) if like is None else like
    if kind == "Kronecker factors of variables":
        like = importance = kronecker_fisher(output_fn, variables, inputs)
    consolidation = Consolidation(jax.tree.map(jnp.zeros_like, params), importance)
    optimizer = nnx.Optimizer(model, optax.chain(hold_consolidation(PIPELINES["adam"], like)), wrt=nnx.Param)
    nnx.update(optimizer.opt_state, nnx.state(set_consolidation(nnx.as_pure(optimizer.opt_state), consolidation)))

    step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.state(model, nnx.Param)))
    step(model, optimizer)
    step(model, optimizer)

    expected, state = params, PIPELINES["adam"].init(params)
    for _ in range(2):
        updates, state = PIPELINES["adam"].update(expected, state, expected, **nnx.as_pure(consolidation._asdict()))
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(nnx.as_pure(nnx.state(model, nnx.Param)), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["diagonal", "Kronecker factors"])
@pytest.mark.parametrize("how", ["orbax", "pickle", "flax.serialization"])
def test_it_is_saved_and_restored_with_the_optimisers_state(how, kind, tmp_path):
    importance = make_consolidation().importance if kind == "diagonal" else fisher_of_layers()
    optimizer = optax.chain(hold_consolidation(PIPELINES["adam"], importance))
    state = set_consolidation(optimizer.init(make_params()), Consolidation(make_params(), importance))
    fresh = optimizer.init(make_params())
    if how == "orbax":
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", fresh)
    elif how == "pickle":
        restored = pickle.loads(pickle.dumps(state))
    elif kind == "diagonal":
        restored = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    else:  # flax knows no forms: their leaves are saved
        leaves = flax.serialization.to_bytes(jax.tree.leaves(state))
        leaves = flax.serialization.from_bytes(jax.tree.leaves(fresh), leaves)
        restored = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(set_consolidation(restored, optax.tree.get(state, "consolidation")), state)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_it_is_sharded_like_the_parameters(kind):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = jax.device_put(make_params(), sharding)
    optimizer = hold_consolidation(PIPELINES["adam"])
    with jax.set_mesh(mesh):
        state = optimizer.init(params)
        given = jax.tree.map(np.asarray, make_consolidation())  # from a file, say
        for held in (state, set_consolidation(state, given)):
            updates, after = jax.jit(optimizer.update)(params, held, params)
            for leaf in jax.tree.leaves((held.consolidation, after.consolidation)):
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    expected, _ = PIPELINES["adam"].update(
        make_params(), PIPELINES["adam"].init(make_params()), make_params(), **make_consolidation()._asdict()
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_optax_finds_the_parameters_in_the_state():
    optimizer = optax.chain(hold_consolidation(add_quadratic_penalty(1.0)), optax.sgd(0.1))
    names = {"w": "name of w", "b": "name of b"}
    state = optimizer.init(make_params())
    named = optax.tree_map_params(optimizer, lambda leaf, name: name, state, names)
    assert named[0].consolidation == Consolidation(names, names)


# ------------------------------------------------------------------------------------ importances gathered in training


@pytest.mark.parametrize("place", ["inside", "around"])
@pytest.mark.parametrize("wrap", [path_integral, riemannian_walk])
def test_importances_are_gathered_with_it_inside_or_around(wrap, place):
    given = {"loss_fn": lambda params, x: loss(params) * x, "examples": jnp.array([1.0, 0.5])}
    importance_fn = {path_integral: si_importance, riemannian_walk: rwalk_importance}[wrap]
    penalised = PIPELINES["sgd"]
    optimizer = wrap(hold_consolidation(penalised)) if place == "inside" else hold_consolidation(wrap(penalised))
    state = set_consolidation(optimizer.init(make_params()), make_consolidation())
    params, state = descend(optimizer, state, **given)
    plain = wrap(penalised)
    expected, plain_state = descend(plain, plain.init(make_params()), **make_consolidation()._asdict(), **given)
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal(importance_fn(state, params), importance_fn(plain_state, params))
    if wrap is riemannian_walk:
        continued = set_consolidation(continue_walk(optimizer.init(params), state), make_consolidation())
        chex.assert_trees_all_equal(optax.tree.get(continued, "fisher"), optax.tree.get(plain_state, "fisher"))


# ------------------------------------------------------------------------------------ errors


def test_passing_them_as_well_is_an_error():
    optimizer = hold_consolidation(PIPELINES["sgd"])
    with pytest.raises(ValueError, match=r"holds both in its state.*leave out hold_consolidation\. learn_task"):
        descend_passed(optimizer)
    with pytest.raises(ValueError, match="holds both in its state"):
        descend_held(hold_consolidation(optimizer))  # twice
    with pytest.raises(ValueError, match=r"leave out hold_consolidation\. learn_task"):
        learn(optimizer, loss)


def test_a_state_that_holds_nothing_is_an_error():
    with pytest.raises(ValueError, match="opt_state holds no consolidation: wrap the optimiser"):
        set_consolidation(PIPELINES["sgd"].init(make_params()), make_consolidation())


def test_a_consolidation_that_does_not_fit_is_an_error():
    anchor, importance = make_consolidation()
    state = hold_consolidation(PIPELINES["sgd"]).init(make_params())
    for given, message in (
        (Consolidation({"w": anchor["w"]}, importance), r"consolidation.anchor has no leaf \['b'\]"),
        (Consolidation(anchor, importance | {"b": jnp.ones(3)}), r"importance\['b'\] has shape \(3,\)"),
        (Consolidation(anchor | {"b": None}, importance | {"b": None}), r"no leaf \['b'\].*like=importance"),
        (Consolidation(anchor, fisher_of_layers()), r"has Kronecker factors .*like=importance\) for Kronecker"),
    ):
        with pytest.raises(ValueError, match=message):
            set_consolidation(state, given)
    with pytest.raises(ValueError, match=r"params\['b'\] has"):
        hold_consolidation(PIPELINES["sgd"], like=importance | {"b": jnp.ones(3)}).init(make_params())
    free = hold_consolidation(PIPELINES["sgd"], like=importance | {"b": None}).init(make_params())
    with pytest.raises(ValueError, match=r"the anchor in opt_state has no leaf \['b'\]"):  # not dropped in silence
        set_consolidation(free, make_consolidation())
    with pytest.raises(TypeError, match="int32"):
        hold_consolidation(PIPELINES["sgd"]).init({"w": jnp.arange(3)})
