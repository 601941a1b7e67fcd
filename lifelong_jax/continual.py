"""Learns a sequence of tasks: the one module that joins training, importance, consolidation and penalty.

The trainer is handed one task's training examples and nothing else; only the evaluator sees the test sets.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lifelong_jax import _checks, methods
from lifelong_jax.consolidation import consolidate, init_consolidation
from lifelong_jax.methods import Method
from lifelong_jax.tasks import Scenario, active_classes, joint_examples, mask_logits, present, with_class_mask
from lifelong_jax.training import TrainingInfo, TrainingState, init_training, learn_task
from lifelong_jax.types import Batch, Consolidation, Example, OutputFn, Params, Task

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
    report: Callable[[Progress], None] = lambda progress: None,
) -> LearnedSequence:
    """Learns one task after the other with one network, by a method that remembers.

    For each task: train with the penalty that `optimizer_fn` adds; compute the method's importance on the task's
    training examples; consolidate; measure the accuracy on every task. Each task's training starts with a fresh
    optimiser state, but for what the method carries over.

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
      report: called after every epoch.

    Returns:
      The parameters, the consolidation, the accuracies and the times.

    Raises:
      ValueError: if there are no tasks, epochs or examples per step, if tasks differ in shape, labels are out of range
        or not among their task's classes, if class masks lack, or are there and the scenario takes none, if `strength`
        is negative, or the method's rule or decay is no such.
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
    _check(apply_fn, params, tasks, scenario, num_epochs, batch_size)
    _checks.check_not_negative("strength", strength)
    _checks.check_choice("method.rule", method.rule, ("separate", "latest"))
    _checks.check_not_negative("method.decay", method.decay)
    strength = jnp.asarray(strength, jnp.float32)
    consolidation = init_consolidation(params)
    unlearned = np.full(len(tasks), np.nan)
    known_ahead = scenario != "class"
    initial_accuracies = np.array(evaluate(apply_fn, params, tasks, scenario)) if known_ahead else unlearned
    accuracy_matrix = np.tile(unlearned, (len(tasks), 1))
    training_seconds = importance_seconds = 0.0
    state = None
    for index, task in enumerate(tasks):
        train_key, importance_key = jax.random.split(jax.random.fold_in(key, index))
        examples = with_class_mask(task.train, active_classes(tasks, scenario, index, index))
        epochs = _train(
            apply_fn,
            optimizer_fn,
            method,
            params,
            None if state is None else state.opt_state,
            consolidation,
            strength,
            examples,
            task.permutation,
            train_key,
            num_epochs=num_epochs,
            batch_size=batch_size,
        )
        for epoch, (state, loss, seconds) in enumerate(epochs):
            training_seconds += seconds
            accuracies = evaluate(apply_fn, state.params, tasks[: index + 1], scenario)
            report(Progress(index, index * num_epochs + epoch + 1, loss, accuracies))
        params = state.params
        measure = functools.partial(_importance, apply_fn, method.importance_fn)
        importance, seconds = _timed(measure, state, examples, task.permutation, importance_key)
        importance_seconds += seconds
        consolidation = consolidate(consolidation, params, importance, rule=method.rule, decay=method.decay)
        measured = evaluate(apply_fn, params, tasks, scenario) if known_ahead else accuracies
        accuracy_matrix[index, : len(measured)] = measured
    return LearnedSequence(
        params, consolidation, accuracy_matrix, initial_accuracies, training_seconds, importance_seconds
    )


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
) -> LearnedSequence:
    """Learns all tasks at once, from all their data: the upper bound that continual learning is compared with.

    It takes as many steps as `learn_tasks` takes over the whole sequence.

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

    Returns:
      As `learn_tasks`; only the last row of the accuracy matrix is measured, and the consolidation is that of no tasks.

    Raises:
      ValueError: as for `learn_tasks`.
      FloatingPointError: if training diverged.
    """
    _check(apply_fn, params, tasks, scenario, num_epochs, batch_size)
    none = init_consolidation(params)
    training_seconds = 0.0
    epochs = _train(
        apply_fn,
        optimizer_fn,
        methods.finetune(),
        params,
        None,
        none,
        jnp.zeros(()),
        joint_examples(tasks, scenario),
        None,
        key,
        num_epochs=num_epochs,
        batch_size=batch_size,
    )
    for epoch, (state, loss, seconds) in enumerate(epochs):
        training_seconds += seconds
        accuracies = evaluate(apply_fn, state.params, tasks, scenario)
        report(Progress(None, (epoch + 1) * len(tasks), loss, accuracies))
    unmeasured = np.full(len(tasks), np.nan)
    accuracy_matrix = np.tile(unmeasured, (len(tasks), 1))
    accuracy_matrix[-1] = accuracies
    return LearnedSequence(state.params, none, accuracy_matrix, unmeasured, training_seconds, 0.0)


