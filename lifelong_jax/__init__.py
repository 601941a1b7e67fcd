"""Continual learning in JAX: exact parameter importances (EWC, MAS), and a quadratic penalty for any optax pipeline."""

from lifelong_jax.consolidation import consolidate, init_consolidation, merge, normalize_importance
from lifelong_jax.continual import Checkpoints, LearnedSequence, Progress, learn_jointly, learn_tasks
from lifelong_jax.evaluation import evaluate
from lifelong_jax.importance import empirical_fisher_diagonal, fisher_diagonal, local_mas_importance, mas_importance
from lifelong_jax.methods import Method, cross_entropy, ewc, finetune, l2, local_mas, mas, rwalk, si
from lifelong_jax.metrics import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forgetting_ratio,
    forgetting_since_learned,
    forward_transfer,
    intransigence,
)
from lifelong_jax.path_integral import path_integral, si_importance
from lifelong_jax.penalty import (
    add_quadratic_penalty,
    proximal_adam,
    proximal_quadratic_penalty,
    quadratic_penalty,
)
from lifelong_jax.riemannian_walk import continue_walk, riemannian_walk, rwalk_importance
from lifelong_jax.structured import explain
from lifelong_jax.sweep import SweepAccuracies, SweepRun, learn_sweep
from lifelong_jax.tapping import layer_output
from lifelong_jax.tasks import (
    active_classes,
    dataset_tasks,
    joint_examples,
    mask_logits,
    mask_outputs,
    permuted_tasks,
    present,
    rotated_tasks,
    split_tasks,
    with_class_mask,
)
from lifelong_jax.training import TrainingInfo, TrainingState, init_training, learn_task
from lifelong_jax.types import Batch, Consolidation, Task

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Checkpoints",
    "Consolidation",
    "LearnedSequence",
    "Method",
    "Progress",
    "SweepAccuracies",
    "SweepRun",
    "Task",
    "TrainingInfo",
    "TrainingState",
    "active_classes",
    "add_quadratic_penalty",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "consolidate",
    "continue_walk",
    "cross_entropy",
    "dataset_tasks",
    "empirical_fisher_diagonal",
    "evaluate",
    "ewc",
    "explain",
    "finetune",
    "fisher_diagonal",
    "forgetting",
    "forgetting_ratio",
    "forgetting_since_learned",
    "forward_transfer",
    "init_consolidation",
    "init_training",
    "intransigence",
    "joint_examples",
    "l2",
    "layer_output",
    "learn_jointly",
    "learn_sweep",
    "learn_task",
    "learn_tasks",
    "local_mas",
    "local_mas_importance",
    "mas",
    "mas_importance",
    "mask_logits",
    "mask_outputs",
    "merge",
    "normalize_importance",
    "path_integral",
    "permuted_tasks",
    "present",
    "proximal_adam",
    "proximal_quadratic_penalty",
    "quadratic_penalty",
    "riemannian_walk",
    "rotated_tasks",
    "rwalk",
    "rwalk_importance",
    "si",
    "si_importance",
    "split_tasks",
    "with_class_mask",
]
