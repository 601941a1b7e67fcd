"""Runs of a sequence as one program, against `learn_tasks` run by run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lifelong_jax import SweepRun, Task, learn_sweep, learn_tasks, methods
from lifelong_jax.sweep import _stack
from tests.problems import (
    NUM_FEATURES,
    RECIPE,
    as_batch,
    coupled_sgd,
    make_arrays,
    make_params,
    make_split_tasks,
    proximal_sgd,
)

NUM_TASKS, NUM_CLASSES, NUM_STEPS = 3, 5, 4  # steps: in an epoch of 31 examples
STRENGTHS = (0.1, 3.0)
GROUPS = [[3, 0], [2], [1, 4]]  # of different sizes, so that there is padding
TRACES = {"coupled": 0}


def counted_sgd(strength):
    TRACES["coupled"] += 1
    return coupled_sgd(strength)


DOMAIN = RECIPE._replace(optimizer_fn=counted_sgd, batch_size=8)


def make_tasks(scenario, seed):
    random = np.random.default_rng(10 + seed)
    if scenario == "domain":  # the tasks share their examples
        parts = [make_arrays(num_examples, NUM_CLASSES, seed=num_examples) for num_examples in (31, 300)]
        batches = [as_batch(*arrays, np.ones(len(arrays[1]))) for arrays in parts]
        return [Task(*batches, jax.device_put(random.permutation(NUM_FEATURES))) for _ in range(NUM_TASKS)]
    return make_split_tasks([GROUPS[index] for index in random.permutation(3)], num_test=300)


def make_runs(scenario="domain", seeds=(0, 1), strengths=STRENGTHS):
    """A seed has its own tasks, parameters and key, which its strengths share."""
    runs = []
    for seed in seeds:
        tasks, params = make_tasks(scenario, seed), make_params(NUM_CLASSES, seed=seed)
        runs += [SweepRun(params, tasks, jax.random.key(seed), strength) for strength in strengths]
    return runs


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):  # where rounding changes no accuracy
        yield


def assert_as_one_by_one(swept, runs, method, recipe, forward_transfer=True):
    for index, run in enumerate(runs):
        learned = learn_tasks(method, recipe, *run[:3], strength=run.strength, forward_transfer=forward_transfer)
        # To a quotient's last bit: of 300 examples, not one differs.
        np.testing.assert_allclose(swept.accuracy_matrix[index], learned.accuracy_matrix, rtol=1e-12)
        np.testing.assert_allclose(swept.initial_accuracies[index], learned.initial_accuracies, rtol=1e-12)
    assert swept.accuracy_matrix.shape == (len(runs), NUM_TASKS, NUM_TASKS)
    assert np.isnan(swept.accuracy_matrix[0, 0, 1]) == (recipe.scenario == "class" or not forward_transfer)


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
    recipe = DOMAIN._replace(scenario=scenario)
    swept = learn_sweep(METHODS[method], recipe, runs)
    assert_as_one_by_one(swept, runs, METHODS[method], recipe)
    assert len({matrix.tobytes() for matrix in swept.accuracy_matrix}) == len(runs)  # or little would be seen here


@pytest.mark.filterwarnings("ignore:the importance of")  # of a task of one class, it is 0
def test_one_run_equals_that_run():
    (run,) = make_runs("task", [1], [3.0])
    tests = [task.test._replace(weights=task.test.weights.astype(jnp.float32)) for task in run.tasks]  # as loaded data
    tasks = [task._replace(test=test) for task, test in zip(run.tasks, tests, strict=True)]
    runs = [run._replace(tasks=tasks)]
    recipe = DOMAIN._replace(scenario="task")
    swept = learn_sweep(METHODS["si"], recipe, runs, forward_transfer=False)
    assert_as_one_by_one(swept, runs, METHODS["si"], recipe, forward_transfer=False)


def test_max_steps_ends_a_task_as_fewer_epochs_would():
    runs = make_runs(seeds=[1], strengths=[3.0])
    method = METHODS["rwalk"]
    longer = DOMAIN._replace(num_epochs=DOMAIN.num_epochs + 1)
    swept = learn_sweep(method, longer, runs, max_steps=DOMAIN.num_epochs * NUM_STEPS)
    assert_as_one_by_one(swept, runs, method, DOMAIN)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seeds", [[0], [0, 1]], ids=["one", "two"])
def test_equals_the_runs_one_by_one_for_every_method_and_scenario(method, scenario, seeds):
    runs = make_runs(scenario, seeds, STRENGTHS[: len(seeds)])
    recipe = DOMAIN._replace(optimizer_fn=proximal_sgd, scenario=scenario)
    swept = learn_sweep(METHODS[method], recipe, runs)
    assert_as_one_by_one(swept, runs, METHODS[method], recipe)


def test_one_trace_serves_all_strengths_and_seeds():
    learn_sweep(METHODS["ewc"], DOMAIN, make_runs())
    before = TRACES["coupled"]
    learn_sweep(METHODS["ewc"], DOMAIN, make_runs(seeds=[5, 6], strengths=[0.0, 20.0]))
    assert TRACES["coupled"] == before


def test_a_run_that_diverges_ends_no_other():
    runs = make_runs()
    kept = learn_sweep(METHODS["ewc"], DOMAIN, runs)
    runs[1] = runs[1]._replace(params=jax.tree.map(lambda leaf: 1e308 * leaf, runs[1].params))
    with_lost = learn_sweep(METHODS["ewc"], DOMAIN, runs)
    for before, after in zip(kept, with_lost, strict=True):
        assert np.isfinite(before).all()
        np.testing.assert_array_equal(after[[0, 2, 3]], before[[0, 2, 3]])
        assert np.isnan(after[1]).all()


def test_runs_that_differ_in_nothing():
    runs = [make_runs()[0]._replace(strength=jnp.float32(3.0))] * 2
    first, second = learn_sweep(methods.finetune(), DOMAIN._replace(num_epochs=1), runs).accuracy_matrix
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
    ("make", "changes", "message"),
    [
        (lambda: [], {}, "runs is empty"),
        (lambda: changed(tasks=lambda run: run.tasks[:2]), {}, r"runs\[1\] has 2 tasks, but runs\[0\] has 3"),
        (
            lambda: changed(tasks=lambda run: make_tasks("task", 0)),
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
        (make_runs, {"scenario": "online"}, r"recipe\.scenario must be one of task, domain, class"),
        (make_runs, {"scenario": "class"}, r"tasks\[0\] has no class_mask, but scenario 'class' needs one"),
        (make_runs, {"num_epochs": 0}, r"recipe\.num_epochs must be an integer of at least 1"),
        (make_runs, {"batch_size": 0}, r"recipe\.batch_size must be an integer of at least 1"),
    ],
)
def test_bad_input(make, changes, message):
    with pytest.raises(ValueError, match=message):
        learn_sweep(METHODS["ewc"], DOMAIN._replace(**changes), make())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (METHODS["ewc"], {"max_steps": 0}, "max_steps must be an integer of at least 1"),
        (methods.ewc(rule="newest"), {}, r"method\.rule must be one of separate, latest"),
        (methods.ewc(decay=-1.0), {}, r"method\.decay must be finite and not negative"),
    ],
)
def test_methods_and_steps_are_checked(method, options, message):
    with pytest.raises(ValueError, match=message):
        learn_sweep(method, DOMAIN, make_runs(), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": methods.ewc}, "method is a function: pass one from methods"),
        ({"recipe": tuple(DOMAIN)}, r"recipe is a tuple: pass a Recipe\("),
        ({"recipe": DOMAIN._replace(optimizer_fn=optax.sgd(0.1))}, "optimizer_fn is not a function"),
        ({"recipe": DOMAIN._replace(optimizer_fn=lambda strength: None)}, "must return an optax optimiser, not a None"),
        ({"runs": [make_params()]}, r"runs\[0\] is a dict: pass a SweepRun\(params, tasks, key, strength\)"),
        ({"runs": changed(tasks=lambda run: dict(enumerate(run.tasks)))[1:]}, "tasks is a dict: pass a list"),
        ({"runs": changed(key=lambda run: 3)}, r"runs\[1\]\.key must be one random key, .*, not 3"),
    ],
)
def test_arguments_of_another_type_are_named_as_by_learn_tasks(arguments, message):
    with pytest.raises(TypeError, match=message):
        learn_sweep(**{"method": METHODS["ewc"], "recipe": DOMAIN, "runs": make_runs()} | arguments)
