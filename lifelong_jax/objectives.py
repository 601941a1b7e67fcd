"""What a network's outputs mean: the loss, the likelihood and the score of one example.

The loops over tasks take an `Objective`: classification of examples or tokens, regression, or binary labels.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lifelong_jax import _checks
from lifelong_jax._numerics import widen
from lifelong_jax._processes import to_host
from lifelong_jax.scenarios import mask_logits, mask_outputs
from lifelong_jax.types import Batch

Likelihood: TypeAlias = Literal["categorical", "gaussian", "bernoulli"]
"""The distribution of labels given outputs; see `fisher_diagonal`."""


class Objective(NamedTuple):
    """What a network's outputs mean: the loss, the likelihood and the score of one example.

    Take one from `classification`, `regression` or `binary`; with `_replace`, give it another score. An example is a
    `Batch` without the example axis.

    Attributes:
      loss_fn: `loss_fn(outputs, example) -> scalar`: −log p(example.labels given outputs), up to a constant, summed
        over the example's labels with their weights, `example.label_weights`.
      losses_fn: `losses_fn(outputs, example) -> array like example.labels`: the terms of this sum, for an empirical
        Fisher information.
      score_fn: `score_fn(outputs, example) -> scalar`: the sum of the scores of the example's labels, weighted too.
      count_fn: `count_fn(example) -> scalar`: the number of the example's labels, weighted too; None if an example has
        one label. Losses, importances and scores are means over labels.
      logits_fn: `logits_fn(outputs, example) -> array`: the parameters of the likelihood, for a Fisher information. It
        does not read the labels.
      likelihood: "categorical", "gaussian" or "bernoulli".
      score: the name of the score in tables.
      higher_is_better: whether a higher score is better.
      check_fn: `check_fn(name, batch, outputs)` raises an error that names the argument if a batch's labels are not
        what the objective needs, or do not fit outputs of the shape and dtype `outputs`.
    """

    loss_fn: Callable[[jax.Array, Batch], jax.Array]
    losses_fn: Callable[[jax.Array, Batch], jax.Array]
    score_fn: Callable[[jax.Array, Batch], jax.Array]
    count_fn: Callable[[Batch], jax.Array] | None
    logits_fn: Callable[[jax.Array, Batch], jax.Array]
    likelihood: Likelihood
    score: str
    higher_is_better: bool
    check_fn: Callable[[str, Batch, Any], None]


@functools.cache  # one object per setting, so that jit compiles once per setting
def classification(score: Literal["accuracy", "loss"] = "accuracy") -> Objective:
    """Makes classification: one class for each example, or for each of its positions, as in next-token prediction.

        loss = Σ_positions label_weights · (−log softmax(mask_logits(outputs, class_mask))[labels])

    Labels are integers in `[0, num_classes)`, `[]` or `[positions]` for one example; outputs are `[num_classes]` or
    `[positions, num_classes]`. Where `label_weights` is 0, as for padding, a label may be any integer.

    Args:
      score: "accuracy" for the share of labels that get the largest active output, or "loss" for the mean loss of a
        label in nats, of which a lower one is better.

    Returns:
      The objective.

    Raises:
      ValueError: if `score` is unknown.

    Example:
      >>> classification().likelihood
      'categorical'
    """
    _checks.check_choice("score", score, ("accuracy", "loss"))
    return Objective(
        loss_fn=_cross_entropy,
        losses_fn=_cross_entropies,
        score_fn=_num_correct if score == "accuracy" else _cross_entropy,
        count_fn=_num_labels,
        logits_fn=_class_logits,
        likelihood="categorical",
        score=score,
        higher_is_better=score == "accuracy",
        check_fn=_check_classes,
    )


@functools.cache
def regression(variance: float = 1.0) -> Objective:
    """Makes regression: a Gaussian around each output, of a known variance.

        loss = Σ label_weights · (labels − outputs)² / (2 · variance)

    Labels are floating, of the outputs' shape. The score is the mean squared error of an output; a lower one is better.

    Args:
      variance: the variance of the noise of the labels, above 0.

    Returns:
      The objective.

    Raises:
      ValueError: if `variance` is not above 0.

    Example:
      >>> from lifelong_jax import Batch
      >>> example = Batch(jnp.zeros(3), jnp.array([1.0, 2.0]))
      >>> regression().loss_fn(jnp.array([1.0, 4.0]), example)
      Array(2., dtype=float32)
    """
    _checks.check_positive("variance", variance)
    return Objective(
        loss_fn=functools.partial(_squared_error, scale=1 / (2 * variance)),
        losses_fn=functools.partial(_squared_errors, scale=1 / (2 * variance)),
        score_fn=_mean_squared_error,
        count_fn=None,
        logits_fn=functools.partial(_weighted_outputs, scale=variance**-0.5),
        likelihood="gaussian",
        score="squared error",
        higher_is_better=False,
        check_fn=_check_targets,
    )


@functools.cache
def binary() -> Objective:
    """Makes binary classification: independent labels of 0 or 1, with one logit each.

        loss = −Σ label_weights · (labels · log sigmoid(outputs) + (1 − labels) · log sigmoid(−outputs))

    Labels are 0 and 1, integers, bools or floating, of the outputs' shape: `[]` for one label, `[num_labels]` for
    several of each example. The score is the share of labels that get the right side of 0.

    Returns:
      The objective.

    Example:
      >>> from lifelong_jax import Batch
      >>> example = Batch(jnp.zeros(3), jnp.array([0, 1]))
      >>> binary().loss_fn(jnp.array([0.0, 0.0]), example)
      Array(1.3862944, dtype=float32)
    """
    return Objective(
        loss_fn=_binary_cross_entropy,
        losses_fn=_binary_cross_entropies,
        score_fn=_mean_of_correct_sides,
        count_fn=None,
        logits_fn=_weighted_outputs,
        likelihood="bernoulli",
        score="accuracy",
        higher_is_better=True,
        check_fn=_check_binary_labels,
    )


def loss_per_label(objective: Objective, outputs: jax.Array, example: Batch) -> jax.Array:
    """Computes the mean loss of an example's labels; 0 if none counts."""
    loss = objective.loss_fn(outputs, example)
    if _counts_one(objective, example):
        return loss
    assert objective.count_fn is not None
    return loss / _or_one(objective.count_fn(example).astype(loss.dtype))


