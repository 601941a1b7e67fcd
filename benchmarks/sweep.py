"""Measures how many runs per second a sweep makes, one by one and several at once, and prints Markdown tables.

    python -m benchmarks.sweep
    python -m benchmarks.sweep --setting mnist

A run learns three permuted tasks with EWC, the exact Fisher and Adam, and evaluates all tasks before and after each
task. Runs differ in seed and strength. `learn_tasks` is a loop on the host, and also evaluates after each epoch.
`learn_sweep` makes one program of several runs by `vmap`. On a CPU, single runs are also executed in as many threads as
there are cores, as the scripts do in comparisons (`learn_tasks`) and in sweeps (`learn_sweep`). All ways take turns in
one process. Runs per second are medians over the turns, with quartiles. Compilation is the time of tracing, lowering
and compiling in each way's first call; the threads reuse the compiled program of one run.

The floor has only the matrix products of the run (see `benchmarks/floor.py`): of all training steps, of the Fisher, and
of the program's evaluations. It is the fastest per run of: one run on all cores, one run per core in threads, and
several runs by `vmap`. The runs per second of its fastest turn are the most that this machine could make.
"""

import argparse
import concurrent.futures
import functools
import os
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import optax

from benchmarks import floor
from benchmarks.floor import AtOnce, Floor
from benchmarks.timing import CompilationClock, load_part, quartiles, time_call, timed
from lifelong_jax import (
    Recipe,
    SweepRun,
    add_quadratic_penalty,
    learn_sweep,
    learn_tasks,
    methods,
    permuted_tasks,
)
from lifelong_jax._tables import markdown_table
from lifelong_jax.models import MLP, init_network

NUM_TASKS = 3
STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
BATCH_SIZES = (64, 256, 512)  # tried for the floors of the Fisher and of evaluation


class Setting(NamedTuple):
    """The settings of a run.

    Attributes:
      hidden_sizes: the widths of the network's hidden layers.
      batch_size: examples per step.
      num_epochs: passes over each task's training examples.
      num_examples: training examples, and six times the number of test examples; None for all.
    """

    hidden_sizes: tuple[int, ...]
    batch_size: int
    num_epochs: int
    num_examples: int | None


SETTINGS = {"digits": Setting((256, 256), 32, 5, None), "mnist": Setting((400, 400), 128, 1, 12000)}


