"""Times Kronecker factors, and training steps with their penalty; prints Markdown tables, and the memory they take.

    python -m benchmarks.kronecker

The network is an MLP 784-1000-1000-10. The first table compares the pass over the examples that computes the factors
with the pass that computes the Fisher diagonal, and lists what else is done once per task: the eigenvectors, and the
nearest Kronecker product in `consolidate`. The second compares a step (batches of 128, Adam) whose proximal penalty
pulls after every m steps with a step without a penalty. Both take turns in one process; a ratio is that of two times
next to each other, so that other load on the machine cancels. The tables have medians, with quartiles in brackets.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

from benchmarks.penalty import LEARNING_RATE, MODEL, Steps, compare, make_problem
from benchmarks.timing import device, quartiles, take_turns
from lifelong_jax import (
    consolidate,
    fisher_diagonal,
    init_consolidation,
    kronecker_fisher,
    proximal_quadratic_penalty,
)
from lifelong_jax._tables import markdown_table
from lifelong_jax.importance import kronecker
from lifelong_jax.importance.estimators import as_tree, fisher_cotangents, mean_over_examples
from lifelong_jax.types import Params

INTERVALS = (1, 8, 32, 128)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=11, help="number of turns")
    parser.add_argument("--examples", type=int, default=6400, help="number of examples in a pass")
    arguments = parser.parse_args()
    print(f"{device()}\n")
    params, _ = make_problem()
    inputs = jax.random.normal(jax.random.key(1), (arguments.examples, 784))
    time_passes(params, inputs, arguments.turns)
    time_steps(arguments.turns)
    print(memory_table())


def time_passes(params: Params, inputs: jax.Array, turns: int) -> None:
    """Prints the cost of the factors' pass, in passes for the diagonal, and of what is done once per task."""
    sampling = {"num_samples": 1, "key": jax.random.key(2)}
    passes: dict[str, Callable[[], Params]] = {}
    expectations: dict[str, dict[str, Any]] = {"exact": {}, "sampled": sampling}
    for name, options in expectations.items():
        passes[f"{name}, diagonal"] = functools.partial(fisher_diagonal, MODEL.apply, params, inputs, **options)
        passes[f"{name}, factors"] = functools.partial(factors, params, inputs, **options)
    importance = kronecker_fisher(MODEL.apply, params, inputs, **sampling)
    kept = consolidate(init_consolidation(params, importance), params, importance, rule="latest")
    means = passes["sampled, factors"]()
    passes["eigenvectors"] = functools.partial(kronecker.make_forms, means)
    passes["consolidate"] = functools.partial(consolidate, kept, params, importance, rule="latest")
    for function in passes.values():
        jax.block_until_ready(function())
    seconds = take_turns(passes, turns)
    rows = []
    for name in ("exact", "sampled"):
        pairs = zip(seconds[f"{name}, factors"], seconds[f"{name}, diagonal"], strict=True)
        rows.append([name, quartiles(ours / theirs for ours, theirs in pairs)])
    print(markdown_table(["expectation", "factors, in passes for the diagonal"], rows))
    rows = [[name, quartiles(seconds[name])] for name in ("eigenvectors", "consolidate")]
    print(markdown_table(["once per task", "seconds"], rows))


def factors(params: Params, inputs: jax.Array, num_samples: int | None = None, key: jax.Array | None = None) -> Params:
    """Computes the factors, without their eigenvectors."""
    cotangents_fn = fisher_cotangents("categorical", num_samples, key)
    sum_fn = kronecker.sum_fn("expand", 8192)
    return mean_over_examples(as_tree(MODEL.apply), cotangents_fn, params, inputs, key, None, sum_fn, None)


def time_steps(turns: int) -> None:
    """Prints the cost of a step by the interval of the pulls."""
    params, batch = make_problem()
    importance = kronecker_fisher(MODEL.apply, params, batch.inputs)
    kept = consolidate(init_consolidation(params, importance), params, importance, rule="latest")
    # Each timing makes as many steps as the longest interval, so that it includes the pulls of each interval.
    make_steps = functools.partial(Steps, params=params, batch=batch, stored=(), repeats=max(INTERVALS))
    adam = optax.adam(LEARNING_RATE)
    without = make_steps(adam)
    others = {"none": make_steps(adam)}
    for every in INTERVALS:
        optimizer = optax.chain(adam, proximal_quadratic_penalty(LEARNING_RATE, 1.0, every))
        others[str(every)] = make_steps(optimizer, consolidation=kept)
    ratios, milliseconds = compare(without, others, turns)
    print(f"The step without a penalty: {milliseconds / max(INTERVALS):.1f} ms\n")
    print(markdown_table(["a pull after every ... steps", "times the step without"], list(map(list, ratios.items()))))


Shape: TypeAlias = tuple[int, int, int]  # matrices of one shape, their rows and their columns


def memory_table() -> str:
    """Makes the table of what importances take in float32, from shapes alone."""
    mib = 4 / 2**20
    rows = []
    for name, (matrices, vectors) in NETWORKS.items():
        parameters = sum(count * rows * columns for count, rows, columns in matrices)
        parameters += sum(count * size for count, size in vectors)
        kept = [
            sum(count * (side(rows, limit) + side(columns, limit)) for count, rows, columns in matrices)
            + sum(count * side(size, limit) for count, size in vectors)
            for limit in (None, 256)
        ]
        rows.append([name, *(f"{mib * floats:,.1f}" for floats in (parameters, *kept))])
    return markdown_table(["network", "diagonal, MiB", "Kronecker factors, MiB", "256 eigenvectors a side, MiB"], rows)


def side(size: int, num_vectors: int | None) -> int:
    """Counts the numbers that one side of a leaf keeps: eigenvalues and eigenvectors, all or some of them."""
    if size == 1 or size > MAX_SIDE:
        return size
    return size * min(size, num_vectors or size) + min(size, num_vectors or size)


MAX_SIDE = 8192  # the default of `kronecker_fisher`: a longer side keeps its diagonal
NETWORKS: dict[str, tuple[list[Shape], list[tuple[int, int]]]] = {
    "MLP 784-1000-1000-10": ([(1, 784, 1000), (1, 1000, 1000), (1, 1000, 10)], [(2, 1000), (1, 10)]),
    "ResNet-18, 1000 classes": (
        [
            (1, 147, 64),
            (4, 576, 64),
            (1, 576, 128),
            (3, 1152, 128),
            (1, 64, 128),
            (1, 1152, 256),
            (3, 2304, 256),
            (1, 128, 256),
            (1, 2304, 512),
            (3, 4608, 512),
            (1, 256, 512),
            (1, 512, 1000),
        ],
        [(10, 64), (10, 128), (10, 256), (10, 512), (1, 1000)],
    ),
    "transformer, 7 B": (
        [(128, 4096, 4096), (64, 4096, 11008), (32, 11008, 4096), (1, 32000, 4096), (1, 4096, 32000)],
        [(65, 4096)],
    ),
}


if __name__ == "__main__":
    main()
