"""Means over a batch inside of a network, as batch normalisation takes them, with a weight for each example.

A network sees one example. It takes a mean over the batch by `jax.lax.pmean(x, "batch")`, as the batch normalisation of
flax, equinox and haiku does if it is given this axis name. Padding must not count in such a mean, but `pmean` has no
weights. So the network is traced, and each of its sums over the batch is replaced by a weighted one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from lifelong_jax._jaxprs import JIT, REMAT, bind, equations_within, evaluate_call

BATCH_AXIS = "batch"
_UNCHANGED_BY_REPEATS = frozenset({"pmax", "pmin", "axis_index"})  # in place of padding stands one of the examples


def weigh_means(function: Callable[..., Any], weight: jax.Array, *arguments: Any) -> Any:
    """Calls a function of one example, whose means over the batch become means weighted by `weight`.

        jax.lax.pmean(x, "batch")  =  Σ_n weight[n] · x[n] / Σ_n weight[n]

    It is called under `jax.vmap(..., axis_name="batch")`.
    """
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    if not any(_is_over_batch(inner) for equation in jaxpr.eqns for inner in equations_within(equation)):
        return function(*arguments)
    size = jax.lax.axis_size(BATCH_AXIS)
    share = weight / jax.lax.psum(weight, BATCH_AXIS) * size  # what 1 stands for in a mean without weights
    outputs = _evaluate(jaxpr.jaxpr, jaxpr.consts, jax.tree.leaves(arguments), share)
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def _is_over_batch(equation: JaxprEqn) -> bool:
    axes = equation.params.get("axes", equation.params.get("axis_name", ()))
    return BATCH_AXIS in (axes if isinstance(axes, tuple) else (axes,))


def _evaluate(jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any], share: jax.Array) -> list[Any]:
    values: dict[Var, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(variable: Var | Literal) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        if _is_over_batch(equation):
            outputs = _weigh(equation, inputs, share)
        elif any(map(_is_over_batch, equations_within(equation))):
            outputs = _evaluate_call(equation, inputs, share)
        else:
            outputs = bind(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _weigh(equation: JaxprEqn, inputs: list[Any], share: jax.Array) -> list[Any]:
    name = equation.primitive.name
    if name in _UNCHANGED_BY_REPEATS:
        return bind(equation, inputs)
    if not name.startswith("psum"):
        raise ValueError(
            f"the network uses {name} over the axis {BATCH_AXIS!r}, which padding would enter: use jax.lax.pmean, pmax "
            f"or pmin."
        )
    return bind(equation, [x * share.astype(x.dtype) for x in inputs])


def _evaluate_call(equation: JaxprEqn, inputs: list[Any], share: jax.Array) -> list[Any]:
    name = equation.primitive.name
    if name not in JIT | REMAT | {"scan"}:
        raise ValueError(
            f"the network takes a mean over the axis {BATCH_AXIS!r} inside of {name}, where it cannot be weighted: "
            f"take it outside."
        )

    def evaluate(jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any], scanned: None) -> tuple[list, None]:
        return _evaluate(jaxpr, constants, arguments, share), None

    outputs, _ = evaluate_call(equation, inputs, evaluate, None)
    return outputs
