"""What `learn_tasks` and `learn_sweep` do alike before each task: its optimiser, its keys and its first state."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lifelong_jax.methods import Method, WrapOptimizer
from lifelong_jax.training import TrainingState, init_training
from lifelong_jax.types import OptimizerFn


def make_optimizer(
    optimizer_fn: OptimizerFn, wrap_optimizer: WrapOptimizer | None, strength: jax.Array
) -> optax.GradientTransformation:
    """Makes the optimiser for a strength, wrapped if the method gathers importance during training."""
    optimizer = optimizer_fn(strength)
    return optimizer if wrap_optimizer is None else wrap_optimizer(optimizer)


@jax.jit
def task_keys(key: jax.Array, index: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Makes the keys of a task's training and importance from the sequence's key and the task's number."""
    train_key, importance_key = jax.random.split(jax.random.fold_in(key, index))
    return train_key, importance_key


def begin_task(
    method: Method, optimizer: optax.GradientTransformation, previous: TrainingState, key: jax.Array, index: ArrayLike
) -> TrainingState:
    """Makes the state before a task's first step, with what the method carries over from the previous task."""
    training = init_training(optimizer, previous.params, key)
    if method.carry is None:
        return training
    carried = method.carry(training.opt_state, previous.opt_state)
    opt_state = jax.tree.map(functools.partial(jnp.where, index > 0), carried, training.opt_state)  # type: ignore[operator]
    return training._replace(opt_state=opt_state)
