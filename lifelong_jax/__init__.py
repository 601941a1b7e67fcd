"""Continual learning in JAX: exact parameter importances (EWC, MAS), and a quadratic penalty for any optax pipeline."""

from lifelong_jax.consolidation import consolidate, init_consolidation, merge, normalize_importance
from lifelong_jax.continual import LearnedSequence, Progress, evaluate, learn_jointly, learn_tasks
from lifelong_jax.importance import empirical_fisher_diagonal, fisher_diagonal, mas_importance
from lifelong_jax.methods import Method, ewc, finetune, l2, mas
from lifelong_jax.metrics import average_accuracy, backward_transfer, forgetting
from lifelong_jax.penalty import (
    add_quadratic_penalty,
    proximal_adam,
    proximal_quadratic_penalty,
    quadratic_penalty,
)
from lifelong_jax.structured import explain
from lifelong_jax.tasks import joint_examples, permuted_tasks, present
from lifelong_jax.training import TrainingInfo, TrainingState, init_training, learn_task
from lifelong_jax.types import Batch, Consolidation, Task

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Consolidation",
    "LearnedSequence",
    "Method",
    "Progress",
    "Task",
    "TrainingInfo",
    "TrainingState",
    "add_quadratic_penalty",
    "average_accuracy",
    "backward_transfer",
    "consolidate",
    "empirical_fisher_diagonal",
    "evaluate",
    "ewc",
    "explain",
    "finetune",
    "fisher_diagonal",
    "forgetting",
    "init_consolidation",
    "init_training",
    "joint_examples",
    "l2",
    "learn_jointly",
    "learn_task",
    "learn_tasks",
    "mas",
    "mas_importance",
    "merge",
    "normalize_importance",
    "permuted_tasks",
    "present",
    "proximal_adam",
    "proximal_quadratic_penalty",
    "quadratic_penalty",
]
