"""A task's training stops when its validation score no longer gets better, and goes back to the best epoch."""

import copy

import chex
import jax
import numpy as np
import pytest

from lifelong_jax import Batch, SweepRun, Task, evaluate, learn_jointly, learn_sweep, learn_tasks, methods
from lifelong_jax.objectives import classification
from tests.problems import RECIPE, make_params, make_tasks

KEY = jax.random.key(0)
LOSS = classification("loss")


def with_validation(tasks):
    """Validation labels that training contradicts after a while: the loss falls, and rises again."""
    validated = []
    for task in tasks:
        right = np.asarray(task.test.labels)
        labels = jax.device_put(np.where(np.arange(len(right)) % 3 == 0, (right + 1) % 3, right))
        validated.append(task._replace(validation=task.test._replace(labels=labels)))
    return validated


TASKS = with_validation(make_tasks()[:2])
PATIENT = RECIPE._replace(num_epochs=12, patience=2, objective=LOSS)


def learn(recipe=PATIENT, *, tasks=TASKS, method=None, **options):
    method = methods.ewc() if method is None else method
    return learn_tasks(method, recipe, make_params(), tasks, KEY, strength=1.0, **options)


def validation_loss(params, task):
    return evaluate(RECIPE.apply_fn, params, [task._replace(test=task.validation)], objective=LOSS)[0]


def test_training_goes_back_to_the_best_epoch():
    seen = []

    def keep(state, progress):
        seen.append((progress.task, progress.epochs, copy.deepcopy(state.params)))

    learned = learn(callback=keep)
    without = []
    learn(
        PATIENT._replace(patience=None), tasks=TASKS[:1], callback=lambda s, p: without.append(copy.deepcopy(s.params))
    )
    losses = [validation_loss(params, TASKS[0]) for params in without]
    best = next(n for n in range(len(losses)) if all(later >= losses[n] for later in losses[n + 1 : n + 3]))
    of_first = [params for task, _, params in seen if task == 0]
    assert best + 3 == len(of_first) < 12  # two epochs that were not better
    chex.assert_trees_all_equal(of_first[-1], without[best])
    assert [epochs for task, epochs, _ in seen if task == 0][-1] == 12  # where the next task begins
    assert learned.epochs == 24


def test_early_stopping_goes_on_from_any_epoch():
    kept = []
    whole = learn(method=methods.si(), callback=lambda state, progress: kept.append(copy.deepcopy(state)))
    for state in kept[1 : len(kept) : 3]:
        again = learn(method=methods.si(), start=copy.deepcopy(state))
        chex.assert_trees_all_equal((again.params, again.consolidation), (whole.params, whole.consolidation))


def test_a_sweep_stops_as_the_loop_does():
    learned = learn()
    runs = [SweepRun(make_params(), TASKS, KEY, strength) for strength in (1.0, 0.1)]
    swept = learn_sweep(methods.ewc(), PATIENT, runs)
    np.testing.assert_allclose(swept.accuracy_matrix[0], learned.accuracy_matrix, rtol=1e-4)
    with pytest.raises(ValueError, match=r"max_steps is given, but recipe\.patience says when training ends"):
        learn_sweep(methods.ewc(), PATIENT, runs, max_steps=3)


def test_joint_training_stops_by_the_mean_over_tasks():
    states = []
    joint = learn_jointly(PATIENT, make_params(), TASKS, KEY, callback=lambda s, p: states.append(copy.deepcopy(s)))
    assert joint.epochs == 24
    means = [np.mean([validation_loss(state.params, task) for task in TASKS]) for state in states]
    assert len(means) == 12 or means[-1] == min(means)


def test_a_higher_score_is_better_where_the_objective_says_so():
    always_right = [task._replace(validation=task.train) for task in make_tasks()[:1]]
    by_accuracy = PATIENT._replace(objective=classification(), patience=1)
    seen = []
    learn(by_accuracy, tasks=always_right, callback=lambda state, progress: seen.append(progress.epochs))
    assert len(seen) > 1


def test_what_patience_needs():
    with pytest.raises(ValueError, match=r"recipe\.patience needs validation examples: make each Task"):
        learn(tasks=[TASKS[0], TASKS[1]._replace(validation=None)])
    with pytest.raises(ValueError, match=r"recipe\.patience must be an integer of at least 1, not 0"):
        learn(PATIENT._replace(patience=0))
    with pytest.raises(TypeError, match=r"tasks\[0\]\.validation is a tuple, but must be a Batch"):
        learn(tasks=[TASKS[0]._replace(validation=tuple(TASKS[0].train))])
    empty = jax.tree.map(lambda leaf: leaf[:0], TASKS[0].train)
    with pytest.raises(ValueError, match=r"tasks\[0\]\.validation is empty"):
        learn(tasks=[TASKS[0]._replace(validation=Batch(*empty))])


def test_tasks_keep_their_validation_examples_apart():
    learned = learn(PATIENT._replace(num_epochs=1))
    others = [Task(task.train, task.test, task.permutation) for task in TASKS]
    without = learn(PATIENT._replace(num_epochs=1, patience=None), tasks=others)
    chex.assert_trees_all_equal(learned.params, without.params)
