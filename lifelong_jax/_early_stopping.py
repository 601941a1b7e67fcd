"""Early stopping: the training state that was best on validation examples, in a host loop or in a compiled one."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lifelong_jax.evaluation import score
from lifelong_jax.recipes import Recipe
from lifelong_jax.training import TrainingState
from lifelong_jax.types import Task


class Best(NamedTuple):
    """The best epoch so far of the task that is being learned.

    Attributes:
      training: the training state after it.
      score: its score on the validation examples.
      num_worse: the number of epochs since then.
    """

    training: TrainingState
    score: jax.Array
    num_worse: jax.Array


def init_best(recipe: Recipe, training: TrainingState) -> Best | None:
    """Makes the state before a task's first epoch, which any epoch improves; None without early stopping."""
    if recipe.patience is None:
        return None
    limits = jnp.finfo(jnp.float32)
    worst = limits.min if recipe.objective.higher_is_better else limits.max
    return Best(jax.tree.map(jnp.copy, training), jnp.asarray(worst, jnp.float32), jnp.zeros((), jnp.int32))


def keep_best(
    recipe: Recipe, best: Best, training: TrainingState, tasks: Sequence[Task], masks: Sequence[jax.Array | None]
) -> Best:
    """Returns the better of the best epoch so far and the last one, by the mean score on tasks' validation examples."""
    options = (recipe.objective, training.model_state)
    scores = [
        score(recipe.apply_fn, training.params, task.validation, task.permutation, mask, *options)  # type: ignore[arg-type]
        for task, mask in zip(tasks, masks, strict=True)
    ]
    mean = jnp.stack(scores).mean().astype(jnp.float32)
    return _better(best, training, mean, higher_is_better=recipe.objective.higher_is_better)


@functools.partial(jax.jit, static_argnames=("higher_is_better",))
def _better(best: Best, training: TrainingState, score: jax.Array, *, higher_is_better: bool) -> Best:
    is_better = score > best.score if higher_is_better else score < best.score  # NaN is not
    keep = functools.partial(jax.tree.map, functools.partial(jnp.where, is_better))
    fields = ("params", "opt_state", "model_state")  # the key is that of the next epoch
    kept = {name: keep(getattr(training, name), getattr(best.training, name)) for name in fields}
    return Best(
        training._replace(**kept),
        jnp.where(is_better, score, best.score),
        jnp.where(is_better, 0, best.num_worse + 1),
    )
