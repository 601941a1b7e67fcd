"""Synaptic Intelligence: an importance gathered while training, by a wrapper around a whole optax pipeline.

A step from params to params + Δ, where the loss has the gradient g, lowers the loss by −g · Δ to first order; parameter
i's share is −g_i Δ_i. What counts is the gradient of the loss *without* the penalty, and the step that is really made.
Only a wrapper around everything sees the two:

    optimizer = path_integral(optax.chain(add_quadratic_penalty(λ), optax.adam(lr)))

so it comes outermost, and `si_importance` refuses the state of anything else. What hands its updates on as they are, or
not at all, may go around it: `optax.MultiSteps` (which *must*, as it shows the mean gradient of each step really made),
`apply_if_finite` and `inject_hyperparams`. Clipping, masks, partitions and `contrib.schedule_free` go inside. The
updates are to be applied unchanged, by `optax.apply_updates`.

Each task begins with a fresh state, `optimizer.init(params)`. To keep the wrapped optimiser's state from task to task:
`optimizer.init(params)._replace(inner_state=state.inner_state)`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks, _path
from lifelong_jax.per_example import zeros_like_sum
from lifelong_jax.types import Params


class PathIntegralState(NamedTuple):
    """What `path_integral` keeps: twice the size of the parameters, and the state of what it wraps.

    Attributes:
      start: the parameters where the task began.
      path: each parameter's share in the fall of the loss so far, ω.
      fidelity: whether the updates are applied as they were returned.
      inner_state: the wrapped optimiser's state.
    """

    start: Params
    path: Params
    fidelity: _path.Fidelity
    inner_state: optax.OptState


def path_integral(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps a whole optimiser, the penalty included, and gathers what `si_importance` needs.

        path ← path − updates · Δ,    Δ = apply_updates(params, optimizer's updates) − params

    The updates that come in are the gradient of the loss alone. Δ is the step as it is made in the parameters' dtype: a
    bfloat16 parameter that an update is too small to move has moved by 0. The sum is kept in float32 at least.

    Args:
      optimizer: any optax transform that needs nothing before or after it, such as
        `chain(add_quadratic_penalty(strength), adam(learning_rate))`. To accumulate gradients, put the result into
        `optax.MultiSteps`, not the other way round.

    Returns:
      An optimiser that makes the same updates, and hands extra arguments on.

    Raises:
      TypeError: from `init`, if a leaf of the parameters is not floating-point.
      ValueError: from `init`, if `optimizer` accumulates gradients by `optax.MultiSteps`; from `update`, if `params` is
        missing or unlike the gradients.

    Example:
      >>> optimizer = path_integral(optax.sgd(0.5))
      >>> params = jnp.array(2.0)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(2 * params, state, params)  # the gradient of params²
      >>> optax.apply_updates(params, updates), state.path
      (Array(0., dtype=float32), Array(8., dtype=float32))

    Zenke et al. 2017, arXiv 1703.04200, eq. 3.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: Params) -> PathIntegralState:
        inner_state = _path.init_inner("path_integral", optimizer, params)
        # Copies: a training step that donates parameters and state must not donate one buffer twice.
        return PathIntegralState(
            jax.tree.map(jnp.copy, params), zeros_like_sum(params), _path.init_fidelity(), inner_state
        )

    def update_fn(
        updates: optax.Updates, state: PathIntegralState, params: Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, PathIntegralState]:
        _path.check_update("path_integral", updates, params)
        grads = updates
        updates, inner_state = optimizer.update(grads, state.inner_state, params, **extra_args)
        moved = _path.apply(params, updates)
        path = _path.add_contribution(state.path, grads, params, moved)
        fidelity = jax.lax.cond(
            _path.unknown(state.fidelity), _path.look, _keep_first, state.fidelity, params, state.start, moved
        )
        return updates, PathIntegralState(state.start, path, fidelity, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def si_importance(opt_state: optax.OptState, params: Params, *, damping: float | jax.Array = 0.1) -> Params:
    """Computes Synaptic Intelligence's importance of a task just learned: no labels, and no pass over the data.

        importance = max(0, path) / ((params − start)² + damping)

    For `consolidate(..., rule="latest")`, which adds the tasks' importances up. The paper's penalty has no ½: its c is
    half our strength.

    Args:
      opt_state: the optimiser's state after the task's last step; the optimiser is `path_integral(...)`.
      params: the parameters after that step.
      damping: ξ, above 0. In a parameter that moves by much less than its root, the importance is path / ξ.

    Returns:
      A tree like `params`, in its dtypes or float32, whichever is wider.

    Raises:
      TypeError: if `opt_state` is not that of a `path_integral` which nothing comes before or after.
      ValueError: if `params` is unlike the parameters in the state, or, outside of jit, if `damping` is not above 0, or
        if the updates were not applied as `path_integral` returned them.

    Example:
      >>> optimizer = path_integral(optax.sgd(0.5))
      >>> params = jnp.array(2.0)
      >>> updates, state = optimizer.update(2 * params, optimizer.init(params), params)
      >>> si_importance(state, optax.apply_updates(params, updates), damping=1.0)  # 8 / (2² + 1)
      Array(1.6, dtype=float32)

    Zenke et al. 2017, arXiv 1703.04200, eq. 5. The maximum with 0 is in the authors' code, of the sum over the tasks.
    """
    _checks.check_positive("damping", damping)
    state = _path.find_state("path_integral", PathIntegralState, opt_state)
    _path.check_end("path_integral", params, state.start, state.fidelity)

    def of_leaf(path: jax.Array, start: jax.Array, theta: jax.Array) -> jax.Array:
        squared_distance = jnp.square(_path.difference(theta, start))
        return jnp.maximum(path, 0) / (squared_distance + jnp.asarray(damping, path.dtype))

    return jax.tree.map(of_leaf, state.path, state.start, params)


def _keep_first(first: Any, *others: Any) -> Any:
    return first
