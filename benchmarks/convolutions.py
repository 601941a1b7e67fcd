"""Times training steps of a small CNN with different ways to convolve, and prints a Markdown table.

    python -m benchmarks.convolutions

A step is a forward pass, a gradient and an SGD update. It is timed alone, and in a `lax.scan` over ten batches, as in a
training loop. The empirical Fisher of a batch is timed too. All ways take turns in one process. A ratio is the time of
a way divided by that of `convolve_by_patches` in the same turn, so that other load on the machine cancels. The table
has medians over the turns, with quartiles in brackets.
"""

import argparse
import functools
import operator
import statistics
from collections.abc import Callable, Sequence
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.timing import device, quartiles, take_turns, time_call
from lifelong_jax import empirical_fisher_diagonal, models
from lifelong_jax._tables import markdown_table
from lifelong_jax.losses import cross_entropy
from lifelong_jax.models import images
from lifelong_jax.types import Batch, Params

MODEL = models.CNN(features=(32, 64), num_outputs=10)
NUM_STEPS = 10


def convolve_by_lax_patches(image: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Convolves with patches from `lax.conv_general_dilated_patches`, which is itself a convolution."""
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


def main(given: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=11, help="number of turns")
    parser.add_argument("--sizes", type=int, nargs="+", default=[28, 8], help="height and width of the images")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128], help="examples per step")
    arguments = parser.parse_args(given)
    print(f"{device()}\n")
    header = ["images", "batch", "what", "patches, ms", *(f"{way}, times patches" for way in WAYS if way != "patches")]
    rows = []
    for size in arguments.sizes:
        for batch_size in arguments.batch_sizes:
            rows += measure(size, batch_size, arguments.turns)
    print(markdown_table(header, rows))


def measure(size: int, batch_size: int, turns: int) -> list[list[str]]:
    """Times all ways at one image size and batch size, and returns rows of the table."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.uniform(keys[0], (NUM_STEPS, batch_size, size, size, 1))
    labels = jax.random.randint(keys[1], (NUM_STEPS, batch_size), 0, 10)
    batches = Batch(inputs, labels, jnp.ones((NUM_STEPS, batch_size)))
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    params = models.init_network(MODEL, keys[2], inputs[0, 0])
    runs = {}
    for way, convolve in WAYS.items():
        # Each way has its own network function, because jit would reuse what it compiled for another way.
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
        time_call(run)  # the first call is slow
    seconds = take_turns(runs, turns)
    rows = []
    for what in dict.fromkeys(what for what, _ in runs):
        steps = NUM_STEPS if what == "a step in a loop" else 1
        by_patches = seconds[what, "patches"]
        ratios = [quartiles(map(operator.truediv, seconds[what, way], by_patches)) for way in WAYS if way != "patches"]
        milliseconds = 1e3 * statistics.median(by_patches) / steps
        rows.append([f"{size}×{size}×1", str(batch_size), what, f"{milliseconds:.1f}", *ratios])
    return rows


def sgd_step(loss_fn: Callable, params: Params, batch: Batch) -> Params:
    """Makes one step on the mean loss of a batch."""
    gradient = jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, (None, 0))(p, batch)))(params)
    return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)


def sgd_loop(step: Callable, params: Params, batches: Batch) -> Params:
    """Makes one step on each batch."""
    return jax.lax.scan(lambda p, batch: (step(p, batch), None), params, batches)[0]


def compile_with(convolve: Callable, function: Callable, *arguments: object) -> Callable:
    """Compiles a function of the network, with one way to convolve."""
    with mock.patch.object(images, "convolve", convolve):
        return jax.jit(function).lower(*arguments).compile()


if __name__ == "__main__":
    main()
