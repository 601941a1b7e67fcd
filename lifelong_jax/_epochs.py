"""The compiled parts of the loop over tasks: an epoch of training, and an importance; and how long they take."""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from lifelong_jax._sequences import make_optimizer
from lifelong_jax.methods import ImportanceFn, WrapOptimizer
from lifelong_jax.objectives import label_counts
from lifelong_jax.recipes import Recipe, network_of, training_loss
from lifelong_jax.scenarios import active_classes, with_class_mask
from lifelong_jax.training import TrainingInfo, TrainingState, learn_task
from lifelong_jax.types import Batch, Consolidation, Params, Scenario, Task


class TrainingData(NamedTuple):
    """What the trainer gets: one task's training examples, and the permutation of their features."""

    examples: Batch
    permutation: jax.Array | None


def training_data(tasks: Sequence[Task], scenario: Scenario, index: int) -> TrainingData:
    """Returns a task's training examples, with the class mask that they are trained with."""
    examples = with_class_mask(tasks[index].train, active_classes(tasks, scenario, index, index))
    return TrainingData(examples, tasks[index].permutation)


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
) -> tuple[TrainingState, TrainingInfo]:
    """Trains on a task's training examples, as a recipe says."""
    return learn_task(
        training_loss(recipe, data.permutation),
        optimizer,
        state,
        consolidation,
        data.examples,
        num_epochs=num_epochs,
        batch_size=recipe.batch_size,
        max_steps=max_steps,
        weights=label_counts(recipe.objective, data.examples),
    )


@functools.partial(jax.jit, static_argnames=("recipe", "wrap_optimizer"), donate_argnames=("state",))
def learn_epoch(
    recipe: Recipe,
    wrap_optimizer: WrapOptimizer | None,
    state: TrainingState,
    consolidation: Consolidation,
    strength: jax.Array,
    data: TrainingData,
) -> tuple[TrainingState, TrainingInfo]:
    """Trains for an epoch; frees the arrays of the state."""
    optimizer = make_optimizer(recipe.optimizer_fn, wrap_optimizer, strength)
    return train(recipe, optimizer, consolidation, data, state, num_epochs=1)


def importance_of(
    recipe: Recipe, importance_fn: ImportanceFn, state: TrainingState, data: TrainingData, key: jax.Array
) -> Params:
    """Computes a method's importance on a task's training examples."""
    network = network_of(recipe, state.model_state, data.permutation)
    return importance_fn(network, recipe.objective, state, data.examples, key)


compute_importance = jax.jit(importance_of, static_argnames=("recipe", "importance_fn"))


def timed(function: functools.partial, *args: object, compiled: bool = False) -> tuple[Any, float]:
    """Calls a compiled function; returns its result and the seconds that it took, without compilation."""
    if not compiled:  # so that the time of a method does not depend on its place in a comparison
        function.func.lower(*function.args, *args, **function.keywords).compile()
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start
