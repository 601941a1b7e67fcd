"""Learns a sequence of tasks: the one module that joins training, importance, consolidation and penalty.

The trainer is handed one task's training examples and nothing else; only the evaluator sees the test sets.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lifelong_jax import _checks, methods
from lifelong_jax.consolidation import consolidate, init_consolidation
from lifelong_jax.evaluation import evaluate
from lifelong_jax.methods import Method
from lifelong_jax.tasks import Scenario, active_classes, joint_examples, shown, with_class_mask
from lifelong_jax.training import TrainingInfo, TrainingState, init_training, learn_task
from lifelong_jax.types import Batch, Consolidation, OutputFn, Params, Task

OptimizerFn: TypeAlias = Callable[[jax.Array], optax.GradientTransformation]
"""`optimizer_fn(strength) -> optimizer`: a function of λ, which is traced, so that one compilation serves every λ."""


class Progress(NamedTuple):
    """What is known after an epoch.

    Attributes:
      task: which task is being learned, from 0; None where all are learned at once.
      epochs: how many passes over one task's examples have been made so far, in the whole sequence.
      loss: the mean of the epoch's training losses, without the penalty.
      accuracies: the test accuracy of each task learned so far, this one last, or of all; fractions.
    """

    task: int | None
    epochs: int
    loss: float
    accuracies: list[float]


class LearnedSequence(NamedTuple):
    """What learning a sequence of tasks left behind.

    Attributes:
      params: the parameters after the last task.
      consolidation: what was kept of the tasks.
      accuracy_matrix: `[num_tasks, num_tasks]`; entry [i, j] is the accuracy on task j's test set after task i has been
        learned, a fraction; NaN where it was not measured.
      initial_accuracies: `[num_tasks]`, the accuracy on each task before any was learned; NaN where not measured.
      training_seconds: time spent training; compilation and evaluation are left out.
      importance_seconds: time spent on importances; compilation is left out.
    """

    params: Params
    consolidation: Consolidation
    accuracy_matrix: np.ndarray
    initial_accuracies: np.ndarray
    training_seconds: float
    importance_seconds: float


class SequenceState(NamedTuple):
    """Where a sequence stands after an epoch: what the next one needs, and what has been measured.

    Attributes:
      training: the state of the task's training; after its last epoch, that in which it ended.
      consolidation: what is kept of the tasks learned.
      accuracy_matrix: as in `LearnedSequence`, NaN in the rows that are to come.
      initial_accuracies: as in `LearnedSequence`.
      training_seconds: so far.
      importance_seconds: so far.
    """

    training: TrainingState
    consolidation: Consolidation
    accuracy_matrix: np.ndarray
    initial_accuracies: np.ndarray
    training_seconds: float
    importance_seconds: float


class Checkpoints(Protocol):
    """Where a sequence's state is kept, to go on from there should it be stopped: `resuming.ResumableSequence`, say."""

    def restore(self, start: SequenceState, num_epochs: int) -> tuple[int, SequenceState]:
        """Says how many epochs, `num_epochs` a task, have been learned, and gives the state after them; 0 and `start`
        where none is kept."""

    def save(self, epochs: int, state: SequenceState) -> None:
        """Is told the state after each epoch. It must copy what it keeps: the next epoch frees the arrays."""

    def keep_task(self, task: int, kept: Consolidation, estimator: str, num_examples: int) -> None:
        """Is told a learned task's own parameters and importance, by which method and from how many examples."""


class NoCheckpoints:
    """Keeps nothing: a sequence that is stopped begins anew."""

    def restore(self, start: SequenceState, num_epochs: int) -> tuple[int, SequenceState]:
        """Starts."""
        return 0, start

    def save(self, epochs: int, state: SequenceState) -> None:
        """Does nothing."""

    def keep_task(self, task: int, kept: Consolidation, estimator: str, num_examples: int) -> None:
        """Does nothing."""


NO_CHECKPOINTS = NoCheckpoints()


