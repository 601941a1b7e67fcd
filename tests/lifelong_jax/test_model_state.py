"""Dropout and batch normalisation: keys per example and step, statistics over the batch, in every loop."""

import copy
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lifelong_jax import (
    Batch,
    Recipe,
    SweepRun,
    Task,
    add_quadratic_penalty,
    evaluate,
    fisher_diagonal,
    init_consolidation,
    init_training,
    learn_jointly,
    learn_sweep,
    learn_task,
    learn_tasks,
    methods,
)
from lifelong_jax._batch_axis import weigh_means
from lifelong_jax.losses import TrainLoss, with_model_state
from lifelong_jax.objectives import CLASSIFICATION
from lifelong_jax.streaming import learn_stream
from lifelong_jax.tasks import pad_tasks

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def make_batch(num_examples, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(num_examples, 3)).astype(np.float32) + 2
    return Batch(jnp.asarray(inputs), jnp.asarray((inputs[:, 0] > 2).astype(np.int32)))


BATCH = make_batch(7)  # not divided evenly by batches of 4 or 3
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32), "scale": jnp.ones(3)}
STATE = {"mean": jnp.zeros(3), "var": jnp.ones(3)}


def apply_fn(params, model_state, x):
    return params["scale"] * (x - model_state["mean"]) / jnp.sqrt(model_state["var"] + 1e-5) @ params["w"]


def train_fn(params, model_state, x, key):
    """Batch normalisation of the inputs, and dropout."""
    mean, square = jax.lax.pmean((x, x**2), "batch")
    var = square - mean**2
    normalised = params["scale"] * (x - mean) / jnp.sqrt(var + 1e-5)
    kept = jax.random.bernoulli(key, 0.8, x.shape)
    new_state = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, model_state, {"mean": mean, "var": var})
    return jnp.where(kept, normalised / 0.8, 0) @ params["w"], new_state


LOSS_FN = TrainLoss(CLASSIFICATION, train_fn, apply_fn)


def optimizer_fn(strength):
    return optax.chain(add_quadratic_penalty(strength), optax.sgd(0.5, momentum=0.9))


RECIPE = Recipe(apply_fn, optimizer_fn, num_epochs=2, batch_size=3, train_fn=train_fn)


def start(loss_fn=LOSS_FN, optimizer=None, model_state=STATE):
    return init_training(optimizer or optimizer_fn(1.0), PARAMS, KEY, model_state)


def written_out_epoch(state, batch, weights, batch_size):
    """An epoch of `learn_task`, written out: the last batch is as small as it is, and padding is left out."""
    key, epoch_key = jax.random.split(state.key)
    order = [int(n) for n in jax.random.permutation(epoch_key, len(batch.labels)) if weights[int(n)] > 0]
    params, opt_state, model_state = state.params, state.opt_state, state.model_state
    for first in range(0, len(order), batch_size):
        chosen = jnp.asarray(order[first : first + batch_size])
        base = jax.random.fold_in(epoch_key, 1)
        keys = jnp.stack([jax.random.fold_in(base, n) for n in chosen])
        part = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], batch)

        def loss(params, part=part, keys=keys, chosen=chosen, model_state=model_state):
            w = weights[chosen] / weights[chosen].sum()
            x, mean = part.inputs, w @ part.inputs
            var = w @ part.inputs**2 - mean**2
            normalised = params["scale"] * (x - mean) / jnp.sqrt(var + 1e-5)
            kept = jnp.stack([jax.random.bernoulli(key, 0.8, (3,)) for key in keys])
            logits = jnp.where(kept, normalised / 0.8, 0) @ params["w"]
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, part.labels)
            new = {"mean": mean, "var": var}
            return w @ losses, jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, model_state, new)

        grads, model_state = jax.grad(loss, has_aux=True)(params)
        none = init_consolidation(params)
        updates, opt_state = optimizer_fn(1.0).update(grads, opt_state, params, **none._asdict())
        params = optax.apply_updates(params, updates)
    return state._replace(params=params, opt_state=opt_state, model_state=model_state, key=key)


