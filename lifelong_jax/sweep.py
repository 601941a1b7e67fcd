"""Several runs of a sequence of tasks, seeds and strengths, as one compiled program: `jit(vmap(scan over tasks))`.

Each run does what `learn_tasks` does, with the same keys and, up to rounding, the same numbers, but without a callback
after every epoch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lifelong_jax import _checks
from lifelong_jax._early_stopping import init_best, keep_best
from lifelong_jax._epochs import TrainingData, importance_of, train
from lifelong_jax._meshes import check_places, leading_axes, on_automatic_axes
from lifelong_jax._sequences import begin_task, check_run, make_optimizer, task_keys
from lifelong_jax._split_batches import (
    find_shardings,
    make_whole,
    num_parts,
    round_up,
    sharding_of_runs,
)
from lifelong_jax._task_checks import check_tasks
from lifelong_jax.consolidation import consolidate, init_consolidation
from lifelong_jax.evaluation import score
from lifelong_jax.methods import Method
from lifelong_jax.recipes import Recipe
from lifelong_jax.scenarios import active_classes, with_class_mask
from lifelong_jax.training import TrainingState
from lifelong_jax.types import Consolidation, ModelState, Params, Scenario, Task


class SweepRun(NamedTuple):
    """The arguments of `learn_tasks` that may differ between the runs of a sweep.

    Attributes:
      params: the parameters to start from.
      tasks: the sequence. An array that is the same object in several runs, or tasks, is stored once.
      key: the random key of shuffling and of sampled labels.
      strength: λ, not negative.
      model_state: with a `recipe.train_fn`, the model state to start from, () if there is none; otherwise None.
    """

    params: Params
    tasks: Sequence[Task]
    key: jax.Array
    strength: float
    model_state: ModelState = None


class SweepAccuracies(NamedTuple):
    """The accuracies of the runs of a sweep.

    Attributes:
      accuracy_matrix: `[num_runs, num_tasks, num_tasks]`; entry [r, i, j] is run r's accuracy on task j's test set
        after task i has been learned, a fraction; NaN where not measured, and in runs that diverged.
      initial_accuracies: `[num_runs, num_tasks]`, the accuracy before any task was learned; NaN likewise.
    """

    accuracy_matrix: np.ndarray
    initial_accuracies: np.ndarray


def learn_sweep(
    method: Method,
    recipe: Recipe,
    runs: Sequence[SweepRun],
    *,
    max_steps: int | None = None,
    forward_transfer: bool = True,
) -> SweepAccuracies:
    """Learns several runs of a sequence of tasks as one compiled program.

    The same compiled program serves all sweeps of as many runs with equal shapes, whatever their seeds and strengths.

    Where an array of the runs' tasks or parameters is on a mesh, the runs are spread over its devices: each device
    learns its own, and nothing is sent between them. Place the examples whole on each device, before the tasks are made
    of them: `jax.device_put(train, NamedSharding(mesh, PartitionSpec()))`. Axes that an array is sharded over are left
    to the compiler; the runs are spread over the others.

    Args:
      method: from `methods`.
      recipe: as for `learn_tasks`.
      runs: one or more, of equal shapes.
      max_steps: the step after which a task's training ends within its epochs, or None for the last epoch's end.
      forward_transfer: whether to measure the accuracy on tasks before they are learned, as for `learn_tasks`.

    Returns:
      Each run's accuracies. A run that diverges does not end the others.

    Raises:
      TypeError: as for `learn_tasks`.
      ValueError: as for `learn_tasks`, or if there are no runs or they differ in shape.

    Example:
      >>> import optax
      >>> from lifelong_jax import Batch, Recipe, SweepRun, add_quadratic_penalty, methods, permuted_tasks
      >>> batch = Batch(jnp.eye(4), jnp.arange(4) % 2, jnp.ones(4))
      >>> tasks = permuted_tasks(batch, batch, 3, jax.random.key(0))
      >>> optimizer_fn = lambda strength: optax.chain(add_quadratic_penalty(strength), optax.sgd(1.0))
      >>> runs = [SweepRun(jnp.zeros((4, 2)), tasks, jax.random.key(1), strength) for strength in (0.1, 1.0, 10.0)]
      >>> recipe = Recipe(lambda w, x: x @ w, optimizer_fn, num_epochs=10, batch_size=2)
      >>> learn_sweep(methods.ewc(), recipe, runs).accuracy_matrix.shape
      (3, 3, 3)
    """
    _check_runs(method, recipe, runs, max_steps)
    check_places(runs=runs)
    num_runs = len(runs)
    sharding = sharding_of_runs([(run.params, run.tasks) for run in runs]) if num_runs > 1 else None
    runs = [*runs, *[runs[-1]] * (round_up(num_runs, sharding) - num_runs)]
    masks = {id(run.tasks): _masks(run.tasks, recipe.scenario) for run in runs}
    tasks, task_axes = _stack([run.tasks for run in runs])
    starts = [
        _Start(run.params, run.model_state, masks[id(run.tasks)], run.key, jnp.asarray(run.strength, jnp.float32))
        for run in runs
    ]
    start, start_axes = _stack([[start] for start in starts])
    accuracies = _learn_runs(
        tasks,
        start,
        num_runs=len(runs),
        axes=(task_axes, start_axes),
        plan=_Plan(method, recipe, forward_transfer, len(runs[0].tasks), max_steps),
        sharding=sharding,
    )
    arrays = [np.asarray(array, np.float64)[:num_runs] for array in accuracies]
    return SweepAccuracies(*(np.where(array == _UNKNOWN, np.nan, array) for array in arrays))


_UNKNOWN = float(np.finfo(np.float32).min)  # in compiled programs, where jax_debug_nans would take NaN for a fault


def _check_runs(method: Method, recipe: Recipe, runs: Sequence[SweepRun], max_steps: int | None) -> None:
    if not runs:
        raise ValueError("runs is empty: there is nothing to learn.")
    _checks.check_positive_integer("max_steps", max_steps, optional=True)
    for index, run in enumerate(runs):
        if not isinstance(run, SweepRun):
            raise TypeError(f"runs[{index}] is a {type(run).__name__}: pass a SweepRun(params, tasks, key, strength).")
    check_tasks(method, recipe, runs[0].params, runs[0].model_state, runs[0].tasks)
    if max_steps is not None and recipe.patience is not None:
        raise ValueError("max_steps is given, but recipe.patience says when training ends: leave one of them None.")
    checked, first = {id(runs[0].tasks)}, runs[0].tasks[0]
    for index, run in enumerate(runs):
        _checks.check_same_structure(f"runs[{index}].params", run.params, "runs[0].params", runs[0].params)
        state, first_state = run.model_state, runs[0].model_state
        _checks.check_same_structure(f"runs[{index}].model_state", state, "runs[0].model_state", first_state)
        if len(run.tasks) != len(runs[0].tasks):
            raise ValueError(f"runs[{index}] has {len(run.tasks)} tasks, but runs[0] has {len(runs[0].tasks)}.")
        for number, task in enumerate(run.tasks):
            try:
                _checks.check_same_structure(f"runs[{index}].tasks[{number}]", task, "runs[0].tasks[0]", first)
            except ValueError as error:
                hint = "One program learns all tasks: tasks.pad_tasks gives tasks of different sizes one shape."
                raise ValueError(f"{error} {hint}") from None
        if id(run.tasks) not in checked:  # runs of one seed share their tasks
            check_tasks(method, recipe, run.params, run.model_state, run.tasks)
            checked.add(id(run.tasks))
        check_run(method, recipe, run.params, run.key, run.strength, f"runs[{index}].")


class _Start(NamedTuple):
    """What a run starts from, besides its tasks."""

    params: Params
    model_state: ModelState
    masks: tuple[jax.Array | None, jax.Array | None]
    key: jax.Array
    strength: jax.Array


# The training state of the task before, the consolidation, and whether the run has diverged.
_Carry: TypeAlias = tuple[TrainingState, Consolidation, jax.Array]


class _Axes(NamedTuple):
    """Whether each leaf has a leading axis of runs, and one of tasks; hashable, for jit."""

    by_run: tuple[bool, ...]
    by_task: tuple[bool, ...]


def _stack(trees: Sequence[Sequence[Any]]) -> tuple[Any, _Axes]:
    """Stacks the trees of all runs and tasks; a leaf that is the same object in all of them gets no axis."""
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


def _masks(tasks: Sequence[Task], scenario: Scenario) -> tuple[jax.Array | None, jax.Array | None]:
    """Makes the active classes of each task while it is learned, `[T, C]`, and of each task after each, `[T, T, C]`."""
    if scenario == "domain":
        return None, None
    numbers = range(len(tasks))
    train = [active_classes(tasks, scenario, index, index) for index in numbers]
    test = [[active_classes(tasks, scenario, index, latest) for index in numbers] for latest in numbers]
    return jnp.asarray(train), jnp.asarray(test)


@functools.partial(jax.jit, static_argnames=("num_runs", "axes", "plan", "sharding"))
def _learn_runs(
    tasks: Task,
    start: _Start,
    *,
    num_runs: int,
    axes: tuple[_Axes, _Axes],
    plan: "_Plan",
    sharding: NamedSharding | None,
) -> tuple[jax.Array, jax.Array]:
    """Learns all runs, on a mesh each device its own."""
    learn = functools.partial(_learn_together, num_runs=num_runs // num_parts(sharding), axes=axes, plan=plan)
    if sharding is None:
        return on_automatic_axes(learn, (tasks, start), out=PartitionSpec())

    def learn_shards(tasks: Task, start: _Start) -> tuple[jax.Array, jax.Array]:
        shards = jax.shard_map(
            learn,
            mesh=sharding.mesh,
            in_specs=_by_run((tasks, start), axes, sharding.spec, PartitionSpec()),
            out_specs=sharding.spec,
            axis_names=set(leading_axes(sharding.spec)),
            check_vma=False,  # nothing is computed over several runs
        )
        return make_whole(shards(tasks, start), sharding)

    return on_automatic_axes(learn_shards, (tasks, start), out=PartitionSpec())


def _learn_together(
    tasks: Task, start: _Start, *, num_runs: int, axes: tuple[_Axes, _Axes], plan: "_Plan"
) -> tuple[jax.Array, jax.Array]:
    learn = functools.partial(_learn_run, by_task=axes[0].by_task, plan=plan)
    if num_runs > 1:
        return jax.vmap(learn, in_axes=_by_run((tasks, start), axes, 0, None), axis_size=num_runs)(tasks, start)
    # An axis of length 1 would slow down the products.
    has_axis = _by_run((tasks, start), axes, True, False)
    tasks, start = jax.tree.map(lambda x, axis: x[0] if axis else x, (tasks, start), has_axis)
    return jax.tree.map(lambda x: x[None], learn(tasks, start))


def _by_run(trees: tuple[Task, _Start], axes: tuple[_Axes, _Axes], if_by_run: Any, otherwise: Any) -> Any:
    """Makes trees like those of the tasks and the start, of one value where a leaf has an axis of runs, or another."""
    return tuple(
        jax.tree.unflatten(jax.tree.structure(tree), [if_by_run if by_run else otherwise for by_run in of_tree.by_run])
        for tree, of_tree in zip(trees, axes, strict=True)
    )


def _task_at(tasks: Task, by_task: tuple[bool, ...], index: jax.Array | int) -> Task:
    leaves, structure = jax.tree.flatten(tasks)
    return structure.unflatten(leaf[index] if axis else leaf for leaf, axis in zip(leaves, by_task, strict=True))


class _Plan(NamedTuple):
    """What all runs have alike, and that is known when they are compiled."""

    method: Method
    recipe: Recipe
    forward_transfer: bool
    num_tasks: int
    max_steps: int | None

    @property
    def ahead(self) -> bool:
        """Whether tasks are evaluated before they are learned."""
        return self.forward_transfer and self.recipe.scenario != "class"


def _learn_run(tasks: Task, start: _Start, *, plan: _Plan, by_task: tuple[bool, ...]) -> tuple[jax.Array, jax.Array]:
    """Learns one run's tasks; returns its accuracy matrix and its initial accuracies."""
    params, model_state, (train_masks, test_masks), key, strength = start
    method, recipe, num_tasks = plan.method, plan.recipe, plan.num_tasks
    optimizer = make_optimizer(recipe.optimizer_fn, method.wrap_optimizer, strength)
    task_at = functools.partial(_task_at, tasks, by_task)

    def evaluate(state: TrainingState, latest: jax.Array | int) -> jax.Array:
        return _evaluate(plan, state, task_at, _mask_at(test_masks, latest), latest)

    def data_of(task: Task, index: jax.Array | int) -> TrainingData:
        return TrainingData(with_class_mask(task.train, _mask_at(train_masks, index)), task.permutation)

    measure = functools.partial(importance_of, recipe, method.importance_fn)

    def learn(carry: _Carry, index: jax.Array) -> tuple[_Carry, jax.Array]:
        previous, consolidation, diverged = carry
        train_key, importance_key = task_keys(key, index)
        task = task_at(index)
        data = data_of(task, index)
        state = begin_task(method, optimizer, previous, train_key, index)
        shardings = find_shardings(state, data.examples)
        learn_data = functools.partial(train, recipe, optimizer, consolidation, data, shardings=shardings)
        if recipe.patience is None:
            state, info = learn_data(state, num_epochs=recipe.num_epochs, max_steps=plan.max_steps)
            learned = (info.loss, state.params)
        else:
            state, learned = _learn_with_patience(recipe, learn_data, state, task, _mask_at(train_masks, index))
        importance = measure(state, data, importance_key)
        consolidation = consolidate(consolidation, state.params, importance, rule=method.rule, decay=method.decay)
        finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(learned)]
        diverged |= ~jnp.stack(finite).all()
        return (state, consolidation, diverged), evaluate(state, index)

    state = TrainingState(params, optimizer.init(params), key, model_state)
    initial_accuracies = evaluate(state, 0) if plan.ahead else jnp.full(num_tasks, _UNKNOWN)
    # The importance's shapes, so that the first task's consolidation has the forms of the others.
    like = jax.eval_shape(measure, state, data_of(task_at(0), 0), key)
    carry = (state, init_consolidation(params, like), jnp.array(False))
    (*_, diverged), accuracy_matrix = jax.lax.scan(learn, carry, jnp.arange(num_tasks))
    return jax.tree.map(lambda x: jnp.where(diverged, _UNKNOWN, x), (accuracy_matrix, initial_accuracies))


