"""Times each workaround for XLA in `lifelong_jax/_numerics.py` against the same program without it.

    python -m benchmarks.xla

Each program and its copy without the workaround take turns in one process. A ratio is the time with the workaround
divided by the time without it in the same turn, so that other load on the machine cancels. The Markdown table has
medians over the turns, with quartiles in brackets. If a ratio is not below 1, XLA no longer needs the workaround.

The network is an MLP 784-1000-1000-10, or a transformer of 4 blocks (width 256, 128 tokens). Training steps have
batches of 128. The workarounds are for CPUs.
"""

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from benchmarks.importance import Transformer
from benchmarks.timing import device, quartiles, take_turns
from lifelong_jax import Batch, Consolidation, add_quadratic_penalty, empirical_fisher_diagonal, learn_task
from lifelong_jax._tables import markdown_table
from lifelong_jax.losses import cross_entropy
from lifelong_jax.models import MLP, init_network
from lifelong_jax.tasks import permute_features, with_permutation
from lifelong_jax.training import init_training
from lifelong_jax.types import Params

MODEL = MLP((1000, 1000), 10)
NUM_STEPS, BATCH_SIZE = 10, 128


class Case(NamedTuple):
    """A program that uses a workaround.

    Attributes:
      workaround: the workaround's name.
      module: the module of the library that uses it.
      program: a description of the program.
      make: makes a function that runs the program.
    """

    workaround: str
    module: str
    program: str
    make: Callable[[], Callable[[], object]]


WITHOUT = {
    "update_after_reads": lambda updates, grads: updates,
    "compute_once": lambda value, update: value,
    "indices_per_example": lambda indices, x: indices,
    "unbatched": jax.vmap,
}


def cases() -> list[Case]:
    """Lists the rows of the table."""
    adam = optax.adam(1e-3)
    coupled = optax.chain(add_quadratic_penalty(1.0), adam)
    rows = [
        ("update_after_reads", "training", f"{NUM_STEPS} steps with Adam", make_training, adam),
        ("compute_once", "penalty", f"{NUM_STEPS} steps with Adam and penalty", make_training, coupled),
        ("indices_per_example", "tasks", "permutation of 10,000 inputs", make_permutation, 10_000),
        ("indices_per_example", "tasks", "empirical Fisher of 2,048 permuted inputs", make_permuted_fisher, 2048),
        ("unbatched", "importance.reference", "transformer, Fisher one by one, reference", make_fisher, "reference"),
        ("unbatched", "importance.structured", "transformer, Fisher one by one, structured", make_fisher, "structured"),
    ]
    return [Case(*names, functools.partial(make, argument)) for *names, make, argument in rows]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=21, help="number of turns")
    arguments = parser.parse_args()
    print(f"{device()}\n")
    header = ["workaround", "program", "without, ms", "with / without"]
    print(markdown_table(header, [measure(case, arguments.turns) for case in cases()], num_text_columns=2))


def measure(case: Case, turns: int) -> list[str]:
    """Times a program with and without its workaround, and returns a row of the table."""
    runs = {"with": case.make()}
    jax.block_until_ready(runs["with"]())  # compiles
    with mock.patch(f"lifelong_jax.{case.module}.{case.workaround}", WITHOUT[case.workaround]):
        runs["without"] = case.make()
        jax.block_until_ready(runs["without"]())
    seconds = take_turns(runs, turns)
    ratios = [ours / theirs for ours, theirs in zip(seconds["with"], seconds["without"], strict=True)]
    milliseconds = quartiles((1e3 * value for value in seconds["without"]), digits=1)
    return [f"`{case.workaround}`", case.program, milliseconds, quartiles(ratios)]


def make_data(num_examples: int) -> tuple[Params, Batch, jax.Array]:
    """Draws parameters, examples and a permutation of the features."""
    keys = jax.random.split(jax.random.key(0), 3)
    batch = Batch(
        jax.random.normal(keys[0], (num_examples, 784)), jnp.arange(num_examples) % 10, jnp.ones(num_examples)
    )
    return init_network(MODEL, keys[1], batch.inputs[0]), batch, jax.random.permutation(keys[2], 784)


def make_training(optimizer: optax.GradientTransformation) -> Callable[[], object]:
    """Makes a function that goes on training for an epoch of `NUM_STEPS` steps."""
    params, batch, _ = make_data(NUM_STEPS * BATCH_SIZE)
    consolidation = Consolidation(*(jax.tree.map(lambda p, c=c: p + c, params) for c in (0.01, 1.0)))
    # A new function in each call, here and below: jit would reuse what it has compiled for the same function.
    learn = functools.partial(learn_task, cross_entropy(lambda params, x: MODEL.apply(params, x)), optimizer)
    learn = jax.jit(functools.partial(learn, num_epochs=1, batch_size=BATCH_SIZE), donate_argnums=0)
    state = init_training(optimizer, params, jax.random.key(1))

    def run() -> object:
        nonlocal state
        state, _ = learn(state, consolidation, batch)
        return state

    return run


def make_permutation(num_examples: int) -> Callable[[], object]:
    """Makes a function that permutes the features of all inputs."""
    _, batch, permutation = make_data(num_examples)
    permute = jax.jit(jax.vmap(lambda x, permutation: permute_features(x, permutation), (0, None)))
    return lambda: permute(batch.inputs, permutation)


def make_permuted_fisher(num_examples: int) -> Callable[[], object]:
    """Makes a function that computes the empirical Fisher diagonal of permuted inputs."""
    params, batch, permutation = make_data(num_examples)

    def fisher(params: Params, batch: Batch, permutation: jax.Array) -> Params:
        apply_fn = with_permutation(lambda params, x: MODEL.apply(params, x), permutation)
        return empirical_fisher_diagonal(cross_entropy(apply_fn), params, batch)

    return functools.partial(jax.jit(fisher), params, batch, permutation)


def make_fisher(method: str) -> Callable[[], object]:
    """Makes a function that computes the empirical Fisher diagonal of a transformer on 8 sequences, one by one."""
    model = Transformer(4, 256, 4, vocabulary_size=1000)
    tokens = jax.random.randint(jax.random.key(0), (8, 128), 0, 1000)
    params = model.init(jax.random.key(1), tokens[0])

    def loss_fn(params: Params, tokens: jax.Array) -> jax.Array:
        return -jax.nn.log_softmax(model.apply(params, tokens))[0]

    return lambda: empirical_fisher_diagonal(loss_fn, params, tokens, method=method, microbatch_size=1)


if __name__ == "__main__":
    main()
