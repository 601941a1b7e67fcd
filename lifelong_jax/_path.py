"""What the wrappers that follow the parameters' path share: the step really made, its share in the loss, misuse."""

from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks
from lifelong_jax.per_example import widen
from lifelong_jax.types import Params

# Wrappers that hand the updates of what they wrap on as they are, or not at all.
_HANDING_ON: TypeAlias = optax.ApplyIfFiniteState | optax.InjectHyperparamsState | optax.InjectStatefulHyperparamsState


class Fidelity(NamedTuple):
    """Whether the updates are applied as they were returned, found out when parameters first move.

    Attributes:
      distance: how far from the origin the latest update should bring the parameters, a float32 scalar.
      step: how long the latest step should be.
      discrepancy: by how much that distance was missed, in lengths of the step; NaN until known.
    """

    distance: jax.Array
    step: jax.Array
    discrepancy: jax.Array


def apply(params: Params, updates: optax.Updates) -> Params:
    """Makes the step as the caller will make it."""
    # Behind a barrier: compilers may leave out a rounding to bfloat16 and back, which the parameters do not escape.
    return jax.lax.optimization_barrier(optax.apply_updates(params, updates))


def difference(end: jax.Array, start: jax.Array) -> jax.Array:
    """Subtracts in float32 at least."""
    return widen(jnp.asarray(end)) - widen(jnp.asarray(start))


def add_contribution(path: Params, grads: optax.Updates, params: Params, moved: Params) -> Params:
    """Subtracts gradient · step from the path."""

    def of_leaf(path: jax.Array, grad: jax.Array, theta: jax.Array, moved: jax.Array) -> jax.Array:
        step = difference(moved, theta)
        # Where nothing moved, a gradient that is NaN or infinite (which `apply_if_finite` dropped) does not count.
        return path - jnp.where(step == 0, 0, widen(jnp.asarray(grad)).astype(path.dtype) * step)

    return jax.tree.map(of_leaf, path, grads, params, moved)


def init_fidelity() -> Fidelity:
    """Makes the state in which nothing is known."""
    return Fidelity(*(jnp.asarray(value, jnp.float32) for value in (0.0, 0.0, jnp.nan)))


def unknown(fidelity: Fidelity) -> jax.Array:
    """Says whether it is still to be found out. What changes updates changes the first, so that one look is enough."""
    return jnp.isnan(fidelity.discrepancy)


def look(fidelity: Fidelity, params: Params, origin: Params, moved: Params) -> Fidelity:
    """Compares where the last update led with where it should have, and notes where the next should lead.

    By the triangle inequality, the distance from any origin is wrong by no more than the parameters are.
    """
    return Fidelity(_distance(moved, origin), _distance(moved, params), _discrepancy(fidelity, params, origin))


def _discrepancy(fidelity: Fidelity, params: Params, origin: Params) -> jax.Array:
    missed = jnp.abs(_distance(params, origin) - fidelity.distance)
    known = jnp.where(fidelity.step > 0, missed / jnp.where(fidelity.step > 0, fidelity.step, 1), jnp.nan)
    return jnp.where(jnp.isnan(fidelity.discrepancy), known, fidelity.discrepancy)


def _distance(params: Params, origin: Params) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda a, b: difference(a, b).astype(jnp.float32), params, origin))


_State = TypeVar("_State", bound=NamedTuple)


def find_state(name: str, kind: type[_State], opt_state: optax.OptState) -> _State:
    """Finds the state of the outermost wrapper, or says why it is none."""
    state = opt_state
    while not isinstance(state, kind):
        if isinstance(state, optax.MultiStepsState):
            state = state.inner_opt_state
        elif isinstance(state, _HANDING_ON) or hasattr(state, "fidelity"):
            state = state.inner_state
        else:
            raise TypeError(
                f"the optimiser's state must be that of {name}, but is a {type(state).__name__}: wrap the whole "
                f"pipeline, {name}(optax.chain(add_quadratic_penalty(strength), ...)), so that nothing comes before or "
                f"after it. Of other wrappers, only MultiSteps, apply_if_finite and inject_hyperparams go around it."
            )
    return state


def init_inner(name: str, optimizer: optax.GradientTransformation, params: Params) -> optax.OptState:
    """Initialises what is wrapped, unless it accumulates gradients."""
    _checks.check_params("params", params)
    inner_state = optimizer.init(params)
    nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, optax.MultiStepsState))
    if any(isinstance(node, optax.MultiStepsState) for node in nodes):
        raise ValueError(
            f"{name} goes inside of MultiSteps, optax.MultiSteps({name}(...), every_k_schedule): outside, it would see "
            f"the gradient of a step's last part only."
        )
    return inner_state


def check_update(name: str, updates: optax.Updates, params: Params | None) -> None:
    """Raises ValueError unless there are parameters, and gradients like them."""
    if params is None:
        raise ValueError(f"{name} needs params: call optimizer.update(grads, state, params, ...).")
    _checks.check_same_structure("updates", updates, "params", params)


def check_end(name: str, params: Params, origin: Params, fidelity: Fidelity) -> None:
    """Raises ValueError if the parameters are unlike those in the state, or did not move as they were told to."""
    _checks.check_same_structure("params", params, "the parameters in opt_state", origin)
    discrepancy = _discrepancy(fidelity, params, origin)
    if _checks.is_concrete(discrepancy) and bool(jnp.any(discrepancy > 0.1)):
        raise ValueError(
            f"the parameters did not move as {name} told them to: its first step was missed by "
            f"{float(jnp.max(discrepancy)):.2g} times its length. Apply the updates as they are, by "
            f"optax.apply_updates; whatever changes them goes inside, {name}(optax.chain(...))."
        )