def main(given: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--setting", choices=SETTINGS, default="digits", help="data, network and batch size")
    parser.add_argument("--turns", type=int, default=5, help="number of turns")
    numbers = [1, 4, 16] if on_cpu else [1, 16, 128]
    parser.add_argument("--runs", type=int, nargs="+", default=numbers, help="runs at once")
    parser.add_argument("--examples", type=int, help="training examples per task; test examples are a sixth of that")
    parser.add_argument("--epochs", type=int, help="passes over each task")
    arguments = parser.parse_args(given)
    setting = SETTINGS[arguments.setting]
    setting = setting._replace(
        num_examples=arguments.examples or setting.num_examples, num_epochs=arguments.epochs or setting.num_epochs
    )
    threads = (os.cpu_count() or 1) if on_cpu else 1
    print(floor.machine())
    runs, model = make_runs(arguments.setting, setting, max(*arguments.runs, threads))
    ways = make_ways(model, runs, setting, arguments.runs, threads)
    clock, compilation = CompilationClock(), {}
    for name, (_, learn) in ways.items():
        with timed(clock) as timer:
            learn()
        compilation[name] = timer.compilation
    tried = [AtOnce(), *(AtOnce(vmapped=count) for count in arguments.runs if count > 1)]
    tried += [AtOnce(threads=threads)] if threads > 1 else []
    floors = make_floors(runs[0], setting, model.num_outputs, tried)
    rates, of_floor = take_turns(ways, floors, arguments.turns)
    print_rates(ways, rates, compilation, of_floor)
    rows = [[part, f"{bare.flops / 1e9:.2f}", bare.how] for part, bare in floors.items()]
    print(markdown_table(["floor", "GFLOP per run", "fastest way"], rows))


def make_runs(name: str, setting: Setting, num_runs: int) -> tuple[list[SweepRun], MLP]:
    """Makes runs of several seeds at several strengths. Runs with the same seed share their tasks."""
    train, test, num_classes = load_part(name, setting.num_examples)
    model = MLP(setting.hidden_sizes, num_classes)

    @functools.cache
    def begin(seed: int) -> SweepRun:
        tasks_key, params_key, key = jax.random.split(jax.random.key(seed), 3)
        tasks = permuted_tasks(train, test, NUM_TASKS, tasks_key)
        return SweepRun(init_network(model, params_key, train.inputs[0]), tasks, key, 0.0)

    places = [divmod(index, len(STRENGTHS)) for index in range(num_runs)]
    return [begin(seed)._replace(strength=STRENGTHS[number]) for seed, number in places], model


def optimizer_fn(strength: jax.Array) -> optax.GradientTransformation:
    """Makes Adam with a coupled penalty."""
    return optax.chain(add_quadratic_penalty(strength), optax.adam(1e-3))


def make_ways(
    model: MLP, runs: Sequence[SweepRun], setting: Setting, numbers: Sequence[int], threads: int
) -> dict[str, tuple[int, Callable[[], object]]]:
    """Returns each way by name: the number of runs that a call makes, and the call."""
    method = methods.ewc()
    recipe = Recipe(model.apply, optimizer_fn, setting.num_epochs, setting.batch_size)

    def by_host(run: SweepRun) -> object:
        learned = learn_tasks(method, recipe, run.params, run.tasks, run.key, strength=run.strength)
        return jax.block_until_ready(learned.params)

    def by_program(*at_once: SweepRun) -> object:
        return learn_sweep(method, recipe, at_once)

    def in_threads(learn: Callable[[SweepRun], object]) -> None:
        with concurrent.futures.ThreadPoolExecutor(threads) as executor:
            list(executor.map(learn, runs[:threads]))

    ways: dict[str, tuple[int, Callable[[], object]]] = {"`learn_tasks`": (1, functools.partial(by_host, runs[0]))}
    for number in numbers:
        ways[f"`learn_sweep` of {number}"] = (number, functools.partial(by_program, *runs[:number]))
    if threads > 1:
        for name, learn in {"`learn_tasks`": by_host, "`learn_sweep` of 1": by_program}.items():
            ways[f"{name}, in {threads} threads"] = (threads, functools.partial(in_threads, learn))
    return ways


def make_floors(run: SweepRun, setting: Setting, num_classes: int, tried: Sequence[AtOnce]) -> dict[str, Floor]:
    """Finds the fastest way to compute the products of each part of a run."""
    train, test = run.tasks[0].train, run.tasks[0].test
    sizes = (train.inputs[0].size, *setting.hidden_sizes, num_classes)
    num_train, num_test = len(train.labels), len(test.labels)
    num_trained = NUM_TASKS * setting.num_epochs * -(-num_train // setting.batch_size) * setting.batch_size
    num_tested = NUM_TASKS * (NUM_TASKS + 1) * num_test
    by_task, by_test_set = ([min(size, number) for size in BATCH_SIZES] for number in (num_train, num_test))
    return {
        "training": floor.find_floor("training", sizes, num_trained, [setting.batch_size], tried),
        "importance": floor.find_floor("importance", sizes, NUM_TASKS * num_train, by_task, tried),
        "evaluation": floor.find_floor("evaluation", sizes, num_tested, by_test_set, tried),
    }


def take_turns(
    ways: dict[str, tuple[int, Callable[[], object]]], floors: dict[str, Floor], turns: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Times all ways and the floors in each turn. Returns their runs per second."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    of_floor = []
    for turn in range(turns):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            num_runs, learn = ways[name]
            rates[name].append(num_runs / time_call(learn))
        of_floor.append(1 / sum(bare.seconds() for bare in floors.values()))
    return rates, of_floor


def print_rates(
    ways: dict[str, tuple[int, Callable[[], object]]],
    rates: dict[str, list[float]],
    compilation: dict[str, float],
    of_floor: list[float],
) -> None:
    """Prints the table. "Times the floor" is the time per run divided by the floor's."""
    digits = 2 if statistics.median(of_floor) > 1 else 4
    header = ["way", "runs at once", "runs per second", "times the floor", "compilation, s"]
    rows = []
    for name, (num_runs, _) in ways.items():
        times = max(of_floor) / statistics.median(rates[name])
        rate = quartiles(rates[name], digits)
        rows.append([name, str(num_runs), rate, f"{times:.2f}", f"{compilation[name]:.1f}"])
    rows.append(["products alone", "–", quartiles(of_floor, digits), "1.00", "–"])
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
