"""Continual learning in JAX: exact parameter importances (EWC, MAS), and a quadratic penalty for any optax pipeline."""

import importlib
import warnings
from typing import Any

from lifelong_jax import forms, losses, methods, metrics, objectives, scenarios, tasks
from lifelong_jax.consolidation import consolidate, init_consolidation, merge
from lifelong_jax.continual import Progress, SequenceState, init_sequence, learn_jointly, learn_tasks
from lifelong_jax.evaluation import evaluate
from lifelong_jax.importance import (
    continue_walk,
    empirical_fisher_diagonal,
    empirical_kronecker_fisher,
    explain,
    fisher_diagonal,
    kronecker_fisher,
    layer_output,
    local_mas_importance,
    mas_importance,
    normalize_importance,
    path_integral,
    riemannian_walk,
    rwalk_importance,
    si_importance,
)
from lifelong_jax.penalty import add_quadratic_penalty, proximal_adam, proximal_quadratic_penalty, quadratic_penalty
from lifelong_jax.recipes import Recipe
from lifelong_jax.sweep import SweepRun, learn_sweep
from lifelong_jax.tasks import dataset_tasks, pad_tasks, permuted_tasks, rotated_tasks, split_tasks
from lifelong_jax.training import TrainingState, init_training, learn_task
from lifelong_jax.types import Batch, Consolidation, Task

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Consolidation",
    "Progress",
    "Recipe",
    "SequenceState",
    "SweepRun",
    "Task",
    "TrainingState",
    "add_quadratic_penalty",
    "consolidate",
    "continue_walk",
    "dataset_tasks",
    "empirical_fisher_diagonal",
    "empirical_kronecker_fisher",
    "evaluate",
    "explain",
    "fisher_diagonal",
    "forms",
    "init_consolidation",
    "init_sequence",
    "init_training",
    "kronecker_fisher",
    "layer_output",
    "learn_jointly",
    "learn_sweep",
    "learn_task",
    "learn_tasks",
    "local_mas_importance",
    "losses",
    "mas_importance",
    "merge",
    "methods",
    "metrics",
    "normalize_importance",
    "objectives",
    "pad_tasks",
    "path_integral",
    "permuted_tasks",
    "proximal_adam",
    "proximal_quadratic_penalty",
    "quadratic_penalty",
    "riemannian_walk",
    "rotated_tasks",
    "rwalk_importance",
    "scenarios",
    "si_importance",
    "split_tasks",
    "tasks",
]

_MOVED = {
    "methods": "Method ewc finetune l2 local_mas mas rwalk si",
    "losses": "cross_entropy",
    "metrics": "average_accuracy average_incremental_accuracy backward_transfer forgetting forgetting_ratio "
    "forgetting_since_learned forward_transfer intransigence",
    "scenarios": "active_classes joint_examples mask_logits mask_outputs with_class_mask",
    "sweep": "SweepAccuracies",
    "training": "TrainingInfo",
}
_NEW_NAMES = {name: f"{module}.{name}" for module, names in _MOVED.items() for name in names.split()} | {
    "LearnedSequence": "continual.SequenceState",
    "present": "tasks.permute_features",
}


def __getattr__(name: str) -> Any:
    """Returns what a name of version 0.1 is called now, with a warning; will be removed in version 0.3."""
    if name not in _NEW_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _NEW_NAMES[name]
    warnings.warn(f"lifelong_jax.{name} is now lifelong_jax.{new}.", DeprecationWarning, stacklevel=2)
    module, attribute = new.split(".")
    return getattr(importlib.import_module(f"lifelong_jax.{module}"), attribute)
