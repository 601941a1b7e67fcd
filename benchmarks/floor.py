"""The floor: the shortest time in which the machine computes the matrix products of a run, and nothing else.

Other benchmarks divide by it. The products are in float32, by XLA, on all cores. Activations, the loss, shuffling and
the optimiser are left out. `find_floor` tries several ways and returns the fastest: batch sizes, where the run may have
any; weights stored as `[in, out]` or `[out, in]`; cotangents of the classes one by one or stacked.

Each way is one compiled loop over different batches. Each step uses results of the step before, so that XLA cannot
leave products out, make them smaller or move them out of the loop. `tests/benchmarks/test_floor.py` counts the products
in the compiled program.
"""

import concurrent.futures
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import device, time_call

NUM_BATCHES = 4  # the loop goes through them again and again
NUM_TRIED = 1024  # examples for which the ways are compared
BATCH_SIZES = (64, 256, 512, 1024, 2048)  # tried where a run may have any batch size
SIZE = 2048  # of the square matrices by which the machine is described


class Linear(NamedTuple):
    """The three products of a layer, whose weights are stored as `[in, out]`, or as `[out, in]` if transposed."""

    transposed: bool

    def forward(self, inputs: jax.Array, weights: jax.Array) -> jax.Array:
        """Computes the layer's outputs."""
        return inputs @ (weights.T if self.transposed else weights)

    def back(self, cotangents: jax.Array, weights: jax.Array) -> jax.Array:
        """Computes the cotangents of the layer's inputs."""
        return cotangents @ (weights if self.transposed else weights.T)

    def outer(self, inputs: jax.Array, cotangents: jax.Array) -> jax.Array:
        """Computes the product of the weights' shape: a gradient or a sum of squares."""
        return cotangents.T @ inputs if self.transposed else inputs.T @ cotangents


def evaluation_products(linear: Linear, weights: list[jax.Array], x: jax.Array) -> list[jax.Array]:
    """Computes the products of a forward pass: the outputs of all layers."""
    outputs = list(itertools.accumulate(weights, linear.forward, initial=x))
    return outputs[1:]


def training_products(linear: Linear, weights: list[jax.Array], x: jax.Array) -> list[jax.Array]:
    """Computes the products of a gradient with respect to all weights: forward, back through the layers, and outer."""
    *inputs, logits = [x, *evaluation_products(linear, weights, x)]
    cotangents = _pull_back(linear, weights, logits)
    return [linear.outer(*pair) for pair in zip(inputs, [*cotangents, logits], strict=True)]


def importance_products(
    linear: Linear, weights: list[jax.Array], x: jax.Array, stacked: bool = False
) -> list[jax.Array]:
    """Computes the products of an exact Fisher diagonal, with a backward pass for each class except one."""
    *inputs, logits = [x, *evaluation_products(linear, weights, x)]
    scores = jnp.eye(logits.shape[-1])[:-1, None] - logits  # [num_classes - 1, num_examples, num_classes]
    if stacked:
        pulled_back = _pull_back(linear, weights, scores.reshape(-1, logits.shape[-1]))
        pulled_back = [cotangents[: len(x)] for cotangents in jax.lax.optimization_barrier(pulled_back)]
    else:
        rest = _in_turn(lambda c: _pull_back(linear, weights, c), scores[1:], len(scores) - 1)
        pulled_back = _pull_back(linear, weights, scores[0] + 1e-9 * rest)
    return [linear.outer(*pair) for pair in zip(inputs, [*pulled_back, logits], strict=True)]


def _pull_back(linear: Linear, weights: list[jax.Array], cotangents: jax.Array) -> list[jax.Array]:
    """Computes the cotangents between the layers, from the first layer's outputs on."""
    return list(itertools.accumulate(weights[:0:-1], linear.back, initial=cotangents))[:0:-1]


def _in_turn(step: Callable, batches: jax.Array, count: jax.Array | int) -> jax.Array:
    """Makes `count` steps. A tiny multiple of each step's results is added to the next step's batch."""

    def body(index: jax.Array, last: jax.Array) -> jax.Array:
        results = jax.lax.optimization_barrier(step(batches[index % len(batches)] + 1e-9 * last))
        return sum(result[0, 0] for result in results)  # the barrier keeps the results whole

    return jax.lax.fori_loop(0, count, body, jnp.zeros(()))


def loop(products: Callable, weights: list[jax.Array], batches: jax.Array, count: jax.Array) -> jax.Array:
    """Computes the products for `count` of the batches `[num_batches, batch_size, in]` in turn; returns a checksum."""
    return _in_turn(functools.partial(products, weights), batches, count)


PRODUCTS = {
    "training": {"": training_products},
    "importance": {
        "classes one by one": importance_products,
        "classes stacked": functools.partial(importance_products, stacked=True),
    },
    "evaluation": {"": evaluation_products},
}


def flops(part: str, sizes: Sequence[int]) -> int:
    """Counts a part's floating-point operations per example: two for each multiply-add of its products."""
    by_layer = [rows * columns for rows, columns in itertools.pairwise(sizes)]
    forward, back = sum(by_layer), sum(by_layer[1:])
    backward_passes = {"training": 1, "importance": sizes[-1] - 1}
    return 2 * (forward if part == "evaluation" else 2 * forward + backward_passes[part] * back)


