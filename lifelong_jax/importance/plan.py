"""The plan for one function: the rule for each leaf of its parameters, and the number of examples computed together.

A leaf with a single use that `factors.py` supports is tapped; any other leaf is differentiated per example. `explain`
prints the plan as a table.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from lifelong_jax._jaxprs import activation_floats
from lifelong_jax._tables import markdown_table
from lifelong_jax.importance import tapping
from lifelong_jax.importance.cotangents import Cotangents, squared_l2
from lifelong_jax.importance.factors import Lookup, Product, find_factors
from lifelong_jax.importance.microbatches import CotangentsFn
from lifelong_jax.platforms import is_for_cpu
from lifelong_jax.types import Example, Params


class Tap(NamedTuple):
    """A leaf whose gradient is a product of two factors.

    Attributes:
      use: the equation that uses the leaf.
      factors: the product, in one step of the scans around the equation.
      groups: the number of independent products in all scan steps; the steps over stacked layers are groups too.
      positions: the number of terms that a gradient sums in all scan steps; steps that share one weight are positions
        too.
    """

    use: tapping.Use
    factors: Product | Lookup
    groups: int
    positions: int


LeafPlan: TypeAlias = Tap | tapping.Unused | tapping.Untapped
"""How the gradient of one leaf is computed: as a product of factors, not at all, or per example."""


class Plan(NamedTuple):
    """How the gradients of one example are computed.

    Attributes:
      jaxpr: the jaxpr of the function of one example.
      outputs: the structure of its outputs.
      leaf_plans: how each leaf's gradient is computed.
    """

    jaxpr: ClosedJaxpr
    outputs: Any
    leaf_plans: tuple[LeafPlan, ...]


def takes_gradient_of_one(tap: Tap) -> bool:
    """Returns whether a leaf's own gradient is as good as its factors, where one example is computed at a time.

    One example's gradient is made in full either way, if it sums positions. As XLA's backward pass makes it, neither
    factor is held until the end, and `jax.checkpoint` saves what it is meant to save. If steps of a scan share the
    leaf, each step adds a gradient to their sum: the factors are smaller if a step has few positions.
    """
    factors = tap.factors
    if isinstance(factors, Lookup):
        return False
    if tap.positions == factors.positions:
        return tap.positions > 1
    return factors.positions * (factors.rows + factors.columns) > factors.rows * factors.columns


class LeafRule(NamedTuple):
    """How one leaf's importance is computed, and what that costs.

    Attributes:
      leaf: the leaf's path in the tree of parameters.
      shape: its shape.
      rule: "outer" (outer products, which are never computed per example), "product" (one product of matrices per
        example), "lookup" (rows of a table), "gradient" (differentiated per example), or "unused".
      reason: the equation that uses the leaf, or why it is differentiated per example.
      multiply_adds: the multiplications for the leaf's own gradient, per example and cotangent; None if not known.
      floats: the numbers held in memory per example.
    """

    leaf: str
    shape: tuple[int, ...]
    rule: str
    reason: str
    multiply_adds: int | None
    floats: int


class Explanation(tuple[LeafRule, ...]):
    """A tuple with a `LeafRule` for each leaf, which prints as a table.

    Attributes:
      shapes: what one example and its outputs were taken for, a sentence.
      advice: sentences on the large leaves that are differentiated per example; empty if there are none.
    """

    shapes: str
    advice: str

    def __str__(self) -> str:
        """Returns the shapes, the table and the advice, in Markdown."""
        rows = [
            (rule.leaf, str(rule.shape), rule.rule, rule.reason, _thousands(rule.multiply_adds), f"{rule.floats:,}")
            for rule in self
        ]
        header = ("leaf", "shape", "rule", "reason", "multiply-adds", "floats held")
        return f"{self.shapes}\n\n{markdown_table(header, rows, num_text_columns=4)}\n{self.advice}".rstrip()

    __repr__ = __str__


def explain(output_fn: Callable[[Params, Example], jax.Array], params: Params, example: Example) -> Explanation:
    """Lists by which rule the importance of each leaf is computed, why, and at what cost.

    Args:
      output_fn: `output_fn(params, example) -> outputs`, the function of one example whose importance is computed.
      params: a tree of floating-point arrays.
      example: one example, without example axis: arrays, or `jax.ShapeDtypeStruct`s.

    Returns:
      A tuple with a `LeafRule` for each leaf, in the order of `jax.tree.leaves(params)`, which prints as a table. Above
      the table stand the shapes of one example and its outputs: a batch that is given as one example has many labels.
      Below it stands what to do about matrices that are differentiated per example, if they are large.

    Example:
      >>> dense = lambda params, x: x @ params["kernel"] + params["bias"]
      >>> params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}
      >>> explain(dense, params, jnp.zeros(2))
      One example, (2,), has the outputs (3,). As categorical logits, they are 1 label of 3 classes.
      <BLANKLINE>
      | leaf       | shape  | rule     | reason      | multiply-adds | floats held |
      | ---------- | ------ | -------- | ----------- | ------------: | ----------: |
      | ['bias']   | (3,)   | gradient | used by add |               |           3 |
      | ['kernel'] | (2, 3) | outer    | dense       |             6 |           5 |
    """
    plan = make_plan(output_fn, params, example)
    leaves = jax.tree.leaves_with_path(params)
    explanation = Explanation(
        _rule(jax.tree_util.keystr(path), leaf.shape, leaf_plan)
        for (path, leaf), leaf_plan in zip(leaves, plan.leaf_plans, strict=True)
    )
    explanation.shapes = _describe(jax.tree.map(jnp.shape, example), plan.jaxpr.out_avals[0].shape)
    microbatch_size = default_microbatch_size(output_fn, squared_l2, params, example)
    explanation.advice = _advise(explanation, microbatch_size)
    return explanation


def _advise(rules: Explanation, microbatch_size: int) -> str:
    """Says of large leaves that are differentiated per example why they are, and what to do."""
    num_params = sum(math.prod(rule.shape) for rule in rules)
    large = [
        rule
        for rule in rules
        if rule.rule == "gradient" and len(rule.shape) > 1 and math.prod(rule.shape) >= num_params / 100
    ]
    if not large:
        return ""
    lines = [
        f"- {rule.leaf}: {rule.reason}. Each example has a gradient of {rule.floats:,} floats. {_what_to_do(rule)}"
        for rule in large
    ]
    if microbatch_size == 1:
        last = "One example is computed at a time by default, so this costs no more than an ordinary gradient."
    else:
        last = (
            f"Up to {microbatch_size:,} examples are computed at a time by default. If that is too slow or takes too "
            f"much memory, pass microbatch_size=1: then this costs no more than an ordinary gradient."
        )
    return "\n".join(["Differentiated per example:", "", *lines, "", last])


def _what_to_do(rule: LeafRule) -> str:
    for start, advice in _ADVICE.items():
        if rule.reason.startswith(start):
            return advice
    return "As an operand of a product, a convolution or a look-up, it would cost less."


_ADVICE = {
    "used by": "If it is added or multiplied elementwise, as biases, scales and learned positions are, nothing is to "
    "be done.",
    "used": "So is a table of embeddings that is the last layer's weight too: the sum of both uses has no factors. If "
    "the uses need not share a leaf, give each one of its own.",
    "a look-up in a stack": "Pass the tables as leaves of their own, or look up rows outside of the scan.",
    "carried by a scan": "Pass it to the scan as a constant, by closing over it, or as one of `xs`.",
    "returned by a scan": "Use it inside of the scan, or outside alone.",
}


def _describe(example: Any, outputs: tuple[int, ...]) -> str:
    described = f"One example, {example}, has the outputs {outputs}."
    if not outputs:
        return described
    num_labels, num_classes = math.prod(outputs[:-1]), outputs[-1]
    plural = "s" * (num_labels != 1)
    return f"{described} As categorical logits, they are {num_labels} label{plural} of {num_classes} classes."


def default_microbatch_size(
    output_fn: Callable[[Params, Example], jax.Array], cotangents_fn: CotangentsFn, params: Params, example: Example
) -> int:
    """Chooses how many examples to compute together, from the platform and the shapes.

    On a CPU, products get 512 rows, which was fastest or close to it for convolutions and transformers
    (`python -m benchmarks.importance`), or 1,024 rows if no weight is used at several positions, as in a dense network
    on vectors. On other platforms, the choice is a rule of thumb. There are fewer examples if their arrays would need
    too much memory: their gradients, their activations, and what their cotangents are made from.
    """
    plan = make_plan(output_fn, params, example)
    taps = [leaf_plan for leaf_plan in plan.leaf_plans if isinstance(leaf_plan, Tap)]
    positions = max((tap.positions for tap in taps), default=1)
    positions_per_step = max((tap.factors.positions for tap in taps), default=1)
    leaves = list(zip(jax.tree.leaves(params), plan.leaf_plans, strict=True))
    cotangents = _shapes_of_cotangents(plan, cotangents_fn)
    # At most these are held per example.
    gradient_floats = sum(_gradient_floats(leaf, leaf_plan) for leaf, leaf_plan in leaves)
    cotangent_floats = sum(leaf.size for leaf in jax.tree.leaves(cotangents))
    num_inputs = len(plan.jaxpr.jaxpr.invars) - len(leaves)
    floats = activation_floats(plan.jaxpr.jaxpr, [True] * len(leaves) + [False] * num_inputs)
    other_floats = max(1, cotangent_floats + floats)
    if not is_for_cpu():
        return max(1, min(1024, 2**16 // positions, 2**28 // max(gradient_floats, other_floats)))
    # Matrices that are differentiated per example need batched products, which are slow on a CPU.
    matrix_floats = sum(
        leaf.size for leaf, leaf_plan in leaves if isinstance(leaf_plan, tapping.Untapped) and leaf.ndim > 1
    )
    rows = 1024 if positions == 1 else 512
    memory_limit = min(2**24 // max(1, gradient_floats), 2**26 // other_floats)
    return max(1, min(rows // positions_per_step, 2048 // positions, memory_limit, 2**17 // max(1, matrix_floats)))


def num_cotangents(plan: Plan, cotangents_fn: CotangentsFn) -> int:
    """Returns how many cotangents an example has."""
    return _shapes_of_cotangents(plan, cotangents_fn).num


def _shapes_of_cotangents(plan: Plan, cotangents_fn: CotangentsFn) -> Cotangents:
    outputs = jax.tree.unflatten(plan.outputs, map(_shape_and_dtype, plan.jaxpr.out_avals))
    return jax.eval_shape(cotangents_fn, outputs, jax.ShapeDtypeStruct((), np.int32))


def _gradient_floats(leaf: jax.Array, leaf_plan: LeafPlan) -> int:
    """Counts the numbers of a leaf's gradient of one example: none if it is an outer product."""
    if not isinstance(leaf_plan, Tap):
        return leaf.size
    if isinstance(leaf_plan.factors, Lookup):
        return leaf_plan.positions * leaf_plan.factors.columns
    return leaf.size if leaf_plan.positions > 1 else 0