def learn_tasks(
    method: Method,
    apply_fn: OutputFn,
    optimizer_fn: OptimizerFn,
    params: Params,
    tasks: Sequence[Task],
    key: jax.Array,
    *,
    scenario: Scenario = "domain",
    strength: float,
    num_epochs: int,
    batch_size: int,
    forward_transfer: bool = True,
    report: Callable[[Progress], None] = lambda progress: None,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> LearnedSequence:
    """Learns one task after the other with one network, by a method that remembers.

    For each task: train with the penalty that `optimizer_fn` adds; compute the method's importance on the task's
    training examples; consolidate; measure the accuracy on every task, or on every task so far. Each task's training
    starts with a fresh optimiser state, but for what the method carries over.

    Args:
      method: from `methods.py`.
      apply_fn: `apply_fn(params, x) -> [num_classes]`, one example's logits, without batch axis.
      optimizer_fn: `optimizer_fn(strength) -> optimizer`; it must be the same function object from call to call.
      params: where training starts.
      tasks: the sequence, in order; equal shapes.
      key: the random key of shuffling and of sampled labels.
      scenario: "task", "domain" or "class"; the first and the last need tasks with class masks. See `active_classes`.
        A task's importance is that of the outputs which were active while it was learned. In "class", an accuracy on a
        task that has not been learned is not measured: none of its classes is known.
      strength: λ, not negative.
      num_epochs: passes over each task's training examples.
      batch_size: examples per step.
      forward_transfer: whether to measure what forward transfer is made of, the accuracies on tasks before they are
        learned. Without, num_tasks · (num_tasks + 1) / 2 fewer test sets are evaluated: half of them, at one epoch a
        task.
      report: called after every epoch.
      checkpoints: where the state is kept, to go on from: with it, the numbers are those of a sequence that was never
        stopped, to the bit on one machine, wherever the checkpoints fell. By default nowhere.

    Returns:
      The parameters, the consolidation, the accuracies and the times.

    Raises:
      ValueError: if there are no tasks, epochs or examples per step, if tasks differ in shape, labels are out of range
        or not among their task's classes, if a permutation does not hold each feature once, if class masks lack, or are
        there and the scenario takes none, if `apply_fn` does not return one example's logits, if `strength` is not a
        number, or negative, or the method's rule or decay is no such.
      FloatingPointError: if training diverged.

    Example:
      >>> from lifelong_jax import add_quadratic_penalty, ewc, permuted_tasks
      >>> inputs = jnp.eye(4)
      >>> batch = Batch(inputs, jnp.arange(4) % 2, jnp.ones(4))
      >>> tasks = permuted_tasks(batch, batch, 3, jax.random.key(0))
      >>> optimizer_fn = lambda strength: optax.chain(add_quadratic_penalty(strength), optax.sgd(1.0))
      >>> learned = learn_tasks(ewc(), lambda w, x: x @ w, optimizer_fn, jnp.zeros((4, 2)), tasks, jax.random.key(1),
      ...                       strength=1.0, num_epochs=10, batch_size=2)
      >>> learned.accuracy_matrix.shape
      (3, 3)
    """
    check_sequence(apply_fn, params, tasks, scenario, num_epochs, batch_size)
    _checks.check_not_negative("strength", strength)
    _checks.check_choice("method.rule", method.rule, ("separate", "latest"))
    _checks.check_not_negative("method.decay", method.decay)
    strength = jnp.asarray(strength, jnp.float32)
    optimizer = method.wrap_optimizer(optimizer_fn(strength))
    learn = functools.partial(_learn_epoch, apply_fn, optimizer_fn, method.wrap_optimizer, batch_size=batch_size)
    ahead = forward_transfer and scenario != "class"
    initial_accuracies = evaluate(apply_fn, params, tasks, scenario) if ahead else [math.nan] * len(tasks)
    epochs, state = checkpoints.restore(_start(optimizer, params, key, initial_accuracies), num_epochs)
    for index in range(epochs // num_epochs, len(tasks)):
        train_key, importance_key = task_keys(key, index)
        examples = with_class_mask(tasks[index].train, active_classes(tasks, scenario, index, index))
        current = (examples, tasks[index].permutation)
        if epochs == index * num_epochs:
            training = init_training(optimizer, state.training.params, train_key)
            if index > 0:
                training = training._replace(opt_state=method.carry(training.opt_state, state.training.opt_state))
            state = state._replace(training=training)
        while epochs < (index + 1) * num_epochs:
            state, loss = _train_epoch(learn, state, strength, current, epochs - index * num_epochs)
            epochs += 1
            accuracies = evaluate(apply_fn, state.training.params, tasks[: index + 1], scenario)
            report(Progress(index, epochs, loss, accuracies))
            if epochs == (index + 1) * num_epochs:
                state, kept = _consolidate_task(method, apply_fn, state, current, importance_key)
                checkpoints.keep_task(index, kept, method.name, np.count_nonzero(examples.weights))
                if ahead:
                    accuracies = accuracies + evaluate(apply_fn, kept.anchor, tasks[index + 1 :], scenario)
                state = state._replace(accuracy_matrix=_with_row(state.accuracy_matrix, index, accuracies))
            checkpoints.save(epochs, state)
    return _learned(state)


def learn_jointly(
    apply_fn: OutputFn,
    optimizer_fn: OptimizerFn,
    params: Params,
    tasks: Sequence[Task],
    key: jax.Array,
    *,
    scenario: Scenario = "domain",
    num_epochs: int,
    batch_size: int,
    report: Callable[[Progress], None] = lambda progress: None,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> LearnedSequence:
    """Learns all tasks at once, from all their data: the upper bound that continual learning is compared with.

    It makes as many passes over each task's examples as `learn_tasks`.

    Args:
      apply_fn: `apply_fn(params, x) -> [num_classes]`, one example's logits, without batch axis.
      optimizer_fn: as for `learn_tasks`.
      params: where training starts.
      tasks: the tasks; equal shapes.
      key: the random key of shuffling.
      scenario: as for `learn_tasks`; in "class", all tasks' classes are active.
      num_epochs: passes over the training examples of all tasks.
      batch_size: examples per step.
      report: called after every epoch.
      checkpoints: as for `learn_tasks`.

    Returns:
      As `learn_tasks`; only the last row of the accuracy matrix is measured, and the consolidation is that of no tasks.

    Raises:
      ValueError: as for `learn_tasks`.
      FloatingPointError: if training diverged.

    Example:
      >>> from lifelong_jax import permuted_tasks
      >>> batch = Batch(jnp.eye(4), jnp.arange(4) % 2, jnp.ones(4))
      >>> tasks = permuted_tasks(batch, batch, 3, jax.random.key(0))
      >>> joint = learn_jointly(lambda w, x: x @ w, lambda strength: optax.sgd(1.0), jnp.zeros((4, 2)), tasks,
      ...                       jax.random.key(1), num_epochs=10, batch_size=2)
      >>> np.isnan(joint.accuracy_matrix).all(axis=1)
      array([ True,  True, False])
    """
    check_sequence(apply_fn, params, tasks, scenario, num_epochs, batch_size)
    wrap_optimizer = methods.finetune().wrap_optimizer
    none = jnp.zeros(())
    learn = functools.partial(_learn_epoch, apply_fn, optimizer_fn, wrap_optimizer, batch_size=batch_size)
    current = (joint_examples(tasks, scenario), None)
    start = _start(wrap_optimizer(optimizer_fn(none)), params, key, [math.nan] * len(tasks))
    epochs, state = checkpoints.restore(start, num_epochs)
    for epoch in range(epochs // len(tasks), num_epochs):
        state, loss = _train_epoch(learn, state, none, current, epoch)
        accuracies = evaluate(apply_fn, state.training.params, tasks, scenario)
        report(Progress(None, (epoch + 1) * len(tasks), loss, accuracies))
        if epoch + 1 == num_epochs:
            state = state._replace(accuracy_matrix=_with_row(state.accuracy_matrix, len(tasks) - 1, accuracies))
        checkpoints.save((epoch + 1) * len(tasks), state)
    return _learned(state)


@jax.jit
def task_keys(key: jax.Array, index: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Makes a task's own keys.

    Args:
      key: the sequence's key.
      index: the task's place in the sequence, from 0.

    Returns:
      The key of its training, and that of its importance.
    """
    train_key, importance_key = jax.random.split(jax.random.fold_in(key, index))
    return train_key, importance_key


def _start(
    optimizer: optax.GradientTransformation, params: Params, key: jax.Array, initial_accuracies: list[float]
) -> SequenceState:
    num_tasks = len(initial_accuracies)
    return SequenceState(
        training=init_training(optimizer, params, key),
        consolidation=init_consolidation(params),
        accuracy_matrix=np.full((num_tasks, num_tasks), np.nan),
        initial_accuracies=np.array(initial_accuracies),
        training_seconds=0.0,
        importance_seconds=0.0,
    )


def _train_epoch(
    learn: Callable,
    state: SequenceState,
    strength: jax.Array,
    current: tuple[Batch, jax.Array | None],
    epoch: int,
) -> tuple[SequenceState, float]:
    """Returns the state and the mean loss. The arrays of the former state are freed."""
    (training, info), seconds = _timed(learn, state.training, state.consolidation, strength, *current)
    loss = float(np.asarray(info.loss, np.float64).sum()) / int(np.asarray(info.num_steps).sum())
    # The last step's update comes after the last loss.
    if not (math.isfinite(loss) and _checks.is_finite(training.params)):
        advice = f" at strength {strength:g}: lower it or the learning rate, or use the proximal penalty"
        raise FloatingPointError(
            f"training diverged in epoch {epoch + 1}{advice if strength > 0 else ': lower the learning rate'}"
        )
    return state._replace(training=training, training_seconds=state.training_seconds + seconds), loss


def _consolidate_task(
    method: Method,
    apply_fn: OutputFn,
    state: SequenceState,
    current: tuple[Batch, jax.Array | None],
    key: jax.Array,
) -> tuple[SequenceState, Consolidation]:
    """Returns the state with the task just learned consolidated, and the task's own parameters and importance."""
    measure = functools.partial(_importance, apply_fn, method.importance_fn)
    importance, seconds = _timed(measure, state.training, *current, key)
    params = state.training.params
    consolidation = consolidate(state.consolidation, params, importance, rule=method.rule, decay=method.decay)
    state = state._replace(consolidation=consolidation, importance_seconds=state.importance_seconds + seconds)
    return state, Consolidation(params, importance)


def _with_row(accuracy_matrix: np.ndarray, index: int, accuracies: list[float]) -> np.ndarray:
    accuracy_matrix = accuracy_matrix.copy()
    accuracy_matrix[index, : len(accuracies)] = accuracies
    return accuracy_matrix


def _learned(state: SequenceState) -> LearnedSequence:
    measured = {field: value for field, value in state._asdict().items() if field != "training"}
    return LearnedSequence(params=state.training.params, **measured)


@functools.partial(
    jax.jit,
    static_argnames=("apply_fn", "optimizer_fn", "wrap_optimizer", "batch_size"),
    donate_argnames=("state",),
)
def _learn_epoch(
    apply_fn: OutputFn,
    optimizer_fn: OptimizerFn,
    wrap_optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation],
    state: TrainingState,
    consolidation: Consolidation,
    strength: jax.Array,
    train: Batch,
    permutation: jax.Array | None,
    *,
    batch_size: int,
) -> tuple[TrainingState, TrainingInfo]:
    return learn_task(
        methods.cross_entropy(shown(apply_fn, permutation)),
        wrap_optimizer(optimizer_fn(strength)),
        state,
        consolidation,
        train,
        num_epochs=1,
        batch_size=batch_size,
        weights=train.weights,
    )


@functools.partial(jax.jit, static_argnames=("apply_fn", "importance_fn"))
def _importance(
    apply_fn: OutputFn,
    importance_fn: methods.ImportanceFn,
    state: TrainingState,
    train: Batch,
    permutation: jax.Array | None,
    key: jax.Array,
) -> Params:
    return importance_fn(shown(apply_fn, permutation), state, train, key)


def _timed(function: Callable, *args: object) -> tuple[object, float]:
    # Compiled first, so that a method's time does not depend on whether it came first.
    function.func.lower(*function.args, *args, **function.keywords).compile()
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start


def check_sequence(
    apply_fn: OutputFn, params: Params, tasks: Sequence[Task], scenario: Scenario, num_epochs: int, batch_size: int
) -> None:
    """Raises a clear error where something does not fit, before anything is computed; see `learn_tasks`.

    Args:
      apply_fn: one example's logits.
      params: where training starts.
      tasks: the sequence.
      scenario: "task", "domain" or "class".
      num_epochs: passes over each task's training examples.
      batch_size: examples per step.

    Raises:
      ValueError: if tasks, scenario, sizes or labels do not fit each other.
      TypeError: if a dtype does not.
    """
    if not tasks:
        raise ValueError("tasks is empty: there is nothing to learn.")
    _checks.check_choice("scenario", scenario, ("task", "domain", "class"))
    _checks.check_positive_integer("num_epochs", num_epochs)
    _checks.check_positive_integer("batch_size", batch_size)
    x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tasks[0].train.inputs)
    logits = jax.eval_shape(apply_fn, params, x)
    _checks.check_logits(logits)
    (num_classes,) = logits.shape
    checked: dict[tuple[int, ...], Batch] = {}  # the batches, too: an id is an object's only while it lives
    for index, task in enumerate(tasks):
        _checks.check_same_structure(f"tasks[{index}]", task, "tasks[0]", tasks[0])
        _check_task(f"tasks[{index}]", task, scenario, math.prod(x.shape), num_classes, checked)


def _check_task(
    name: str,
    task: Task,
    scenario: Scenario,
    num_features: int,
    num_classes: int,
    checked: dict[tuple[int, ...], Batch],
) -> None:
    if task.permutation is not None:
        _check_permutation(f"{name}.permutation", task.permutation, num_features)
    if (task.class_mask is None) != (scenario == "domain"):
        has, takes = ("no", "needs one") if task.class_mask is None else ("a", "takes none")
        raise ValueError(
            f"{name} has {has} class_mask, but scenario {scenario!r} {takes}: with masks, say 'task' or 'class'."
        )
    if task.class_mask is not None and task.class_mask.shape != (num_classes,):
        raise ValueError(
            f"{name}.class_mask has shape {task.class_mask.shape}, but apply_fn returns {num_classes} outputs."
        )
    if task.class_mask is not None and task.class_mask.dtype != bool:
        raise TypeError(f"{name}.class_mask has dtype {task.class_mask.dtype}: give bools, one for each class.")
    for part, batch in (("train", task.train), ("test", task.test)):
        if batch.class_mask is not None:
            raise ValueError(f"{name}.{part} has a class_mask: the scenario makes it, from the task's own class_mask.")
        arrays = tuple(map(id, jax.tree.leaves(batch)))
        if arrays not in checked:  # permuted tasks share their examples
            _checks.check_batch(f"{name}.{part}", batch, num_classes)
            checked[arrays] = batch
        known = task.class_mask is not None and _checks.is_concrete(batch.labels)
        if known and not task.class_mask[batch.labels].all():
            raise ValueError(f"{name} has labels that are not among its classes, those that its class_mask names.")


def _check_permutation(name: str, permutation: jax.Array, num_features: int) -> None:
    if permutation.shape != (num_features,):
        raise ValueError(f"{name} has shape {permutation.shape}, but an input has {num_features} features.")
    if not jnp.issubdtype(permutation.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {permutation.dtype}, but where a feature was is an integer.")
    if _checks.is_concrete(permutation) and not np.array_equal(np.sort(permutation), np.arange(num_features)):
        raise ValueError(f"{name} must hold each of 0 to {num_features - 1} once: it says where each feature was.")
