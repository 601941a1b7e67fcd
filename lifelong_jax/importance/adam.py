"""An importance that costs nothing more: what Adam has gathered about the gradients of a training run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lifelong_jax import _checks
from lifelong_jax._numerics import values_of_variables, widen
from lifelong_jax.types import Params


def importance_from_adam(
    opt_state: optax.OptState, *, batch_size: int | jax.Array, b2: float | jax.Array = 0.999
) -> Params:
    """Estimates the diagonal of the empirical Fisher information from Adam's second moment.

        importance = batch_size · nu / (1 − b2^count)

    nu / (1 − b2^count) is a running mean of the squared gradient of a *batch*, not of an example. If a batch has B
    examples, drawn independently with gradients g at the parameters of that step, the expected value is

        importance ≈ E[g²] + (B − 1) · E[g]²

    So it has the size of `empirical_fisher_diagonal`, whatever B is, where the mean gradient E[g] is near 0: at the end
    of training. What it is not:

    - It is no mean over the data at the final parameters. It weighs the last 1 / (1 − b2) steps, 1,000 by default, at
      the parameters of these steps: early in training, or soon after a jump in the loss, it is far off.
    - Where E[g] is not 0, it counts B − 1 times too much, and grows with B.
    - It is noisier than a pass over the data: it is a mean over about 2 / (1 − b2) squares.
    - The gradient is that of all that came before Adam in the pipeline: a penalty or a weight decay that is part of the
      loss, clipping, and the training loss itself, with its dropout and label smoothing. AdamW's decay comes after.
    - It is at the true labels, as the empirical Fisher is, not at the model's own.
    - B counts what the loss is a mean over. For a mean over tokens, these are the tokens, if they were independent.

    Args:
      opt_state: the state of an optimiser in which there is one `optax.ScaleByAdamState`: within `optax.chain`,
        `masked`, `MultiSteps`, `inject_hyperparams`, `partition`, `hold_consolidation` and others. It may hold
        flax.nnx's variables. `adamax` keeps a maximum in a state of this type, which is no mean.
      batch_size: how many examples the gradient of a step was a mean over. With `MultiSteps`, those of all its
        microbatches.
      b2: the decay of the second moment.

    Returns:
      A tree like the parameters, in the dtypes of Adam's second moment or float32, whichever is wider; None in the
      place of what `optax.masked` or `optax.partition` masks.

    Raises:
      ValueError: if there is no such state, or if there are several; outside of jit, if it has taken no step, or if
        `batch_size` or `b2` is out of range.

    Example:
      >>> optimizer = optax.chain(optax.clip(1.0), optax.adam(0.1))
      >>> params = jnp.array([0.0, 0.0])
      >>> _, opt_state = optimizer.update(jnp.array([0.5, 0.25]), optimizer.init(params), params)
      >>> importance_from_adam(opt_state, batch_size=4).round(4)  # 4 · 0.5² and 4 · 0.25²
      Array([1.  , 0.25], dtype=float32)

    Li et al. 2025, arXiv 2507.18807.
    """
    _checks.check_positive("batch_size", batch_size)
    _checks.check_positive("b2", b2, at_most=1 - 2**-24)
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(node)]
    if len(states) != 1:
        raise ValueError(
            f"opt_state must have one optax.ScaleByAdamState, but has {len(states)}. "
            + ("Pass the part of it that belongs to one." if states else "Only optimisers that use Adam have one.")
        )
    count, _, nu = values_of_variables(states[0])
    if _checks.is_concrete(count) and not np.all(np.asarray(count) > 0):
        raise ValueError("opt_state has taken no step: Adam has seen no gradient.")
    log_decay = jnp.asarray(np.log(b2) if _checks.is_concrete(b2) else jnp.log(b2), float)  # 1 − 0.999 loses digits
    factor = jnp.asarray(batch_size, float) / -jnp.expm1(jnp.asarray(count, float) * log_decay)

    def of_leaf(moment: Any) -> jax.Array | None:
        if isinstance(moment, optax.MaskedNode):
            return None
        moment = widen(moment)
        of_runs = jnp.expand_dims(factor, range(factor.ndim, moment.ndim))  # a state may be that of stacked runs
        return moment * of_runs.astype(moment.dtype)

    return jax.tree.map(of_leaf, nu, is_leaf=lambda node: isinstance(node, optax.MaskedNode))


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
