"""The loops on four devices: the same numbers as on one, each device its own part, and the state where it was."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lifelong_jax import (
    Batch,
    Consolidation,
    Recipe,
    SweepRun,
    _epochs,
    add_quadratic_penalty,
    evaluation,
    init_consolidation,
    init_training,
    learn_jointly,
    learn_sweep,
    learn_task,
    learn_tasks,
    mas_importance,
    methods,
    streaming,
    sweep,
)
from lifelong_jax._numerics import pad
from lifelong_jax._process_rows import own_rows, rows_of_batches
from lifelong_jax._split_batches import find_shardings
from lifelong_jax.datasets.sources import ArraySource, ScaledSource
from lifelong_jax.losses import cross_entropy
from lifelong_jax.objectives import CLASSIFICATION
from lifelong_jax.tasks import place_batch
from tests import problems
from tests.programs import collectives

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
NUM_EXAMPLES, NUM_PADDING = 24, 3
OPTIMIZER = optax.chain(add_quadratic_penalty(0.3), optax.sgd(0.05, momentum=0.9))
KEY = jax.random.key(1)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make_mesh(kind, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def place(tree, mesh, *axes):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))


def assert_equal(tree, expected, tolerance=1e-12):
    chex.assert_trees_all_close(*jax.device_get((tree, expected)), rtol=tolerance, atol=tolerance)


def assert_sharded_alike(tree, like):
    jax.tree.map(
        lambda leaf, other: chex.assert_equal(leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim), True),
        tree,
        like,
    )


def network_loss(params, example):
    x, y, is_used = example
    outputs = jnp.tanh(x @ params["w1"] + params["b"]) @ params["w2"]
    return jnp.where(is_used, 1.0, 0.5) * jnp.sum((outputs - y.astype(outputs.dtype)) ** 2)


def make_params():
    random = np.random.default_rng(0)
    return {"w1": random.normal(size=(6, 8)), "b": random.normal(size=8), "w2": random.normal(size=(8, 3))}


def make_examples(num_examples=NUM_EXAMPLES, num_padding=NUM_PADDING):
    """Floats, integers and bools; the padding is NaN."""
    random = np.random.default_rng(1)
    inputs = random.normal(size=(num_examples, 6))
    weights = np.arange(num_examples) < num_examples - num_padding
    inputs[~weights] = np.nan
    examples = (inputs, random.integers(3, size=(num_examples, 3)), random.integers(2, size=num_examples) > 0)
    return examples, weights * random.uniform(1, 2, size=num_examples)


def start(params):
    params = jax.tree.map(jnp.asarray, params)
    return init_training(OPTIMIZER, params, KEY), Consolidation(params, jax.tree.map(jnp.ones_like, params))


def learn(state, consolidation, examples, weights, batch_size):
    options = {"num_epochs": 2, "batch_size": batch_size, "weights": weights}
    return learn_task(network_loss, OPTIMIZER, state, consolidation, examples, **options)


@functools.cache
def learned_on_one_device(batch_size, num_examples=NUM_EXAMPLES):
    arguments = (*start(make_params()), *make_examples(num_examples))
    return jax.device_get(jax.jit(functools.partial(learn, batch_size=batch_size))(*arguments))


def on_fsdp(params, mesh):
    return {
        "w1": place(params["w1"], mesh, None, "data"),
        "b": place(params["b"], mesh),
        "w2": place(params["w2"], mesh, "data"),
    }


def on_model_axis(params, mesh):
    return {
        "w1": place(params["w1"], mesh, None, "model"),
        "b": place(params["b"], mesh, "model"),
        "w2": place(params["w2"], mesh, "model"),
    }


@pytest.mark.parametrize(
    ("kind", "sizes", "axes", "place_params", "batch_size", "under_jit"),
    [
        (AUTO, {"data": 4}, "data", place, 5, False),
        (AUTO, {"data": 4}, "data", on_fsdp, 2, False),
        (AUTO, {"data": 2, "model": 2}, "data", on_model_axis, 5, False),
        (EXPLICIT, {"data": 4}, "data", on_fsdp, 5, True),
        pytest.param(EXPLICIT, {"data": 4}, "data", on_fsdp, 2, False, marks=pytest.mark.slow),
        (EXPLICIT, {"data": 2, "model": 2}, "data", on_model_axis, 5, True),
        (EXPLICIT, {"a": 2, "b": 2}, ("a", "b"), place, 5, True),
        (EXPLICIT, {"data": 2, "model": 2}, None, on_model_axis, 5, True),  # the examples are whole on each device
    ],
)
def test_a_task_on_a_mesh_is_learned_as_on_one_device(kind, sizes, axes, place_params, batch_size, under_jit):
    mesh = make_mesh(kind, **sizes)
    state, consolidation = start(place_params(make_params(), mesh))
    examples, weights = place(make_examples(), mesh, axes)
    function = functools.partial(learn, batch_size=batch_size)
    found = (jax.jit(function) if under_jit else function)(state, consolidation, examples, weights)
    expected = learned_on_one_device(batch_size)
    assert_equal(
        (found[0].params, found[0].opt_state, found[1]), (expected[0].params, expected[0].opt_state, expected[1])
    )
    assert_sharded_alike((found[0].params, found[0].opt_state), (state.params, state.opt_state))


def test_fewer_examples_than_devices_may_be_learned():
    mesh = make_mesh(AUTO, data=4)
    examples, weights = place(make_examples(4), mesh, "data")  # three of four are padding
    found = learn(*start(place(make_params(), mesh)), examples, weights, batch_size=1)
    assert found[1].num_steps.tolist() == [1, 1]
    assert_equal(found[0].params, learned_on_one_device(1, 4)[0].params)


def test_means_over_a_batch_are_over_all_of_it():
    def loss_fn(params, mean, x, key):
        centred = x - jax.lax.pmean(x, "batch")
        noise = 1 + 0.1 * jax.random.normal(key, centred.shape)
        return jnp.sum((params * centred * noise - 1) ** 2), 0.9 * mean + 0.1 * jax.lax.pmean(x, "batch")

    (inputs, *_), weights = make_examples()
    sgd = optax.sgd(0.05)

    def learn_centred(inputs, weights):
        state = init_training(sgd, jnp.ones(6), KEY, model_state=jnp.zeros(6))
        none = init_consolidation(state.params)
        return learn_task(loss_fn, sgd, state, none, inputs, num_epochs=1, batch_size=5, weights=weights)[0]

    found = learn_centred(*place((inputs, weights), make_mesh(AUTO, data=4), "data"))
    expected = jax.jit(learn_centred)(inputs, weights)
    assert_equal((found.params, found.model_state), (expected.params, expected.model_state))


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_inside_of_a_shard_map_each_device_learns_its_own_examples(check_vma):
    mesh, params = make_mesh(AUTO, data=4), make_params()
    examples, weights = make_examples(8, 0)

    def learn_part(examples, weights):
        state, _ = learn(*start(params), examples, weights, batch_size=1)
        return jax.tree.map(lambda leaf: leaf[None], state.params)

    shard = PartitionSpec("data")
    learn_parts = jax.shard_map(learn_part, mesh=mesh, in_specs=shard, out_specs=shard, check_vma=check_vma)
    found = jax.jit(learn_parts)(examples, weights)
    alone = learn_part(jax.tree.map(lambda leaf: leaf[2:4], examples), weights[2:4])
    assert_equal(jax.tree.map(lambda leaf: leaf[1:2], found), alone)


WIDE = Recipe(problems.apply_fn, problems.coupled_sgd, num_epochs=1, batch_size=64)


def compile_epoch(place_params, place_examples):
    """Compiles an epoch of a network that is wide enough for its products to be nearly all of the work."""
    random = np.random.default_rng(0)
    params = {"w1": np.float32(random.normal(size=(32, 256))), "w2": np.float32(random.normal(size=(256, 8)))}
    examples = Batch(np.float32(random.normal(size=(256, 32))), np.arange(256) % 8, None)
    params, examples = place_params(params), place_examples(examples)
    state = init_training(problems.coupled_sgd(jnp.float32(1)), params, KEY)
    data = _epochs.TrainingData(examples, None)
    shardings = find_shardings(state, examples)
    consolidation = Consolidation(params, jax.tree.map(jnp.ones_like, params))
    arguments = (WIDE, None, state, consolidation, jnp.float32(1), data)
    return _epochs.learn_epoch.lower(*arguments, shardings=shardings).compile()


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kind", [AUTO, pytest.param(EXPLICIT, marks=pytest.mark.slow)])
def test_each_device_computes_its_part_of_a_batch_and_gradients_are_summed_once(kind):
    mesh = make_mesh(kind, data=4)
    alone = compile_epoch(jax.device_put, jax.device_put)
    split = compile_epoch(lambda params: place(params, mesh), lambda examples: place(examples, mesh, "data"))
    assert split.cost_analysis()["flops"] < 0.3 * alone.cost_analysis()["flops"]
    sent = collectives(split.as_text())
    assert not any(re.search(r"\[256,32\]", shapes) and name == "all-gather" for name, shapes in sent)
    of_gradients = [name for name, shapes in sent if re.search(r"\[(32,256|256,32)\]", shapes)]
    assert of_gradients == ["all-reduce"]
    assert [name for name, shapes in sent if "f32[64,32]" in shapes] == ["all-reduce"]  # the batch, from where it is
    assert {name for name, _ in sent} <= {"all-reduce", "all-gather"} and len(sent) <= 4


@pytest.mark.parametrize("kind", [AUTO, pytest.param(EXPLICIT, marks=pytest.mark.slow)])
def test_a_sharded_state_is_donated_and_keeps_its_shardings(kind):
    mesh = make_mesh(kind, data=4)
    tasks = on_mesh(problems.make_tasks(1, 24, 12), mesh)
    params = {
        "w1": place(problems.make_params()["w1"], mesh, None, "data"),
        "w2": place(problems.make_params()["w2"], mesh),
    }
    states = []
    learned = learn_tasks(
        methods.l2(), RECIPE, params, tasks, KEY, strength=0.1, callback=lambda state, _: states.append(state.training)
    )  # a buffer that is donated in vain is a warning, and so an error
    assert states[0].params["w1"].is_deleted()
    assert_sharded_alike((learned.params, learned.consolidation.importance), (params, params))
    assert not params["w1"].is_deleted()


RECIPE = problems.RECIPE._replace(batch_size=7)


def on_mesh(tasks, mesh):
    """Places examples over the axis "data", and nothing else."""
    parts = [place((task.train, task.test, task.validation), mesh, "data") for task in tasks]
    return [
        task._replace(train=train, test=test, validation=validation)
        for task, (train, test, validation) in zip(tasks, parts, strict=True)
    ]


def learn_sequence(tasks, recipe=RECIPE, learn=learn_tasks, num_classes=problems.NUM_CLASSES, method=None):
    params = problems.make_params(num_classes)
    if learn is learn_jointly:
        return learn_jointly(recipe, params, tasks, KEY)
    return learn_tasks(method or methods.ewc(), recipe, params, tasks, KEY, strength=1.0)


@pytest.mark.parametrize(
    ("learn", "kind"),
    [
        (learn_tasks, AUTO),
        pytest.param(learn_tasks, EXPLICIT, marks=pytest.mark.slow),
        pytest.param(learn_jointly, AUTO, marks=pytest.mark.slow),
        (learn_jointly, EXPLICIT),
    ],
)
def test_sequences_on_a_mesh_are_learned_as_on_one_device(learn, kind):
    tasks = problems.make_tasks(2, 24, 12)
    tasks = [task._replace(validation=task.test) for task in tasks]
    recipe = RECIPE._replace(patience=1)
    found = learn_sequence(on_mesh(tasks, make_mesh(kind, data=4)), recipe, learn)
    expected = learn_sequence(tasks, recipe, learn)
    assert_equal(
        (found.params, found.consolidation, found.accuracy_matrix),
        (expected.params, expected.consolidation, expected.accuracy_matrix),
    )


def on_fsdp_of_a_sequence(params, mesh):
    return {name: place(leaf, mesh, None, "data") for name, leaf in params.items()}


def test_tasks_with_class_masks_are_joined_on_explicit_axes():
    """The masks are on no mesh, and of weights, one task has other ones than the next."""
    tasks = problems.make_split_tasks([[0, 1], [2, 3, 4]])
    tasks[0] = tasks[0]._replace(train=tasks[0].train._replace(weights=tasks[0].train.weights.astype(jnp.float32)))
    recipe = RECIPE._replace(scenario="class", num_epochs=1)
    for mesh in (make_mesh(EXPLICIT, data=4), jax.make_mesh((2, 2), ("a", "b"), axis_types=(EXPLICIT, AUTO))):
        by_example = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        placed = [
            task._replace(train=place_batch(task.train, by_example), test=place_batch(task.test, by_example))
            for task in tasks
        ]
        found, expected = (
            learn_jointly(recipe, problems.make_params(5), of, KEY) for of in (placed, jax.device_get(placed))
        )
        assert_equal((found.params, found.accuracy_matrix), (expected.params, expected.accuracy_matrix))


@pytest.mark.parametrize("name", ["exact", "empirical"])
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_labels_are_weighed_where_fewer_examples_than_devices_are_padded(kind, name):
    random = np.random.default_rng(0)
    tokens, label_weights = random.integers(3, size=(3, 5)), random.uniform(size=(3, 5)) * [0, 1, 0, 1, 1]
    batch = jax.device_put(Batch(random.normal(size=(3, 5, 6)), tokens, label_weights=label_weights))
    placed = place_batch(batch, NamedSharding(make_mesh(kind, data=4), PartitionSpec("data")))
    params = problems.make_params()
    measure = functools.partial(methods.ewc(name).importance_fn, problems.apply_fn, CLASSIFICATION)
    states = [init_training(OPTIMIZER, of, KEY) for of in (place(params, placed.inputs.sharding.mesh), params)]
    assert_equal(measure(states[0], placed, None), measure(states[1], batch, None))


METHODS = {method.name: method for method in (methods.mas(), methods.si(), methods.rwalk(interval=2), methods.kfac())}


@pytest.mark.parametrize("place_params", [place, on_fsdp_of_a_sequence])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_a_mesh_has_the_numbers_of_one_device(name, place_params):
    tasks, mesh = problems.make_tasks(2, 24, 12), make_mesh(AUTO, data=4)
    recipe = RECIPE._replace(optimizer_fn=problems.proximal_sgd, num_epochs=1)
    run = functools.partial(learn_tasks, METHODS[name], recipe, key=KEY, strength=0.1)
    found = run(params=place_params(problems.make_params(4), mesh), tasks=on_mesh(tasks, mesh))
    expected = run(params=problems.make_params(4), tasks=tasks)
    assert_equal((found.params, found.accuracy_matrix), (expected.params, expected.accuracy_matrix), 1e-10)


def test_what_a_network_closes_over_may_be_on_explicit_axes():
    """Running averages, and a permutation that was placed with the examples."""

    def train_fn(params, averages, x, key):
        mean = jax.lax.pmean(x, "batch")
        return problems.apply_fn(params, x - mean), 0.9 * averages + 0.1 * mean

    recipe = RECIPE._replace(
        apply_fn=lambda params, averages, x: problems.apply_fn(params, x - averages), train_fn=train_fn, num_epochs=1
    )
    tasks, mesh = problems.make_tasks(2, 24, 12), make_mesh(EXPLICIT, data=4)
    placed = [task._replace(permutation=place(task.permutation, mesh)) for task in on_mesh(tasks, mesh)]
    options = {"strength": 1.0, "model_state": jnp.zeros(problems.NUM_FEATURES)}
    found, expected = (
        learn_tasks(methods.ewc(), recipe, problems.make_params(), of, KEY, **options) for of in (placed, tasks)
    )
    assert_equal(
        (found.training.model_state, found.consolidation), (expected.training.model_state, expected.consolidation)
    )


@pytest.mark.parametrize("kind", [EXPLICIT, pytest.param(AUTO, marks=pytest.mark.slow)])
def test_an_epoch_is_compiled_once_for_all_tasks_on_a_mesh(kind, caplog):
    tasks = on_mesh(problems.make_tasks(2, 24, 12), make_mesh(kind, data=4))
    fresh = RECIPE._replace(optimizer_fn=functools.partial(problems.coupled_sgd))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        learn_sequence(tasks, fresh, method=methods.l2())
    assert sum("Compiling jit(learn_epoch)" in message for message in caplog.messages) == 1


@pytest.mark.slow
def test_tasks_with_class_masks_on_a_mesh_are_learned_as_on_one_device():
    tasks = problems.make_split_tasks([[0, 1], [2, 3, 4]])
    num_train = max(len(task.train.labels) for task in tasks)
    tasks = [
        task._replace(train=pad(task.train, num_train + -num_train % 4), test=pad(task.test, 20)) for task in tasks
    ]
    recipe = RECIPE._replace(scenario="class")
    found = learn_sequence(on_mesh(tasks, make_mesh(AUTO, data=4)), recipe, num_classes=5, method=methods.l2())
    expected = learn_sequence(tasks, recipe, num_classes=5, method=methods.l2())
    assert_equal((found.params, found.accuracy_matrix), (expected.params, expected.accuracy_matrix))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize("method", [methods.ewc(), methods.kfac()], ids=["ewc", "kfac"])
def test_each_device_measures_its_part_of_an_importance_and_sums_are_added_once(method, kind):
    mesh = make_mesh(kind, data=4)
    (task,) = on_mesh(problems.make_tasks(1, 24, 12), mesh)
    params = jax.tree.map(jnp.asarray, place(problems.make_params(), mesh))
    state, data = (
        init_training(problems.coupled_sgd(jnp.float32(1)), params, KEY),
        _epochs.TrainingData(task.train, None),
    )
    measure = _epochs.measuring(method, RECIPE, state, data)
    compiled = measure.func.lower(*measure.args, state, data, KEY, **measure.keywords).compile()
    large = [name for name, shapes in collectives(compiled.as_text()) if re.search(r"\[\d+,\d+", shapes)]
    assert large == ["all-reduce"]


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_the_importance_of_a_sharded_network_is_sharded_as_it_is(kind):
    mesh = make_mesh(kind, data=4)
    tasks = on_mesh(problems.make_tasks(1, 24, 12), mesh)
    params = {name: place(leaf, mesh, None, "data") for name, leaf in problems.make_params(4).items()}
    learned = []
    keep = lambda state, progress: learned.append(progress.learned)  # noqa: E731
    learn_tasks(methods.ewc(), RECIPE._replace(num_epochs=1), params, tasks, KEY, strength=0.1, callback=keep)
    assert_sharded_alike(learned[0].importance, params)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_each_device_evaluates_its_part_of_a_test_set(kind, monkeypatch):
    monkeypatch.setattr(evaluation, "_MAX_EXAMPLES", 5)  # of 4 · 14: parts that overlap
    mesh, params, test = make_mesh(kind, data=4), problems.make_params(), problems.make_batch(56)

    expected = evaluation.score(problems.apply_fn, params, test, None, None)
    sharded = (place(params, mesh), place(test, mesh, "data"))
    assert_equal(evaluation.score(problems.apply_fn, *sharded, None, None), expected)
    arguments = (problems.apply_fn, problems.RECIPE.objective, evaluation.batch_sharding(sharded[1]))
    program = evaluation._score.lower(*arguments, *sharded, None, None, None).compile()
    assert {name for name, _ in collectives(program.as_text())} == {"all-reduce"}


def make_runs(tasks, place_params=lambda params: params):
    """Six runs of two seeds, which differ in parameters, keys and strengths."""
    starts = [place_params(problems.make_params(seed=seed)) for seed in range(2)]
    return [SweepRun(starts[i % 2], tasks, jax.random.key(i % 3), 0.5 * i) for i in range(6)]


@pytest.mark.parametrize(
    ("kind", "sizes", "axes", "place_params"),
    [
        (AUTO, {"runs": 4}, None, lambda params, mesh: params),
        (EXPLICIT, {"runs": 2, "data": 2}, "data", place),
        pytest.param(
            EXPLICIT,
            {"runs": 2, "model": 2},
            None,
            lambda params, mesh: place(params, mesh, "model", None),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_sweep_on_a_mesh_has_the_numbers_of_one_device(kind, sizes, axes, place_params):
    mesh, tasks = make_mesh(kind, **sizes), problems.make_tasks(2, 24, 12)
    batches = place((tasks[0].train, tasks[0].test), mesh, axes)
    placed = [task._replace(train=batches[0], test=batches[1]) for task in tasks]
    runs = make_runs(placed, lambda params: place_params(params, mesh))
    found = learn_sweep(methods.l2(), RECIPE, runs)
    assert_equal(found, swept_on_one_device())


@functools.cache
def swept_on_one_device():
    return learn_sweep(methods.l2(), RECIPE, make_runs(problems.make_tasks(2, 24, 12)))


def test_nothing_is_sent_while_each_device_learns_its_runs(monkeypatch):
    mesh, tasks = make_mesh(AUTO, runs=4), problems.make_tasks(2, 24, 12)
    train = place(tasks[0].train, mesh)
    learn_runs, programs = sweep._learn_runs, []

    def spy(*arguments, **options):
        programs.append(learn_runs.lower(*arguments, **options).compile().as_text())
        return learn_runs(*arguments, **options)

    monkeypatch.setattr(sweep, "_learn_runs", spy)
    learn_sweep(methods.l2(), RECIPE, make_runs([task._replace(train=train) for task in tasks]))
    (program,) = programs
    assert "while(" in program
    assert not collectives(program[: program.index("ENTRY")])
    assert {name for name, _ in collectives(program)} == {"all-gather"}  # of the accuracies, at the end


PIXELS = np.random.default_rng(0).integers(256, size=(11, 2, 2, 1), dtype=np.uint8)
SOURCE = ScaledSource(ArraySource(PIXELS, np.arange(11) % 3))


def linear(params, x):
    return x.ravel().astype(params.dtype) @ params


LINEAR_LOSS = cross_entropy(linear)


def measure(params, batch, key):
    return mas_importance(linear, params, batch.inputs, weights=batch.weights), jnp.average(
        batch.labels.astype(float), weights=batch.weights.astype(float)
    )


def learn_stream(sharding, params, batch_size):
    state = init_training(OPTIMIZER, params, KEY)
    consolidation = Consolidation(jax.tree.map(jnp.ones_like, params), jax.tree.map(jnp.ones_like, params))
    options = {"num_epochs": 2, "batch_size": batch_size, "sharding": sharding}
    state, info = streaming.learn_stream(LINEAR_LOSS, OPTIMIZER, state, consolidation, SOURCE, **options)
    mean = streaming.mean_over_stream(measure, params, SOURCE, batch_size=batch_size, sharding=sharding)
    return state, info, mean


@pytest.mark.parametrize(
    ("kind", "axes", "batch_size"),
    [(AUTO, (), 5), (EXPLICIT, ("data",), 5), pytest.param(AUTO, ("data",), 99, marks=pytest.mark.slow)],
)
def test_a_stream_on_a_mesh_is_learned_as_on_one_device(kind, axes, batch_size):
    mesh = make_mesh(kind, data=4)
    params = jnp.linspace(-1, 1, 12).reshape(4, 3)
    placed = place(params, mesh, *axes)
    state, info, mean = learn_stream(NamedSharding(mesh, PartitionSpec("data")), placed, batch_size)
    expected, expected_info, expected_mean = learn_stream(None, params, batch_size)
    assert_equal((state.params, state.opt_state, info), (expected.params, expected.opt_state, expected_info))
    assert_equal(mean, expected_mean, 1e-6)  # weights are in float32
    assert_sharded_alike((state.params, state.opt_state), (placed, jax.tree.map(lambda _: placed, expected.opt_state)))


def test_batches_of_a_stream_are_sharded_over_one_axis_alone():
    mesh = make_mesh(AUTO, data=4)
    (first, *_) = streaming.stream_batches(SOURCE, 5, sharding=NamedSharding(mesh, PartitionSpec("data")))
    assert first.inputs.shape == (8, 2, 2, 1)
    assert first.inputs.sharding.shard_shape(first.inputs.shape) == (2, 2, 2, 1)
    assert first.weights.tolist() == [1] * 5 + [0] * 3
    with pytest.raises(ValueError, match="how the examples' axis is sharded, and nothing else"):
        next(streaming.stream_batches(SOURCE, 5, sharding=NamedSharding(mesh, PartitionSpec(None, "data"))))


class OfTwoProcesses(NamedSharding):
    """A sharding of which this process seems to have half of the devices."""

    first = 0
    is_fully_addressable = False

    def addressable_devices_indices_map(self, global_shape):
        indices = self.devices_indices_map(global_shape)
        return dict(list(indices.items())[self.first : self.first + 2])


@pytest.mark.parametrize("batch_size", [4, 5, 99])
def test_each_process_reads_its_own_rows(batch_size, monkeypatch):
    sharding = OfTwoProcesses(make_mesh(AUTO, data=4), PartitionSpec("data"))
    reads, parts = [], []

    class Source(ScaledSource):
        def __getitem__(self, index):
            reads.append(int(index))
            return super().__getitem__(index)

    monkeypatch.setattr(streaming, "place_rows", lambda tree, sharding, rows, size: tree)
    for sharding.first in (0, 2):
        source = Source(ArraySource(PIXELS, np.arange(11) % 3))
        parts.append(list(streaming._numbered_batches(source, batch_size, KEY, sharding)))
        assert len(reads) - 1 == sum(len(indices) for indices, _ in parts[-1])  # and one, for its shape
        reads.clear()
    real = NamedSharding(sharding.mesh, sharding.spec)
    whole = streaming._numbered_batches(SOURCE, batch_size, KEY, real)
    for first, second, expected in zip(*parts, whole, strict=True):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), first, second)
        chex.assert_trees_all_equal(joined, jax.device_get(expected))


def test_rows_of_processes_and_of_padded_batches():
    assert own_rows(OfTwoProcesses(make_mesh(AUTO, data=4), PartitionSpec("data")), 8).tolist() == [0, 1, 2, 3]
    two_copies = OfTwoProcesses(make_mesh(AUTO, data=2, model=2), PartitionSpec("data"))
    assert own_rows(two_copies, 8).tolist() == [0, 1, 2, 3]
    positions, counted = rows_of_batches(5, 3, 4)
    assert positions.tolist() == [[0, 1, 2, 0], [3, 4, 3, 4]]
    assert counted.tolist() == [[True, True, True, False], [True, True, False, False]]


def test_an_example_of_weight_0_is_refused_where_processes_read_their_own():
    class Weighted(ScaledSource):
        def __getitem__(self, index):
            return super().__getitem__(index)._replace(weights=np.float32(index != 1))

    sharding = OfTwoProcesses(make_mesh(AUTO, data=4), PartitionSpec("data"))
    source = Weighted(ArraySource(PIXELS, np.arange(11) % 3))
    with pytest.raises(ValueError, match="examples of weight 0"):
        list(streaming._numbered_batches(source, 99, None, sharding))
