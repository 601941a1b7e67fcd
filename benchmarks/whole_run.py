"""Measures a whole run of permuted MNIST, part by part, and the machine's floor, and prints Markdown tables.

    python -m benchmarks.whole_run

The run has five permuted tasks, an MLP 784-1000-1000-10, one epoch per task, batches of 128, Adam with the proximal
penalty, and EWC with the Fisher of all 60,000 examples of each task: exact, as in `ewc()`, or at the true labels, by
`--fisher empirical`. One way is `learn_tasks`, a loop on the host, whose parts are timed. The other is `learn_sweep`,
one program, whose compilation is timed apart. Each turn makes the run in both ways, with compilation, and times the
floors. Imports and the decoding of the data are left out: loading is from the cache.

The floor has only the matrix products of the run (see `benchmarks/floor.py`): of every training step; of the Fisher,
with nine backward passes per example, or one if it is empirical; and of the test images of all tasks so far, after each
task. The practical floor adds the memory traffic of Adam: its update alone, with the proximal step, for every step. In
each turn the floors are timed before, between and after the runs, and the median of these times counts. Seconds, and
ratios of a run to the floor in the same turn, are medians over the turns, with quartiles.
"""

import argparse
import functools
import itertools
import operator
import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import floor
from benchmarks.timing import CompilationClock, load_part, quartiles, time_call, timed
from lifelong_jax import (
    Recipe,
    SweepRun,
    continual,
    learn_sweep,
    learn_tasks,
    methods,
    permuted_tasks,
    proximal_adam,
)
from lifelong_jax._tables import markdown_table
from lifelong_jax.methods import Method
from lifelong_jax.metrics import average_accuracy
from lifelong_jax.models import MLP, init_network

SIZES = (784, 1000, 1000, 10)
MODEL = MLP(SIZES[1:-1], SIZES[-1])
NUM_TASKS = 5
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
STRENGTH = 300.0  # on validation data, 100 and 1,000 were the best of 10 to 100,000, with a third of the examples
PARTS = ("training", "importance", "evaluation")


def optimizer_fn(strength: jax.Array) -> optax.GradientTransformation:
    """Makes Adam with the proximal penalty."""
    return proximal_adam(LEARNING_RATE, strength)


RECIPE = Recipe(MODEL.apply, optimizer_fn, num_epochs=1, batch_size=BATCH_SIZE)