def _mask_at(masks: jax.Array | None, index: jax.Array | int) -> jax.Array | None:
    return None if masks is None else masks[index]


def _learn_with_patience(
    recipe: Recipe, learn_data: Callable, state: TrainingState, task: Task, mask: jax.Array | None
) -> tuple[TrainingState, tuple[jax.Array, Params]]:
    """Learns a task with early stopping; returns the best state, and the sum of losses and the last parameters."""

    def goes_on(carry: tuple) -> jax.Array:
        epoch, _, best, _ = carry
        return (epoch < recipe.num_epochs) & (best.num_worse < recipe.patience)

    def learn(carry: tuple) -> tuple:
        epoch, state, best, loss = carry
        state, info = learn_data(state, num_epochs=1)
        best = keep_best(recipe, best, state, [task], [mask])
        return epoch + 1, state, best, loss + jnp.sum(info.loss).astype(loss.dtype)

    best: Any = init_best(recipe, state)
    start = (jnp.zeros((), jnp.int32), state, best, jnp.zeros(()))
    _, last, best, loss = jax.lax.while_loop(goes_on, learn, start)
    return best.training, (loss, last.params)


def _evaluate(
    plan: _Plan, state: TrainingState, task_at: Callable, masks: jax.Array | None, latest: jax.Array | int
) -> jax.Array:
    """Measures the score on each task, or on each task up to the latest."""
    apply_fn, objective = plan.recipe.apply_fn, plan.recipe.objective

    def add(index: jax.Array, scores: jax.Array) -> jax.Array:
        task = task_at(index)
        mask = _mask_at(masks, index)
        of_task = score(apply_fn, state.params, task.test, task.permutation, mask, objective, state.model_state)
        return scores.at[index].set(of_task.astype(scores.dtype))

    num_evaluated = plan.num_tasks if plan.ahead else latest + 1
    return jax.lax.fori_loop(0, num_evaluated, add, jnp.full(plan.num_tasks, _UNKNOWN))
