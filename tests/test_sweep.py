"""Runs of a sequence as one program, against `learn_tasks` run by run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lifelong_jax import (
    Batch,
    SweepRun,
    Task,
    add_quadratic_penalty,
    learn_sweep,
    learn_tasks,
    methods,
    proximal_quadratic_penalty,
)
from lifelong_jax.sweep import _stack

NUM_TASKS, NUM_CLASSES, NUM_EPOCHS, BATCH_SIZE = 3, 5, 2, 8
STRENGTHS = (0.1, 3.0)
NUM_STEPS = 4  # an epoch of 31 examples

TRACES = {"coupled": 0}


def optimizer_fn(strength):
    TRACES["coupled"] += 1
    return optax.chain(add_quadratic_penalty(strength), optax.sgd(0.1, momentum=0.9))


def proximal_fn(strength):
    return optax.chain(optax.sgd(0.1), proximal_quadratic_penalty(0.1, strength))


def apply_fn(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def make_arrays(num_examples, seed):
    inputs = np.random.default_rng(seed).normal(size=(num_examples, 6))
    labels = (inputs @ np.random.default_rng(0).normal(size=(6, NUM_CLASSES))).argmax(axis=-1)
    labels[:NUM_CLASSES] = np.arange(NUM_CLASSES)
    return inputs, labels


ARRAYS = make_arrays(31, 1), make_arrays(300, 2)
GROUPS = [[3, 0], [2], [1, 4]]  # of different sizes, so that there is padding


def make_batch(inputs, labels, classes, size):
    indices = np.flatnonzero(np.isin(labels, classes))
    indices = np.pad(indices, (0, size - len(indices)), mode="edge")
    weights = np.arange(size) < np.isin(labels, classes).sum()
    return Batch(*map(jnp.asarray, (inputs[indices], labels[indices], weights.astype(np.float64))))


def make_tasks(scenario, rng):
    if scenario == "domain":  # the tasks share their examples
        batches = [make_batch(*arrays, range(NUM_CLASSES), len(arrays[1])) for arrays in ARRAYS]
        return [Task(*batches, jnp.asarray(rng.permutation(6))) for _ in range(NUM_TASKS)]
    groups = [GROUPS[index] for index in rng.permutation(3)]
    sizes = [max(np.isin(labels, group).sum() for group in groups) for _, labels in ARRAYS]
    return [
        Task(
            *(make_batch(*arrays, group, size) for arrays, size in zip(ARRAYS, sizes, strict=True)),
            class_mask=jnp.asarray(np.isin(np.arange(NUM_CLASSES), group)),
        )
        for group in groups
    ]


def make_runs(scenario="domain", seeds=(0, 1), strengths=STRENGTHS):
    """A seed has its own tasks, parameters and key, which its strengths share."""
    runs = []
    for seed in seeds:
        rng = np.random.default_rng(10 + seed)
        tasks = make_tasks(scenario, rng)
        params = {"w1": jnp.asarray(rng.normal(size=(6, 8))), "w2": jnp.asarray(rng.normal(size=(8, NUM_CLASSES)))}
        runs += [SweepRun(params, tasks, jax.random.key(seed), strength) for strength in strengths]
    return runs


sweep = functools.partial(learn_sweep, num_epochs=NUM_EPOCHS, batch_size=BATCH_SIZE)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):  # where rounding changes no accuracy
        yield


def assert_as_one_by_one(swept, runs, method, scenario, optimizer_fn=optimizer_fn, forward_transfer=True):
    for index, run in enumerate(runs):
        learned = learn_tasks(
            method,
            apply_fn,
            optimizer_fn,
            *run[:3],
            scenario=scenario,
            strength=run.strength,
            num_epochs=NUM_EPOCHS,
            batch_size=BATCH_SIZE,
            forward_transfer=forward_transfer,
        )
        # To a quotient's last bit: of 300 examples, not one differs.
        np.testing.assert_allclose(swept.accuracy_matrix[index], learned.accuracy_matrix, rtol=1e-12)
        np.testing.assert_allclose(swept.initial_accuracies[index], learned.initial_accuracies, rtol=1e-12)
    assert swept.accuracy_matrix.shape == (len(runs), NUM_TASKS, NUM_TASKS)
    assert np.isnan(swept.accuracy_matrix[0, 0, 1]) == (scenario == "class" or not forward_transfer)


METHODS = {
    "finetune": methods.finetune(),
    "ewc": methods.ewc("sampled", rule="latest", decay=0.5),  # sampled, so that the importance has a key
    "mas": methods.mas("separate"),
    "si": methods.si(),
    "rwalk": methods.rwalk(interval=2),
}


@pytest.mark.parametrize(("method", "scenario"), [("ewc", "domain"), ("mas", "class")])
def test_equals_the_runs_one_by_one(method, scenario):
    runs = make_runs(scenario)
    swept = sweep(METHODS[method], apply_fn, optimizer_fn, runs, scenario=scenario)
    assert_as_one_by_one(swept, runs, METHODS[method], scenario)
    assert len({matrix.tobytes() for matrix in swept.accuracy_matrix}) == len(runs)  # or little would be seen here


def test_one_run_equals_that_run():
    (run,) = make_runs("task", [1], [3.0])
    tests = [task.test._replace(weights=task.test.weights.astype(jnp.float32)) for task in run.tasks]  # as loaded data
    tasks = [task._replace(test=test) for task, test in zip(run.tasks, tests, strict=True)]
    runs = [run._replace(tasks=tasks)]
    swept = sweep(METHODS["si"], apply_fn, optimizer_fn, runs, scenario="task", forward_transfer=False)
    assert_as_one_by_one(swept, runs, METHODS["si"], "task", forward_transfer=False)


def test_max_steps_ends_a_task_as_fewer_epochs_would():
    runs = make_runs(seeds=[1], strengths=[3.0])
    method = METHODS["rwalk"]
    options = {"num_epochs": NUM_EPOCHS + 1, "max_steps": NUM_EPOCHS * NUM_STEPS}
    swept = sweep(method, apply_fn, optimizer_fn, runs, **options)
    assert_as_one_by_one(swept, runs, method, "domain")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seeds", [[0], [0, 1]], ids=["one", "two"])
def test_equals_the_runs_one_by_one_for_every_method_and_scenario(method, scenario, seeds):
    runs = make_runs(scenario, seeds, STRENGTHS[: len(seeds)])
    swept = sweep(METHODS[method], apply_fn, proximal_fn, runs, scenario=scenario)
    assert_as_one_by_one(swept, runs, METHODS[method], scenario, proximal_fn)


def test_one_trace_serves_all_strengths_and_seeds():
    sweep(METHODS["ewc"], apply_fn, optimizer_fn, make_runs())
    before = TRACES["coupled"]
    sweep(METHODS["ewc"], apply_fn, optimizer_fn, make_runs(seeds=[5, 6], strengths=[0.0, 20.0]))
    assert TRACES["coupled"] == before


def test_a_run_that_diverges_ends_no_other():
    runs = make_runs()
    kept = sweep(METHODS["ewc"], apply_fn, optimizer_fn, runs)
    runs[1] = runs[1]._replace(params=jax.tree.map(lambda leaf: 1e308 * leaf, runs[1].params))
    with_lost = sweep(METHODS["ewc"], apply_fn, optimizer_fn, runs)
    for before, after in zip(kept, with_lost, strict=True):
        assert np.isfinite(before).all()
        np.testing.assert_array_equal(after[[0, 2, 3]], before[[0, 2, 3]])
        assert np.isnan(after[1]).all()


def test_runs_that_differ_in_nothing():
    runs = [make_runs()[0]._replace(strength=jnp.float32(3.0))] * 2
    first, second = sweep(methods.finetune(), apply_fn, optimizer_fn, runs, num_epochs=1).accuracy_matrix
    np.testing.assert_array_equal(first, second)


def test_what_runs_and_tasks_share_is_held_once():
    runs = make_runs()
    stacked, axes = _stack([run.tasks for run in runs])
    shared = runs[0].tasks[0].train
    assert stacked.permutation.shape == (4, NUM_TASKS, 6)
    assert stacked.train.inputs.shape == (4, 31, 6)  # by seed, as they are made anew for each

    same = [task._replace(train=shared, test=shared) for task in runs[2].tasks]
    stacked, axes = _stack([[task._replace(test=shared) for task in runs[0].tasks], same])
    assert stacked.train.inputs is stacked.test.inputs is shared.inputs
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(stacked)]
    assert [name for name, varies in zip(names, axes.by_run, strict=True) if varies] == [".permutation"]
    assert axes.by_task == axes.by_run

    stacked, axes = _stack([runs[0].tasks] * 3)  # three strengths of a seed
    assert stacked.permutation.shape == (NUM_TASKS, 6)
    assert not any(axes.by_run)
    split = make_runs("task", [0], [1.0])
    stacked, axes = _stack([run.tasks for run in split])
    assert stacked.train.inputs.shape[0] == NUM_TASKS
    np.testing.assert_array_equal(stacked.train.labels[2], split[0].tasks[2].train.labels)


def changed(**values):
    first, second, *_ = make_runs()
    return [first, second._replace(**{name: value(second) for name, value in values.items()})]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: [], {}, "runs is empty"),
        (lambda: changed(tasks=lambda run: run.tasks[:2]), {}, r"runs\[1\] has 2 tasks, but runs\[0\] has 3"),
        (
            lambda: changed(tasks=lambda run: make_tasks("task", np.random.default_rng(0))),
            {},
            r"runs\[1\]\.tasks\[0\]",
        ),
        (lambda: changed(params=lambda run: run.params | {"w1": jnp.zeros((6, 9))}), {}, r"runs\[1\]\.params\['w1'\]"),
        (
            lambda: changed(strength=lambda run: -1.0),
            {},
            r"runs\[1\]\.strength must be finite and not negative, not -1",
        ),
        (lambda: changed(strength=lambda run: [1.0, 10.0]), {}, r"runs\[1\]\.strength must be a number, not \[1"),
        (lambda: changed(strength=lambda run: np.nan), {}, r"runs\[1\]\.strength must be finite and not negative"),
        (make_runs, {"scenario": "online"}, "scenario must be one of task, domain, class"),
        (make_runs, {"scenario": "class"}, r"tasks\[0\] has no class_mask, but scenario 'class' needs one"),
        (make_runs, {"num_epochs": 0}, "num_epochs must be an integer of at least 1"),
        (make_runs, {"batch_size": 0}, "batch_size must be an integer of at least 1"),
        (make_runs, {"max_steps": 0}, "max_steps must be an integer of at least 1"),
        (make_runs, {"method": methods.ewc(rule="newest")}, "rule must be one of separate, latest"),
        (make_runs, {"method": methods.ewc(decay=-1.0)}, "decay must be finite and not negative"),
    ],
)
def test_bad_input(make, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(**{"method": METHODS["ewc"], **options}, apply_fn=apply_fn, optimizer_fn=optimizer_fn, runs=make())
