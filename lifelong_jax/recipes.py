"""How a network is trained on each task of a sequence."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from lifelong_jax.losses import ExampleLoss, TrainLoss, with_model_state
from lifelong_jax.objectives import CLASSIFICATION, Objective
from lifelong_jax.tasks import permute_features, with_permutation
from lifelong_jax.types import ModelState, OptimizerFn, OutputFn, Scenario, TrainFn


class Recipe(NamedTuple):
    """How a network is trained on each task of a sequence.

    Attributes:
      apply_fn: `apply_fn(params, x) -> outputs`, the network as it predicts, for one example, without batch axis: for
        classification, its logits `[num_classes]`. With `train_fn`, `apply_fn(params, model_state, x) -> outputs`.
      optimizer_fn: `optimizer_fn(strength) -> optimizer`, a function of λ. Pass the same function objects in every
        call, or the loops are compiled again.
      num_epochs: the number of passes over each task's training examples.
      batch_size: the number of examples per step.
      scenario: "task", "domain" or "class"; "task" and "class" need tasks with class masks. See
        `scenarios.active_classes`.
      objective: what the outputs mean: the loss, the likelihood and the score; from `objectives`.
      train_fn: `train_fn(params, model_state, x, key) -> (outputs, model_state)`, the network as it is trained, if it
        differs: with dropout, or batch normalisation. None for `apply_fn`. See `types.TrainFn`.
      patience: for early stopping, the number of epochs in a row that are not better than the best one on the task's
        validation examples, after which its training ends, and goes back to the best one. None to train all epochs.

    Example:
      >>> import optax
      >>> Recipe(lambda w, x: x @ w, lambda strength: optax.sgd(0.1), num_epochs=10, batch_size=32).scenario
      'domain'
    """

    apply_fn: Callable[..., jax.Array]
    optimizer_fn: OptimizerFn
    num_epochs: int
    batch_size: int
    scenario: Scenario = "domain"
    objective: Objective = CLASSIFICATION
    train_fn: TrainFn | None = None
    patience: int | None = None


def training_loss(recipe: Recipe, permutation: jax.Array | None) -> Callable:
    """Makes the loss for `learn_task`: of the network that is trained, on features permuted as in a task.

    Args:
      recipe: the recipe.
      permutation: `[num_features]`, a task's, or None.

    Returns:
      `loss_fn(params, example)`, or with a `train_fn`, `loss_fn(params, model_state, example, key)`.
    """
    if recipe.train_fn is None:
        return ExampleLoss(recipe.objective, with_permutation(recipe.apply_fn, permutation))
    train_fn, apply_fn = recipe.train_fn, recipe.apply_fn
    return TrainLoss(
        recipe.objective,
        lambda params, model_state, x, key: train_fn(params, model_state, permute_features(x, permutation), key),
        lambda params, model_state, x: apply_fn(params, model_state, permute_features(x, permutation)),
    )


def network_of(recipe: Recipe, model_state: ModelState, permutation: jax.Array | None) -> OutputFn:
    """Makes the network as it predicts, `output_fn(params, x)`, on features permuted as in a task.

    Args:
      recipe: the recipe.
      model_state: the model state, or None for a recipe without `train_fn`.
      permutation: `[num_features]`, a task's, or None.

    Returns:
      `output_fn(params, x)`.
    """
    return with_permutation(with_model_state(recipe.apply_fn, model_state), permutation)
