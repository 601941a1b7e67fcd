"""The quadratic penalty on leaving the anchor: as a term of the loss, and as optax transforms for any pipeline.

What a transform does depends on its place in the chain:

    coupled       chain(add_quadratic_penalty(λ), adam(lr))
    decoupled     chain(scale_by_adam(), add_quadratic_penalty(λ), scale_by_learning_rate(lr))
    proximal      chain(adam(lr), proximal_quadratic_penalty(lr, λ)), or proximal_adam(lr, λ)
    wrong sign    chain(adam(lr), add_quadratic_penalty(λ))

All are called as `optimizer.update(grads, state, params, **consolidation._asdict())`. The anchor and the importance are
arguments, so that nothing is compiled again when they change. Most wrappers of optax pass them on; `optax.masked` and
`optax.partition` do so with `mask_compatible_extra_args=True`. For loops that call `optimizer.update(grads, state,
params)`, such as flax's `TrainState.apply_gradients`, and for wrappers that pass nothing on, `hold_consolidation` keeps
them in the optimiser's state. The guide has a table of wrappers.

Parameters whose importance is above 0 are protected. None in the anchor and the importance, for a leaf or a branch,
means no penalty and takes no memory. Use it for a frozen backbone, or for leaves without gradients (integers,
functions), where equinox has None, too.

An importance may have Kronecker factors (`kronecker_fisher`) in the place of leaves. The formulas below then hold with
the product `A · change · G` for `importance · change`, except in `proximal_adam`, which needs a diagonal.

Where the parameters are not the weights that the importance is of, as with LoRA, `add_reparametrized_penalty` takes the
function that makes the weights of them.
"""

from lifelong_jax.penalty._transforms import ScheduleState
from lifelong_jax.penalty.holding import HoldConsolidationState, hold_consolidation, set_consolidation
from lifelong_jax.penalty.proximal import proximal_adam, proximal_quadratic_penalty
from lifelong_jax.penalty.quadratic import add_quadratic_penalty, quadratic_penalty
from lifelong_jax.penalty.reparametrized import add_reparametrized_penalty

__all__ = [
    "HoldConsolidationState",
    "ScheduleState",
    "add_quadratic_penalty",
    "add_reparametrized_penalty",
    "hold_consolidation",
    "proximal_adam",
    "proximal_quadratic_penalty",
    "quadratic_penalty",
    "set_consolidation",
]
