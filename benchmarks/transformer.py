"""Times Fisher diagonals of a GPT against its ordinary gradient, and asks the compiler what they hold in memory.

    python -m benchmarks.transformer             # a GPT of 10 million parameters, 256 tokens, 1,000 classes
    python -m benchmarks.transformer --steps     # its training steps, with the penalty and without
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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import device, quartiles, take_turns, time_call
from lifelong_jax import (
    Consolidation,
    add_quadratic_penalty,
    empirical_fisher_diagonal,
    fisher_diagonal,
    proximal_adam,
)
from lifelong_jax._tables import markdown_table
from lifelong_jax.consolidation import compress_consolidation
from lifelong_jax.models import TransformerConfig, transformer_functions


def sizes_of(*, large: bool, tied: bool) -> TransformerConfig:
    """Returns the sizes of a GPT: of 10 million parameters, or of 10⁹."""
    if large:
        return TransformerConfig(50_257, 2048, num_layers=16, num_heads=16, width=2048, tied=tied, remat=True)
    return TransformerConfig(1000, 256, num_layers=6, num_heads=6, width=384, tied=tied, remat=True)


def functions_of(sizes: TransformerConfig) -> tuple[Callable, Callable, Callable]:
    """Makes `init_fn(key)`, and `logits` and `losses` of `(params, sequence)`, of `max_length + 1` tokens."""
    init_fn, apply_fn = transformer_functions(sizes)

    def logits(params: Any, sequence: jax.Array) -> jax.Array:
        return apply_fn(params, sequence[:-1])

    def losses(params: Any, sequence: jax.Array) -> jax.Array:
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, sequence), sequence[1:])

    return init_fn, logits, losses


def passes(sizes: TransformerConfig) -> dict[str, Callable[[Any, jax.Array], Any]]:
    """Makes the passes over sequences: the ordinary gradient last."""
    _, logits, losses = functions_of(sizes)
    key = jax.random.key(0)

    def sampled(params: Any, sequences: jax.Array) -> Any:
        return fisher_diagonal(logits, params, sequences, num_samples=1, key=key)

    def empirical(params: Any, sequences: jax.Array) -> Any:
        return empirical_fisher_diagonal(losses, params, sequences, num_samples=1, key=key)

    def gradient(params: Any, sequences: jax.Array) -> Any:
        def add(total: Any, sequence: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient_of_one(sizes)(params, sequence)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), sequences)[0]

    return {"empirical": empirical, "sampled": sampled, "gradient": gradient}


def gradient_of_one(sizes: TransformerConfig) -> Callable[[Any, jax.Array], Any]:
    """Makes the ordinary gradient of one sequence's loss."""
    _, _, losses = functions_of(sizes)
    return jax.grad(lambda params, sequence: jnp.sum(losses(params, sequence)))


def steps(params: Any, importance: Any) -> dict[str, tuple[Any, Consolidation]]:
    """Makes the optimisers of a training step: with the penalty, stored in several ways, and without."""
    consolidation = Consolidation(params, importance)
    compressed = compress_consolidation(consolidation)
    return {
        "penalty": (proximal_adam(1e-4, 10.0), consolidation),
        "penalty, 1 byte": (proximal_adam(1e-4, 10.0), compressed),
        "coupled": (optax.chain(add_quadratic_penalty(10.0), optax.adam(1e-4)), consolidation),
        "adam": (optax.adam(1e-4), Consolidation(None, None)),
    }


