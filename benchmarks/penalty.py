"""Times a training step with the penalty against the step without, and prints Markdown tables.

    python benchmarks/penalty.py

MLP 784-1000-1000-10, batch 128, Adam. All steps take turns in one process, each next to a step without the penalty; a
ratio is the median over the turns of the one over the other, so that other load on the machine cancels. The second
table has the same network after K tasks: with one consolidation of them all, and with K stored penalties added to the
loss. Brackets hold the quartiles. A step without the penalty is timed against another such, too: what that ratio
differs from 1 by is noise.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lifelong_jax import (
    Consolidation,
    add_quadratic_penalty,
    consolidate,
    init_consolidation,
    proximal_adam,
    proximal_quadratic_penalty,
    quadratic_penalty,
)
from lifelong_jax.models import MLP
from lifelong_jax.runs import markdown_table
from lifelong_jax.types import Batch, Params

LEARNING_RATE = 1e-3
MODEL = MLP((1000, 1000), 10)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=41, help="turns that each step takes")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 5, 10], help="numbers of tasks K")
    arguments = parser.parse_args()
    params_key, input_key, *task_keys = jax.random.split(jax.random.key(0), 2 + max(arguments.tasks))
    batch = Batch(jax.random.normal(input_key, (128, 784)), jnp.arange(128) % 10, jnp.ones(128))
    params = MODEL.init(params_key, batch.inputs[0])
    tasks = [make_task(params, key) for key in task_keys]
    kept = {count: consolidate_all(params, tasks[:count]) for count in arguments.tasks}
    last = kept[max(arguments.tasks)]

    without = Steps(optax.adam(LEARNING_RATE), params, batch, ())
    pipelines = {
        "coupled": optax.chain(add_quadratic_penalty(1.0), optax.adam(LEARNING_RATE)),
        "decoupled": optax.chain(
            optax.scale_by_adam(), add_quadratic_penalty(1.0), optax.scale_by_learning_rate(LEARNING_RATE)
        ),
        "proximal": optax.chain(optax.adam(LEARNING_RATE), proximal_quadratic_penalty(LEARNING_RATE, 1.0)),
        "proximal_adam": proximal_adam(LEARNING_RATE, 1.0),
    }
    places = {name: Steps(optimizer, params, batch, (), last) for name, optimizer in pipelines.items()}
    one = {f"one {count}": Steps(pipelines["coupled"], params, batch, (), kept[count]) for count in arguments.tasks}
    stored = {
        f"stored {count}": Steps(optax.adam(LEARNING_RATE), params, batch, tasks[:count]) for count in arguments.tasks
    }

    none = {"none": Steps(optax.adam(LEARNING_RATE), params, batch, ())}
    ratios, milliseconds = take_turns(without, none | places | one | stored, arguments.turns)
    print(f"The step without: {milliseconds:.1f} ms\n")
    rows = [[name, ratios[name]] for name in none | places]
    print(markdown_table(["place of the penalty", "times the step without"], rows))
    header = ["tasks", "one consolidation", "stored penalties"]
    rows = [[str(count), ratios[f"one {count}"], ratios[f"stored {count}"]] for count in arguments.tasks]
    print(markdown_table(header, rows))


class Steps:
    """Training steps by one pipeline, from one state to the next."""

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        params: Params,
        batch: Batch,
        stored: list[Consolidation] | tuple[()],
        consolidation: Consolidation | None = None,
    ) -> None:
        """Compiles the step; the consolidation goes to the optimiser, stored ones to the loss."""
        optimizer = optax.with_extra_args_support(optimizer)

        def loss_fn(params: Params, stored: list[Consolidation]) -> jax.Array:
            logits = jax.vmap(MODEL.apply, in_axes=(None, 0))(params, batch.inputs)
            loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
            return loss + sum(quadratic_penalty(params, task, 1.0) for task in stored)

        def step(params, opt_state, stored, consolidation):
            grads = jax.grad(loss_fn)(params, stored)
            extra_args = {} if consolidation is None else consolidation._asdict()
            updates, opt_state = optimizer.update(grads, opt_state, params, **extra_args)
            return optax.apply_updates(params, updates), opt_state

        params = jax.tree.map(jnp.copy, params)
        self.step: Callable = jax.jit(step, donate_argnums=(0, 1))
        self.state = (params, optimizer.init(params))
        self.constants = (stored, consolidation)

    def seconds(self) -> float:
        """Makes a step and returns how long it took."""
        start = time.perf_counter()
        self.state = jax.block_until_ready(self.step(*self.state, *self.constants))
        return time.perf_counter() - start


def take_turns(without: Steps, everything: dict[str, Steps], turns: int) -> tuple[dict[str, str], float]:
    """Times each next to the step without, in each turn; returns the ratios, and the step without in milliseconds."""
    for steps in (without, *everything.values()):
        steps.seconds()  # compiles
    reference, ratios = [], {name: [] for name in everything}
    for turn in range(turns):
        for name, steps in everything.items():
            pair = (without, steps) if turn % 2 else (steps, without)
            seconds = {id(each): each.seconds() for each in pair}
            reference.append(seconds[id(without)])
            ratios[name].append(seconds[id(steps)] / seconds[id(without)])
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in ratios.items()}
    texts = {name: f"{median:.2f} ({low:.2f} to {high:.2f})" for name, (low, median, high) in quartiles.items()}
    return texts, 1e3 * statistics.median(reference)


def make_task(params: Params, key: jax.Array) -> Consolidation:
    """Draws the anchor and the importance of one task."""
    anchor = jax.tree.map(lambda p: p + 0.01 * jax.random.normal(key, p.shape), params)
    return Consolidation(anchor, jax.tree.map(lambda p: jax.random.exponential(key, p.shape), params))


def consolidate_all(params: Params, tasks: list[Consolidation]) -> Consolidation:
    """Makes one consolidation of all."""
    kept = init_consolidation(params)
    for task in tasks:
        kept = consolidate(kept, *task)
    return kept


if __name__ == "__main__":
    main()