def make_plan(output_fn: Callable[[Params, Example], jax.Array], params: Params, example: Example) -> Plan:
    """Plans how the gradients of one example are computed."""
    params, example = jax.tree.map(_shape_and_dtype, (params, example))
    jaxpr, outputs = tapping.trace(output_fn, params, example)
    return Plan(jaxpr, outputs, tuple(_plan_leaf(jaxpr, number) for number in range(len(jax.tree.leaves(params)))))


def _plan_leaf(jaxpr: ClosedJaxpr, argument: int) -> LeafPlan:
    use = tapping.find_use(jaxpr.jaxpr, argument)
    if not isinstance(use, tapping.Use):
        return use
    factors = find_factors(use)
    if isinstance(factors, str):
        return tapping.Untapped(factors)
    if 0 in use.lengths:
        return tapping.Untapped("empty")
    scans = list(zip(use.lengths, use.stacked, strict=True))
    stacked_steps = math.prod(length for length, stacked in scans if stacked)
    shared_steps = math.prod(length for length, stacked in scans if not stacked)
    if isinstance(factors, Lookup):
        if any(use.stacked):
            return tapping.Untapped("a look-up in a stack of tables")
        return Tap(use, factors, 1, factors.positions * shared_steps)
    return Tap(use, factors, factors.groups * stacked_steps, factors.positions * shared_steps)


def _shape_and_dtype(leaf: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(leaf, "dtype"):  # a Python number
        leaf = jnp.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def _rule(leaf: str, shape: tuple[int, ...], leaf_plan: LeafPlan) -> LeafRule:
    if isinstance(leaf_plan, tapping.Unused):
        return LeafRule(leaf, shape, "unused", "", 0, 0)
    if isinstance(leaf_plan, tapping.Untapped):
        return LeafRule(leaf, shape, "gradient", leaf_plan.reason, None, math.prod(shape))
    factors = leaf_plan.factors
    size = leaf_plan.groups * factors.rows * factors.columns
    if isinstance(factors, Lookup):
        floats = leaf_plan.positions * factors.columns
        return LeafRule(leaf, shape, "lookup", "embedding", leaf_plan.positions * floats, floats)
    if leaf_plan.positions == 1:
        return LeafRule(leaf, shape, "outer", factors.name, size, leaf_plan.groups * (factors.rows + factors.columns))
    return LeafRule(leaf, shape, "product", factors.name, size * leaf_plan.positions, size)


def _thousands(count: int | None) -> str:
    return "" if count is None else f"{count:,}"
