"""Several runs of a sequence of tasks, seeds by strengths, as one compiled program: `jit(vmap(scan over tasks))`.

Each run is what `learn_tasks` does, with the same keys, to the same numbers but for rounding; without its progress,
checkpoints and the accuracies between the ends of tasks.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax import _checks
from lifelong_jax.consolidation import consolidate, init_consolidation
from lifelong_jax.continual import OptimizerFn, check_sequence, task_keys
from lifelong_jax.evaluation import accuracy
from lifelong_jax.methods import Method, cross_entropy
from lifelong_jax.tasks import Scenario, active_classes, shown, with_class_mask
from lifelong_jax.training import init_training, learn_task
from lifelong_jax.types import Consolidation, OutputFn, Params, Task


class SweepRun(NamedTuple):
    """One run of a sweep: what `learn_tasks` is called with, and what differs from run to run.

    Attributes:
      params: where training starts.
      tasks: the sequence. Arrays that runs, or tasks, have in common (one object) are held once.
      key: the random key of shuffling and of sampled labels.
      strength: λ, not negative.
    """

    params: Params
    tasks: Sequence[Task]
    key: jax.Array
    strength: float


class SweepAccuracies(NamedTuple):
    """What the runs of a sweep came to.

    Attributes:
      accuracy_matrix: `[num_runs, num_tasks, num_tasks]`; entry [r, i, j] is run r's accuracy on task j's test set
        after task i has been learned, a fraction; NaN where it was not measured, and in a run that diverged.
      initial_accuracies: `[num_runs, num_tasks]`, before any task was learned; NaN likewise.
    """

    accuracy_matrix: np.ndarray
    initial_accuracies: np.ndarray


def learn_sweep(
    method: Method,
    apply_fn: OutputFn,
    optimizer_fn: OptimizerFn,
    runs: Sequence[SweepRun],
    *,
    scenario: Scenario = "domain",
    num_epochs: int,
    batch_size: int,
    max_steps: int | None = None,
    forward_transfer: bool = True,
) -> SweepAccuracies:
    """Learns several runs of a sequence of tasks as one compiled program.

    One compilation serves all runs of equal shapes and as many at once, whatever their seeds and strengths.

    Args:
      method: from `methods.py`.
      apply_fn: `apply_fn(params, x) -> [num_classes]`, one example's logits, without batch axis.
      optimizer_fn: `optimizer_fn(strength) -> optimizer`; it must be the same function object from call to call.
      runs: one or more, of equal shapes.
      scenario: "task", "domain" or "class", as for `learn_tasks`.
      num_epochs: passes over each task's training examples.
      batch_size: examples per step.
      max_steps: steps after which a task ends within these epochs, or None for their end.
      forward_transfer: whether to measure the accuracies on tasks before they are learned, as for `learn_tasks`.

    Returns:
      Each run's accuracies. A run that diverges ends no other.

    Raises:
      ValueError: as for `learn_tasks`, or if there are no runs or they differ in shape.

    Example:
      >>> from lifelong_jax import Batch, add_quadratic_penalty, ewc, permuted_tasks
      >>> import optax
      >>> batch = Batch(jnp.eye(4), jnp.arange(4) % 2, jnp.ones(4))
      >>> tasks = permuted_tasks(batch, batch, 3, jax.random.key(0))
      >>> optimizer_fn = lambda strength: optax.chain(add_quadratic_penalty(strength), optax.sgd(1.0))
      >>> runs = [SweepRun(jnp.zeros((4, 2)), tasks, jax.random.key(1), strength) for strength in (0.1, 1.0, 10.0)]
      >>> swept = learn_sweep(ewc(), lambda w, x: x @ w, optimizer_fn, runs, num_epochs=10, batch_size=2)
      >>> swept.accuracy_matrix.shape
      (3, 3, 3)
    """
    if not runs:
        raise ValueError("runs is empty: there is nothing to learn.")
    checked = set()
    for index, run in enumerate(runs):
        _checks.check_not_negative(f"runs[{index}].strength", run.strength)
        _checks.check_same_structure(f"runs[{index}].params", run.params, "runs[0].params", runs[0].params)
        if len(run.tasks) != len(runs[0].tasks):
            raise ValueError(
                f"runs[{index}] has {len(run.tasks)} tasks, but runs[0] has {len(runs[0].tasks)}: sweep equal shapes."
            )
        for number, task in enumerate(run.tasks):
            _checks.check_same_structure(f"runs[{index}].tasks[{number}]", task, "runs[0].tasks[0]", runs[0].tasks[0])
        if id(run.tasks) not in checked:  # strengths share their seed's tasks
            check_sequence(apply_fn, run.params, run.tasks, scenario, num_epochs, batch_size)
            checked.add(id(run.tasks))
    masks = {id(run.tasks): _masks(run.tasks, scenario) for run in runs}
    tasks, task_axes = _stack([run.tasks for run in runs])
    rest, rest_axes = _stack(
        [[(run.params, masks[id(run.tasks)], run.key, jnp.asarray(run.strength, jnp.float32))] for run in runs]
    )
    learn = functools.partial(
        _learn_runs,
        method=method,
        apply_fn=apply_fn,
        optimizer_fn=optimizer_fn,
        ahead=forward_transfer and scenario != "class",
        num_tasks=len(runs[0].tasks),
        num_epochs=num_epochs,
        batch_size=batch_size,
        max_steps=max_steps,
        num_runs=len(runs),
        axes=(task_axes, rest_axes),
    )
    accuracy_matrix, initial_accuracies = learn(tasks, rest)
    return SweepAccuracies(np.asarray(accuracy_matrix, np.float64), np.asarray(initial_accuracies, np.float64))


class _Axes(NamedTuple):
    """Which leading axes a leaf was given: hashable, for jit."""

    by_run: tuple[bool, ...]
    by_task: tuple[bool, ...]


def _stack(trees: Sequence[Sequence[Any]]) -> tuple[Any, _Axes]:
    """Makes one tree of a tree for each run and task; an axis for either only where leaves are not one object."""
    structure = jax.tree.structure(trees[0][0])
    leaves = [[jax.tree.leaves(tree) for tree in of_run] for of_run in trees]
    stacked, by_run, by_task = [], [], []
    for position in range(structure.num_leaves):
        grid = [[of_task[position] for of_task in of_run] for of_run in leaves]
        differs_by_task = any(leaf is not of_run[0] for of_run in grid for leaf in of_run)
        differs_by_run = any(leaf is not first for of_run in grid for leaf, first in zip(of_run, grid[0], strict=True))
        of_runs = [jnp.stack(row) if differs_by_task else row[0] for row in (grid if differs_by_run else grid[:1])]
        stacked.append(jnp.stack(of_runs) if differs_by_run else of_runs[0])
        by_run.append(differs_by_run)
        by_task.append(differs_by_task)
    return jax.tree.unflatten(structure, stacked), _Axes(tuple(by_run), tuple(by_task))


def _masks(tasks: Sequence[Task], scenario: Scenario) -> tuple[jax.Array, jax.Array] | None:
    """Makes the active classes of each task while it is learned, and of each after each: `[T, C]`, `[T, T, C]`."""
    if scenario == "domain":
        return None
    numbers = range(len(tasks))
    learned = jnp.stack([active_classes(tasks, scenario, index, index) for index in numbers])
    tested = [jnp.stack([active_classes(tasks, scenario, index, latest) for index in numbers]) for latest in numbers]
    return learned, jnp.stack(tested)


@functools.partial(
    jax.jit,
    static_argnames=(
        "method",
        "apply_fn",
        "optimizer_fn",
        "ahead",
        "num_tasks",
        "num_epochs",
        "batch_size",
        "max_steps",
        "num_runs",
        "axes",
    ),
)
def _learn_runs(tasks: Any, rest: Any, *, num_runs: int, axes: tuple[_Axes, _Axes], **options: Any) -> Any:
    task_axes, rest_axes = axes
    learn = functools.partial(_learn_run, by_task=task_axes.by_task, **options)
    in_axes = tuple(
        jax.tree.unflatten(jax.tree.structure(tree), [0 if by_run else None for by_run in of_tree.by_run])
        for tree, of_tree in ((tasks, task_axes), (rest, rest_axes))
    )
    if num_runs == 1:  # an axis of one would slow the products down
        return jax.tree.map(lambda x: x[None], learn(tasks, rest))
    return jax.vmap(learn, in_axes=in_axes, axis_size=num_runs)(tasks, rest)


def _learn_run(
    tasks: Any,
    rest: Any,
    *,
    method: Method,
    apply_fn: OutputFn,
    optimizer_fn: OptimizerFn,
    ahead: bool,
    num_tasks: int,
    num_epochs: int,
    batch_size: int,
    max_steps: int | None,
    by_task: tuple[bool, ...],
) -> tuple[jax.Array, jax.Array]:
    params, masks, key, strength = rest
    optimizer = method.wrap_optimizer(optimizer_fn(strength))

    def task_at(index: jax.Array) -> Task:
        leaves, structure = jax.tree.flatten(tasks)
        chosen = [leaf[index] if varies else leaf for leaf, varies in zip(leaves, by_task, strict=True)]
        return jax.tree.unflatten(structure, chosen)

    def evaluate(params: Params, latest: jax.Array) -> jax.Array:
        def on_task(index: jax.Array) -> jax.Array:
            task = task_at(index)
            class_mask = None if masks is None else masks[1][latest, index]
            return accuracy(apply_fn, params, task.test, task.permutation, class_mask)

        def add(index: jax.Array, accuracies: jax.Array) -> jax.Array:
            return accuracies.at[index].set(on_task(index).astype(accuracies.dtype))

        return jax.lax.fori_loop(0, num_tasks if ahead else latest + 1, add, jnp.full(num_tasks, jnp.nan))

    def learn(carry: tuple[Any, Consolidation, jax.Array], index: jax.Array) -> tuple[Any, jax.Array]:
        (params, opt_state), consolidation, diverged = carry
        task = task_at(index)
        train_key, importance_key = task_keys(key, index)
        examples = with_class_mask(task.train, None if masks is None else masks[0][index])
        state = init_training(optimizer, params, train_key)
        carried = method.carry(state.opt_state, opt_state)
        opt_state = jax.tree.map(functools.partial(jnp.where, index > 0), carried, state.opt_state)
        output_fn = shown(apply_fn, task.permutation)
        state, info = learn_task(
            cross_entropy(output_fn),
            optimizer,
            state._replace(opt_state=opt_state),
            consolidation,
            examples,
            num_epochs=num_epochs,
            batch_size=batch_size,
            max_steps=max_steps,
            weights=examples.weights,
        )
        importance = method.importance_fn(output_fn, state, examples, importance_key)
        consolidation = consolidate(consolidation, state.params, importance, rule=method.rule, decay=method.decay)
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((info.loss, state.params))]
        diverged |= ~jnp.stack(finite).all()
        return ((state.params, state.opt_state), consolidation, diverged), evaluate(state.params, index)

    initial_accuracies = evaluate(params, 0) if ahead else jnp.full(num_tasks, jnp.nan)
    start = ((params, optimizer.init(params)), init_consolidation(params), jnp.array(False))
    (*_, diverged), accuracy_matrix = jax.lax.scan(learn, start, jnp.arange(num_tasks))
    return jax.tree.map(lambda x: jnp.where(diverged, jnp.nan, x), (accuracy_matrix, initial_accuracies))
