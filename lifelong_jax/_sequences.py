"""What `learn_tasks` and `learn_sweep` do alike: the checks of a run, and a task's optimiser, keys and state.

Before the first task, a trial of the optimiser tells whether it has a penalty, and in the right place.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from lifelong_jax import _checks
from lifelong_jax._numerics import widen, with_extra_args
from lifelong_jax.methods import Method, WrapOptimizer, finetune
from lifelong_jax.recipes import Recipe
from lifelong_jax.training import TrainingState, init_training
from lifelong_jax.types import Consolidation, OptimizerFn, Params


def make_optimizer(
    optimizer_fn: OptimizerFn, wrap_optimizer: WrapOptimizer | None, strength: jax.Array
) -> optax.GradientTransformation:
    """Makes the optimiser for a strength, wrapped if the method gathers importance during training."""
    optimizer = optimizer_fn(strength)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"recipe.optimizer_fn must return an optax optimiser, not a {type(optimizer).__name__}.")
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
    training = init_training(optimizer, previous.params, key, previous.model_state)
    if method.carry is None:
        return training
    carried = method.carry(training.opt_state, previous.opt_state)
    opt_state = jax.tree.map(functools.partial(jnp.where, index > 0), carried, training.opt_state)  # type: ignore[operator]
    return training._replace(opt_state=opt_state)


def check_run(
    method: Method | None, recipe: Recipe, params: Params, key: jax.Array, strength: float, prefix: str = ""
) -> None:
    """Raises an error that names the argument unless key, strength and optimiser are valid; `prefix` names the run."""
    try:
        jax.eval_shape(jax.random.fold_in, key, 0)
    except (TypeError, ValueError):
        raise TypeError(f"{prefix}key must be one random key, such as jax.random.key(0), not {key!r}.") from None
    _checks.check_not_negative(f"{prefix}strength", strength)
    if not callable(recipe.optimizer_fn):
        raise TypeError("recipe.optimizer_fn is not a function: pass lambda strength: optax.chain(...).")
    if method is not None:
        check_penalty(method, recipe.optimizer_fn, params, strength)


def check_penalty(method: Method, optimizer_fn: OptimizerFn, params: Params, strength: ArrayLike) -> None:
    """Raises ValueError if a method's penalty is missing in its optimiser, or pushes away from the anchor.

    It says nothing of optimisers that need more than gradients, move without them, or do not move in a few steps.
    """
    if method.importance_fn is finetune().importance_fn or strength == 0:
        return
    entries = jax.tree.map(lambda leaf: jnp.zeros((1,) * jnp.ndim(leaf), jnp.result_type(leaf)), params)
    strength = jnp.asarray(strength, jnp.float32)
    try:
        still, moved = (jax.device_get(_trial(optimizer_fn, strength, entries, anchor)) for anchor in (0.0, 1.0))
        no_penalty = all(map(np.array_equal, jax.tree.leaves(still), jax.tree.leaves(moved)))
        if no_penalty:  # in so few steps; whatever reads the consolidation fails with these objects in its place
            optimizer = with_extra_args(optimizer_fn(strength))
            objects = dict.fromkeys(Consolidation._fields, object())
            jax.eval_shape(lambda tree: optimizer.update(tree, optimizer.init(tree), tree, **objects), params)
    except Exception:
        return
    if no_penalty:
        raise ValueError(
            f"recipe.optimizer_fn makes an optimiser without a penalty, with which {method.name} would forget as "
            f"finetune does: put add_quadratic_penalty(strength) before the optimiser in its chain, or "
            f"proximal_quadratic_penalty(step_size, strength) after it. To learn without a penalty, pass strength=0."
        )
    for (path, positions), alone in zip(jax.tree.leaves_with_path(moved), jax.tree.leaves(still), strict=True):
        if not alone.any() and positions.max() <= 0 and positions.min() < 0:
            raise ValueError(
                f"recipe.optimizer_fn makes an optimiser whose penalty pushes params{jax.tree_util.keystr(path)} away "
                f"from the anchor: put add_quadratic_penalty before the optimiser in its chain, because its updates "
                f"point downhill already, and proximal_quadratic_penalty after it."
            )


@functools.partial(jax.jit, static_argnames=("optimizer_fn",))
def _trial(optimizer_fn: OptimizerFn, strength: jax.Array, start: Params, anchor: ArrayLike) -> Params:
    """Returns the parameters after each of a few steps of the penalty alone, which is not stiff."""
    optimizer = with_extra_args(optimizer_fn(strength))
    wide = jax.tree.map(widen, start)
    consolidation = Consolidation(*(optax.tree.full_like(wide, value) for value in (anchor, 1e-4 / strength)))

    def step(carry: tuple[Params, optax.OptState], _: None) -> tuple[tuple[Params, optax.OptState], Params]:
        params, opt_state = carry
        updates, opt_state = optimizer.update(start, opt_state, params, **consolidation._asdict())
        params = optax.apply_updates(params, updates)
        return (params, opt_state), params

    _, positions = jax.lax.scan(step, (start, optimizer.init(start)), length=8)
    return positions
