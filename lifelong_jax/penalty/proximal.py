"""The quadratic penalty's proximal step: stable at any strength, and last in a chain."""

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks, forms
from lifelong_jax.penalty._transforms import (
    advance,
    check_hyperparameter,
    init_schedules,
    map_protected,
    now,
    transform,
)
from lifelong_jax.types import Consolidation, Params


def proximal_quadratic_penalty(
    step_size: optax.ScalarOrSchedule | Params, strength: optax.ScalarOrSchedule, every: int | None = None
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

    With Kronecker factors, the step solves a linear system, 1 + step_size · strength · A ⊗ G, by the eigenvectors of A
    and G: four products of matrices per leaf. `every` pays for them once every so many steps, with the step sizes of
    all of them (operator splitting). About 100 such steps per task are enough: on permuted digits, they were as
    accurate as 225 (`docs/guides/kronecker.md`). After Adam, whose steps do not scale with the gradient, only the
    product step_size · strength means anything: choose it as one number.

    Put it *inside* wrappers that do not step every time: `MultiSteps(chain(..., proximal_quadratic_penalty(...)))`.
    `contrib.schedule_free` evaluates gradients elsewhere than it steps, so parameters are not pinned inside it.

    Args:
      step_size: η, not negative: the factor by which the chain so far has multiplied the gradient. A number, known or
        traced; an `optax.Schedule`; or a tree of numbers or arrays like `params`, or a prefix of it. A schedule may
        return such a tree. Leaves with Kronecker factors need a number.
      strength: λ, not negative: a number, known or traced, or an `optax.Schedule`.
      every: the number of steps after which the proximal step is made, each time for all of them; None for 1. Name it
        in the `static_args` of `optax.inject_hyperparams`.

    Returns:
      A transform whose `update` takes `anchor` and `importance`: trees like `params`, with None for what is not
      protected. It computes in float32 or wider, and returns updates in their own dtypes.

    Raises:
      ValueError: if `step_size` or `strength` is negative or not finite, or `every` is no positive integer; from
        `update`, if `params`, `anchor` or `importance` is missing, if the trees differ in structure or shapes, or if
        the step size of a leaf with Kronecker factors is an array.

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
    check_hyperparameter("strength", strength)
    _checks.check_positive_integer("every", every, optional=True)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: Params, consolidation: Consolidation
    ) -> tuple[optax.Updates, optax.OptState]:
        strength_now = now(strength, state)

        def of_leaf(
            update: jax.Array,
            anchor: jax.Array,
            importance: jax.Array | forms.KroneckerFactors,
            theta: jax.Array,
            step_size: jax.Array,
        ) -> jax.Array:
            if isinstance(importance, forms.KroneckerFactors):
                _check_scalar(step_size)
                stiffness = _product(jnp.asarray(strength_now, update.dtype), step_size)
                return update - forms.shrink(importance, update + (theta - anchor), stiffness)
            return _proximal_step(update, 1, _stiffness(step_size, strength_now, importance), anchor - theta)

        def pull(updates: optax.Updates) -> optax.Updates:
            sizes = now(step_size, state) if every is None else _sum_of_last(every, step_size, state)
            step_sizes = jax.tree.broadcast(sizes, updates)
            result = map_protected(of_leaf, updates, consolidation, params, step_sizes)
            return optax.tree.cast_like(result, updates)

        if every is None:
            return pull(updates), advance(state)
        due = (state.count + 1) % every == 0
        return jax.lax.cond(due, pull, lambda updates: updates, updates), advance(state)

    return transform(lambda params: init_schedules(step_size, strength, counted=every is not None), update_fn)


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
    check_hyperparameter("learning_rate", learning_rate)
    check_hyperparameter("strength", strength)
    adam = optax.scale_by_adam(b1, b2, eps)

    def update_fn(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: Params, consolidation: Consolidation
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        rate, strength_now = now(learning_rate, state), now(strength, state)
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
            if isinstance(importance, forms.KroneckerFactors):
                raise ValueError(
                    "proximal_adam needs a diagonal importance, because Adam has a step size for each parameter: with "
                    "Kronecker factors, use optax.adam and, after it in the chain, proximal_quadratic_penalty."
                )
            stiffness = _stiffness(jnp.asarray(rate, step.dtype), strength_now, importance)
            mean, root = mean * mean_rate.astype(step.dtype), jnp.sqrt(variance) * root_rate.astype(step.dtype)
            return _proximal_step(mean, root + eps, stiffness, anchor - theta)

        result = map_protected(of_leaf, steps, consolidation, params, next_state.mu, next_state.nu)
        return optax.tree.cast_like(result, steps), next_state

    return transform(adam.init, update_fn)


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


def _sum_of_last(every: int, hyperparameter: optax.ScalarOrSchedule | Params, state: optax.OptState) -> Params:
    """Sums a hyperparameter over the last steps, up to this one."""
    if not callable(hyperparameter):
        return jax.tree.map(lambda value: every * value, hyperparameter)
    values = jax.vmap(hyperparameter)(state.count - jnp.arange(every))
    return jax.tree.map(lambda of_steps: jnp.sum(of_steps, axis=0), values)


def _check_scalar(step_size: jax.Array) -> None:
    if step_size.ndim != 0:
        raise ValueError(
            f"step_size has shape {step_size.shape} for a leaf with Kronecker factors: pass a number for it. Its "
            f"proximal step has a closed form for a single step size only."
        )
