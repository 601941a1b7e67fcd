"""The quadratic penalty as a term of the loss, and its gradient as an optax transform."""

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks, forms
from lifelong_jax._numerics import compute_once, wide_dtype
from lifelong_jax.forms import Form
from lifelong_jax.penalty._transforms import (
    advance,
    check_hyperparameter,
    check_trees,
    init_schedules,
    map_protected,
    now,
    transform,
)
from lifelong_jax.types import Consolidation, Params


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
    check_trees("params", params, consolidation)

    def of_leaf(theta: jax.Array, anchor: jax.Array, importance: Form) -> jax.Array:
        weighted = forms.scale(importance, strength)  # 0 at strength 0, whatever the change is: 0 · inf is NaN
        return jnp.sum(forms.quadratic_terms(weighted, theta - anchor)) / 2

    terms = jax.tree.leaves(map_protected(of_leaf, params, consolidation, otherwise=lambda branch: None))
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
    check_hyperparameter("strength", strength)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: Params, consolidation: Consolidation
    ) -> tuple[optax.Updates, optax.OptState]:
        strength_now = now(strength, state)

        def of_leaf(update: jax.Array, anchor: jax.Array, importance: Form, theta: jax.Array) -> jax.Array:
            total = update + forms.times(forms.scale(importance, strength_now), theta - anchor)
            return compute_once(total, update)  # both of Adam's moments use it

        result = map_protected(of_leaf, updates, consolidation, params)
        return optax.tree.cast_like(result, updates), advance(state)

    return transform(lambda params: init_schedules(strength), update_fn)
