"""The quadratic penalty on weights that are a function of the parameters: LoRA, DoRA, any reparametrisation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Jaxpr

from lifelong_jax import _checks, forms
from lifelong_jax._jaxprs import inline_jits, only_output
from lifelong_jax._numerics import wait_for, widen
from lifelong_jax.forms import Form
from lifelong_jax.penalty._transforms import (
    advance,
    check_hyperparameter,
    check_trees,
    init_schedules,
    is_form_or_none,
    map_protected,
    now,
)
from lifelong_jax.types import Consolidation, Params


def add_reparametrized_penalty(
    weights_fn: Callable[[Params], Params], strength: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of a quadratic penalty on `weights_fn(params)` to the updates.

        penalty(params) = strength / 2 · Σ_i importance_i · (weights_fn(params)_i − anchor_i)²
        updates ← updates + ∂penalty / ∂params

    It is for parameters that are trained in the place of the weights whose importance is known. With LoRA, the adapters
    A and B are trained, and the importance Ω is that of the base model's weights W₀. The penalty on W₀ + s A B is
    strength / 2 · Σ Ω · (s A B)². No importance of A and of B, leaf by leaf, can say that. The base model's importance
    protects the pretrained model. An importance of the adapters does not: where B = 0, as adapters start, that of A is
    exactly 0. An importance of adapters is for a later task, to protect what the adapters have learned; for it, take
    `add_quadratic_penalty`.

    `weights_fn` may return one of two things:

    - the weights, such as W₀ + s A B. The anchor is then a tree like them, W₀;
    - how far the weights are from the anchor, such as s A B alone. The anchor is then None:
      `Consolidation(None, importance)`. W₀ is not needed, and no rounding of W₀ + s A B to bfloat16 takes a small
      change away.

    The gradient is computed for one leaf of the weights after the other. The function is traced once, and each leaf's
    part of it is evaluated and differentiated on its own. So one leaf's change is in memory at a time, not the changes
    of all layers. What several leaves share is computed for each of them. A leaf that stacks layers, `[layers, in,
    out]`, counts as one, and so do all that one `jax.lax.scan` or `jax.checkpoint` makes: docs/guides/lora.md has a
    loop over layers.

    Its place in a chain does what that of `add_quadratic_penalty` does; before `optax.adam`, the sum is the gradient of
    loss + penalty. As a term of the loss, the same penalty is `quadratic_penalty(weights_fn(params), consolidation,
    strength)`; its gradient may hold the changes of all leaves at once. There is no proximal form: the minimum over A
    and B of a quadratic in their product has no closed form.

    Args:
      weights_fn: `weights_fn(params) -> weights`, differentiable and pure: it is traced within `update`. Arrays that it
        closes over are constants of a compiled step. To have a large base model as an argument, make the optimiser
        within the step.
      strength: λ, not negative: a number, known or traced, or an `optax.Schedule`.

    Returns:
      A transform whose `update` takes `anchor`, a tree like the weights, or None for 0; and `importance`, a tree like
      the weights, with None for what is not protected. It computes in float32 or wider, except for `weights_fn`, and
      returns updates in their own dtypes.

    Raises:
      ValueError: if `strength` is negative or not finite; from `update`, if `params` or `importance` is missing, or if
        the trees differ in structure or shapes.

    Example:
      >>> import optax
      >>> from lifelong_jax import Consolidation
      >>> def change_fn(adapters):  # of one weight, 2 · 1: the product of a column and a row
      ...     return adapters["a"] @ adapters["b"]
      >>> optimizer = optax.chain(add_reparametrized_penalty(change_fn, 10.0), optax.sgd(1.0))
      >>> adapters = {"a": jnp.ones((2, 1)), "b": jnp.full((1, 1), 3.0)}
      >>> consolidation = Consolidation(anchor=None, importance=jnp.array([[1.0], [0.0]]))
      >>> state = optimizer.init(adapters)
      >>> grads = jax.tree.map(jnp.zeros_like, adapters)
      >>> updates, state = optimizer.update(grads, state, adapters, **consolidation._asdict())
      >>> updates["b"]
      Array([[-30.]], dtype=float32)

    Hu et al. 2022, arXiv 2106.09685, on LoRA; Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114, eq. 3.
    """
    check_hyperparameter("strength", strength)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        *,
        anchor: Params | None = None,
        importance: Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if params is None or importance is None:
            raise ValueError(
                "the penalty needs params and importance, and an anchor unless weights_fn returns the change from it: "
                "call optimizer.update(grads, state, params, **consolidation._asdict()), or hold both in the "
                "optimiser's state, by hold_consolidation(optimizer, like=consolidation) and set_consolidation of "
                "lifelong_jax.penalty."
            )
        _checks.check_same_structure("updates", updates, "params", params)
        _checks.check_params("params", params)
        total = _add_gradient(updates, weights_fn, params, Consolidation(anchor, importance), now(strength, state))
        return optax.tree.cast_like(total, updates), advance(state)

    return optax.GradientTransformationExtraArgs(lambda params: init_schedules(strength), update_fn)


