"""The loop over microbatches that all importances share, and the quantity that they all sum over examples.

All importances have one form. For example n, a function has the outputs F_n. Cotangents v_nk are pulled back through
it to gradients g_nk = (∂F_n/∂params)ᵀ v_nk. The example then contributes, elementwise,

    q_n = Σ_k g_nk²            (reduction="sum_of_squares")
    q_n = sqrt(Σ_k g_nk²)      (reduction="norm"; |g_n| if there is one cotangent)

`estimators.py` defines the outputs and cotangents of each importance. `reference.py` and `structured.py` compute the
sum over examples in two ways. Both square each example's own gradient before they sum over examples: the square of a
minibatch's gradient is another quantity.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lifelong_jax import _checks
from lifelong_jax._numerics import equal_size
from lifelong_jax.importance.cotangents import Cotangents
from lifelong_jax.types import Example, Examples, Params

Reduction: TypeAlias = Literal["sum_of_squares", "norm"]

CotangentsFn: TypeAlias = Callable[[jax.Array, jax.Array], Cotangents]
"""`cotangents_fn(outputs, index)` returns an example's cotangents; `index` numbers the example, for random keys."""


class Spread(NamedTuple):
    """How the compiler spreads the examples of a microbatch, and sums, over the devices of a mesh.

    Attributes:
      num_shards: the number of equal parts, one after the other, that a microbatch takes as many examples from.
      axes: the names of the mesh's axes over which these parts are sharded; none if that is not known.
      specs: how the sum in each leaf's place is sharded, in the order of the leaves; None for the compiler's choice.
    """

    num_shards: int = 1
    axes: tuple[str, ...] = ()
    specs: tuple[PartitionSpec | None, ...] = ()

    def fit(self, num_examples: int, microbatch_size: int) -> tuple["Spread", int]:
        """Returns the spread for some examples, and how many of each part are computed together."""
        if self.axes:
            return self, microbatch_size
        # The parts may all be on one device, which has memory for `microbatch_size` examples.
        is_split = num_examples % self.num_shards == 0 and self.num_shards <= microbatch_size
        spread = self if is_split else self._replace(num_shards=1)
        return spread, microbatch_size // spread.num_shards

    def place_sum(self, params: Params, total: Any) -> Any:
        """Shards sums as the parameters are, where they have a parameter's shape."""
        if not self.specs:
            return total

        def place(_: jax.Array, node: Any, spec: PartitionSpec | None) -> Any:
            is_known = spec is not None and isinstance(node, jax.Array)
            return jax.lax.with_sharding_constraint(node, spec) if is_known else node

        return jax.tree.map(place, params, total, jax.tree.unflatten(jax.tree.structure(params), self.specs))

    def place_examples(self, leaf: jax.Array) -> jax.Array:
        """Shards an array of a microbatch over its leading axis."""
        if not self.axes:
            return leaf
        others = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(self.axes, *others))


ON_ONE_DEVICE = Spread()


def sum_microbatches(
    sum_microbatch: Callable[..., Any],
    zeros_fn: Callable[[Params], Any],
    output_fn: Callable[[Params, Example], jax.Array],
    cotangents_fn: CotangentsFn,
    params: Params,
    examples: Examples,
    weights: jax.Array | None,
    microbatch_size: int,
    start: Any = None,
    spread: Spread = ON_ONE_DEVICE,
) -> Any:
    """Sums a function over microbatches of the examples, one after the other.

    All microbatches have one size, so the function is compiled once; in the last one, examples that were summed before
    have weight 0.

    Args:
      sum_microbatch: `(output_fn, cotangents_fn, params, examples, indices, weights) -> tree`; the last three arguments
        have a leading axis of the microbatch's size. It must be linear in the weights.
      zeros_fn: `zeros_fn(params) -> tree`, what the sum starts from.
      output_fn: passed to `sum_microbatch`.
      cotangents_fn: passed to `sum_microbatch`.
      params: a tree of floating-point arrays.
      examples: a tree of arrays `[num_examples, ...]`.
      weights: `[num_examples]`, or None for ones.
      microbatch_size: the largest number of examples of each shard per call.
      start: what the sum starts from, a tree like that of `zeros_fn`; None for zeros.
      spread: how a microbatch and the sum are spread over devices, from `Spread.fit`.

    Returns:
      The sum, a tree like those of `sum_microbatch`.
    """
    examples, weights = jax.tree.map(jnp.asarray, (examples, weights))
    num_examples = jax.tree.leaves(examples)[0].shape[0]
    per_shard = num_examples // spread.num_shards
    size = equal_size(per_shard, microbatch_size)
    present = None if weights is None else jax.tree.map(lambda x: x[jnp.argmax(weights > 0)], examples)

    def add_microbatch(total: Any, start: jax.Array) -> tuple[Any, None]:
        # The last microbatch overlaps the one before, whose examples do not count again: a slice is no gather.
        first_row = jnp.minimum(start, per_shard - size)
        rows = first_row + jnp.arange(size, dtype=jnp.int32)
        is_row = rows >= start

        def take(leaf: jax.Array) -> jax.Array:
            by_shard = leaf.reshape(spread.num_shards, per_shard, *leaf.shape[1:])
            taken = jax.lax.dynamic_slice_in_dim(by_shard, first_row, size, axis=1)
            return spread.place_examples(taken.reshape(-1, *leaf.shape[1:]))

        first = per_shard * jnp.arange(spread.num_shards, dtype=jnp.int32)
        indices = (first[:, None] + rows[None]).ravel()
        row_weights = jnp.where(jnp.tile(is_row, spread.num_shards), 1.0 if weights is None else take(weights), 0)
        microbatch = jax.tree.map(take, examples)
        if weights is not None:  # an example of weight 0 is absent, even if it is NaN: another one is in its place
            microbatch = jax.tree.map(functools.partial(_where, row_weights > 0), microbatch, present)
        term = sum_microbatch(output_fn, cotangents_fn, params, microbatch, indices, row_weights)
        if weights is not None:  # a shard, or a batch of a stream, may have no example of a weight above 0
            term = jax.tree.map(lambda leaf: jnp.where(jnp.any(weights > 0), leaf, 0), term)
        term = spread.place_sum(params, term)
        return spread.place_sum(params, jax.tree.map(jnp.add, total, term)), None

    if start is None:
        start = zeros_fn(params)
    else:
        _check_start(start, jax.eval_shape(zeros_fn, params))
    starts = jnp.arange(0, per_shard, size, dtype=jnp.int32)
    total, _ = jax.lax.scan(add_microbatch, spread.place_sum(params, start), starts)
    return total


def _where(rows: jax.Array, leaf: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.where(rows.reshape(-1, *[1] * other.ndim), leaf, other[None])


def _check_start(start: Any, zeros: Any) -> None:
    """Raises ValueError, naming the leaf, unless a sum may start from `start`."""
    hint = "Begin with init_accumulation(params), and with like=importance for Kronecker factors."
    try:
        _checks.check_same_structure("into.mean", start, "this importance", zeros)
    except ValueError as error:
        raise ValueError(f"{error} {hint}") from None
    for (path, leaf), zero in zip(jax.tree.leaves_with_path(start), jax.tree.leaves(zeros), strict=True):
        if leaf.dtype != zero.dtype:
            raise ValueError(
                f"into.mean{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, but this importance has {zero.dtype}. "
                f"{hint}"
            )
