"""A penalty that is missing, or in the wrong place of its chain, is found before anything is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import chain, partition, sgd

from lifelong_jax import SweepRun, init_sequence, learn_sweep, learn_tasks, methods, proximal_adam
from lifelong_jax import add_quadratic_penalty as add
from lifelong_jax import proximal_quadratic_penalty as proximal
from lifelong_jax._sequences import check_penalty
from tests.problems import RECIPE, coupled_sgd, make_params, make_tasks

pytestmark = pytest.mark.usefixtures("standard_promotion")

STRENGTH = 30.0
WARM_UP = optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, 1000)
ONLY_W1 = {"w1": True, "w2": False}


def by_leaf(w1, w2):
    return partition({"a": w1, "b": w2}, {"w1": "a", "w2": "b"}, mask_compatible_extra_args=True)


def noisy(optimizer):
    return chain(optimizer, optax.add_noise(0.1, 0.5, jax.random.key(0)))


RIGHT = {
    "coupled": lambda s: chain(add(s), optax.adam(1e-3)),
    "coupled, then a warm-up with momentum and clipping": lambda s: chain(
        optax.clip(1.0), add(s), optax.clip_by_global_norm(1.0), sgd(WARM_UP, momentum=0.9)
    ),
    "coupled, orthogonal updates": lambda s: chain(add(s), optax.contrib.muon(1e-3)),
    "coupled, too stiff": lambda s: chain(add(1e4 * s), sgd(10.0)),
    "decoupled": lambda s: chain(
        optax.scale_by_adam(), optax.add_decayed_weights(0.1), add(s), optax.scale_by_learning_rate(1e-3)
    ),
    "proximal": lambda s: chain(optax.adamw(1e-3), proximal(1e-3, s)),
    "proximal, seldom": lambda s: chain(sgd(0.1), proximal(0.1, s, every=100)),
    "proximal, of step sizes by entry": lambda s: chain(
        sgd(0.1), proximal({"w1": jnp.full((6, 8), 0.1), "w2": 0.1}, s)
    ),
    "proximal Adam": lambda s: chain(optax.clip(1.0), proximal_adam(WARM_UP, s)),
    "MultiSteps": lambda s: optax.MultiSteps(chain(add(s), sgd(0.1)), 4),
    "MultiSteps of many": lambda s: optax.MultiSteps(chain(add(s), sgd(0.1)), 40),
    "inject_hyperparams": lambda s: chain(optax.inject_hyperparams(add)(strength=s), sgd(0.1)),
    "apply_if_finite": lambda s: optax.apply_if_finite(chain(add(s), sgd(0.1)), 5),
    "schedule_free": lambda s: optax.contrib.schedule_free(chain(add(s), sgd(0.1)), 0.1, b1=0.9),
    "masked": lambda s: chain(optax.masked(add(s), ONLY_W1, mask_compatible_extra_args=True), sgd(0.1)),
    "partition": lambda s: by_leaf(chain(add(s), optax.adam(1e-3)), optax.set_to_zero()),
    "partition of two kinds": lambda s: by_leaf(chain(add(s), optax.adam(1e-3)), chain(sgd(0.1), proximal(0.1, s))),
    "noise": lambda s: noisy(chain(add(s), sgd(0.1))),
    "what needs the loss too": lambda s: chain(add(s), optax.polyak_sgd()),
}
WITHOUT = {
    "sgd": lambda s: sgd(0.1),
    "a chain": lambda s: chain(optax.clip(1.0), optax.adamw(WARM_UP)),
    "MultiSteps": lambda s: optax.MultiSteps(sgd(0.1), 4),
    "masked": lambda s: optax.masked(sgd(0.1), ONLY_W1),
    "partition": lambda s: by_leaf(optax.adam(1e-3), optax.set_to_zero()),
    "inject_hyperparams": lambda s: optax.inject_hyperparams(sgd)(learning_rate=0.1),
    "noise": lambda s: noisy(sgd(0.1)),
}
WRONG = {
    "after adam": lambda s: chain(optax.adam(1e-3), add(s)),
    "after sgd, clipped": lambda s: chain(sgd(0.1, momentum=0.9), add(s), optax.clip(1.0)),
    "after sgd, in MultiSteps": lambda s: optax.MultiSteps(chain(sgd(0.1), add(s)), 4),
    "proximal before sgd": lambda s: chain(proximal(0.1, s), sgd(0.1)),
    "proximal Adam before sgd": lambda s: chain(proximal_adam(1e-3, s), sgd(0.1)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_penalty_in_its_place_is_let_through(name):
    check_penalty(methods.ewc(), RIGHT[name], make_params(), STRENGTH)


@pytest.mark.parametrize("name", WITHOUT)
def test_an_optimiser_without_a_penalty_is_refused(name):
    with pytest.raises(ValueError, match=r"without a penalty, with which mas would forget .* pass strength=0"):
        check_penalty(methods.mas(), WITHOUT[name], make_params(), STRENGTH)


@pytest.mark.parametrize("name", WRONG)
def test_a_penalty_that_pushes_away_is_refused(name):
    with pytest.raises(
        ValueError, match=r"pushes params\['w1'\] away from the anchor: put add_quadratic_penalty before"
    ):
        check_penalty(methods.si(), WRONG[name], make_params(), STRENGTH)


def test_the_leaf_whose_penalty_is_in_the_wrong_place_is_named():
    right, wrong = chain(add(STRENGTH), sgd(0.1)), chain(sgd(0.1), add(STRENGTH))
    with pytest.raises(ValueError, match=r"params\['w2'\] away"):
        check_penalty(methods.ewc(), lambda s: by_leaf(right, wrong), make_params(), STRENGTH)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("strength", [1e-6, 1e12])
def test_any_strength_and_dtype(strength, dtype):
    params = make_params(dtype=dtype)
    check_penalty(methods.ewc(), coupled_sgd, params, strength)
    check_penalty(methods.ewc(), RIGHT["proximal"], params, strength)
    with pytest.raises(ValueError, match="away from the anchor"):
        check_penalty(methods.ewc(), WRONG["after adam"], params, strength)


def test_where_there_is_no_penalty_none_is_missed():
    check_penalty(methods.finetune(), WITHOUT["sgd"], make_params(), STRENGTH)
    check_penalty(methods.ewc(), WITHOUT["sgd"], make_params(), 0.0)


def test_every_door_looks_for_the_penalty():
    tasks, params, key = make_tasks(2), make_params(), jax.random.key(0)
    bare = RECIPE._replace(optimizer_fn=WITHOUT["sgd"])
    start = init_sequence(methods.ewc(), bare, params, tasks, key)
    for door in (
        lambda: init_sequence(methods.ewc(), bare, params, tasks, key, strength=1.0),
        lambda: learn_tasks(methods.ewc(), bare, params, tasks, key, strength=1.0),
        lambda: learn_tasks(methods.ewc(), bare, params, tasks, key, strength=1.0, start=start),
        lambda: learn_sweep(methods.ewc(), bare, [SweepRun(params, tasks, key, strength) for strength in (0.0, 1.0)]),
    ):
        with pytest.raises(ValueError, match="an optimiser without a penalty"):
            door()


def test_multi_steps_hands_the_penalty_on():
    # Two half batches, and their mean, are a whole batch.
    tasks, params, key = make_tasks(2), make_params(), jax.random.key(0)
    halves = RECIPE._replace(optimizer_fn=lambda s: optax.MultiSteps(coupled_sgd(s), 2), batch_size=10)
    whole, learned = (
        learn_tasks(methods.ewc(), recipe, params, tasks, key, strength=STRENGTH).params for recipe in (RECIPE, halves)
    )
    for name in params:
        np.testing.assert_allclose(learned[name], whole[name], rtol=1e-4, atol=1e-5)
