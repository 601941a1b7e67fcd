"""The quadratic penalty on leaving the anchor: a term of the loss, and an optax transform that adds its gradient."""

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks
from lifelong_jax.types import Consolidation, Params


def quadratic_penalty(params: Params, consolidation: Consolidation, strength: float | jax.Array) -> jax.Array:
    """Computes the penalty as a term of the loss.

        strength / 2 · Σ_i consolidation.importance_i · (params_i − consolidation.anchor_i)²

    Args:
      params: a tree of floating-point arrays.
      consolidation: the anchor and the importance, trees like `params`.
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
    _check_trees(params, *consolidation)

    def of_leaf(theta: jax.Array, anchor: jax.Array, importance: jax.Array) -> jax.Array:
        pull = jnp.asarray(strength, anchor.dtype) * importance * jnp.square(theta.astype(anchor.dtype) - anchor)
        return jnp.sum(pull) / 2

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, params, *consolidation)), start=jnp.zeros(()))


def add_quadratic_penalty(strength: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of the quadratic penalty to the updates.

        updates ← updates + strength · importance · (params − anchor)

    The anchor and the importance are arguments of `update`, not of this factory, so that nothing is compiled anew when
    they change: `optimizer.update(grads, state, params, **consolidation._asdict())`. `optax.chain` forwards them.

    The place in a chain is as for `optax.add_decayed_weights`. Before the preconditioner (`scale_by_adam`) the penalty
    is part of the loss. After it, and before `scale_by_learning_rate`, it is decoupled. After a complete optimiser,
    which has already turned the sign, it would push away from the anchor.

    An explicit step on a stiff quadratic diverges where learning rate · strength · importance > 2.

    Args:
      strength: λ, not negative; a number, or a traced value where the factory is called inside jit.

    Returns:
      A transform whose `update` takes `anchor` and `importance`, trees like `params`.

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

    Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114, eq. 3.
    """
    _checks.check_not_negative("strength", strength)

    def init_fn(params: Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: Params | None = None,
        *,
        anchor: Params | None = None,
        importance: Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        if params is None or anchor is None or importance is None:
            raise ValueError(
                "add_quadratic_penalty needs params, anchor and importance: call "
                "optimizer.update(grads, state, params, **consolidation._asdict())."
            )
        _check_trees(params, anchor, importance)

        def of_leaf(update: jax.Array, theta: jax.Array, anchor: jax.Array, importance: jax.Array) -> jax.Array:
            pull = jnp.asarray(strength, anchor.dtype) * importance * (theta.astype(anchor.dtype) - anchor)
            return (update.astype(anchor.dtype) + pull).astype(update.dtype)

        return jax.tree.map(of_leaf, updates, params, anchor, importance), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_trees(params: Params, anchor: Params, importance: Params) -> None:
    _checks.check_same_structure("anchor", anchor, "params", params)
    _checks.check_same_structure("importance", importance, "params", params)
