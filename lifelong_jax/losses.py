"""The loss of one example, of a network and an objective; and the divergence from a frozen network's predictions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks
from lifelong_jax._numerics import widen
from lifelong_jax.objectives import CLASSIFICATION, Objective, loss_per_label
from lifelong_jax.scenarios import mask_logits
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
            outputs = jax.eval_shape(self.apply_fn, _checks.shapes_of(params), x)
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
    information, which squares the gradient of each position, take `methods.ewc("empirical")`.

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


def kl_divergence(
    logits: jax.Array,
    frozen_logits: jax.Array,
    *,
    label_weights: jax.Array | None = None,
    class_mask: jax.Array | None = None,
) -> jax.Array:
    """Computes how far predictions are from those of a frozen network: a penalty on the function, not on parameters.

        KL(p_frozen ‖ p) = Σ_classes p_frozen · (log p_frozen − log p),   the mean over labels

    p and p_frozen are the softmax of the logits. The direction is that of distillation: the divergence is large where
    the frozen network gives a class a probability and the new one does not. Gradients go to `logits` alone.

    As a term of the loss, it anchors the function on the inputs that it is computed on. It needs no importance and no
    anchor, but a forward pass of the frozen network in each step, and inputs on which to keep its predictions:

        loss + strength · kl_divergence(apply_fn(params, x), apply_fn(frozen_params, x))

    With the new task's inputs, this is learning without forgetting. For a temperature T, as there, divide both logits
    by T and multiply the result by T². For the old classes alone, pass them as `class_mask`.

    Close to the frozen parameters, the divergence is ½ Δᵀ F Δ, with F the Fisher information and Δ the change of the
    parameters. So for one label an example, its strength is on the scale of that of `quadratic_penalty` with
    `fisher_diagonal`. With several, such as tokens, that Fisher information is a sum over an example's labels, and the
    divergence is their mean.

    Args:
      logits: `[..., num_classes]`, of one example or of a batch; leading axes are labels.
      frozen_logits: an array like `logits`, of the frozen network.
      label_weights: the weight of each label, with the first axes of `logits`; 0 for padding, where logits may be NaN.
        None for ones.
      class_mask: bool, `[num_classes]`, or any shape that broadcasts to `logits`: the classes between which the
        probabilities are divided. None for all.

    Returns:
      A scalar, float32 or wider: the mean weighted by `label_weights`; 0 if these are all 0.

    Raises:
      ValueError: if shapes differ, or there are fewer than two classes.

    Example:
      >>> import jax.numpy as jnp
      >>> divergence = kl_divergence(jnp.zeros((1, 2)), jnp.log(jnp.array([[0.9, 0.1]])))
      >>> round(float(divergence), 3)
      0.368

    Li and Hoiem 2016, arXiv 1606.09282; Hinton, Vinyals and Dean 2015, arXiv 1503.02531.
    """
    _check_logits(logits, frozen_logits, label_weights)
    logits, frozen_logits = map(widen, (logits, jax.lax.stop_gradient(frozen_logits)))
    weights = None if label_weights is None else _with_axes_of(jnp.asarray(label_weights, logits.dtype), logits)
    if weights is not None:  # a NaN of padding would have the gradient NaN, at the weight 0 too
        logits, frozen_logits = (jnp.where(weights == 0, 0, array) for array in (logits, frozen_logits))
    log_p, log_frozen = (jax.nn.log_softmax(mask_logits(array, class_mask)) for array in (logits, frozen_logits))
    # A class of probability 0 adds nothing, also where its logits are −∞.
    divergences = optax.losses.kl_divergence_with_log_targets(log_p, log_frozen, where=log_frozen > -jnp.inf)
    if weights is None:
        return jnp.mean(divergences)
    weights = jnp.broadcast_to(weights[..., 0], divergences.shape).astype(divergences.dtype)
    total = jnp.sum(weights)
    return jnp.sum(weights * divergences) / jnp.where(total > 0, total, 1)


def _check_logits(logits: jax.Array, frozen_logits: jax.Array, label_weights: jax.Array | None) -> None:
    if jnp.ndim(logits) < 1 or logits.shape[-1] < 2:
        raise ValueError(f"logits have shape {jnp.shape(logits)}, but must be [..., num_classes], two classes or more.")
    if jnp.shape(frozen_logits) != logits.shape:
        raise ValueError(f"frozen_logits have shape {jnp.shape(frozen_logits)}, but logits have {logits.shape}.")
    if label_weights is None:
        return
    shape = jnp.shape(label_weights)
    if len(shape) >= logits.ndim or shape != logits.shape[: len(shape)]:
        raise ValueError(
            f"label_weights have shape {shape}, but logits have {logits.shape}: pass a weight for each label, with the "
            f"first axes of the logits, without that of the classes."
        )


def _with_axes_of(weights: jax.Array, logits: jax.Array) -> jax.Array:
    return weights.reshape(weights.shape + (1,) * (logits.ndim - weights.ndim))


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
