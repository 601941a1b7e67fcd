"""The walk through a jaxpr: it finds the equation that uses each parameter, and reads that equation's values.

The *use* of a leaf of the parameters is the one equation that has it as an operand. The walk follows a leaf through
equations that only move entries (casts, reshapes, transposes), and into calls (`jit`, `remat`, the body of a `scan`). A
leaf with one use is *tapped*: `evaluate` adds a given array of zeros to the equation's output, and returns the
equation's other operand. The gradient with respect to the zeros is the cotangent at the output. The leaf's gradient is
a product of this cotangent and the other operand; `factors.py` defines which product.

Several call sites may share a jaxpr, so a use is identified by its path of equation numbers, not by a variable.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from lifelong_jax._jaxprs import JIT, REMAT, bind, count_constants_and_carry, evaluate_call, open_jaxpr
from lifelong_jax.types import Example, Params

_CASTS = frozenset({"convert_element_type", "copy", "name"})
_MOVES = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "rev"})


AtUse: TypeAlias = Callable[[int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""`at_use(tap, output, operand, zeros) -> (output, collected)`: what is done where a tap's equation is evaluated."""


@dataclasses.dataclass(frozen=True)
class Use:
    """The one equation that a leaf is an operand of.

    Attributes:
      site: the path to the equation: the number of an equation in the outermost jaxpr, of one in the jaxpr that this
        equation calls, and so on.
      equation: the equation itself.
      position: which of the equation's operands the leaf is.
      lengths: the lengths of the scans around the equation, outermost first.
      stacked: for each of these scans, whether the leaf has a slice for each step (a stack of layers). If not, every
        step uses the same entries (a recurrent network).
      move: maps the leaf to the operand, with the axes of stacked scans in front. It only moves entries; casts are left
        out.
    """

    site: tuple[int, ...]
    equation: JaxprEqn
    position: int
    lengths: tuple[int, ...]
    stacked: tuple[bool, ...]
    move: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Unused:
    """No equation has the leaf as an operand."""


@dataclasses.dataclass(frozen=True)
class Untapped:
    """The leaf cannot be tapped, for the reason given."""

    reason: str


@dataclasses.dataclass(frozen=True)
class _Returned:
    """The leaf's only use is as an output of the jaxpr, after it was moved."""

    output: int
    move: Callable[[jax.Array], jax.Array]


def trace(output_fn: Callable[[Params, Example], Any], params: Params, example: Example) -> tuple[ClosedJaxpr, Any]:
    """Traces a function of one example."""
    jaxpr, outputs = jax.make_jaxpr(output_fn, return_shape=True)(params, example)
    return jaxpr, jax.tree.structure(outputs)


def find_use(jaxpr: Jaxpr, argument: int) -> Use | Unused | Untapped:
    """Finds the one equation that an argument of a jaxpr is an operand of, or why there is no such equation."""
    use = _follow(jaxpr, jaxpr.invars[argument], lambda leaf: leaf, (), (), ())
    return Untapped("it is an output itself") if isinstance(use, _Returned) else use


def _follow(
    jaxpr: Jaxpr,
    variable: Var,
    move: Callable[[jax.Array], jax.Array],
    site: tuple[int, ...],
    lengths: tuple[int, ...],
    stacked: tuple[bool, ...],
) -> Use | Unused | Untapped | _Returned:
    operands = [(number, p) for number, e in enumerate(jaxpr.eqns) for p, v in enumerate(e.invars) if v is variable]
    outputs = [number for number, v in enumerate(jaxpr.outvars) if v is variable]
    count = len(operands) + len(outputs)
    if count == 0:
        return Unused()
    if count > 1:
        return Untapped(f"used {count} times ({', '.join(_names_of_uses(jaxpr, variable))})")
    if outputs:
        return _Returned(outputs[0], move)

    ((number, position),) = operands
    equation = jaxpr.eqns[number]
    name = equation.primitive.name
    path = (*site, number)
    if name in JIT | REMAT:
        inner = open_jaxpr(equation.params["jaxpr"])
        use = _follow(inner, inner.invars[position], move, path, lengths, stacked)
        if isinstance(use, _Returned):
            return _follow(jaxpr, equation.outvars[use.output], use.move, site, lengths, stacked)
        return use
    if name == "scan":
        num_constants, num_carried = count_constants_and_carry(equation)
        if num_constants <= position < num_constants + num_carried:
            return Untapped("carried by a scan")
        inner, length = open_jaxpr(equation.params["jaxpr"]), equation.params["length"]
        stacked = (*stacked, position >= num_constants)
        use = _follow(inner, inner.invars[position], move, path, (*lengths, length), stacked)
        return Untapped("returned by a scan") if isinstance(use, _Returned) else use
    if _only_moves(equation):
        if name not in _CASTS:
            move = _compose(move, nested_vmap(_as_function(equation), sum(stacked)))
        return _follow(jaxpr, equation.outvars[0], move, site, lengths, stacked)
    return Use(path, equation, position, lengths, stacked, move)


