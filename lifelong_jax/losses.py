"""The loss of one example, made of a network and an objective: of the network as it predicts, or as it is trained."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from lifelong_jax import _checks
from lifelong_jax.objectives import CLASSIFICATION, Objective, loss_per_label
from lifelong_jax.types import Batch, LossFn, ModelState, OutputFn, Params, TrainFn


@dataclasses.dataclass(frozen=True)  # equal if both are, so that jit compiles once for one network
class ExampleLoss:
    """`loss_fn(params, example) -> scalar`: a network's loss per label on one example.

    Attributes:
      objective: the objective.
      apply_fn: `apply_fn(params, x) -> outputs`, without batch axis.
    """

    objective: Objective
    apply_fn: OutputFn

    def __call__(self, params: Params, example: Batch) -> jax.Array:
        """Computes the loss of one example."""
        return loss_per_label(self.objective, self.apply_fn(params, example.inputs), example)

    def check_examples(self, name: str, params: Params, examples: Batch) -> None:
        """Raises an error that names the argument if labels are not what the objective needs."""
        if not isinstance(examples, Batch):
            raise TypeError(f"{name} is a {type(examples).__name__}, but must be a Batch(inputs, labels).")
        x = _checks.first_example(examples.inputs)
        with _checks.for_one_example("apply_fn", x):
            outputs = jax.eval_shape(self.apply_fn, params, x)
        self.objective.check_fn(name, examples, outputs)


@dataclasses.dataclass(frozen=True)
class TrainLoss:
    """`loss_fn(params, model_state, example, key) -> (scalar, model_state)`: the loss of a network as it is trained.

    Attributes:
      objective: the objective.
      train_fn: `train_fn(params, model_state, x, key) -> (outputs, model_state)`.
      apply_fn: `apply_fn(params, model_state, x) -> outputs`, the network as it predicts.
    """

    objective: Objective
    train_fn: TrainFn
    apply_fn: Callable[[Params, ModelState, Any], jax.Array]

    def __call__(
        self, params: Params, model_state: ModelState, example: Batch, key: jax.Array
    ) -> tuple[jax.Array, ModelState]:
        """Computes the loss of one example, and the model's next state."""
        outputs, model_state = self.train_fn(params, model_state, example.inputs, key)
        return loss_per_label(self.objective, outputs, example), model_state

    def as_predicting(self, model_state: ModelState) -> LossFn:
        """Makes the loss of the network as it predicts, which importances are of."""
        return ExampleLoss(self.objective, with_model_state(self.apply_fn, model_state))


def cross_entropy(apply_fn: OutputFn) -> LossFn:
    """Makes the loss of one labelled example, for training and for the empirical Fisher information.

        −log softmax(mask_logits(apply_fn(params, example.inputs), example.class_mask))[example.labels]

    For labels `[positions]`, it is the mean over the positions, weighted by `example.label_weights`; for a Fisher
    information, whose loss is the sum, take `methods.ewc("empirical")`.

    Args:
      apply_fn: `apply_fn(params, x) -> [num_classes]`, one example's outputs, without batch axis.

    Returns:
      `loss_fn(params, example) -> scalar`, for an example that is a `Batch` without example axis. It raises
      ValueError where labels and outputs do not fit, or there are fewer than two classes.

    Example:
      >>> import jax.numpy as jnp
      >>> from lifelong_jax import Batch
      >>> example = Batch(jnp.zeros(2), jnp.array(1), jnp.array(1.0))
      >>> cross_entropy(lambda params, x: params + x)(jnp.zeros(2), example)
      Array(0.6931472, dtype=float32)
    """
    return ExampleLoss(CLASSIFICATION, apply_fn)


def with_model_state(apply_fn: Callable, model_state: ModelState) -> OutputFn:
    """Makes the network that predicts with a model state: `output_fn(params, x)`.

    Args:
      apply_fn: `apply_fn(params, model_state, x)`, or `apply_fn(params, x)` if `model_state` is None.
      model_state: a tree of arrays, or None.

    Returns:
      `output_fn(params, x)`.

    Example:
      >>> with_model_state(lambda params, state, x: params * x + state, 1.0)(2.0, 3.0)
      7.0
    """
    if model_state is None:
        return apply_fn
    return lambda params, x: apply_fn(params, model_state, x)