def evaluate(apply_fn: OutputFn, params: Params, tasks: Sequence[Task], scenario: Scenario = "domain") -> list[float]:
    """Measures the accuracy on each task's test set.

    Args:
      apply_fn: `apply_fn(params, x) -> [num_classes]`, one example's logits, without batch axis.
      params: the parameters.
      tasks: the tasks; in "class", those learned so far.
      scenario: which outputs are active; see `active_classes`.

    Returns:
      A fraction for each task.

    Example:
      >>> batch = Batch(jnp.eye(2), jnp.array([0, 0]), jnp.ones(2))
      >>> evaluate(lambda params, x: params * x, jnp.array(1.0), [Task(batch, batch)])
      [0.5]
    """
    class_masks = [active_classes(tasks, scenario, index, len(tasks) - 1) for index in range(len(tasks))]
    accuracies = [
        _accuracy(apply_fn, params, task.test, task.permutation, class_mask)
        for task, class_mask in zip(tasks, class_masks, strict=True)
    ]
    return [float(accuracy) for accuracy in accuracies]


def _train(
    apply_fn: OutputFn,
    optimizer_fn: OptimizerFn,
    method: Method,
    params: Params,
    previous: optax.OptState | None,
    consolidation: Consolidation,
    strength: jax.Array,
    examples: Batch,
    permutation: jax.Array | None,
    key: jax.Array,
    *,
    num_epochs: int,
    batch_size: int,
) -> Iterator[tuple[TrainingState, float, float]]:
    """Yields after each epoch the state, the mean loss and the seconds. The next epoch frees this state's arrays."""
    state = init_training(method.wrap_optimizer(optimizer_fn(strength)), params, key)
    if previous is not None:
        state = state._replace(opt_state=method.carry(state.opt_state, previous))
    learn = functools.partial(_learn_epoch, apply_fn, optimizer_fn, method.wrap_optimizer, batch_size=batch_size)
    for epoch in range(num_epochs):
        (state, info), seconds = _timed(learn, state, consolidation, strength, examples, permutation)
        loss = float(info.loss.sum()) / int(info.num_steps)
        # The last step's update comes after the last loss.
        if not (math.isfinite(loss) and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))):
            raise FloatingPointError(
                f"training diverged in epoch {epoch + 1} at strength {strength:g}: lower it or the learning rate, "
                "or use the proximal penalty"
            )
        yield state, loss, seconds


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
        methods.cross_entropy(_shown(apply_fn, permutation)),
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
    return importance_fn(_shown(apply_fn, permutation), state, train, key)


@functools.partial(jax.jit, static_argnames=("apply_fn",))
def _accuracy(
    apply_fn: OutputFn, params: Params, test: Batch, permutation: jax.Array | None, class_mask: jax.Array | None
) -> jax.Array:
    outputs = jax.vmap(_shown(apply_fn, permutation), in_axes=(None, 0))(params, test.inputs)
    correct = jnp.argmax(mask_logits(outputs, class_mask), axis=-1) == test.labels
    return jnp.sum(jnp.where(correct, test.weights, 0)) / jnp.sum(test.weights)


def _shown(apply_fn: OutputFn, permutation: jax.Array | None) -> OutputFn:
    def output_fn(params: Params, x: Example) -> jax.Array:
        return apply_fn(params, present(x, permutation))

    return output_fn


def _timed(function: Callable, *args: object) -> tuple[object, float]:
    # Compiled first, so that a method's time does not depend on whether it came first.
    function.func.lower(*function.args, *args, **function.keywords).compile()
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start


def _check(
    apply_fn: OutputFn, params: Params, tasks: Sequence[Task], scenario: Scenario, num_epochs: int, batch_size: int
) -> None:
    if not tasks:
        raise ValueError("tasks is empty: there is nothing to learn.")
    _checks.check_choice("scenario", scenario, ("task", "domain", "class"))
    _checks.check_positive_integer("num_epochs", num_epochs)
    _checks.check_positive_integer("batch_size", batch_size)
    x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tasks[0].train.inputs)
    num_classes = jax.eval_shape(apply_fn, params, x).shape[-1]
    for index, task in enumerate(tasks):
        _checks.check_same_structure(f"tasks[{index}]", task, "tasks[0]", tasks[0])
        _check_task(f"tasks[{index}]", task, scenario, math.prod(x.shape), num_classes)


def _check_task(name: str, task: Task, scenario: Scenario, num_features: int, num_classes: int) -> None:
    if task.permutation is not None and task.permutation.shape != (num_features,):
        raise ValueError(
            f"{name}.permutation has shape {task.permutation.shape}, but an input has {num_features} features."
        )
    if (task.class_mask is None) != (scenario == "domain"):
        has, takes = ("no", "needs one") if task.class_mask is None else ("a", "takes none")
        raise ValueError(
            f"{name} has {has} class_mask, but scenario {scenario!r} {takes}: with masks, say 'task' or 'class'."
        )
    if task.class_mask is not None and task.class_mask.shape != (num_classes,):
        raise ValueError(
            f"{name}.class_mask has shape {task.class_mask.shape}, but apply_fn returns {num_classes} outputs."
        )
    for labels in (task.train.labels, task.test.labels):
        if not _checks.is_concrete(labels):
            continue
        if not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f"{name} has labels from {labels.min()} to {labels.max()}, but apply_fn returns {num_classes} logits."
            )
        if task.class_mask is not None and not task.class_mask[labels].all():
            raise ValueError(f"{name} has labels that are not among its classes, those that its class_mask names.")
