"""The anchor and the importance in the optimiser's state, for loops that pass nothing but gradients and parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import _checks, forms
from lifelong_jax._numerics import values_of_variables, widen, with_extra_args
from lifelong_jax._processes import copy_arrays
from lifelong_jax.compression import stored_like, widen_form
from lifelong_jax.types import Consolidation, Params


class HoldConsolidationState(NamedTuple):
    """The state of `hold_consolidation`: twice the size of the parameters, and the wrapped optimiser's state.

    Attributes:
      consolidation: what the wrapped optimiser gets in every step, until `set_consolidation` replaces it.
      inner_state: the wrapped optimiser's state.
    """

    consolidation: Consolidation
    inner_state: optax.OptState


def hold_consolidation(
    optimizer: optax.GradientTransformation, like: Params | Consolidation | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wraps a penalty, or an optimiser that has one, and keeps the anchor and the importance in its state.

        optimizer.update(grads, state, params, **state.consolidation._asdict())

    So the penalty works in loops that call `optimizer.update(grads, state, params)`, and inside of wrappers that pass
    nothing else on. A new state has importance 0: the first task is no special case. After each task,
    `set_consolidation` replaces what is held; nothing is compiled again. Steps leave it as it is. It is saved, restored
    and sharded with the rest of the state, and `optax.tree.get(opt_state, "consolidation")` reads it.

    Args:
      optimizer: one that takes an anchor and an importance: a penalty alone, or a whole pipeline that has penalties.
      like: an importance that has the forms of those to come, if these are not all arrays, and None for what is not
        to be protected. Or a whole consolidation like those to come, if its anchor has other dtypes than the
        parameters, or its trees are not like the parameters, as for `add_reparametrized_penalty`. Its arrays may be
        `jax.ShapeDtypeStruct`s.

    Returns:
      An optimiser that makes the same updates, and passes other extra arguments on.

    Raises:
      TypeError: from `init`, if a leaf of the parameters is not floating-point.
      ValueError: from `init`, if the parameters and `like` differ in structure or shapes; from `update`, if an anchor
        or an importance is passed as well.

    Example:
      >>> import optax
      >>> from lifelong_jax import Consolidation, add_quadratic_penalty
      >>> optimizer = hold_consolidation(optax.chain(add_quadratic_penalty(10.0), optax.sgd(0.1)))
      >>> params = jnp.array(3.0)
      >>> state = optimizer.init(params)
      >>> state = set_consolidation(state, Consolidation(anchor=jnp.array(1.0), importance=jnp.array(0.5)))
      >>> updates, state = optimizer.update(jnp.array(0.0), state, params)
      >>> updates
      Array(-1., dtype=float32)
    """
    optimizer = with_extra_args(optimizer)

    def init_fn(params: Params) -> HoldConsolidationState:
        return HoldConsolidationState(_of_no_task(params, like), optimizer.init(params))

    def update_fn(
        updates: optax.Updates, state: HoldConsolidationState, params: Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, HoldConsolidationState]:
        if not extra_args.keys().isdisjoint(Consolidation._fields):
            raise ValueError(
                "update got an anchor or an importance, but this optimiser holds both in its state, and would ignore "
                "one or the other: leave them out, or leave out hold_consolidation. learn_task and the loops over "
                "sequences pass their own."
            )
        held = state.consolidation._asdict()
        updates, inner_state = optimizer.update(updates, state.inner_state, params, **held, **extra_args)
        return updates, state._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def set_consolidation(opt_state: optax.OptState, consolidation: Consolidation) -> optax.OptState:
    """Replaces the consolidation that an optimiser's state holds, wherever in the state that is.

    Args:
      opt_state: any tree that has the state of a `hold_consolidation` in it, or several.
      consolidation: from `consolidate`, for all parameters. Where `optax.masked` or `optax.partition` masks parameters,
        the state gets what is not masked.

    Returns:
      The state with a copy of the consolidation, which may be donated, in the dtypes, the storage (see `compression`)
      and the shardings of the one before.

    Raises:
      ValueError: if no consolidation is held, or if it differs from `consolidation` in structure, shapes or forms.

    Example:
      >>> import optax
      >>> from lifelong_jax import Consolidation, add_quadratic_penalty
      >>> optimizer = optax.chain(hold_consolidation(add_quadratic_penalty(10.0)), optax.adam(0.1))
      >>> state = set_consolidation(optimizer.init(jnp.zeros(1)), Consolidation(jnp.ones(1), jnp.full(1, 2.0)))
      >>> optax.tree.get(state, "consolidation").importance
      Array([2.], dtype=float32)
    """
    if not any(map(_is_holding, jax.tree.leaves(opt_state, is_leaf=_is_holding))):
        raise ValueError(
            "opt_state holds no consolidation: wrap the optimiser, or the penalty in it, in hold_consolidation(...), "
            "and make the state by the init of the result."
        )

    def replace(node: Any) -> Any:
        return (
            node._replace(consolidation=_in_place_of(node.consolidation, consolidation)) if _is_holding(node) else node
        )

    return jax.tree.map(replace, opt_state, is_leaf=_is_holding)


