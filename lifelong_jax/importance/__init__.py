"""Importances, how much each parameter matters: computed after a task, or gathered while it is learned."""

from lifelong_jax.importance.accumulation import Accumulation, init_accumulation
from lifelong_jax.importance.adam import importance_from_adam
from lifelong_jax.importance.estimators import (
    empirical_fisher_diagonal,
    fisher_diagonal,
    local_mas_importance,
    mas_importance,
)
from lifelong_jax.importance.kronecker import empirical_kronecker_fisher, kronecker_fisher, make_forms
from lifelong_jax.importance.layers import layer_output
from lifelong_jax.importance.normalization import normalize_importance
from lifelong_jax.importance.path_integral import path_integral, si_importance
from lifelong_jax.importance.plan import explain
from lifelong_jax.importance.riemannian_walk import continue_walk, riemannian_walk, rwalk_importance

__all__ = [
    "Accumulation",
    "continue_walk",
    "empirical_fisher_diagonal",
    "empirical_kronecker_fisher",
    "explain",
    "fisher_diagonal",
    "importance_from_adam",
    "init_accumulation",
    "kronecker_fisher",
    "layer_output",
    "local_mas_importance",
    "make_forms",
    "mas_importance",
    "normalize_importance",
    "path_integral",
    "riemannian_walk",
    "rwalk_importance",
    "si_importance",
]
