"""The quadratic penalty on leaving the anchor: a term of the loss, and optax transforms that add it to any pipeline.

What a transform does depends on its place in the chain:

    coupled       chain(add_quadratic_penalty(λ), adam(lr))
    decoupled     chain(scale_by_adam(), add_quadratic_penalty(λ), scale_by_learning_rate(lr))
    proximal      chain(adam(lr), proximal_quadratic_penalty(lr, λ)), or proximal_adam(lr, λ)
    wrong sign    chain(adam(lr), add_quadratic_penalty(λ))

All are called alike, `optimizer.update(grads, state, params, **consolidation._asdict())`: the anchor and the importance
are arguments, so that nothing is compiled anew when they change. `optax.chain` forwards them, and so do `MultiSteps`,
`inject_hyperparams`, `apply_if_finite` and `contrib.schedule_free`, and flax's `nnx.Optimizer.update`. `optax.masked`
and `optax.partition` do it right with `mask_compatible_extra_args=True`. `TrainState.apply_gradients` of flax's linen
drops them: in its place go two lines,

    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, **consolidation._asdict())
    state = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)

Protected are the parameters whose importance is above 0. None in the anchor and in the importance, for a leaf or for a
whole branch, leaves what it stands for to the rest of the pipeline and takes no memory: a frozen backbone, say, or
leaves that have no gradients (integers, functions) and that equinox, too, holds apart as None.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lifelong_jax import _checks
from lifelong_jax.types import Consolidation, Params


class ScheduleState(NamedTuple):
    """How far a penalty's schedules have come.

    Attributes:
      count: how many steps have been made, an int32 scalar.
    """

    count: jax.Array


def quadratic_penalty(params: Params, consolidation: Consolidation, strength: float | jax.Array) -> jax.Array:
    """Computes the penalty as a term of the loss.

        strength / 2 · Σ_i consolidation.importance_i · (params_i − consolidation.anchor_i)²

    Args:
      params: a tree of floating-point arrays.
      consolidation: the anchor and the importance, trees like `params`, or None in the place of what is not protected.
      strength: λ, not negative.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: if the trees differ in structure or shapes, or, outside of jit, if `strength` is negative or not
        finite.

    Example:
      >>> consolidation = Consolidation(anchor=jnp.array(1.0), importance=jnp.array(2.0))
      >>> quadratic_penalty(jnp.array(4.0), consolidation, strength=10.0)
      Array(90., dtype=float32)

    Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114, eq. 3.
    """
    _checks.check_not_negative("strength", strength)

    def of_leaf(theta: jax.Array, anchor: jax.Array, importance: jax.Array) -> jax.Array:
        change = theta - anchor  # not squared by itself: what does not matter may have gone far, and 0 · inf is NaN
        return jnp.sum(jnp.asarray(strength, theta.dtype) * (importance * change * change)) / 2

    _check_trees("params", params, *consolidation)
    terms = jax.tree.leaves(_map_protected(of_leaf, params, *consolidation, otherwise=lambda branch: None))
    dtype = np.result_type(np.float32, *(term.dtype for term in terms))
    return sum((term.astype(dtype) for term in terms), start=jnp.zeros((), dtype))


def add_quadratic_penalty(strength: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of the quadratic penalty to the updates.

        updates ← updates + strength · importance · (params − anchor)

    What `optax.add_decayed_weights` is to weight decay, this is to the penalty. What it does depends on its place:

    - Before the preconditioner (before `optax.adam`, or any complete optimiser), *coupled*: exactly the gradient of
      loss + penalty, with its fixed points. Adam divides by the size of that sum, so where the penalty is stiff, the
      loss's gradient too makes small steps. Before a clipping of gradients, the penalty is clipped with them.
    - After the preconditioner and before `optax.scale_by_learning_rate`, *decoupled*, as weight decay is in AdamW: the
      preconditioner does not see the penalty. At a fixed point the *preconditioned* gradient, which is of size 1 with
      Adam, balances it: |params − anchor| is at most 1 / (strength · importance). With plain SGD there is no
      preconditioner, and no difference.
    - After a complete optimiser its sign is *wrong*: the updates have been turned downhill already, so it pushes away
      from the anchor. `proximal_quadratic_penalty` is what belongs there.

    An explicit step on a stiff quadratic oscillates with growing amplitude where learning rate · strength · importance
    > 2 for any parameter, coupled with SGD (> 2 · (1 + β) with momentum β) or decoupled with any preconditioner. Adam,
    coupled, moves by a few learning rates a step at the most, (1 − β₁) / sqrt(1 − β₂), at any strength; but by one it
    leaves the anchor in its first step. `proximal_quadratic_penalty` has no such limit.

    Args:
      strength: λ, not negative: a number; a value traced where the factory is called inside jit, or kept in the state
        by `optax.inject_hyperparams(add_quadratic_penalty)(strength=...)`; or an `optax.Schedule`.

    Returns:
      A transform whose `update` takes `anchor` and `importance`, trees like `params`, or None in the place of what is
      not protected. Its result keeps the dtypes of the updates; it computes in float32 at least.

    Raises:
      ValueError: if `strength` is negative or not finite; from `update`, if `params`, `anchor` or `importance` is
        missing, or if the trees differ in structure or shapes.

    Example:
      >>> optimizer = optax.chain(add_quadratic_penalty(10.0), optax.sgd(0.1))
      >>> consolidation = Consolidation(anchor=jnp.array(1.0), importance=jnp.array(0.5))
      >>> params = jnp.array(3.0)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jnp.array(0.0), state, params, **consolidation._asdict())
      >>> updates
      Array(-1., dtype=float32)

    Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114, eq. 3; on what decoupling does, Loshchilov and Hutter 2019,
    arXiv 1711.05101.
    """
    _check_hyperparameter("strength", strength)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        *,
        anchor: Params | None = None,
        importance: Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        _check_arguments(updates, params, anchor, importance)
        strength_now = _now(strength, state)

        def of_leaf(update: jax.Array, anchor: jax.Array, importance: jax.Array, theta: jax.Array) -> jax.Array:
            total = update + jnp.asarray(strength_now, update.dtype) * (importance * (theta - anchor))
            # On a CPU, XLA computes a sum anew for each of its users, here Adam's two moments, and would read all of it
            # twice; an optimization barrier does not keep it from that. A quotient it computes once, and it does not
            # know that this one is by 1.
            return total / (1 + jnp.minimum(jnp.abs(jax.lax.stop_gradient(update)), 0))

        result = _map_protected(of_leaf, updates, anchor, importance, params)
        return optax.tree.cast_like(result, updates), _advance(state)

    return optax.GradientTransformationExtraArgs(lambda params: _init_schedules(strength), update_fn)


