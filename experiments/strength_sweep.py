"""Learns permuted tasks at strengths over twelve decades, with the penalty at each place in the optimiser's pipeline.

The penalty can be coupled (its gradient is added to the loss's before the preconditioner), decoupled (after it) or
proximal (a closed-form step after the optimiser's own). The picture has the average accuracy against the strength, and
where training diverges. Accuracies are on validation data, a fifth of the training data.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import numpy as np
import optax
import rich.console
import tyro

from experiments.harness.experiment import load_or_exit
from experiments.harness.report import Estimate, fail_if_all_diverged, format_estimate, report_tables
from experiments.harness.runs import Run, open_run
from experiments.harness.settings import (
    DatasetName,
    DataSettings,
    Numbers,
    Seeds,
    check_num_tasks,
    check_settings,
    parse_settings,
)
from experiments.harness.tune import average_accuracies, sweep_strengths
from lifelong_jax import (
    Recipe,
    add_quadratic_penalty,
    learn_sweep,
    methods,
    permuted_tasks,
    proximal_adam,
    proximal_quadratic_penalty,
)
from lifelong_jax.datasets import hold_out_validation
from lifelong_jax.models import MLP, init_network
from lifelong_jax.types import OptimizerFn


@dataclasses.dataclass(frozen=True)
class Config(DataSettings):
    """Learn permuted tasks at strengths over twelve decades, with the penalty at each place in the pipeline."""

    dataset: DatasetName = "digits"

    method: Literal["l2", "ewc", "mas", "kfac"] = "ewc"
    """The importance: equal for all parameters (l2), the Fisher diagonal (ewc), the output's sensitivity (mas), or the
    Fisher with Kronecker factors (kfac), which the pipeline proximal_adam does not take."""

    optimizers: tuple[Literal["sgd", "adam"], ...] = ("sgd", "adam")
    """The optimisers. Each has a panel of the picture."""

    strengths: Annotated[Numbers, tyro.conf.arg(name="strength")] = tuple(10.0**decade for decade in range(-3, 10))
    """The strengths λ."""

    num_tasks: int = 3
    """How many tasks."""

    hidden_sizes: tuple[int, ...] = (100,)
    """Widths of the network's hidden layers."""

    num_epochs: int = 10
    """Passes over each task's training data."""

    batch_size: int = 32
    """Examples per step."""

    sgd_learning_rate: float = 0.1
    """The step size of plain SGD."""

    adam_learning_rate: float = 2e-3
    """The step size of Adam."""

    seeds: Seeds = (0, 1, 2)
    """Each seed sets the sequence of tasks, the initial parameters and the order of the examples."""

    def __post_init__(self) -> None:
        """Validates before computing."""
        super().__post_init__()
        names = ("hidden_sizes", "num_epochs", "batch_size", "sgd_learning_rate", "adam_learning_rate")
        check_settings(
            positive={name: getattr(self, name) for name in names},
            not_negative={"strengths": self.strengths},
            distinct={name: getattr(self, name) for name in ("optimizers", "strengths", "seeds")},
        )
        check_num_tasks(self.num_tasks, self.num_epochs)


def main(config: Config) -> None:
    """Runs the sweep."""
    console = rich.console.Console()
    dataset = load_or_exit(config.dataset, config)
    dataset = hold_out_validation(dataset, 0.2, jax.random.key(0))  # so that no choice is made on test data
    model = MLP(config.hidden_sizes, dataset.num_classes)
    method = {"l2": methods.l2(), "ewc": methods.ewc(), "mas": methods.mas(), "kfac": methods.kfac()}[config.method]
    pipelines = make_pipelines(config)
    learners = {
        f"{optimizer} {place}": functools.partial(
            learn_sweep,
            method,
            Recipe(model.apply, optimizer_fn, config.num_epochs, config.batch_size),
            forward_transfer=False,
        )
        for optimizer in config.optimizers
        for place, optimizer_fn in pipelines[optimizer].items()
    }
    with open_run(config, "strength_sweep", console, [dataset]) as run:
        matrices = sweep_strengths(
            learners,
            config.strengths,
            lambda key: permuted_tasks(dataset.train, dataset.test, config.num_tasks, key),
            functools.partial(init_network, model),
            config.seeds,
            run,
            console,
        )
        accuracies = {name: average_accuracies(of_learner) for name, of_learner in matrices.items()}
        report(config, {name: list(pipelines[name]) for name in config.optimizers}, accuracies, run, console)
        fail_if_all_diverged(at_strength.values for of_learner in accuracies.values() for at_strength in of_learner)