_NAMES = {"gather": "look-up", "dot_general": "product", "conv_general_dilated": "convolution"}


def _names_of_uses(jaxpr: Jaxpr, variable: Var) -> list[str]:
    """Names what is done with a variable in the end, also inside of calls and after moves."""
    names = ["output"] * sum(v is variable for v in jaxpr.outvars)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        for position in (number for number, v in enumerate(equation.invars) if v is variable):
            if name in JIT | REMAT | {"scan"}:
                inner = open_jaxpr(equation.params["jaxpr"])
                names += _names_of_uses(inner, inner.invars[position])
            elif _only_moves(equation):
                names += _names_of_uses(jaxpr, equation.outvars[0])
            else:
                names.append(_NAMES.get(name, name))
    return names


def add_zeros(tap: int, output: jax.Array, operand: jax.Array, zeros: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adds zeros to the output of a use, so that the derivative with respect to them is the cotangent there."""
    return output + zeros, operand


def evaluate(
    jaxpr: Jaxpr,
    constants: Sequence[Any],
    arguments: Sequence[Any],
    uses: dict[int, Use],
    zeros: dict[int, jax.Array],
    at_use: AtUse = add_zeros,
    level: int = 0,
) -> tuple[list[Any], dict[int, Any]]:
    """Evaluates a jaxpr with zeros added to the output of each use, and also returns the other operands.

    `zeros` has an array `[*lengths, *shape of the equation's output]` for each use, by its number; so have the returned
    operands. Another `at_use(tap, output, operand, zeros) -> (output, collected)` takes other zeros, and collects
    something else. `level` is the depth of `jaxpr` in calls: how many entries of the uses' paths lead to it.
    """
    values: dict[Var, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))
    operands: dict[int, Any] = {}

    def read(variable: Var | Literal) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for number, equation in enumerate(jaxpr.eqns):
        inputs = [read(variable) for variable in equation.invars]
        taps = {tap: use for tap, use in uses.items() if use.site[level] == number}  # at this equation or inside of it
        if not taps and equation.primitive.name not in JIT:
            outputs = bind(equation, inputs)
        elif taps and all(len(use.site) == level + 1 for use in taps.values()):
            outputs = bind(equation, inputs)
            for tap, use in taps.items():
                output, operands[tap] = at_use(tap, outputs[0], inputs[1 - use.position], zeros[tap])
                outputs = [output]
        else:
            inner_zeros = {tap: zeros[tap] for tap in taps}
            outputs, inner_operands = _evaluate_call(equation, inputs, taps, inner_zeros, at_use, level + 1)
            operands.update(inner_operands)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars], operands


def _evaluate_call(
    equation: JaxprEqn, inputs: list[Any], uses: dict[int, Use], zeros: dict[int, jax.Array], at_use: AtUse, level: int
) -> tuple[list[Any], dict[int, Any]]:
    def evaluate_inner(
        jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any], zeros: dict[int, jax.Array]
    ) -> tuple[list[Any], dict[int, Any]]:
        return evaluate(jaxpr, constants, arguments, uses, zeros, at_use, level)

    return evaluate_call(equation, inputs, evaluate_inner, zeros)


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


def _as_function(equation: JaxprEqn) -> Callable[[jax.Array], jax.Array]:
    return lambda operand: bind(equation, [operand])[0]


def _compose(first: Callable[[jax.Array], jax.Array], second: Callable[[jax.Array], jax.Array]) -> Callable:
    return lambda leaf: second(first(leaf))