def _add_gradient(
    updates: optax.Updates,
    weights_fn: Callable[[Params], Params],
    params: Params,
    consolidation: Consolidation,
    strength: float | jax.Array,
) -> optax.Updates:
    traced, weights, inputs, num_constants = _trace(weights_fn, params)
    totals = dict(enumerate(map(widen, jax.tree.leaves(updates)), num_constants))
    gradients: dict[int, jax.Array] = {}  # of the weight before, by the number of the parameter
    for index, of_weight in _protected(weights, consolidation):
        part, used = only_output(traced, index)
        changed = [position for position in used if position >= num_constants]
        if not changed:
            continue
        chosen, gradients = wait_for({position: inputs[position] for position in changed}, gradients)
        totals = _add(totals, gradients)

        def weight_fn(chosen: dict[int, jax.Array], part: Jaxpr = part, used: list[int] = used) -> jax.Array:
            arguments = (chosen.get(position, inputs[position]) for position in used)
            return jax.core.eval_jaxpr(part, (), *arguments)[0]

        weight, pull_back = jax.vjp(weight_fn, chosen)
        (gradients,) = pull_back(_penalty_gradient(weight, of_weight, strength))
    return jax.tree.unflatten(jax.tree.structure(updates), _add(totals, gradients).values())


def _trace(weights_fn: Callable[[Params], Params], params: Params) -> tuple[Jaxpr, Params, list[jax.Array], int]:
    """Returns the weights as a jaxpr and in shapes, its constants and arguments, and the number of constants."""
    leaves, structure = jax.tree.flatten(params)
    of_leaves = lambda *leaves: weights_fn(jax.tree.unflatten(structure, leaves))  # noqa: E731
    traced, weights = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
    flat = jax.make_jaxpr(lambda *leaves: inline_jits(traced.jaxpr, traced.consts, *leaves))(*leaves)
    return flat.jaxpr, weights, [*flat.consts, *leaves], len(flat.consts)


def _protected(weights: Params, consolidation: Consolidation) -> list[tuple[int, Consolidation]]:
    """Returns the number of each protected leaf of the weights, with its anchor and its importance."""
    anchor, importance = consolidation
    check_trees("weights_fn(params)", weights, consolidation._replace(anchor=importance if anchor is None else anchor))
    if anchor is None:
        anchor = jax.tree.map(lambda form: None if form is None else jnp.zeros(()), importance, is_leaf=is_form_or_none)
    numbers = jax.tree.unflatten(jax.tree.structure(weights), range(len(jax.tree.leaves(weights))))
    protected = []

    def add(importance: Form | None, anchor: jax.Array, number: int) -> None:
        if importance is not None:
            protected.append((number, Consolidation(anchor, importance)))

    jax.tree.map(add, importance, anchor, numbers, is_leaf=is_form_or_none)
    return protected


def _penalty_gradient(weight: jax.Array, of_weight: Consolidation, strength: float | jax.Array) -> jax.Array:
    def of_leaf(weight: jax.Array, anchor: jax.Array, importance: Form) -> jax.Array:
        return forms.times(forms.scale(importance, strength), weight - anchor)

    return map_protected(of_leaf, weight, of_weight).astype(weight.dtype)


def _add(totals: dict[int, jax.Array], gradients: dict[int, jax.Array]) -> dict[int, jax.Array]:
    return totals | {number: totals[number] + grad.astype(totals[number].dtype) for number, grad in gradients.items()}