def make_pipelines(config: Config) -> dict[str, dict[str, OptimizerFn]]:
    """Makes a pipeline for each optimiser and each place of the penalty."""

    def places(preconditioner: optax.GradientTransformation, learning_rate: float) -> dict[str, OptimizerFn]:
        rate = optax.scale_by_learning_rate(learning_rate)
        return {
            "coupled": lambda strength: optax.chain(add_quadratic_penalty(strength), preconditioner, rate),
            "decoupled": lambda strength: optax.chain(preconditioner, add_quadratic_penalty(strength), rate),
            "proximal": lambda strength: optax.chain(
                preconditioner, rate, proximal_quadratic_penalty(learning_rate, strength)
            ),
        }

    adam = places(optax.scale_by_adam(), config.adam_learning_rate)
    if config.method != "kfac":
        adam["proximal_adam"] = lambda strength: proximal_adam(config.adam_learning_rate, strength)
    return {"sgd": places(optax.identity(), config.sgd_learning_rate), "adam": adam}


def report(
    config: Config,
    places: dict[str, list[str]],
    accuracies: dict[str, list[Estimate]],
    run: Run,
    console: rich.console.Console,
) -> None:
    """Prints the table; writes `summary.json`, `table.md` and `strength_sweep.png`."""
    from lifelong_jax.plotting import plot_strength_sweep  # here, as matplotlib is slow to import

    by_strength = {
        name: dict(zip(map("{:.3g}".format, config.strengths), of_learner, strict=True))
        for name, of_learner in accuracies.items()
    }
    run.write_summary({"average_accuracy": by_strength})
    accuracy = {
        optimizer: {place: accuracies[f"{optimizer} {place}"] for place in places[optimizer]}
        for optimizer in config.optimizers
    }
    header = ["strength", *(f"{optimizer} {place}" for optimizer in accuracy for place in accuracy[optimizer])]
    columns = [column for by_place in accuracy.values() for column in by_place.values()]
    rows = [
        [f"{strength:.0e}", *(format_estimate(column[index], 100) for column in columns)]
        for index, strength in enumerate(config.strengths)
    ]
    setting = f"{config.num_tasks} permuted tasks of {config.dataset}, {config.method}: accuracy on validation data"
    report_tables({f"{setting}, percent (–: diverged)": [header, *rows]}, run, console)
    title = f"{setting}\n{finding(accuracy, config.strengths)}"
    console.print(title, highlight=False)
    values = {
        optimizer: {place: [of_strength.values for of_strength in column] for place, column in by_place.items()}
        for optimizer, by_place in accuracy.items()
    }
    figure = plot_strength_sweep(values, config.strengths, title, "average validation accuracy")
    figure.savefig(run.folder / "strength_sweep.png")
    console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def finding(accuracy: dict[str, dict[str, list[Estimate]]], strengths: tuple[float, ...]) -> str:
    """Names the pipelines that diverge, and the lowest strength at which they do."""
    diverged = [
        f"{optimizer} {place} from {strengths[np.isnan([estimate.mean for estimate in estimates]).argmax()]:.0e}"
        for optimizer, places in accuracy.items()
        for place, estimates in places.items()
        if np.isnan([estimate.mean for estimate in estimates]).any()
    ]
    return f"diverging: {', '.join(diverged) or 'none'}"


if __name__ == "__main__":
    main(parse_settings(Config, "strength_sweep"))
