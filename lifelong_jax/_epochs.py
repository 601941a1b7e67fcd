"""The compiled parts of the loop over tasks: an epoch of training, and an importance; and how long they take."""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lifelong_jax._meshes import (
    Layout,
    find_layout,
    find_placement,
    knowing,
    on_automatic,
    on_automatic_axes,
    on_automatic_axes_as,
)
from lifelong_jax._sequences import make_optimizer
from lifelong_jax._split_batches import LoopShardings, specs_of
from lifelong_jax.methods import ImportanceFn, Method, WrapOptimizer
from lifelong_jax.objectives import label_counts
from lifelong_jax.recipes import Recipe, network_of, training_loss
from lifelong_jax.scenarios import active_classes, joint_examples, with_class_mask
from lifelong_jax.training import TrainingInfo, TrainingState, _learn_split_batches
from lifelong_jax.types import Batch, Consolidation, Params, Scenario, Task


class TrainingData(NamedTuple):
    """What the trainer gets: one task's training examples, and the permutation of their features."""

    examples: Batch
    permutation: jax.Array | None


def training_data(tasks: Sequence[Task], scenario: Scenario, index: int) -> TrainingData:
    """Returns a task's training examples, with the class mask that they are trained with."""
    examples = with_class_mask(tasks[index].train, active_classes(tasks, scenario, index, index))
    return TrainingData(examples, tasks[index].permutation)


def joint_data(tasks: Sequence[Task], scenario: Scenario) -> TrainingData:
    """Joins the training examples of all tasks, sharded as they are."""
    placement = find_placement([task.train for task in tasks])
    if placement is None:
        return TrainingData(joint_examples(tasks, scenario), None)
    kinds = dict(zip(placement.mesh.axis_names, placement.mesh.axis_types, strict=True))
    explicit = PartitionSpec(tuple(name for name in placement.axes if kinds[name] == AxisType.Explicit))
    examples = _join(list(tasks), scenario, explicit)
    return TrainingData(jax.device_put(examples, NamedSharding(placement.mesh, PartitionSpec(placement.axes))), None)


# Outside of a jit, what is made of arrays that are on no mesh alone, such as class masks, could not be placed on one.
@functools.partial(jax.jit, static_argnames=("scenario", "spec"))
def _join(tasks: list[Task], scenario: Scenario, spec: PartitionSpec) -> Batch:
    return on_automatic_axes(lambda tasks: joint_examples(tasks, scenario), (tasks,), out=spec)


def same_sizes(tasks: Sequence[Task], index: int, other: int) -> bool:
    """Returns whether two tasks have as many training examples, and so one program."""
    shapes = [jax.tree.map(jnp.shape, tasks[number].train) for number in (index, other)]
    return shapes[0] == shapes[1]


def compiled_part(recipe: Recipe) -> Recipe:
    """Returns a recipe without what an epoch's program does not depend on, so that it is compiled once."""
    return recipe._replace(num_epochs=1, scenario="domain", patience=None)


def train(
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    consolidation: Consolidation,
    data: TrainingData,
    state: TrainingState,
    *,
    num_epochs: int,
    max_steps: int | None = None,
    shardings: LoopShardings,
) -> tuple[TrainingState, TrainingInfo]:
    """Trains on a task's training examples, as a recipe says."""
    return _learn_split_batches(
        training_loss(recipe, data.permutation),
        optimizer,
        state,
        consolidation,
        data.examples,
        label_counts(recipe.objective, data.examples),
        num_epochs=num_epochs,
        batch_size=recipe.batch_size,
        max_steps=max_steps,
        shardings=shardings,
    )


@functools.partial(jax.jit, static_argnames=("recipe", "wrap_optimizer", "shardings"), donate_argnames=("state",))
def learn_epoch(
    recipe: Recipe,
    wrap_optimizer: WrapOptimizer | None,
    state: TrainingState,
    consolidation: Consolidation,
    strength: jax.Array,
    data: TrainingData,
    *,
    shardings: LoopShardings,
) -> tuple[TrainingState, TrainingInfo]:
    """Trains for an epoch; frees the arrays of the state."""

    def learn(
        state: TrainingState, consolidation: Consolidation, strength: jax.Array, data: TrainingData
    ) -> tuple[TrainingState, TrainingInfo]:
        optimizer = make_optimizer(recipe.optimizer_fn, wrap_optimizer, strength)
        return train(recipe, optimizer, consolidation, data, state, num_epochs=1, shardings=shardings)

    arguments = (state, consolidation, strength, data)
    return on_automatic_axes(learn, arguments, out=(specs_of(state), PartitionSpec()))


def importance_of(
    recipe: Recipe, importance_fn: ImportanceFn, state: TrainingState, data: TrainingData, key: jax.Array
) -> Params:
    """Computes a method's importance on a task's training examples."""
    network = network_of(recipe, state.model_state, data.permutation)
    return importance_fn(network, recipe.objective, state, data.examples, key)


def measuring(method: Method, recipe: Recipe, state: TrainingState, data: TrainingData) -> functools.partial:
    """Returns the compiled function that computes a method's importance, wherever the arrays are."""
    layout = on_automatic(find_layout(state.params, (data.examples, None), state))
    return functools.partial(compute_importance, compiled_part(recipe), method.importance_fn, layout=layout)


# Arrays that a method does not use are kept: without any, a program would not know of the mesh that its result is on.
@functools.partial(jax.jit, static_argnames=("recipe", "importance_fn", "layout"), keep_unused=True)
def compute_importance(
    recipe: Recipe,
    importance_fn: ImportanceFn,
    state: TrainingState,
    data: TrainingData,
    key: jax.Array,
    *,
    layout: Layout | None,
) -> Params:
    """Computes a method's importance, on automatic axes, with arrays that are sharded as a layout says."""

    def measure(state: TrainingState, data: TrainingData, key: jax.Array) -> Params:
        with knowing(layout):
            return importance_of(recipe, importance_fn, state, data, key)

    return on_automatic_axes_as(state.params, measure, (state, data, key))


def timed(function: functools.partial, *args: object, compiled: bool = False) -> tuple[Any, float]:
    """Calls a compiled function; returns its result and the seconds that it took, without compilation."""
    if not compiled:  # so that the time of a method does not depend on its place in a comparison
        function.func.lower(*function.args, *args, **function.keywords).compile()
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start