@pytest.mark.parametrize(
    ("batch_size", "num_padding"),
    [(3, 0), (4, 3), *[pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 3), (4, 0), (99, 0), (99, 3))]],
)
def test_ragged_batches_and_padding_count_right(num_padding, batch_size):
    weights = jnp.array([1.0, 2, 1, 0.5, 1, 1, 3])
    expected = written_out_epoch(start(), BATCH, weights, batch_size)
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:num_padding]]), BATCH)
    padded = padded._replace(inputs=padded.inputs.at[7:].set(jnp.nan))
    if num_padding:  # a padded task is shuffled otherwise
        weights = jnp.concatenate([weights, jnp.zeros(num_padding)])
        expected = written_out_epoch(start(), padded, weights, batch_size)
    none = init_consolidation(PARAMS)
    learn = functools.partial(learn_task, LOSS_FN, optimizer_fn(1.0), num_epochs=1, batch_size=batch_size)
    state, _ = learn(start(), none, padded, weights=weights)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state.model_state, expected.model_state, rtol=1e-5, atol=1e-6)


def test_an_example_s_key_depends_on_neither_the_batch_size_nor_its_place():
    seen = {}

    def loss_fn(params, model_state, example, key):
        def keep(number, bits):
            seen.setdefault(int(number), set()).add(tuple(np.ravel(bits)))

        jax.debug.callback(keep, example, jax.random.key_data(key))
        return params * 0.0, model_state

    for batch_size in (2, 5):
        state = init_training(optax.sgd(0.0), jnp.ones(()), KEY, ())
        learn_task(
            loss_fn,
            optax.sgd(0.0),
            state,
            init_consolidation(jnp.ones(())),
            jnp.arange(5),
            num_epochs=3,
            batch_size=batch_size,
        )
    jax.effects_barrier()
    assert {number: len(keys) for number, keys in seen.items()} == dict.fromkeys(range(5), 3)  # one for each epoch
    assert len(set().union(*seen.values())) == 15


def test_a_host_loop_a_scan_a_sweep_and_a_stream_draw_the_same():
    task = Task(BATCH._replace(weights=jnp.ones(7)), make_batch(6, 1)._replace(weights=jnp.ones(6)))
    learned = learn_tasks(methods.ewc(), RECIPE, PARAMS, [task, task], KEY, strength=1.0, model_state=STATE)
    swept = learn_sweep(methods.ewc(), RECIPE, [SweepRun(PARAMS, [task, task], KEY, 1.0, STATE)] * 2)
    np.testing.assert_allclose(swept.accuracy_matrix[0], learned.accuracy_matrix, atol=1e-6)
    none = init_consolidation(PARAMS)
    optimizer = optimizer_fn(1.0)
    in_memory, info = learn_task(LOSS_FN, optimizer, start(), none, BATCH, num_epochs=2, batch_size=3)

    class Source:
        def __len__(self):
            return 7

        def __getitem__(self, index):
            return jax.tree.map(lambda leaf: np.asarray(leaf[index]), BATCH)

    streamed, stream_info = learn_stream(LOSS_FN, optimizer, start(), none, Source(), num_epochs=2, batch_size=3)
    chex.assert_trees_all_close(
        (streamed.params, streamed.model_state), (in_memory.params, in_memory.model_state), rtol=1e-5
    )
    chex.assert_trees_all_close(stream_info, info, rtol=1e-5)


def test_a_sequence_goes_on_with_its_model_state():
    tasks = pad_tasks([Task(make_batch(7, n), make_batch(6, n)) for n in range(2)])
    kept = []

    def keep(state, progress):
        kept.append(copy.deepcopy(state))

    whole = learn_tasks(methods.si(), RECIPE, PARAMS, tasks, KEY, strength=1.0, model_state=STATE, callback=keep)
    again = learn_tasks(methods.si(), RECIPE, PARAMS, tasks, KEY, strength=1.0, start=kept[2])
    chex.assert_trees_all_equal((again.training, again.consolidation), (whole.training, whole.consolidation))
    assert float(whole.training.model_state["mean"][0]) > 1  # the running average of inputs around 2


