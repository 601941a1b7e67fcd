"""Finds where a function uses each parameter, and reads what passes by there: the walk through jaxprs.

A *use* is the one equation to which a parameter leaf is an operand, seen through equations that only move entries about
(casts, reshapes, transposes) and through calls (`jit`, `remat`, the body of a `scan`).
A leaf with such a use is *tapped*: `evaluate` adds a given array of zeros to the equation's output, so that
differentiating by the zeros gives the cotangent there, and hands out the equation's other operand. A product of those
two is the leaf's gradient; which product, `factors.py` says.

A function may also mark where its layers end, `layer_output`; `layer_outputs` evaluates each layer by itself.

A jaxpr may be shared by several call sites, so a use is named by its path of equation numbers and never by a variable.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params

from lifelong_jax.types import Example, Params

_LAYER_OUTPUT = "layer_output"
_JIT = frozenset({"jit", "pjit", "closed_call"})
_REMAT = frozenset({"remat2", "remat", "checkpoint"})
_CASTS = frozenset({"convert_element_type", "copy", "name"})
_MOVES = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "rev"})


@dataclasses.dataclass(frozen=True)
class Use:
    """The one equation that a leaf is an operand of.

    Attributes:
      site: the path to the equation: its number in the outermost jaxpr, then in the jaxpr that that equation calls, ...
      equation: the equation itself.
      position: which of the equation's operands the leaf is.
      lengths: the lengths of the scans around the equation, outermost first.
      stacked: for each of them, whether the leaf has an axis of that length, an entry for each step (a stack of
        layers); else every step uses the same entries (a recurrent network).
      move: maps the leaf to that operand, with the axes of stacked scans in front. It is linear and permutes entries;
        casts are left out.
    """

    site: tuple[int, ...]
    equation: JaxprEqn
    position: int
    lengths: tuple[int, ...]
    stacked: tuple[bool, ...]
    move: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Unused:
    """The leaf is an operand of no equation."""


@dataclasses.dataclass(frozen=True)
class Opaque:
    """The leaf has no single use, for the reason given."""

    reason: str


@dataclasses.dataclass(frozen=True)
class _Returned:
    """The leaf, moved, is one output of the jaxpr, and nothing else uses it."""

    output: int
    move: Callable[[jax.Array], jax.Array]


def trace(output_fn: Callable[[Params, Example], Any], params: Params, example: Example) -> tuple[ClosedJaxpr, Any]:
    """Traces a function of one example.

    Args:
      output_fn: `output_fn(params, example) -> outputs`.
      params: a tree of arrays, or of shapes and dtypes.
      example: the same for one example.

    Returns:
      The jaxpr, whose arguments are the leaves of `params` and then those of `example`, and the outputs' structure.
    """
    jaxpr, outputs = jax.make_jaxpr(output_fn, return_shape=True)(params, example)
    return jaxpr, jax.tree.structure(outputs)


def find_use(jaxpr: Jaxpr, argument: int) -> Use | Unused | Opaque:
    """Finds the one equation that an argument of a jaxpr is an operand of.

    Args:
      jaxpr: a jaxpr.
      argument: the number of one of its arguments.

    Returns:
      The use; or that there is none; or why there is no single one.
    """
    found = _follow(jaxpr, jaxpr.invars[argument], lambda leaf: leaf, (), (), ())
    return Opaque("it is an output itself") if isinstance(found, _Returned) else found


def _follow(
    jaxpr: Jaxpr,
    variable: Var,
    move: Callable[[jax.Array], jax.Array],
    site: tuple[int, ...],
    lengths: tuple[int, ...],
    stacked: tuple[bool, ...],
) -> Use | Unused | Opaque | _Returned:
    operands = [(number, p) for number, e in enumerate(jaxpr.eqns) for p, v in enumerate(e.invars) if v is variable]
    outputs = [number for number, v in enumerate(jaxpr.outvars) if v is variable]
    count = len(operands) + len(outputs)
    if count == 0:
        return Unused()
    if count > 1:
        names = ", ".join([jaxpr.eqns[number].primitive.name for number, _ in operands] + ["output"] * len(outputs))
        return Opaque(f"used {count} times ({names})")
    if outputs:
        return _Returned(outputs[0], move)

    ((number, position),) = operands
    equation = jaxpr.eqns[number]
    name = equation.primitive.name
    here = (*site, number)
    if name in _JIT | _REMAT:
        inner = _open(equation.params["jaxpr"])
        found = _follow(inner, inner.invars[position], move, here, lengths, stacked)
        if isinstance(found, _Returned):
            return _follow(jaxpr, equation.outvars[found.output], found.move, site, lengths, stacked)
        return found
    if name == "scan":
        first, carried = _constants_and_carry(equation)
        if first <= position < first + carried:
            return Opaque("carried by a scan")
        inner, length = _open(equation.params["jaxpr"]), equation.params["length"]
        stacked = (*stacked, position >= first)
        found = _follow(inner, inner.invars[position], move, here, (*lengths, length), stacked)
        return Opaque("handed through by a scan") if isinstance(found, _Returned) else found
    if _only_moves(equation):
        if name not in _CASTS:
            move = _then(move, nested_vmap(_bound(equation), sum(stacked)))
        return _follow(jaxpr, equation.outvars[0], move, site, lengths, stacked)
    return Use(here, equation, position, lengths, stacked, move)


def evaluate(
    jaxpr: Jaxpr,
    constants: Sequence[Any],
    arguments: Sequence[Any],
    uses: dict[int, Use],
    zeros: dict[int, jax.Array],
    level: int = 0,
) -> tuple[list[Any], dict[int, jax.Array]]:
    """Evaluates a jaxpr with zeros added to the output of each use, and hands out the other operands.

    Args:
      jaxpr: a jaxpr.
      constants: the values of its constants.
      arguments: the values of its arguments.
      uses: what to tap, by any number.
      zeros: by the same numbers, `[*lengths, *shape of the equation's output]`.
      level: how many calls around `jaxpr` the uses' paths begin with.

    Returns:
      The outputs, and by the same numbers the operands, `[*lengths, *shape]`.
    """
    values: dict[Var, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))
    operands: dict[int, jax.Array] = {}

    def read(variable: Var | Literal) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for number, equation in enumerate(jaxpr.eqns):
        inputs = [read(variable) for variable in equation.invars]
        here = {tap: use for tap, use in uses.items() if use.site[level] == number}
        if not here and equation.primitive.name not in _JIT:
            outputs = _bind(equation, inputs)
        elif here and all(len(use.site) == level + 1 for use in here.values()):
            outputs = _bind(equation, inputs)
            for tap, use in here.items():
                outputs = [outputs[0] + zeros[tap]]
                operands[tap] = inputs[1 - use.position]
        else:
            outputs, found = _evaluate_call(equation, inputs, here, {tap: zeros[tap] for tap in here}, level + 1)
            operands.update(found)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars], operands


def _evaluate_call(
    equation: JaxprEqn, inputs: list[Any], uses: dict[int, Use], zeros: dict[int, jax.Array], level: int
) -> tuple[list[Any], dict[int, jax.Array]]:
    parameters = equation.params
    inner = _open(parameters["jaxpr"])
    constants = parameters["jaxpr"].consts if isinstance(parameters["jaxpr"], ClosedJaxpr) else ()

    def call(arguments: Sequence[Any], zeros: dict[int, jax.Array]) -> tuple[list[Any], dict[int, jax.Array]]:
        return evaluate(inner, constants, arguments, uses, zeros, level)

    if equation.primitive.name in _JIT:
        return call(inputs, zeros)
    if equation.primitive.name in _REMAT:
        return jax.checkpoint(call, prevent_cse=parameters["prevent_cse"], policy=parameters["policy"])(inputs, zeros)

    first, carried = _constants_and_carry(equation)

    def step(carry: list[Any], scanned: tuple[list[Any], dict[int, jax.Array]]) -> tuple[list[Any], tuple]:
        outputs, operands = call([*inputs[:first], *carry, *scanned[0]], scanned[1])
        return outputs[:carried], (outputs[carried:], operands)

    carry, (stacked, operands) = jax.lax.scan(
        step,
        inputs[first : first + carried],
        (inputs[first + carried :], zeros),
        length=parameters["length"],
        reverse=parameters["reverse"],
        unroll=parameters["unroll"],
    )
    return [*carry, *stacked], operands


def _constants_and_carry(scan: JaxprEqn) -> tuple[int, int]:
    """Counts the arguments of a scan that are constants, which come first, and those that are carried."""
    # By their shapes, as the names of a scan's parameters differ between versions of JAX: what is scanned over has an
    # axis more outside of the body than inside.
    body = _open(scan.params["jaxpr"])
    scanned = sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(scan.invars, body.invars, strict=True))
    carried = sum(len(o.aval.shape) == len(i.aval.shape) for o, i in zip(scan.outvars, body.outvars, strict=True))
    return len(scan.invars) - carried - scanned, carried


def layer_output(output: jax.Array) -> jax.Array:
    """Marks where a layer ends, for `local_mas_importance`. It is the identity.

        def output_fn(params, x):
            for layer in params[:-1]:
                x = layer_output(jax.nn.relu(x @ layer["w"] + layer["b"]))
            return x @ params[-1]["w"] + params[-1]["b"]

    The last layer ends with the function.

    Args:
      output: the output of any layer but the last, activation included, for one example.

    Returns:
      The same.

    Example:
      >>> layer_output(jnp.ones(2))
      Array([1., 1.], dtype=float32)
    """
    return checkpoint_name(output, _LAYER_OUTPUT)


def layer_outputs(output_fn: Callable[[Params, Example], jax.Array], params: Params, example: Example) -> jax.Array:
    """Evaluates all layers, whose ends `layer_output` marks, each with its own input held fixed.

    Args:
      output_fn: `output_fn(params, example) -> outputs`, an array.
      params: a tree of arrays.
      example: one example.

    Returns:
      The layers' outputs, one after the other, as one vector. Their gradients by the parameters stop at the marks.

    Raises:
      ValueError: if there are no marks, or one is in a loop or a branch, or at the end, or if the outputs are not one
        array.
    """
    jaxpr, structure = trace(output_fn, params, example)
    if structure.num_leaves != 1:
        raise ValueError(f"output_fn must return one floating-point array for one example, not {structure}.")
    marked: list[jax.Array] = []
    arguments = [(leaf, True) for leaf in jax.tree.leaves(params)] + [(x, False) for x in jax.tree.leaves(example)]
    ((outputs, learned),) = _evaluate_layers(jaxpr.jaxpr, jaxpr.consts, arguments, marked)
    if not marked:
        raise ValueError(
            "output_fn marks no layer: pass the output of each layer but the last through layer_output. For the "
            "network as a whole there is mas_importance."
        )
    if not learned:
        raise ValueError(
            "output_fn returns an output that it has passed through layer_output, or makes no use of parameters after "
            "it: mark all layers but the last, which ends with the function."
        )
    # One by one: NumPy knows no type that bfloat16 and float16 have in common, though float32 is one.
    dtype = functools.reduce(np.promote_types, (output.dtype for output in (*marked, outputs)), np.float32)
    return jnp.concatenate([output.ravel().astype(dtype) for output in (*marked, outputs)])


def _evaluate_layers(
    jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[tuple[Any, bool]], marked: list[jax.Array]
) -> list[tuple[Any, bool]]:
    """Evaluates, with each value, whether it depends on parameters of the layer that it belongs to."""
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
        elif not _has_marks(equation):
            learned = any(of_layer for _, of_layer in inputs)
            outputs = [(output, learned) for output in _bind(equation, [value for value, _ in inputs])]
        elif name in _JIT | _REMAT:
            inner = equation.params["jaxpr"]
            outputs = _evaluate_layers(_open(inner), getattr(inner, "consts", ()), inputs, marked)
        else:
            raise ValueError(f"layer_output cannot be used inside of a {name}: mark layers outside of it.")
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _is_mark(equation: JaxprEqn) -> bool:
    return equation.primitive.name == "name" and equation.params["name"] == _LAYER_OUTPUT


def _has_marks(equation: JaxprEqn) -> bool:
    return _is_mark(equation) or any(
        _has_marks(inner) for jaxpr in jaxprs_in_params(equation.params) for inner in jaxpr.eqns
    )


def nested_vmap(function: Callable, depth: int) -> Callable:
    """Maps a function over `depth` leading axes of all its arguments."""
    for _ in range(depth):
        function = jax.vmap(function)
    return function


def _only_moves(equation: JaxprEqn) -> bool:
    if equation.primitive.name not in _CASTS | _MOVES:
        return False
    source, target = equation.invars[0].aval, equation.outvars[0].aval
    return source.size == target.size and jnp.issubdtype(target.dtype, jnp.floating)


def _bound(equation: JaxprEqn) -> Callable[[jax.Array], jax.Array]:
    return lambda operand: _bind(equation, [operand])[0]


def _bind(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    # As a jaxpr of one equation: how custom derivatives are bound again differs between versions of JAX.
    given = {v: value for v, value in zip(equation.invars, inputs, strict=True) if not isinstance(v, Literal)}
    debug_info = DebugInfo("tapping", equation.primitive.name, ("",) * len(given), ("",) * len(equation.outvars))
    alone = Jaxpr((), tuple(given), equation.outvars, [equation], equation.effects, debug_info)
    return jax.core.eval_jaxpr(alone, (), *given.values())


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _then(first: Callable[[jax.Array], jax.Array], second: Callable[[jax.Array], jax.Array]) -> Callable:
    return lambda leaf: second(first(leaf))
