"""A method is a name, an importance and a rule of consolidation."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks
from lifelong_jax.consolidation import Rule
from lifelong_jax.importance import empirical_fisher_diagonal, fisher_diagonal, local_mas_importance, mas_importance
from lifelong_jax.path_integral import path_integral, si_importance
from lifelong_jax.riemannian_walk import continue_walk, riemannian_walk, rwalk_importance
from lifelong_jax.tasks import mask_logits, mask_outputs
from lifelong_jax.training import TrainingState
from lifelong_jax.types import Batch, LossFn, OutputFn, Params

ImportanceFn: TypeAlias = Callable[[OutputFn, TrainingState, Batch, jax.Array], Params]
"""`importance_fn(apply_fn, state, batch, key) -> importance`, a tree like `state.params`.

`apply_fn(params, x) -> [num_classes]` gives one example's outputs, the inactive ones too; `state` is that in which the
task's training ended; `batch` holds the task's training examples, with their class masks.
"""


def _unchanged(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optimizer


def _fresh(opt_state: optax.OptState, previous: optax.OptState) -> optax.OptState:
    return opt_state


class Method(NamedTuple):
    """A way to remember.

    Attributes:
      name: as it stands in tables.
      importance_fn: how much each parameter mattered for the task just learned.
      rule: how that joins the earlier tasks' importance; see `consolidate`.
      decay: γ, what the earlier tasks' importance is multiplied by.
      wrap_optimizer: what a method that gathers importance while training does to the whole optimiser, the penalty
        included; its state is then in `state.opt_state` of the importance function. By default, nothing.
      carry: `carry(opt_state, previous) -> opt_state`: what a task's fresh optimiser state takes over from the one in
        which the last task ended. By default, nothing.
    """

    name: str
    importance_fn: ImportanceFn
    rule: Rule
    decay: float
    wrap_optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = _unchanged
    carry: Callable[[optax.OptState, optax.OptState], optax.OptState] = _fresh


def finetune() -> Method:
    """Makes the method that remembers nothing: importance 0 everywhere.

    Returns:
      The method.

    Example:
      >>> finetune().name
      'finetune'
    """
    return Method("finetune", _zeros, "latest", 1.0)


def l2(rule: Rule = "separate", decay: float = 1.0) -> Method:
    """Makes the method to which every parameter is equally important: importance 1 everywhere.

    Args:
      rule: "separate" or "latest".
      decay: γ.

    Returns:
      The method.

    Example:
      >>> l2().rule
      'separate'
    """
    return Method("l2", _ones, rule, decay)


def ewc(
    fisher: Literal["exact", "sampled", "empirical"] = "exact", rule: Rule = "separate", decay: float = 1.0
) -> Method:
    """Makes elastic weight consolidation: the diagonal of the Fisher information.

    Args:
      fisher: "exact" over the classes, "sampled" with one label per example from the model, or "empirical" at the true
        labels.
      rule: "separate" (Kirkpatrick et al. 2017) or "latest" (online EWC, Schwarz et al. 2018).
      decay: γ of online EWC.

    Returns:
      The method.

    Raises:
      ValueError: if `fisher` is unknown.

    Example:
      >>> ewc(rule="latest", decay=0.9).name
      'ewc'
    """
    _checks.check_choice("fisher", fisher, tuple(_FISHERS))
    return Method("ewc", _FISHERS[fisher], rule, decay)


def mas(rule: Rule = "latest", decay: float = 1.0) -> Method:
    """Makes memory-aware synapses: the sensitivity of the squared norm of the logits.

    Args:
      rule: "latest" (Aljundi et al. 2018) or "separate".
      decay: γ.

    Returns:
      The method.

    Example:
      >>> mas().rule
      'latest'
    """
    return Method("mas", _mas, rule, decay)


def local_mas(rule: Rule = "latest", decay: float = 1.0) -> Method:
    """Makes local memory-aware synapses: the sensitivity of the squared norm of each layer's output, by Hebb's rule.

    The network marks the ends of its layers by `layer_output`, as those in `models.py` do.

    Args:
      rule: "latest" or "separate".
      decay: γ.

    Returns:
      The method.

    Example:
      >>> local_mas().name
      'local_mas'
    """
    return Method("local_mas", _local_mas, rule, decay)


def si(rule: Rule = "latest", decay: float = 1.0, damping: float = 0.1) -> Method:
    """Makes Synaptic Intelligence: each parameter's share in the fall of the loss, gathered while training.

    Args:
      rule: "latest" (Zenke et al. 2017) or "separate".
      decay: γ.
      damping: ξ, above 0; see `si_importance`.

    Returns:
      The method.

    Raises:
      ValueError: if `damping` is not above 0.

    Example:
      >>> si().rule
      'latest'
    """
    _checks.check_positive("damping", damping)
    return Method("si", _si(damping), rule, decay, path_integral)


def rwalk(interval: int = 10, alpha: float = 0.2, damping: float = 1e-3) -> Method:
    """Makes RWalk: an online Fisher information and a score of the path, gathered while training.

    Its importance is that for all tasks so far, so there is no decay to choose.

    Args:
      interval: Δt, in steps; see `riemannian_walk` for all three.
      alpha: α, of the moving average.
      damping: ε.

    Returns:
      The method.

    Raises:
      ValueError: if `interval` is not a positive integer, or `alpha` or `damping` is out of bounds.

    Example:
      >>> rwalk().decay
      0.0
    """
    return Method("rwalk", _rwalk, "latest", 0.0, _walk(interval, alpha, damping), continue_walk)


def cross_entropy(apply_fn: OutputFn) -> LossFn:
    """Makes the loss of one labelled example: what is trained on, and what the empirical Fisher is of.

        −log softmax(mask_logits(apply_fn(params, example.inputs), example.class_mask))[example.labels]

    Args:
      apply_fn: `apply_fn(params, x) -> [num_classes]`, one example's outputs, without batch axis.

    Returns:
      `loss_fn(params, example) -> scalar`, of a `Batch` without its example axis.

    Example:
      >>> example = Batch(jnp.zeros(2), jnp.array(1), jnp.array(1.0))
      >>> cross_entropy(lambda params, x: params + x)(jnp.zeros(2), example)
      Array(0.6931472, dtype=float32)
    """

    def loss_fn(params: Params, example: Batch) -> jax.Array:
        logits = mask_logits(apply_fn(params, example.inputs), example.class_mask)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, example.labels)

    return loss_fn


def _zeros(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    return jax.tree.map(jnp.zeros_like, state.params)


def _ones(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    return jax.tree.map(jnp.ones_like, state.params)


def _exact_fisher(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    return _fisher(apply_fn, state, batch)


def _sampled_fisher(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    return _fisher(apply_fn, state, batch, num_samples=1, key=key)


def _fisher(apply_fn: OutputFn, state: TrainingState, batch: Batch, **options: Any) -> Params:
    def logits_fn(params: Params, x: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        inputs, class_mask = x
        return mask_logits(apply_fn(params, inputs), class_mask)

    return fisher_diagonal(logits_fn, state.params, (batch.inputs, batch.class_mask), weights=batch.weights, **options)


def _empirical_fisher(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    return empirical_fisher_diagonal(cross_entropy(apply_fn), state.params, batch, weights=batch.weights)


def _mas(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    return _mean_sensitivity(mas_importance, apply_fn, state, batch)


def _local_mas(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    return _mean_sensitivity(local_mas_importance, apply_fn, state, batch)


def _mean_sensitivity(
    importance_fn: Callable[..., Params], apply_fn: OutputFn, state: TrainingState, batch: Batch
) -> Params:
    def output_fn(params: Params, x: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        inputs, class_mask = x
        return mask_outputs(apply_fn(params, inputs), class_mask)

    return importance_fn(output_fn, state.params, (batch.inputs, batch.class_mask), weights=batch.weights)


# One function object per setting, so that jit compiles once per setting.


@functools.cache
def _si(damping: float) -> ImportanceFn:
    def importance_fn(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
        return si_importance(state.opt_state, state.params, damping=damping)

    return importance_fn


@functools.cache
def _walk(
    interval: int, alpha: float, damping: float
) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
    riemannian_walk(optax.identity(), interval=interval, alpha=alpha, damping=damping)  # refuses bad settings at once
    return functools.partial(riemannian_walk, interval=interval, alpha=alpha, damping=damping)


def _rwalk(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    return rwalk_importance(state.opt_state, state.params)


_FISHERS = {"exact": _exact_fisher, "sampled": _sampled_fisher, "empirical": _empirical_fisher}
