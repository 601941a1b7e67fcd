"""The optimiser that several scripts share."""

import optax

from lifelong_jax.penalty import proximal_quadratic_penalty

MOMENTUM = 0.9


def momentum_with_penalty(learning_rate: float, strength: float) -> optax.GradientTransformation:
    """Makes SGD with momentum 0.9, followed by the penalty's proximal step.

    Args:
      learning_rate: the step size.
      strength: λ.

    Returns:
      The optimiser. The proximal step has the step size learning_rate / (1 − 0.9), so that its fixed point is that of
      loss + penalty.
    """
    penalty = proximal_quadratic_penalty(learning_rate / (1 - MOMENTUM), strength)
    return optax.chain(optax.sgd(learning_rate, momentum=MOMENTUM), penalty)
