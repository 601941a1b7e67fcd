"""Measures whether memory grows in a long run, and the cost of checkpoints in a short one; prints Markdown tables.

    python -m benchmarks.long_run

For the first table, a network learns 200 permuted tasks of the bundled digits with EWC, one epoch each, with the log
and the checkpoints of the scripts. The table has the process's memory, the arrays on the device, the compilations so
far, and the sizes of the log and the checkpoints, at ten points of the run. The second table has the time that
`python -m experiments.permuted` takes to write checkpoints and tasks, as a share of its whole time.
"""

import argparse
import contextlib
import functools
import pathlib
import tempfile
from collections.abc import Iterator
from unittest import mock

import jax
import jax.monitoring
import optax
import psutil

from benchmarks.timing import time_call
from experiments import permuted
from experiments.harness import sequences
from experiments.harness.runs import Run
from experiments.harness.sequences import ResumableSequence, learn_resumably
from lifelong_jax import Progress, Recipe, add_quadratic_penalty, methods, permuted_tasks
from lifelong_jax._tables import markdown_table
from lifelong_jax.datasets import load_dataset
from lifelong_jax.models import MLP, init_network

MIB = 2**20


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=200, help="number of tasks of the long run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the short run")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the short run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(growth(pathlib.Path(folder), arguments.tasks))
        print(cost(pathlib.Path(folder), tuple(arguments.seeds), arguments.epochs))


def optimizer_fn(strength: jax.Array) -> optax.GradientTransformation:
    """Makes SGD with momentum and a coupled penalty."""
    return optax.chain(add_quadratic_penalty(strength), optax.sgd(0.01, momentum=0.9))


def growth(folder: pathlib.Path, num_tasks: int) -> str:
    """Measures a long run at ten points."""
    dataset = load_dataset("digits")
    model = MLP((64,), dataset.num_classes)
    tasks_key, params_key, key = jax.random.split(jax.random.key(0), 3)
    tasks = permuted_tasks(dataset.train, dataset.test, num_tasks, tasks_key)
    sequence = ResumableSequence(Run(folder), method="ewc", seed=0, keep_tasks=True)
    compilations, rows = [], []

    def count_compilation(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(seconds)

    def report(progress: Progress) -> None:
        sequence.log_epoch(progress)
        if (10 * progress.epochs) % num_tasks < 10:
            arrays = jax.live_arrays()
            checkpoints = sum(file.stat().st_size for file in folder.rglob("checkpoints/**/*") if file.is_file())
            rows.append(
                [
                    str(progress.epochs),
                    f"{psutil.Process().memory_info().rss / MIB:.0f}",
                    f"{len(arrays)}",
                    f"{sum(array.nbytes for array in arrays) / MIB:.1f}",
                    str(len(compilations)),
                    f"{(folder / 'metrics.jsonl').stat().st_size / MIB:.2f}",
                    f"{checkpoints / MIB:.2f}",
                ]
            )

    jax.monitoring.register_event_duration_secs_listener(count_compilation)
    recipe = Recipe(model.apply, optimizer_fn, num_epochs=1, batch_size=32)
    params = init_network(model, params_key, dataset.train.inputs[0])
    learn_resumably(methods.ewc(), recipe, 10.0, params, tasks, key, sequence, report)
    header = ["tasks learned", "memory, MiB", "arrays", "in them, MiB", "compilations", "log, MiB", "checkpoints, MiB"]
    return markdown_table(header, rows)


def cost(folder: pathlib.Path, seeds: tuple[int, ...], num_epochs: int) -> str:
    """Times a short run, and the writing of its checkpoints and tasks."""
    config = permuted.Config(seeds=seeds, num_epochs=num_epochs, output_dir=str(folder))
    with timed_calls(sequences, "save_checkpoint") as checkpoints, timed_calls(sequences, "save_consolidation") as kept:
        total = time_call(functools.partial(permuted.main, config))
    rows = [
        [name, str(len(seconds)), f"{sum(seconds):.2f}", f"{100 * sum(seconds) / total:.2f}"]
        for name, seconds in (("checkpoints", checkpoints), ("tasks kept", kept), ("the whole run", [total]))
    ]
    return markdown_table(["written", "number", "seconds", "percent"], rows)


@contextlib.contextmanager
def timed_calls(module: object, name: str) -> Iterator[list[float]]:
    """Yields a list that gets the seconds of each call of a module's function."""
    function, seconds = getattr(module, name), []

    def call(*arguments: object, **options: object) -> None:
        seconds.append(time_call(functools.partial(function, *arguments, **options)))

    with mock.patch.object(module, name, call):
        yield seconds


if __name__ == "__main__":
    main()
