"""Marks where a layer ends, for `local_mas_importance`, and evaluates each layer with its own input held fixed."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from lifelong_jax._jaxprs import JIT, REMAT, bind, constants_of, equations_within, open_jaxpr
from lifelong_jax._numerics import wide_dtype
from lifelong_jax.importance.tapping import trace
from lifelong_jax.types import Example, Params

_LAYER_OUTPUT = "layer_output"


def layer_output(output: jax.Array) -> jax.Array:
    """Marks where a layer ends, for `local_mas_importance`. It is the identity.

        def output_fn(params, x):
            for layer in params[:-1]:
                x = layer_output(jax.nn.relu(x @ layer["w"] + layer["b"]))
            return x @ params[-1]["w"] + params[-1]["b"]

    The last layer ends where the function does, without a mark.

    Args:
      output: the output of any layer but the last, activation included, for one example.

    Returns:
      `output`.

    Example:
      >>> layer_output(jnp.ones(2))
      Array([1., 1.], dtype=float32)
    """
    return checkpoint_name(output, _LAYER_OUTPUT)


def layer_outputs(output_fn: Callable[[Params, Example], jax.Array], params: Params, example: Example) -> jax.Array:
    """Evaluates all layers of a function that marks their ends by `layer_output`, each with its input held fixed.

    Args:
      output_fn: `output_fn(params, example) -> outputs`, an array.
      params: a tree of arrays.
      example: one example.

    Returns:
      All layers' outputs, concatenated into one vector. Gradients do not flow from one layer into the layers before it.

    Raises:
      ValueError: if there are no marks, if a mark is in a loop or a branch or at the end of the function, or if the
        outputs are not one array.
    """
    jaxpr, structure = trace(output_fn, params, example)
    if structure.num_leaves != 1:
        raise ValueError(f"output_fn must return one floating-point array for one example, not {structure}.")
    marked: list[jax.Array] = []
    arguments = [(leaf, True) for leaf in jax.tree.leaves(params)] + [(x, False) for x in jax.tree.leaves(example)]
    ((outputs, learned),) = _evaluate_layers(jaxpr.jaxpr, jaxpr.consts, arguments, marked)
    if not marked:
        raise ValueError(
            "output_fn marks no layer: pass the output of each layer but the last through layer_output. "
            "mas_importance needs no marks: it takes the network as a whole."
        )
    if not learned:
        raise ValueError(
            "output_fn uses no parameters after its last layer_output: mark all layers but the last, which ends with "
            "the function."
        )
    dtype = wide_dtype(*marked, outputs)
    return jnp.concatenate([output.ravel().astype(dtype) for output in (*marked, outputs)])


def _evaluate_layers(
    jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[tuple[Any, bool]], marked: list[jax.Array]
) -> list[tuple[Any, bool]]:
    """Evaluates a jaxpr; each value comes with whether it depends on parameters since the last mark."""
    values = dict(zip(jaxpr.constvars, ((constant, False) for constant in constants), strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Var | Literal) -> tuple[Any, bool]:
        return (variable.val, False) if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        name = equation.primitive.name
        if _is_mark(equation):
            marked.append(inputs[0][0])
            outputs = [(jax.lax.stop_gradient(inputs[0][0]), False)]
        elif not any(map(_is_mark, equations_within(equation))):
            learned = any(depends for _, depends in inputs)
            outputs = [(output, learned) for output in bind(equation, [value for value, _ in inputs])]
        elif name in JIT | REMAT:
            inner = equation.params["jaxpr"]
            outputs = _evaluate_layers(open_jaxpr(inner), constants_of(inner), inputs, marked)
        else:
            raise ValueError(f"layer_output cannot be used inside of a {name}: mark layers outside of it.")
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _is_mark(equation: JaxprEqn) -> bool:
    return equation.primitive.name == "name" and equation.params["name"] == _LAYER_OUTPUT