def time_steps(sizes: TransformerConfig, num_sequences: int, rounds: int) -> list[str]:
    """Times training steps, and returns a row of the table: ratios to a step of Adam without a penalty."""
    init_fn, _, losses = functions_of(sizes)
    params = init_fn(jax.random.key(1))
    sequences = draw_sequences(sizes, num_sequences)

    def mean_loss(params: Any) -> jax.Array:
        return jnp.mean(jax.vmap(losses, in_axes=(None, 0))(params, sequences))

    def make(optimizer: Any, consolidation: Consolidation) -> Callable[[], Any]:
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, consolidation: Consolidation) -> Any:
            grads = jax.grad(mean_loss)(params)
            extra = consolidation._asdict() if consolidation.anchor is not None else {}
            updates, state = optimizer.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        held = [jax.tree.map(jnp.copy, params), optimizer.init(params)]

        def run() -> Any:
            held[:] = step(*held, consolidation)
            return held[0]

        return run

    ones = jax.tree.map(jnp.ones_like, params)
    runs = {name: make(*of) for name, of in steps(params, ones).items()}
    for run in runs.values():
        time_call(run)  # compiles
    seconds = take_turns(runs, rounds)
    plain = seconds.pop("adam")
    ratios = [quartiles(map(operator.truediv, times, plain)) for times in seconds.values()]
    return ["tied" if sizes.tied else "untied", quartiles([1000 * s for s in plain], 0), *ratios]


def draw_sequences(sizes: TransformerConfig, num_sequences: int) -> jax.Array:
    """Draws sequences of random tokens."""
    shape = (num_sequences, sizes.max_length + 1)
    return jax.random.randint(jax.random.key(2), shape, 0, sizes.vocab_size)


def time_passes(sizes: TransformerConfig, num_sequences: int, rounds: int) -> list[str]:
    """Times the passes, and returns a row of the table."""
    init_fn, _, _ = functions_of(sizes)
    params = init_fn(jax.random.key(1))
    sequences = draw_sequences(sizes, num_sequences)
    runs = {name: functools.partial(jax.jit(run), params, sequences) for name, run in passes(sizes).items()}
    for run in runs.values():
        time_call(run)  # compiles
    seconds = take_turns(runs, rounds)
    gradient = seconds.pop("gradient")
    ratios = [quartiles(map(operator.truediv, times, gradient)) for times in seconds.values()]
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    row = ["tied" if sizes.tied else "untied", f"{size:.1f} M", str(sizes.max_length)]
    return [*row, quartiles([1000 * s / num_sequences for s in gradient], 0), *ratios]


def memory_of_passes(sizes: TransformerConfig) -> list[str]:
    """Compiles the passes, and returns a row of the table, in MiB."""
    params = jax.eval_shape(functions_of(sizes)[0], jax.random.key(0))
    sequences = jax.ShapeDtypeStruct((2, sizes.max_length + 1), jnp.int32)

    def temporary(run: Callable) -> str:
        memory = jax.jit(run).lower(params, sequences).compile().memory_analysis()
        return f"{memory.temp_size_in_bytes / 2**20:,.0f}"

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    of_one = {"gradient": lambda params, sequences: gradient_of_one(sizes)(params, sequences[0])}
    held = [temporary(run) for run in (passes(sizes) | of_one).values()]
    row = ["tied" if sizes.tied else "untied", f"{size / 1e6:,.0f} M", f"{4 * size / 2**20:,.0f}"]
    return [*row, f"{4 * sizes.max_length * sizes.vocab_size / 2**20:,.0f}", held[-1], *held[:-1]]


def main(given: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="compile the large one, and run nothing")
    parser.add_argument("--steps", action="store_true", help="time training steps with and without the penalty")
    parser.add_argument("--rounds", type=int, default=9, help="number of turns")
    arguments = parser.parse_args(given)
    print(f"{device()}\n")
    sizes = [sizes_of(large=arguments.memory, tied=tied) for tied in (False, True)]
    names = ["empirical", "sampled"]
    if arguments.memory:
        header = ["table", "parameters", "in float32, MiB", "logits, MiB", "gradient", *names]
        rows = map(memory_of_passes, sizes)
    elif arguments.steps:
        header = ["table", "adam, ms a step", "proximal_adam", "the same, 1 byte", "coupled"]
        rows = (time_steps(of, 4, arguments.rounds) for of in sizes)
    else:
        header = ["table", "parameters", "tokens", "gradient, ms a sequence", *names]
        rows = (time_passes(of, 4, arguments.rounds) for of in sizes)
    print(markdown_table(header, list(rows)))


if __name__ == "__main__":
    main()
