"""What is refused before anything is computed, and in which words."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lifelong_jax import (
    Consolidation,
    SweepRun,
    Task,
    _checks,
    consolidate,
    evaluate,
    fisher_diagonal,
    forms,
    init_consolidation,
    init_sequence,
    init_training,
    kronecker_fisher,
    learn_jointly,
    learn_sweep,
    learn_task,
    learn_tasks,
    merge,
    methods,
    normalize_importance,
    pad_tasks,
)
from lifelong_jax._layouts import Layout
from lifelong_jax.consolidation import compress_consolidation
from lifelong_jax.importance import importance_from_adam
from lifelong_jax.losses import cross_entropy
from lifelong_jax.merging import merge_models
from tests.problems import RECIPE, apply_fn, make_batch, make_params, proximal_sgd

BATCH = make_batch(9)
KEY = jax.random.key(0)


def start(tasks, *, network=apply_fn, params=None):
    """The state before the first task: everything is checked, and nothing is learned."""
    params = make_params() if params is None else params
    return init_sequence(methods.ewc(), RECIPE._replace(apply_fn=network), params, tasks, KEY, strength=0.0)


def one_task(**fields):
    batch = BATCH._replace(**fields)
    return [Task(batch, batch)]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (np.zeros((9, 1), int), ValueError, r"labels has shape \(1,\) for one.* Use labels\[:, 0\] for a column"),
        (np.eye(9, 3), ValueError, r"labels has shape \(3,\) for one.* labels\.argmax\(axis=1\) for one-hot"),
        ([0] * 9, TypeError, r"labels\[0\] is a int, not an array: .* by np\.asarray"),
        (np.zeros(9), TypeError, "labels has dtype float64, but labels must be integers"),
    ],
)
def test_labels_are_one_integer_per_example(labels, error, message):
    with pytest.raises(error, match=rf"tasks\[0\]\.train\.{message}"):
        start(one_task(labels=labels))
    good = Task(BATCH, BATCH)
    for tasks in (
        [Task(BATCH, BATCH._replace(labels=labels))],
        [good, good._replace(test=BATCH._replace(labels=labels))],
    ):
        with pytest.raises(error, match=rf"tasks\[{len(tasks) - 1}\]\.test\.{message}"):
            evaluate(apply_fn, make_params(), tasks)


def test_inputs_that_are_lists():
    with pytest.raises(TypeError, match=r"tasks\[0\]\.train\.inputs\[0\]\[0\] is a float, not an array"):
        start(one_task(inputs=np.asarray(BATCH.inputs).tolist()))


@pytest.mark.parametrize(
    ("tasks", "kinds"),
    [
        (Task(BATCH, BATCH), "Batch"),
        ([(BATCH, BATCH)], "tuple"),
        ([Task(tuple(BATCH), BATCH)], "Task, tuple, Batch"),
    ],
)
def test_tasks_are_a_list_of_tasks_of_batches(tasks, kinds):
    with pytest.raises(TypeError, match=rf"tasks\[0\] must be a Task\(train, test\) of two Batch.*, not: {kinds}\."):
        start(tasks)


@functools.cache
def tasks_of_sizes():
    """Tasks of different sizes, some of them without weights."""
    small, large = make_batch(7, seed=3), make_batch(12, seed=4)
    return [Task(BATCH, large), Task(small._replace(weights=None), BATCH), Task(large, small._replace(weights=None))]


@pytest.mark.parametrize("name", ["ewc", "kfac", "si", "rwalk"])
def test_tasks_of_any_sizes_are_learned_as_they_are_one_by_one(name):
    """In full batches, whose order does not matter, padding changes nothing."""
    method, params, tasks = getattr(methods, name)(), make_params(), tasks_of_sizes()
    recipe = RECIPE._replace(batch_size=12, num_epochs=3)
    if name == "kfac":
        recipe = recipe._replace(optimizer_fn=proximal_sgd)
    learned, padded = (
        learn_tasks(method, recipe, params, some, KEY, strength=0.5) for some in (tasks, pad_tasks(tasks))
    )
    np.testing.assert_allclose(learned.params["w1"], padded.params["w1"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(learned.accuracy_matrix, padded.accuracy_matrix)


def test_tasks_of_any_sizes_are_learned_jointly():
    recipe, params = RECIPE._replace(batch_size=36, num_epochs=3), make_params()
    learned, padded = (
        learn_jointly(recipe, params, some, KEY) for some in (tasks_of_sizes(), pad_tasks(tasks_of_sizes()))
    )
    np.testing.assert_allclose(learned.params["w1"], padded.params["w1"], rtol=1e-4, atol=1e-5)


def test_a_sweep_is_told_how_to_pad_tasks_of_other_sizes():
    tasks = tasks_of_sizes()[:2]
    with pytest.raises(
        ValueError, match=r"runs\[0\]\.tasks\[1\]\.train\.inputs has shape \(7, 6\), .*tasks\.pad_tasks"
    ):
        learn_sweep(methods.finetune(), RECIPE, [SweepRun(make_params(), tasks, KEY, 0.0)])


def test_tasks_agree_in_all_but_their_sizes():
    narrow = make_batch(7)._replace(inputs=np.zeros((7, 5)))
    other = [
        (dict(class_mask=jnp.ones(3, bool)), ValueError, r"tasks\[0\] has no leaf \.class_mask"),
        (dict(permutation=jnp.arange(6)), ValueError, r"tasks\[0\] has no leaf \.permutation"),
        (
            dict(train=narrow),
            ValueError,
            r"tasks\[1\]\.train has shape \(5,\)",
        ),
        (dict(test=BATCH._replace(inputs=np.zeros((9, 6), np.uint8))), TypeError, r"tasks\[1\]\.test has dtype uint8"),
    ]
    for fields, error, message in other:
        with pytest.raises(error, match=message):
            start([Task(BATCH, BATCH), Task(BATCH, BATCH)._replace(**fields)])


def test_test_inputs_are_like_training_inputs():
    other = BATCH._replace(inputs=BATCH.inputs[:, :5])
    with pytest.raises(ValueError, match=r"an input of tasks\[0\]\.test has shape \(5,\), but .* has \(6,\)"):
        start([Task(BATCH, other)])


@pytest.mark.parametrize("num_classes", [0, 1])
def test_a_network_without_classes_or_with_one(num_classes):
    """With one class, every loss and every importance would be 0."""
    params = make_params(num_classes)
    example = jax.tree.map(lambda leaf: leaf[0], BATCH)
    for run in (
        lambda: start(one_task(labels=jnp.zeros(9, int)), params=params),
        lambda: evaluate(apply_fn, params, one_task(labels=jnp.zeros(9, int)), "domain"),
        lambda: cross_entropy(apply_fn)(params, example),
    ):
        with pytest.raises(ValueError, match=rf"with two classes or more, not arrays of shape \({num_classes},\)"):
            run()


@pytest.mark.parametrize("estimator", [fisher_diagonal, kronecker_fisher])
@pytest.mark.parametrize("sampling", [{}, {"num_samples": 1, "key": KEY}])
def test_the_categorical_fisher_of_one_logit_names_bernoulli(estimator, sampling):
    with pytest.raises(ValueError, match=r"of two classes or more, not \(1,\)\. For one .* likelihood='bernoulli'"):
        estimator(apply_fn, make_params(1), BATCH.inputs, **sampling)
    estimator(apply_fn, make_params(1), BATCH.inputs, likelihood="bernoulli", **sampling)


@pytest.mark.usefixtures("standard_promotion")
def test_a_network_for_batches_is_told_that_there_is_one_example():
    network = nn.Sequential([lambda x: x.reshape(x.shape[0], -1), nn.Dense(3)])
    params = network.init(KEY, BATCH.inputs)
    losses = cross_entropy(network.apply)
    state, none = init_training(optax.sgd(0.1), params, KEY), init_consolidation(params)
    for run in (
        lambda: start(one_task(), network=network.apply, params=params),
        lambda: evaluate(network.apply, params, one_task()),
        lambda: learn_task(losses, optax.sgd(0.1), state, none, BATCH, num_epochs=1, batch_size=9),
    ):
        with pytest.raises(Exception, match=r"one example, without batch axis, of shape .*\(6,\).*x\[None\]\)\[0\]"):
            run()
    start(one_task(), network=lambda params, x: network.apply(params, x[None])[0], params=params)


class Module:
    """Parameters and a function in one tree, as in equinox."""

    def __init__(self, weight, activation):
        self.weight, self.activation = weight, activation


jax.tree_util.register_dataclass(Module, data_fields=["weight", "activation"], meta_fields=[])


@pytest.mark.parametrize(
    "run",
    [
        lambda module: start(one_task(), network=lambda params, x: params.activation(x @ params.weight), params=module),
        lambda module: init_training(optax.sgd(0.1), module, KEY),
        lambda module: init_consolidation(module),
        lambda module: fisher_diagonal(lambda params, x: x @ params.weight, module, BATCH.inputs),
    ],
)
def test_a_whole_module_is_told_how_to_be_split(run):
    with pytest.raises(TypeError, match=r"params\.activation is a .*, not an array: .*eqx\.partition\(model"):
        run(Module(jnp.ones((6, 3)), jnp.tanh))


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))


class NormalisedInNnx(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)


@pytest.mark.parametrize(
    "run",
    [
        lambda tree: start(one_task(), params=tree),
        lambda tree: init_training(optax.sgd(0.1), tree, KEY),
        init_consolidation,
        lambda tree: consolidate(init_consolidation({}), tree, tree),
        lambda tree: fisher_diagonal(lambda params, x: x, tree, BATCH.inputs),
    ],
)
def test_running_statistics_are_no_parameters(run):
    variables = Normalised().init(KEY, jnp.ones(6))
    for tree, name in ((variables, "batch_stats'"), (nnx.state(NormalisedInNnx(nnx.Rngs(0))), "norm'.*mean'")):
        with pytest.raises(ValueError, match=rf"params\['{name}\].* is a running statistic of batch normalisation"):
            run(tree)


def test_parameters_beside_running_statistics_are_taken():
    variables = Normalised().init(KEY, jnp.ones(6))
    for params in (variables["params"], nnx.state(NormalisedInNnx(nnx.Rngs(0)), nnx.Param)):
        init_consolidation(params)


def test_weights_are_ones_where_there_are_none():
    params, tasks = make_params(), [Task(BATCH, BATCH), Task(make_batch(9, seed=1), BATCH)]
    bare = [Task(*(batch._replace(weights=None) for batch in task[:2])) for task in tasks]
    for learn in (
        lambda tasks: learn_tasks(methods.ewc(), RECIPE, params, tasks, KEY, strength=1.0),
        lambda tasks: learn_jointly(RECIPE, params, tasks, KEY),
    ):
        expected, learned = learn(tasks), learn(bare)
        np.testing.assert_allclose(learned.params["w1"], expected.params["w1"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(learned.accuracy_matrix, expected.accuracy_matrix)


def test_inputs_may_be_a_tree_of_arrays():
    params = make_params()

    def network(params, x):
        return apply_fn(params, jnp.concatenate([x["left"], x["right"]]))

    parts = BATCH._replace(inputs={"left": BATCH.inputs[:, :2], "right": BATCH.inputs[:, 2:]})
    recipe = RECIPE._replace(apply_fn=network)
    learned = learn_tasks(methods.ewc(), recipe, params, [Task(parts, parts)] * 2, KEY, strength=1.0)
    whole = learn_tasks(methods.ewc(), RECIPE, params, one_task() * 2, KEY, strength=1.0)
    np.testing.assert_allclose(learned.params["w1"], whole.params["w1"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(learned.accuracy_matrix, whole.accuracy_matrix)
    permuted = [Task(parts, parts, permutation=jnp.arange(6))]
    with pytest.raises(TypeError, match=r"tasks\[0\]\.permutation is for inputs that are one array, not a dict"):
        start(permuted, network=network)


# Arrays that a compiled function closes over are known, though all that is computed of them there is traced.


def all_that_check_values(importance):
    params, equal, one = jnp.ones(3), jnp.ones(3), jnp.ones(())
    kept, factored = (Consolidation(params, form) for form in (importance, factors(importance)))
    adam = optax.ScaleByAdamState(jnp.int32(1), params, importance)
    return {
        "consolidate": lambda: consolidate(kept, params, importance, decay=one, weight=one),
        "merge": lambda: merge([kept, kept], [one, one]),
        "merge around one anchor": lambda: merge([factored, factored._replace(anchor=equal)], [1, 1]),
        "merge_models": lambda: merge_models([params, params], [importance] * 2, floor=one, weights=[one, one]),
        "normalize_importance": lambda: normalize_importance(importance),
        "compress_consolidation": lambda: compress_consolidation(kept),
        "importance_from_adam": lambda: importance_from_adam(adam, batch_size=jnp.int32(4), b2=jnp.float32(0.9)),
    }


def factors(vector):
    return forms.from_factors(jnp.ones((1, 1)), jnp.diag(vector)[None], Layout((3,), (1, 3), (0, 1), (1, 1, 3)))


def test_what_a_compiled_function_closes_over_is_checked_as_it_is_outside():
    functions = all_that_check_values(jnp.array([0.0, 1.0, 2.0]))
    found = jax.jit(lambda: {name: function() for name, function in functions.items()})()
    chex.assert_trees_all_close(found, {name: function() for name, function in functions.items()}, rtol=1e-5)
    functions = all_that_check_values(jnp.array([0.0, -1.0, 2.0]))
    for name in ("consolidate", "merge", "merge_models", "normalize_importance", "compress_consolidation"):
        with pytest.raises(ValueError, match="NaN, infinite or negative"):
            jax.eval_shape(functions[name])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, jnp.bfloat16, np.float16, np.float32, np.complex64])
def test_numbers_that_are_not_finite_are_found_in_all_dtypes(dtype):
    entries = jnp.arange(6).reshape(2, 3).astype(dtype)
    assert _checks.is_finite({"w": entries, "none": jnp.zeros((0, 2))})
    if jnp.issubdtype(dtype, jnp.inexact):
        largest = jnp.full(9, jnp.finfo(dtype).max, dtype)
        assert _checks.is_finite(largest) and _checks.is_finite(-largest)
        assert not any(_checks.is_finite(entries.at[1, 2].set(value)) for value in (np.nan, np.inf, -np.inf))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        assert not _checks.is_finite(entries.at[1, 2].set(1j * np.inf))


def test_the_check_of_many_leaves_holds_no_copy_of_them(optimized):
    leaves = [jax.ShapeDtypeStruct((512, 512), np.float32)] * 8
    memory = _checks._lowest_entries.lower(leaves).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**16