def label_counts(objective: Objective, batch: Batch) -> jax.Array | None:
    """Computes the weight of each example in a mean over labels: its weight times the number of its labels.

    Args:
      objective: the objective.
      batch: examples.

    Returns:
      `[num_examples]`, or None if all examples have the weight 1 and one label.
    """
    if _counts_one(objective, _checks.first_example(batch)):
        return batch.weights
    assert objective.count_fn is not None
    counts = jax.vmap(objective.count_fn)(batch)
    return counts if batch.weights is None else counts * batch.weights.astype(counts.dtype)


def active_outputs(outputs: jax.Array, example: Batch) -> jax.Array:
    """Sets outputs to 0 that are inactive, or whose label has the weight 0.

    Args:
      outputs: `[..., num_outputs]`, one example's.
      example: the example.

    Returns:
      `where(class_mask, outputs, 0) · label_weights`.
    """
    return _weighted_outputs(mask_outputs(outputs, example.class_mask), example)


# --- classification ---------------------------------------------------------------------------------------------------


def _cross_entropy(outputs: jax.Array, example: Batch) -> jax.Array:
    return jnp.sum(_cross_entropies(outputs, example))


def _cross_entropies(outputs: jax.Array, example: Batch) -> jax.Array:
    _check_class_shapes("labels", jnp.shape(example.labels), outputs)
    valid = (example.labels >= 0) & (example.labels < outputs.shape[-1])
    logits = mask_logits(outputs, example.class_mask)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, example.labels, 0))
    return _weighted(jnp.where(valid, losses, jnp.nan), example)  # a label out of range would count as another one


def _num_correct(outputs: jax.Array, example: Batch) -> jax.Array:
    if example.class_mask is not None:  # below any active output, and no inactive NaN counts
        outputs = jnp.where(example.class_mask, outputs, -jnp.inf)
    correct = jnp.argmax(outputs, axis=-1).astype(jnp.int32) == example.labels.astype(jnp.int32)
    correct &= ~jnp.isnan(outputs).any(axis=-1)  # argmax returns the index of a NaN
    return _weighted_sum(correct.astype(jnp.float32), example)


