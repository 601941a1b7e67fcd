"""Dtypes of sums, scaled weights, and five workarounds for programs that XLA compiles badly.

The workarounds (`unbatched`, `update_after_reads`, `compute_once`, `wait_for`, `indices_per_example`) change no number.
Each says what XLA does without it, and what it gained when it was introduced. `python -m benchmarks.xla` measures all
but `wait_for` again, so that one can be removed when XLA no longer needs it; a test does so for `wait_for`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lifelong_jax.platforms import is_for_cpu
from lifelong_jax.types import Batch, Params


def wide_dtype(*arrays: jax.Array) -> np.dtype:
    """Returns the dtype to compute in: the widest dtype of the arrays, and at least float32."""
    # Two at a time: NumPy finds no common dtype of bfloat16 and float16, but each has one with float32.
    return functools.reduce(np.promote_types, map(jnp.result_type, arrays), np.dtype(np.float32))


def widen(array: jax.Array) -> jax.Array:
    """Casts an array to float32, unless its dtype is at least as wide."""
    array = jnp.asarray(array)
    return array.astype(wide_dtype(array))


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Returns sqrt(x), whose derivative at 0 is taken to be 0, not infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def refuse_to_differentiate(message: str, tree: Any) -> Any:
    """Returns the tree, whose derivative is an error with this message."""
    return tree


@refuse_to_differentiate.defjvp
def _refuse(message: str, primals: tuple, tangents: tuple) -> NoReturn:
    raise ValueError(message)


def widened_zeros(params: Params) -> Params:
    """Makes the zeros that a sum starts from, in float32 at least: a sum in bfloat16 loses too much."""
    return jax.tree.map(lambda leaf: vary_with(jnp.zeros(leaf.shape, wide_dtype(leaf)), leaf), params)


def varies(tree: Any) -> frozenset[str]:
    """Returns the mesh axes over which an array of a tree varies inside `jax.shard_map`; none outside of it."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def vary_with(tree: Any, like: Any) -> Any:
    """Marks arrays inside `jax.shard_map` as varying over all axes over which an array of `like` varies.

    The gradient with respect to an array that does not vary is summed over the shards: before it is squared.
    """
    axes = varies(like)

    def vary(leaf: jax.Array) -> jax.Array:
        missing = axes - jax.typeof(leaf).manual_axis_type.varying
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(vary, tree) if axes else tree


def scale_weights(weights: jax.Array) -> jax.Array:
    """Scales weights by a power of 2, so that neither their sum nor its reciprocal overflows.

    The largest weight becomes at least 1 and less than 2, unless all are 0. Scaling by a power of 2 is exact.
    """
    counts = not jnp.issubdtype(weights.dtype, jnp.floating)
    weights = weights.astype(jnp.float32) if counts else widen(weights)
    return scale_to(jnp.max(weights), weights)


def scale_to(largest: jax.Array, weights: jax.Array) -> jax.Array:
    """Scales weights by the power of 2 that makes the largest one at least 1 and less than 2, unless it is 0."""
    _, exponent = jnp.frexp(largest)
    return jnp.ldexp(weights, 1 - exponent)


def pad(batch: Batch, size: int) -> Batch:
    """Pads a batch with its own examples at weight 0: where all inputs are 0, a network may have no finite gradient."""
    positions = np.arange(size)
    weights: Any = np.ones(len(batch.labels), np.float32) if batch.weights is None else batch.weights
    padded = jax.tree.map(lambda leaf: leaf[positions % len(batch.labels)], batch._replace(weights=weights))
    return padded._replace(weights=jnp.where(positions < len(batch.labels), padded.weights, 0))


def equal_size(num_examples: int, at_most: int) -> int:
    """Returns the size of each part if examples are split into as few equal parts as `at_most` allows.

    Only the last part may be smaller: `equal_size(1437, 1024)` is 719.
    """
    num_parts = -(-num_examples // at_most)
    return -(-num_examples // num_parts)


def unbatched(function: Callable) -> Callable:
    """Maps a function over a leading axis of length 1, as `jax.vmap` does, but computes without that axis.

    On a CPU, XLA's batched products are slower than plain ones, even if the batch has one entry: by a sixth for a
    transformer's Fisher, computed one by one.
    """

    def mapped(*arguments: object) -> object:
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], arguments)))

    return mapped