def _is_holding(node: Any) -> bool:
    return isinstance(node, HoldConsolidationState)


def _of_no_task(params: Params, like: Params | Consolidation | None) -> Consolidation:
    """Does what `init_consolidation` does, for parameters that may be masked, and with None in `like`."""
    _checks.check_params("params", params)
    if isinstance(like, Consolidation):  # the anchor may be any while the importance is 0
        whole = Consolidation(*map(values_of_variables, like))
        masked = Consolidation(*(_masked_as(params, tree) for tree in whole))
        return forms.tree_map(forms.zeros_like, masked if _is_of(params, masked.importance) else whole)
    if like is None:
        anchor = jax.tree.map(widen, params)
        importance = jax.tree.map(jnp.zeros_like, anchor)
    else:
        like = _masked_as(params, values_of_variables(like))
        _checks.check_same_structure("like", like, "params", values_of_variables(params), partial=True)
        importance = forms.tree_map(lambda form: widen_form(forms.zeros_like(form)), like)
        anchor = jax.tree.map(
            lambda form, branch: None if form is None else jax.tree.map(widen, branch),
            like,
            params,
            is_leaf=lambda node: node is None or forms.is_form(node),
        )
    # A copy: a training step that donates parameters and state must not donate one buffer twice.
    return Consolidation(copy_arrays(anchor), importance)


def _is_of(params: Params, importance: Params) -> bool:
    """Returns whether an importance is one of the parameters, rather than of weights that are a function of them."""
    try:
        _checks.check_same_structure("like", importance, "params", values_of_variables(params), partial=True)
    except ValueError:
        return False
    return True


def _in_place_of(held: Consolidation, consolidation: Consolidation) -> Consolidation:
    """Makes a copy of a consolidation that has the structure, the dtypes and the shardings of the one that is held."""
    anchor, importance = (_masked_as(held.anchor, values_of_variables(tree)) for tree in consolidation)
    try:
        _checks.check_same_structure("consolidation.anchor", anchor, "the anchor in opt_state", held.anchor)
        _checks.check_same_forms("consolidation.importance", importance, "the importance in opt_state", held.importance)
    except ValueError as error:
        raise ValueError(
            f"{error} The state holds what fits the parameters of its init, and hold_consolidation(optimizer, "
            f"like=importance) for Kronecker factors and for None."
        ) from None

    importance = forms.tree_map(stored_like, importance, held.importance)

    def place(new: jax.Array, old: jax.Array) -> jax.Array:
        sharding = old.sharding if _checks.is_concrete(old) and getattr(old, "committed", False) else None
        return jax.device_put(jnp.asarray(new, old.dtype), sharding, may_alias=False)

    return jax.tree.map(place, Consolidation(anchor, importance), held)


def _masked_as(reference: Params, tree: Params) -> Params:
    """Puts masks into a tree where `optax.masked` has put them into a reference."""
    nodes = jax.tree.leaves_with_path(reference, is_leaf=_is_masked)
    masked = {path for path, node in nodes if _is_masked(node)}
    return jax.tree.map_with_path(
        lambda path, node: optax.MaskedNode() if path in masked else node,
        tree,
        is_leaf=lambda path, node: path in masked,
        is_leaf_takes_path=True,
    )


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