def main(given: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="number of turns")
    parser.add_argument(
        "--examples", type=int, help="training examples; test examples are a sixth of that; all by default"
    )
    parser.add_argument("--data", choices=("mnist", "random"), default="mnist", help="or random images of its size")
    parser.add_argument("--fisher", choices=("exact", "empirical"), default="exact")
    arguments = parser.parse_args(given)
    method = methods.ewc(arguments.fisher)
    load = functools.partial(start, arguments.data, arguments.examples)
    run = load()  # fills the cache of decoded data
    num_train, num_test = (len(batch.labels) for batch in (run.tasks[0].train, run.tasks[0].test))
    clock = CompilationClock()
    print(floor.machine())
    floors, update = find_floors(num_train, num_test, arguments.fisher), PenalisedAdam()
    updates = NUM_TASKS * -(-num_train // BATCH_SIZE)
    ways = {"learn_tasks": learn_by_host, "learn_sweep": learn_as_program}
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    bare: list[dict[str, float]] = []

    def time_floors() -> dict[str, float]:
        seconds = {part: NUM_TASKS * floor_of_task.seconds() for part, floor_of_task in floors.items()}
        return seconds | {"updates": updates * update.seconds()}

    for turn in range(arguments.turns):
        times = [time_floors()]
        for way in list(ways)[:: 1 if turn % 2 else -1]:
            jax.clear_caches()
            measured[way].append(ways[way](method, load, clock))
            times.append(time_floors())
        bare.append({part: statistics.median(of_part[part] for of_part in times) for part in times[0]})
    print_parts(measured["learn_tasks"], bare)
    print_ways(measured, bare)
    print_floors(floors, update, bare, updates)


def start(data: str, num_examples: int | None) -> SweepRun:
    """Loads the data, makes the tasks and draws the parameters."""
    train, test, _ = load_part(data, num_examples)
    tasks_key, params_key, key = map(jax.random.key, range(3))
    tasks = permuted_tasks(train, test, NUM_TASKS, tasks_key)
    run = SweepRun(init_network(MODEL, params_key, np.zeros(train.inputs.shape[1:], np.float32)), tasks, key, STRENGTH)
    return jax.block_until_ready(run)


def learn_by_host(method: Method, load: Callable[[], SweepRun], clock: CompilationClock) -> dict[str, float]:
    """Makes the whole run by `learn_tasks`. Returns the seconds of its parts, and the accuracy."""
    evaluations: list[float] = []
    evaluate = continual.scores_of_tasks

    def timed_evaluate(apply_fn: Callable, params: Any, tasks: Sequence[Any], *scenario: Any) -> list[float]:
        jax.block_until_ready(params)
        with timed(clock) as timer:
            accuracies = evaluate(apply_fn, params, tasks, *scenario)
        evaluations.append(timer.seconds)
        return accuracies

    with timed(clock) as loading:
        run = load()
    with timed(clock) as learning, mock.patch.object(continual, "scores_of_tasks", timed_evaluate):
        learned = learn_tasks(
            method, RECIPE, run.params, run.tasks, run.key, strength=run.strength, forward_transfer=False
        )
        jax.block_until_ready((learned.params, learned.consolidation))
    parts = {
        "loading": loading.seconds,
        "compilation": loading.compilation + learning.compilation,
        "training": learned.training_seconds,
        "importance": learned.importance_seconds,
        "evaluation": sum(evaluations),
    }
    total = sum(timer.seconds + timer.compilation for timer in (loading, learning))
    parts |= {"the rest": total - sum(parts.values()), "total": total}
    return parts | {"accuracy": average_accuracy(learned.accuracy_matrix)}


def learn_as_program(method: Method, load: Callable[[], SweepRun], clock: CompilationClock) -> dict[str, float]:
    """Makes the whole run by `learn_sweep`. Returns the seconds of its parts, and the accuracy."""
    with timed(clock) as loading:
        run = load()
    with timed(clock) as learning:
        swept = learn_sweep(method, RECIPE, [run], forward_transfer=False)
    parts = {"loading": loading.seconds, "compilation": loading.compilation + learning.compilation}
    total = sum(parts.values()) + learning.seconds
    return parts | {"total": total, "accuracy": average_accuracy(swept.accuracy_matrix[0])}


def find_floors(num_train: int, num_test: int, fisher: str) -> dict[str, floor.Floor]:
    """Finds the fastest way to compute each part's products, for one task of the run."""
    steps = -(-num_train // BATCH_SIZE)
    batch_sizes = [min(size, num_test) for size in floor.BATCH_SIZES]
    return {
        "training": floor.find_floor("training", SIZES, steps * BATCH_SIZE, [BATCH_SIZE]),
        # The empirical Fisher's products are those of a gradient, at any batch size.
        "importance": floor.find_floor(
            "importance" if fisher == "exact" else "training", SIZES, num_train, floor.BATCH_SIZES
        ),
        # One test set after the first task, two after the second, and so on: the mean per task.
        "evaluation": floor.find_floor("evaluation", SIZES, num_test * (NUM_TASKS + 1) // 2, batch_sizes),
    }


class PenalisedAdam:
    """Adam's update with the proximal step, on arrays of the size of all parameters."""

    def __init__(self) -> None:
        """Draws the arrays, and compiles the update in two ways: in a loop, and alone."""
        self.size = sum((rows + 1) * columns for rows, columns in itertools.pairwise(SIZES))
        arrays = [jax.random.uniform(key, (self.size,)) for key in jax.random.split(jax.random.key(0), 6)]
        self.state, self.given = tuple(arrays[:3]), tuple(arrays[3:])
        self.count = jnp.int32(20)
        # All arrays are arguments, because XLA would compute with constants at compile time.
        compile_fn = functools.partial(jax.jit, donate_argnums=0)
        self.loop = compile_fn(self._updates).lower(self.state, self.given, self.count).compile()
        self.once = compile_fn(self._update).lower(self.state, self.given, jnp.int32(1)).compile()

    @staticmethod
    def _update(state: tuple[jax.Array, ...], given: tuple[jax.Array, ...], count: jax.Array) -> tuple[jax.Array, ...]:
        params, mean, square = state
        gradient, anchor, importance = given
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        step_size = LEARNING_RATE / (jnp.sqrt(square / (1 - 0.999**count)) + 1e-8)
        stiffness = step_size * STRENGTH * importance
        params = params - step_size * mean / (1 - 0.9**count)
        return params - stiffness / (1 + stiffness) * (params - anchor), mean, square

    @classmethod
    def _updates(cls, state: tuple[jax.Array, ...], given: tuple[jax.Array, ...], count: jax.Array) -> Any:
        return jax.lax.fori_loop(1, count + 1, lambda index, state: cls._update(state, given, index), state)

    def seconds(self) -> float:
        """Times one update in the faster of the two ways."""

        def in_loop() -> None:
            self.state = jax.block_until_ready(self.loop(self.state, self.given, self.count))

        def alone() -> None:
            for index in range(int(self.count)):
                self.state = self.once(self.state, self.given, jnp.int32(index + 1))
            jax.block_until_ready(self.state)

        return min(time_call(way) for way in (in_loop, alone)) / int(self.count)


def sum_of_parts(bare: dict[str, float]) -> float:
    """Returns the sum of the floors of all parts."""
    return sum(bare[part] for part in PARTS)


def print_parts(measured: list[dict[str, float]], bare: list[dict[str, float]]) -> None:
    """Prints the parts of the run by `learn_tasks`, and their floors."""
    bare = [turn | {"total": sum_of_parts(turn)} for turn in bare]
    rows = []
    for part in ("loading", "compilation", *PARTS, "the rest", "total"):
        seconds, cells = [turn[part] for turn in measured], ["–", "–"]
        if part in bare[0]:
            floors = [turn[part] for turn in bare]
            cells = [quartiles(floors), quartiles(list(map(operator.truediv, seconds, floors)))]
        rows.append([part, quartiles(seconds), *cells])
    print(markdown_table(["part of `learn_tasks`", "seconds", "floor, s", "times the floor"], rows))


def print_ways(measured: dict[str, list[dict[str, float]]], bare: list[dict[str, float]]) -> None:
    """Prints the whole run by both functions, and both floors."""
    floors = {"products alone": list(map(sum_of_parts, bare))}
    floors["with Adam's traffic"] = [sum_of_parts(turn) + turn["updates"] for turn in bare]
    rows = []
    for way, turns in measured.items():
        seconds = {part: [turn[part] for turn in turns] for part in ("loading", "compilation", "total")}
        ratios = [list(map(operator.truediv, seconds["total"], times)) for times in floors.values()]
        cells = [quartiles(values) for values in (*seconds.values(), *ratios)]
        rows.append([f"`{way}`", *cells, f"{100 * turns[0]['accuracy']:.2f}"])
    rows += [[name, "–", "–", quartiles(times), "–", "–", "–"] for name, times in floors.items()]
    header = ["way", "loading, s", "compilation, s", "total, s", "times the floor", "times the practical floor"]
    print(markdown_table([*header, "average accuracy, %"], rows))


def print_floors(
    floors: dict[str, floor.Floor], update: PenalisedAdam, bare: list[dict[str, float]], updates: int
) -> None:
    """Prints the operations, the rate and the fastest way of each floor."""
    median = {part: statistics.median(turn[part] for turn in bare) for part in bare[0]}
    rows = []
    for part, of_task in floors.items():
        gigaflops = NUM_TASKS * of_task.flops / 1e9
        rows.append([part, f"{gigaflops:.0f} GFLOP", f"{gigaflops / median[part]:.0f} GFLOP/s", of_task.how])
    gigabytes = updates * 9 * 4 * update.size / 1e9
    rate, how = f"{gigabytes / median['updates']:.1f} GB/s", "6 arrays read, 3 written"
    rows.append([f"Adam, {updates} updates", f"{gigabytes:.0f} GB", rate, how])
    print(markdown_table(["floor", "amount", "rate", "fastest way"], rows))


if __name__ == "__main__":
    main()
