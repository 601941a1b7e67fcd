"""Times importances against an ordinary gradient over the same examples, and prints a Markdown table.

    python -m benchmarks.importance

The ordinary gradient is that of the summed loss, at the fastest of several batch sizes. All passes of a model take
turns in one process. A ratio is the time of a pass divided by that of the gradient in the same turn, so that other load
on the machine cancels; the table has medians over the turns. The structured and reference passes have the library's
default microbatch sizes (1 for the reference on a CPU). The reference is also timed with microbatches of 32 examples,
the usual `vmap(grad)`. Temporary memory is what the compiler reports (`memory_analysis`) for the structured empirical
Fisher, at N and at 4 N examples. It must not grow.
"""

import argparse
import functools
import operator
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import device, take_turns, time_call
from lifelong_jax import empirical_fisher_diagonal, fisher_diagonal, mas_importance
from lifelong_jax._tables import markdown_table
from lifelong_jax.models import MLP


class Cnn(nn.Module):
    """Two 3×3 convolutions, layer normalisation, and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps one image to logits."""
        for features in (16, 32):
            x = nn.avg_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), strides=(2, 2))
        return nn.Dense(10)(nn.LayerNorm()(x).ravel())


class Transformer(nn.Module):
    """A transformer with layer normalisation before each block; over tokens if it has a vocabulary, else over rows."""

    num_blocks: int
    width: int
    num_heads: int
    vocabulary_size: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps one sequence to logits."""
        x = nn.Dense(self.width)(x) if self.vocabulary_size is None else nn.Embed(self.vocabulary_size, self.width)(x)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape)
        for _ in range(self.num_blocks):
            x = x + nn.MultiHeadDotProductAttention(self.num_heads)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=0))


class Case(NamedTuple):
    """A model and its examples."""

    name: str
    model: nn.Module
    inputs: jax.Array
    batch_sizes: tuple[int, ...]  # tried for the ordinary gradient


def cases() -> list[Case]:
    """Lists the models of the table."""
    key = jax.random.key(0)
    return [
        Case("MLP 784-1000-1000-10", MLP((1000, 1000), 10), jax.random.normal(key, (2048, 784)), (64, 256, 512, 1024)),
        Case("CNN, two 3×3 convolutions", Cnn(), jax.random.normal(key, (256, 28, 28, 1)), (1, 8, 32, 64, 128)),
        Case(
            "transformer, 2 blocks of width 64, 28 tokens",
            Transformer(2, 64, 4),
            jax.random.normal(key, (512, 28, 28)),
            (1, 8, 32, 128),
        ),
        Case(
            "transformer, 4 blocks of width 256, 128 tokens",
            Transformer(4, 256, 4, vocabulary_size=1000),
            jax.random.randint(key, (32, 128), 0, 1000),
            (1, 4, 8, 16),
        ),
    ]


def gradient_pass(loss_fn: Callable, params: Any, examples: Any, batch_size: int) -> Any:
    """Computes the gradient of the loss summed over all examples, a batch at a time."""
    batches = jax.tree.map(lambda x: x.reshape(-1, batch_size, *x.shape[1:]), examples)

    def step(total: Any, batch: Any) -> tuple[Any, None]:
        gradient = jax.grad(lambda p: jnp.sum(jax.vmap(loss_fn, in_axes=(None, 0))(p, batch)))(params)
        return jax.tree.map(jnp.add, total, gradient), None

    return jax.lax.scan(step, jax.tree.map(jnp.zeros_like, params), batches)[0]


def temporary_mebibytes(loss_fn: Callable, params: Any, examples: Any) -> float:
    """Returns the memory that the structured pass takes in addition to its arguments and its result."""
    compiled = jax.jit(lambda p, e: empirical_fisher_diagonal(loss_fn, p, e)).lower(params, examples).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def measure(case: Case, rounds: int) -> list[str]:
    """Measures one model, and returns its row of the table."""
    params = case.model.init(jax.random.key(1), case.inputs[0])
    num_examples = case.inputs.shape[0]
    examples = (case.inputs, jax.random.randint(jax.random.key(2), (num_examples,), 0, 10))

    def logits_fn(params: Any, x: jax.Array) -> jax.Array:
        return case.model.apply(params, x)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits_fn(params, example[0]), example[1])

    gradients = {
        size: functools.partial(jax.jit(gradient_pass, static_argnums=(0, 3)), loss_fn, params, examples, size)
        for size in case.batch_sizes
    }
    for run in gradients.values():
        time_call(run)  # compiles
    batch_size = min(gradients, key=lambda size: min(time_call(gradients[size]) for _ in range(3)))

    passes: dict[tuple[str, str], Callable[[], Any]] = {}
    for method in ("structured", "reference"):
        passes["Fisher", method] = functools.partial(
            empirical_fisher_diagonal, loss_fn, params, examples, method=method
        )
        passes["MAS", method] = functools.partial(mas_importance, logits_fn, params, case.inputs, method=method)
    passes["Fisher", "microbatches"] = functools.partial(
        empirical_fisher_diagonal, loss_fn, params, examples, method="reference", microbatch_size=32
    )
    passes["exact Fisher", "structured"] = functools.partial(fisher_diagonal, logits_fn, params, case.inputs)
    for run in passes.values():
        time_call(run)  # compiles
    *others, gradient = take_turns(passes | {("gradient", ""): gradients[batch_size]}, rounds).values()
    ratios = {
        name: statistics.median(map(operator.truediv, seconds, gradient))
        for name, seconds in zip(passes, others, strict=True)
    }

    more = jax.tree.map(lambda x: jnp.concatenate([x] * 4), examples)
    memory = [temporary_mebibytes(loss_fn, params, few_or_more) for few_or_more in (examples, more)]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20
    return [
        case.name,
        f"{1000 * statistics.median(gradient) / num_examples:.2f} ms at {batch_size}",
        *(f"{ratios[name, 'structured']:.2f}" for name in ("Fisher", "MAS", "exact Fisher")),
        *(f"{ratios[name, 'reference']:.2f}" for name in ("Fisher", "MAS")),
        f"{ratios['Fisher', 'microbatches']:.2f}",
        f"{size:.1f}",
        f"{memory[0]:.1f}, {memory[1]:.1f}",
    ]


def main(given: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="number of turns of each model")
    parser.add_argument("--models", type=int, nargs="*", help="rows of the table, counted from 0; all by default")
    arguments = parser.parse_args(given)
    print(f"{device()}\n")
    header = (
        "model",
        "gradient per example, at batch size",
        "Fisher",
        "MAS",
        "exact Fisher, 10 classes",
        "Fisher, reference",
        "MAS, reference",
        "Fisher, vmap(grad) of 32",
        "parameters, MiB",
        "temporary MiB at N, 4 N",
    )
    chosen = [case for number, case in enumerate(cases()) if arguments.models is None or number in arguments.models]
    print(markdown_table(header, [measure(case, arguments.rounds) for case in chosen]))


if __name__ == "__main__":
    main()