def _num_labels(example: Batch) -> jax.Array:
    return _weighted_sum(jnp.ones(jnp.shape(example.labels)), example)


def _class_logits(outputs: jax.Array, example: Batch) -> jax.Array:
    return _weighted_outputs(mask_logits(outputs, example.class_mask), example)


def _check_classes(name: str, batch: Batch, outputs: Any) -> None:
    _check_class_shapes(f"{name}.labels", batch.labels.shape[1:], outputs)
    _check_label_weights(name, batch)
    _checks.check_class_numbers(name, counted_labels(batch), outputs.shape[-1])


def _check_class_shapes(name: str, shape: tuple[int, ...], outputs: Any) -> None:
    is_array = isinstance(outputs, (jax.Array, jax.ShapeDtypeStruct))
    if not is_array or outputs.ndim < 1 or outputs.shape[-1] < 2:
        raise ValueError(
            f"apply_fn must return [num_classes] for one example, which comes without batch axis, with two classes or "
            f"more, not arrays of shape {jax.tree.map(jnp.shape, outputs)}. For one logit of a binary label, take the "
            f"objective binary(), or return jnp.stack([0, z])."
        )
    if shape != outputs.shape[:-1]:
        raise ValueError(
            f"{name} has shape {shape} for one example, but apply_fn returns {outputs.shape}: for one example, which "
            f"comes without batch axis, it must return [num_classes] for a label [], or [positions, num_classes] for "
            f"labels [positions]. {_checks.ONE_CLASS_EACH}."
        )


# --- regression and binary labels -------------------------------------------------------------------------------------


def _squared_error(outputs: jax.Array, example: Batch, *, scale: float) -> jax.Array:
    return jnp.sum(_squared_errors(outputs, example, scale=scale))


def _squared_errors(outputs: jax.Array, example: Batch, *, scale: float) -> jax.Array:
    _check_same_shape("labels", jnp.shape(example.labels), outputs)
    return _weighted(scale * _squares(outputs, example), example)


def _mean_squared_error(outputs: jax.Array, example: Batch) -> jax.Array:
    return _weighted_mean(_squares(outputs, example), example)


def _squares(outputs: jax.Array, example: Batch) -> jax.Array:
    outputs = widen(outputs)
    return jnp.square(outputs - _known_labels(outputs, example))


def _binary_cross_entropy(outputs: jax.Array, example: Batch) -> jax.Array:
    return jnp.sum(_binary_cross_entropies(outputs, example))


def _binary_cross_entropies(outputs: jax.Array, example: Batch) -> jax.Array:
    _check_same_shape("labels", jnp.shape(example.labels), outputs)
    outputs = widen(outputs)
    return _weighted(optax.losses.sigmoid_binary_cross_entropy(outputs, _known_labels(outputs, example)), example)


def _mean_of_correct_sides(outputs: jax.Array, example: Batch) -> jax.Array:
    correct = ((outputs > 0) == (example.labels.astype(jnp.float32) > 0.5)) & ~jnp.isnan(outputs)
    return _weighted_mean(correct.astype(jnp.float32), example)


def _check_targets(name: str, batch: Batch, outputs: Any) -> None:
    _check_same_shape(f"{name}.labels", batch.labels.shape[1:], outputs)
    if not jnp.issubdtype(batch.labels.dtype, jnp.floating):
        raise TypeError(f"{name}.labels has dtype {batch.labels.dtype}, but regression needs floating-point labels.")
    _check_label_weights(name, batch)
    if not np.isfinite(np.asarray(counted_labels(batch), np.float64)).all():
        raise ValueError(f"{name}.labels has entries that are NaN or infinite. Give them the label weight 0.")


def _check_binary_labels(name: str, batch: Batch, outputs: Any) -> None:
    _check_same_shape(f"{name}.labels", batch.labels.shape[1:], outputs)
    _check_label_weights(name, batch)
    if not np.isin(np.asarray(counted_labels(batch), np.float64), (0, 1)).all():
        raise ValueError(f"{name}.labels must be 0 or 1.")


