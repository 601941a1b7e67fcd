"""Jaxprs: which equations call others, how they are evaluated, and how many numbers a program computes."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, jaxprs_in_params

JIT = frozenset({"jit", "pjit", "closed_call"})
REMAT = frozenset({"remat2", "remat", "checkpoint"})


def bind(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates one equation."""
    # As a jaxpr of its own: how to bind an equation with custom derivatives differs between versions of JAX.
    values = {v: value for v, value in zip(equation.invars, inputs, strict=True) if not isinstance(v, Literal)}
    debug_info = DebugInfo("bind", equation.primitive.name, ("",) * len(values), ("",) * len(equation.outvars))
    alone = Jaxpr((), tuple(values), equation.outvars, [equation], equation.effects, debug_info)
    return jax.core.eval_jaxpr(alone, (), *values.values())


def open_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    """Returns the jaxpr without its constants."""
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def constants_of(jaxpr: Jaxpr | ClosedJaxpr) -> Sequence[Any]:
    """Returns the constants of a jaxpr, if it has any."""
    return jaxpr.consts if isinstance(jaxpr, ClosedJaxpr) else ()


def count_constants_and_carry(scan: JaxprEqn) -> tuple[int, int]:
    """Counts the arguments of a scan that are constants, which come first, and those that are carried."""
    # By shape, because the names of a scan's parameters differ between versions of JAX: an argument that is scanned
    # over has one axis more outside of the body than inside.
    body = open_jaxpr(scan.params["jaxpr"])
    scanned = sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(scan.invars, body.invars, strict=True))
    carried = sum(len(o.aval.shape) == len(i.aval.shape) for o, i in zip(scan.outvars, body.outvars, strict=True))
    return len(scan.invars) - carried - scanned, carried


def equations_within(equation: JaxprEqn) -> Iterator[JaxprEqn]:
    """Yields an equation, and those of the jaxprs that it calls."""
    yield equation
    for jaxpr in jaxprs_in_params(equation.params):
        for inner in open_jaxpr(jaxpr).eqns:
            yield from equations_within(inner)


def evaluate_call(
    equation: JaxprEqn, inputs: list[Any], evaluate: Callable[..., tuple[list[Any], Any]], scanned: Any
) -> tuple[list[Any], Any]:
    """Evaluates a `jit`, `remat` or `scan`, with a function in the place of the evaluation of what it calls.

    `evaluate(jaxpr, constants, arguments, scanned) -> (outputs, collected)`. `scanned` is a tree of arrays with an axis
    for each scan around; so is what is collected. Each step of a scan gets and gives its slice.
    """
    name, parameters = equation.primitive.name, equation.params
    inner, constants = open_jaxpr(parameters["jaxpr"]), constants_of(parameters["jaxpr"])

    def call(arguments: Sequence[Any], scanned: Any) -> tuple[list[Any], Any]:
        return evaluate(inner, constants, arguments, scanned)

    if name in JIT:
        return call(inputs, scanned)
    if name in REMAT:
        return jax.checkpoint(call, prevent_cse=parameters["prevent_cse"], policy=parameters["policy"])(inputs, scanned)
    num_constants, num_carried = count_constants_and_carry(equation)
    first_scanned = num_constants + num_carried

    def step(carry: list[Any], of_step: tuple[list[Any], Any]) -> tuple[list[Any], tuple[list[Any], Any]]:
        outputs, collected = call([*inputs[:num_constants], *carry, *of_step[0]], of_step[1])
        return outputs[:num_carried], (outputs[num_carried:], collected)

    carry, (stacked, collected) = jax.lax.scan(
        step,
        inputs[num_constants:first_scanned],
        (inputs[first_scanned:], scanned),
        length=parameters["length"],
        reverse=parameters["reverse"],
        unroll=parameters["unroll"],
    )
    return [*carry, *stacked], collected


def inline_jits(jaxpr: Jaxpr, constants: Sequence[Any], *arguments: Any) -> list[Any]:
    """Evaluates a jaxpr. Traced again, it has no `jit` of several outputs, which `only_output` could not take apart."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        if equation.primitive.name in JIT and len(equation.outvars) > 1:
            inner = equation.params["jaxpr"]
            outputs = inline_jits(open_jaxpr(inner), constants_of(inner), *inputs)
        else:
            outputs = bind(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def only_output(jaxpr: Jaxpr, index: int) -> tuple[Jaxpr, list[int]]:
    """Returns the part of a jaxpr that one output needs, and which of the constants and arguments it takes."""
    output = jaxpr.outvars[index]
    needed, equations = set() if isinstance(output, Literal) else {output}, []
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            needed.update(v for v in equation.invars if not isinstance(v, Literal))
            equations.append(equation)
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    used = [position for position, v in enumerate(inputs) if v in needed]
    debug_info = DebugInfo("only_output", "", ("",) * len(used), ("",))
    effects = frozenset().union(*(equation.effects for equation in equations))
    return Jaxpr((), [inputs[position] for position in used], [output], equations[::-1], effects, debug_info), used


def activation_floats(jaxpr: Jaxpr, is_constant: Sequence[bool]) -> int:
    """Counts the numbers that are computed from an example: at most these are held for the backward pass.

    `is_constant` says of each argument whether it is the same for all examples, such as parameters.
    """
    constants = {v for v, constant in zip(jaxpr.invars, is_constant, strict=True) if constant} | set(jaxpr.constvars)
    floats = 0
    for equation in jaxpr.eqns:
        inputs = [isinstance(v, Literal) or v in constants for v in equation.invars]
        if all(inputs):
            constants.update(equation.outvars)
            continue
        first, num_carry = (equation.params.get(name, 0) for name in ("num_consts", "num_carry"))
        inputs[first : first + num_carry] = [False] * num_carry  # after a scan's first step, they depend on the example
        inner_jaxprs = [open_jaxpr(inner) for inner in jaxprs_in_params(equation.params)]
        for inner in inner_jaxprs:
            of_inner = inputs if len(inputs) == len(inner.invars) else [False] * len(inner.invars)
            floats += equation.params.get("length", 1) * activation_floats(inner, of_inner)
        if not inner_jaxprs:
            floats += sum(math.prod(getattr(v.aval, "shape", ())) for v in equation.outvars)
    return floats
