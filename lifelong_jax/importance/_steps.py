"""Helpers of the wrappers that follow the parameters' path: the step that is made, its share in the loss, misuse."""

from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks
from lifelong_jax._numerics import widen
from lifelong_jax.types import Params

# States of wrappers that pass on the wrapped optimiser's updates unchanged, or not at all.
_PassingState: TypeAlias = (
    optax.ApplyIfFiniteState | optax.InjectHyperparamsState | optax.InjectStatefulHyperparamsState
)


_UNKNOWN = -1.0  # not NaN, which jax_debug_nans would take for a fault


class Fidelity(NamedTuple):
    """Whether the updates are applied as they were returned, measured when the parameters first move.

    Attributes:
      distance: the distance from the origin that the parameters should have after the latest update, a float32 scalar.
      step: the length that the latest step should have.
      discrepancy: the error of that distance, divided by the length of the step; negative until it is known.
    """

    distance: jax.Array
    step: jax.Array
    discrepancy: jax.Array


def apply(params: Params, updates: optax.Updates) -> Params:
    """Applies the updates as the caller will."""
    # Without the barrier, the compiler may skip the rounding to bfloat16, which the caller's parameters undergo.
    return jax.lax.optimization_barrier(optax.apply_updates(params, updates))


def difference(end: jax.Array, start: jax.Array) -> jax.Array:
    """Subtracts two arrays in float32 at least."""
    return widen(end) - widen(start)


def add_contribution(path: Params, grads: optax.Updates, params: Params, moved: Params) -> Params:
    """Subtracts gradient · step from the path: the step's share in the decrease of the loss."""

    def of_leaf(path: jax.Array, grad: jax.Array, theta: jax.Array, moved: jax.Array) -> jax.Array:
        step = difference(moved, theta)
        # If a parameter did not move, its gradient may be NaN or infinite: `apply_if_finite` has dropped the update.
        return path - jnp.where(step == 0, 0, widen(grad).astype(path.dtype) * step)

    return jax.tree.map(of_leaf, path, grads, params, moved)


def init_fidelity() -> Fidelity:
    """Initialises the fidelity, with an unknown discrepancy."""
    return Fidelity(*(jnp.asarray(value, jnp.float32) for value in (0.0, 0.0, _UNKNOWN)))


def is_unknown(fidelity: Fidelity) -> jax.Array:
    """Returns whether the discrepancy is still unknown. One step decides it: updates are changed always or never."""
    return fidelity.discrepancy < 0


def update_fidelity(fidelity: Fidelity, params: Params, origin: Params, moved: Params) -> Fidelity:
    """Computes the discrepancy of `params` after the last update, and the distance that `moved` should have.

    Only distances from the origin are compared. By the triangle inequality, a distance is off by no more than the
    parameters are.
    """
    return Fidelity(_distance(moved, origin), _distance(moved, params), _discrepancy(fidelity, params, origin))


def _discrepancy(fidelity: Fidelity, params: Params, origin: Params) -> jax.Array:
    error = jnp.abs(_distance(params, origin) - fidelity.distance)
    relative_error = jnp.where(fidelity.step > 0, error / jnp.where(fidelity.step > 0, fidelity.step, 1), _UNKNOWN)
    return jnp.where(is_unknown(fidelity), relative_error, fidelity.discrepancy)


def _distance(params: Params, origin: Params) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda a, b: difference(a, b).astype(jnp.float32), params, origin))


_State = TypeVar("_State", bound=NamedTuple)


def find_state(name: str, kind: type[_State], opt_state: optax.OptState) -> _State:
    """Finds the state of the outermost wrapper, or raises TypeError if that is another optimiser."""
    state = opt_state
    while not isinstance(state, kind):
        if isinstance(state, optax.MultiStepsState):
            state = state.inner_opt_state
        elif isinstance(state, _PassingState) or hasattr(state, "fidelity") or hasattr(state, "consolidation"):
            state = state.inner_state
        else:
            raise TypeError(
                f"the optimiser's state must be that of {name}, but is a {type(state).__name__}: wrap the whole "
                f"pipeline, {name}(optax.chain(add_quadratic_penalty(strength), ...)), so that nothing comes before or "
                f"after it. Only MultiSteps, apply_if_finite, inject_hyperparams and hold_consolidation may go around "
                f"it."
            )
    return state


def init_inner(name: str, optimizer: optax.GradientTransformation, params: Params) -> optax.OptState:
    """Initialises the wrapped optimiser, or raises ValueError if it accumulates gradients."""
    _checks.check_params("params", params)
    inner_state = optimizer.init(params)
    nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, optax.MultiStepsState))
    if any(isinstance(node, optax.MultiStepsState) for node in nodes):
        raise ValueError(
            f"{name} goes inside of MultiSteps, optax.MultiSteps({name}(...), every_k_schedule): outside of it, {name} "
            f"sees only the last of the gradients that a step accumulates. In learn_tasks, a method wraps what "
            f"optimizer_fn returns: return it without MultiSteps, and pass method._replace(wrap_optimizer=lambda "
            f"optimizer: optax.MultiSteps({name}(optimizer), every_k_schedule))."
        )
    return inner_state


def check_update(name: str, updates: optax.Updates, params: Params | None) -> None:
    """Raises ValueError unless `params` is given and agrees with the gradients in structure and shapes."""
    if params is None:
        raise ValueError(f"{name} needs params: call optimizer.update(grads, state, params, ...).")
    _checks.check_same_structure("updates", updates, "params", params)


def check_end(name: str, params: Params, origin: Params, fidelity: Fidelity) -> None:
    """Raises ValueError if the parameters do not fit those in the state, or did not move by the returned updates."""
    _checks.check_same_structure("params", params, "the parameters in opt_state", origin)
    discrepancy = _discrepancy(fidelity, params, origin)
    if _checks.is_concrete(discrepancy) and bool(jnp.any(discrepancy > 0.1)):
        raise ValueError(
            f"the parameters did not move by the updates that {name} returned: after the first step, they were off by "
            f"{float(jnp.max(discrepancy)):.2g} times its length. Apply the updates unchanged, by optax.apply_updates; "
            f"put whatever changes them inside, {name}(optax.chain(...))."
        )
