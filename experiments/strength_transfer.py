"""Does the best strength for one network suit another? With importances as they are, and normalised.

Networks of several widths and depths learn permuted tasks at a grid of strengths, with the importance of every task as
the method computes it, divided by its mean, or divided by its maximum. The table shows each network's best strength,
and what it costs to use, for one network, the strength that is best for the others; accuracies are on validation data,
a fifth of the training data.
"""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np
import optax
import rich.console

from lifelong_jax import (
    TrainingState,
    methods,
    normalize_importance,
    permuted_tasks,
    proximal_quadratic_penalty,
)
from lifelong_jax.datasets import hold_out_validation, load_dataset
from lifelong_jax.methods import Method
from lifelong_jax.models import MLP, init_network
from lifelong_jax.resuming import open_run, parse_settings
from lifelong_jax.runs import Run, RunSettings, Seeds, check_settings, markdown_table, print_table
from lifelong_jax.sweep import learn_sweep
from lifelong_jax.tuning import average_accuracies, sweep_strengths
from lifelong_jax.types import Batch, OutputFn, Params

DECADES = {"none": range(0, 11), "mean": range(-8, 3), "max": range(-2, 9)}
"""For each normalisation, the half decades of its grid of strengths."""


@dataclasses.dataclass(frozen=True)
class Config(RunSettings):
    """Ask whether the best strength for one network suits another, with importances as they are and normalised."""

    method: Literal["ewc", "mas"] = "ewc"
    """Which importance: Fisher diagonal (ewc) or output sensitivity (mas)."""

    networks: tuple[tuple[int, ...], ...] = ((64,), (256,), (1024,), (128, 128, 128))
    """The widths of each network's hidden layers."""

    num_tasks: int = 3
    """How many tasks, of permuted bundled digits."""

    num_epochs: int = 10
    """Passes over each task's training data."""

    batch_size: int = 32
    """Examples per step."""

    learning_rate: float = 0.1
    """The step size of SGD, with the penalty's proximal step."""

    seeds: Seeds = (0, 1)
    """One sequence of tasks, one initialisation and one order of examples for each."""

    def __post_init__(self) -> None:
        """Refuses what would fail only after much has run."""
        check_settings(
            positive={name: getattr(self, name) for name in ("num_tasks", "num_epochs", "batch_size", "learning_rate")},
            distinct={"networks": self.networks, "seeds": self.seeds},
        )


def main(config: Config) -> None:
    """Runs the study.

    Args:
      config: the whole configuration.
    """
    console = rich.console.Console()
    with open_run(config, "strength_transfer", console) as run:
        best, cost = measure(config, run, console)
        report(config, best, cost, run, console)


def measure(
    config: Config, run: Run, console: rich.console.Console
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Finds each network's best strength, and what the others' best costs it, for each normalisation."""
    dataset = hold_out_validation(load_dataset("digits"), 0.2, jax.random.key(0))
    base = {"ewc": methods.ewc(), "mas": methods.mas("separate")}[config.method]
    best, cost = {}, {}
    for normalization, half_decades in DECADES.items():
        method = base if normalization == "none" else normalized(base, normalization)
        strengths = [10 ** (half_decade / 2) for half_decade in half_decades]
        accuracy = np.zeros((len(config.networks), len(strengths)))
        for row, hidden_sizes in zip(accuracy, config.networks, strict=True):
            model = MLP(hidden_sizes, dataset.num_classes)

            def optimizer_fn(strength: jax.Array) -> optax.GradientTransformation:
                rate = config.learning_rate
                return optax.chain(optax.sgd(rate), proximal_quadratic_penalty(rate, strength))

            name = f"{normalization} {hidden_sizes}"
            learner = functools.partial(
                learn_sweep,
                method,
                model.apply,
                optimizer_fn,
                num_epochs=config.num_epochs,
                batch_size=config.batch_size,
                forward_transfer=False,
            )
            matrices = sweep_strengths(
                {name: learner},
                strengths,
                lambda key: permuted_tasks(dataset.train, dataset.test, config.num_tasks, key),
                functools.partial(init_network, model),
                config.seeds,
                run,
                console,
            )
            row[:] = [estimate.mean for estimate in average_accuracies(matrices[name])]
        accuracy = np.nan_to_num(accuracy)  # where training diverged
        best[normalization] = [strengths[index] for index in accuracy.argmax(axis=1)]
        # The network's best accuracy, less its accuracy at the strength that is best, on average, for the rest.
        for_others = [np.delete(accuracy, index, axis=0).mean(axis=0).argmax() for index in range(len(accuracy))]
        cost[normalization] = accuracy.max(axis=1) - accuracy[range(len(accuracy)), for_others]
    return best, cost


def report(
    config: Config, best: dict[str, list[float]], cost: dict[str, np.ndarray], run: Run, console: rich.console.Console
) -> None:
    """Prints the table; writes `summary.json` and `table.md`."""
    header = ["hidden layers", *(f"best, {name}" for name in DECADES), *(f"cost, {name}" for name in DECADES)]
    rows = [
        [
            "-".join(map(str, hidden_sizes)),
            *(f"{best[name][index]:.2g}" for name in DECADES),
            *(f"{100 * cost[name][index]:.1f}" for name in DECADES),
        ]
        for index, hidden_sizes in enumerate(config.networks)
    ]
    print_table(console, "Best strength, and points of accuracy lost at the others' best", header, rows)
    (run.folder / "table.md").write_text(markdown_table(header, rows))
    run.write_summary({"best": best, "cost": cost})
    console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def normalized(method: Method, to: Literal["mean", "max"]) -> Method:
    """Makes the method whose importance of every task is normalised."""

    def importance_fn(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
        return normalize_importance(method.importance_fn(apply_fn, state, batch, key), to)

    return method._replace(importance_fn=importance_fn)


if __name__ == "__main__":
    main(parse_settings(Config, "strength_transfer"))
