"""What the penalties' optax transforms share: arguments and their checks, protected leaves, schedules."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks, forms
from lifelong_jax._numerics import wide_dtype
from lifelong_jax.compression import CompressedDiagonal, decompress
from lifelong_jax.forms import Form
from lifelong_jax.types import Consolidation, Params


class ScheduleState(NamedTuple):
    """The state of a penalty whose hyperparameters are schedules, or that is not applied in every step.

    Attributes:
      count: the number of steps so far, an int32 scalar.
    """

    count: jax.Array  # type: ignore[assignment]  # the name of optax's own counters


def transform(
    init_fn: optax.TransformInitFn, update_fn: Callable[..., tuple[optax.Updates, optax.OptState]]
) -> optax.GradientTransformationExtraArgs:
    """Makes an optax transform of `update_fn(updates, state, params, consolidation)`, with its arguments checked."""

    def checked_update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        *,
        anchor: Params | None = None,
        importance: Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        consolidation = _unmasked(Consolidation(anchor, importance))
        _check_arguments(updates, params, consolidation)
        return update_fn(updates, state, params, consolidation)

    return optax.GradientTransformationExtraArgs(init_fn, checked_update_fn)


def map_protected(
    function: Callable[..., jax.Array],
    tree: Params,
    consolidation: Consolidation,
    *others: Params,
    otherwise: Callable[[Params], Params] = lambda branch: branch,
) -> Params:
    """Maps `function(leaf, anchor, importance, *others)`, in float32 or wider, over the protected leaves."""

    def of_leaf(importance: Form | None, anchor: Params, leaf: Params, *others: Params) -> Params:
        if importance is None:
            return otherwise(leaf)
        arguments = (leaf, anchor, _decompress_in_step(importance, leaf), *others)
        dtype = wide_dtype(*jax.tree.leaves(arguments[:3]))
        return function(*jax.tree.map(lambda array: jnp.asarray(array, dtype), arguments))

    # The importance comes first: where it is None, the others may have any branch.
    anchor, importance = consolidation
    return jax.tree.map(of_leaf, importance, anchor, tree, *others, is_leaf=is_form_or_none)


def _decompress_in_step(form: Form, leaf: jax.Array) -> Form:
    """Computes what codes stand for, with a barrier that keeps XLA from doing so once for all steps of a loop.

    It would then hold all of it. The test of the memory of a step says when XLA no longer does.
    """
    if not isinstance(form, CompressedDiagonal):
        return form
    codes, _ = jax.lax.optimization_barrier((form.codes, jax.lax.stop_gradient(leaf)))
    return decompress(dataclasses.replace(form, codes=codes))


def is_form_or_none(node: object) -> bool:
    return node is None or forms.is_form(node)


def now(hyperparameter: optax.ScalarOrSchedule | Params, state: optax.OptState) -> float | jax.Array | Params:
    return hyperparameter(state.count) if callable(hyperparameter) else hyperparameter


def init_schedules(
    *hyperparameters: optax.ScalarOrSchedule | Params, counted: bool = False
) -> ScheduleState | optax.EmptyState:
    # No counter if it is not needed, because users look up their optimiser's counter by its name.
    counted = counted or any(map(callable, hyperparameters))
    return ScheduleState(jnp.zeros((), jnp.int32)) if counted else optax.EmptyState()


def advance(state: ScheduleState | optax.EmptyState) -> ScheduleState | optax.EmptyState:
    return ScheduleState(optax.safe_increment(state.count)) if isinstance(state, ScheduleState) else state


def check_hyperparameter(name: str, value: optax.ScalarOrSchedule) -> None:
    if not callable(value):
        _checks.check_not_negative(name, value)


def _unmasked(consolidation: Consolidation) -> Consolidation:
    """Puts None where `optax.masked` masks the anchor: it masks no importance whose forms are no arrays."""

    def is_masked(node: object) -> bool:
        return isinstance(node, optax.MaskedNode)

    def unless_masked(node: Params, kept: Params) -> Params:
        return None if is_masked(node) else kept

    anchor, importance = consolidation
    if not any(map(is_masked, jax.tree.leaves(anchor, is_leaf=is_masked))):
        return consolidation
    masked_or_none = functools.partial(jax.tree.map, is_leaf=lambda node: node is None or is_masked(node))
    return Consolidation(
        masked_or_none(unless_masked, anchor, anchor), masked_or_none(unless_masked, anchor, importance)
    )


def _check_arguments(updates: optax.Updates, params: Params | None, consolidation: Consolidation) -> None:
    if params is None or consolidation.anchor is None or consolidation.importance is None:
        raise ValueError(
            "the penalty needs params, anchor and importance: call optimizer.update(grads, state, params, "
            "**consolidation._asdict()), or hold anchor and importance in the optimiser's state, by hold_consolidation "
            "and set_consolidation of lifelong_jax.penalty. If they were passed, something between drops them, such as "
            "MultiSteps in a chain, optax.contrib.sam or optax.lookahead: docs/guides/penalties.md says what to write."
        )
    try:
        check_trees("updates", updates, consolidation)
        _checks.check_same_structure("importance", consolidation.importance, "params", params, partial=True)
    except ValueError as error:
        nodes = jax.tree.leaves(updates, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
        if any(isinstance(node, optax.MaskedNode) for node in nodes):
            raise ValueError(
                f"{error} The updates are masked: pass mask_compatible_extra_args=True to optax.masked or "
                f"optax.partition."
            ) from None
        raise


def check_trees(name: str, tree: Params, consolidation: Consolidation) -> None:
    anchor, importance = consolidation
    with _checks.for_a_consolidation():
        _checks.check_same_structure("importance", importance, name, tree, partial=True)
    _checks.check_same_structure("anchor", anchor, "importance", importance)
    try:
        protected = jax.tree.map(
            lambda omega, branch: None if omega is None else branch, importance, tree, is_leaf=is_form_or_none
        )
    except ValueError as error:  # branches without leaves differ
        raise ValueError(f"importance and {name} must be trees of one structure: {error}") from error
    for protected_name, branches in ((name, protected), ("anchor", anchor), ("importance", importance)):
        _checks.check_params(protected_name, branches)