@pytest.mark.parametrize("make", [methods.ewc, methods.mas, methods.kfac, methods.rwalk])
def test_importances_and_evaluation_see_the_network_as_it_predicts(make):
    task = Task(BATCH, BATCH)
    learned = learn_tasks(make(), RECIPE, PARAMS, [task], KEY, strength=1.0, model_state=STATE)
    training = learned.training
    if make is methods.ewc:
        network = with_model_state(apply_fn, training.model_state)
        expected = fisher_diagonal(network, training.params, BATCH.inputs)
        chex.assert_trees_all_close(learned.consolidation.importance, expected, rtol=1e-5)
    accuracy = evaluate(apply_fn, training.params, [task], model_state=training.model_state)
    np.testing.assert_array_equal(learned.accuracy_matrix, [accuracy])
    assert learn_jointly(RECIPE, PARAMS, [task], KEY, model_state=STATE).accuracy_matrix.shape == (1, 1)


def test_what_does_not_go_together():
    task = Task(BATCH, BATCH)
    learn = functools.partial(learn_tasks, methods.ewc(), tasks=[task], key=KEY, strength=1.0)
    with pytest.raises(ValueError, match="recipe has a train_fn, so pass the model_state to start from"):
        learn(RECIPE, PARAMS)
    with pytest.raises(ValueError, match="model_state is for a recipe with a train_fn"):
        learn(RECIPE._replace(train_fn=None), PARAMS, model_state=STATE)
    own = RECIPE._replace(train_fn=lambda params, state, x, key: (apply_fn(params, state, x), {**state, "mean": x}))
    with pytest.raises(ValueError, match=r"The model state that loss_fn returns must be the same for all examples"):
        learn(own, PARAMS, model_state=STATE)
    with pytest.raises(ValueError, match=r"model state that recipe\.train_fn returns and model_state must be trees of"):
        learn(RECIPE._replace(train_fn=lambda p, s, x, k: (apply_fn(p, s, x), {})), PARAMS, model_state=STATE)
    with pytest.raises(ValueError, match="the optimiser needs the loss of the network as it predicts"):
        plain = lambda params, state, example, key: (jnp.sum(params["w"]), state)  # noqa: E731
        optimizer = methods.rwalk().wrap_optimizer(optax.sgd(0.1))
        state = init_training(optimizer, PARAMS, KEY, ())
        learn_task(plain, optimizer, state, init_consolidation(PARAMS), BATCH, num_epochs=1, batch_size=3)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_means_over_the_batch_inside_of_calls_and_scans(wrap):
    weights = jnp.array([1.0, 0, 2, 1])
    xs = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)

    def network(x):
        def layer(carry, scale):
            return carry - scale * jax.lax.pmean(carry, "batch"), jax.lax.pmax(carry, "batch")

        return wrap(lambda x: jax.lax.scan(layer, x, jnp.array([0.5, 2.0])))(x)

    found, _ = jax.vmap(lambda x, w: weigh_means(network, w, x), axis_name="batch")(xs, weights)
    expected = xs
    for scale in (0.5, 2.0):
        expected = expected - scale * (weights @ expected) / 4.0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_means_that_cannot_be_weighted_are_refused():
    run = jax.vmap(lambda f, w: weigh_means(lambda x: jax.lax.all_gather(x, "batch").sum(), w, f), axis_name="batch")
    with pytest.raises(ValueError, match="uses all_gather over the axis 'batch', which padding would enter"):
        run(jnp.ones(3), jnp.ones(3))
    branch = lambda x: jax.lax.cond(x.sum() > 0, lambda x: jax.lax.pmean(x, "batch"), lambda x: x, x)  # noqa: E731
    with pytest.raises(ValueError, match="mean over the axis 'batch' inside of cond"):
        jax.vmap(lambda x, w: weigh_means(branch, w, x), axis_name="batch")(jnp.ones(3), jnp.ones(3))