def _check_same_shape(name: str, shape: tuple[int, ...], outputs: Any) -> None:
    if not isinstance(outputs, (jax.Array, jax.ShapeDtypeStruct)) or shape != outputs.shape:
        raise ValueError(
            f"{name} has shape {shape} for one example, but apply_fn returns {jax.tree.map(jnp.shape, outputs)} for "
            f"one example, which comes without batch axis. They must agree: make labels[:, 0] of a column, say."
        )


# --- weights of labels ------------------------------------------------------------------------------------------------


def _weighted_sum(values: jax.Array, example: Batch) -> jax.Array:
    return jnp.sum(_weighted(values, example))


def _weighted(values: jax.Array, example: Batch) -> jax.Array:
    """Weighs the values of an example's labels; what is masked by a weight of 0 may be NaN."""
    if example.label_weights is None:
        return values
    weights = _label_weights_like(values, example)
    return jnp.where(weights == 0, 0, weights * values)


def _weighted_mean(values: jax.Array, example: Batch) -> jax.Array:
    if example.label_weights is None:
        return jnp.mean(values)
    total = jnp.sum(_label_weights_like(values, example))
    return _weighted_sum(values, example) / _or_one(total)


def _known_labels(outputs: jax.Array, example: Batch) -> jax.Array:
    """Returns the labels, and 0 in place of those that do not count, which may be NaN."""
    labels = example.labels.astype(outputs.dtype)
    return labels if example.label_weights is None else jnp.where(_label_weights_like(labels, example) == 0, 0, labels)


def _weighted_outputs(outputs: jax.Array, example: Batch, scale: float = 1.0) -> jax.Array:
    """Returns the outputs, scaled, with gradients that are multiplied by the weights of their labels."""
    outputs = outputs if scale == 1 else outputs * scale
    if example.label_weights is None:
        return outputs
    weights, fixed = _label_weights_like(outputs, example), jax.lax.stop_gradient(outputs)
    return jnp.where(weights == 0, 0, fixed + weights * (outputs - fixed))


def _label_weights_like(values: jax.Array, example: Batch) -> jax.Array:
    weights = example.label_weights
    assert weights is not None
    return jnp.broadcast_to(_with_axes(weights, values.ndim), values.shape).astype(values.dtype)


def _with_axes(weights: Any, ndim: int) -> Any:
    """Adds axes of length 1 at the end: weights are given for the first axes of labels."""
    return weights.reshape(weights.shape + (1,) * (ndim - weights.ndim))


def _counts_one(objective: Objective, example: Any) -> bool:
    return objective.count_fn is None or (example.label_weights is None and jnp.ndim(example.labels) == 0)


def _or_one(total: jax.Array) -> jax.Array:
    return jnp.where(total > 0, total, 1)


def counted_labels(batch: Batch) -> np.ndarray:
    """Returns the labels whose weight is not 0, where they are known; no labels otherwise."""
    if not all(map(_checks.is_concrete, (batch.labels, batch.label_weights))):
        return np.zeros(0, batch.labels.dtype)
    labels = to_host(batch.labels)
    if batch.label_weights is None:
        return labels
    weights = _with_axes(to_host(batch.label_weights), labels.ndim)
    return labels[np.broadcast_to(weights, labels.shape) > 0]


def _check_label_weights(name: str, batch: Batch) -> None:
    if batch.label_weights is None:
        return
    shape, of_labels = np.shape(batch.label_weights), np.shape(batch.labels)
    if shape != of_labels[: len(shape)]:
        raise ValueError(
            f"{name}.label_weights has shape {shape}, but the labels have {of_labels}: one for each label."
        )
    if _checks.is_concrete(batch.label_weights):
        weights = to_host(batch.label_weights)
        if not (np.isfinite(weights) & (weights >= 0)).all() or not weights.any():
            raise ValueError(f"{name}.label_weights must be finite, not negative and not all 0.")


CLASSIFICATION = classification()
"""Classification, scored by accuracy."""