def update_after_reads(updates: Params, grads: Params) -> Params:
    """Makes every update wait for the gradients of biases and scales, on a CPU.

    Without this, XLA assumes that a parameter may be updated before the backward pass reads it, and copies it in every
    step: up to 5 % of a step with Adam (MLP 784-1000-1000-10, batch 128). The gradients of biases and scales are sums
    of cotangents: when they are known, the backward pass has read all parameters. An optimization barrier does not
    help, because XLA drops it too early.
    """
    vectors = [leaf for leaf in jax.tree.leaves(grads) if leaf.ndim == 1 and leaf.size and not is_sharded(leaf)]
    if not is_for_cpu() or not vectors:
        return updates
    never = functools.reduce(jnp.logical_or, [_never(leaf[0]) for leaf in vectors])
    return jax.tree.map(lambda leaf: leaf + never.astype(leaf.dtype), updates)


def compute_once(value: jax.Array, update: jax.Array) -> jax.Array:
    """Returns `value`, and makes XLA compute it once if it has several users, on a CPU.

    Without this, XLA computes a sum again for each of its users, and reads its operands each time: with a coupled
    penalty, a step with Adam took 1.14 times as long as one without a penalty, and takes 1.04 times as long with this.
    XLA does not repeat a division, so `value` is divided by a 1 that XLA cannot simplify, because it is computed from
    `update`.
    """
    return value / (1 + jnp.minimum(jnp.abs(jax.lax.stop_gradient(update)), 0))


def wait_for(tree: Params, results: Params) -> tuple[Params, Params]:
    """Returns both trees, and makes what is computed from the first wait for the second.

    Without this, XLA computes the changes of several weights at once, and holds all of them: for the penalty on 8
    equal layers with LoRA, 8 times the memory of a layer. On a CPU, XLA drops an optimization barrier too early.
    """
    if not is_for_cpu():
        return jax.lax.optimization_barrier((tree, results))
    known = [leaf for leaf in jax.tree.leaves(results) if leaf.size and not is_sharded(leaf)]
    never = functools.reduce(jnp.logical_or, [_never(jnp.ravel(leaf)[0]) for leaf in known], jnp.array(False))
    return jax.tree.map(lambda leaf: leaf + never.astype(leaf.dtype), tree), results


def with_extra_args(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets an optimiser be called with any keyword arguments: it gets those that its `update` takes.

    optax's function goes by the class. `optax.MultiSteps` takes the arguments, but neither it nor its
    `gradient_transformation()` is of the class that says so; `optax.contrib.sam` is of that class, but takes one alone.
    """
    parameters = inspect.signature(optimizer.update).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        taken = {name: value for name, value in extra_args.items() if name in parameters}
        return optimizer.update(updates, state, params, **taken)

    return optax.GradientTransformationExtraArgs(optimizer.init, update_fn)


def values_of_variables(tree: Any) -> Any:
    """Takes the values of flax.nnx's variables, which `nnx.Optimizer` passes to `init`, and keeps in its state."""
    is_variable = lambda node: hasattr(node, "get_value")  # noqa: E731
    return jax.tree.map(lambda node: node.get_value() if is_variable(node) else node, tree, is_leaf=is_variable)


def indices_per_example(indices: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `indices`, and gives each example its own copy under `jax.vmap`, without holding the copies in memory.

    Without this, XLA gathers feature by feature across all examples, which is against the order of memory. With it, XLA
    gathers example by example: 4 % of an importance pass over permuted inputs, 5 % of an evaluation.
    """
    return indices + _never(x[0].astype(jnp.float32)).astype(indices.dtype)


def is_sharded(array: jax.Array) -> bool:
    """Returns whether an array's type names mesh axes that it is sharded over."""
    return any(jax.typeof(array).sharding.spec)


def _never(number: jax.Array) -> jax.Array:
    """Returns False, computed so that XLA cannot simplify it."""
    return (number > 0) & (number < 0)
