"""Learns a sequence of tasks: the one module that joins training, importance, consolidation and penalty.

The trainer gets the training examples of one task and nothing else; only the evaluator sees the test sets. The state of
a sequence is what the next epoch needs: a callback gets it after every epoch, and a sequence can start from it.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax import _checks
from lifelong_jax._early_stopping import Best, init_best, keep_best
from lifelong_jax._epochs import (
    TrainingData,
    compiled_part,
    joint_data,
    learn_epoch,
    measuring,
    same_sizes,
    timed,
    training_data,
)
from lifelong_jax._sequences import begin_task, check_run, make_optimizer, task_keys
from lifelong_jax._split_batches import find_shardings, onto_mesh_of, place_consolidation
from lifelong_jax._task_checks import check_tasks
from lifelong_jax.consolidation import consolidate, init_consolidation
from lifelong_jax.evaluation import scores_of_tasks
from lifelong_jax.methods import Method, finetune
from lifelong_jax.recipes import Recipe
from lifelong_jax.scenarios import active_classes
from lifelong_jax.training import TrainingState, init_training
from lifelong_jax.types import Consolidation, ModelState, Params, Task


class SequenceState(NamedTuple):
    """The state of a sequence after an epoch: what the next epoch needs, and what has been measured.

    Attributes:
      epochs: the number of epochs so far, over all tasks.
      training: the training state of the current task, or of the task learned last.
      consolidation: what is kept of the tasks learned.
      accuracy_matrix: `[num_tasks, num_tasks]`; entry [i, j] is the accuracy on task j's test set after task i has been
        learned, a fraction, or what other score the recipe's objective has; NaN where not measured.
      initial_accuracies: `[num_tasks]`, the accuracy on each task before any was learned; NaN where not measured.
      training_seconds: the time spent on training, without compilation and evaluation.
      importance_seconds: the time spent on importances, without compilation.
      best: with early stopping, the best epoch of the current task; None without.
    """

    epochs: int
    training: TrainingState
    consolidation: Consolidation
    accuracy_matrix: np.ndarray
    initial_accuracies: np.ndarray
    training_seconds: float
    importance_seconds: float
    best: Best | None = None

    @property
    def params(self) -> Params:
        """The parameters after the last step."""
        return self.training.params


class Progress(NamedTuple):
    """What is reported after an epoch.

    Attributes:
      task: the number of the task that is being learned, from 0; None if all tasks are learned at once.
      epochs: the number of epochs so far, over all tasks.
      loss: the mean of the epoch's training losses, without the penalty.
      accuracies: the test accuracy on each task up to this one, or on all tasks if they are learned at once; fractions.
      learned: after a task's last epoch, this task's own parameters (as anchor) and importance; None after others.
    """

    task: int | None
    epochs: int
    loss: float
    accuracies: list[float]
    learned: Consolidation | None = None


Callback: TypeAlias = Callable[[SequenceState, Progress], None]
"""`callback(state, progress)`, called after every epoch. It must copy what it keeps: the next epoch frees the state."""


def learn_tasks(
    method: Method,
    recipe: Recipe,
    params: Params,
    tasks: Sequence[Task],
    key: jax.Array,
    *,
    strength: float,
    model_state: ModelState = None,
    forward_transfer: bool = True,
    start: SequenceState | None = None,
    callback: Callback = lambda state, progress: None,
) -> SequenceState:
    """Learns one task after the other with one network.

    For each task: train with the penalty that `recipe.optimizer_fn` adds; compute the method's importance on the task's
    training examples; consolidate; measure the accuracy on every task, or on every task so far. Each task begins with a
    fresh optimiser state, except for what the method carries over.

    Args:
      method: from `methods`.
      recipe: the network, the optimiser, and how long each task is trained. A task's importance is that of the outputs
        that are active in its training. In the scenario "class", the accuracy on a task is not measured before the task
        is learned, because its classes are unknown. Define its functions once, not anew for each call: programs are
        compiled for these very functions, and kept, so that each new lambda costs seconds and megabytes.
      params: the parameters to start from.
      tasks: the sequence, in order. Each different number of examples is compiled once. On a mesh, batches are split as
        for `learn_task`, and so are test sets; parameters that are on none are placed whole on each device.
      key: the random key of shuffling and of sampled labels.
      strength: λ, not negative.
      model_state: with a `recipe.train_fn`, the model state to start from, () if there is none; otherwise None.
      forward_transfer: whether to measure the accuracy on tasks before they are learned, which forward transfer needs.
        Without it, num_tasks · (num_tasks + 1) / 2 fewer test sets are evaluated.
      start: a state to go on from, instead of starting with `params` at the first task: from a callback,
        `init_sequence` or `go_on_after`. Its arrays are freed. On one machine, the numbers are the same, to the bit, as
        without the stop.
      callback: `callback(state, progress)`, called after every epoch, to report or to save.

    Returns:
      The state after the last task, with the parameters, the consolidation, the accuracies and the times.

    Raises:
      TypeError: if an argument is of another type, or stands in another place; or if a dtype is wrong.
      ValueError: if there are no tasks, epochs or examples per step; if tasks differ in shape, or a task's labels,
        permutation or class mask is invalid or does not fit the scenario; if `apply_fn` does not return one example's
        logits; if the strength, rule or decay is invalid; if the optimiser has no penalty, or one in the wrong place
        of its chain; or if `start` is the state of another sequence.
      FloatingPointError: if training diverged.

    Example:
      >>> import optax
      >>> from lifelong_jax import Batch, Recipe, add_quadratic_penalty, methods, permuted_tasks
      >>> batch = Batch(jnp.eye(4), jnp.arange(4) % 2, jnp.ones(4))
      >>> tasks = permuted_tasks(batch, batch, 3, jax.random.key(0))
      >>> optimizer_fn = lambda strength: optax.chain(add_quadratic_penalty(strength), optax.sgd(1.0))
      >>> recipe = Recipe(lambda w, x: x @ w, optimizer_fn, num_epochs=10, batch_size=2)
      >>> learned = learn_tasks(methods.ewc(), recipe, jnp.zeros((4, 2)), tasks, jax.random.key(1), strength=1.0)
      >>> learned.accuracy_matrix.shape
      (3, 3)
    """
    if start is None:
        options = {"strength": strength, "model_state": model_state, "forward_transfer": forward_transfer}
        start = init_sequence(method, recipe, params, tasks, key, **options)
    else:
        _check_arguments(method, recipe, params, _model_state_of(start), tasks, key, strength, start)
    state, scenario, num_epochs = start, recipe.scenario, recipe.num_epochs
    traced_strength = jnp.asarray(strength, jnp.float32)
    optimizer = make_optimizer(recipe.optimizer_fn, method.wrap_optimizer, traced_strength)
    learn = functools.partial(learn_epoch, compiled_part(recipe), method.wrap_optimizer)
    for index in range(state.epochs // num_epochs, len(tasks)):
        data = training_data(tasks, scenario, index)
        train_key, importance_key = onto_mesh_of(data.examples, task_keys(key, index))
        if state.epochs == index * num_epochs:
            training = begin_task(method, optimizer, state.training, train_key, index)
            training = onto_mesh_of(data.examples, training)
            state = state._replace(training=training, best=init_best(recipe, training))
        for epoch in range(state.epochs - index * num_epochs, num_epochs):
            compiled = state.epochs > start.epochs and (epoch > 0 or same_sizes(tasks, index - 1, index))
            state, loss = _train_epoch(learn, state, traced_strength, data, epoch, compiled)
            state, ends = _stop_early(recipe, state, tasks, [index], index)
            ends |= epoch + 1 == num_epochs
            if ends:
                state = _end_training(state, (index + 1) * num_epochs)
            accuracies = _evaluate(recipe, state.training, tasks[: index + 1])
            learned = None
            if ends:
                state, learned = _end_task(method, recipe, state, data, importance_key)
                ahead = tasks[index + 1 :] if forward_transfer and scenario != "class" else []
                row = accuracies + _evaluate(recipe, state.training, ahead)
                state = state._replace(accuracy_matrix=_with_row(state.accuracy_matrix, index, row))
            callback(state, Progress(index, state.epochs, loss, accuracies, learned))
            if ends:
                break
    return state


def learn_jointly(
    recipe: Recipe,
    params: Params,
    tasks: Sequence[Task],
    key: jax.Array,
    *,
    model_state: ModelState = None,
    start: SequenceState | None = None,
    callback: Callback = lambda state, progress: None,
) -> SequenceState:
    """Learns all tasks at once, from all their data: the upper bound that continual learning is compared with.

    It makes as many passes over each task's examples as `learn_tasks`.

    Args:
      recipe: as for `learn_tasks`; in the scenario "class", the classes of all tasks are active.
      params: the parameters to start from.
      tasks: the tasks; inputs of equal shapes.
      key: the random key of shuffling.
      model_state: as for `learn_tasks`.
      start: a state to go on from, as for `learn_tasks`.
      callback: `callback(state, progress)`, called after every epoch over all tasks.

    Returns:
      As for `learn_tasks`, with only the last row of the accuracy matrix measured, and the consolidation of no tasks.

    Raises:
      TypeError: as for `learn_tasks`.
      ValueError: as for `learn_tasks`.
      FloatingPointError: if training diverged.

    Example:
      >>> import optax
      >>> from lifelong_jax import Batch, Recipe, permuted_tasks
      >>> batch = Batch(jnp.eye(4), jnp.arange(4) % 2, jnp.ones(4))
      >>> tasks = permuted_tasks(batch, batch, 3, jax.random.key(0))
      >>> recipe = Recipe(lambda w, x: x @ w, lambda strength: optax.sgd(1.0), num_epochs=10, batch_size=2)
      >>> joint = learn_jointly(recipe, jnp.zeros((4, 2)), tasks, jax.random.key(1))
      >>> np.isnan(joint.accuracy_matrix).all(axis=1)
      array([ True,  True, False])
    """
    if start is None:
        start = init_sequence(None, recipe, params, tasks, key, model_state=model_state)
    else:
        _check_arguments(None, recipe, params, _model_state_of(start), tasks, key, 0.0, start)
    state, num_tasks, no_penalty = start, len(tasks), jnp.zeros(())
    learn = functools.partial(learn_epoch, compiled_part(recipe), None)
    data = joint_data(tasks, recipe.scenario)
    for epoch in range(state.epochs // num_tasks, recipe.num_epochs):
        state, loss = _train_epoch(learn, state, no_penalty, data, epoch, compiled=state.epochs > start.epochs)
        state, ends = _stop_early(recipe, state, tasks, range(num_tasks), num_tasks - 1)
        ends |= epoch + 1 == recipe.num_epochs
        state = state._replace(epochs=(epoch + 1) * num_tasks)
        if ends:
            state = _end_training(state, recipe.num_epochs * num_tasks)
        accuracies = _evaluate(recipe, state.training, tasks)
        if ends:
            state = state._replace(accuracy_matrix=_with_row(state.accuracy_matrix, num_tasks - 1, accuracies))
        callback(state, Progress(None, state.epochs, loss, accuracies))
        if ends:
            break
    return state


def init_sequence(
    method: Method | None,
    recipe: Recipe,
    params: Params,
    tasks: Sequence[Task],
    key: jax.Array,
    *,
    strength: float = 0.0,
    model_state: ModelState = None,
    forward_transfer: bool = True,
) -> SequenceState:
    """Makes the state before the first epoch, which also is a template for restoring a saved state.

    Args:
      method: as for `learn_tasks`, or None for `learn_jointly`.
      recipe: as for `learn_tasks`.
      params: the parameters to start from.
      tasks: the sequence.
      key: the random key of the sequence.
      strength: λ, not negative.
      model_state: as for `learn_tasks`.
      forward_transfer: whether to measure the accuracy on each task before any is learned.

    Returns:
      The state, whose arrays are copies.

    Raises:
      TypeError: as for `learn_tasks`.
      ValueError: as for `learn_tasks`.

    Example:
      >>> import optax
      >>> from lifelong_jax import Batch, Recipe, Task
      >>> batch = Batch(jnp.eye(4), jnp.arange(4) % 2, jnp.ones(4))
      >>> recipe = Recipe(lambda w, x: x @ w, lambda strength: optax.sgd(1.0), num_epochs=10, batch_size=2)
      >>> init_sequence(None, recipe, jnp.zeros((4, 2)), [Task(batch, batch)], jax.random.key(0)).epochs
      0
    """
    _check_arguments(method, recipe, params, model_state, tasks, key, strength)
    params, model_state = onto_mesh_of(tasks[0].train, (params, model_state))
    wrap_optimizer = None if method is None else method.wrap_optimizer
    optimizer = make_optimizer(recipe.optimizer_fn, wrap_optimizer, jnp.asarray(strength, jnp.float32))
    training = onto_mesh_of(tasks[0].train, init_training(optimizer, params, key, model_state))
    accuracies = [math.nan] * len(tasks)
    if method is not None and forward_transfer and recipe.scenario != "class":
        accuracies = _evaluate(recipe, training, tasks)
    importance = None
    if method is not None:  # its shapes, so that the first task's consolidation has the forms of the others
        data = training_data(tasks, recipe.scenario, 0)
        importance = jax.eval_shape(measuring(method, recipe, training, data), training, data, key)
    return SequenceState(
        epochs=0,
        training=training,
        consolidation=place_consolidation(tasks[0].train, init_consolidation(params, importance)),
        accuracy_matrix=np.full((len(tasks), len(tasks)), np.nan),
        initial_accuracies=np.array(accuracies),
        training_seconds=0.0,
        importance_seconds=0.0,
        best=init_best(recipe, training),
    )


def go_on_after(
    learned: Sequence[Consolidation], method: Method, recipe: Recipe, start: SequenceState
) -> SequenceState:
    """Makes the state after tasks that were learned earlier, from the parameters and the importance of each.

    With it, another rule, decay or strength can be tried without learning the earlier tasks again, nor measuring them.

    Args:
      learned: each task's own parameters (as anchor) and importance, in order: the `Progress.learned` of a callback.
      method: its rule and decay consolidate them.
      recipe: as for `learn_tasks`.
      start: from `init_sequence`.

    Returns:
      A state for the argument `start` of `learn_tasks`, to learn the next task.

    Raises:
      ValueError: if `learned` is empty, or the method carries over an optimiser state, which `learned` does not have.

    Example:
      >>> import optax
      >>> from lifelong_jax import Batch, Consolidation, Recipe, add_quadratic_penalty, methods, permuted_tasks
      >>> batch = Batch(jnp.eye(4), jnp.arange(4) % 2, jnp.ones(4))
      >>> tasks = permuted_tasks(batch, batch, 3, jax.random.key(0))
      >>> optimizer_fn = lambda strength: optax.chain(add_quadratic_penalty(strength), optax.sgd(1.0))
      >>> recipe = Recipe(lambda w, x: x @ w, optimizer_fn, num_epochs=10, batch_size=2)
      >>> mas, params, key = methods.mas("separate"), jnp.zeros((4, 2)), jax.random.key(1)
      >>> start = init_sequence(mas, recipe, params, tasks, key, strength=0.1)
      >>> start = go_on_after([Consolidation(jnp.zeros((4, 2)), jnp.ones((4, 2)))] * 2, mas, recipe, start)
      >>> np.isnan(learn_tasks(mas, recipe, params, tasks, key, strength=0.1, start=start).accuracy_matrix).all(axis=1)
      array([ True,  True, False])
    """
    if not learned:
        raise ValueError("learned is empty: to begin with the first task, call learn_tasks without start.")
    if method.carry is not None:
        raise ValueError(f"{method.name} carries over an optimiser state from task to task, which is not in learned.")
    consolidation = start.consolidation
    for params, importance in learned:
        consolidation = consolidate(consolidation, params, importance, rule=method.rule, decay=method.decay)
    training = start.training._replace(params=learned[-1].anchor)
    return start._replace(epochs=len(learned) * recipe.num_epochs, training=training, consolidation=consolidation)


def _train_epoch(
    learn: functools.partial,
    state: SequenceState,
    strength: jax.Array,
    data: TrainingData,
    epoch: int,
    compiled: bool,
) -> tuple[SequenceState, float]:
    """Trains for an epoch; returns the state and the mean loss. The arrays of the earlier state are freed."""
    learn = functools.partial(learn, shardings=find_shardings(state.training, data.examples))
    (training, info), seconds = timed(learn, state.training, state.consolidation, strength, data, compiled=compiled)
    loss = float(np.asarray(info.loss, np.float64).sum()) / int(np.asarray(info.num_steps).sum())
    # The losses are not enough: the last update comes after the last loss.
    if not (math.isfinite(loss) and _checks.is_finite(training.params)):
        advice = ": lower the learning rate"
        if strength > 0 and state.epochs > epoch:  # in the first task, the penalty is 0
            advice = f" at strength {strength:g}{advice}, or, unless the penalty is proximal, make it so or lower it"
        raise FloatingPointError(f"training diverged in epoch {epoch + 1}{advice}")
    training_seconds = state.training_seconds + seconds
    return state._replace(epochs=state.epochs + 1, training=training, training_seconds=training_seconds), loss


def _stop_early(
    recipe: Recipe, state: SequenceState, tasks: Sequence[Task], indices: Sequence[int], latest: int
) -> tuple[SequenceState, bool]:
    """Keeps the best epoch on the validation examples of some tasks; says whether the patience is at an end."""
    if state.best is None:
        return state, False
    masks = [active_classes(tasks, recipe.scenario, index, latest) for index in indices]
    best = keep_best(recipe, state.best, state.training, [tasks[index] for index in indices], masks)
    return state._replace(best=best), int(best.num_worse) >= recipe.patience  # type: ignore[operator]


def _end_training(state: SequenceState, epochs: int) -> SequenceState:
    training = state.training if state.best is None else state.best.training
    return state._replace(training=training, epochs=epochs)


def _end_task(
    method: Method, recipe: Recipe, state: SequenceState, data: TrainingData, key: jax.Array
) -> tuple[SequenceState, Consolidation]:
    """Consolidates the task just learned; returns the state, and the task's own parameters and importance."""
    measure = measuring(method, recipe, state.training, data)
    importance, seconds = timed(measure, state.training, data, key)
    if method.importance_fn is not finetune().importance_fn and _checks.is_zero(importance):
        warnings.warn(
            f"the importance of {method.name} is 0 everywhere after {state.epochs} epochs, so no strength protects "
            f"this task: has it one class, or does the network's output not depend on its parameters?",
            stacklevel=3,
        )
    consolidation = consolidate(state.consolidation, state.params, importance, rule=method.rule, decay=method.decay)
    state = state._replace(consolidation=consolidation, importance_seconds=state.importance_seconds + seconds)
    return state, Consolidation(state.params, importance)


