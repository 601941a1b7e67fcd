"""How many cotangents there may be, and what they cost: they are made one at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import Batch, fisher_diagonal, kronecker_fisher, mas_importance, methods
from lifelong_jax.importance.cotangents import MAX_PASSES, sampled
from lifelong_jax.objectives import CLASSIFICATION
from lifelong_jax.training import TrainingState

KEY = jax.random.key(0)

LIKELIHOODS = ("categorical", "gaussian", "bernoulli")
ESTIMATORS = {
    **{f"fisher, {name}": functools.partial(fisher_diagonal, likelihood=name) for name in LIKELIHOODS},
    **{f"factors, {name}": functools.partial(kronecker_fisher, likelihood=name) for name in LIKELIHOODS},
    "fisher, reference": functools.partial(fisher_diagonal, method="reference"),
    "MAS": functools.partial(mas_importance, output_norm="jacobian"),
    "MAS, reference": functools.partial(mas_importance, output_norm="jacobian", method="reference"),
}
SAMPLED = {
    f"{name}, samples": functools.partial(estimator, num_samples=1024, key=KEY)
    for name, estimator in ESTIMATORS.items()
    if not name.startswith("MAS")
}


def outputs_of(num_outputs, params, x):
    """A function with as many outputs as one likes, of few parameters."""
    return jnp.sin(jnp.linspace(1.0, 2.0, num_outputs) * (x @ params))


def arguments(num_outputs):
    return functools.partial(outputs_of, num_outputs), jnp.ones(3), jnp.ones((2, 3))


def trace(estimator, num_outputs):
    """Traces an estimator, and computes nothing."""
    output_fn, *others = arguments(num_outputs)
    jax.eval_shape(functools.partial(estimator, output_fn), *others)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", [*ESTIMATORS, *SAMPLED])
def test_memory_does_not_grow_with_the_number_of_cotangents(name):
    num_outputs = 1024
    output_fn, params, inputs = arguments(num_outputs)
    run = jax.jit(functools.partial((ESTIMATORS | SAMPLED)[name], output_fn))
    memory = run.lower(params, inputs).compile().memory_analysis()
    held = memory.temp_size_in_bytes / (4 * num_outputs * len(inputs))
    assert held < 20  # arrays of one float for each output; all cotangents together are 1,024 of them


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_expectation_of_too_many_passes_is_refused_with_what_to_pass_instead(name):
    num_outputs = MAX_PASSES + 1 + (name.endswith(("categorical", "reference")) and "MAS" not in name)
    message = {
        "fisher": r"exact Fisher information would take 4,097 .*num_samples=1.*fisher='sampled'.*takes one",
        "factors": r"exact Fisher information would take 4,097 .*num_samples=1.*fisher='sampled'.*takes one",
        "MAS": r"output_norm='jacobian' would take 4,097 .*output_norm='squared_l2', which takes one",
    }[name.split(",")[0]]
    with pytest.raises(ValueError, match=message):
        ESTIMATORS[name](*arguments(num_outputs))
    trace(ESTIMATORS[name], num_outputs - 1)


def test_any_number_of_samples_may_be_taken():
    trace(functools.partial(fisher_diagonal, num_samples=10**6, key=KEY), num_outputs=10**6)


def test_users_of_methods_are_told_of_sampled_labels():
    apply_fn, params, inputs = arguments(MAX_PASSES + 2)
    state, batch = TrainingState(params, (), KEY), Batch(inputs, jnp.zeros(2, int))
    for make in (methods.ewc, methods.kfac):
        with pytest.raises(ValueError, match="in methods, fisher='sampled'"):
            make().importance_fn(apply_fn, CLASSIFICATION, state, batch, KEY)
        jax.eval_shape(functools.partial(make("sampled").importance_fn, apply_fn, CLASSIFICATION), state, batch, KEY)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_each_sample_is_another_one(likelihood):
    outputs = jnp.linspace(-1.0, 1.0, 24).reshape(4, 6)
    cotangents = sampled(likelihood, 5)(outputs, KEY)
    scores = np.stack([cotangents.at(index) for index in range(5)])
    assert len({score.tobytes() for score in scores}) == 5
    np.testing.assert_array_equal(scores[3], cotangents.at(3))
    one = sampled(likelihood, 1)(outputs, KEY)
    assert one.num == 1
    assert one.at(0).shape == outputs.shape


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["fisher, gaussian", "fisher, reference", "MAS"])
def test_a_derivative_of_an_importance_holds_no_array_of_cotangents_times_weights(name):
    params, inputs = jnp.ones((32, 128)), jnp.ones((2, 32))

    def total(params):
        return ESTIMATORS[name](lambda params, x: jnp.tanh(x @ params), params, inputs).sum()

    memory = jax.jit(jax.grad(total)).lower(params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 40 * params.nbytes  # there are 128 cotangents