class AtOnce(NamedTuple):
    """The number of runs whose products are computed at once, by `vmap` and by threads."""

    vmapped: int = 1
    threads: int = 1


class Floor(NamedTuple):
    """The fastest way to compute the products of one part of a run.

    Attributes:
      how: a description of the way.
      flops: the floating-point operations of one run.
      steps: the number of steps of one run.
      at_once: the number of runs that are computed at once.
      call: `call(num_steps)` computes the products of so many steps, for all these runs.
    """

    how: str
    flops: float
    steps: float
    at_once: int
    call: Callable[[int], None]

    def seconds(self) -> float:
        """Times the products, and returns the seconds per run."""
        whole = math.ceil(self.steps)
        return time_call(functools.partial(self.call, whole)) * self.steps / whole / self.at_once


def find_floor(
    part: str,
    sizes: Sequence[int],
    num_examples: int,
    batch_sizes: Sequence[int],
    ways: Sequence[AtOnce] = (AtOnce(),),
) -> Floor:
    """Tries all ways to compute a part's products on a few examples, and returns the fastest.

    Args:
      part: "training", "importance" or "evaluation".
      sizes: the widths of the layers of a dense network, from its input on.
      num_examples: the number of examples of one run, summed over epochs and tasks.
      batch_sizes: the batch sizes to try; for training, only the run's own.
      ways: the numbers of runs at once to try.

    Returns:
      The floor for all examples of a run.
    """
    calls, found = [], []
    for how, batch_size, at_once, call in _all_ways(part, sizes, num_examples, batch_sizes, ways):
        runs, count = at_once.vmapped * at_once.threads, max(1, NUM_TRIED // batch_size)
        calls.append((functools.partial(call, count), count * batch_size * runs))
        calls[-1][0]()  # the first call is slow
        found.append(Floor(how, flops(part, sizes) * num_examples, num_examples / batch_size, runs, call))
    turns = [[time_call(call) / examples for call, examples in calls] for _ in range(3)]
    return found[int(np.argmin(np.min(turns, axis=0)))]


def _all_ways(
    part: str, sizes: Sequence[int], num_examples: int, batch_sizes: Sequence[int], ways: Sequence[AtOnce]
) -> Iterator[tuple[str, int, AtOnce, Callable[[int], None]]]:
    tried = itertools.product(
        PRODUCTS[part].items(), (False, True), sorted({min(b, num_examples) for b in batch_sizes})
    )
    for (name, products), transposed, batch_size in tried:
        for vmapped, of_vmapped in itertools.groupby(sorted(ways), key=lambda way: way.vmapped):
            function = functools.partial(loop, functools.partial(products, Linear(transposed)))
            compiled, arguments = compile_loop(function, sizes, batch_size, transposed, vmapped)
            for way in of_vmapped:
                kept = "[out, in]" if transposed else "[in, out]"
                how = [f"batches of {batch_size}", f"weights {kept}", name]
                how += [f"{vmapped} runs by vmap"] * (vmapped > 1) + [f"{way.threads} threads"] * (way.threads > 1)
                call = functools.partial(_call, compiled, arguments, way.threads)
                yield ", ".join(filter(None, how)), batch_size, way, call


def compile_loop(
    function: Callable, sizes: Sequence[int], batch_size: int, transposed: bool, vmapped: int = 1
) -> tuple[Callable, tuple[list[jax.Array], jax.Array]]:
    """Compiles a loop for several runs, with the number of steps as an argument, and draws its weights and batches."""
    *keys, input_key = jax.random.split(jax.random.key(0), len(sizes))
    leading = (vmapped,) if vmapped > 1 else ()
    weights = [
        jax.random.normal(key, (*leading, *((columns, rows) if transposed else (rows, columns)))) / math.sqrt(rows)
        for key, (rows, columns) in zip(keys, itertools.pairwise(sizes), strict=True)
    ]
    batches = jax.random.normal(input_key, (*leading, NUM_BATCHES, batch_size, sizes[0]))
    of_all = jax.vmap(function, in_axes=(0, 0, None)) if vmapped > 1 else function
    return jax.jit(of_all).lower(weights, batches, jnp.int32(1)).compile(), (weights, batches)


def _call(compiled: Callable, arguments: tuple[Any, ...], num_threads: int, num_steps: int) -> None:
    count = jnp.int32(num_steps)
    if num_threads == 1:
        jax.block_until_ready(compiled(*arguments, count))
        return
    with concurrent.futures.ThreadPoolExecutor(num_threads) as executor:
        list(executor.map(lambda _: jax.block_until_ready(compiled(*arguments, count)), range(num_threads)))


def machine() -> str:
    """Describes the machine, and how fast it multiplies large square matrices."""
    matrix = jax.random.normal(jax.random.key(0), (SIZE, SIZE))

    def gigaflops_per_second(square: Callable[[], object]) -> float:
        return 2 * SIZE**3 / min(time_call(square) for _ in range(6)) / 1e9

    rates = [f"{gigaflops_per_second(functools.partial(jax.jit(jnp.matmul), matrix, matrix)):.0f} GFLOP/s by XLA"]
    if jax.default_backend() == "cpu":
        array = np.asarray(matrix)
        rates.append(f"{gigaflops_per_second(lambda: array @ array):.0f} by NumPy")
    return f"{device()}; a {SIZE}×{SIZE} product: {', '.join(rates)}\n"
