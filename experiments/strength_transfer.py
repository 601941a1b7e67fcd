"""Is the best strength for one network also good for another, and does normalising the importance help?

Networks of several widths and depths learn permuted tasks at a grid of strengths. Each task's importance is used as the
method computes it, divided by its mean, or divided by its maximum. The table has the best strength of each network, and
the accuracy that the network loses at the strength that is best for the others. Accuracies are on validation data, a
fifth of the training data.
"""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np
import optax
import rich.console

from experiments.harness.report import report_tables
from experiments.harness.runs import Run, open_run
from experiments.harness.settings import RunSettings, Seeds, check_num_tasks, check_settings, parse_settings
from experiments.harness.tune import average_accuracies, best_strength, sweep_strengths
from lifelong_jax import (
    Batch,
    Recipe,
    TrainingState,
    learn_sweep,
    methods,
    normalize_importance,
    permuted_tasks,
    proximal_quadratic_penalty,
)
from lifelong_jax.datasets import Dataset, hold_out_validation, load_dataset
from lifelong_jax.methods import Method
from lifelong_jax.models import MLP, init_network
from lifelong_jax.objectives import Objective
from lifelong_jax.types import OutputFn, Params

HALF_DECADES = {"none": range(0, 11), "mean": range(-8, 3), "max": range(-2, 9)}
"""The grid of strengths for each normalisation: each number n stands for the strength 10^(n / 2)."""


@dataclasses.dataclass(frozen=True)
class Config(RunSettings):
    """Find the best strengths for several networks, with and without normalised importances."""

    method: Literal["ewc", "mas"] = "ewc"
    """The importance: the Fisher diagonal (ewc) or the output's sensitivity (mas)."""

    networks: tuple[tuple[int, ...], ...] = ((64,), (256,), (1024,), (128, 128, 128))
    """Widths of the hidden layers of each network."""

    num_tasks: int = 3
    """Number of tasks, made of the bundled digits by permuting pixels."""

    num_epochs: int = 10
    """Passes over each task's training data."""

    batch_size: int = 32
    """Examples per step."""

    learning_rate: float = 0.1
    """The step size of SGD, with the penalty's proximal step."""

    seeds: Seeds = (0, 1)
    """Each seed sets the sequence of tasks, the initial parameters and the order of the examples."""

    def __post_init__(self) -> None:
        """Validates before computing."""
        check_settings(
            positive={name: getattr(self, name) for name in ("num_epochs", "batch_size", "learning_rate")},
            distinct={"networks": self.networks, "seeds": self.seeds},
        )
        check_num_tasks(self.num_tasks, self.num_epochs)


def main(config: Config) -> None:
    """Runs the study."""
    console = rich.console.Console()
    dataset = hold_out_validation(load_dataset("digits"), 0.2, jax.random.key(0))
    with open_run(config, "strength_transfer", console, [dataset]) as run:
        best, cost = measure(config, dataset, run, console)
        report(config, best, cost, run, console)


def measure(
    config: Config, dataset: Dataset, run: Run, console: rich.console.Console
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Finds each network's best strength, and its loss of accuracy at the others' best, for each normalisation."""
    base = {"ewc": methods.ewc(), "mas": methods.mas("separate")}[config.method]
    best: dict[str, list[float]] = {name: [] for name in HALF_DECADES}
    cost = {}

    def optimizer_fn(strength: jax.Array) -> optax.GradientTransformation:
        rate = config.learning_rate
        return optax.chain(optax.sgd(rate), proximal_quadratic_penalty(rate, strength))

    for normalization, half_decades in HALF_DECADES.items():
        method = base if normalization == "none" else normalized(base, normalization)
        strengths = [10 ** (half_decade / 2) for half_decade in half_decades]
        accuracy = np.zeros((len(config.networks), len(strengths)))
        for row, hidden_sizes in zip(accuracy, config.networks, strict=True):
            model = MLP(hidden_sizes, dataset.num_classes)
            name = f"{normalization} {hidden_sizes}"
            recipe = Recipe(model.apply, optimizer_fn, config.num_epochs, config.batch_size)
            learner = functools.partial(learn_sweep, method, recipe, forward_transfer=False)
            matrices = sweep_strengths(
                {name: learner},
                strengths,
                lambda key: permuted_tasks(dataset.train, dataset.test, config.num_tasks, key),
                functools.partial(init_network, model),
                config.seeds,
                run,
                console,
            )
            of_network = average_accuracies(matrices[name])
            best[normalization].append(best_strength(of_network, strengths, name))
            row[:] = [estimate.mean for estimate in of_network]
        accuracy = np.nan_to_num(accuracy)  # NaN where training diverged
        # The network's best accuracy, minus its accuracy at the strength that is best on average for the others.
        for_others = [np.delete(accuracy, index, axis=0).mean(axis=0).argmax() for index in range(len(accuracy))]
        cost[normalization] = accuracy.max(axis=1) - accuracy[range(len(accuracy)), for_others]
    return best, cost


def report(
    config: Config, best: dict[str, list[float]], cost: dict[str, np.ndarray], run: Run, console: rich.console.Console
) -> None:
    """Prints the table; writes `summary.json` and `table.md`."""
    names = list(HALF_DECADES)
    header = ["hidden layers", *(f"best, {name}" for name in names), *(f"cost, {name}" for name in names)]
    rows = [
        [
            "-".join(map(str, hidden_sizes)),
            *(f"{best[name][index]:.2g}" for name in names),
            *(f"{100 * cost[name][index]:.1f}" for name in names),
        ]
        for index, hidden_sizes in enumerate(config.networks)
    ]
    title = "Best strength on validation data, and points of accuracy lost at the others' best"
    report_tables({title: [header, *rows]}, run, console)
    run.write_summary({"best": best, "cost": cost})
    console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def normalized(method: Method, to: Literal["mean", "max"]) -> Method:
    """Makes a method that normalises each task's importance."""

    def importance_fn(
        apply_fn: OutputFn, objective: Objective, state: TrainingState, batch: Batch, key: jax.Array
    ) -> Params:
        return normalize_importance(method.importance_fn(apply_fn, objective, state, batch, key), to)

    return method._replace(importance_fn=importance_fn)


if __name__ == "__main__":
    main(parse_settings(Config, "strength_transfer"))
