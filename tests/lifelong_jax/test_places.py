"""Arrays on other devices than the rest, or on another mesh: an error names them, and says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lifelong_jax import (
    SweepRun,
    evaluate,
    init_consolidation,
    init_training,
    learn_sweep,
    learn_task,
    learn_tasks,
    mas_importance,
    methods,
)
from lifelong_jax.datasets.sources import ArraySource
from lifelong_jax.losses import cross_entropy
from lifelong_jax.streaming import learn_stream, mean_over_stream
from tests import problems

KEY, RECIPE = jax.random.key(0), problems.RECIPE._replace(num_epochs=1)
OPTIMIZER, LOSS = optax.sgd(0.1), cross_entropy(problems.apply_fn)


def make_mesh(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def place(tree, mesh, *axes):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))


def alone(tree):
    return jax.device_put(tree, jax.devices()[3])


MESH, OTHER = make_mesh(data=4), make_mesh(data=2, model=2)
PARAMS = problems.make_params()
BATCH = place(problems.make_batch(24), MESH, "data")
TASK = problems.make_tasks(1)[0]._replace(train=BATCH, test=BATCH)


def learn(state, consolidation=None, weights=None):
    consolidation = consolidation or init_consolidation(state.params)
    return learn_task(LOSS, OPTIMIZER, state, consolidation, BATCH, num_epochs=1, batch_size=8, weights=weights)


def start(params):
    return init_training(OPTIMIZER, params, KEY)


def stream(params):
    state = start(params)
    source, sharding = ArraySource(*problems.make_arrays(8)), NamedSharding(MESH, PartitionSpec("data"))
    options = {"num_epochs": 1, "batch_size": 4, "sharding": sharding}
    return learn_stream(LOSS, OPTIMIZER, state, init_consolidation(PARAMS), source, **options)


def mean(params):
    source, sharding = ArraySource(*problems.make_arrays(8)), NamedSharding(MESH, PartitionSpec("data"))
    return mean_over_stream(lambda params, batch, key: params, params, source, batch_size=4, sharding=sharding)


def mas(params, **options):
    return mas_importance(problems.apply_fn, params, BATCH.inputs, **options)


def learn_one(task, params=PARAMS):
    return learn_tasks(methods.mas(), RECIPE, params, [task], KEY, strength=0.0)


def sweep(params):
    whole = place(problems.make_batch(24), MESH)
    task = TASK._replace(train=whole, test=whole)
    return learn_sweep(methods.mas(), RECIPE, [SweepRun(params, [task], KEY, 0.0)] * 2)


APART = {
    "weights is on device 3, but params": lambda: mas(place(PARAMS, MESH), weights=alone(BATCH.weights)),
    "examples is on devices 0 to 3, in Mesh": lambda: mas(on_model_axis(PARAMS)),
    "weights is on device 3, but state.params": lambda: learn(start(place(PARAMS, MESH)), weights=alone(BATCH.weights)),
    "examples.inputs is on devices 0 to 3": lambda: learn(start(alone(PARAMS))),
    "consolidation.anchor['w1'] is on device 3": lambda: learn(
        start(place(PARAMS, MESH)), init_consolidation(alone(PARAMS))
    ),
    "tasks[0].test.inputs is on device 3": lambda: learn_one(TASK._replace(test=alone(BATCH))),
    "tasks[0].permutation is on device 3": lambda: learn_one(TASK._replace(permutation=alone(TASK.permutation))),
    "params['w1'] is on devices 0 to 3, in Mesh": lambda: learn_one(TASK, on_model_axis(PARAMS)),
    "test.inputs is on devices 0 to 3": lambda: evaluate(problems.apply_fn, alone(PARAMS), [TASK]),
    "runs[0].tasks[0].train.inputs is on devices 0 to 3": lambda: sweep(alone(PARAMS)),
    "state.params['w1'] is on devices 0 to 3, in Mesh": lambda: stream(on_model_axis(PARAMS)),
    "state['w1'] is on devices 0 to 3, in Mesh": lambda: mean(on_model_axis(PARAMS)),
}


def on_model_axis(params):
    return jax.tree.map(lambda leaf: place(leaf, OTHER, *[None] * (leaf.shape[0] % 2), "model"), params)


@pytest.mark.parametrize("start_of_message", APART)
def test_arrays_apart_are_named(start_of_message):
    with pytest.raises(ValueError, match="place all arrays on one mesh") as error:
        APART[start_of_message]()
    assert str(error.value).startswith(start_of_message)


def test_what_has_no_place_or_is_whole_goes_with_the_rest():
    expected = mas_importance(problems.apply_fn, PARAMS, np.asarray(BATCH.inputs), weights=np.asarray(BATCH.weights))
    for weights in (np.asarray(BATCH.weights), jnp.ones(24), place(BATCH.weights, OTHER)):
        found = mas(place(PARAMS, OTHER), weights=weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
    learned = learn_tasks(methods.ewc("sampled"), RECIPE, alone(PARAMS), [TASK], alone(KEY), strength=0.0)
    assert learned.params["w1"].sharding.mesh == MESH


def test_an_array_on_explicit_axes_that_a_network_closes_over_is_explained():
    mesh = make_mesh(AxisType.Explicit, data=4)
    scale = place(jnp.ones(problems.NUM_CLASSES), mesh)

    def scaled(params, x):
        return problems.apply_fn(params, x) * scale

    inputs = place(np.asarray(BATCH.inputs), mesh, "data")
    with pytest.raises((ValueError, NotImplementedError)) as error:
        mas_importance(scaled, place(PARAMS, mesh), inputs)
    assert any("An array that it closes over must not be on explicit axes" in note for note in error.value.__notes__)
    scale = np.asarray(scale)
    mas_importance(scaled, place(PARAMS, mesh), inputs)