def _with_row(accuracy_matrix: np.ndarray, index: int, accuracies: list[float]) -> np.ndarray:
    accuracy_matrix = accuracy_matrix.copy()
    accuracy_matrix[index, : len(accuracies)] = accuracies
    return accuracy_matrix


def _evaluate(recipe: Recipe, training: TrainingState, tasks: Sequence[Task]) -> list[float]:
    settings = (recipe.scenario, recipe.objective, training.model_state)
    return scores_of_tasks(recipe.apply_fn, training.params, tasks, *settings)


def _model_state_of(start: SequenceState) -> ModelState:
    if not isinstance(start, SequenceState):
        raise TypeError(f"start is a {type(start).__name__}: pass a state that a callback got, or init_sequence made.")
    return start.training.model_state


def _check_arguments(
    method: Method | None,
    recipe: Recipe,
    params: Params,
    model_state: ModelState,
    tasks: Sequence[Task],
    key: jax.Array,
    strength: float,
    start: SequenceState | None = None,
) -> None:
    check_tasks(method, recipe, params, model_state, tasks)
    check_run(method, recipe, params, key, strength)
    if start is None:
        return
    _checks.check_same_structure("start.params", start.params, "params", params)
    num_tasks = len(start.initial_accuracies)
    if num_tasks != len(tasks) or start.epochs > num_tasks * recipe.num_epochs:
        raise ValueError(
            f"start is a state after {start.epochs} epochs of {num_tasks} tasks, but there are {len(tasks)} tasks "
            f"of {recipe.num_epochs} epochs."
        )
