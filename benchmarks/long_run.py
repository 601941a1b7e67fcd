"""Measures whether a long run grows, and what checkpoints cost a short one, and prints Markdown tables.

    python -m benchmarks.long_run

One network learns 200 permuted tasks of the bundled digits with EWC, an epoch each, logged and kept as the scripts do.
The first table has, at points of the sequence, the process's memory, the arrays alive on the device, the compilations
so far, and the size of the log and of the checkpoints. The second is of `python -m experiments.permuted` as it stands:
the time that writing checkpoints and tasks takes, as a share of the whole run's.
"""

import argparse
import contextlib
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.monitoring
import optax
import psutil

from experiments import permuted
from lifelong_jax import Progress, add_quadratic_penalty, learn_tasks, methods, permuted_tasks, resuming
from lifelong_jax.datasets import load_dataset
from lifelong_jax.models import MLP, init_network
from lifelong_jax.resuming import ResumableSequence
from lifelong_jax.runs import Run, markdown_table

MIB = 2**20


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=200, help="length of the sequence")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the short run")
    parser.add_argument("--epochs", type=int, default=20, help="of the short run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(growth(pathlib.Path(folder), arguments.tasks))
        print(cost(pathlib.Path(folder), tuple(arguments.seeds), arguments.epochs))


def growth(folder: pathlib.Path, num_tasks: int) -> str:
    """Measures a long sequence at ten points."""
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
    learn_tasks(
        methods.ewc(),
        model.apply,
        lambda strength: optax.chain(add_quadratic_penalty(strength), optax.sgd(0.01, momentum=0.9)),
        init_network(model, params_key, dataset.train.inputs[0]),
        tasks,
        key,
        strength=10.0,
        num_epochs=1,
        batch_size=32,
        report=report,
        checkpoints=sequence,
    )
    header = ["tasks learned", "memory, MiB", "arrays", "in them, MiB", "compilations", "log, MiB", "checkpoints, MiB"]
    return markdown_table(header, rows)


def cost(folder: pathlib.Path, seeds: tuple[int, ...], num_epochs: int) -> str:
    """Times what is written, within the whole run."""
    config = permuted.Config(seeds=seeds, num_epochs=num_epochs, output_dir=str(folder))
    start = time.perf_counter()
    with timed(resuming, "save_checkpoint") as checkpoints, timed(resuming, "save_consolidation") as kept:
        permuted.main(config)
    total = time.perf_counter() - start
    rows = [
        [name, str(len(seconds)), f"{sum(seconds):.2f}", f"{100 * sum(seconds) / total:.2f}"]
        for name, seconds in (("checkpoints", checkpoints), ("tasks kept", kept), ("the whole run", [total]))
    ]
    return markdown_table(["written", "number", "seconds", "percent"], rows)


@contextlib.contextmanager
def timed(module: object, name: str) -> Iterator[list[float]]:
    """Yields the seconds that each call of a module's function takes."""
    function: Callable = getattr(module, name)
    seconds = []

    @functools.wraps(function)
    def call(*arguments: object, **options: object) -> None:
        start = time.perf_counter()
        function(*arguments, **options)
        seconds.append(time.perf_counter() - start)

    setattr(module, name, call)
    try:
        yield seconds
    finally:
        setattr(module, name, function)


if __name__ == "__main__":
    main()
