"""The optimisers that several scripts share."""

import jax
import optax

from lifelong_jax.penalty import proximal_quadratic_penalty

MOMENTUM = 0.9

PULLS_PER_TASK = 50
"""How often the penalty with Kronecker factors pulls during a task, unless told otherwise: more gained nothing."""


def steps_of_task(num_examples: int, num_epochs: int, batch_size: int) -> int:
    """Computes how many steps a task is learned in.

    Args:
      num_examples: the number of its training examples.
      num_epochs: passes over them.
      batch_size: examples per step.

    Returns:
      The number of steps.

    Example:
      >>> steps_of_task(num_examples=1437, num_epochs=20, batch_size=32)
      900
    """
    return num_epochs * -(-num_examples // batch_size)


def interval_of(num_steps: int) -> int:
    """Computes after how many steps the penalty with Kronecker factors pulls.

    Args:
      num_steps: the number of a task's steps.

    Returns:
      At least 1.

    Example:
      >>> interval_of(5000)
      100
    """
    return max(1, num_steps // PULLS_PER_TASK)


def momentum_with_penalty(
    learning_rate: optax.ScalarOrSchedule, strength: float, every: int | None = None
) -> optax.GradientTransformation:
    """Makes SGD with momentum 0.9, followed by the penalty's proximal step.

    Args:
      learning_rate: the step size, or its schedule.
      strength: λ.
      every: as for `proximal_quadratic_penalty`.

    Returns:
      The optimiser. The proximal step has the step size learning_rate / (1 − 0.9), so that its fixed point is that of
      loss + penalty.
    """

    def step_size(count: jax.Array) -> jax.Array:
        return learning_rate(count) / (1 - MOMENTUM)

    sizes = step_size if callable(learning_rate) else learning_rate / (1 - MOMENTUM)
    penalty = proximal_quadratic_penalty(sizes, strength, every)
    return optax.chain(optax.sgd(learning_rate, momentum=MOMENTUM), penalty)