def proximal_quadratic_penalty(
    step_size: optax.ScalarOrSchedule | Params, strength: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Follows the pipeline's step by the penalty's proximal step, which is stable at any strength: last in a chain.

        params + updates ← (params + updates + step_size · strength · importance · anchor)
                           / (1 + step_size · strength · importance)

    That is the minimum of |x − (params + updates)|² / (2 · step_size) + penalty(x): a mean of where the pipeline wants
    to go and of the anchor, which cannot overshoot either. For small step_size · strength · importance it is the
    explicit step; at large ones it sets a parameter to its anchor, within one rounding of the two, if its importance is
    above 0, and leaves it alone if not. It is finite in float32 whatever the three are.

    A fixed point is where updates = step_size · strength · importance · (params − anchor). So it is a fixed point of
    loss + penalty

    - for plain SGD, with `step_size` = learning rate;
    - for SGD with heavy-ball momentum β, whose updates come to −learning rate / (1 − β) · gradient, with `step_size` =
      learning rate / (1 − β); with the learning rate itself, it is that of strength · (1 − β);
    - for Adam, with a step size for each parameter, learning rate / (sqrt(v̂) + ε): `proximal_adam`. With `step_size` =
      learning rate it is another one, that of the decoupled penalty: |params − anchor| is at most 1 / (strength ·
      importance), however large the loss's gradient.

    It goes *inside* of wrappers that don't step every time, `MultiSteps(chain(..., proximal_quadratic_penalty(...)))`.
    `contrib.schedule_free` evaluates and steps at different points: inside of it a parameter is no longer pinned.

    Args:
      step_size: η, not negative: what the chain so far has multiplied its gradient by. A number, known or traced, an
        `optax.Schedule`, or a tree of numbers or arrays like `params` or a prefix of it; a schedule may return such a
        tree.
      strength: λ, not negative: a number, known or traced, or an `optax.Schedule`.

    Returns:
      A transform whose `update` takes `anchor` and `importance`, trees like `params`, or None in the place of what is
      not protected. Its result keeps the dtypes of the updates; it computes in float32 at least.

    Raises:
      ValueError: if `step_size` or `strength` is negative or not finite; from `update`, if `params`, `anchor` or
        `importance` is missing, or if the trees differ in structure or shapes.

    Example:
      >>> optimizer = optax.chain(optax.sgd(0.1), proximal_quadratic_penalty(0.1, strength=1e12))
      >>> consolidation = Consolidation(anchor=jnp.array([1.0, 1.0]), importance=jnp.array([0.5, 0.0]))
      >>> params = jnp.array([3.0, 3.0])
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jnp.ones(2), state, params, **consolidation._asdict())
      >>> optax.apply_updates(params, updates)
      Array([1. , 2.9], dtype=float32)

    Parikh and Boyd 2014, Proximal Algorithms, doi 10.1561/2400000003, section 6.1.1.
    """
    if not callable(step_size):
        if step_size is None:
            raise ValueError("step_size must be a number, a schedule or a tree of numbers, not None.")
        for path, leaf in jax.tree.leaves_with_path(step_size):
            _checks.check_not_negative(f"step_size{jax.tree_util.keystr(path)}", leaf, or_array=True)
    _check_hyperparameter("strength", strength)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        *,
        anchor: Params | None = None,
        importance: Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        _check_arguments(updates, params, anchor, importance)
        step_sizes, strength_now = jax.tree.broadcast(_now(step_size, state), updates), _now(strength, state)

        def of_leaf(
            update: jax.Array, anchor: jax.Array, importance: jax.Array, theta: jax.Array, step_size: jax.Array
        ) -> jax.Array:
            return _proximal_step(update, 1, _stiffness(step_size, strength_now, importance), anchor - theta)

        result = _map_protected(of_leaf, updates, anchor, importance, params, step_sizes)
        return optax.tree.cast_like(result, updates), _advance(state)

    return optax.GradientTransformationExtraArgs(lambda params: _init_schedules(step_size, strength), update_fn)


def proximal_adam(
    learning_rate: optax.ScalarOrSchedule,
    strength: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Makes Adam with the penalty's proximal step: stable at any strength, with the fixed points of loss + penalty.

        step_size = learning_rate / (sqrt(v̂) + eps)
        params ← (params − step_size · m̂ + step_size · strength · importance · anchor)
                 / (1 + step_size · strength · importance)

    m̂ and v̂ are Adam's corrected moments of the gradients that come in, which the penalty does not enter: a stiff one
    neither throws its parameters off the anchor in the first step, nor slows them after. To clip gradients, chain a
    clipping before. On permuted digits it was as accurate as Adam with the penalty coupled, at every strength
    (`experiments.strength_sweep`).

    Args:
      learning_rate: not negative: a number, known or traced, or an `optax.Schedule`.
      strength: λ, not negative: a number, known or traced, or an `optax.Schedule`.
      b1: the decay of the mean of the gradients.
      b2: the decay of the mean of their squares.
      eps: added to the root of that mean.

    Returns:
      An optimiser whose `update` takes `anchor` and `importance`, trees like `params`, or None in the place of what is
      not protected.

    Raises:
      ValueError: if `learning_rate` or `strength` is negative or not finite; from `update`, if `params`, `anchor` or
        `importance` is missing, or if the trees differ in structure or shapes.

    Example:
      >>> optimizer = proximal_adam(0.1, strength=1e12)
      >>> consolidation = Consolidation(anchor=jnp.array([1.0, 1.0]), importance=jnp.array([0.5, 0.0]))
      >>> params = jnp.array([3.0, 3.0])
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jnp.ones(2), state, params, **consolidation._asdict())
      >>> optax.apply_updates(params, updates).round(3)
      Array([1. , 2.9], dtype=float32)

    Kingma and Ba 2015, arXiv 1412.6980; the proximal step in a preconditioner's metric: Yun, Lozano and Yang 2021,
    arXiv 2007.07605.
    """
    _check_hyperparameter("learning_rate", learning_rate)
    _check_hyperparameter("strength", strength)
    adam = optax.scale_by_adam(b1, b2, eps)

    def update_fn(
        updates: optax.Updates,
        state: optax.ScaleByAdamState,
        params: Params | None = None,
        *,
        anchor: Params | None = None,
        importance: Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del extra_args
        _check_arguments(updates, params, anchor, importance)
        rate, strength_now = _now(learning_rate, state), _now(strength, state)
        directions, next_state = adam.update(updates, state)
        steps = jax.tree.map(lambda direction: -jnp.asarray(rate, direction.dtype) * direction, directions)
        # Of the bias corrections and of the step one fraction is made: on a CPU, quotients cost more than the memory.
        mean_rate = -rate / (1 - b1**next_state.count)
        root_rate = jax.lax.rsqrt(1.0 - b2**next_state.count)

        def of_leaf(
            step: jax.Array,
            anchor: jax.Array,
            importance: jax.Array,
            theta: jax.Array,
            mean: jax.Array,
            variance: jax.Array,
        ) -> jax.Array:
            stiffness = _stiffness(jnp.asarray(rate, step.dtype), strength_now, importance)
            mean, root = mean * mean_rate.astype(step.dtype), jnp.sqrt(variance) * root_rate.astype(step.dtype)
            return _proximal_step(mean, root + eps, stiffness, anchor - theta)

        result = _map_protected(of_leaf, steps, anchor, importance, params, next_state.mu, next_state.nu)
        return optax.tree.cast_like(result, steps), next_state

    return optax.GradientTransformationExtraArgs(adam.init, update_fn)


def _stiffness(step_size: jax.Array, strength: float | jax.Array, importance: jax.Array) -> jax.Array:
    return _product(_product(jnp.asarray(strength, step_size.dtype), step_size), importance)


def _proximal_step(
    step: jax.Array, denominator: jax.Array | float, stiffness: jax.Array, to_anchor: jax.Array
) -> jax.Array:
    """Goes by step / denominator, and then the proximal step of size 1 / denominator, as two fractions in all."""
    total = denominator + stiffness
    return step / total + stiffness / total * to_anchor


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # It stops at the largest finite number: an infinite factor, times 0 or divided by itself, would make a NaN.
    largest = jnp.finfo(a.dtype).max
    return jnp.minimum(jnp.minimum(a, largest) * jnp.minimum(b, largest), largest)


def _map_protected(
    function: Callable[..., jax.Array],
    tree: Params,
    anchor: Params,
    importance: Params,
    *others: Params,
    otherwise: Callable[[Params], Params] = lambda branch: branch,
) -> Params:
    """Maps `function(leaf, anchor, importance, *others)`, computed in float32 at least, over the protected leaves."""

    def of_leaf(importance: jax.Array | None, anchor: jax.Array | None, leaf: Params, *others: Params) -> Params:
        if importance is None:
            return otherwise(leaf)
        # One by one: NumPy knows no type that bfloat16 and float16 have in common, though float32 is one.
        dtype = functools.reduce(np.promote_types, map(jnp.result_type, (leaf, anchor, importance)), np.float32)
        return function(*(jnp.asarray(array, dtype) for array in (leaf, anchor, importance, *others)))

    # The importance comes first: where it has None, the others may have any branch.
    return jax.tree.map(of_leaf, importance, anchor, tree, *others, is_leaf=lambda node: node is None)


def _now(hyperparameter: optax.ScalarOrSchedule | Params, state: optax.OptState) -> float | jax.Array | Params:
    return hyperparameter(state.count) if callable(hyperparameter) else hyperparameter


def _init_schedules(*hyperparameters: optax.ScalarOrSchedule | Params) -> ScheduleState | optax.EmptyState:
    # No counter without need: people find the one of their optimiser by its name.
    return ScheduleState(jnp.zeros((), jnp.int32)) if any(map(callable, hyperparameters)) else optax.EmptyState()


def _advance(state: ScheduleState | optax.EmptyState) -> ScheduleState | optax.EmptyState:
    return ScheduleState(optax.safe_increment(state.count)) if isinstance(state, ScheduleState) else state


def _check_hyperparameter(name: str, value: optax.ScalarOrSchedule) -> None:
    if not callable(value):
        _checks.check_not_negative(name, value)


def _check_arguments(
    updates: optax.Updates, params: Params | None, anchor: Params | None, importance: Params | None
) -> None:
    if params is None or anchor is None or importance is None:
        raise ValueError(
            "the penalty needs params, anchor and importance: call "
            "optimizer.update(grads, state, params, **consolidation._asdict())."
        )
    try:
        _check_trees("updates", updates, anchor, importance)
        _checks.check_same_structure("importance", importance, "params", params, partial=True)
    except ValueError as error:
        nodes = jax.tree.leaves(updates, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
        if any(isinstance(node, optax.MaskedNode) for node in nodes):
            raise ValueError(
                f"{error} A mask has been put on the updates: pass mask_compatible_extra_args=True to optax.masked or "
                f"optax.partition."
            ) from None
        raise


def _check_trees(name: str, tree: Params, anchor: Params, importance: Params) -> None:
    _checks.check_same_structure("importance", importance, name, tree, partial=True)
    _checks.check_same_structure("anchor", anchor, "importance", importance)
    try:
        protected = jax.tree.map(
            lambda omega, branch: None if omega is None else branch, importance, tree, is_leaf=lambda node: node is None
        )
    except ValueError as error:  # where branches without leaves differ
        raise ValueError(f"importance and {name} must be trees of one structure: {error}") from error
    for protected_name, branches in ((name, protected), ("anchor", anchor), ("importance", importance)):
        _checks.check_params(protected_name, branches)
