"""Times training steps of a small CNN by different ways to convolve, and prints a Markdown table.

    python benchmarks/convolutions.py

A step is forward pass, gradient and SGD. It is timed alone, and in a `lax.scan` over ten batches, as training loops
are; and so is the empirical Fisher of a batch. All ways take turns in one process; a ratio is the median over the turns
of a way over `convolve_by_patches` in the same turn, so that other load on the machine cancels. Brackets hold the
quartiles.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp

from lifelong_jax import empirical_fisher_diagonal, models
from lifelong_jax.methods import cross_entropy
from lifelong_jax.runs import markdown_table
from lifelong_jax.types import Batch, Params

MODEL = models.CNN(features=(32, 64), num_outputs=10)
NUM_STEPS = 10


def convolve_by_lax_patches(image: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Gathers patches by `lax.conv_general_dilated_patches`, which is a convolution itself."""
    height, width, _, features = kernel.shape
    patches = jax.lax.conv_general_dilated_patches(
        image[None],
        (height, width),
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]
    by_channel = jnp.moveaxis(kernel, 2, 0).reshape(-1, features)
    return (patches.reshape(-1, patches.shape[-1]) @ by_channel).reshape(*patches.shape[:2], features)


WAYS = {
    "patches": models.convolve_by_patches,
    "XLA": models.convolve_by_xla,
    "`conv_general_dilated_patches`": convolve_by_lax_patches,
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=11, help="turns that each way takes")
    parser.add_argument("--sizes", type=int, nargs="+", default=[28, 8], help="height and width of the images")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128], help="examples per step")
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s), JAX {jax.__version__}\n")
    header = ["images", "batch", "what", "patches, ms", *(f"{way}, times patches" for way in WAYS if way != "patches")]
    rows = []
    for size in arguments.sizes:
        for batch_size in arguments.batch_sizes:
            rows += measure(size, batch_size, arguments.turns)
    print(markdown_table(header, rows))


def measure(size: int, batch_size: int, turns: int) -> list[list[str]]:
    """Times everything at one size of the images and of the batch, and returns rows of the table."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.uniform(keys[0], (NUM_STEPS, batch_size, size, size, 1))
    labels = jax.random.randint(keys[1], (NUM_STEPS, batch_size), 0, 10)
    batches = Batch(inputs, labels, jnp.ones((NUM_STEPS, batch_size)))
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    params = models.init_network(MODEL, keys[2], inputs[0, 0])
    runs = {}
    for way, convolve in WAYS.items():
        # A network of its own for each way, or jit would take the first one's compiled functions for the others'.
        loss_fn = cross_entropy(lambda params, x: MODEL.apply(params, x))
        step = functools.partial(sgd_step, loss_fn)
        functions = {
            "a step": (step, first),
            "a step in a loop": (functools.partial(sgd_loop, step), batches),
            "empirical Fisher": (functools.partial(empirical_fisher_diagonal, loss_fn), first),
        }
        for what, (function, data) in functions.items():
            runs[what, way] = functools.partial(compile_with(convolve, function, params, data), params, data)
    for run in runs.values():
        seconds(run)
    orders = [list(runs)[:: 1 if turn % 2 else -1] for turn in range(turns)]
    turns_taken = [{name: seconds(runs[name]) for name in order} for order in orders]
    rows = []
    for what in dict.fromkeys(what for what, _ in runs):
        steps = NUM_STEPS if what == "a step in a loop" else 1
        by_patches = statistics.median(times[what, "patches"] for times in turns_taken) / steps
        cells = []
        for way in WAYS:
            if way != "patches":
                ratios = [times[what, way] / times[what, "patches"] for times in turns_taken]
                low, median, high = statistics.quantiles(ratios, n=4)
                cells.append(f"{median:.2f} ({low:.2f} to {high:.2f})")
        rows.append([f"{size}×{size}×1", str(batch_size), what, f"{1e3 * by_patches:.1f}", *cells])
    return rows


def sgd_step(loss_fn: Callable, params: Params, batch: Batch) -> Params:
    """Makes one step on the mean loss of a batch."""
    gradient = jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, (None, 0))(p, batch)))(params)
    return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)


def sgd_loop(step: Callable, params: Params, batches: Batch) -> Params:
    """Makes a step on each of several batches."""
    return jax.lax.scan(lambda p, batch: (step(p, batch), None), params, batches)[0]


def compile_with(convolve: Callable, function: Callable, *arguments: object) -> Callable:
    """Compiles a function of the network with one way to convolve."""
    with mock.patch.object(models, "convolve", convolve):
        return jax.jit(function).lower(*arguments).compile()


def seconds(run: Callable[[], object]) -> float:
    """Times one run."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
