"""Times Fisher diagonals of a GPT against its ordinary gradient, and asks the compiler what they hold in memory.

    python -m benchmarks.transformer             # a GPT of 10 million parameters, 256 tokens, 1,000 classes
    python -m benchmarks.transformer --memory    # one of 10⁹ parameters, 2,048 tokens, 50,257 classes: compiled only

Every pass goes over the same sequences, one at a time. All passes take turns in one process, and a ratio is that of
times in the same turn, so that other load on the machine cancels; the tables have medians with quartiles. Temporary
memory is what the compiler reports (`memory_analysis`): without parameters, sequences and the result. The gradient is
that of one sequence there; a Fisher needs one tree in float32 more, to add up. `empirical` has the losses of the tokens
with random signs; `sampled` one label per token, drawn from the model. "tied" says that the table of embeddings is the
last layer's weight too.
"""

import argparse
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.timing import device, quartiles, take_turns, time_call
from lifelong_jax import empirical_fisher_diagonal, fisher_diagonal
from lifelong_jax._tables import markdown_table


class Gpt(NamedTuple):
    """A causal transformer; its layers are a scan with remat."""

    num_layers: int
    width: int
    num_heads: int
    num_tokens: int
    num_classes: int
    tied: bool

    def shapes(self) -> Any:
        """Returns the shapes of the parameters."""
        layers, width = self.num_layers, self.width
        stacked = {
            "scale1": (width,),
            "qkv": (width, 3 * width),
            "out": (width, width),
            "scale2": (width,),
            "up": (width, 4 * width),
            "up_bias": (4 * width,),
            "down": (4 * width, width),
            "down_bias": (width,),
        }
        shapes = {name: (layers, *shape) for name, shape in stacked.items()}
        shapes |= {"table": (self.num_classes, width), "positions": (self.num_tokens, width), "scale": (width,)}
        if not self.tied:
            shapes["head"] = (width, self.num_classes)
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def init(self, key: jax.Array) -> Any:
        """Draws parameters."""
        shapes = self.shapes()
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        return {name: 0.05 * jax.random.normal(keys[name], shape.shape, shape.dtype) for name, shape in shapes.items()}

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Maps a sequence, `[num_tokens]`, to logits, `[num_tokens, num_classes]`."""
        names = ("scale1", "qkv", "out", "scale2", "up", "up_bias", "down", "down_bias")
        x = params["table"][tokens] + params["positions"]
        block = functools.partial(jax.checkpoint, prevent_cse=False)(self._block)
        x, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), x, {name: params[name] for name in names})
        return _norm(x) * params["scale"] @ (params["table"].T if self.tied else params["head"])

    def _block(self, layer: Any, x: jax.Array) -> jax.Array:
        heads = (_norm(x) * (1 + layer["scale1"]) @ layer["qkv"]).reshape(len(x), self.num_heads, 3, -1)
        query, key, value = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
        attended = jax.nn.dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
        x = x + attended.reshape(x.shape) @ layer["out"]
        hidden = jax.nn.gelu(_norm(x) * (1 + layer["scale2"]) @ layer["up"] + layer["up_bias"])
        return x + hidden @ layer["down"] + layer["down_bias"]

    def losses(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Computes −log p of each next token of `[num_tokens + 1]`."""
        logits = self.logits(params, tokens[:-1])
        of_labels = jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - of_labels

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Computes the loss of a sequence."""
        return jnp.sum(self.losses(params, tokens))


def _norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def passes(gpt: Gpt) -> dict[str, Callable[[Any, jax.Array], Any]]:
    """Makes the passes over sequences: the ordinary gradient last."""
    key = jax.random.key(0)

    def sampled(params: Any, sequences: jax.Array) -> Any:
        return fisher_diagonal(gpt.logits, params, sequences[:, :-1], num_samples=1, key=key)

    def empirical(params: Any, sequences: jax.Array) -> Any:
        return empirical_fisher_diagonal(gpt.losses, params, sequences, num_samples=1, key=key)

    def gradient(params: Any, sequences: jax.Array) -> Any:
        def add(total: Any, sequence: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.grad(gpt.loss)(params, sequence)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), sequences)[0]

    return {
        "empirical": empirical,
        "sampled": sampled,
        "gradient": gradient,
    }


def time_passes(gpt: Gpt, num_sequences: int, rounds: int) -> list[str]:
    """Times the passes, and returns a row of the table."""
    params = gpt.init(jax.random.key(1))
    shape = (num_sequences, gpt.num_tokens + 1)
    sequences = jax.random.randint(jax.random.key(2), shape, 0, gpt.num_classes)
    runs = {name: functools.partial(jax.jit(run), params, sequences) for name, run in passes(gpt).items()}
    for run in runs.values():
        time_call(run)  # compiles
    seconds = take_turns(runs, rounds)
    gradient = seconds.pop("gradient")
    ratios = [quartiles(map(operator.truediv, times, gradient)) for times in seconds.values()]
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    row = ["tied" if gpt.tied else "untied", f"{size:.1f} M", str(gpt.num_tokens)]
    return [*row, quartiles([1000 * s / num_sequences for s in gradient], 0), *ratios]


def memory_of_passes(gpt: Gpt) -> list[str]:
    """Compiles the passes, and returns a row of the table, in MiB."""
    params = gpt.shapes()
    sequences = jax.ShapeDtypeStruct((2, gpt.num_tokens + 1), jnp.int32)

    def temporary(run: Callable) -> str:
        memory = jax.jit(run).lower(params, sequences).compile().memory_analysis()
        return f"{memory.temp_size_in_bytes / 2**20:,.0f}"

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    of_one = {"gradient": lambda params, sequences: jax.grad(gpt.loss)(params, sequences[0])}
    held = [temporary(run) for run in (passes(gpt) | of_one).values()]
    row = ["tied" if gpt.tied else "untied", f"{size / 1e6:,.0f} M", f"{4 * size / 2**20:,.0f}"]
    return [*row, f"{4 * gpt.num_tokens * gpt.num_classes / 2**20:,.0f}", held[-1], *held[:-1]]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="compile the large one, and run nothing")
    parser.add_argument("--rounds", type=int, default=9, help="number of turns")
    arguments = parser.parse_args()
    print(f"{device()}\n")
    names = list(passes(Gpt(1, 1, 1, 1, 2, True)))[:-1]
    if arguments.memory:
        header = ["table", "parameters", "in float32, MiB", "logits, MiB", "gradient", *names]
        gpts = [Gpt(16, 2048, 16, 2048, 50257, tied) for tied in (False, True)]
        print(markdown_table(header, list(map(memory_of_passes, gpts))))
        return
    header = ["table", "parameters", "tokens", "gradient, ms a sequence", *names]
    gpts = [Gpt(6, 384, 6, 256, 1000, tied) for tied in (False, True)]
    print(markdown_table(header, [time_passes(gpt, 4, arguments.rounds) for gpt in gpts]))


if __name__ == "__main__":
    main()
