"""Continual-learning methods: each is an importance, and a rule that consolidates it."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks, forms
from lifelong_jax.consolidation import Rule
from lifelong_jax.importance.estimators import (
    empirical_fisher_diagonal,
    fisher_diagonal,
    local_mas_importance,
    mas_importance,
)
from lifelong_jax.importance.factor_sums import WeightSharing
from lifelong_jax.importance.kronecker import empirical_kronecker_fisher, kronecker_fisher
from lifelong_jax.importance.path_integral import path_integral, si_importance
from lifelong_jax.importance.riemannian_walk import continue_walk, riemannian_walk, rwalk_importance
from lifelong_jax.objectives import Objective, active_outputs, label_counts
from lifelong_jax.training import TrainingState
from lifelong_jax.types import Batch, OutputFn, Params

ImportanceFn: TypeAlias = Callable[[OutputFn, Objective, TrainingState, Batch, jax.Array], Params]
"""`importance_fn(apply_fn, objective, state, batch, key) -> importance`, a tree like `state.params`.

`apply_fn(params, x) -> outputs` is the network as it predicts, on one example, with inactive outputs too; `objective`
says what the outputs mean; `state` is the training state after the task's last step; `batch` has the task's training
examples, with their class masks; `key` is a random key, which may be None if nothing is sampled. The importance is a
mean over labels.
"""

WrapOptimizer: TypeAlias = Callable[[optax.GradientTransformation], optax.GradientTransformation]
"""`wrap_optimizer(optimizer) -> optimizer`: see `importance.path_integral`."""


class Method(NamedTuple):
    """A method of continual learning: an importance, and a rule that consolidates it.

    Attributes:
      name: the name in tables.
      importance_fn: computes how much each parameter matters for the task just learned.
      rule: how this importance is added to that of the earlier tasks; see `consolidate`.
      decay: γ, the factor of the earlier tasks' importance.
      wrap_optimizer: `wrap_optimizer(optimizer) -> optimizer`, for methods that gather importance during training. It
        wraps the whole optimiser, including the penalty; `importance_fn` finds its state in `state.opt_state`. None for
        other methods.
      carry: `carry(opt_state, previous) -> opt_state`, for methods that carry over an optimiser state: returns a task's
        fresh state with what it takes from the previous task's last one. None for other methods.
    """

    name: str
    importance_fn: ImportanceFn
    rule: Rule
    decay: float
    wrap_optimizer: WrapOptimizer | None = None
    carry: Callable[[optax.OptState, optax.OptState], optax.OptState] | None = None


def finetune() -> Method:
    """Makes fine-tuning, which remembers nothing: importance 0 everywhere.

    Returns:
      The method.

    Example:
      >>> from lifelong_jax import methods
      >>> methods.finetune().name
      'finetune'
    """
    return Method("finetune", _zeros, "latest", 1.0)


def l2(rule: Rule = "separate", decay: float = 1.0) -> Method:
    """Makes the L2 penalty, to which all parameters are equally important: importance 1 everywhere.

    Args:
      rule: "separate" or "latest".
      decay: γ.

    Returns:
      The method.

    Example:
      >>> from lifelong_jax import methods
      >>> methods.l2().rule
      'separate'
    """
    return Method("l2", _ones, rule, decay)


def ewc(
    fisher: Literal["exact", "sampled", "empirical"] = "exact", rule: Rule = "separate", decay: float = 1.0
) -> Method:
    """Makes elastic weight consolidation (EWC): the diagonal of the Fisher information.

    Args:
      fisher: "exact" for the expectation over all classes, "sampled" for one draw of each example's labels from the
        model, or "empirical" for the true labels. All three square the gradient of each label by itself. "empirical"
        takes one pass too: if an example has several labels, as a sequence has tokens, they get random signs. Where its
        importance function gets no key, it takes a pass for each label.
      rule: "separate" (Kirkpatrick et al. 2017) or "latest" (online EWC, Schwarz et al. 2018).
      decay: γ of online EWC.

    Returns:
      The method.

    Raises:
      ValueError: if `fisher` is unknown.

    Example:
      >>> from lifelong_jax import methods
      >>> methods.ewc(rule="latest", decay=0.9).name
      'ewc'
    """
    _checks.check_choice("fisher", fisher, tuple(_FISHERS))
    return Method("ewc", _FISHERS[fisher], rule, decay)


def kfac(
    fisher: Literal["exact", "sampled", "empirical"] = "exact",
    decay: float = 1.0,
    weight_sharing: WeightSharing = "expand",
) -> Method:
    """Makes EWC with Kronecker factors: each layer's Fisher information as a product of two matrices.

    It takes no `label_weights`: padded positions would count in the factor of a layer's inputs. Its penalty is around
    the latest parameters. Let the proximal step come last in the optimiser, about 50 times per
    task: `proximal_quadratic_penalty(step_size, strength, every)`.

    Args:
      fisher: as for `ewc`.
      decay: γ.
      weight_sharing: "expand" or "reduce"; see `kronecker_fisher`.

    Returns:
      The method.

    Raises:
      ValueError: if `fisher` or `weight_sharing` is unknown.

    Example:
      >>> from lifelong_jax import methods
      >>> methods.kfac().rule
      'latest'
    """
    _checks.check_choice("fisher", fisher, tuple(_FISHERS))
    _checks.check_choice("weight_sharing", weight_sharing, ("expand", "reduce"))
    if fisher == "empirical":
        estimator = _partial(_of_all_positions, estimator=empirical_kronecker_fisher, weight_sharing=weight_sharing)
        return Method("kfac", _partial(_empirical_fisher, estimator=estimator), "latest", decay)
    estimator = _partial(_of_all_positions, estimator=kronecker_fisher, weight_sharing=weight_sharing)
    num_samples = 1 if fisher == "sampled" else None
    return Method("kfac", _partial(_fisher, estimator=estimator, num_samples=num_samples), "latest", decay)


def mas(rule: Rule = "latest", decay: float = 1.0) -> Method:
    """Makes memory-aware synapses (MAS): the sensitivity of the squared norm of the logits.

    Args:
      rule: "latest" (Aljundi et al. 2018) or "separate".
      decay: γ.

    Returns:
      The method.

    Example:
      >>> from lifelong_jax import methods
      >>> methods.mas().rule
      'latest'
    """
    return Method("mas", _mas, rule, decay)


def local_mas(rule: Rule = "latest", decay: float = 1.0) -> Method:
    """Makes local memory-aware synapses: the sensitivity of the squared norm of each layer's output, by Hebb's rule.

    The network must mark the outputs of its layers by `layer_output`, as those in `models` do.

    Args:
      rule: "latest" or "separate".
      decay: γ.

    Returns:
      The method.

    Example:
      >>> from lifelong_jax import methods
      >>> methods.local_mas().name
      'local_mas'
    """
    return Method("local_mas", _local_mas, rule, decay)


def si(rule: Rule = "latest", decay: float = 1.0, damping: float = 0.1) -> Method:
    """Makes Synaptic Intelligence (SI): each parameter's share in the decrease of the loss, gathered during training.

    Args:
      rule: "latest" (Zenke et al. 2017) or "separate".
      decay: γ.
      damping: ξ, above 0; see `si_importance`.

    Returns:
      The method.

    Raises:
      ValueError: if `damping` is not above 0.

    Example:
      >>> from lifelong_jax import methods
      >>> methods.si().rule
      'latest'
    """
    _checks.check_positive("damping", damping)
    return Method("si", _partial(_path_importance, damping=damping), rule, decay, path_integral)


def rwalk(interval: int = 10, alpha: float = 0.2, damping: float = 1e-3) -> Method:
    """Makes RWalk: an online Fisher information and a score of the training path, gathered during training.

    Its importance is that of all tasks so far, so there is no decay to choose.

    Args:
      interval: Δt, in steps; see `riemannian_walk` for all three arguments.
      alpha: α, the weight of a new batch in the moving average, above 0 and at most 1.
      damping: ε, above 0.

    Returns:
      The method.

    Raises:
      ValueError: if `interval` is not a positive integer, or `alpha` or `damping` is out of range.

    Example:
      >>> from lifelong_jax import methods
      >>> methods.rwalk().decay
      0.0
    """
    wrap_optimizer = _partial(riemannian_walk, interval=interval, alpha=alpha, damping=damping)
    wrap_optimizer(optax.identity())  # validates the settings
    return Method("rwalk", _walk_importance, "latest", 0.0, wrap_optimizer, continue_walk)


def _zeros(apply_fn: OutputFn, objective: Objective, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    return jax.tree.map(jnp.zeros_like, state.params)


def _ones(apply_fn: OutputFn, objective: Objective, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    return jax.tree.map(jnp.ones_like, state.params)


def _fisher(
    apply_fn: OutputFn,
    objective: Objective,
    state: TrainingState,
    batch: Batch,
    key: jax.Array,
    *,
    estimator: Callable[..., Params],
    num_samples: int | None = None,
) -> Params:
    sampling = {} if num_samples is None else {"num_samples": num_samples, "key": key}
    estimate = functools.partial(estimator, likelihood=objective.likelihood, **sampling)
    return _mean_over_labels(estimate, objective.logits_fn, apply_fn, objective, state, batch)


def _of_all_positions(
    function: Callable, params: Params, examples: Batch, *, estimator: Callable[..., Params], **options: Any
) -> Params:
    if examples.label_weights is not None:
        raise ValueError(
            "kfac takes no label_weights, because positions of weight 0 would count in the factor of a layer's inputs: "
            "make sequences of equal lengths, or take ewc."
        )
    return estimator(function, params, examples, **options)


def _empirical_fisher(
    apply_fn: OutputFn,
    objective: Objective,
    state: TrainingState,
    batch: Batch,
    key: jax.Array,
    *,
    estimator: Callable[..., Params],
) -> Params:
    signs = {} if key is None else {"num_samples": 1, "key": key}  # one pass, however many labels there are
    estimate = functools.partial(estimator, **signs)
    return _mean_over_labels(estimate, objective.losses_fn, apply_fn, objective, state, batch)


def _output_sensitivity(
    apply_fn: OutputFn,
    objective: Objective,
    state: TrainingState,
    batch: Batch,
    key: jax.Array,
    *,
    estimator: Callable[..., Params],
) -> Params:
    return _mean_over_labels(estimator, active_outputs, apply_fn, objective, state, batch)


def _mean_over_labels(
    estimator: Callable[..., Params],
    of_outputs: Callable[[jax.Array, Batch], jax.Array],
    apply_fn: OutputFn,
    objective: Objective,
    state: TrainingState,
    batch: Batch,
) -> Params:
    """Computes the importance of `of_outputs(outputs, example)`, as a mean over labels."""

    def function(params: Params, example: Batch) -> jax.Array:
        return of_outputs(apply_fn(params, example.inputs), example)

    importance = estimator(function, state.params, batch, weights=batch.weights)
    counts = label_counts(objective, batch)
    if counts is None or counts is batch.weights:
        return importance
    num_examples = len(batch.labels) if batch.weights is None else jnp.sum(batch.weights.astype(counts.dtype))
    return forms.tree_map(lambda form: forms.scale(form, num_examples / jnp.sum(counts)), importance)


def _path_importance(
    apply_fn: OutputFn, objective: Objective, state: TrainingState, batch: Batch, key: jax.Array, *, damping: float
) -> Params:
    return si_importance(state.opt_state, state.params, damping=damping)


def _walk_importance(
    apply_fn: OutputFn, objective: Objective, state: TrainingState, batch: Batch, key: jax.Array
) -> Params:
    return rwalk_importance(state.opt_state, state.params)


@functools.cache
def _partial(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    # The same object for the same settings, because jit compiles for each object.
    return functools.partial(function, **settings)


_mas = functools.partial(_output_sensitivity, estimator=mas_importance)
_local_mas = functools.partial(_output_sensitivity, estimator=local_mas_importance)
_FISHERS: dict[str, ImportanceFn] = {
    "exact": functools.partial(_fisher, estimator=fisher_diagonal),
    "sampled": functools.partial(_fisher, estimator=fisher_diagonal, num_samples=1),
    "empirical": functools.partial(_empirical_fisher, estimator=empirical_fisher_diagonal),
}
