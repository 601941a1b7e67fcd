"""Synaptic Intelligence: an importance gathered while training, by a wrapper around a whole optax pipeline.

If the loss has the gradient g, a step Δ of the parameters lowers it by −g · Δ to first order, of which parameter i has
the share −g_i Δ_i. Here g is the gradient of the loss *without* the penalty, and Δ the step that is really made. Only a
wrapper around the whole pipeline sees both:

    optimizer = path_integral(optax.chain(add_quadratic_penalty(λ), optax.adam(lr)))

So `path_integral` comes outermost, and `si_importance` raises an error for the state of any other optimiser. There are
three exceptions, which pass updates on unchanged or not at all: `optax.apply_if_finite` and `optax.inject_hyperparams`
may go around it, and `optax.MultiSteps` must, because it passes in the mean gradient of each step that is really made.
Clipping, masks, partitions and `contrib.schedule_free` go inside. Apply the updates unchanged, by
`optax.apply_updates`.

Each task begins with a fresh state, `optimizer.init(params)`. To keep the wrapped optimiser's state from task to task,
use `optimizer.init(params)._replace(inner_state=state.inner_state)`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks
from lifelong_jax._numerics import vary_with, widened_zeros, with_extra_args
from lifelong_jax.importance import _steps
from lifelong_jax.types import Params


class PathIntegralState(NamedTuple):
    """The state of `path_integral`: twice the size of the parameters, and the wrapped optimiser's state.

    Attributes:
      start: the parameters at the start of the task.
      path: each parameter's share in the decrease of the loss so far, ω.
      fidelity: whether the updates are applied as they were returned.
      inner_state: the wrapped optimiser's state.
    """

    start: Params
    path: Params
    fidelity: _steps.Fidelity
    inner_state: optax.OptState


def path_integral(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps a whole optimiser, the penalty included, and integrates the loss's decrease along the parameters' path.

        path ← path − grads · Δ,    Δ = apply_updates(params, optimizer's updates) − params

    `grads`, the updates that come in, are the gradient of the loss alone. Δ is the step after rounding to the
    parameters' dtype: if an update is too small to change a bfloat16 parameter, Δ is 0. The sum is kept in float32 at
    least.

    Args:
      optimizer: a complete optax pipeline, such as `chain(add_quadratic_penalty(strength), adam(learning_rate))`. To
        accumulate gradients, wrap the result in `optax.MultiSteps`, not the other way round.

    Returns:
      An optimiser that makes the same updates, and passes extra arguments on.

    Raises:
      TypeError: from `init`, if a leaf of the parameters is not floating-point.
      ValueError: from `init`, if `optimizer` accumulates gradients by `optax.MultiSteps`; from `update`, if `params` is
        missing or differs from the gradients in structure or shapes.

    Example:
      >>> optimizer = path_integral(optax.sgd(0.5))
      >>> params = jnp.array(2.0)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(2 * params, state, params)  # the gradient of params²
      >>> optax.apply_updates(params, updates), state.path
      (Array(0., dtype=float32), Array(8., dtype=float32))

    Zenke et al. 2017, arXiv 1703.04200, eq. 3.
    """
    optimizer = with_extra_args(optimizer)

    def init_fn(params: Params) -> PathIntegralState:
        inner_state = _steps.init_inner("path_integral", optimizer, params)
        # A copy: a training step that donates parameters and state must not donate one buffer twice.
        start = jax.tree.map(jnp.copy, params)
        return PathIntegralState(start, widened_zeros(params), _steps.init_fidelity(), inner_state)

    def update_fn(
        updates: optax.Updates, state: PathIntegralState, params: Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, PathIntegralState]:
        _steps.check_update("path_integral", updates, params)
        grads = updates
        updates, inner_state = optimizer.update(grads, state.inner_state, params, **extra_args)
        moved = _steps.apply(params, updates)
        path = _steps.add_contribution(state.path, grads, params, moved)
        operands = (state.fidelity, params, state.start, moved)
        fidelity = jax.lax.cond(
            _steps.is_unknown(state.fidelity),
            _steps.update_fidelity,
            _keep_fidelity,
            *vary_with(operands, like=operands),  # both branches' results must vary alike inside of `jax.shard_map`
        )
        return updates, PathIntegralState(state.start, path, fidelity, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def si_importance(opt_state: optax.OptState, params: Params, *, damping: float | jax.Array = 0.1) -> Params:
    """Computes the importance of Synaptic Intelligence for the task just learned, without a pass over its data.

        importance = max(0, path) / ((params − start)² + damping)

    Pass the importance to `consolidate(..., rule="latest")`, which adds the tasks' importances up. The paper's penalty
    has no factor ½, so its c is half our strength.

    Args:
      opt_state: the state of a `path_integral` optimiser after the task's last step.
      params: the parameters after that step.
      damping: ξ, above 0. If a parameter moves by much less than √ξ, its importance is about path / ξ.

    Returns:
      A tree like `params`, in its dtypes or float32, whichever is wider.

    Raises:
      TypeError: if `opt_state` is not the state of a `path_integral` that is outermost.
      ValueError: if `params` differs from the parameters in the state in structure or shapes; outside of jit, also if
        `damping` is not above 0, or if the updates were not applied as `path_integral` returned them.

    Example:
      >>> optimizer = path_integral(optax.sgd(0.5))
      >>> params = jnp.array(2.0)
      >>> updates, state = optimizer.update(2 * params, optimizer.init(params), params)
      >>> si_importance(state, optax.apply_updates(params, updates), damping=1.0)  # 8 / (2² + 1)
      Array(1.6, dtype=float32)

    Zenke et al. 2017, arXiv 1703.04200, eq. 5. The maximum with 0 is from the authors' code, which takes it of the sum
    over tasks.
    """
    _checks.check_positive("damping", damping)
    state = _steps.find_state("path_integral", PathIntegralState, opt_state)
    _steps.check_end("path_integral", params, state.start, state.fidelity)

    def of_leaf(path: jax.Array, start: jax.Array, theta: jax.Array) -> jax.Array:
        squared_distance = jnp.square(_steps.difference(theta, start))
        return jnp.maximum(path, 0) / (squared_distance + jnp.asarray(damping, path.dtype))

    return jax.tree.map(of_leaf, state.path, state.start, params)


def _keep_fidelity(fidelity: _steps.Fidelity, *others: Params) -> _steps.Fidelity:
    return fidelity
