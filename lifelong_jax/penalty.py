"""The quadratic penalty on leaving the anchor: as a term of the loss, and as optax transforms for any pipeline.

What a transform does depends on its place in the chain:

    coupled       chain(add_quadratic_penalty(λ), adam(lr))
    decoupled     chain(scale_by_adam(), add_quadratic_penalty(λ), scale_by_learning_rate(lr))
    proximal      chain(adam(lr), proximal_quadratic_penalty(lr, λ)), or proximal_adam(lr, λ)
    wrong sign    chain(adam(lr), add_quadratic_penalty(λ))

All are called as `optimizer.update(grads, state, params, **consolidation._asdict())`. The anchor and the importance are
arguments, so that nothing is compiled again when they change. `optax.chain`, `MultiSteps`, `inject_hyperparams`,
`apply_if_finite`, `contrib.schedule_free` and flax's `nnx.Optimizer.update` pass them on; `optax.masked` and
`optax.partition` do so with `mask_compatible_extra_args=True`. `TrainState.apply_gradients` of flax's linen drops them.
Replace it by two lines:

    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, **consolidation._asdict())
    state = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)

Parameters whose importance is above 0 are protected. None in the anchor and the importance, for a leaf or a branch,
means no penalty and takes no memory. Use it for a frozen backbone, or for leaves without gradients (integers,
functions), where equinox has None, too.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks
from lifelong_jax._numerics import compute_once, wide_dtype
from lifelong_jax.types import Consolidation, Params


class ScheduleState(NamedTuple):
    """The state of a penalty whose hyperparameters are schedules.

    Attributes:
      count: the number of steps so far, an int32 scalar.
    """

    count: jax.Array  # type: ignore[assignment]  # the name of optax's own counters


def quadratic_penalty(params: Params, consolidation: Consolidation, strength: float | jax.Array) -> jax.Array:
    """Computes the penalty as a term of the loss.

        strength / 2 · Σ_i consolidation.importance_i · (params_i − consolidation.anchor_i)²

    Args:
      params: a tree of floating-point arrays.
      consolidation: the anchor and the importance: trees like `params`, with None for what is not protected.
      strength: λ, not negative.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: if the trees differ in structure or shapes; outside of jit, if `strength` is negative or not finite.

    Example:
      >>> from lifelong_jax import Consolidation
      >>> consolidation = Consolidation(anchor=jnp.array(1.0), importance=jnp.array(2.0))
      >>> quadratic_penalty(jnp.array(4.0), consolidation, strength=10.0)
      Array(90., dtype=float32)

    Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114, eq. 3.
    """
    _checks.check_not_negative("strength", strength)
    _check_trees("params", params, consolidation)

    def of_leaf(theta: jax.Array, anchor: jax.Array, importance: jax.Array) -> jax.Array:
        change = theta - anchor  # its square could overflow where the importance is 0, and 0 · inf is NaN
        return jnp.sum(jnp.asarray(strength, theta.dtype) * (importance * change * change)) / 2

    terms = jax.tree.leaves(_map_protected(of_leaf, params, consolidation, otherwise=lambda branch: None))
    dtype = wide_dtype(*terms)
    return sum((term.astype(dtype) for term in terms), start=jnp.zeros((), dtype))


def add_quadratic_penalty(strength: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of the quadratic penalty to the updates.

        updates ← updates + strength · importance · (params − anchor)

    It is the penalty's counterpart of `optax.add_decayed_weights`. What it does depends on its place:

    - Before the preconditioner (before `optax.adam` or any complete optimiser) it is *coupled*: the sum is exactly the
      gradient of loss + penalty, with its fixed points. Adam divides by the size of that sum, so where the penalty is
      stiff, the loss's gradient makes small steps, too. Gradient clipping after it clips the penalty as well.
    - After the preconditioner and before `optax.scale_by_learning_rate` it is *decoupled*, like weight decay in AdamW.
      At a fixed point it balances the *preconditioned* gradient, whose size is 1 with Adam: |params − anchor| is at
      most 1 / (strength · importance). Plain SGD has no preconditioner, so there is no difference.
    - After a complete optimiser its sign is *wrong*: the updates point downhill already, so it pushes the parameters
      away from the anchor. Use `proximal_quadratic_penalty` there.

    An explicit step on a stiff quadratic oscillates with growing amplitude if learning rate · strength · importance > 2
    for any parameter, coupled with SGD (> 2 · (1 + β) with momentum β) or decoupled with any preconditioner. Adam with
    a coupled penalty moves by at most a few learning rates a step, (1 − β₁) / sqrt(1 − β₂), at any strength; but its
    first step leaves the anchor by one learning rate. `proximal_quadratic_penalty` is stable at any strength.

    Args:
      strength: λ, not negative: a number; a traced value, if this is called inside jit or kept in the optimiser's state
        by `optax.inject_hyperparams(add_quadratic_penalty)(strength=...)`; or an `optax.Schedule`.

    Returns:
      A transform whose `update` takes `anchor` and `importance`: trees like `params`, with None for what is not
      protected. It computes in float32 or wider, and returns updates in their own dtypes.

    Raises:
      ValueError: if `strength` is negative or not finite; from `update`, if `params`, `anchor` or `importance` is
        missing, or if the trees differ in structure or shapes.

    Example:
      >>> import optax
      >>> from lifelong_jax import Consolidation
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
        updates: optax.Updates, state: optax.OptState, params: Params, consolidation: Consolidation
    ) -> tuple[optax.Updates, optax.OptState]:
        strength_now = _now(strength, state)

        def of_leaf(update: jax.Array, anchor: jax.Array, importance: jax.Array, theta: jax.Array) -> jax.Array:
            total = update + jnp.asarray(strength_now, update.dtype) * (importance * (theta - anchor))
            return compute_once(total, update)  # both of Adam's moments use it

        result = _map_protected(of_leaf, updates, consolidation, params)
        return optax.tree.cast_like(result, updates), _advance(state)

    return _transform(lambda params: _init_schedules(strength), update_fn)


def proximal_quadratic_penalty(
    step_size: optax.ScalarOrSchedule | Params, strength: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Adds the penalty's proximal step to the pipeline's step: stable at any strength, and last in a chain.

        params + updates ← (params + updates + step_size · strength · importance · anchor)
                           / (1 + step_size · strength · importance)

    The result is the minimum over x of |x − (params + updates)|² / (2 · step_size) + penalty(x). It is a weighted mean
    of the pipeline's next parameters and the anchor, so it overshoots neither. If step_size · strength · importance is
    small, it is close to the explicit step; if large, it is the anchor, up to one rounding of the two. Parameters with
    importance 0 are left alone. It is finite in float32 for any step size, strength and importance.

    At a fixed point, updates = step_size · strength · importance · (params − anchor). This is a fixed point of loss +
    penalty

    - for plain SGD, with `step_size` = learning rate;
    - for SGD with heavy-ball momentum β, whose updates tend to −learning rate / (1 − β) · gradient, with `step_size` =
      learning rate / (1 − β); `step_size` = learning rate gives the fixed point for strength · (1 − β);
    - for Adam, with a step size for each parameter, learning rate / (sqrt(v̂) + ε): that is `proximal_adam`.
      `step_size` = learning rate gives the fixed point of the decoupled penalty: |params − anchor| is at most
      1 / (strength · importance), however large the loss's gradient is.

    Put it *inside* wrappers that do not step every time: `MultiSteps(chain(..., proximal_quadratic_penalty(...)))`.
    `contrib.schedule_free` evaluates gradients elsewhere than it steps, so parameters are not pinned inside it.

    Args:
      step_size: η, not negative: the factor by which the chain so far has multiplied the gradient. A number, known or
        traced; an `optax.Schedule`; or a tree of numbers or arrays like `params`, or a prefix of it. A schedule may
        return such a tree.
      strength: λ, not negative: a number, known or traced, or an `optax.Schedule`.

    Returns:
      A transform whose `update` takes `anchor` and `importance`: trees like `params`, with None for what is not
      protected. It computes in float32 or wider, and returns updates in their own dtypes.

    Raises:
      ValueError: if `step_size` or `strength` is negative or not finite; from `update`, if `params`, `anchor` or
        `importance` is missing, or if the trees differ in structure or shapes.

    Example:
      >>> import optax
      >>> from lifelong_jax import Consolidation
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
        updates: optax.Updates, state: optax.OptState, params: Params, consolidation: Consolidation
    ) -> tuple[optax.Updates, optax.OptState]:
        step_sizes, strength_now = jax.tree.broadcast(_now(step_size, state), updates), _now(strength, state)

        def of_leaf(
            update: jax.Array, anchor: jax.Array, importance: jax.Array, theta: jax.Array, step_size: jax.Array
        ) -> jax.Array:
            return _proximal_step(update, 1, _stiffness(step_size, strength_now, importance), anchor - theta)

        result = _map_protected(of_leaf, updates, consolidation, params, step_sizes)
        return optax.tree.cast_like(result, updates), _advance(state)

    return _transform(lambda params: _init_schedules(step_size, strength), update_fn)


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

    m̂ and v̂ are Adam's bias-corrected moments of the incoming gradients, without the penalty. So a stiff penalty neither
    throws its parameters off the anchor in the first step nor slows them down later. To clip gradients, put clipping
    before it in a chain. On permuted digits it was as accurate as Adam with a coupled penalty, at every strength
    (`experiments.strength_sweep`).

    Args:
      learning_rate: not negative: a number, known or traced, or an `optax.Schedule`.
      strength: λ, not negative: a number, known or traced, or an `optax.Schedule`.
      b1: the decay rate of the mean of the gradients.
      b2: the decay rate of the mean of their squares.
      eps: ε, added to the root of that mean.

    Returns:
      An optimiser whose `update` takes `anchor` and `importance`: trees like `params`, with None for what is not
      protected.

    Raises:
      ValueError: if `learning_rate` or `strength` is negative or not finite; from `update`, if `params`, `anchor` or
        `importance` is missing, or if the trees differ in structure or shapes.

    Example:
      >>> import optax
      >>> from lifelong_jax import Consolidation
      >>> optimizer = proximal_adam(0.1, strength=1e12)
      >>> consolidation = Consolidation(anchor=jnp.array([1.0, 1.0]), importance=jnp.array([0.5, 0.0]))
      >>> params = jnp.array([3.0, 3.0])
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(jnp.ones(2), state, params, **consolidation._asdict())
      >>> optax.apply_updates(params, updates).round(3)
      Array([1. , 2.9], dtype=float32)

    Kingma and Ba 2015, arXiv 1412.6980; for the proximal step in a preconditioner's metric, Yun, Lozano and Yang 2021,
    arXiv 2007.07605.
    """
    _check_hyperparameter("learning_rate", learning_rate)
    _check_hyperparameter("strength", strength)
    adam = optax.scale_by_adam(b1, b2, eps)

    def update_fn(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: Params, consolidation: Consolidation
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        rate, strength_now = _now(learning_rate, state), _now(strength, state)
        directions, next_state = adam.update(updates, state)
        steps = jax.tree.map(lambda direction: -jnp.asarray(rate, direction.dtype) * direction, directions)
        # The bias corrections and the step make a single fraction: on a CPU, quotients cost more than reading memory.
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

        result = _map_protected(of_leaf, steps, consolidation, params, next_state.mu, next_state.nu)
        return optax.tree.cast_like(result, steps), next_state

    return _transform(adam.init, update_fn)


def _transform(
    init_fn: optax.TransformInitFn, update_fn: Callable[..., tuple[optax.Updates, optax.OptState]]
) -> optax.GradientTransformationExtraArgs:
    """Makes an optax transform of `update_fn(updates, state, params, consolidation)`, with its arguments checked."""

    def checked_update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        *,
        anchor: Params | None = None,
        importance: Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        consolidation = Consolidation(anchor, importance)
        _check_arguments(updates, params, consolidation)
        return update_fn(updates, state, params, consolidation)

    return optax.GradientTransformationExtraArgs(init_fn, checked_update_fn)


def _stiffness(step_size: jax.Array, strength: float | jax.Array, importance: jax.Array) -> jax.Array:
    return _product(_product(jnp.asarray(strength, step_size.dtype), step_size), importance)


def _proximal_step(
    step: jax.Array, denominator: jax.Array | float, stiffness: jax.Array, to_anchor: jax.Array
) -> jax.Array:
    """Computes step / denominator, followed by the proximal step of size 1 / denominator, with two divisions."""
    total = denominator + stiffness
    return step / total + stiffness / total * to_anchor


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # At most the largest finite number: an infinite factor, times 0 or divided by itself, would be NaN.
    largest = jnp.finfo(a.dtype).max
    return jnp.minimum(jnp.minimum(a, largest) * jnp.minimum(b, largest), largest)


def _map_protected(
    function: Callable[..., jax.Array],
    tree: Params,
    consolidation: Consolidation,
    *others: Params,
    otherwise: Callable[[Params], Params] = lambda branch: branch,
) -> Params:
    """Maps `function(leaf, anchor, importance, *others)`, in float32 or wider, over the protected leaves."""

    def of_leaf(importance: jax.Array | None, anchor: Params, leaf: Params, *others: Params) -> Params:
        if importance is None:
            return otherwise(leaf)
        dtype = wide_dtype(leaf, anchor, importance)
        return function(*(jnp.asarray(array, dtype) for array in (leaf, anchor, importance, *others)))

    # The importance comes first: where it is None, the others may have any branch.
    anchor, importance = consolidation
    return jax.tree.map(of_leaf, importance, anchor, tree, *others, is_leaf=lambda node: node is None)


def _now(hyperparameter: optax.ScalarOrSchedule | Params, state: optax.OptState) -> float | jax.Array | Params:
    return hyperparameter(state.count) if callable(hyperparameter) else hyperparameter


def _init_schedules(*hyperparameters: optax.ScalarOrSchedule | Params) -> ScheduleState | optax.EmptyState:
    # No counter if it is not needed, because users look up their optimiser's counter by its name.
    return ScheduleState(jnp.zeros((), jnp.int32)) if any(map(callable, hyperparameters)) else optax.EmptyState()


def _advance(state: ScheduleState | optax.EmptyState) -> ScheduleState | optax.EmptyState:
    return ScheduleState(optax.safe_increment(state.count)) if isinstance(state, ScheduleState) else state


def _check_hyperparameter(name: str, value: optax.ScalarOrSchedule) -> None:
    if not callable(value):
        _checks.check_not_negative(name, value)


def _check_arguments(updates: optax.Updates, params: Params | None, consolidation: Consolidation) -> None:
    if params is None or consolidation.anchor is None or consolidation.importance is None:
        raise ValueError(
            "the penalty needs params, anchor and importance: call "
            "optimizer.update(grads, state, params, **consolidation._asdict())."
        )
    try:
        _check_trees("updates", updates, consolidation)
        _checks.check_same_structure("importance", consolidation.importance, "params", params, partial=True)
    except ValueError as error:
        nodes = jax.tree.leaves(updates, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
        if any(isinstance(node, optax.MaskedNode) for node in nodes):
            raise ValueError(
                f"{error} The updates are masked: pass mask_compatible_extra_args=True to optax.masked or "
                f"optax.partition."
            ) from None
        raise


def _check_trees(name: str, tree: Params, consolidation: Consolidation) -> None:
    anchor, importance = consolidation
    _checks.check_same_structure("importance", importance, name, tree, partial=True)
    _checks.check_same_structure("anchor", anchor, "importance", importance)
    try:
        protected = jax.tree.map(
            lambda omega, branch: None if omega is None else branch, importance, tree, is_leaf=lambda node: node is None
        )
    except ValueError as error:  # branches without leaves differ
        raise ValueError(f"importance and {name} must be trees of one structure: {error}") from error
    for protected_name, branches in ((name, protected), ("anchor", anchor), ("importance", importance)):
        _checks.check_params(protected_name, branches)
