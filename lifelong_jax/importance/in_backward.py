"""Sums over examples that are made within the backward pass, as those of an ordinary gradient are.

A layer's sum is made when the cotangents at the layer are known. So neither operands nor cotangents are held until the
end, `jax.checkpoint` saves what it is meant to save, and a scan over layers makes one layer's sum in each step, which
the compiler can scatter over the devices of a mesh before it makes the next one.

It is for a single backward pass: over several cotangents, a layer's operand would be used again in each.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lifelong_jax.importance.plan import Tap


@dataclasses.dataclass(frozen=True)
class Summing:
    """What sums a tap's contributions over examples.

    Attributes:
      tap: the tap.
      sum_examples: `sum_examples(tap, operand, cotangents, weights) -> sum`, of a microbatch's operands, cotangents and
        weights `[num_examples, ...]` in one step of the scans around the tap.
    """

    tap: Tap
    sum_examples: Callable[[Tap, jax.Array, jax.Array, jax.Array], jax.Array]

    def zeros(self) -> jax.Array:
        """Makes the zeros with respect to which the derivative is the sum: with an axis for each scan in front."""
        equation, position = self.tap.use.equation, self.tap.use.position
        avals: list[Any] = [equation.invars[1 - position].aval, equation.outvars[0].aval]
        batch = [jax.ShapeDtypeStruct((1, *aval.shape), aval.dtype) for aval in avals]
        weights = jax.ShapeDtypeStruct((1,), jnp.float32)
        summed = jax.eval_shape(functools.partial(self.sum_examples, self.of_step), *batch, weights)
        return jnp.zeros((*self.tap.use.lengths, *summed.shape), summed.dtype)

    @property
    def of_step(self) -> Tap:
        """The tap in one step of the scans around it."""
        use = dataclasses.replace(self.tap.use, lengths=(), stacked=())
        factors = self.tap.factors
        return Tap(use, factors, getattr(factors, "groups", 1), factors.positions)

    def insert(self, output: jax.Array, operand: jax.Array, weight: jax.Array, zeros: jax.Array) -> jax.Array:
        """Returns one example's output, whose derivative with respect to `zeros` is the sum over all examples."""
        sum_examples = functools.partial(self.sum_examples, self.of_step)

        @jax.custom_batching.custom_vmap
        def contribution(*of_example: jax.Array) -> jax.Array:
            return sum_examples(*(array[None] for array in of_example))

        @contribution.def_vmap
        def _(size: int, batched: list[bool], *of_examples: jax.Array) -> tuple[jax.Array, bool]:
            arrays = (
                array if has_axis else jnp.broadcast_to(array, (size, *array.shape))
                for array, has_axis in zip(of_examples, batched, strict=True)
            )
            return sum_examples(*arrays), False

        @jax.custom_vjp
        def identity(output: jax.Array, operand: jax.Array, weight: jax.Array, zeros: jax.Array) -> jax.Array:
            return _of_each_example(output, weight)

        def forward(
            output: jax.Array, operand: jax.Array, weight: jax.Array, zeros: jax.Array
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            return _of_each_example(output, weight), (operand, weight)

        def backward(residuals: tuple[jax.Array, jax.Array], cotangents: jax.Array) -> tuple:
            operand, weight = residuals
            return cotangents, None, None, contribution(operand, cotangents, weight)

        identity.defvjp(forward, backward)
        return identity(output, operand, weight, zeros)


@jax.custom_batching.custom_vmap
def _of_each_example(output: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the output, under `jax.vmap` one for each example, as the cotangents of all are summed otherwise."""
    return output


@_of_each_example.def_vmap
def _(size: int, batched: list[bool], output: jax.Array, weight: jax.Array) -> tuple[jax.Array, bool]:
    return output if batched[0] else jnp.broadcast_to(output, (size, *output.shape)), True
