"""Shows a run in TensorBoard or Weights & Biases, while it goes on or afterwards.

The loss and the scores of every epoch are read from the run's log, `metrics.jsonl`. TensorBoard has a line for each
sequence of tasks; Weights & Biases has one run for all of them. The program ends with the run, or by Ctrl-C.
"""

import contextlib
import dataclasses
import importlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from experiments.harness.runs import read_rows
from experiments.harness.scores import ACCURACY

Add: TypeAlias = Callable[[str, Mapping[str, float], int], None]
"""`add(sequence, numbers, epochs)`: what was measured of a sequence of tasks after so many epochs."""

PAUSE = 2.0  # seconds between two looks at the log


@dataclasses.dataclass(frozen=True)
class Config:
    """Show a run in TensorBoard or Weights & Biases, while it goes on or afterwards."""

    to: Annotated[Literal["tensorboard", "wandb"], tyro.conf.Positional]
    """tensorboard, which needs `pip install tensorboardX`, and then shows the run's folder by `tensorboard --logdir`;
    or wandb, which needs `pip install wandb`."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """The run's folder, such as results/permuted/2026-01-31-120000."""


def main(config: Config) -> None:
    """Sends each epoch once, until the run is finished."""
    if not (config.run / "config.json").exists():
        raise SystemExit(f"error: there is no run in {config.run}: it has no config.json")
    name, connect = {"tensorboard": ("tensorboardX", tensorboard), "wandb": ("wandb", wandb)}[config.to]
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error}: pip install {name}") from error
    sent: set[tuple] = set()
    with contextlib.suppress(KeyboardInterrupt), connect(package, config.run) as add:
        while True:
            finished = (config.run / "summary.json").exists()  # before the log is read, so that nothing is missed
            send(config.run, add, sent)
            if finished:
                break
            time.sleep(PAUSE)
    print(f"{len(sent)} epochs sent")


def send(run: pathlib.Path, add: Add, sent: set[tuple]) -> None:
    """Sends the epochs of a run's log that are not in `sent`, and adds them to it."""
    for row in read_rows(run):
        if row.get("event") == "epoch" and (row["method"], row["seed"], row["epochs"]) not in sent:
            name = row.get("score", ACCURACY.name)
            measured = {f"{name}/task {number}": score for number, score in enumerate(row["accuracies"], 1)}
            if row["loss"] is not None:  # NaN or infinite, in JSON
                measured["loss"] = row["loss"]
            add(f"{row['method']}, seed {row['seed']}", measured, row["epochs"])
            sent.add((row["method"], row["seed"], row["epochs"]))


@contextlib.contextmanager
def tensorboard(package: Any, run: pathlib.Path) -> Iterator[Add]:
    """Writes TensorBoard's files into the run's folder `tensorboard`, in place of earlier ones."""
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    with contextlib.ExitStack() as stack:
        writers: dict[str, Any] = {}

        def add(sequence: str, numbers: Mapping[str, float], epochs: int) -> None:
            if sequence not in writers:
                writers[sequence] = stack.enter_context(package.SummaryWriter(str(run / "tensorboard" / sequence)))
            for name, number in numbers.items():
                writers[sequence].add_scalar(name, number, epochs)
            writers[sequence].flush()

        yield add


@contextlib.contextmanager
def wandb(package: Any, run: pathlib.Path) -> Iterator[Add]:
    """Sends numbers to a run of Weights & Biases that has the names of the script and of the run's folder."""
    folder = run.resolve()
    name = f"{folder.parent.name}-{folder.name}"
    config = json.loads((run / "config.json").read_text())
    with package.init(project="lifelong_jax", id=name, name=name, resume="allow", config=config) as tracked:

        def add(sequence: str, numbers: Mapping[str, float], epochs: int) -> None:
            tracked.define_metric(f"{sequence}/*", step_metric=f"{sequence}/epochs")
            tracked.log({f"{sequence}/{key}": number for key, number in {**numbers, "epochs": epochs}.items()})

        yield add


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.track"))
