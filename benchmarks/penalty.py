"""Times a training step with the penalty against the step without, and prints Markdown tables.

    python benchmarks/penalty.py
    python benchmarks/penalty.py --methods

The first prints what the penalty costs, in each place; the second what the methods that gather their importance while
training cost, in a step with the penalty, and what the state that they keep takes in copies of the parameters.

MLP 784-1000-1000-10, batch 128, Adam. All steps take turns in one process, each next to a step without the penalty; a
ratio is the median over the turns of the one over the other, so that other load on the machine cancels. The second
table has the same network after K tasks: with one consolidation of them all, and with K stored penalties added to the
loss. Brackets hold the quartiles. A step without the penalty is timed against another such, too: what that ratio
differs from 1 by is noise.
"""

import argparse
import functools
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
    path_integral,
    proximal_adam,
    proximal_quadratic_penalty,
    quadratic_penalty,
    riemannian_walk,
)
from lifelong_jax.methods import cross_entropy
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
    parser.add_argument("--methods", action="store_true", help="time the methods that gather while training")
    arguments = parser.parse_args()
    time_methods(arguments.turns) if arguments.methods else time_penalties(arguments.turns, arguments.tasks)


def make_problem() -> tuple[Params, Batch]:
    """Draws parameters and a batch."""
    params_key, input_key = jax.random.split(jax.random.key(0))
    batch = Batch(jax.random.normal(input_key, (128, 784)), jnp.arange(128) % 10, jnp.ones(128))
    return MODEL.init(params_key, batch.inputs[0]), batch


def time_methods(turns: int) -> None:
    """Prints what si and rwalk cost per step, by interval, and what they keep."""
    params, batch = make_problem()
    last = make_task(params, jax.random.key(1))
    base = optax.chain(add_quadratic_penalty(1.0), optax.adam(LEARNING_RATE))
    intervals = [1, 10, 50]
    pipelines = {"none": base, "si": path_integral(base)}
    pipelines |= {f"rwalk, interval {count}": riemannian_walk(base, interval=count) for count in intervals}
    # As many steps to a time as the longest interval has, so that each has its share of the Fisher's cost.
    make_steps = functools.partial(
        Steps, params=params, batch=batch, stored=(), consolidation=last, repeats=max(intervals)
    )
    alone, everything = make_steps(base), {name: make_steps(optimizer) for name, optimizer in pipelines.items()}
    ratios, milliseconds = take_turns(alone, everything, turns)
    print(f"The step without: {milliseconds / max(intervals):.1f} ms\n")
    size = optax.tree.size(params)
    kept = {
        name: (optax.tree.size(optimizer.init(params)) - optax.tree.size(base.init(params))) / size
        for name, optimizer in pipelines.items()
    }
    rows = [[name, ratios[name], f"{kept[name]:.0f}"] for name in pipelines]
    print(markdown_table(["method", "times the step without", "copies of the parameters"], rows))


def time_penalties(turns: int, numbers_of_tasks: list[int]) -> None:
    """Prints what the penalty costs per step, by place and by number of tasks."""
    params, batch = make_problem()
    tasks = [make_task(params, key) for key in jax.random.split(jax.random.key(1), max(numbers_of_tasks))]
    kept = {count: consolidate_all(params, tasks[:count]) for count in numbers_of_tasks}
    last = kept[max(numbers_of_tasks)]

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
    one = {f"one {count}": Steps(pipelines["coupled"], params, batch, (), kept[count]) for count in numbers_of_tasks}
    stored = {
        f"stored {count}": Steps(optax.adam(LEARNING_RATE), params, batch, tasks[:count]) for count in numbers_of_tasks
    }

    none = {"none": Steps(optax.adam(LEARNING_RATE), params, batch, ())}
    ratios, milliseconds = take_turns(without, none | places | one | stored, turns)
    print(f"The step without: {milliseconds:.1f} ms\n")
    rows = [[name, ratios[name]] for name in none | places]
    print(markdown_table(["place of the penalty", "times the step without"], rows))
    header = ["tasks", "one consolidation", "stored penalties"]
    rows = [[str(count), ratios[f"one {count}"], ratios[f"stored {count}"]] for count in numbers_of_tasks]
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
        repeats: int = 1,
    ) -> None:
        """Compiles the step; the consolidation goes to the optimiser, stored ones to the loss; `repeats` are timed."""
        optimizer = optax.with_extra_args_support(optimizer)

        example_loss = cross_entropy(MODEL.apply)

        def loss_fn(params: Params, stored: list[Consolidation]) -> jax.Array:
            loss = jax.vmap(example_loss, in_axes=(None, 0))(params, batch).mean()
            return loss + sum(quadratic_penalty(params, task, 1.0) for task in stored)

        def step(params, opt_state, stored, consolidation):
            grads = jax.grad(loss_fn)(params, stored)
            extra_args = {"loss_fn": example_loss, "examples": batch}
            extra_args |= {} if consolidation is None else consolidation._asdict()
            updates, opt_state = optimizer.update(grads, opt_state, params, **extra_args)
            return optax.apply_updates(params, updates), opt_state

        params = jax.tree.map(jnp.copy, params)
        self.step: Callable = jax.jit(step, donate_argnums=(0, 1))
        self.state = (params, optimizer.init(params))
        self.constants = (stored, consolidation)
        self.repeats = repeats

    def seconds(self) -> float:
        """Makes as many steps as `repeats` says and returns how long they took."""
        start = time.perf_counter()
        for _ in range(self.repeats):
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
