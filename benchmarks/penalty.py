"""Times training steps with and without the penalty, and prints Markdown tables.

    python -m benchmarks.penalty
    python -m benchmarks.penalty --methods

The first command compares steps with the penalty, at each place in the pipeline, with a step without it. Its second
table has steps after K tasks: with one consolidation of all tasks, and with K stored penalties in the loss. Its third
has steps with a compressed consolidation: its anchor in bfloat16, its importance in bytes or in bfloat16. The second
command compares steps of the methods that gather their importance during training with a step with the penalty alone.
It also prints the size of their state, in copies of the parameters.

The network is an MLP 784-1000-1000-10, with batches of 128 and Adam. All steps take turns in one process, and each is
timed next to the step that it is compared with. A ratio is that of two such times, so that other load on the machine
cancels. The tables have medians over the turns, with quartiles in brackets. In the row "none", the step is compared
with itself: its distance from 1 is noise.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import quartiles, time_call
from lifelong_jax import (
    Batch,
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
from lifelong_jax._tables import markdown_table
from lifelong_jax.consolidation import compress_consolidation
from lifelong_jax.losses import cross_entropy
from lifelong_jax.models import MLP
from lifelong_jax.types import Params

LEARNING_RATE = 1e-3
MODEL = MLP((1000, 1000), 10)


def main(given: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=41, help="number of turns")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 5, 10], help="numbers of tasks, K")
    parser.add_argument("--methods", action="store_true", help="time methods that gather importances in training")
    arguments = parser.parse_args(given)
    time_methods(arguments.turns) if arguments.methods else time_penalties(arguments.turns, arguments.tasks)


def make_problem() -> tuple[Params, Batch]:
    """Draws parameters and a batch."""
    params_key, input_key = jax.random.split(jax.random.key(0))
    batch = Batch(jax.random.normal(input_key, (128, 784)), jnp.arange(128) % 10, jnp.ones(128))
    return MODEL.init(params_key, batch.inputs[0]), batch


def time_methods(turns: int) -> None:
    """Prints the cost per step of si, and of rwalk at several intervals, and the size of their state."""
    params, batch = make_problem()
    last = make_task(params, jax.random.key(1))
    base = optax.chain(add_quadratic_penalty(1.0), optax.adam(LEARNING_RATE))
    intervals = [1, 10, 50]
    pipelines = {"none": base, "si": path_integral(base)}
    pipelines |= {f"rwalk, interval {count}": riemannian_walk(base, interval=count) for count in intervals}
    # Each timing makes as many steps as the longest interval, so that it includes the Fisher of each interval.
    make_steps = functools.partial(
        Steps, params=params, batch=batch, stored=(), consolidation=last, repeats=max(intervals)
    )
    alone, everything = make_steps(base), {name: make_steps(optimizer) for name, optimizer in pipelines.items()}
    ratios, milliseconds = compare(alone, everything, turns)
    print(f"The step with the penalty alone: {milliseconds / max(intervals):.1f} ms\n")
    size = optax.tree.size(params)
    kept = {
        name: (optax.tree.size(optimizer.init(params)) - optax.tree.size(base.init(params))) / size
        for name, optimizer in pipelines.items()
    }
    rows = [[name, ratios[name], f"{kept[name]:.0f}"] for name in pipelines]
    print(markdown_table(["method", "times the step without", "copies of the parameters"], rows))


def time_penalties(turns: int, numbers_of_tasks: list[int]) -> None:
    """Prints the cost of the penalty per step, by its place and by the number of tasks."""
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

    compressed = {
        storage: Steps(pipelines["coupled"], params, batch, (), compress_consolidation(last, importance=storage))
        for storage in ("uint8", "bfloat16")
    }
    none = {"none": Steps(optax.adam(LEARNING_RATE), params, batch, ())}
    ratios, milliseconds = compare(without, none | places | one | stored | compressed, turns)
    print(f"The step without the penalty: {milliseconds:.1f} ms\n")
    rows = [[name, ratios[name]] for name in none | places]
    print(markdown_table(["place of the penalty", "times the step without"], rows))
    header = ["tasks", "one consolidation", "stored penalties"]
    rows = [[str(count), ratios[f"one {count}"], ratios[f"stored {count}"]] for count in numbers_of_tasks]
    print(markdown_table(header, rows))
    rows = [[name, ratios[name]] for name in ("coupled", *compressed)]
    print(markdown_table(["storage of the importance", "times the step without"], rows))


class Steps:
    """Training steps with one pipeline, each from the state that the last one left."""

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        params: Params,
        batch: Batch,
        stored: list[Consolidation] | tuple[()],
        consolidation: Consolidation | None = None,
        repeats: int = 1,
    ) -> None:
        """Makes the step. The optimiser gets `consolidation`, the loss has a penalty for each of `stored`."""
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
        """Times `repeats` steps."""
        return time_call(self._make_steps)

    def _make_steps(self) -> None:
        for _ in range(self.repeats):
            self.state = jax.block_until_ready(self.step(*self.state, *self.constants))


def compare(reference: Steps, others: dict[str, Steps], turns: int) -> tuple[dict[str, str], float]:
    """Times each next to the reference in each turn. Returns the ratios, and the reference's milliseconds."""
    for steps in (reference, *others.values()):
        steps.seconds()  # compiles
    of_reference, ratios = [], {name: [] for name in others}
    for turn in range(turns):
        for name, steps in others.items():
            pair = (reference, steps) if turn % 2 else (steps, reference)
            seconds = {id(each): each.seconds() for each in pair}
            of_reference.append(seconds[id(reference)])
            ratios[name].append(seconds[id(steps)] / seconds[id(reference)])
    return {name: quartiles(values) for name, values in ratios.items()}, 1e3 * statistics.median(of_reference)


def make_task(params: Params, key: jax.Array) -> Consolidation:
    """Draws an anchor and an importance of one task."""
    anchor = jax.tree.map(lambda p: p + 0.01 * jax.random.normal(key, p.shape), params)
    return Consolidation(anchor, jax.tree.map(lambda p: jax.random.exponential(key, p.shape), params))


def consolidate_all(params: Params, tasks: list[Consolidation]) -> Consolidation:
    """Makes one consolidation of all tasks."""
    kept = init_consolidation(params)
    for task in tasks:
        kept = consolidate(kept, *task)
    return kept


if __name__ == "__main__":
    main()
